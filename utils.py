"""Data, accuracy, the lock and the chat: what stands between a Gluon training loop and WeChat.

Read from top to bottom, in the order in which things happen: the data -> the device -> the lock ->
what a training loop calls -> its checkpoints -> what a person in the chat can say -> what is done
about it -> what the answers say -> how words travel -> WeChat's login -> what --filehelper changes.
"""
import collections
import concurrent.futures
import contextlib
import csv
import functools
import gc
import glob
import gzip
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
import zipfile

import numpy as np
import pooch
import requests
import segno
from PIL import Image, ImageDraw
from tqdm import tqdm

with contextlib.redirect_stdout(io.StringIO()):  # importing it draws a block on the terminal
    import itchat
    import itchat.components.register
    import itchat.content

# ------------------------------------------------------------------------------------- before MXNet

# MXNet is imported by the functions that use it, not here: without it the program asks for the QR code in a
# quarter of the time. What it reads when it is imported is set here; the user's own settings win.
np.bool = bool  # MXNet 1.9.1 still asks for the name that numpy 1.24 took away
os.environ.setdefault('OMP_NUM_THREADS', str(len(os.sched_getaffinity(0))))  # else half of the cores: 1.8 times
if not glob.glob(os.path.join(os.path.dirname(importlib.util.find_spec('mxnet').origin), '..', 'mxnet_cu*')):
    os.environ.setdefault('MXNET_ENGINE_TYPE', 'NaiveEngine')  # up to 1.04 times; a GPU needs the other engine


def load_mxnet():
    """Import MXNet before somebody waits for it, and start its engine without the line that it prints then."""
    from mxnet import nd
    with open(os.devnull, 'w') as devnull:
        stderr = os.dup(2)
        os.dup2(devnull.fileno(), 2)
        nd.waitall()
        os.dup2(stderr, 2)
        os.close(stderr)


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
            Batches(test_images, test_labels, max(batch_size, 256), resize))  # small batches would only be slower


class Batches:
    """The batches of an array of images: len() of them, the last one may be smaller."""

    def __init__(self, images, labels, batch_size, resize=None, shuffle=False):
        self.images, self.labels = images, labels  # uint8 (N, 28, 28), uint8 (N,); floats are no faster
        self.batch_size, self.resize, self.shuffle = batch_size, resize, shuffle
        self.epoch = 1  # that the next pass over the images belongs to; it decides their order

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        from mxnet import nd
        n = len(self.labels)
        order = np.random.RandomState([run.seed % 2**32, self.epoch]).permutation(n) if self.shuffle else np.arange(n)
        self.epoch += 1
        for i in range(0, n, self.batch_size):
            chosen = order[i:i + self.batch_size]
            data = nd.from_numpy(np.divide(self.images[chosen, None], np.float32(255), dtype=np.float32))
            if self.resize:
                data = nd.contrib.BilinearResize2D(data, height=self.resize, width=self.resize)
            yield data, nd.from_numpy(self.labels[chosen].astype(np.float32))


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

    A file that does not have the published checksum is set aside and fetched again. Raises OSError.
    """
    folder = os.path.join(os.environ.get('MXNET_HOME', os.path.expanduser('~/.mxnet')), 'datasets', 'fashion-mnist')
    download = pooch.HTTPDownloader(progressbar=True, timeout=30)
    pooch.get_logger().setLevel('WARNING')
    paths = []
    for name, md5 in FILES.items():
        path = os.path.join(folder, name)
        if os.path.exists(path) and pooch.file_hash(path, 'md5') != md5:
            os.replace(path, path + '.damaged')
            say('%s 已损坏，改名为 %s.damaged，重新下载' % (path, name))
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


# ------------------------------------------------------------------ the device, its speed, the accuracy

def try_gpu():
    """Return mx.gpu() when MXNet sees a GPU, else mx.cpu()."""
    import mxnet as mx
    return mx.gpu() if mx.context.num_gpus() else mx.cpu()


def speed_up(net):
    """Compile a HybridSequential, and on a CPU let it compute in blocks of 16 channels.

    Parameters, their gradients and the outputs stay what they are, to the rounding of float32.
    """
    net.hybridize(static_alloc=True, static_shape=True)
    if try_gpu().device_type == 'cpu':
        net.hybrid_forward = functools.partial(forward_in_blocks, net)
        net.register_forward_pre_hook(count_channels)


def count_channels(net, inputs):
    """Tell a convolution in front how many channels come in; MXNet finds out too late to cut its filters."""
    first, *others = net._children.values()
    if in_blocks(first, *others):
        first.weight.shape = first._channels, inputs[0].shape[1], *first._kwargs['kernel']


def in_blocks(*layers):
    """Return whether `layers` begin with what can be computed in blocks: a convolution, then max-pooling."""
    from mxnet.gluon import nn
    return len(layers) > 1 and isinstance(layers[0], nn.Conv2D) and layers[0]._kwargs['num_group'] == 1 and (
        isinstance(layers[1], nn.MaxPool2D))


def forward_in_blocks(net, F, x):
    """Compute what HybridSequential.hybrid_forward does, in the form for which oneDNN has its fast kernels."""
    layers = list(net._children.values())
    parts = [(x, 0, 0)]  # what the next layer computes with: see convolve()
    while layers:
        layer, *layers = layers
        if not in_blocks(layer, *layers):
            parts = [(layer(cut(F, *parts)), 0, 0)]
            continue
        pool, *layers = layers
        channels, copies = layer._channels, room_for_copies(layer, pool, *layers)
        whole = channels - channels % 16 if copies else channels
        outputs = [(convolve(F, layer, parts, 0, whole), 0, whole)]
        if copies:
            # The last 4 of 20 filters would waste most of a block. Copies of them fill it, each moved by one column
            # of the next layer's input, where a kernel of one column then does what took three: 1.09 times.
            step = layer._kwargs['stride'][1] * pool._kwargs['stride'][1]
            outputs += [(convolve(F, layer, parts, whole, channels, copies, step), whole, channels)]
        # Pooling before the activation, which grows, is the same with a quarter of the work: 1.1 times.
        act = layer.act if layer.act is not None else lambda y: y
        parts = [(act(pool(y)), first, last) for y, first, last in outputs]
    return cut(F, *parts)


def cut(F, part):
    """Return the array of the only part without the zeros behind its channels."""
    x, first, last = part
    return F.slice_axis(x, axis=1, begin=first, end=last) if last else x


def room_for_copies(layer, pool, *following):
    """Return how many columns the next convolution's kernel has if a block holds as many copies of the left-over
    filters, else 0."""
    if not in_blocks(*following) or layer._channels < 16 or not layer.weight.shape[1]:
        return 0
    this, pooling, after = layer._kwargs, pool._kwargs, following[0]._kwargs
    if this['dilate'] != (1, 1) or after['dilate'] != (1, 1) or after['pad'] != (0, 0) or (
            pooling['pad'] != (0, 0) or pooling['pooling_convention'] != 'valid'):
        return 0
    columns = after['kernel'][1]
    return columns if 0 < layer._channels % 16 * columns <= 16 else 0


def convolve(F, layer, parts, begin, end, copies=1, step=0):
    """Convolve with the filters from `begin` to `end` of `layer`, with `copies` of them, `step` columns apart.

    The input is the sum of `parts`: (array, first, last) has these channels in its array, then zeros up to a
    multiple of 16; (array, 0, 0) has all of them and no zeros. A part with first > 0 has copies of its channels,
    moved by a column each.
    """
    height, width = layer._kwargs['kernel']
    n, sums = (end - begin) * copies, []
    if parts[-1][2]:
        layer.weight.shape = layer._channels, parts[-1][2], height, width
    for x, first, last in parts:
        weight, columns = layer.weight.var(), width  # weight: (filters, channels, height, width)
        if last:
            weight = F.slice_axis(weight, axis=1, begin=first, end=last)
            if first:
                weight = F.reshape(F.transpose(weight, axes=(0, 3, 1, 2)), shape=(0, -3, 0, 1))
                columns = 1
            weight = append_zeros(F, weight, 1, (last - first) * width // columns)
        filters = [weight, layer.bias.var()] if layer.bias is not None and not sums else [weight]
        if end - begin < layer._channels:
            filters = [F.slice_axis(array, axis=0, begin=begin, end=end) for array in filters]
        if copies > 1:
            moved = [(step * i, step * (copies - 1 - i)) for i in range(copies)]
            filters[0] = F.concat(*(F.pad(filters[0], mode='constant', pad_width=(0,) * 6 + columns_beside)
                                    for columns_beside in moved), dim=0)
            filters[1:] = [F.tile(bias, copies) for bias in filters[1:]]
        # Filters of zeros up to a multiple of 16, for the AVX-512 kernels: 1.3 times.
        sums += [F.Convolution(x, *(append_zeros(F, array, 0, n) for array in filters), **dict(
            layer._kwargs, kernel=(height, columns + step * (copies - 1)), num_filter=n + -n % 16,
            no_bias=len(filters) == 1))]
    return sum(sums[1:], sums[0])


def append_zeros(F, array, axis, size):
    """Append zeros to the `size` entries of `array` along `axis`, up to a multiple of 16."""
    missing = -size % 16
    while missing:
        some = min(missing, size)
        array = F.concat(array, F.zeros_like(F.slice_axis(array, axis=axis, begin=0, end=some)), dim=axis)
        size, missing = size + some, missing - some
    return array


def accuracy(output, label):
    """Return the share of rows of `output` (N, classes) whose largest entry is at `label` (N,): a float."""
    return (output.argmax(axis=1) == label).mean().asscalar()


def evaluate_accuracy(data_iterator, net, ctx=None):
    """Return the share of all examples of `data_iterator` that `net` classifies correctly: a float."""
    correct = total = 0
    for data, label in data_iterator:
        output = net(data.as_in_context(ctx or try_gpu()))
        correct += (output.argmax(axis=1) == label.as_in_context(output.context)).sum().asscalar()
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
chosen = set()      # which of the three a person has set: 继续 takes the others from the checkpoint
supervisors = []    # remark names or nicknames of those who may command; empty: the first who does
commanders = set()  # the names of those of them who are found among the friends of this login
addresses = {}      # name -> UserName, of this login
refused = set()     # names of those who were told that they may not command
then_command = None  # a shell command for when a run has ended by itself
then_timer = None   # what will run it


def new_run(wechat_name=None):
    """Return what is known of a training run before its first batch."""
    now = time.monotonic()
    return types.SimpleNamespace(
        busy=False,               # is nn_train at work? It still is for a moment after 停止
        wechat_name=wechat_name,  # who started it: see sender()
        params=(learning_rate, training_iters, batch_size),
        seed=seed,                # a resumed run keeps its own
        live=False,               # does nn_train read params() in its loop, so that changes count at once?
        folder=None,              # its checkpoints and its log; made when there is something to keep
        checkpoint=None,          # the file that can be resumed from
        resumed=None,             # what read_checkpoint() returned, if the run goes on with an earlier one
        history=[],               # a row for every epoch: see LOG
        losses=[],                # a pair for every batch: epochs done by then (2.5 is amid the third), loss
        batch=0, batches=0,       # done and in all in this epoch; 0 when nn_train does not use progress()
        began=now, epoch_began=now, epoch_from=0,  # epoch_from: the batch at which the clock was started
        seconds_before=0, done_before=0,           # what a resumed run had behind it
        error=None,               # what nn_train raised
        unwritten=set())          # what could not be written, and the person was told so


run = new_run()  # the run that is going on, or the last one
training = None  # the Future of its nn_train

# ------------------------------------------------------------------------- what a training loop calls

LOG = 'epoch', 'loss', 'train_acc', 'test_acc', 'learning_rate', 'seconds'


def lock_start():
    """Return True while the run may go on: from 开始 until 停止. A training loop asks before an epoch."""
    with lock:
        return running


def params():
    """Return learning_rate, training_iters, batch_size as they stand in the chat now."""
    with lock:
        run.live = True
        return learning_rate, training_iters, batch_size


def progress(train_data, epoch):
    """Yield the batches of an epoch with a progress bar on the terminal, none more after 停止.

    In a resumed epoch those that were done before are left out. The order of the images in
    load_data_fashion_mnist's train_data depends on the seed and the epoch alone.
    """
    if isinstance(train_data, Batches):
        train_data.epoch = epoch
    with lock:
        done, run.batches = run.batch, len(train_data)
        run.epoch_began, run.epoch_from = time.monotonic(), done
    with tqdm(itertools.islice(train_data, done, None), '第 %d 轮' % epoch, len(train_data), initial=done,
              unit='批', leave=False, disable=None) as bar:
        for batch in bar:
            yield batch
            with lock:
                run.batch += 1
                if not running:
                    return


def batch_loss(loss):
    """Return the mean of the losses of a batch (N,) as a float, and keep it for 状态 and 曲线.

    Raises FloatingPointError when it is NaN or infinite: nothing good can come of that run.
    """
    value = loss.mean().asscalar().item()
    with lock:
        run.losses.append((len(run.history) + (run.batch + 1) / max(run.batches, 1), value))
    check_finite(value)
    return value


def check_finite(loss):
    """Raise FloatingPointError when `loss` is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError('损失成了 %s' % loss)


def chat_inf(wechat_name, epoch, train_loss, train_acc, train_data, test_acc):
    """Send the report after an epoch, which counts from 1, to `wechat_name` and the supervisors.

    `train_loss` and `train_acc` are sums over the batches, of which `train_data` has len();
    numbers or NDArrays of one element. Raises FloatingPointError when the loss is not finite.
    """
    loss, train_acc = float(train_loss) / len(train_data), float(train_acc) / len(train_data)
    check_finite(loss)
    now = time.monotonic()
    with lock:
        seconds = now - run.epoch_began
        rate = learning_rate if run.live else run.params[0]
        run.history.append((epoch, loss, train_acc, float(test_acc), rate, round(seconds, 3)))
        run.batch, run.epoch_began, run.epoch_from = 0, now, 0
        text = '第 %d/%d 轮\n损失 %.4g\n训练精度 %.3f\n测试精度 %.3f\n用时 %s%s' % (
            epoch, run_length(), loss, train_acc, test_acc, duration(seconds), time_left())
        rows = list(run.history)
        report(data_note() + text, wechat_name)
    keep('日志', lambda: write_whole('log.csv', lambda path: write_log(path, rows), run))


def lock_end(wechat_name):
    """The run is over: free the lock for the next 开始, and say so to `wechat_name`."""
    global running
    with lock:
        # Said before the lock is let go, so that no word of the next run overtakes it.
        report(closing_report(), wechat_name)
        if len(run.history) > 1:
            report(curve(), wechat_name)
        if running and run.error is None and then_command:
            prepare_then(wechat_name)
        run.busy, running = False, False


# ------------------------------------------------------------------------------------ the checkpoints

# runs/<start of the run>/ holds last.zip (net.params, trainer.states, run.json, losses.npy), best.params,
# log.csv and curve.png. Each is written under another name and then put in its place, so that there is
# always a whole one; last.zip carries the checksums of what it holds.
RUNS = 'runs'


def save_checkpoint(net, trainer, epoch, train_loss, train_acc):
    """Keep what 继续 needs to go on in the middle of `epoch`, of which run.batch batches are done.

    A failure (a full disk) is told, and the training goes on: the checkpoint before stays whole.
    Raises FloatingPointError, and keeps the checkpoint before, when a parameter is not finite.
    """
    with lock:
        state = dict(epoch=epoch, train_loss=float(train_loss), train_acc=float(train_acc), data=data_name(),
                     seed=run.seed, batch=run.batch, batches=run.batches, history=run.history[:], seconds=elapsed(),
                     params=(*((learning_rate, training_iters) if run.live else run.params[:2]), run.params[2]))
        losses = np.array(run.losses)
    if not state['history'] and not state['batch']:
        return  # nothing has been learned yet
    for name, parameter in net.collect_params().items():
        if not np.isfinite(parameter.data(parameter.list_ctx()[0]).asnumpy()).all():
            raise FloatingPointError('网络的 %s 里有 NaN 或无穷大' % name)
    if state['history'] and not state['batch'] and best_row(state['history']) is state['history'][-1]:
        keep('最好的网络', lambda: write_whole('best.params', net.save_parameters, run))
    path = keep('检查点', lambda: write_whole('last.zip', lambda path: write_checkpoint(
        path, net, trainer, state, losses), run))
    with lock:
        run.checkpoint = path or run.checkpoint


def load_checkpoint(net, trainer):
    """Return the epoch to go on with and the sums of loss and accuracy in it so far.

    That is 1, 0, 0, unless a person has said 继续: then net and trainer become what they were.
    """
    if run.resumed is None:
        return 1, 0, 0
    with zipfile.ZipFile(run.checkpoint) as checkpoint, tempfile.TemporaryDirectory() as folder:
        checkpoint.extractall(folder)
        net.load_parameters(os.path.join(folder, 'net.params'), ctx=try_gpu())
        trainer.load_states(os.path.join(folder, 'trainer.states'))
    return run.resumed['epoch'], run.resumed['train_loss'], run.resumed['train_acc']


def write_checkpoint(path, net, trainer, state, losses):
    """Write last.zip to `path`."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        net.save_parameters(os.path.join(folder, 'net.params'))
        trainer.save_states(os.path.join(folder, 'trainer.states'))
        np.save(os.path.join(folder, 'losses.npy'), losses)
        with open(os.path.join(folder, 'run.json'), 'w') as f:
            json.dump(state, f)
        with zipfile.ZipFile(path, 'w') as checkpoint:
            for name in os.listdir(folder):
                checkpoint.write(os.path.join(folder, name), name)


def read_checkpoint(path):
    """Return what save_checkpoint() kept in `path`, less the network; ValueError when it is damaged."""
    try:
        with zipfile.ZipFile(path) as checkpoint:
            if checkpoint.testzip() is not None:
                raise ValueError('%s 已损坏' % path)
            state = json.loads(checkpoint.read('run.json'))
            state['losses'] = np.load(io.BytesIO(checkpoint.read('losses.npy'))).tolist()
            return state
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError('%s 已损坏：%s' % (path, error)) from None


def last_checkpoint():
    """Return (path, what it holds) of the newest checkpoint on the data now used, or (None, None).

    One that is damaged is set aside under another name.
    """
    for path in sorted(glob.glob(os.path.join(RUNS, '*', 'last.zip')), key=os.path.getmtime, reverse=True):
        try:
            state = read_checkpoint(path)
            if state['data'] == data_name():
                return path, state
        except ValueError as error:
            os.replace(path, path + '.damaged')
            say('%s，改名为 last.zip.damaged' % error)
    return None, None


def write_log(path, rows):
    """Write the epochs as CSV."""
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows([LOG, *rows])


def write_whole(name, write, this_run):
    """Let write(path) write a file, then put it in its place in the run's folder; return its path."""
    path = os.path.join(run_folder(this_run), name)
    try:
        write(path + '.new')
        with open(path + '.new', 'rb+') as f:
            os.fsync(f.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(path + '.new', path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + '.new')
    return path


def run_folder(this_run):
    """Return the folder of a run, made now if there is none."""
    with lock:
        name = os.path.join(RUNS, time.strftime('%Y%m%d-%H%M%S'))
        others = ('%s-%d' % (name, i) for i in itertools.count(2))  # for runs of the same second
        while this_run.folder is None:
            with contextlib.suppress(FileExistsError):
                os.makedirs(name)
                this_run.folder = name
            name = next(others)
        return this_run.folder


def keep(what, write):
    """Return write(), or tell, once until it works again, that the disk would not have it, and return None."""
    try:
        path = write()
        with lock:
            run.unwritten.discard(what)
        return path
    except (OSError, RuntimeError) as error:  # MXNet's error for a full disk is a RuntimeError
        with lock:
            if what not in run.unwritten:
                report('%s没有写成：%s\n训练继续，以前写的还在。' % (what, first_line(error)), run.wechat_name)
            run.unwritten.add(what)


# ------------------------------------------------------------------ what a person in the chat can say

WORDS = {'开始': 'start', '停止': 'stop', '继续': 'resume', '状态': 'status', '曲线': 'plot', '参数': 'params',
         '取消': 'cancel', '帮助': 'help'}
NAMES = {'lr': 'learning_rate', 'ti': 'training_iters', 'bs': 'batch_size'}
SHORT = {name: short for short, name in NAMES.items()}
LIMITS = {  # type, smallest, largest, what to write in Chinese
    'learning_rate': (float, 1e-9, 100, '学习率要大于 0、不超过 100，例如 lr 0.1'),
    'training_iters': (int, 1, 100000, '轮数要是 1 到 100000 的整数，例如 ti 5'),
    'batch_size': (int, 1, 10000, '批量要是 1 到 10000 的整数，例如 bs 128')}

HELP = '''开始：从头训练
停止：算完这一批就停
继续：接着上次的训练
状态：现在到哪了
曲线：损失和精度的图
lr 0.1：学习率
ti 5：训练几轮
bs 128：每批几张
参数：看这三个值
取消：不执行训练后的命令'''


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


# ------------------------------------------------------------------------------ what is done about it


def chat_supervisor(nn_train):
    """Register the handler of friends' text messages; 开始 trains with nn_train(wechat_name, params).

    Any `nn_train` will do that calls lock_start, chat_inf and lock_end as a tutorial's loop does.
    """
    if not postman.is_alive():
        postman.start()

    @chat.msg_register(itchat.content.TEXT)
    def chat_trigger(msg):
        command = parse(msg['Text'])
        user_name = sender(msg)
        if command is None or user_name is None or is_repeated(msg) or is_own(msg):
            return
        gpu = gpu_state() if command == 'status' else ''  # it may take a moment, which the lock must not
        with lock:  # the answer is queued before the lock is let go: no report of the run overtakes it
            wechat_name = name_of(msg['User'], user_name)
            log('%s：%s' % (wechat_name, msg['Text'].strip()))
            try:
                if permit(wechat_name):
                    chat_send(obey(command, nn_train, wechat_name, gpu), wechat_name)
            except Exception as error:  # itchat would swallow it, and the person wait for an answer
                traceback.print_exc()
                chat_send('程序出错：%s: %s' % (type(error).__name__, first_line(error)), wechat_name)
        if online and chat is itchat:
            dump_session()  # it says which messages have been read


def sender(msg):
    """Return the UserName of the friend who wrote, or 'filehelper'; None for anybody else's message."""
    user_name = msg['User'].get('UserName')
    if user_name == 'filehelper':  # the owner's note to oneself: its FromUserName is the owner's own
        return user_name
    # Unequal: the owner writes to a friend. No UserName: not in the contacts. No NickName: WeChat itself.
    return user_name if user_name == msg['FromUserName'] and msg['User'].get('NickName') else None


seen = collections.deque(maxlen=1000)  # MsgIds of commands: after a login the server may send them again


def is_repeated(msg):
    """Return whether this very message has come before."""
    repeated = msg.get('MsgId') in seen
    if 'MsgId' in msg:
        seen.append(msg['MsgId'])
    return repeated


def name_of(user, user_name):
    """Return the name by which a writer is known in all logins: what WeChat shows. Needs the lock.

    'filehelper' is the owner. A second friend of the same name has only the UserName of this login.
    """
    name = user.get('RemarkName') or user.get('NickName') or user_name
    return name if addresses.setdefault(name, user_name) == user_name else user_name


def permit(wechat_name):
    """Return whether the writer may command; one who may not is told so, once. Needs the lock."""
    if not supervisors and wechat_name != 'filehelper':
        supervisors.append(wechat_name)
        commanders.add(wechat_name)
        chat_send('程序结束前，只有你（和机主）能下命令。', wechat_name)
    if wechat_name == 'filehelper' or wechat_name in commanders:
        return True
    log('%s 不能下命令' % wechat_name)
    if wechat_name not in refused:
        refused.add(wechat_name)
        chat_send('抱歉，这里的训练由别人监督，你的命令没有执行。', wechat_name)
    return False


def find_supervisors():
    """After a login: find those who may command among the friends, whose UserNames are new.

    Within a login it is the UserName that counts: a nickname can be changed by its bearer.
    """
    with lock:
        commanders.clear()
        addresses.clear()
        for name in supervisors:
            friends = chat.search_friends(name=name)
            if len(friends) == 1:
                commanders.add(name_of(friends[0], friends[0]['UserName']))
            else:
                say('监督人“%s”：%s' % (name, '有 %d 个好友叫这个名字，请用备注名区分' % len(friends) if friends else
                                    '好友里没有这个人'))


def obey(command, nn_train, wechat_name, gpu):
    """Carry out a command that parse() found and return the answer. Needs the lock."""
    if command == 'start':
        return start(nn_train, wechat_name)
    if command == 'resume':
        return resume(nn_train, wechat_name)
    if command == 'stop':
        return stop()
    if command == 'status':
        return status(gpu)
    if command == 'plot':
        return curve() if run.losses or run.history else '还没有可画的：训练开始后再发“曲线”。'
    if command == 'params':
        return values_now()
    if command == 'cancel':
        return '好，不执行了。' if cancel_then() else '没有要取消的。'
    if command == 'help':
        return HELP
    return set_values(command)


def start(nn_train, wechat_name):
    """Start the training thread from the beginning; return the answer. Needs the lock."""
    global run
    if busy():
        return busy()
    run = new_run(wechat_name)
    return data_note() + '开始训练%s\n%s' % (start_thread(nn_train), start_note())


def resume(nn_train, wechat_name):
    """Start the training thread from the last checkpoint; return the answer. Needs the lock."""
    global run
    if busy():
        return busy()
    path, state = last_checkpoint()
    if path is None:
        return '没有可以继续的训练，发“开始”从头训练。'
    for name, value in zip(('learning_rate', 'training_iters', 'batch_size'), state['params']):
        if name not in chosen or name == 'batch_size':  # another batch size would not fit the epoch begun
            globals()[name] = value
    done = len(state['history'])
    if done >= training_iters:
        return '上次的 %d 轮都训练完了。要再训练，先发 ti %d，再发“继续”。' % (done, done + 3)
    run = new_run(wechat_name)
    run.folder, run.checkpoint, run.resumed = os.path.dirname(path), path, state
    run.seed = state['seed']
    run.history, run.losses = [tuple(row) for row in state['history']], state['losses']
    run.batch, run.batches, run.seconds_before = state['batch'], state['batches'], state['seconds']
    run.done_before = epochs_done()
    return data_note() + '继续训练%s\n%s\n%s' % (start_thread(nn_train), how_far(), start_note())


def busy():
    """Return what to answer when a run is still going on, else ''. Needs the lock."""
    if running:
        return '已经在训练了：%s。\n发“停止”可以停下。' % how_far()
    return '上一次训练正在收尾，收到它的结束报告后再发一次。' if run.busy else ''


def start_thread(nn_train):
    """Let the training thread begin with `run`; return what to add to the answer. Needs the lock."""
    global running, training
    running = run.busy = True
    training = trainer_thread.submit(train, nn_train, run)
    return '（“%s”已取消）' % then_command if cancel_then() else ''


# One thread for all runs: MXNet keeps some 5 MB for every thread that ever trained.
trainer_thread = concurrent.futures.ThreadPoolExecutor(1, 'training')


def train(nn_train, this_run):
    """Run nn_train to its end, in the training thread; whatever it raises, the next 开始 works."""
    import mxnet as mx
    mx.random.seed(this_run.seed)
    try:
        nn_train(this_run.wechat_name, this_run.params)
    except Exception as error:
        traceback.print_exc()
        this_run.error = error
    finally:
        if this_run.busy:  # nn_train has not called lock_end
            lock_end(this_run.wechat_name)
        gc.collect()  # a network refers to itself; its 60 MB would wait for days


def stop():
    """Let the run end after the batch that it is at; return the answer. Needs the lock."""
    global running
    if running:
        running = False
        return '好，这一批算完就停。'
    return '现在没有训练，发“开始”就开始。' if not run.busy else '已经在停了，请等结束报告。'


def set_values(pairs):
    """Set each of [(name, text)] that is allowed; return the answer. Needs the lock."""
    answer = []
    for name, text in pairs:
        try:
            globals()[name] = read_value(name, text)
            chosen.add(name)
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


then_delay = 60  # seconds in which 取消 can be said


def prepare_then(wechat_name):
    """Say that the command of --then will run, and let it. Needs the lock."""
    global then_timer
    report('%d 秒后执行：%s\n不要执行就发“取消”。' % (then_delay, then_command), wechat_name)
    then_timer = threading.Timer(then_delay, run_then, [wechat_name])
    then_timer.start()


def run_then(wechat_name):
    """Run the command of --then, unless it was called off at the last moment."""
    global then_timer
    with lock:
        if then_timer is not threading.current_thread():
            return
        then_timer = None
    wait_for_mail(30)
    status = subprocess.run(then_command, shell=True).returncode
    with lock:
        report('已执行：%s\n退出状态 %d' % (then_command, status), wechat_name)


def cancel_then():
    """Call the command of --then off; return whether one was to run. Needs the lock."""
    global then_timer
    timer, then_timer = then_timer, None
    if timer is not None:
        timer.cancel()
    return timer is not None


# ------------------------------------------------------------------------------ what the answers say

def values_now():
    """Return the three values as they stand. Needs the lock."""
    return '学习率 lr = %g\n轮数 ti = %d\n批量 bs = %d' % (learning_rate, training_iters, batch_size)


def start_note():
    """Return what a run is started with. Needs the lock."""
    return '设备 %s\n%s' % (device(), values_now())


def data_name():
    """Return what the data are, for checkpoints."""
    return DEMO if data_dir == DEMO else os.path.abspath(data_dir) if data_dir else 'Fashion-MNIST'


def data_note():
    """Return a line that says so when the images are no real ones."""
    return '演示数据：程序画的图，不是 Fashion-MNIST\n' if data_dir == DEMO else ''


def device():
    """Return the name of the device that trains."""
    ctx = try_gpu()
    return 'GPU %d' % ctx.device_id if ctx.device_type == 'gpu' else 'CPU'


def gpu_state():
    """Return the use and the memory of the GPU that trains, as nvidia-smi tells them; '' without one."""
    if try_gpu().device_type != 'gpu':
        return ''
    query = 'nvidia-smi --id=0 --query-gpu=utilization.gpu,memory.used,memory.total --format=csv,noheader,nounits'
    try:
        values = subprocess.run(query.split(), capture_output=True, text=True, timeout=0.8, check=True).stdout
        return '，使用率 %s%%，显存 %s/%s MB' % tuple(values.strip().split(', '))
    except (OSError, subprocess.SubprocessError, TypeError):
        return ''


def status(gpu):
    """Return where things stand. Needs the lock."""
    lines = ['训练中' if running else '正在停止' if run.busy else '空闲']
    if run.history or run.batch or run.busy:
        lines[0] += '：' + how_far() + ('' if run.busy else '（上次）')
    else:
        lines += filter(None, [resume_offer()])
    if run.losses:
        lines.append('最近一批损失 %.4g' % run.losses[-1][1])
    if run.history:
        lines.append('第 %d 轮：损失 %.4g\n精度：训练 %.3f，测试 %.3f' % run.history[-1][:4])
        lines.append(best_line())
    if run.busy:
        batches, seconds = run.batch - run.epoch_from, time.monotonic() - run.epoch_began
        if batches > 0:
            lines.append('速度 %.0f 张/秒' % (batches * run.params[2] / seconds))
        lines.append('已用 ' + duration(elapsed()) + time_left())
    return data_note() + '\n'.join(lines + [values_now(), '设备 %s%s' % (device(), gpu), '主机 ' + socket.gethostname()])


def resume_offer():
    """Return what 继续 would go on with; '' when there is nothing, or it was trained to its end."""
    path, state = last_checkpoint()
    if path is None or (len(state['history']), state['batch']) == (state['params'][1], 0):
        return ''
    done = '完成 %d/%d 轮' % (len(state['history']), state['params'][1])
    if state['batch']:
        done += '，第 %d 轮到第 %d/%d 批' % (state['epoch'], state['batch'], state['batches'])
    return '有没训练完的：%s，发“继续”接着训练' % done


def run_length():
    """Return the number of epochs that the run is to train. Needs the lock."""
    return max(training_iters if run.live else run.params[1], len(run.history) + (run.batch > 0))


def epochs_done():
    """Return how many epochs the run has done; 2.5 is amid the third. Needs the lock."""
    return len(run.history) + (run.batch / run.batches if run.batch else 0)


def elapsed():
    """Return for how many seconds the run has trained. Needs the lock."""
    return run.seconds_before + time.monotonic() - run.began


def time_left():
    """Return how long the run will take from here, in words; '' when nobody knows. Needs the lock."""
    done, length = epochs_done(), run_length()
    if not run.done_before < done < length:
        return ''
    return '，还需约 ' + duration((elapsed() - run.seconds_before) / (done - run.done_before) * (length - done))


def how_far():
    """Return how far the run has come. Needs the lock."""
    text = '完成 %d/%d 轮' % (len(run.history), run_length())
    return text + ('，第 %d 轮到第 %d/%d 批' % (len(run.history) + 1, run.batch, run.batches) if run.batch else '')


def best_line():
    """Return the best test accuracy of the run. Needs the lock."""
    best = best_row(run.history)
    return '最好的测试精度 %.3f（第 %d 轮）' % (best[3], best[0])


def best_row(history):
    """Return the row of the epoch with the best test accuracy, the first of them; None without epochs."""
    return max(history, key=lambda row: row[3], default=None)


def closing_report():
    """Return how the run ended. Needs the lock."""
    error, lines = run.error, ['训练完成' if running else '训练已停止', how_far()]
    if isinstance(error, FloatingPointError):
        batch = '第 %d 轮第 %d/%d 批' % (len(run.history) + 1, run.batch + 1, run.batches) if run.batches else how_far()
        lines = ['训练停下了：%s' % error, '%s，lr = %g' % (batch, learning_rate)]
        lines += ['可以试试 lr %g，再发“%s”' % (learning_rate / 10, '继续' if run.checkpoint else '开始')]
    elif error is not None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        lines = ['训练出错，已结束（主机 %s）' % socket.gethostname(),
                 '%s: %s' % (type(error).__name__, first_line(error)),
                 '%s 第 %d 行：%s' % (os.path.basename(place.filename), place.lineno, place.line), how_far()]
    if run.history:
        lines.append(best_line())
    if run.checkpoint and (error is not None or not running):
        lines.append('检查点在 %s，发“继续”接着训练' % run.checkpoint)
    return data_note() + '\n'.join(lines + ['用时 ' + duration(elapsed())])


def first_line(error):
    """Return the first line of what an exception says, for a phone."""
    lines = str(error).strip().split('\n')
    return (lines[-1 if lines[0].startswith('Traceback') else 0] or '没有说明')[:200]  # MXNet puts its own first


def curve():
    """Return a function that draws the curves so far and returns '@img@' + the path of the picture.

    The postman calls it: drawing takes a second. Needs the lock.
    """
    draw = functools.partial(draw_curve, run.history[:], run.losses[:])
    return lambda this_run=run: '@img@' + write_whole('curve.png', draw, this_run)


def draw_curve(history, losses, path):
    """Draw loss and accuracies over the epochs, the loss of every batch thin behind, as a PNG for a phone."""
    from matplotlib.figure import Figure  # takes half a second, so not before it is needed
    from matplotlib.ticker import MaxNLocator
    figure = Figure(figsize=(5, 6.5), dpi=160, layout='constrained')
    figure.suptitle('drawn images, not Fashion-MNIST' if data_dir == DEMO else 'test acc %.3f after %d epochs' % (
        history[-1][3], len(history)) if history else 'first epoch')
    above, below = figure.subplots(2, sharex=True)
    if losses:
        above.plot(*zip(*losses), color='tab:blue', alpha=0.4, linewidth=0.8, label='loss of each batch')
    if history:
        epochs, loss, train_acc, test_acc = list(zip(*history))[:4]
        above.plot(epochs, loss, 'o-', color='tab:blue', label='train loss')
        below.plot(epochs, train_acc, 'o-', color='tab:orange', label='train acc')
        below.plot(epochs, test_acc, 's--', color='tab:green', label='test acc')
        below.legend(fontsize=12)
    above.legend(fontsize=12)
    # A few wild batches must not press the rest to the ground.
    finite = [loss for _, loss in losses if math.isfinite(loss)] + [row[1] for row in history]
    above.set(ylabel='loss', ylim=(0, 1.2 * np.percentile(finite, 98) if finite else 1))
    below.set(ylabel='accuracy', ylim=(0, 1), xlabel='epoch', xlim=(0, None))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, format='png')


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

chat = itchat    # what carries the words; utils.chat = Console() puts the terminal in its place

# `mail` guards these, and is told of every change.
mail = threading.Condition()
outbox = collections.deque()  # [wechat_name, text] to be sent, in order
online = False   # is there a session to send in?
sending = None   # the text that WeChat has been given and has not answered yet
own = collections.deque(maxlen=1000)  # MsgIDs of what was sent; the text where the answer got lost


def chat_send(text, wechat_name):
    """Hand `text`, or a function that returns it, to the postman; returns at once."""
    with mail:
        outbox.append([wechat_name, text])
        mail.notify_all()


def report(text, wechat_name):
    """Send `text` to the one who started the run and to every supervisor. Needs the lock."""
    for name in {wechat_name, *commanders}:
        chat_send(text, name)


def set_online(value):
    """Tell the postman that a session has begun or ended."""
    global online
    with mail:
        online = value
        mail.notify_all()


def deliver():
    """Send what is in the outbox, in order, for ever: the postman's work.

    What is refused is tried again after growing pauses, what waits for a session is sent in the next
    one, and what has had to wait is merged.
    """
    tries, late = 0, False
    while True:
        with mail:
            late = late or bool(outbox and not online)
            mail.wait_for(lambda: outbox and online)
            if late:
                merge_waiting()
            wechat_name, text = letter = outbox[0]
        if callable(text):
            try:
                text = letter[1] = text()
            except (OSError, RuntimeError) as error:
                text = letter[1] = '图没有画成：' + first_line(error)
        problem, final = send_now(wechat_name, text)
        with mail:
            if problem and not (final and tries >= 5):
                tries, late = tries + 1, True
                log('还没有发出去（%s），会再试。' % problem)
                mail.wait_for(lambda: not online, timeout=min(2 ** (tries - 1), 60))
                continue
            outbox.popleft()
            mail.notify_all()
            tries, late = 0, late and bool(outbox)
        if problem:
            write_undelivered([(wechat_name, text)], problem)
        else:
            log('已发送给 %s：%s' % (wechat_name, text))


postman = threading.Thread(target=deliver, name='postman', daemon=True)


def merge_waiting():
    """Merge the texts for one person at the head of the outbox, up to what WeChat takes. Needs `mail`."""
    first = outbox[0]
    while len(outbox) > 1 and outbox[1][0] == first[0] and all(
            isinstance(text, str) and not text.startswith('@img@') for text in (first[1], outbox[1][1])) and (
            len(first[1]) + len(outbox[1][1]) < 1800):
        first[1] += '\n\n' + outbox[1][1]
        del outbox[1]


def send_now(wechat_name, text):
    """Send once; return why it did not go ('' when it did) and whether that is the message's own fault."""
    try:
        to = address(wechat_name)
        if to is None:
            return '好友里找不到“%s”' % wechat_name, True
        answer = send_as_own(text, to)
        code = 0 if answer else answer['BaseResponse'].get('Ret')
        # 1205: too frequent; 1100 to 1102: logged out; -1000, -1004: the server's own trouble
        return '' if code == 0 else 'Ret %s' % code, code not in (1205, 1100, 1101, 1102, -1000, -1004)
    except requests.RequestException as error:
        return type(error).__name__, False
    except (LookupError, ValueError, OSError) as error:  # itchat with half a session; a file that is gone
        return repr(error), True


def send_as_own(text, to):
    """Send, and keep by what to know the message when it comes back; see is_own()."""
    global sending
    with mail:
        sending, mark = text, text
    try:
        answer = chat.send(text, to)
        mark = str(answer.get('MsgID'))
        return answer
    finally:
        with mail:
            sending = None
            own.append(mark)
            mail.notify_all()


def is_own(msg):
    """Return whether the program itself sent a message: from 文件传输助手 it comes back."""
    with mail:
        mail.wait_for(lambda: sending != msg['Text'])  # before that its MsgID is not known
        for mark in (str(msg.get('MsgId', '')), msg['Text']):
            if mark in own:
                own.remove(mark)
                return True
        return False


def address(wechat_name):
    """Return the UserName that reaches `wechat_name` in this login, or None."""
    if wechat_name == 'filehelper':
        return wechat_name
    if wechat_name.startswith('@'):
        return wechat_name if chat.search_friends(userName=wechat_name) else None
    with lock:
        if wechat_name not in addresses:
            friends = chat.search_friends(name=wechat_name)
            if len(friends) == 1:
                addresses[wechat_name] = friends[0]['UserName']
        return addresses.get(wechat_name)


def write_undelivered(letters, why):
    """Put what could not be delivered into the run's log."""
    for wechat_name, text in letters:
        if not callable(text):
            say('没有发给 %s（%s）：%s' % (wechat_name, why, text))
            with contextlib.suppress(OSError), open(os.path.join(run_folder(run), 'undelivered.txt'), 'a',
                                                    encoding='utf-8') as f:
                f.write('%s %s（%s）\n%s\n\n' % (time.strftime('%F %T'), wechat_name, why, text))


def say(text):
    """Print `text` on the terminal with the time, above a progress bar if there is one."""
    tqdm.write(time.strftime('%H:%M:%S ') + text)


def log(text):
    """Print what goes through WeChat; the Console has it on the terminal already."""
    if chat is itchat:
        say(text)


class Console:
    """The terminal in WeChat's place: a line typed is the owner's message, an answer is printed."""

    def msg_register(self, kind):
        def register(handler):
            self.handler = handler
            return handler
        return register

    def auto_login(self, **options):
        trainer_thread.submit(load_mxnet)
        set_online(True)
        say('在这里输入命令，“帮助”列出全部命令，Ctrl-D 结束。')
        if resume_offer():
            say(resume_offer())

    def run(self):
        for line in sys.stdin:
            if not sys.stdin.isatty():
                tqdm.write('> ' + line.rstrip())
            self.handler({'Text': line, 'FromUserName': 'filehelper', 'User': {'UserName': 'filehelper'}})
            wait_for_mail()  # the answer stands under its command
        if training is not None:
            training.result()
        if then_timer is not None:
            then_timer.join()

    def send(self, text, wechat_name):
        tqdm.write(text.replace('@img@', '图片：') + '\n')
        return {'MsgID': 0}


# --------------------------------------------------------------------------------- WeChat's own login

filehelper = False   # log in through 文件传输助手, which takes every account
QR_FILE = 'QR.png'
UNREACHABLE = '连不上微信（%s）。没有网络可用 --console 在终端里控制，或用 --demo 试用。'
BUSY = '微信说请求太频繁，请过几分钟再试，或用 --console 在终端里控制。'
REFUSED = {  # by whether `filehelper`
    False: '微信没有让这个账号登录网页版：很多账号不开放，或者被限制了。请加上 --filehelper，从文件传输助手登录，什么账号都可以。',
    True: '微信没有让这个账号登录文件传输助手网页版。请过一会儿再试，换一个账号，或用 --console 在终端里控制。'}
exit_signal = None   # Ctrl-C or SIGTERM, once it has come
logins = failures = 0          # sessions so far; failed attempts since the last of them
session_over = threading.Event()  # has itchat's receiving thread cleaned up?


class Adapter(requests.adapters.HTTPAdapter):
    """What itchat leaves out of a request: a time-out when it logs in, sends or uploads, and a look at the status."""

    def send(self, request, timeout=None, **kwargs):
        response = super().send(request, timeout=timeout or itchat.config.TIMEOUT, **kwargs)
        if response.status_code >= 500 or response.status_code == 429:  # 429: too many requests
            response.raise_for_status()
        return response


class OneLine(logging.Handler):
    """Prints the last line of what itchat logs: its tracebacks of lost connections fill a screen."""

    def emit(self, record):
        say('itchat：' + record.getMessage().strip().split('\n')[-1][:200])


def prepare():
    """Put right, once, what itchat leaves open; catch Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    sys.stdout.reconfigure(errors='replace')  # a terminal without Chinese is no reason to end
    itchat.set_logging(showOnCmd=False, loggingLevel=logging.WARNING)
    logging.getLogger('itchat').addHandler(OneLine())
    itchat.instance.s.mount('https://', Adapter())
    itchat.instance.dump_login_status = dump_session
    itchat.instance.load_login_status = load_session
    itchat.instance.get_QRuuid = get_uuid
    itchat.components.register.test_connect = lambda: True  # its own has no time-out; jslogin will tell
    if filehelper:
        speak_filehelper()


def leave(signum, frame):
    """The first Ctrl-C or SIGTERM ends the program in order, the second at once."""
    global exit_signal
    if exit_signal is not None:
        os._exit(128 + signum)
    exit_signal = signum
    if itchat.instance.alive:
        itchat.instance.logout = lambda: None  # keeps the session for the closing report
        itchat.instance.alive = False          # ends itchat.run()
    else:
        sys.exit(128 + signum)


def chat_goes_on():
    """Return True before every login until the person ends the program; wait longer after every failure."""
    try:
        if not logins and not failures:
            prepare()
        elif chat is itchat and exit_signal is None:
            say('微信断开了，训练不受影响；%d 秒后重新登录。' % min(2 ** failures, 60))
            time.sleep(min(2 ** failures, 60))
        else:
            return False  # the end of what was typed
        if chat is itchat:
            itchat.instance.alive = itchat.instance.isLogging = False
            session_over.clear()
            check_session()
    except SystemExit:  # of leave()
        pass
    return exit_signal is None


@contextlib.contextmanager
def session():
    """Around login and run(): turn what itchat raises into one line; end the program if the first login fails."""
    global logins, failures
    trouble = None
    try:
        try:
            yield
        except requests.RequestException as error:
            too_many = error.response is not None and error.response.status_code == 429
            trouble = BUSY if too_many else UNREACHABLE % urllib.parse.urlsplit(itchat.config.BASE_URL).hostname
        except (LookupError, AttributeError, TypeError, ValueError):  # itchat, reading what is no login
            if chat is not itchat:
                raise
            trouble = REFUSED[filehelper]
        logins += online
        failures = failures + 1 if trouble else 0
        if chat is itchat and online and not exit_signal:
            session_over.wait(75)  # or the old session's end would wipe the next one's beginning
            set_online(False)
    except SystemExit:  # of leave()
        pass
    if trouble and not logins:
        sys.exit(trouble)
    elif trouble:
        say(trouble)


def chat_end():
    """Stop the run if the person ends the program, deliver the last words, return the exit status.

    0; 1 after a crash; 130 after Ctrl-C, 143 after SIGTERM.
    """
    with lock:
        if exit_signal is not None:
            cancel_then()
            stop()
    if training is not None:
        training.result()
    wait_for_mail(None if exit_signal is None else 5)
    with mail:
        write_undelivered(outbox, '程序结束了')
    return 128 + exit_signal if exit_signal is not None else int(run.error is not None)


def wait_for_mail(timeout=None):
    """Wait until everything is sent; give up after `timeout` seconds, or when there is no session."""
    with mail:
        mail.wait_for(lambda: not outbox or not online, timeout)


def get_uuid():
    """Return the uuid for a QR code; raise where itchat would ask again every second for ever."""
    uuid = type(itchat.instance).get_QRuuid(itchat.instance)
    if not uuid:
        raise requests.RequestException('no uuid in the answer')
    return uuid


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
        say('请用微信扫码%s登录；终端里的码扫不了，就打开 %s' % ('重新' if logins else '', os.path.abspath(QR_FILE)))
    elif status == '400':
        say('二维码过期了，换一个新的。')
    elif status == '201' or not qrcode:  # no code: the phone asks by itself, after an earlier login
        say('请在手机上确认登录。')


def show_login():
    """Say who has logged in; without it itchat would clear the terminal."""
    if not itchat.instance.storageClass.userName:
        raise LookupError('no account in the answer')
    with contextlib.suppress(FileNotFoundError):
        os.remove(QR_FILE)
    trainer_thread.submit(load_mxnet)
    find_supervisors()
    set_online(True)
    say('已登录：%s。请%s发给“文件传输助手”。' % (
        itchat.search_friends()['NickName'], '把“帮助”' if filehelper else '让好友发“帮助”给它，或自己'))
    if not logins and resume_offer():
        say(resume_offer())


def show_logout():
    """Note that the session is over: itchat calls it when its receiving thread ends."""
    session_over.set()


LOGIN = dict(qrCallback=show_qr, loginCallback=show_login, exitCallback=show_logout, statusStorageDir='itchat.pkl')


def dump_session(path=None):
    """Write the session (whoever has it is logged in) whole or not at all, readable by the owner alone."""
    path = path or LOGIN['statusStorageDir']
    folder = path + '.new'
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a program that was killed
        os.mkdir(folder, 0o700)                    # itchat's file in it is open to all until it is chmodded
        new = os.path.join(folder, 'session')
        type(itchat.instance).dump_login_status(itchat.instance, new)
        os.chmod(new, 0o600)
        os.replace(new, path)
        os.rmdir(folder)
    except OSError as error:
        say('登录状态没有存下来，下次启动要重新扫码：%s' % error)


def load_session(path, **callbacks):
    """Log in with the stored session; raise what keeps the server from answering: it is too early for a QR code."""
    trouble = []

    def get_msg():  # itchat swallows what this raises
        try:
            return type(itchat.instance).get_msg(itchat.instance)
        except requests.RequestException as error:
            trouble.append(error)
            raise
    itchat.instance.get_msg = get_msg
    answer = type(itchat.instance).load_login_status(itchat.instance, path, **callbacks)
    del itchat.instance.get_msg
    if trouble:
        raise trouble[0]
    if filehelper and not answer:
        itchat.instance.s.cookies.clear()  # or itchat would ask for a login without a QR code: not there
    return answer


def check_session():
    """Set a stored session aside that is not the user's own, is open to others, or is damaged."""
    path = LOGIN['statusStorageDir']
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return
    trouble = ''
    if not stat.S_ISREG(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        trouble = '不是只有你能读写的文件，里面可能是别人放的东西'
    else:
        try:
            with open(path, 'rb') as f:
                if not {'loginInfo', 'cookies', 'storage'} <= set(pickle.load(f)):
                    trouble = '内容不全'
        except Exception as error:  # a damaged pickle can raise anything
            trouble = '已损坏（%s）' % type(error).__name__
    if trouble:
        os.replace(path, path + '.bad')
        say('%s %s；改名为 %s.bad，需要重新扫码。' % (os.path.abspath(path), trouble, path))


# ----------------------------------------------------- what --filehelper changes: 文件传输助手's web page

# The page speaks web WeChat's protocol with the differences below; see github.com/sxkiss/wx-filehelper-api.
APP_ID = 'wx_webfilehelper'
EXTRA = {  # query parameters, by the last part of the path
    'jslogin': {'appid': APP_ID,
                'redirect_uri': 'https://szfilehelper.weixin.qq.com/cgi-bin/mmwebwx-bin/webwxnewloginpage'},
    'login': {'appid': APP_ID},
    'webwxnewloginpage': {'fun': 'new', 'version': 'v2'},
    'synccheck': {'mmweb_appid': APP_ID}}
LEFT_OUT = {  # of the answers, although itchat reads it
    'webwxinit': lambda answer: {'InviteStartCount': 0, 'ContactList': []},
    'webwxsync': lambda answer: {'SyncCheckKey': answer.get('SyncKey'), 'ModContactList': []}}
FILE_HOSTS = {'szfilehelper': 'file.wx2.qq.com', 'cmfilehelper': 'file.wx8.qq.com'}


def speak_filehelper():
    """Let itchat log in to the page of 文件传输助手 and find nobody there but 文件传输助手."""
    itchat.config.BASE_URL = 'https://login.wx2.qq.com'
    itchat.instance.s.mount('https://', FileHelperAdapter())
    itchat.instance.web_init = init_filehelper
    itchat.instance.get_contact = lambda update=False: []
    LOGIN['statusStorageDir'] = 'filehelper.pkl'


class FileHelperAdapter(Adapter):
    """Translates between what itchat asks and reads and what the page of 文件传输助手 expects and answers."""

    def send(self, request, **kwargs):
        url = urllib.parse.urlsplit(request.url)
        name = url.path.rsplit('/', 1)[-1]
        if name in EXTRA:
            query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True), **EXTRA[name])
            request.url = url._replace(query=urllib.parse.urlencode(query)).geturl()
        request.headers['mmweb_appid'] = APP_ID
        for header in ('client-version', 'extspam', 'referer'):  # of the UOS client, which this is not
            request.headers.pop(header, None)
        response = super().send(request, **kwargs)
        if name in LEFT_OUT and response.ok:
            answer = json.loads(response.content)
            response._content = json.dumps({**LEFT_OUT[name](answer), **answer, 'ContactList': []}).encode()
        return response


def init_filehelper():
    """Set the hosts that follow from the one where the login ended, and go on as in web WeChat."""
    info = itchat.instance.loginInfo
    entry = urllib.parse.urlsplit(info['url']).hostname.split('.')[0]
    info['syncUrl'] = info['url']
    info['fileUrl'] = 'https://%s/cgi-bin/mmwebwx-bin' % FILE_HOSTS.get(entry, 'file.wx.qq.com')
    return type(itchat.instance).web_init(itchat.instance)
