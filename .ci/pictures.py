"""Draw the README's picture and write the conversation: python .ci/pictures.py [--text]

The real program trains and talks with the WeChat server of the tests on loopback, as 文件传输助手. What
both said, in the order in which the server saw it, becomes .github/conversation.md, its beginning the phone
of .github/conversation.png, the last curve .github/curve.png; --text prints it and writes nothing. Needs a
Chinese font: apt-get install fonts-noto-cjk
"""

import argparse
import io
import os
import re
import socket
import sys
import tempfile
import time
from typing import NamedTuple, Union

from PIL import Image, ImageDraw, ImageFont

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
    Step('报告 3\nti 10 bs 16', '批量 bs = 16'),
    Step('lr 0.1', '批量 bs = 16'),  # the picture begins
    Step('开始', '第 3/10 轮'),
    Step('状态', '主机', 0.3),
    Step('曲线', '图片', 0.3),  # the picture ends
    Step('lr x0.5', '批量 bs = 16'),
    Step('错图', '图片', 0),
    Step('早停 5', '早停 0'),
    Step('停止', '训练已停止.*图片', 0.3),
    Step('回退', '回到了'),
    Step('安静', '报告 1'),
    Step('继续', '训练完成.*图片'),
    Step('记录', '★'),
    Step('曲线 1', '图片'),
]
OWN = """
import time, utils, itchat, wechat_train

def chat_inf(*args, chat_inf=utils.chat_inf):
    chat_inf(*args)
    if args[1] == 5:
        utils.chat_send('第 5 轮过了，去看看错图。')  # words of one's own

def batch_loss(loss, batch_loss=utils.batch_loss):
    if utils.run.resumed and utils.run.walk.done == 100 and not stood:
        stood.append(time.sleep(7))  # it stands still, once
    return batch_loss(loss)

stood = []
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
    """Return the messages as .github/conversation.md has them."""
    lines = [('我：' if m.mine else '    → ') + m.text().replace('\n', '\n      ') for m in talk]
    return '\n'.join(lines)


# ------------------------------------------------------------------------------------------ the drawing

SCALE = 2  # pixels in each of the phone's own, in which the sizes here are
WIDTH, EDGE, FACE, GAP, PAD = 400, 10, 34, 7, 8
TEXT, LINE = 14, 18  # height of the letters, of a line
BUBBLE, PICTURE = 305, 230  # the widest
LARGEST = 150_000  # bytes of a PNG


class Phone:
    """A screen of WeChat that is as long as what is said on it."""

    def __init__(self):
        path = utils.chinese_font()[0] or sys.exit('no Chinese font: apt-get install fonts-noto-cjk')
        number = 2 if 'CJK-' in path and path.endswith('.ttc') else 0  # of its fonts: that for China
        self.font = ImageFont.truetype(path, TEXT * SCALE, index=number)
        self.image = Image.new('RGB', (WIDTH * SCALE, 4000 * SCALE), '#ededed')
        self.pen = ImageDraw.Draw(self.image)
        self.bottom = 54  # of what is drawn
        self.write(WIDTH / 2 - self.length('文件传输助手') / 2, 12, '文件传输助手')
        self.line([(20, 14), (12, 22), (20, 30)], '#191919')
        for x in (372, 379, 386):
            self.box((x, 21, x + 3, 24), '#191919', 1.5)
        self.line([(0, 44), (WIDTH, 44)], '#dadada')

    def length(self, text: str) -> float:
        return self.font.getlength(text) / SCALE

    def write(self, x: float, y: float, text: str) -> None:
        self.pen.text((x * SCALE, y * SCALE), text, '#191919', self.font, spacing=0)

    def line(self, points: list, colour: str) -> None:
        self.pen.line([(x * SCALE, y * SCALE) for x, y in points], colour, SCALE, 'curve')

    def box(self, corners: tuple, colour: str, radius: float) -> None:
        self.pen.rounded_rectangle([value * SCALE for value in corners], radius * SCALE, colour)

    def say(self, message: Message) -> None:
        """Draw a message below the others."""
        top, mine = self.bottom, message.mine
        face = WIDTH - EDGE - FACE if mine else EDGE
        self.box((face, top, face + FACE, top + FACE), '#e2a04a' if mine else '#5b7fa6', 5)
        if isinstance(message.content, bytes):
            with Image.open(io.BytesIO(message.content)) as picture:
                picture.thumbnail((PICTURE * SCALE, 4000))
                self.image.paste(picture, ((EDGE + FACE + GAP) * SCALE, top * SCALE))
                self.bottom = top + picture.height / SCALE + GAP
            return
        rows = [row for text in message.text().split('\n') for row in self.wrapped(text)]
        width, height = max(map(self.length, rows)) + 2 * PAD, max(FACE, len(rows) * LINE + 2 * PAD - 3)
        left = face - GAP - width if mine else face + FACE + GAP
        colour, tip = ('#95ec69', left + width) if mine else ('#ffffff', left)
        tail = [(tip - 5, top + 17), (tip, top + 12), (tip + 5, top + 17), (tip, top + 22)]
        self.pen.polygon([(x * SCALE, y * SCALE) for x, y in tail], colour)
        self.box((left, top, left + width, top + height), colour, 6)
        for number, row in enumerate(rows):
            self.write(left + PAD, top + PAD - 4 + number * LINE, row)
        self.bottom = top + height + GAP

    def wrapped(self, text: str) -> list:
        """Return the rows of a line."""
        rows = ['']
        for character in text:
            if self.length(rows[-1] + character) > BUBBLE - 2 * PAD:
                rows.append('')
            rows[-1] += character
        return rows

    def screen(self) -> Image.Image:
        """Return the picture."""
        return self.image.crop((0, 0, WIDTH * SCALE, int(self.bottom + EDGE - GAP) * SCALE))


def beginning(talk: list) -> list:
    """Return what the picture shows: from `lr 0.1` to the first curve."""
    first = next(i for i, message in enumerate(talk) if message.text() == 'lr 0.1')
    return talk[first : 1 + next(i for i, message in enumerate(talk) if isinstance(message.content, bytes))]


def save(image: Image.Image, name: str) -> None:
    """Save a picture as .github/<name>, with as many colours as its size allows."""
    path = os.path.join(ROOT, '.github', name)
    for colours in (256, 128, 64, 32):
        image.convert('RGB').quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if os.path.getsize(path) < LARGEST:
            break
    print('.github/%s: %d x %d, %d bytes' % (name, *image.size, os.path.getsize(path)))


def main() -> None:
    """Hold the conversation, then print it, or write and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--text', action='store_true', help='print the conversation, draw nothing')
    args = parser.parse_args()
    phone = None if args.text else Phone()
    talk = converse(STEPS)
    if args.text:
        return print(as_text(talk))
    page = os.path.join(ROOT, '.github', 'conversation.md')
    with open(page, encoding='utf-8') as f:
        head, _, rest = f.read().partition('```text\n')
    with open(page, 'w', encoding='utf-8') as f:
        f.write(f'{head}```text\n{as_text(talk)}\n```{rest.partition("```")[2]}')
    for message in beginning(talk):
        phone.say(message)
    save(phone.screen(), 'conversation.png')
    curves = [message.content for message in talk if isinstance(message.content, bytes)]
    save(Image.open(io.BytesIO(curves[-1])), 'curve.png')


if __name__ == '__main__':
    main()
