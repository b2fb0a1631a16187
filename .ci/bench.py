"""Measure the tool side by side with the tutorial's loop and with PyTorch: python .ci/bench.py

All programs train the same network on the same drawn images, one after the other in every round; what counts
are the ratios within a round. PyTorch takes part if it is installed (pip install torch==2.13.0); --batch and
--neighbour need it, --batch a C++ compiler, too (for torch.compile). The tool is the real program, commanded
through the WeChat server of the tests on loopback. The first round comes after a minute or two.

  (nothing)      60,000 images, batch 256, with the tutorial's loop, evaluation, answers and memory
  --batch        12,288 images, batches of 16 to 1024; tool and PyTorch read loss and accuracy of every batch
  --neighbour    the same at 16, 64 and 256, beside a process that keeps one core busy
  --workers      12,288 images, batches of 64 to 1024: one process and two, each of these with one thread
"""

import argparse
import atexit
import contextlib
import functools
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
BATCH = 256

# ------------------------------------- the programs; each returns a function: one round's images/s


def tutorial(folder):
    """The tutorial's loop: gluon's DataLoader with a transform of every image, two asscalar() a batch."""
    import numpy as np

    np.bool = bool
    from mxnet import autograd, gluon, nd

    images, labels = (np.load(os.path.join(folder, name)) for name in ('images.npy', 'labels.npy'))
    dataset = gluon.data.ArrayDataset(images[: 20 * BATCH, :, :, None], labels[: 20 * BATCH].astype('int32'))
    to_tensor = gluon.data.vision.transforms.ToTensor()
    train_data = gluon.data.DataLoader(
        dataset.transform_first(lambda image: to_tensor(nd.array(image, dtype='uint8'))), BATCH, shuffle=True
    )
    net = gluon.nn.Sequential()
    add_layers(net, gluon.nn)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    softmax_cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

    def one_round():
        began = time.perf_counter()
        for data, label in train_data:
            label = label.astype('float32')
            with autograd.record():
                output = net(data)
                loss = softmax_cross_entropy(output, label)
            loss.backward()
            trainer.step(BATCH)
            nd.mean(output.argmax(axis=1) == label).asscalar()
            nd.mean(loss).asscalar()
        return len(dataset) / (time.perf_counter() - began)

    return one_round


def add_layers(net, nn):
    with net.name_scope():
        net.add(
            nn.Conv2D(channels=20, kernel_size=5, activation='relu'),
            nn.MaxPool2D(pool_size=2, strides=2),
            nn.Conv2D(channels=50, kernel_size=3, activation='relu'),
            nn.MaxPool2D(pool_size=2, strides=2),
            nn.Flatten(),
            nn.Dense(128, activation='relu'),
            nn.Dense(10),
        )


def bare(folder):
    """The tool's network and data without a word to anybody: a whole epoch, evaluated at its end."""
    import utils  # before MXNet
    from mxnet import autograd, gluon

    utils.data_dir = folder
    train_data, test_data = utils.load_data_fashion_mnist(BATCH)
    net = gluon.nn.HybridSequential()
    add_layers(net, gluon.nn)
    utils.speed_up(net)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    softmax_cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

    def one_round():
        began, train_loss, train_acc = time.perf_counter(), 0, 0
        for data, label in train_data.read():
            with autograd.record():
                output = net(data)
                loss = softmax_cross_entropy(output, label)
            loss.backward()
            trainer.step(data.shape[0])
            train_acc = train_acc + (output.argmax(axis=1) == label).mean()
            train_loss = train_loss + loss.mean()
        train_loss.asscalar(), train_acc.asscalar()
        trained = time.perf_counter()
        utils.evaluate_accuracy(test_data, net)
        evaluated = time.perf_counter()
        batches = list(test_data)
        listed = time.perf_counter()
        for data, _ in batches:
            net(data).wait_to_read()
        print('EVALUATION', (time.perf_counter() - listed) / (evaluated - trained), flush=True)
        print('EPOCH', evaluated - began, flush=True)
        return 60000 / (trained - began)

    return one_round


def pytorch(folder, variant='', read=False):
    """The same in PyTorch: images as floats in memory; loss and accuracy added up on the device, or read."""
    import numpy as np
    import torch
    from torch import nn

    images, labels = (np.load(os.path.join(folder, name)) for name in ('images.npy', 'labels.npy'))
    images = torch.from_numpy(images[:, None].astype('float32') / 255)
    labels = torch.from_numpy(labels.astype('int64'))
    net = nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1250, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    if variant == 'channels_last':
        net, images = (x.to(memory_format=torch.channels_last) for x in (net, images))
    if variant == 'torch.compile':
        net = torch.compile(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=variant == 'bfloat16 autocast')

    def one_round():
        order = torch.randperm(len(images))[: len(images) if read else 80 * BATCH]
        began, train_loss, train_acc = time.perf_counter(), 0, 0
        for chosen in order.split(BATCH):
            data, label = images[chosen], labels[chosen]
            with autocast:
                output = net(data)
                loss = nn.functional.cross_entropy(output, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            correct, loss = (output.argmax(1) == label).float().mean(), loss.detach()
            train_acc = train_acc + (correct.item() if read else correct)
            train_loss = train_loss + (loss.item() if read else loss)
        float(train_loss), float(train_acc)
        return len(order) / (time.perf_counter() - began)

    return one_round


def sgemm(folder):
    """Matrix products alone: as many images/s as would be trained if nothing else took time."""
    import numpy as np

    a = np.ones((2048, 2048), np.float32)

    def one_round():
        began = time.perf_counter()
        for _ in range(20):
            a @ a
        return (
            20 * 2 * 2048**3 / 7.5e6 / (time.perf_counter() - began)
        )  # the network takes 7.5 MFLOP an image

    return one_round


PROGRAMS = {
    'sgemm': sgemm,
    'tutorial': tutorial,
    'bare': bare,
    'PyTorch eager': pytorch,
    'PyTorch channels_last': lambda folder: pytorch(folder, 'channels_last'),
}
VARIANTS = 'eager', 'channels_last'
for variant in (*VARIANTS, 'torch.compile', 'bfloat16 autocast'):
    PROGRAMS[variant + ', reads'] = functools.partial(pytorch, variant=variant, read=True)


def work(name, folder, batch):
    """Be one of the programs: a round for every line on stdin, after one that does not count."""
    global BATCH
    BATCH = int(batch)
    one_round = PROGRAMS[name](folder)
    one_round()
    print('READY', flush=True)
    for _ in sys.stdin:
        print('RATE', one_round(), flush=True)


class Worker:
    """One of the programs in a process of its own."""

    def __init__(self, name, folder, batch=BATCH):
        env = {
            key: value
            for key, value in os.environ.items()
            if key not in ('MXNET_ENGINE_TYPE', 'OMP_NUM_THREADS')
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, '--worker', name, folder, str(batch)],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.said = {}
        self.read('READY')

    def read(self, word):
        for line in self.process.stdout:
            key, *value = line.split()
            with contextlib.suppress(ValueError):  # utils may say that it loads MXNet
                self.said.setdefault(key, []).extend(map(float, value))
            if key == word:
                return self.said[key][-1:]
        raise RuntimeError('a worker has died')

    def round(self):
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        return self.read('RATE')[0]


# -------------------------------------------------------------------------- the tool, through WeChat

CLOCKED = """
import os, time, utils

stored = 0.0  # seconds in the store that adds up the gradients of --workers

def pushpull(*args, pushpull=utils.Team.pushpull, **kwargs):
    global stored
    began = time.time()
    pushpull(*args, **kwargs)
    stored += time.time() - began

def read(batches, *args, read=utils.Batches.read):
    global stored
    for i, batch in enumerate(read(batches, *args)):
        if i == 1 and batches.training:  # the first batch compiles the network
            batches.began, stored = time.time(), 0.0
        try:
            yield batch
        finally:  # also after 停止
            batches.done, batches.count, batches.stored = time.time(), i, stored

def lock_end(wechat_name, lock_end=utils.lock_end):
    now = time.time()
    numbers = clock.began, clock.done, now, clock.count, clock.stored
    os.write(1, ('CLOCK %.9f %.9f %.9f %d %.9f;' % numbers).encode())  # whole: other threads print, too
    lock_end(wechat_name)

def load(batch_size, load=utils.load_data_fashion_mnist):
    global clock
    train_data, test_data = load(batch_size)
    clock = train_data
    return train_data, test_data
utils.Batches.read, utils.lock_end, utils.load_data_fashion_mnist = read, lock_end, load
utils.Team.pushpull = pushpull
"""
RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


class Tool:
    """wechat_train.py, commanded from WeChat."""

    def __init__(self, folder, threads=None, *options):
        from test_wechat_train import Program, WeChat

        home = tempfile.mkdtemp(dir=folder)
        self.wechat = WeChat(home)
        self.wechat.patience = 25
        env = {**self.wechat.env(), **({'OMP_NUM_THREADS': str(threads)} if threads else {})}
        self.program = Program(home, '--data', folder, *options, env=env, before=CLOCKED + RUN)
        atexit.register(self.program.kill)
        self.wechat.ready()
        self.wechat.ask('ti 1 lr 0.1')
        self.epochs, self.status, self.stops, self.shares = [], [], [], []
        self.round()

    def clock(self):
        """Return when the second batch began, the last one and the epoch were done; seconds of a batch."""
        numbers = map(float, re.findall('CLOCK ([^;]*);', self.program.output())[-1].split())
        began, done, end, count, stored = numbers
        self.shares.append(stored / (done - began))
        return began, done, end, (done - began) / count

    def rate(self, batch):
        """Train an epoch with batches of this size; return images/s."""
        so_far = len(self.wechat.heard())
        self.wechat.ask(f'bs {batch}')
        self.wechat.ask('开始')
        self.wechat.wait_text('训练完成', since=so_far)
        return batch / self.clock()[-1]

    def round(self):
        so_far = len(self.wechat.heard())
        self.wechat.ask('开始')
        for _ in range(3):
            asked = time.time()
            self.wechat.ask('状态')
            self.status.append(time.time() - asked)
        self.wechat.wait_text('训练完成', since=so_far)
        began, done, end, batch = self.clock()
        self.epochs.append((end - began) / 234 * 235)  # the first batch is not in it
        return BATCH / batch

    def stop(self):
        """Start, stop in the middle and note how many batch times passed to the end of the last batch."""
        so_far = len(self.wechat.heard())
        self.wechat.ask('开始')
        while not re.search(r'到第 (\d\d+)/', self.wechat.ask('状态')):
            pass
        asked = time.time()
        self.wechat.says('B', '停止')
        self.wechat.wait_text('训练已停止', since=so_far)
        _, done, _, batch = self.clock()
        self.stops.append((done - asked) / batch)


def first_request(folder):
    """Return the seconds from the start of the program to its request for a QR code."""
    from test_wechat_train import Program, WeChat

    wechat = WeChat(folder)
    wechat.phone = 'waits'
    began = time.time()
    program = Program(folder, env=wechat.env())
    wechat.wait(lambda: wechat.uuid)
    seconds = time.time() - began
    program.kill()
    return seconds


# ------------------------------------------------------------------------------------------ the table


def peak(pid):
    """Return the largest memory of a process so far, in MB (Linux)."""
    with open('/proc/%d/status' % pid) as f:
        return int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) / 1024


def spread(values, digits=2):
    """Return minimum, median and maximum as columns of a table."""
    return ' | '.join('%.*f' % (digits, f(values)) for f in (min, statistics.median, max))


def ratios(above, below):
    return [a / b for a, b in zip(above, below)]


def over_batch_sizes(folder, rounds, sizes, neighbour):
    """Print the table over batch sizes."""
    fixed = range(1, len(os.sched_getaffinity(0)) + 1) if neighbour else ()
    tools = {'tool': Tool(folder), **{f'tool, {n} threads': Tool(folder, n) for n in fixed}}
    extra = ('torch.compile', 'bfloat16 autocast')
    lines, more = [], []
    for size in sizes:
        names = VARIANTS + (extra if size == BATCH and not neighbour else ())
        workers = {name: Worker(name + ', reads', folder, size) for name in names}
        rates = {name: [] for name in (*tools, *names)}
        for tool in tools.values():
            tool.rate(size)
        for _ in range(rounds):
            for name in rates:
                program = tools.get(name) or workers[name]
                rates[name].append(program.rate(size) if name in tools else program.round())
        for worker in workers.values():
            worker.process.kill()
        medians = {name: statistics.median(values) for name, values in rates.items()}
        compare = [tuple(tools)[1:], VARIANTS] if neighbour else [VARIANTS]
        best = [max(names, key=medians.get) for names in compare]
        share = [spread(ratios(rates['tool'], rates[name])) for name in best]
        row = [size, *('%.0f' % medians[name] for name in (*tools, *VARIANTS))]
        lines.append('| %s |' % ' | '.join(map(str, row + [text.replace(' | ', ' / ') for text in share])))
        more += ['| %s, %d | %.0f |' % (name, size, medians[name]) for name in names if name in extra]
        print('batch %d: %s' % (size, medians), flush=True)
    heads = ['tool : best fixed number of threads'] * neighbour + ['tool : faster PyTorch']
    heads = ['batch', *tools, *('PyTorch ' + name for name in VARIANTS)] + [
        head + ', min / median / max' for head in heads
    ]
    print('\n| %s |\n|%s' % (' | '.join(heads), '---|' * len(heads)), *lines, sep='\n')
    if more:
        print('\n| images/s | median |\n|---|---|', *more, sep='\n')
    for tool in tools.values():
        tool.program.kill()


def several_processes(folder, rounds):
    """Print images/s of one process and of two, and which part of the time the store takes."""
    tools = {
        '1 process, 1 thread': Tool(folder, 1),
        '1 process, 2 threads': Tool(folder, 2),
        '2 processes, 1 thread each': Tool(folder, 1, '--workers', '2'),
    }
    print('\n| batch | %s | 2 processes : 1 thread | : 2 threads | the store |' % ' | '.join(tools))
    print('|---' * 7 + '|')
    for size in (64, 256, 1024):
        for tool in tools.values():
            tool.rate(size)
            tool.shares = []
        rates = {name: [] for name in tools}
        for _ in range(rounds):
            for name, tool in tools.items():
                rates[name].append(tool.rate(size))
        one, two, both = rates.values()
        row = [size, *('%.0f' % statistics.median(values) for values in rates.values())]
        row += [spread(ratios(both, below)).replace(' | ', ' / ') for below in (one, two)]
        row += ['%.0f %%' % (100 * statistics.median(tools['2 processes, 1 thread each'].shares))]
        print('| %s |' % ' | '.join(map(str, row)), flush=True)
    print('\n| seconds from a death to its message | %s |' % spread([deaths(tool) for _ in range(rounds)], 1))
    print(
        '| to that of a frozen one | %s |' % spread([deaths(tool, signal.SIGSTOP) for _ in range(rounds)], 1)
    )
    for tool in tools.values():
        tool.program.kill()


def deaths(tool, number=signal.SIGKILL):
    """Kill the second training process, or stop it; return after how many seconds it is told."""
    from test_wechat_train import others_of, trainer_of

    tool.wechat.ask('ti 1000')
    so_far = len(tool.wechat.heard())
    tool.wechat.ask('开始')  # the first time; later it has gone on by itself
    tool.wechat.wait_text(r'第 \d+/1000 轮\n', since=so_far)
    so_far, began = len(tool.wechat.heard()), time.time()
    [follower] = set(others_of(tool.program, '--data')) - {trainer_of(tool.program)}
    os.kill(follower, number)
    tool.wechat.wait_text('不用扫码', since=so_far)
    return time.time() - began


def prepare(folder, total=60000):
    """Write total + 10,000 drawn images as IDX files, and the training part once more for numpy."""
    import numpy as np

    own = dict(os.environ)
    import utils
    from test_wechat_train import write_idx

    os.environ.clear()  # what utils sets in it would be the user's choice to a program that inherits it
    os.environ.update(own)
    for part, times, n, seed in (('train', 5, 12000, 0), ('t10k', 10, 1000, 1)):
        images, labels = utils.draw_garments(n, seed)
        images, labels = np.tile(images, (times, 1, 1))[:total], np.tile(labels, times)[:total]
        write_idx(os.path.join(folder, part + '-images-idx3-ubyte.gz'), images)
        write_idx(os.path.join(folder, part + '-labels-idx1-ubyte.gz'), labels)
        if part == 'train':
            np.save(os.path.join(folder, 'images.npy'), images)
            np.save(os.path.join(folder, 'labels.npy'), labels)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=7, help='interleaved rounds (default 7)')
    parser.add_argument('--batch', action='store_true', help='the table over batch sizes')
    parser.add_argument('--neighbour', action='store_true', help='the same beside a busy process')
    parser.add_argument('--workers', action='store_true', help='one process and two')
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    if args.workers:
        with tempfile.TemporaryDirectory() as folder:
            prepare(folder, 12288)
            return several_processes(folder, args.rounds)
    if args.batch or args.neighbour:
        if not importlib.util.find_spec('torch'):
            parser.error('--batch and --neighbour need PyTorch: pip install torch==2.13.0')
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            prepare(folder, 12288)
            if args.neighbour:
                busy = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
                stack.callback(busy.kill)
            sizes = (16, 64, 256) if args.neighbour else (16, 32, 64, 128, 256, 1024)
            return over_batch_sizes(folder, args.rounds, sizes, args.neighbour)
    names = ['tutorial', 'bare', 'sgemm']
    try:
        import torch

        names += ['PyTorch eager', 'PyTorch channels_last']
        print('PyTorch %s, %d threads' % (torch.__version__, torch.get_num_threads()))
    except ImportError:
        print('PyTorch is not installed: measured without it')
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        from test_wechat_train import trainer_of  # after prepare(), which imports MXNet as it is set up

        tool = Tool(folder)
        workers = {name: Worker(name, folder) for name in names}
        rates = {name: [] for name in ['tool', *names]}
        starts = []
        for i in range(args.rounds):
            rates['tool'].append(tool.round())
            for name, worker in workers.items():
                rates[name].append(worker.round())
            tool.stop()
            with tempfile.TemporaryDirectory() as empty:
                starts.append(first_request(empty))
            print(
                'round %d of %d: %s'
                % (
                    i + 1,
                    args.rounds,
                    ', '.join('%s %.0f' % (name, values[-1]) for name, values in rates.items()),
                ),
                flush=True,
            )
        said = workers['bare'].said

        print('\n| images/s, training only, batch 256 | min | median | max |\n|---|---|---|---|')
        for name, values in rates.items():
            print('| %s | %s |' % (name, spread(values, 0)))
        print('\n| ratio within a round | min | median | max |\n|---|---|---|---|')
        for name in names:
            print('| tool : %s | %s |' % (name, spread(ratios(rates['tool'], rates[name]))))
        print(
            '| whole epoch with evaluation, bare : tool with chat, bar, status, checkpoint | %s |'
            % spread(ratios(said['EPOCH'][1:], tool.epochs[1:]), 3)
        )
        print('| evaluation : forward passes alone, images/s | %s |' % spread(said['EVALUATION'][1:]))
        print('\n| | min | median | max |\n|---|---|---|---|')
        print('| 状态 in training to its answer, ms | %s |' % spread([1000 * s for s in tool.status[3:]], 0))
        print('| 停止 to the end of the last batch, batch times | %s |' % spread(tool.stops))
        print('| start to QR request, s | %s |' % spread(starts))
        print('| peak memory, MB: tool, what trains | %.0f | | |' % peak(trainer_of(tool.program)))
        print('| peak memory, MB: tool, what talks | %.0f | | |' % peak(tool.program.process.pid))
        for name, worker in workers.items():
            print('| peak memory, MB: %s | %.0f | | |' % (name, peak(worker.process.pid)))
            worker.process.kill()
        tool.program.kill()


if __name__ == '__main__':
    main()
