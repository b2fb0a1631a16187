"""Draw the README's pictures, or print a conversation: python .ci/pictures.py [--text]

The real program trains and talks with the WeChat server of the tests on loopback, as 文件传输助手. What
both said, in the order in which the server saw it, is drawn as it looks on a phone and saved as
.github/conversation.png, the last curve as .github/curve.png; --text prints it instead. Drawing takes
headless Chromium and a Chinese font: apt-get install chromium fonts-noto-cjk
"""

import argparse
import base64
import html
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple, Union

from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import utils  # before MXNet, which the tests import

# isort: split
from test_wechat_train import DEADLINE, SAMPLE, FileHelper, Program, write_idx

# ------------------------------------------------------------------------------------ the conversation


class Step(NamedTuple):
    """What the person writes, a regex for what comes until the next step, and a pause before writing."""

    text: str
    pattern: str
    pause: float = 0.7  # seconds: about the middle of an epoch


STEPS = [
    Step('lr 0.02, ti 6, bs 4', '批量 bs = 4'),
    Step('早停 3', '早停 0'),
    Step('开始', '第 1/6 轮'),
    Step('状态', '主机'),
    Step('lr x0.5', '批量 bs = 4', 0),
    Step('错图', '图片'),
    Step('报告 3', '好，每 3 轮'),
    Step('停止', '训练已停止'),
    Step('回退', '回到了'),
    Step('帮助', '【设值】'),
    Step('安静', '报告 1'),
    Step('继续', '训练完成.*图片'),
    Step('记录', '★'),
    Step('曲线 1', '图片'),
]
OWN = """
import time, utils, itchat, wechat_train

def chat_inf(*args, chat_inf=utils.chat_inf):
    chat_inf(*args, error=1 - args[-1])  # a number of one's own
    if args[1] == 3:
        utils.chat_send('第 3 轮过了，去看看错图。')  # words of one's own

def batch_loss(loss, batch_loss=utils.batch_loss):
    if (utils.run.epochs, utils.run.batch) == (4, 100):
        time.sleep(7)  # it stands still
    return batch_loss(loss)

utils.chat_inf, utils.batch_loss = chat_inf, batch_loss
utils.options.silence = 5  # seconds instead of five minutes
utils.chat_supervisor(wechat_train.nn_train)
itchat.auto_login(hotReload=True)
itchat.run()
"""


class Message(NamedTuple):
    """A message that the server saw."""

    time: float
    mine: bool  # did the person write it, or the program?
    content: Union[str, bytes]  # a picture is its bytes

    def text(self) -> str:
        """Return the text, without the name of the host."""
        picture = isinstance(self.content, bytes)
        host = '主机 ' + socket.gethostname()
        return '[图片]' if picture else self.content.replace(host, '主机 （主机名）')


class Chat(FileHelper):
    """The server of 文件传输助手; `talk` is what both sides said, in its order."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.talk = []

    def come_back(self, message, number):
        self.talk.append(Message(time.time(), False, self.sent[-1][1]))
        super().come_back(message, number)

    def take(self, step: Step) -> None:
        """Write the step's text and wait for what it waits for."""
        time.sleep(step.pause)
        with self.changed:
            since = len(self.talk)
            self.talk.append(Message(time.time(), True, step.text))
            self.says(self.owner, step.text)
            said = lambda: '\n'.join(m.text() for m in self.talk[since + 1 :])  # noqa: E731
            if not self.changed.wait_for(lambda: re.search(step.pattern, said(), re.DOTALL), DEADLINE):
                sys.exit('waited in vain for %r after:\n%s' % (step.pattern, as_text(self.talk)))


def converse(steps: list) -> list:
    """Let the real program train and take the steps with it; return the messages."""
    with tempfile.TemporaryDirectory() as folder:
        chat = Chat(folder)
        args = '--filehelper', '--data', images(os.path.join(folder, 'images'))
        env = dict(chat.env(), OMP_NUM_THREADS='1')  # two would wait for each other on a busy machine
        script = os.path.join(folder, 'own.py')
        with open(script, 'w', encoding='utf-8') as f:
            f.write(OWN)
        program = Program(folder, *args, env=env, script=script)
        try:
            chat.ready()
            for step in steps:
                chat.take(step)
        finally:
            program.kill()
            program.process.wait()
        if chat.faults or 'Traceback' in program.output():
            sys.exit('%r\n%s' % (chat.faults, program.output()))
        return chat.talk


def images(folder: str) -> str:
    """Return a folder with the four IDX files: the real sample when it is there, else drawn images."""
    if os.path.isdir(SAMPLE):
        return os.path.abspath(SAMPLE)
    print('drawn images, not Fashion-MNIST: there is no %s' % SAMPLE, file=sys.stderr)
    os.mkdir(folder)
    for part, n, seed in (('train', 3000, 0), ('t10k', 600, 1)):
        for kind, array in zip(('images-idx3', 'labels-idx1'), utils.draw_garments(n, seed)):
            write_idx(os.path.join(folder, '%s-%s-ubyte.gz' % (part, kind)), array)
    return folder


def as_text(talk: list) -> str:
    """Return the messages as the README prints a conversation."""
    lines = [('我：' if m.mine else '    → ') + m.text().replace('\n', '\n      ') for m in talk]
    return '\n'.join(lines)


# ------------------------------------------------------------------------------------------ the drawing

WIDTH, HEIGHT, SCALE = 820, 848, 2  # CSS pixels, and pixels in each; two phones side by side
LARGEST = 150_000  # bytes of a PNG
OPTIONS = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=%d' % SCALE
).split() + ['--host-resolver-rules=MAP * ~NOTFOUND']
PAGE = """<!DOCTYPE html><html lang="zh-CN"><meta charset="utf-8"><style>
* { box-sizing: border-box; margin: 0 }
body { display: flex; justify-content: space-between; width: 820px; height: 848px; background: #fff;
  font: 15px/20px "Noto Sans CJK SC", sans-serif; color: #191919 }
.phone { width: 398px; background: #ededed; border: 1px solid #d0d0d0; border-radius: 18px }
header { display: flex; align-items: center; justify-content: space-between; height: 44px; padding: 0 12px;
  border-bottom: 1px solid #dadada; font-size: 16px }
svg { width: 24px; height: 24px; fill: none; stroke: #191919; stroke-width: 2.4; stroke-linecap: round }
.chat { display: flex; flex-direction: column; height: 802px; overflow: hidden; padding: 10px }
time { align-self: center; margin-bottom: 9px; font-size: 12px; line-height: 16px; color: #9b9b9b }
.row { display: flex; gap: 10px; margin-bottom: 9px; flex: none } .mine { flex-direction: row-reverse }
b { flex: none; width: 34px; height: 34px; border-radius: 5px; background: #5b7fa6 }
p { position: relative; max-width: 272px; padding: 7px 10px; border-radius: 6px; background: #fff;
  white-space: pre-wrap; overflow-wrap: anywhere }
p::before { content: ""; position: absolute; top: 12px; left: -4px; width: 10px; height: 10px;
  background: inherit; transform: rotate(45deg); border-radius: 2px }
.mine b { background: #e2a04a } .mine p { background: #95ec69 } .mine p::before { left: auto; right: -4px }
img { display: block; width: 150px }
</style>%s%s<script>
onload = () => { // the first phone shows what fits of the beginning, the second one of the end
  const [first, second] = document.querySelectorAll('.chat')
  const full = (chat) => chat.scrollHeight > chat.clientHeight
  while (full(first)) first.lastChild.remove()
  for (const shown of [...first.children]) second.firstChild.remove()
  while (full(second)) second.firstChild.remove()
}
</script>"""
PHONE = """<div class="phone"><header><svg viewBox="0 0 24 24"><path d="M10 5l-7 7 7 7"/></svg>文件传输助手
<svg viewBox="0 0 24 24"><path d="M5 12h0M12 12h0M19 12h0"/></svg></header><div class="chat">%s</div></div>"""


def bubbles(talk: list) -> str:
    """Return the messages as HTML, with the time after five minutes of silence, as WeChat has it."""
    parts, last = [], 0
    for message in talk:
        if message.time - last > 300:
            parts.append(time.strftime('<time>%H:%M</time>', time.localtime(message.time)))
        last, content = message.time, html.escape(message.text())
        if isinstance(message.content, bytes):
            content = '<img src="data:image/png;base64,%s">' % base64.b64encode(message.content).decode()
        parts.append('<div class="row%s"><b></b><p>%s</p></div>' % (' mine' * message.mine, content))
    return ''.join(parts)


def draw(talk: list, browser: str) -> Image.Image:
    """Return the conversation as a picture: the screens of two phones."""
    with tempfile.TemporaryDirectory() as folder:
        page, shot, profile = (os.path.join(folder, name) for name in ('page.html', 'shot.png', 'profile'))
        with open(page, 'w', encoding='utf-8') as f:
            f.write(PAGE % ((PHONE % bubbles(talk),) * 2))
        options = ['--user-data-dir=' + profile, '--screenshot=' + shot]
        options += ['--window-size=%d,%d' % (WIDTH, HEIGHT + 200)]  # higher by more than a window's frame
        done = subprocess.run([browser, *OPTIONS, *options, 'file://' + page], capture_output=True, text=True)
        if not os.path.exists(shot):
            sys.exit('%s has drawn nothing:\n%s' % (browser, done.stderr))
        with Image.open(shot) as image:
            return image.crop((0, 0, WIDTH * SCALE, HEIGHT * SCALE))


def save(image: Image.Image, name: str) -> None:
    """Save a picture as .github/<name>, with as many colours as its size allows."""
    path = os.path.join(ROOT, '.github', name)
    for colours in (256, 128, 64, 32):
        image.convert('RGB').quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if os.path.getsize(path) < LARGEST:
            break
    print('.github/%s: %d x %d, %d bytes' % (name, *image.size, os.path.getsize(path)))


def main() -> None:
    """Hold the conversation, then print or draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--text', action='store_true', help='print the conversation, draw nothing')
    args = parser.parse_args()
    browser = shutil.which('chromium')
    if not (args.text or browser):
        sys.exit('there is no Chromium to draw with: apt-get install chromium fonts-noto-cjk')
    talk = converse(STEPS)
    if args.text:
        return print(as_text(talk))
    save(draw(talk, browser), 'conversation.png')
    curves = [message.content for message in talk if isinstance(message.content, bytes)]
    save(Image.open(io.BytesIO(curves[-1])), 'curve.png')


if __name__ == '__main__':
    main()
