"""Data, accuracy, the lock and the chat: what stands between a Gluon training loop and WeChat.

Read from top to bottom, in the order in which things happen:
the data -> the device -> the lock -> what a training loop calls -> what a person in the chat says
-> how words travel -> WeChat's login, and the terminal that can stand in for WeChat.
"""
import contextlib
import functools
import gzip
import io
import math
import os
import queue
import re
import struct
import sys
import threading
import time
import traceback
import types
import unicodedata

import numpy as np

np.bool = bool  # MXNet 1.9.1 still asks for the name that numpy 1.24 took away
import mxnet as mx
from mxnet import nd
import pooch
import requests
import segno
from PIL import Image, ImageDraw
from tqdm import tqdm

with contextlib.redirect_stdout(io.StringIO()):  # importing it draws a block on the terminal
    import itchat
    import itchat.content

# ------------------------------------------------------------------------------------------ the data

DEMO = 'demo'
data_dir = None  # a folder with the four IDX files, DEMO for drawn images, or None: fetch Fashion-MNIST

seed = 0  # of the network's first parameters and of the order of the images: the same seed, the same run

FILES = {  # the official files and their MD5, from https://github.com/zalandoresearch/fashion-mnist
    'train-images-idx3-ubyte.gz': '8d4fb7e6c68d591d4c3dfef9ec88bf0d',
    'train-labels-idx1-ubyte.gz': '25c81989df183df01b3e8a0aad5dffbe',
    't10k-images-idx3-ubyte.gz': 'bef4ecab320f06d8554ea6380940ec79',
    't10k-labels-idx1-ubyte.gz': 'bb300cfdad3c16e7a12a480ee83cd310'}
MIRRORS = (  # MXNet's own bucket, and the publisher's for the day when that is gone
    'https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/gluon/dataset/fashion-mnist/',
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/')


def load_data_fashion_mnist(batch_size, resize=None):
    """Return (train_data, test_data), the batches of Fashion-MNIST, or of what `data_dir` names.

    Each yields (data, label): float32 (N, 1, 28, 28) in 0..1 and float32 (N,). `resize` makes the
    images resize x resize. Only the training images are shuffled, anew for every epoch.
    Raises OSError when the files cannot be had, ValueError when one is damaged.
    """
    images, labels, test_images, test_labels = _arrays(data_dir)
    return (Batches(images, labels, batch_size, resize, shuffle=True),
            Batches(test_images, test_labels, batch_size, resize))


class Batches:
    """The batches of an array of images: len() of them, the last one may be smaller."""

    def __init__(self, images, labels, batch_size, resize=None, shuffle=False):
        self.images, self.labels = images, labels  # uint8 (N, 28, 28), uint8 (N,)
        self.batch_size, self.resize, self.shuffle = batch_size, resize, shuffle
        self.epoch = 0  # how often the images have been gone through

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        n = len(self.labels)
        self.epoch += 1
        order = np.random.RandomState([seed % 2**32, self.epoch]).permutation(n) if self.shuffle else np.arange(n)
        for i in range(0, n, self.batch_size):
            chosen = order[i:i + self.batch_size]
            data = nd.array(self.images[chosen, None], dtype='float32') / 255
            if self.resize:
                data = nd.contrib.BilinearResize2D(data, height=self.resize, width=self.resize)
            yield data, nd.array(self.labels[chosen], dtype='float32')


@functools.lru_cache(maxsize=1)
def _arrays(folder):
    """Return train images, train labels, test images, test labels as uint8 arrays."""
    if folder == DEMO:
        return (*draw_garments(12000, seed=0), *draw_garments(1000, seed=1))
    return tuple(read_idx(path) for path in (find_files(folder) if folder else fetch_files()))


def find_files(folder):
    """Return the paths of the four IDX files in `folder`, gzipped or not; OSError names a missing one."""
    paths = []
    for name in FILES:
        candidates = [os.path.join(folder, name), os.path.join(folder, name[:-len('.gz')])]
        paths += [next((path for path in candidates if os.path.isfile(path)), None)]
        if paths[-1] is None:
            raise FileNotFoundError('%s 里没有 %s' % (folder, name))
    return paths


def fetch_files():
    """Return the paths of the four IDX files where MXNet keeps its data sets, fetched if need be.

    A file that does not have the published checksum is fetched again. Raises OSError.
    """
    folder = os.path.join(mx.base.data_dir(), 'datasets', 'fashion-mnist')
    download = pooch.HTTPDownloader(progressbar=True, timeout=30)
    pooch.get_logger().setLevel('WARNING')
    paths = []
    for name, md5 in FILES.items():
        for mirror in MIRRORS:
            try:
                paths.append(pooch.retrieve(mirror + name, 'md5:' + md5, name, folder, downloader=download))
                break
            except (requests.RequestException, ValueError) as error:  # ValueError: the checksum is wrong
                print('%s%s: %s' % (mirror, name, error), file=sys.stderr)
        else:
            raise OSError('下载不到 %s；可以自己下载四个文件，用 --data 指定文件夹' % name)
    return paths


def read_idx(path):
    """Return the uint8 array in an IDX file (http://yann.lecun.com/exdb/mnist), gzipped or not.

    Raises ValueError when the file is damaged.
    """
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            zeros, dtype, ndim = struct.unpack('>HBB', f.read(4))
            shape = struct.unpack('>%dI' % ndim, f.read(4 * ndim))
            content = f.read()
    except (EOFError, gzip.zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise ValueError('%s 已损坏：%s' % (path, error)) from None
    if zeros != 0 or dtype != 8 or len(content) != math.prod(shape):
        raise ValueError('%s 已损坏：长度或格式不对' % path)
    return np.frombuffer(content, np.uint8).reshape(shape)


GARMENTS = (  # outlines on a 28 x 28 grid, in the order of Fashion-MNIST's ten classes
    [[(9, 5), (19, 5), (25, 10), (22, 14), (20, 12), (20, 24), (8, 24), (8, 12), (6, 14), (3, 10)]],  # T-shirt
    [[(9, 3), (19, 3), (20, 25), (15, 25), (14, 10), (13, 25), (8, 25)]],                             # trouser
    [[(9, 4), (19, 4), (24, 24), (21, 24), (19, 12), (19, 24), (9, 24), (9, 12), (7, 24), (4, 24)]],  # pullover
    [[(11, 3), (17, 3), (16, 11), (20, 25), (8, 25), (12, 11)]],                                      # dress
    [[(9, 3), (13, 4), (13, 25), (4, 25), (4, 10)], [(15, 4), (19, 3), (24, 10), (24, 25), (15, 25)]],  # coat
    [[(3, 19), (12, 15), (25, 21), (25, 23), (3, 23)], [(8, 11), (10, 11), (16, 17), (14, 18)]],      # sandal
    [[(9, 4), (13, 4), (14, 8), (15, 4), (19, 4), (24, 12), (21, 14), (19, 24), (9, 24), (7, 14), (4, 12)]],  # shirt
    [[(3, 14), (9, 12), (16, 17), (25, 19), (25, 22), (3, 22)]],                                      # sneaker
    [[(4, 12), (24, 12), (24, 24), (4, 24)], [(9, 12), (10, 6), (18, 6), (19, 12), (17, 12), (16, 8), (12, 8), (11, 12)]],  # bag
    [[(9, 4), (17, 4), (17, 15), (25, 19), (25, 24), (8, 24)]])                                       # ankle boot


def draw_garments(n, seed):
    """Return n drawn images of ten garment-like shapes, uint8 (n, 28, 28), and labels, uint8 (n,).

    The same seed draws the same images. They are not Fashion-MNIST, and are easier.
    """
    rng = np.random.RandomState(seed)
    labels = rng.randint(len(GARMENTS), size=n).astype(np.uint8)
    images = np.empty((n, 28, 28), np.uint8)
    for image, label in zip(images, labels):
        canvas = Image.new('L', (28, 28))
        scale, shift = rng.uniform(0.75, 1.05, 2), rng.uniform(-2, 2, 2)
        for outline in GARMENTS[label]:
            corners = (np.array(outline) - 14) * scale + 14 + shift + rng.normal(0, 0.7, (len(outline), 2))
            ImageDraw.Draw(canvas).polygon([tuple(c) for c in corners], fill=int(rng.uniform(90, 255)))
        image[:] = np.clip(canvas + rng.normal(0, 12, (28, 28)), 0, 255)
    return images, labels


# ----------------------------------------------------------------------------- the device, the accuracy

def try_gpu():
    """Return mx.gpu() when MXNet sees a GPU, else mx.cpu()."""
    return mx.gpu() if mx.context.num_gpus() else mx.cpu()


def accuracy(output, label):
    """Return the share of rows of `output` (N, classes) whose largest entry is at `label` (N,): a float."""
    return nd.mean(output.argmax(axis=1) == label).asscalar()


def evaluate_accuracy(data_iterator, net, ctx=mx.cpu()):
    """Return the share of all examples of `data_iterator` that `net` classifies correctly: a float."""
    correct = total = 0
    for data, label in data_iterator:
        output = net(data.as_in_context(ctx))
        correct += (output.argmax(axis=1) == label.as_in_context(ctx)).sum().asscalar()
        total += len(label)
    return correct / total


# -------------------------------------------------------------------------------------------- the lock

# `lock` guards the variables from here to the next line of dashes: WeChat's thread changes them when
# a person says so, the training thread reads them between batches. Hold it for a moment only.
lock = threading.Lock()
running = False     # may the training go on? True from 开始 until 停止, the end or a crash
batch_size = 256    # images
learning_rate = 0.5
training_iters = 2  # epochs


def new_run(wechat_name=None):
    """Return what is known of a training run before its first batch."""
    now = time.monotonic()
    return types.SimpleNamespace(
        thread=None,              # the thread that trains; None: nothing trains
        wechat_name=wechat_name,  # who started it and gets the reports
        params=(learning_rate, training_iters, batch_size),
        live=False,               # does nn_train read params() in its loop, so that changes count at once?
        history=[],               # a row for every epoch: epoch, loss, train_acc, test_acc
        batch=0, batches=0,       # of the epoch now going on; 0: none, or nn_train does not use progress()
        began=now, epoch_began=now,
        error=None)               # what nn_train raised


run = new_run()  # the run that is going on, or the last one

# ------------------------------------------------------------------------- what a training loop calls


def lock_start():
    """Return True while the run may go on: from 开始 until 停止. A training loop asks before a batch."""
    with lock:
        return running


def params():
    """Return learning_rate, training_iters, batch_size as they stand in the chat now."""
    with lock:
        run.live = run.live or run.thread is threading.current_thread()
        return learning_rate, training_iters, batch_size


def progress(train_data):
    """Yield the batches of one epoch, none more after 停止, with a progress bar on the terminal."""
    for i, batch in enumerate(tqdm(train_data, unit='batch', leave=False, disable=None)):
        with lock:
            if not running:
                return
            run.batch, run.batches = i + 1, len(train_data)
        yield batch


def chat_inf(wechat_name, epoch, train_loss, train_acc, train_data, test_acc):
    """Send `wechat_name` the report after an epoch; `epoch` counts from 1.

    `train_loss` and `train_acc` are sums over the batches, of which `train_data` has len();
    numbers or NDArrays of one element.
    """
    loss, train_acc = float(train_loss) / len(train_data), float(train_acc) / len(train_data)
    now = time.monotonic()
    with lock:
        run.history.append((epoch, loss, train_acc, float(test_acc)))
        run.batch, seconds, run.epoch_began = 0, now - run.epoch_began, now
        last = run_length()
        left = (now - run.began) / len(run.history) * (last - epoch)
    chat_send(data_note() + '第 %d/%d 轮\n损失 %.4f\n训练精度 %.3f\n测试精度 %.3f\n用时 %s%s' % (
        epoch, last, loss, train_acc, test_acc, duration(seconds),
        '，还需约 ' + duration(left) if left > 0 else ''), wechat_name)


def lock_end(wechat_name):
    """The run is over: free the lock for the next 开始, and say so to `wechat_name`."""
    global running
    with lock:
        # Sent before the lock is let go, so that no word of the next run overtakes it.
        chat_send(closing_report(), wechat_name)
        run.thread, running = None, False


# ------------------------------------------------------------------ what a person in the chat can say

WORDS = {'开始': 'start', '停止': 'stop', '参数': 'params', '帮助': 'help'}
NAMES = {'lr': 'learning_rate', 'ti': 'training_iters', 'bs': 'batch_size'}
SHORT = {name: short for short, name in NAMES.items()}
LIMITS = {  # type, smallest, largest, what to write in Chinese
    'learning_rate': (float, 1e-9, 100, '学习率要大于 0、不超过 100，例如 lr 0.1'),
    'training_iters': (int, 1, 100000, '轮数要是 1 到 100000 的整数，例如 ti 5'),
    'batch_size': (int, 1, 10000, '批量要是 1 到 10000 的整数，例如 bs 128')}

HELP = '''开始：开始训练
停止：算完这一批就停
lr 0.1：学习率
ti 5：训练几轮
bs 128：每批几张图
参数：看现在的参数
（可以一次写几个：lr 0.1 ti 5）'''


def parse(text):
    """Return the command in a chat text: 'start', 'stop', 'params', 'help', or a list of
    (name, value) to set, both strings; None when it is no command.

    >>> parse('LR＝０.１，ti 5')
    [('learning_rate', '0.1'), ('training_iters', '5')]
    """
    if len(text) > 200:
        return None
    text = unicodedata.normalize('NFKC', text).lower().strip().rstrip('。.!')  # NFKC: full-width to ASCII
    word = WORDS.get(text, text)
    if word in WORDS.values():
        return word
    parts = re.split(r'[\s=:,;、]+', text)
    names = [NAMES.get(name, name) for name in parts[::2]]
    values = parts[1::2]
    if len(names) == len(values) and set(names) <= set(LIMITS) and all(v.isascii() and v for v in values):
        return list(zip(names, values))
    return None


def read_value(name, text):
    """Return the number that `text` writes for the parameter `name`; ValueError says what is allowed."""
    kind, smallest, largest, allowed = LIMITS[name]
    if re.fullmatch(r'[+-]?\d{1,20}' if kind is int else r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?', text):
        if smallest <= kind(text) <= largest:
            return kind(text)
    raise ValueError('%s 不行：%s' % (text[:20], allowed))


def chat_supervisor(nn_train):
    """Register the handler of friends' text messages; 开始 trains with nn_train(wechat_name, params).

    Any `nn_train` will do that calls lock_start, chat_inf and lock_end as a tutorial's loop does.
    """
    if not postman.is_alive():
        postman.start()

    @chat.msg_register(itchat.content.TEXT)
    def chat_trigger(msg):
        wechat_name = sender(msg)
        command = parse(msg['Text'])
        if wechat_name is None or command is None:
            return
        log('收到：%s' % msg['Text'].strip())
        with lock:  # the answer is queued before the lock is let go: no report of the run overtakes it
            chat_send(obey(command, nn_train, wechat_name), wechat_name)


def sender(msg):
    """Return whom to answer, the friend's UserName or 'filehelper'; None for anybody else's message."""
    user_name = msg['User'].get('UserName')
    if user_name == 'filehelper':  # the owner's note to oneself: its FromUserName is the owner's own
        return user_name
    # Unequal: the owner writes to a friend. No UserName: not in the contacts. No NickName: WeChat itself.
    return user_name if user_name == msg['FromUserName'] and msg['User'].get('NickName') else None


def obey(command, nn_train, wechat_name):
    """Carry out a command that parse() found and return the answer. Needs the lock."""
    if command == 'start':
        return start(nn_train, wechat_name)
    if command == 'stop':
        return stop()
    if command == 'params':
        return values_now()
    if command == 'help':
        return HELP
    return set_values(command)


def start(nn_train, wechat_name):
    """Start the training thread if none is alive; return the answer. Needs the lock."""
    global running, run
    if running:
        return '已经在训练了：%s。\n发“停止”可以停下。' % how_far()
    if run.thread is not None:
        return '上一次训练正在收尾，收到它的结束报告后再发“开始”。'
    run = new_run(wechat_name)
    run.thread = threading.Thread(target=train, args=(nn_train, run), name='training')
    running = True
    run.thread.start()
    return data_note() + '开始训练\n设备 %s\n%s' % (device(), values_now())


def train(nn_train, this_run):
    """Run nn_train to its end, in the training thread; whatever it raises, the next 开始 works."""
    mx.random.seed(seed)
    try:
        nn_train(this_run.wechat_name, this_run.params)
    except Exception as error:
        traceback.print_exc()
        this_run.error = error
    finally:
        if this_run.thread is not None:  # nn_train has not called lock_end
            lock_end(this_run.wechat_name)


def stop():
    """Let the run end after the batch that it is at; return the answer. Needs the lock."""
    global running
    if running:
        running = False
        return '好，这一批算完就停。'
    return '现在没有训练，发“开始”就开始。' if run.thread is None else '已经在停了，请等结束报告。'


def set_values(pairs):
    """Set each of [(name, text)] that is allowed; return the answer. Needs the lock."""
    answer = []
    for name, text in pairs:
        try:
            globals()[name] = read_value(name, text)
            if running:
                answer.append('%s：%s' % (SHORT[name], since_when(name)))
        except ValueError as error:
            answer.append(str(error))
    return '\n'.join(answer + [values_now()])


def since_when(name):
    """Return from when a value counts that was set during a run. Needs the lock."""
    if name == 'batch_size' or not run.live:
        return '下次开始时生效'
    return '从下一批起生效' if name == 'learning_rate' else '这次训练到第 %d 轮为止' % run_length()


# ------------------------------------------------------------------------------ what the answers say

def values_now():
    """Return the three values as they stand. Needs the lock."""
    return '学习率 lr = %g\n轮数 ti = %d\n批量 bs = %d' % (learning_rate, training_iters, batch_size)


def data_note():
    """Return a line that says so when the images are no real ones."""
    return '演示数据：程序画的图，不是 Fashion-MNIST\n' if data_dir == DEMO else ''


def device():
    """Return the name of the device that trains."""
    ctx = try_gpu()
    return 'GPU %d' % ctx.device_id if ctx.device_type == 'gpu' else 'CPU'


def run_length():
    """Return the number of epochs that the run is to train. Needs the lock."""
    return max(training_iters if run.live else run.params[1], len(run.history) + (run.batch > 0))


def how_far():
    """Return how far the run has come. Needs the lock."""
    text = '完成 %d/%d 轮' % (len(run.history), run_length())
    return text + ('，第 %d 轮到第 %d/%d 批' % (len(run.history) + 1, run.batch, run.batches) if run.batch else '')


def closing_report():
    """Return how the run ended. Needs the lock."""
    lines = ['训练完成' if running else '训练已停止', how_far()]
    if run.error is not None:
        message = str(run.error).strip().split('\n')[0]
        lines = ['训练出错，已结束', '%s: %s' % (type(run.error).__name__, message[:200]), how_far()]
    if run.history:
        best = max(run.history, key=lambda row: row[3])
        lines.append('最好的测试精度 %.3f（第 %d 轮）' % (best[3], best[0]))
    return data_note() + '\n'.join(lines + ['用时 ' + duration(time.monotonic() - run.began)])


def duration(seconds):
    """Return a duration in words, to the precision that a person needs.

    >>> duration(7.25), duration(80), duration(7500)
    ('7.2 秒', '1 分 20 秒', '2 小时 5 分')
    """
    if seconds < 10:
        return '%.1f 秒' % seconds
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return '%d 小时 %d 分' % (hours, minutes)
    return '%d 分 %d 秒' % (minutes, seconds) if minutes else '%d 秒' % seconds


# ---------------------------------------------------------------------------------- how words travel

chat = itchat           # what carries the words; utils.chat = Console() puts the terminal in its place
outbox = queue.Queue()  # (text, wechat_name) to be sent, in order


def chat_send(text, wechat_name):
    """Hand `text` to the postman; returns at once."""
    outbox.put((text, wechat_name))


def deliver():
    """Send what is in the outbox, in order, for ever: the postman's work."""
    while True:
        text, wechat_name = outbox.get()
        try:
            log('已发送：%s' % text if chat.send(text, wechat_name) else '没有发出去：%s' % text)
        except requests.RequestException as error:
            log('没有发出去（%s）：%s' % (error, text))
        finally:
            outbox.task_done()


postman = threading.Thread(target=deliver, name='postman', daemon=True)


def say(text):
    """Print `text` on the terminal with the time, above a progress bar if there is one."""
    tqdm.write(time.strftime('%H:%M:%S ') + text)


def log(text):
    """Print what goes through WeChat; the Console has it on the terminal already."""
    if chat is itchat:
        say(text)


def chat_end():
    """Wait until the run has ended and every word is sent; return the exit status: 1 after a crash."""
    with lock:
        this_run, thread = run, run.thread
    if thread is not None:
        thread.join()
    outbox.join()
    return int(this_run.error is not None)


class Console:
    """The terminal in WeChat's place: a line typed is the owner's message, an answer is printed."""

    def msg_register(self, kind):
        def register(handler):
            self.handler = handler
            return handler
        return register

    def auto_login(self, **options):
        say('在这里输入命令，“帮助”列出全部命令，Ctrl-D 结束。')

    def run(self):
        for line in sys.stdin:
            if not sys.stdin.isatty():
                tqdm.write('> ' + line.rstrip())
            self.handler({'Text': line, 'FromUserName': 'filehelper', 'User': {'UserName': 'filehelper'}})
            outbox.join()  # the answer stands under its command

    def send(self, text, wechat_name):
        tqdm.write(text + '\n')
        return True

# --------------------------------------------------------------------------------- WeChat's own login

QR_FILE = 'QR.png'


class TimeoutAdapter(requests.adapters.HTTPAdapter):
    """Gives every request a time-out: itchat sets none when it logs in, sends or uploads."""

    def send(self, request, timeout=None, **kwargs):
        return super().send(request, timeout=timeout or itchat.config.TIMEOUT, **kwargs)


def wechat_reachable():
    """Return whether WeChat's login page answers; make the client ready to log in."""
    itchat.set_logging(loggingLevel='WARNING')
    itchat.instance.s.mount('https://', TimeoutAdapter())
    try:
        requests.get(itchat.config.BASE_URL, timeout=10)
        return True
    except requests.RequestException:
        return False


def show_qr(uuid, status, qrcode):
    """Show the state of the login: itchat calls it with the QR code (a PNG) and at every poll."""
    if status == '0':
        with open(QR_FILE, 'wb', opener=functools.partial(os.open, mode=0o600)) as f:
            f.write(qrcode)
        drawing = io.StringIO()
        segno.make('https://login.weixin.qq.com/l/' + uuid, error='l').terminal(drawing, compact=True)
        # White on black whatever the terminal's colours are: phones do not read an inverted code.
        row = '\033[97;40m%s\033[0m' if sys.stdout.isatty() else '%s'
        print('\n'.join(row % line for line in drawing.getvalue().splitlines()))
        say('请用微信扫码登录；终端里的码扫不了，就打开 %s' % os.path.abspath(QR_FILE))
    elif status == '201':
        say('已扫码，请在手机上确认。')


def show_login():
    """Say who has logged in; without it itchat would clear the terminal."""
    if os.path.exists(QR_FILE):
        os.remove(QR_FILE)
    say('已登录：%s。请让好友发“帮助”给它，或自己发给“文件传输助手”。' % itchat.search_friends()['NickName'])
