"""Data, accuracy, the lock and the chat: what stands between a Gluon training loop and WeChat.

Two processes, two halves and one door. The process that the shell starts talks; its child, the same command
line, trains. Read from top to bottom:

    the half that talks: two processes -> what is said -> the options -> what is remembered -> people
        -> what can be said -> outgoing mail -> clients (Terminal, WeChat, FileHelper)
        -> several programs, one login -> the training process -> what it prints, what is left of the machine
    the door: the talking process never comes back from `import utils`
    the half that trains: before MXNet -> the command line -> data -> device, accuracy -> its speed
        -> several processes (class Team) -> what a training loop calls -> class Run -> its files
        -> the commands -> the client in itchat's place

The first half knows no network and no run, only what it was told of one; the second knows no session and
no contacts. Between them is one Line, and on it itchat's interface.

In the talking process the main thread logs in and receives (clients), two threads send (Mail), one
listens to the training process and starts it again (Trainer), two read what it prints (Output), one prints
(Printer), one watches for a run that stands still, one looks at the machine (Machine); where several programs
have one login, see Programs and Joined. In the training process the main thread runs nn_train, one listens on
the line and carries out commands, one draws.

Lock order, talking: `trainer.guard` before `programs.guard` before `people.guard`, `mail.changed`,
`output.guard` or a client's `echo`, of which no two are held together, and `memory.guard` last. Training:
`lock` (the run, the values) before the line's.
"""

import sys

if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit('需要 Python 3.9 或更新的版本，现在是 %d.%d。' % sys.version_info[:2])
if sys.version_info >= (3, 15) and 'WECHAT_TRAIN_ROLE' not in __import__('os').environ:
    print(
        '在 Python %d.%d 上没有试过（试过的是 3.9 到 3.14），照样继续。' % sys.version_info[:2],
        file=sys.stderr,
    )

import os
import signal

# ------------------------------------------------------------------------------------- two processes


def explain_missing_package(kind: type, error: BaseException, trace: 'Any') -> None:
    """Say in one line how to install a package that this file does not find; be Python's own hook else."""
    frames = [trace]
    while frames[-1].tb_next:
        frames.append(frames[-1].tb_next)
    ours = any(each.tb_frame.f_globals is globals() for each in frames)
    if not ours or not issubclass(kind, ModuleNotFoundError):
        return previous_hook(kind, error, trace)
    here = os.path.dirname(os.path.abspath(__file__))
    wanted, venv = os.path.join(here, 'requirements.txt'), os.path.join(here, '.venv')
    install = f'{{}} -m pip install --no-deps -r {wanted}'
    if os.path.exists(os.path.join(venv, 'bin', 'python')) and not sys.executable.startswith(venv):
        how = f'用 {venv}/bin/python 代替 {sys.executable}'
    elif sys.prefix != sys.base_prefix:
        how = '先运行 ' + install.format(sys.executable)
    else:
        how = f'先运行 python3 -m venv {venv} && ' + install.format(f'{venv}/bin/python')
        how += f'，再用 {venv}/bin/python 代替 {sys.executable}'
    print(f'这个 Python 没有 {error.name}：{how}', file=sys.stderr)


previous_hook, sys.excepthook = sys.excepthook, explain_missing_package  # until all is imported

ROLE = 'WECHAT_TRAIN_ROLE'  # in the environment: its starter's number, what a process is, words for it


def take_role() -> list:
    """Return what this process was started as, 'trains', 'talks' or 'follows', and words; [''] by others.

    What it starts itself must not take it for its own, so the mark goes from the environment.
    """
    starter, *mark = os.environ.pop(ROLE, '0').split()
    if not mark or int(starter) == os.getppid():
        return mark or ['']
    try:  # somebody else's mark: a process started before this import does not have its line
        os.fstat(int(mark[1]))
    except (OSError, ValueError):
        return ['']
    sys.exit(1)  # the starter is gone already


def is_started() -> bool:
    """Return whether the script that imports this is the program that was started: x.py or -m x.

    It is not in a test, a debugger, a notebook or `python -c`, nor when another module imports this one.
    """
    frame = sys._getframe(1)
    while frame and (frame.f_globals is globals() or 'importlib' in frame.f_code.co_filename):
        frame = frame.f_back
    main = vars(sys.modules['__main__'])
    if frame is None or frame.f_globals is not main or not main.get('__file__') or sys.flags.interactive:
        return False
    while frame.f_back and frame.f_back.f_globals.get('__name__') == 'runpy':  # of -m
        frame = frame.f_back
    return frame.f_back is None


def leave_early(number, frame) -> None:
    """End at once and without a word, at a signal before there is anything to lose."""
    if first_process:
        first_process[0].kill()
    os._exit(128 + number)


role, *role_words = take_role()
TALKS = role == 'talks' or (not role and is_started())
first_process = None  # the training one, started before the rest is imported: both import at the same time
if TALKS:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, leave_early if not role else signal.SIG_IGN)

import socket
import subprocess
import tempfile

FOLDER = os.getcwd()  # where the program was started: whatever is written lies here
SCRIPT = getattr(sys.modules['__main__'], '__file__', None)
COMMAND = [  # how the program was started; a script is named so that it is found from another folder, too
    os.path.abspath(SCRIPT) if SCRIPT and argument == sys.argv[0] else argument
    for argument in getattr(sys, 'orig_argv', [sys.executable, *sys.argv])[1:]  # Python 3.10 has it
]


def start_process(role: str, command: list, *files, **how) -> tuple:
    """Start this program in another role with these open files; return it and our end of the line."""
    ours, theirs = socket.socketpair()
    numbers = [theirs.fileno(), *(file.fileno() for file in files)]
    columns = os.get_terminal_size(2).columns or 80 if os.isatty(2) else 0
    mark = ' '.join(map(str, (os.getpid(), role, *numbers, columns)))
    env = {**os.environ, ROLE: mark}
    if columns:  # it has no terminal of its own
        env.setdefault('COLUMNS', str(columns))
    with theirs:
        command = [sys.executable, *command]
        return subprocess.Popen(command, env=env, cwd=FOLDER, pass_fds=numbers, **how), ours


def make_place_file() -> 'Any':
    """Return an open file of 64 zeros, in memory where the system has such files: see class Place."""
    f = open(os.memfd_create('place'), 'r+b') if hasattr(os, 'memfd_create') else tempfile.TemporaryFile()
    f.truncate(64)
    return f


def start_training(place) -> tuple:
    """Start the process that trains, in a session of its own: a terminal's signals do not reach it."""
    pipes = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    return start_process('trains', COMMAND, place, start_new_session=True, **pipes)


if TALKS:
    for number in range(3):  # closed by the shell: what is opened next must not take a stream's number
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    place_file = make_place_file()
    if not role:
        first_process = start_training(place_file)

import argparse
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import csv
import email.utils
import enum
import errno
import fcntl
import functools
import glob
import grp
import hashlib
import html
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing.connection
import operator
import pickle
import queue
import random
import re
import select
import shutil
import sqlite3
import ssl
import stat
import struct
import termios
import threading
import time
import traceback
import unicodedata
import urllib.parse
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple, Optional

import requests
import segno
import urllib3
from tqdm import tqdm

os.environ.pop('ITCHAT_UOS_ASYNC', None)  # its asynchronous half is another program
with contextlib.redirect_stdout(io.StringIO()):  # importing it draws a block on the terminal
    import itchat
    import itchat.content
    from itchat.components.contact import update_local_chatrooms
    from itchat.components.messages import produce_msg
    from itchat.returnvalues import ReturnValue
    from itchat.storage import templates
    from itchat.storage.messagequeue import Message


class Line:
    """One end of what connects the two processes: JSON objects, in order, nothing pickled.

    Any thread sends; one thread alone receives. In the training process send() waits until the other one has
    room, so that what was sent is not lost with the sender; in the talking one a thread writes, and whoever
    sends never waits: or each could wait for the other to read.
    """

    def __init__(self, number: int, waits: bool = True):
        self.connection = multiprocessing.connection.Connection(number)
        self.guard = threading.Lock()
        self.waiting = None if waits else queue.SimpleQueue()
        self.writer = threading.Thread(target=self.write_waiting, name='writer', daemon=True)
        if not waits:
            self.writer.start()

    def send(self, do: str, **message) -> None:
        """Send {'do': do, ...}; when the other process is gone, its end is noticed where it is received."""
        content = json.dumps({'do': do, **message}, default=as_json).encode()
        if self.waiting is not None:
            self.waiting.put(content)
        else:
            with self.guard, contextlib.suppress(OSError):
                self.connection.send_bytes(content)

    def write_waiting(self) -> None:
        """Write what was sent, until the other process is gone: a thread of the talking process."""
        with contextlib.suppress(OSError):
            while (content := self.waiting.get()) is not None:
                self.connection.send_bytes(content)

    def close(self) -> None:
        """Write what was sent, if the other process takes it; then no more: in the talking process."""
        self.waiting.put(None)
        self.writer.join(1)

    def cut(self) -> None:
        """Let both ends find that the other one is gone, also whoever waits for it right now."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)

    def receive(self, *others: Any, most: Optional[int] = None) -> Optional[dict]:
        """Return what comes next, of at most so many bytes; None at the end of the other process.

        `others` are files that can be read when that process is gone though some child of its holds the line.
        """
        with contextlib.suppress(OSError, EOFError):
            if self.connection in multiprocessing.connection.wait([self.connection, *others]):
                return json.loads(self.connection.recv_bytes(most))
        return None


def as_json(value: Any) -> Any:
    """Return what stands in JSON for what it does not know: bytes, a set, a person's own objects."""
    if isinstance(value, bytes):
        return {'bytes': base64.b64encode(value).decode()}
    return list(value) if isinstance(value, (set, tuple)) else str(value)


# The phases of a run. Run.enter() alone changes them; what is not drawn cannot happen.
#
#   WAITING  -- 开始, 继续 -->  LOADING
#   LOADING  -- lock_start(), a pass that trains, chat_inf() -->  TRAINING
#   TRAINING -- the end of that pass, another pass, evaluate_accuracy() -->  TESTING
#   TESTING  -- chat_inf(), lock_start(), a pass that trains -->  TRAINING
#   LOADING, TRAINING, TESTING -- save_checkpoint() -->  SAVING -- its end -->  the one before
#   LOADING to SAVING -- 停止, 早停, lock_end(), an exception -->  ENDING, with its reason
#   ENDING (早停) -- 停止 -->  ENDING (停止);  ENDING -- an exception -->  ENDING (NaN, 出错)
#   ENDING   -- nn_train has returned and the end is told -->  OVER


class Phase(enum.IntEnum):
    """What a run is doing."""

    WAITING, LOADING, TRAINING, TESTING, SAVING, ENDING, OVER = range(7)


class Ending(enum.Enum):
    """Why a run has ended."""

    DONE, STOPPED, EARLY = '完成', '停止', '早停'
    NAN, ERROR, BROKEN = 'NaN', '出错', '中断'


class Place:
    """Where the training is: memory that both processes see, and that a kill -9 leaves as it was.

    The training process writes it (with `lock`), any thread of the talking one reads it.
    """

    FIELDS = 'phase', 'epochs', 'length', 'batch', 'batches', 'epoch_from', 'epoch_began', 'last_step'

    def __init__(self, number: int):
        self.memory = mmap.mmap(number, 64)

    def write(self, *numbers: float) -> None:
        """Write FIELDS; the last two are by time.monotonic(), which is the same in both processes."""
        struct.pack_into('8d', self.memory, 0, *numbers)

    def read(self) -> dict:
        """Return FIELDS."""
        return dict(zip(self.FIELDS, struct.unpack_from('8d', self.memory)))


def place_in_words(epochs: float, batch: float, batches: float, to: str = '到') -> str:
    """Return a place in the current epoch, in words."""
    return f'第 {epochs + 1:.0f} 轮{to}第 {batch:.0f}{f"/{batches:.0f}" if batches else ""} 批'


def so_far(at: dict) -> str:
    """Return what is done of a run, in words: epochs, length, batch and batches, as of a Place."""
    batch = f'，{place_in_words(at["epochs"], at["batch"], at["batches"])}' if at['batch'] else ''
    return f'完成 {at["epochs"]:.0f}/{at["length"]:.0f} 轮{batch}'


# ----------------------------------------------------------------------------------------- what is said


def say(text: str) -> None:
    """Print `text` on the terminal with the time, above a progress bar if there is one."""
    print_line(time.strftime('%H:%M:%S ') + '\n'.join(visible(line) for line in text.split('\n')))


def print_line(text: str) -> None:
    """Print a line, or several, in one piece."""
    tqdm.write(text + '\n', end='')


def visible(text: str) -> str:
    """Return a text with its control characters written out: strangers' texts must not steer the terminal.

    >>> visible('a\\x1b[2J')
    'a\\\\x1b[2J'
    """
    hidden = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')
    return ''.join(ascii(c)[1:-1] if unicodedata.category(c) in hidden else c for c in text)


def print_traceback() -> None:
    """Print the traceback of the exception that is being handled, without the queries of addresses in it.

    They hold the session's secrets.
    """
    sys.stderr.write(without_queries(traceback.format_exc()))


def without_queries(text: str) -> str:
    """Return a text without the queries of addresses, and without the passwords in them.

    >>> without_queries('GET https://me:secret@host/path?skey=1&sid=2 failed')
    'GET https://...@host/path?... failed'
    """
    return re.sub(r'(?<=://)[^\s/@]+(?=@)', '...', re.sub(r'\?\S*=\S*', '?...', text))


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says; MXNet puts a traceback of its own before it."""
    try:
        lines = str(error).strip().split('\n')
    except Exception:  # of its own __str__
        return '没有说明'
    return (lines[-1 if lines[0].startswith('Traceback') else 0] or '没有说明')[:200]


def duration(seconds: float) -> str:
    """Return a duration in words, to the precision that a person needs.

    >>> duration(7.25), duration(80), duration(7500)
    ('7.2 秒', '1 分 20 秒', '2 小时 5 分')
    """
    if seconds < 10:
        return f'{seconds:.1f} 秒'
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} 小时 {minutes} 分'
    return f'{minutes} 分 {seconds} 秒' if minutes else f'{seconds} 秒'


def local_time(moment: float, form: str = '%m-%d %H:%M') -> str:
    """Return a time of this machine's in words; with its zone where that is not China's."""
    there = time.localtime(moment)
    zone = time.strftime('%z', there)
    return time.strftime(form, there) + f'（UTC{zone[:3]}:{zone[3:]}）' * (zone != '+0800')


def shown(path: str) -> str:
    """Return a path as a person reads it: from the program's folder, if it lies there."""
    return os.path.relpath(path, FOLDER) if os.path.abspath(path).startswith(FOLDER + os.sep) else path


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator:
    """Say what is being waited for when it takes longer than two seconds."""
    timer = threading.Timer(2, say, [f'{what}，请稍候……'])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Printer:
    """Prints what both processes say, by a thread of its own: a terminal that nobody reads holds up nobody.

    Every thread of the talking process puts something in; `changed` guards it all. What is too much is
    dropped, the oldest first, and how much that was is said. Once ask() was called the same thread reads what
    is typed, at a Prompt, as long as the terminal is this program's: then that prints.
    """

    ROOM = 2**20  # bytes that may wait

    def __init__(self):
        self.changed = threading.Condition()
        self.waiting = collections.deque()  # (file descriptor, who says it, bytes)
        self.size = self.dropped = 0  # bytes that wait; lines that were dropped
        self.bar = self.drawn = b''  # the progress bar as it is to be; as it is on the terminal
        self.unfinished = None  # who has begun a line that has no end yet
        self.written = 0  # pieces so far
        self.busy = False
        self.take, self.ctrl_d_ends, self.prompt = None, True, None  # see ask()
        self.wake = None  # while there is a prompt: tells it of a change
        self.closing = False
        self.modes = None  # the terminal's, which are to be restored
        threading.Thread(target=self.work, name='printer', daemon=True).start()

    def put(self, number: int, source: str, content: bytes) -> None:
        """Let `content` be printed on a file descriptor; return at once."""
        with self.changed:
            self.waiting.append((number, source, content))
            self.size += len(content)
            while self.size > self.ROOM and len(self.waiting) > 1:
                _, _, oldest = self.waiting.popleft()
                self.size -= len(oldest)
                self.dropped += oldest.count(b'\n')
            self.notify()

    def show_bar(self, text: str) -> None:
        """Let `text` be the progress bar, if there is a terminal."""
        with self.changed:
            self.bar = self.encode(text) if os.isatty(2) else b''
            self.notify()

    def notify(self) -> None:
        """Tell the thread that something has changed. Needs `changed`."""
        self.changed.notify_all()
        if self.wake:
            self.wake()

    def ask(self, take: Callable, ctrl_d_ends: bool) -> bool:
        """Hand what is typed to take(), by lines, None at its end; return False where there is no prompt."""
        if not (os.isatty(0) and os.isatty(1) and os.environ.get('TERM', 'dumb') not in ('dumb', 'unknown')):
            return False
        with self.changed:
            self.take, self.ctrl_d_ends = take, ctrl_d_ends
            self.notify()
        return True

    def encode(self, text: str) -> bytes:
        """Return a text as the terminal reads it."""
        return text.encode(sys.stderr.encoding, 'replace')

    def work(self) -> None:
        """Print what is put in: the work of the printer's thread."""
        signal.pthread_sigmask(signal.SIG_BLOCK, BACKGROUND)
        while True:
            if self.take and not os.isatty(0):
                self.end_input()
            elif self.take and not self.closing and in_foreground():
                self.converse()
            with self.changed:
                if not self.waiting and self.bar == self.drawn:
                    self.changed.wait(1 if self.take else None)  # nobody tells who comes to the foreground
                    continue
                [(number, source, content)], bar = self.next_pieces(1) or [(2, '', b'')], self.bar
            self.print(number, source, content, bar)
            with self.changed:
                self.bar = self.drawn if self.unfinished else self.bar  # it has no room under a half line
                self.is_done()

    def end_input(self) -> None:
        """Note that nothing more will be typed: the work of the printer's thread."""
        take, self.take = self.take, None
        take(None)

    def next_pieces(self, most: int) -> list:
        """Return the next pieces to print, which then are being printed. Needs `changed`."""
        pieces = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
        self.size -= sum(len(content) for _, _, content in pieces)
        if self.dropped and pieces:
            number, source, content = pieces[0]
            note = self.encode(f'（有 {self.dropped} 行没有打印：终端没有在读）\n')
            pieces[0], self.dropped = (number, source, note + content), 0
        self.busy = True
        return pieces

    def is_done(self) -> None:
        """Note that what was taken is printed. Needs `changed`."""
        self.busy, self.written = False, self.written + 1
        self.changed.notify_all()

    def converse(self) -> None:
        """Print and read at a prompt: until the input ends, the program ends or is put into the background.

        Where that does not work, what is typed is read without a prompt.
        """
        from asyncio import run

        self.print(2, '', b'\n' if self.unfinished else b'', b'')
        try:
            self.prompt = self.prompt or Prompt(self)
            run(self.prompt.run())
        except Exception:  # of a library, in whatever a terminal may be
            print_traceback()
            threading.Thread(target=read_lines, args=(self.take,), daemon=True).start()
            self.take = None
        with self.changed:
            self.wake = None
            self.is_done()

    def print(self, number: int, source: str, content: bytes, bar: bytes) -> None:
        """Write one piece, after the end of a line of somebody else's, and the bar under it."""
        if self.drawn:
            self.write(2, b'\r\x1b[K')
        if content:
            if self.unfinished not in (None, source):
                self.write(number, b'\n')
            self.write(number, content)
            self.unfinished = None if content.endswith((b'\n', b'\r')) else source
        self.drawn = bar if self.unfinished is None else b''
        self.write(2, self.drawn)

    def write(self, number: int, content: bytes) -> None:
        """Write all of it, or nothing more when the disk is full or the terminal gone."""
        with contextlib.suppress(OSError):
            while content:
                content = content[os.write(number, content) :]

    def close(self) -> None:
        """Wait until all is printed, but not for a terminal that takes nothing for a second."""
        with self.changed:
            self.bar, self.closing = b'', True
            while self.waiting or self.busy or self.drawn or self.wake:
                written = self.written
                self.notify()
                if not self.changed.wait_for(lambda n=written: self.written != n, 1):
                    break
        self.restore()

    def restore(self) -> None:
        """Give the terminal back as it was before the prompt."""
        if self.modes:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSANOW, self.modes)


BACKGROUND = {signal.SIGTTIN, signal.SIGTTOU}  # what stops a process that uses a terminal from the background


def in_foreground() -> bool:
    """Return whether what is typed is for this process; of a file or a pipe it is."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError as error:
        return error.errno == errno.ENOTTY


def read_lines(take: Callable) -> None:
    """Hand what is typed, or comes through a pipe, to take(), by lines, then None: a thread of its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BACKGROUND)
    rest = b''
    while True:
        try:
            select.select([0], [], [])
            typed = os.read(0, 65536) if in_foreground() else None
        except OSError:  # the terminal is gone, or was taken away at this moment
            typed = None if os.isatty(0) else b''
        if typed is None:
            time.sleep(1)  # nobody tells who comes to the foreground
            continue
        *lines, rest = (rest + (typed or b'\n' * bool(rest))).split(b'\n')
        for line in lines:
            take(line.decode(sys.stdin.encoding or 'utf-8', 'replace'))
        if not typed:
            return take(None)


class Interrupted(Exception):
    """The prompt is taken away for a moment, or for good."""


class Prompt:
    """The terminal as a chat, by prompt_toolkit: what is printed stands above the prompt, the bar below it.

    The printer's thread makes and runs it.
    """

    def __init__(self, printer: Printer):
        from prompt_toolkit import PromptSession  # 8 MB and 75 ms: not before it is needed
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.input.vt100 import Vt100Input
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output.vt100 import Vt100_Output
        from prompt_toolkit.shortcuts import CompleteStyle
        from prompt_toolkit.styles import Style

        self.printer, self.rest = printer, {}  # the latter: who has begun a line that has no end yet -> it
        self.suspends, self.document = (
            False,
            '',
        )  # the latter: what stands at the prompt when it is taken away
        bindings, keys = KeyBindings(), Vt100Input(sys.stdin)
        bindings.add('c-z')(lambda event: self.interrupt(suspend=True))
        keys.raw_mode, keys.cooked_mode = self.keys_as_typed, contextlib.nullcontext
        printed = Printed(1, sys.stdout.encoding, lambda number, who, content: printer.write(number, content))
        screen = Vt100_Output.from_pty(printed, os.environ['TERM'])
        screen.get_rows_below_cursor_position = lambda: 1  # or it would ask the terminal, and wait
        words = [word for pair in COMMANDS.items() for word in (pair[0], pair[1].chinese)]
        before = "SELECT text FROM message WHERE id LIKE 'typed %' ORDER BY rowid DESC LIMIT 100"
        self.session = PromptSession(
            '> ',
            completer=WordCompleter([*words, 'lr', 'ti', 'bs'], ignore_case=True, sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            history=InMemoryHistory([text for [text] in memory.rows(before)][::-1]),
            key_bindings=bindings,
            style=Style.from_dict({'bottom-toolbar': 'noreverse'}),
            include_default_pygments_style=False,
            input=keys,
            output=screen,
        )

    @contextlib.contextmanager
    def keys_as_typed(self) -> Iterator:
        """Let the terminal hand on each key at once; Ctrl-C, Ctrl-\\, Ctrl-S mean what they do elsewhere."""
        before, now = termios.tcgetattr(0), termios.tcgetattr(0)
        now[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
        now[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
        now[6][termios.VMIN], now[6][termios.VTIME] = 1, 0
        now[6][termios.VSUSP] = bytes([os.fpathconf(0, 'PC_VDISABLE') & 0xFF])  # see suspend()
        self.printer.modes = before
        termios.tcsetattr(0, termios.TCSANOW, now)
        try:
            yield
        finally:
            self.printer.restore()
            self.printer.modes = None

    async def run(self) -> None:
        """Read, and print what is put into the printer, until the reading ends."""
        from asyncio import Event, TimeoutError, ensure_future, get_running_loop, wait_for

        from prompt_toolkit.application import in_terminal

        woken, printer, drawn = Event(), self.printer, 0.0
        with printer.changed:
            printer.wake = functools.partial(get_running_loop().call_soon_threadsafe, woken.set)
        reading = ensure_future(self.read())
        reading.add_done_callback(lambda _: woken.set())
        woken.set()
        while not reading.done():
            with contextlib.suppress(TimeoutError):
                await wait_for(woken.wait(), 0.5)  # nobody tells who takes the terminal, or changes its modes
            woken.clear()
            with printer.changed:
                pieces = printer.next_pieces(1000)
            content = self.whole_lines(pieces)
            if content:
                async with in_terminal():
                    for number, lines in content:
                        printer.write(number, lines)
            with printer.changed:
                printer.is_done()
                more, below = bool(printer.waiting), self.below()
            if below != self.session.bottom_toolbar and time.monotonic() - drawn > 0.2:  # it takes 2 ms
                self.session.bottom_toolbar, drawn = below, time.monotonic()
                self.session.app.invalidate()
            if printer.closing and not more or self.is_lost():
                self.interrupt()
            elif more:
                woken.set()
        with printer.changed:
            printer.wake = None
            for (number, source), rest in self.rest.items():
                printer.waiting.appendleft((number, source, rest))
                printer.size += len(rest)
        self.rest.clear()
        reading.result()

    def whole_lines(self, pieces: list) -> list:
        """Return [(file descriptor, lines)] for pieces; what has no end yet is kept for the next time."""
        content = []
        for number, source, text in pieces:
            *lines, rest = (self.rest.pop((number, source), b'') + text).split(b'\n')
            if len(rest) > 65536:
                lines, rest = [*lines, rest], b''
            if rest:
                self.rest[number, source] = rest
            if lines:
                content.append((number, b'\n'.join([*lines, b''])))
        return content

    def below(self) -> Optional[str]:
        """Return what stands below the prompt: a line that has no end yet, and the bar. Needs `changed`."""
        begun = [rest.decode(sys.stdout.encoding, 'replace') for rest in self.rest.values()]
        texts = [text.rstrip('\r').split('\r')[-1][-1000:] for text in begun[-1:]]
        texts.append(self.printer.bar.decode(sys.stderr.encoding, 'replace'))
        return '\n'.join(filter(None, texts)) or None

    async def read(self) -> None:
        """Hand on the lines that are typed, until their end, or the terminal is no longer this program's."""
        session = self.session
        while not self.printer.closing and in_foreground():
            session.app.erase_when_done = False
            try:
                how = {'set_exception_handler': False, 'handle_sigint': False}
                line = await session.prompt_async(default=self.document, **how)
            except Interrupted:
                self.document = session.default_buffer.document
                if self.suspends:
                    self.suspends = False
                    suspend()
            except EOFError:
                if session.input.closed or self.printer.ctrl_d_ends:
                    return self.printer.end_input()
            else:
                self.document = ''
                self.printer.take(line.encode('utf-8', 'replace').decode())

    def interrupt(self, suspend: bool = False) -> None:
        """Take the prompt away; read() shows it again, where it may, after the program was suspended."""
        app = self.session.app
        if app.is_running and not app.is_done:
            self.suspends, app.erase_when_done = suspend, True
            app.exit(exception=Interrupted())

    def is_lost(self) -> bool:
        """Return whether the terminal is another program's now, or was while this one was stopped."""
        try:
            echoes = bool(termios.tcgetattr(0)[3] & termios.ECHO)
            return self.printer.modes is not None and (echoes or not in_foreground())
        except termios.error:
            return True


def suspend() -> None:
    """Stand still until SIGCONT, as after Ctrl-Z; a parent that runs for this process alone does, too."""
    with contextlib.suppress(OSError):
        if os.getpgid(os.getppid()) == os.getpgrp():
            os.kill(os.getppid(), signal.SIGTSTP)
    signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)  # os.kill() might return before it


class Printed(io.TextIOBase):
    """The standard output or error of the talking process: hands on what is written, and never raises."""

    def __init__(self, number: int, encoding: str, put: Callable):
        self.number, self.put, self.charset = number, put, encoding

    encoding = property(lambda self: self.charset)

    def write(self, text: str) -> int:
        if text:
            self.put(self.number, 'own', text.encode(self.charset, 'replace'))
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def fileno(self) -> int:
        return self.number


class SafeStream:
    """The standard output or error: writing never raises, though the disk is full or the terminal gone."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def make_streams_safe() -> None:
    """Let nothing that is said or typed raise, and every line be read as soon as it is whole."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name) or open(os.devnull, 'w')  # None: it was closed before the program began
        if not isinstance(stream, (SafeStream, Printed)):
            if hasattr(stream, 'reconfigure'):  # a terminal without Chinese is no reason to end
                stream.reconfigure(errors='replace', line_buffering=True)
            setattr(sys, name, SafeStream(stream))
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='replace')


def let_print(put: Callable) -> None:
    """Let put(descriptor, who, bytes) have all that this process prints."""
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        stream = getattr(sys, name)
        encoding = not role and getattr(stream, 'encoding', None)  # with a role, see do_print()
        setattr(sys, name, Printed(number, encoding or 'utf-8', put))


# ------------------------------------------------------------------------------------- the options


FLAGS = {
    'console': '不用微信，在终端里输入同样的命令',
    'demo': '--console，并用程序自己画的小图：不需要微信，也不需要网络',
    'filehelper': '从文件传输助手登录：什么账号都可以，在自己手机的“文件传输助手”里发命令',
    'logout': '结束存下的登录（服务器上的也结束），删掉它的文件',
    'alone': '自己登录，不和这台机器上已经登录的程序合用一个微信',
}
OPTIONS = {  # default, what stands for it in the help, its help
    'data': (None, 'DIR', 'Fashion-MNIST 的四个 IDX 文件所在的文件夹（默认自动下载）'),
    'seed': (0, None, '随机种子：种子和 OMP_NUM_THREADS 都相同，训练的结果就相同（默认 0）'),
    'supervisor': (
        [],
        'NAME',
        '谁可以下命令：好友的备注名或昵称，可以写多次（默认是第一个发来命令的好友）；机主总可以',
    ),
    'name': (None, 'NAME', '几个程序合用一个微信时，在那里叫什么（默认是文件夹的名字）'),
    'chat': (None, 'PATH', '合用别的机器上的程序的微信：它的套接字用 ssh 接过来，放在 PATH'),
    'then': (None, 'CMD', '训练自己结束后（不是被停止，也没出错）过一分钟执行的命令，如 shutdown'),
    'gpu': (0, 'I', '用第几块 GPU，从 0 数起（默认 0）'),
    'workers': (1, 'N', '由 N 个进程一起训练（默认 1），各用一块 GPU；bs 是合起来的'),
    'host': (None, 'IP', '本机的地址：其余 N-1 个进程在别的机器上，用 --join 加入；只用于信得过的网络'),
    'port': (9091, None, '与 --host 一起：在哪个端口等它们（默认 9091）'),
    'join': (None, 'IP:PORT', '不进微信，只跟着那台机器上的程序训练；程序、数据和 --workers 要和那里一样'),
    'trace': (None, 'FILE', '把每个请求和回答记进 FILE，密钥、名字、文字都涂黑，可以附在问题报告里'),
}


CONTRADICTIONS = (
    *(('console', 'filehelper'), ('demo', 'filehelper'), ('demo', 'data'), ('join', 'filehelper')),
    *(('logout', 'console'), ('logout', 'demo'), ('logout', 'join')),
    ('join', 'console'),
    *(('supervisor', name) for name in ('console', 'demo', 'filehelper', 'join')),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that every script has."""
    parser = argparse.ArgumentParser(
        description='训练神经网络，在微信里查看和控制：扫码登录后，好友发“帮助”就能看到全部命令。',
        epilog='退出状态：0 正常；1 登录失败或训练出错；2 选项不对；130、143、129 是被信号结束。',
        allow_abbrev=False,  # a script's --log is not our --logout
    )
    for name, text in FLAGS.items():
        parser.add_argument(f'--{name}', action='store_true', help=text)
    for name, (default, metavar, text) in OPTIONS.items():
        how = {'action': 'append'} if default == [] else {'type': int if isinstance(default, int) else str}
        parser.add_argument(f'--{name}', default=default, metavar=metavar, help=text, **how)
    parser.set_defaults(then_delay=60)  # seconds in which 取消 can be said
    parser.set_defaults(retry=1)  # seconds until what failed is tried again; twice as many every time
    parser.set_defaults(timeout=itchat.config.TIMEOUT)  # seconds to connect, to wait for an answer
    parser.set_defaults(renew=300)  # seconds until a QR code that nobody has scanned is renewed
    parser.set_defaults(give_up=600)  # seconds until a text that WeChat refuses is written down instead
    parser.set_defaults(silence=300)  # seconds without a batch that are told
    return parser


options = make_parser().parse_args([])  # the defaults; what the command line says comes with the login

# ------------------------------------------------------------------------------- what is remembered

RUNS = os.path.join(FOLDER, 'runs')
NEW = '.new'  # behind the name of what is being written


class Memory:
    """What outlives the program: one SQLite file, which the talking process alone reads and writes.

    Every thread of it does, in whole transactions; `guard` guards the connection. When the file cannot be
    written any more, all goes on in memory, and back to the file once that works again.
    """

    NAME = '.wechat_train.db'
    TABLES = """
        CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT);  -- JSON
        CREATE TABLE IF NOT EXISTS person (key INTEGER PRIMARY KEY, user_name TEXT, nickname TEXT,
            remark TEXT, role TEXT, called TEXT, refused INTEGER);  -- see class Person
        CREATE TABLE IF NOT EXISTS letter (key INTEGER PRIMARY KEY AUTOINCREMENT, person INTEGER, kind TEXT,
            content TEXT, test_acc REAL);  -- still to be sent, in this order
        CREATE TABLE IF NOT EXISTS message (id TEXT PRIMARY KEY, person INTEGER, text TEXT, written REAL,
            waiting INTEGER, tries INTEGER);  -- commands; waiting: not answered yet
        CREATE TABLE IF NOT EXISTS run (number INTEGER PRIMARY KEY, person INTEGER, begun REAL, ended REAL,
            ending TEXT, facts TEXT);  -- ending: NULL until it is over; facts: JSON
    """

    def __init__(self):
        self.guard = threading.RLock()
        self.path = os.path.join(FOLDER, self.NAME)
        self.db = None
        self.in_file = False
        self.settled = True  # is all in the file itself, and on the disk?
        self.identity = None  # of the file

    def open(self) -> None:
        """Open the file, or a new one in the place of one that is damaged or that others may write.

        Where it cannot be written, what it holds is taken into memory.
        """
        trouble = self.trouble()
        if trouble:
            for path in glob.glob(glob.escape(self.path) + '*'):
                os.replace(path, path + '.bad')
            say(f'{self.NAME} {trouble}，改名为 {self.NAME}.bad：监督人、三个值和没发出去的都忘记了。')
        try:
            self.use_file()
        except (
            OSError,
            sqlite3.Error,
        ) as error:  # of a folder that cannot be written lock_folder() has said so
            self.db = self.connect(':memory:')
            if os.path.exists(self.path):
                say(f'{self.NAME} 写不了（{error}）：这次的事，程序重新启动就会忘记。')
                with contextlib.suppress(sqlite3.Error), contextlib.closing(self.read_only()) as file:
                    file.backup(self.db)
                    self.complete(self.db)

    def use_file(self) -> None:
        """Go on in the file, with all that was in memory. Raises OSError, sqlite3.Error."""
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        file = self.connect(self.path)
        if self.db is not None:
            self.db.backup(file)
            self.db.close()
        self.db, self.in_file, self.identity = file, True, os.stat(self.path)

    def connect(self, path: str) -> sqlite3.Connection:
        """Return a connection to a file with all tables in it."""
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
        # To wait for the disk at every change takes 20 ms beside a training. A log beside the file needs no
        # such wait: after a power cut the file is whole, if some seconds old. See settle().
        wal = 'journal_mode = WAL', 'synchronous = NORMAL', 'wal_autocheckpoint = 0'
        for pragma in (*wal, 'temp_store = MEMORY'):  # the last: TMPDIR may have no room
            db.execute('PRAGMA ' + pragma).fetchall()
        self.complete(db)
        return db

    def complete(self, db: sqlite3.Connection) -> None:
        """Make the tables that are not there, and the column that a file of an earlier version lacks."""
        db.executescript(self.TABLES)
        with contextlib.suppress(sqlite3.OperationalError):  # it is there
            db.execute('ALTER TABLE letter ADD COLUMN until REAL')  # when it is no longer worth sending

    def read_only(self) -> sqlite3.Connection:
        """Return a connection that only reads the file; without its log where the disk is full."""
        address = f'file:{urllib.parse.quote(self.path)}?mode=ro'
        try:
            db = sqlite3.connect(address, uri=True)
            db.execute('SELECT count(*) FROM sqlite_master').fetchall()
            return db
        except sqlite3.OperationalError:
            return sqlite3.connect(address + '&immutable=1', uri=True)

    def trouble(self) -> str:
        """Return why the file that is there is not to be used, '' if it is or there is none."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return ''
        if not stat.S_ISREG(status.st_mode) or not is_own(status) or status.st_mode & 0o077:
            return '不是只有你能读写的文件，里面可能是别人放的东西'
        try:
            with contextlib.closing(self.read_only()) as db:
                [[answer]] = db.execute('PRAGMA quick_check(1)')
                tables = [
                    name for [name] in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                ]
                for table, columns in re.findall(r'EXISTS (\w+) \((.*?)\);', self.TABLES, re.S):
                    names = re.findall(r'(\w+) (?:TEXT|INTEGER|REAL)', columns)
                    rows = db.execute(f'SELECT {", ".join(names)} FROM {table}').fetchall() if tables else ()
                    for row in rows if table in ('setting', 'run') else ():
                        json.loads(row[-1])
            return '' if answer == 'ok' else '已损坏'
        except sqlite3.OperationalError as error:  # a full disk is no damage, but for what is not there
            return '不是这个程序写的' if str(error).startswith('no such') else ''
        except (sqlite3.Error, ValueError, TypeError):
            return '已损坏'

    def rows(self, sql: str, *values: Any) -> list:
        """Return what a SELECT finds."""
        with self.guard:
            return self.db.execute(sql, values).fetchall()

    def write(self, *statements: tuple) -> list:
        """Carry out all (sql, value, ...) in one transaction; return the key of the row that each added."""
        with self.guard:
            try:
                return self.transact(statements)
            except sqlite3.Error as error:  # a full disk, a folder that is gone
                if not self.in_file:
                    raise
                say(f'{self.NAME} 写不了了（{error}）：从现在起的事，程序重新启动就会忘记。')
                copy = self.connect(':memory:')
                with contextlib.suppress(sqlite3.Error):
                    self.db.backup(copy)
                self.db, self.in_file = copy, False
                return self.transact(statements)

    def transact(self, statements: Iterable) -> list:
        """Do what write() does, or raise sqlite3.Error and leave all as it was."""
        self.db.execute('BEGIN IMMEDIATE')
        try:
            keys = [self.db.execute(sql, values).lastrowid for sql, *values in statements]
            self.db.execute('COMMIT')
            self.settled = False
            return keys
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute('ROLLBACK')
            raise

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting."""
        found = self.rows('SELECT value FROM setting WHERE name = ?', name)
        return json.loads(found[0][0]) if found else default

    def settle(self) -> None:
        """Bring what is in the log into the file; if that could not be written, or is gone, write it anew.

        One thread does, without the guard in the usual case: others need not wait for the disk.
        """
        with contextlib.suppress(OSError, sqlite3.Error):
            if self.in_file and os.path.exists(self.path) and self.is_same():
                if not self.settled:
                    self.settled = True
                    with contextlib.closing(sqlite3.connect(self.path)) as file:
                        file.execute('PRAGMA wal_checkpoint').fetchall()
            elif os.access(FOLDER, os.W_OK):
                with self.guard:
                    self.use_file()

    def is_same(self) -> bool:
        """Return whether the file is the one that was opened: somebody may have put another in its place."""
        return os.path.samestat(os.stat(self.path), self.identity)

    def close(self) -> None:
        """Leave one whole file."""
        with self.guard:
            if self.db is not None:
                self.db.close()


def set_setting(name: str, value: Any) -> tuple:
    """Return the statement that remembers a setting."""
    return 'INSERT OR REPLACE INTO setting VALUES (?, ?)', name, json.dumps(value)


def is_own(status: os.stat_result) -> bool:
    """Return whether a file or folder is the user's (a folder may be root's) and nobody else may write it.

    A group that has nobody else in it is no danger: on many systems everybody has one.
    """
    if status.st_uid != os.getuid() and not (status.st_uid == 0 and stat.S_ISDIR(status.st_mode)):
        return False
    shared = bool(status.st_mode & stat.S_IWOTH)
    if status.st_mode & stat.S_IWGRP:
        try:
            shared |= status.st_gid != os.getgid() or bool(grp.getgrgid(status.st_gid).gr_mem)
        except KeyError:
            shared = True
    return not shared


def open_private(path: Any) -> Any:
    """Open a file to read bytes that are executed when they are unpickled.

    Raises PermissionError, with the way out, unless the file belongs to the user and nobody else can write it
    or exchange it in its folder. The bytes of one that another process has handed over are taken as they are.
    """
    if isinstance(path, bytes):
        return io.BytesIO(path)
    f = open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))
    folder = os.path.dirname(os.path.abspath(path))
    if not is_own(os.fstat(f.fileno())) or not (
        is_own(os.stat(folder)) or os.stat(folder).st_mode & stat.S_ISVTX
    ):
        f.close()
        raise PermissionError(
            0,
            f'别人能改写这个文件或它的文件夹，里面可能是别人放的东西；是自己的就 chmod go-w {path} {folder}',
        )
    return f


def lock_folder(part: int, wait: bool = False) -> Any:
    """Lock a part (0: who talks, 1: who trains) of the file that says who is at work in this folder.

    Return the open file; end the program if another one has the part, or `wait` for it. The lock is the
    system's and the process's own: it ends with it, and no child of it has it.
    """
    path = os.path.join(FOLDER, '.wechat_train.lock')
    flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0)
    try:
        f = open(path, 'r+', opener=lambda name, _: os.open(name, flags, 0o600))
    except OSError as error:
        if part == 0:
            say(f'这个文件夹不能写（{error.strerror}）：检查点、登录状态都存不下来。')
        return None
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, part)
    except (BlockingIOError, PermissionError):
        holder = f.readline(20).strip()
        sys.exit(f'这个文件夹里已经有一个程序在运行（进程 {holder}）。请先停掉它，或换一个文件夹。')
    except OSError:  # a file system without locks
        return f
    if part == 0 and is_own(os.fstat(f.fileno())):
        f.write(f'{os.getpid():<18}\n')
        f.flush()
    return f


def make_run_folder() -> str:
    """Return a new folder for a run. Raises OSError."""
    os.makedirs(RUNS, exist_ok=True)
    name = os.path.join(RUNS, time.strftime('%Y%m%d-%H%M%S'))
    others = (f'{name}-{i}' for i in itertools.count(2))  # for runs of the same second
    while True:
        try:
            os.mkdir(name, 0o755)  # nobody else may put a checkpoint there: see open_private()
            return name
        except FileExistsError:
            name = next(others)


# -------------------------------------------------------------------------------------------- people


class Person:
    """Somebody who writes to the account.

    Within a login it is `user_name`, WeChat's, that says who it is; what WeChat shows, the remark and the
    nickname, serves for reading and for finding the person again at the next login. Changed by People alone.
    """

    def __init__(self, user_name: Optional[str], nickname: str = '', remark: str = ''):
        self.user_name, self.nickname, self.remark = user_name, nickname, remark
        self.role = ''  # 'first': came first; 'named': on the command line, as `called`
        self.called = ''
        self.refused = False  # was told that he or she may not command
        self.key = None  # in the memory

    @property
    def name(self) -> str:
        """What the owner sees."""
        return self.remark or self.nickname or '（没有名字）'


OWNER = Person('filehelper', 'filehelper')  # the account's own notes to 文件传输助手
OWNER.key = 0


class People:
    """Who writes to the account, and who of them may command.

    The main thread brings the messages and the logins, the others ask for audience() and addresses; `guard`
    guards what it knows.
    """

    def __init__(self):
        self.guard = threading.Lock()
        self.known = {'filehelper': OWNER}  # UserName -> Person, of this login
        self.by_key = {0: OWNER}  # those who are in the memory

    def begin(self) -> None:
        """Remember who was known; those who were named before but are not now, or came first, give way."""
        for row in memory.rows('SELECT user_name, nickname, remark, role, called, refused, key FROM person'):
            person = Person(*row[:3])
            person.role, person.called, person.refused, person.key = row[3:]
            if options.supervisor and person.called not in options.supervisor:
                person.role = ''
            self.by_key[person.key] = person
            if person.user_name:
                self.known[person.user_name] = person

    def forget(self) -> None:
        """Another account has logged in, or the login is over: nobody is known any more."""
        with self.guard:
            self.known, self.by_key = {'filehelper': OWNER}, {0: OWNER}
            memory.write(('DELETE FROM person',), ("DELETE FROM setting WHERE name IN ('account', 'owner')",))
        mail.forget()

    def keep(self, person: Person) -> None:
        """Write a person into the memory. Needs the guard."""
        if person is not OWNER:
            names = map(printable, (person.nickname, person.remark))
            row = person.user_name, *names, person.role, person.called, person.refused
            sql = 'INSERT OR REPLACE INTO person VALUES (?, ?, ?, ?, ?, ?, ?)'
            [person.key] = memory.write((sql, person.key, *row))
            self.by_key[person.key] = person

    def supervisors(self) -> list:
        """Return those who supervise. Needs the guard."""
        return [person for person in self.by_key.values() if person.role]

    def say_who_supervises(self) -> None:
        """Say it on the terminal where it is remembered and not on the command line."""
        with self.guard:
            names = '、'.join(visible(person.name) for person in self.supervisors())
        if names and not options.supervisor:
            say(f'监督人还是 {names}；要换，用 --supervisor 或 --logout。')

    def writer(self, msg: dict) -> Optional[Person]:
        """Return the friend, or the owner, who wrote a message; None for anybody else's."""
        user_name = msg['User'].get('UserName')
        if user_name == 'filehelper':  # the owner's note to oneself: its FromUserName is the owner's own
            return OWNER if msg['ToUserName'] == 'filehelper' else None
        if msg['FromUserName'] == msg['ToUserName']:  # the owner's chat with oneself
            return OWNER
        # Unequal: the owner writes to a friend. No NickName: not in the contacts, or WeChat itself.
        if user_name != msg['FromUserName'] or 'NickName' not in msg['User']:
            return None
        with self.guard:
            return self.meet(msg['User'])

    def meet(self, friend: dict) -> Person:
        """Return the Person that an entry of the contacts stands for. Needs the guard."""
        person = self.known.setdefault(friend['UserName'], Person(friend['UserName']))
        names = friend.get('NickName') or '', friend.get('RemarkName') or ''
        if names != (person.nickname, person.remark):
            person.nickname, person.remark = names
            if person.key is not None:
                self.keep(person)
        return person

    def may_command(self, person: Person) -> bool:
        """Return whether `person` may command already."""
        with self.guard:
            return person is OWNER or bool(person.role)

    def permit(self, person: Person, text: str, old: bool) -> bool:
        """Return whether `person` may give the command `text`; one who may not is told so, once.

        The first who commands may from then on, if nobody was named; not by an `old` command, nor when the
        owner commands: then the owner decides.
        """
        with self.guard:
            if person is OWNER and not old and not memory.get('owner'):
                memory.write(set_setting('owner', True))
            nobody = person is not OWNER and not self.supervisors() and not options.supervisor
            asks = nobody and not old and bool(memory.get('owner'))
            first = nobody and not old and not asks
            permitted = nobody and not asks or person is OWNER or bool(person.role)
            to_refuse = not permitted and not person.refused
            if first or to_refuse or person.key is None:
                person.role = 'first' if first else person.role
                person.refused |= to_refuse
                self.keep(person)
        if first:
            mail.put((person, '从现在起，只有你（和机主）能下命令。'))
        if to_refuse:
            mail.put((person, '抱歉，这里的训练由别人监督，你的命令没有执行。'))
        if to_refuse and asks:
            mail.put((OWNER, f'{person.name} 想下命令：“{text[:20]}”。要是允许，就发“允许 {person.name}”。'))
        return permitted

    def allow(self, name: str = '') -> str:
        """Let a friend command, at the owner's word; return the answer."""
        friends = itchat.instance.get_friends()[1:]
        with self.guard:
            person = self.find(names_of(friends), as_shown(name, friends))
            if person is None:  # or no name was said
                return f'没有一个好友叫“{name}”，或者不止一个：请写备注名，例如 允许 小波。'
            person.role, person.refused = person.role or 'allowed', False
            self.keep(person)
        mail.put((person, '机主允许你下命令了，发“帮助”看有哪些。'))
        return f'好，{person.name} 能下命令了。'

    def facts(self) -> list:
        """Return (UserName, nickname, remark, role) of each who may command, for believe()."""
        with self.guard:
            return [(p.user_name, p.nickname, p.remark, p.role) for p in self.supervisors()]

    def believe(self, facts: list) -> None:
        """Take over who may command from the program that has the login."""
        with self.guard:
            found = []
            for user_name, *names, given in facts:
                person = (
                    user_name
                    and self.known.get(user_name)
                    or next(
                        (
                            p
                            for p in self.by_key.values()
                            if [p.nickname, p.remark] == names and p not in found
                        ),
                        Person(user_name),
                    )
                )
                found.append(person)
                now = [person.user_name, person.nickname, person.remark, person.role]
                if now != [user_name, *names, given]:
                    person.user_name, (person.nickname, person.remark), person.role = user_name, names, given
                    self.keep(person)
                if user_name:
                    self.known[user_name] = person
            for person in self.supervisors():
                if person not in found:
                    person.role = ''
                    self.keep(person)

    def rename(self, friends: Iterable) -> None:
        """Note the names of entries of the contacts that have changed."""
        with self.guard:
            for friend in friends:
                if friend['UserName'] in self.known:
                    self.meet(friend)

    def audience(self, key: Optional[int], owner: bool = False) -> list:
        """Return who gets the reports of a run that the person with this key has started.

        With `owner`, the owner if there is nobody else.
        """
        with self.guard:
            persons = [self.by_key.get(key), *self.supervisors()]
        return [p for p in dict.fromkeys(persons) if p] or [OWNER] * owner

    def address(self, person: Person) -> Optional[str]:
        """Return the UserName that reaches `person` in this login, or None."""
        with self.guard:
            return person.user_name

    def find_again(self, account: list) -> None:
        """After a login find all who are known again; it is another account's if no word is the same."""
        before = memory.get('account', account)
        if not set(before) & set(account):
            say('换了一个微信账号：以前的监督人不再有效。')
            self.forget()
        memory.write(set_setting('account', account))
        friends = itchat.instance.get_friends()[1:]  # the first is the account itself
        current, names = {friend['UserName'] for friend in friends}, names_of(friends)
        with self.guard:
            persons = dict.fromkeys([*self.by_key.values(), *self.known.values()])
            self.known = {'filehelper': OWNER}
            for person in persons:
                if person.user_name in current:  # the program was started again, the login is the same
                    self.known[person.user_name] = person
                elif person is not OWNER:
                    person.user_name = None
                    self.find(names, person.name, person)
            for friend in friends:
                if friend['UserName'] in self.known:
                    self.meet(friend)
            for name in options.supervisor:
                if not any(person.called == name for person in self.by_key.values()):
                    person = self.find(names, name)  # once: from then on it is the person, whatever
                    if person:  # others are called
                        person.role, person.called = 'named', name
                        self.keep(person)
            for person in self.by_key.values():
                if person.called in options.supervisor:
                    person.role = 'named'
                self.keep(person)

    def find(self, names: list, name: str, person: Optional[Person] = None) -> Optional[Person]:
        """Return the one friend called `name`, as `person` if given, or say why not. Needs the guard.

        `names` are names_of() all friends. The owner's remarks count before the nicknames, which their
        bearers choose; who is known is looked for by both, then by the one that the owner sees.
        """
        name, old = canonical(name), person and (canonical(person.remark), canonical(person.nickname))
        if not name:
            return None
        found = [f for *both, f in names if person and tuple(both) == old]
        found = found or [f for remark, _, f in names if remark == name and (not person or person.remark)]
        found = found or [f for remark, nick, f in names if nick == name and not (person and remark)]
        if len(found) == 1:
            if person is not None and found[0]['UserName'] not in self.known:
                person.user_name = found[0]['UserName']
                self.known[person.user_name] = person
            return self.meet(found[0])
        why = f'有 {len(found)} 个好友叫这个名字，请用备注名区分' if found else '好友里没有这个人'
        if person is None or person.role:
            say(f'监督人“{visible(name)}”：{why}')
        return None


def names_of(friends: Iterable) -> list:
    """Return (remark, nickname, friend) of friends, in the form in which names are compared."""
    return [(canonical(f.get('RemarkName')), canonical(f.get('NickName')), f) for f in friends]


def canonical(name: Optional[str]) -> str:
    """Return a name in the form in which names are compared: WeChat writes some characters in several ways.

    >>> canonical('A&amp;B\\xa0 ') == canonical('Ａ&B'), canonical('猫<span class="emoji emoji1f63b"></span>')
    (True, '猫😍')
    """
    name = unicodedata.normalize('NFKC', html.unescape(with_emoji(name or ''))).translate(CATS)
    name = ''.join(c for c in name if c == '\u200d' or unicodedata.category(c) not in ('Cf', 'Mn', 'Me'))
    return ' '.join(name.split())


CATS = str.maketrans(
    '😼😹😺💫🙍😻😽🙎😿', '😁😂😃😖😔😍😘😡😢'
)  # WeChat has the numbers of the former for the latter


def with_emoji(text: str) -> str:
    """Return a text in which the elements that WeChat writes for emoji are emoji.

    itchat reads those of one or two code points, and raises at others.

    >>> with_emoji('<span class="emoji emoji3120e3"></span><span class="emoji emoji2764fe0f"></span>')
    '1⃣❤️'
    """
    code = r'[0-9a-f]{2}(?=20e3)|1[0-9a-f]{4}|[0-9a-f]{4}'
    return re.sub(
        r'<span class="emoji emoji([0-9a-f]+)"></span>?',
        lambda found: ''.join(chr(int(part, 16)) for part in re.findall(code, found[1])).translate(CATS),
        text,
    )


# ------------------------------------------------------------------------------------ what can be said


class Command(NamedTuple):
    """A word in the chat: what it is in Chinese, and its help. Class Commands has a method of its name."""

    chinese: str
    help: str
    number: str = ''  # with a number behind the word; the help's example
    optional: bool = False  # may the number be left out?
    more: str = ''  # an example of what else may stand behind it: see read_more()

    def help_line(self) -> str:
        """Return what 帮助 says of it."""
        return f'{self.chinese}{"" if self.optional else self.number}：{self.help}'


COMMANDS = {
    'start': Command('开始', '从头训练；开始 小学习率：起个名字', more=' 小学习率'),
    'stop': Command('停止', '算完这一批就停', more=' 全部'),
    'resume': Command('继续', '接着上次的训练'),
    'status': Command('状态', '现在到哪了'),
    'plot': Command('曲线', '损失和精度的图', ' 2', optional=True),
    'mistakes': Command('错图', '认错的测试图'),
    'runs': Command('记录', '最近几次训练，比一比'),
    'compare': Command('对比', '最近几次画在一张图里'),
    'log': Command('日志', '程序最后打印的几行', ' 20', optional=True),
    'programs': Command('程序', '合用这个微信的有哪些程序'),
    'rollback': Command('回退', '回到最好的一轮'),
    'queue': Command('排队', '排队 lr 0.1, 0.05：一次接一次', more=' lr 0.1, 0.05'),
    'remind': Command('提醒', '提醒 test_acc > 0.9：到了就说', more=' test_acc > 0.9'),
    'restart': Command('重启', '卡住了，就重新启动训练的进程'),
    'params': Command('参数', '看 lr、ti、bs 三个值'),
    'report': Command('报告', '几轮报告一次，0 只说要紧的', ' 5'),
    'quiet': Command('安静', '就是报告 0'),
    'patience': Command('早停', '几轮没有更好就结束，0 不早停', ' 5'),
    'cancel': Command('取消', '不执行训练后的命令'),
    'allow': Command('允许', '允许 小波：机主让好友小波也能下命令'),
    'help': Command('帮助', ''),
}
GROUPS = {  # of the help
    '训练': ('start', 'queue', 'stop', 'resume', 'rollback', 'restart'),
    '查看': ('status', 'plot', 'mistakes', 'runs', 'compare', 'log', 'params', 'programs'),
    '打扰多少': ('report', 'quiet', 'remind', 'patience', 'cancel', 'allow'),
}
HELP = '\n'.join(
    [
        '\n'.join([f'【{group}】', *(COMMANDS[word].help_line() for word in words)])
        for group, words in GROUPS.items()
    ]
    + ['【设值】', 'lr 0.1：学习率，也可以 lr x0.5、lr /2', 'ti 5：训练几轮', 'bs 128：每批几张']
)

own_params = {}  # what the running script lets set besides: name -> kind, smallest, largest, default


def help_text() -> str:
    """Return what 帮助 says."""
    own = [f'{name} {default}：训练函数自己的值' for name, (*_, default) in own_params.items()]
    return '\n'.join([HELP, *own])


def limits_of(name: str) -> tuple:
    """Return type, smallest, largest, and what to write in Chinese."""
    if name in LIMITS:
        return LIMITS[name]
    kind, smallest, largest, default = own_params[name]
    what = '整数' if kind == 'int' else '数'
    between = [f'不小于 {smallest}'] * (smallest > -math.inf) + [f'不大于 {largest}'] * (largest < math.inf)
    limits = '、'.join(between) + ' 的' * bool(between)
    return (
        (int if kind == 'int' else float),
        smallest,
        largest,
        f'{name} 要是{limits}{what}，例如 {name} {default}',
    )


LIMITS = {  # type, smallest, largest, what to write in Chinese
    'learning_rate': (float, 1e-9, 100, '学习率要大于 0、不超过 100，例如 lr 0.1'),
    'training_iters': (int, 1, 100000, '轮数要是 1 到 100000 的整数，例如 ti 5'),
    'batch_size': (int, 1, 10000, '批量要是 1 到 10000 的整数，例如 bs 128'),
}


def read_value(name: str, text: str, now: float = 0) -> Any:
    """Return the number that `text` writes for the parameter `name`; ValueError says what is allowed.

    A learning rate may be relative to the one `now`: x0.5, *0.5, /2.
    """
    kind, smallest, largest, allowed = limits_of(name)
    number = r'[+-]?\d{1,20}' if kind is int else r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?'
    relative = name == 'learning_rate' and text[:1] in ('x', '*', '/')
    sign, rest = (text[:1], text[1:]) if relative else ('', text)
    if re.fullmatch(number, rest):
        value = kind(rest)
        if sign:
            value = float(f'{now / (value or math.inf) if sign == "/" else now * value:.6g}')
        if smallest <= value <= largest:
            return value
    raise ValueError(f'{text[:20]} 不行：{allowed}')


NAMES = {  # how a person writes the three values; their short names come first
    **{'lr': 'learning_rate', 'ti': 'training_iters', 'bs': 'batch_size'},
    **{'学习率': 'learning_rate', '轮数': 'training_iters', '批量': 'batch_size'},
    **{name: name for name in LIMITS},
}
WORDS = {spelling: word for word, command in COMMANDS.items() for spelling in (word, command.chinese)}
IN_PHRASES = {*COMMANDS, 'ti', 'bs'}  # letters behind one of these are no value: stop it, ti amo, bs artist

LONGEST, MOST_LINES, QUOTING = 200, 20, 20000  # characters that count, lines, characters with what is quoted
DASHES = re.compile(r'(?m)^[^\S\n]*(?:[-–—─][^\S\n]*){3,}$')  # between what a reply quotes and the reply
MENTION = re.compile(r'\A\s*[@＠](?:[^\u2005\n]*\u2005|\S+\s)')  # WeChat puts U+2005 behind the name
ENDS = '.!?~,;:"\'。、⋯〜·•・–—―─′'  # beside brackets, quotation marks and emoji, which have categories
PLAIN = str.maketrans(
    '開繼續狀態線綫錯圖記紀錄誌參數報靜幫學習輪啟啓訓練暫終進結復隊對測試損‐‑‒–—―−⁄×÷',
    '开继续状态线线错图记记录志参数报静帮学习轮启启训练暂终进结复队对测试损-------/x/',
)

BETWEEN = r'[\s=:,;、。]'
NAME = '|'.join(NAMES)
PAIR = re.compile(  # 学习率 lr = 0.1, lr0.1, lr x 0.5
    rf'(?:({NAME})\s*(?={NAME}))?({NAME})(?:({BETWEEN}+)|(?=(?:[x*/]\s*)?\.?\d))'
    rf'((?:[x*/]\s*)?[^\s=:,;、。]+){BETWEEN}*'
)
OWN_PAIR = re.compile(rf'([a-z][a-z_0-9]*)(?:{BETWEEN}+|(?=-))([+-]?\.?\d[\d.e+-]*){BETWEEN}*')  # wd 0.001
COMMA = re.compile(r'((?:lr|learning_rate|学习率)[\s=:]*[x*/]?\s*\d+),(\d+)(?![\d.])')  # lr 0,1
BEGINNING = re.compile(rf'({"|".join(sorted([*WORDS, *NAMES], key=len)[::-1])})(?!(?<=[a-z_])[a-z_])(.*)')
NEARLY = {  # how else people say a command: it is answered, not obeyed
    'start': '(?:开始|启动|重新|重新开始)训练[吧了]?|starttraining',
    'stop': '停|停下|停下来|暂停|中止|终止|(?:停止?|暂停|中止|终止|结束)训练[吧了]?|stoptraining|pause',
    'resume': '(?:继续|恢复|接着)训练[吧了]?|resumetraining',
    'restart': '重启(?:训练|程序|进程)[吧了]?',
    'status': '(?:状态|进度)(?:怎么样|怎样|如何)了?|进度',
}
NUMBER_LIKE = re.compile(
    r'→|->|[x*/+.-]*\d(?:[!-~]|[^\w\s])*|[+-]?(?:nan|inf|infinity)|[零半一二两三四五六七八九十百千]+'
)


MEASURES = {'测试精度': 'test_acc', '精度': 'test_acc', '训练精度': 'train_acc', '损失': 'loss'}
SIGNS = {'>': operator.gt, '<': operator.lt, '>=': operator.ge, '<=': operator.le}
SIGNS_IN_WORDS = {'≥': '>=', '≤': '<=', **dict.fromkeys(['大于', '超过', '高于'], '>')}
SIGNS_IN_WORDS.update(dict.fromkeys(['小于', '低于'], '<'))
SIGN = '|'.join(['[<>]=?', *SIGNS_IN_WORDS])
RULE = re.compile(rf'([^\s<>=]{{1,20}}?)\s*({SIGN})\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)', re.I)
# What follows 开始 is a name and no small talk: it is no verb of two characters and ends as no sentence does.
RUN_NAME = re.compile(r'\s((?=.*[\u4e00-\u9fff])[\w.+-]{2,11}(?![了吗吧啦呢呀啊嘛哦么])[\w+])')


class Said(NamedTuple):
    """One command: a word of COMMANDS and its number, or 'set' and its values, and the line it was."""

    word: str  # '' in understand(): almost a command
    number: Optional[int]
    values: list  # (name, text), for read_value(); of 'allow', who
    text: str
    more: Any = None  # what read_more() has read behind the word


class Parsed(NamedTuple):
    """What a message is: commands, then perhaps a line that is almost one. False when it is small talk."""

    commands: list
    almost: str

    def __bool__(self) -> bool:
        return bool(self.commands or self.almost)

    @property
    def complete(self) -> bool:
        """Is every command of it valid? Relative learning rates are tried on 1. A name may be small talk."""
        try:
            for said in self.commands:
                for name, text in said.values if said.word == 'set' else ():
                    read_value(name, text, 1)
        except ValueError:
            return False
        named = any(said.word == 'start' and said.more for said in self.commands)
        return bool(self.commands) and not self.almost and not named


def parse(text: str) -> Parsed:
    """Read a message, line by line; a line of small talk makes all of it small talk, but for values.

    >>> [(said.word, said.number, said.values) for said in parse('“ＬＲ：０。１，ti 5”\\n報告 3！').commands]
    [('set', None, [('learning_rate', '0.1'), ('training_iters', '5')]), ('report', 3, [])]
    >>> parse('开始\\n报告 x\\n停止').almost, parse('开始\\n吃饭')
    ('报告 x', Parsed(commands=[], almost=''))
    """
    lines = lines_of(text)
    heard = [understand(line) for line in lines]
    if None in heard and not any(said and said.word == 'set' for said in heard):
        return Parsed([], '')
    commands = list(itertools.takewhile(lambda said: said and said.word, heard))
    return Parsed(commands, ''.join(lines[len(commands) :][:1]))


ALL = '全部'  # the name that stands for all programs


def share_out(text: str, names: Iterable) -> tuple:
    """Read a message as parse() does, and give each program, by its name, the lines that are for it.

    '' stands for the program that was spoken to last, None for the one with the login. A name holds until the
    next one. From a line on that is almost a command nothing is given to anybody.

    >>> share_out('@甲 lr x0.5\\n开始\\n全部 停止', ['甲'])[1], share_out('甲 今天吃什么', ['甲'])[1]
    ({'甲': 'lr x0.5\\n开始', '全部': '停止'}, {})
    """
    if not names:
        return parse(text), {'': text}
    names = sorted({ALL, *names}, key=len, reverse=True)
    pattern = '|'.join(map(re.escape, names))
    named = re.compile(rf'@?\s*({pattern})["\'”’」』]?(?:(?:[\s:,、]+|(?<={ALL}))(.*)|$)', re.I)
    pairs, to, parts = [], '', {}
    for line in lines_of(text, named):
        said, found = understand(line), named.fullmatch(line)
        if found and not (said and said.word) and (not found[2] or understand(found[2])):
            to = next(name for name in names if re.fullmatch(re.escape(name), found[1], re.I))
            line = found[2]
            said = line and understand(line)
        if line:
            pairs.append((None if said and said.word in ('programs', 'allow') else to, line))
    parsed = parse('\n'.join(line for _, line in pairs))
    for to, line in pairs[: len(parsed.commands) + bool(parsed.almost)]:
        parts[to] = f'{parts[to]}\n{line}' if to in parts else line
    return parsed, parts


def tidy(name: str) -> str:
    """Return a program's name, 40 bytes at most, as it can be written in a message: letters, digits, '_.-'.

    >>> tidy(' [实验] run#1 😻')
    '实验 run 1'
    """
    name = re.sub(r'[^\w.-]+', ' ', unicodedata.normalize('NFKC', name)).strip(' .-')
    return name.encode('utf-8', 'ignore')[:40].decode('utf-8', 'ignore').strip(' .-') or '程序'


def lines_of(text: str, named: Optional[re.Pattern] = None) -> list:
    """Return the lines that count, without what phones add; none when there is too much of it.

    `named` matches a line that begins with the name of a program: that is no mention of somebody.

    >>> lines_of('「A：停止」<br/>- - - - - -<br/>@小号\\u2005“开始”🚀\\n\\u200blr\\n0.1。')
    ['开始', 'lr 0.1']
    """
    if len(text) > QUOTING:
        return []
    text = '\n'.join(text.replace('<br/>', '\n').splitlines())  # also U+2028, which phones paste
    if '「' in text:
        text = DASHES.split(text)[-1]  # the last: what is quoted may quote
    if len(text) > LONGEST:
        return []
    text = ''.join(c for c in text if unicodedata.category(c) not in ('Cf', 'Mn', 'Me'))  # nothing to see
    if not (named and named.match(unicodedata.normalize('NFKC', text).strip())):
        text = MENTION.sub('', text)
    text = re.sub('[⁰¹²³⁴-⁹⁻]+', r'^\g<0>', text)  # or 10⁻³ would be 10-3, and 2⁷ 27
    text = unicodedata.normalize('NFKC', text)  # full-width to ASCII
    name = rf'(?!{named.pattern})' if named else ''
    # A number belongs to the line above.
    text = re.sub(rf'(?i)\n[\s=:,;、]*{name}(?=[x*/×÷+−-]?[.。]?\d)', ' ', text)
    text = re.sub(r'(?<=[^\W_])\s*(?:\[[^]\[\s\d]{1,10}\])+(?=\n|\Z)', '', text)  # [强]: WeChat's own emoji
    lines = [line for line in map(strip_ends, text.split('\n')) if line]
    return lines if len(lines) <= MOST_LINES else []


def strip_ends(line: str) -> str:
    """Return a line without the quotation marks, the punctuation and the emoji around it.

    >>> strip_ends('👍🏻「lr 5%」...!')
    'lr 5%'
    """
    return line.strip(''.join(filter(decorates, line)))


def decorates(c: str) -> bool:
    """Return whether a character at an end of a line means nothing."""
    category = unicodedata.category(c)
    return c.isspace() or c in ENDS or category in ('So', 'Sk', 'Pi', 'Pf', 'Ps', 'Pe') and c not in '^`'


def understand(line: str) -> Optional[Said]:
    """Return the command in a line; without a word when it is almost one, None when it is small talk."""
    key = key_of(line)
    values = read_pairs(key)
    if values:
        return Said('set', None, values, line)
    named = re.fullmatch(r'(?:允许|允許|allow(?=[\s:]))[\s:]*(\S.{,40})', line)
    if named:
        return Said('allow', None, [named[1]], line)
    found = BEGINNING.fullmatch(key)
    spelling, rest = found.groups() if found else ('', '')
    almost = meant_by(key) or is_several(key) or found and is_attempt(spelling, rest)
    if spelling in WORDS:
        word, command = WORDS[spelling], COMMANDS[WORDS[spelling]]
        number = re.fullmatch(r'[\s=:]*(\d{1,6})', rest)
        if command.number and number:
            return Said(word, int(number[1]), [], line)
        if not rest and (not command.number or command.optional):
            return Said(word, None, [], line)
        more = None if word == 'start' and almost else read_more(word, line[len(spelling) :])
        if more is not None:
            return Said(word, None, [], line, more)
    return Said('', None, [], line) if almost else None


def read_more(word: str, rest: str) -> Any:
    """Return what stands behind a word of COMMANDS that takes more than a number; None if that is no command.

    Of 开始 the name of the run, of 停止 全部, of 提醒 清空 or [number's name, sign, number], of 排队 清空 or
    [(name, text)] for each run.

    >>> read_more('remind', ' 测试精度 > 0.9'), read_more('start', ' 小学习率'), read_more('start', ' 吃饭')
    (['test_acc', '>', 0.9], '小学习率', None)
    >>> read_more('queue', ' lr 0.1, 0.05 bs 64')
    [[('learning_rate', '0.1'), ('batch_size', '64')], [('learning_rate', '0.05'), ('batch_size', '64')]]
    """
    key = rest.strip(' :').lower().translate(PLAIN)
    single = {'stop': {'全部': '全部', 'all': '全部'}}.get(word, {'清空': '清空', 'clear': '清空'})
    if word in ('stop', 'queue', 'remind') and key in single:
        return single[key]
    if word == 'start':
        found = RUN_NAME.fullmatch(rest)
        known = found and BEGINNING.fullmatch(key_of(found[1]))
        return found[1] if found and not (known and known[1] in WORDS) else None
    if word == 'remind' and (found := RULE.fullmatch(rest.strip(' :'))):
        name, sign, number = found.groups()
        name = name.translate(PLAIN)
        return [MEASURES.get(name, name), SIGNS_IN_WORDS.get(sign, sign), float(number)]
    return read_queue(key) if word == 'queue' else None


def read_queue(key: str) -> Optional[list]:
    """Return [(name, text)] for each run that is to wait: every combination of the values."""
    key = re.sub(rf'(?<![a-z_])({NAME})(?=[.\d])', r'\1 ', re.sub(r'。(?=\d)', '.', key))
    lists = {}
    for part in re.split(f'{BETWEEN}+', key):
        name = NAMES.get(part, part if part in own_params else None)
        if name:
            values = lists.setdefault(name, [])
        elif not lists or not NUMBER_LIKE.fullmatch(part):
            return None
        else:
            values.append(part)
    if not lists or not all(lists.values()):
        return None
    combinations = itertools.islice(itertools.product(*lists.values()), Queue.MOST + 1)
    return [list(zip(lists, values)) for values in combinations]


def key_of(line: str) -> str:
    """Return a line as it is compared."""
    return COMMA.sub(r'\1.\2', re.sub(r'。(?=\d)', '.', line.lower().translate(PLAIN)))


def meant_by(key: str) -> str:
    """Return the command that a line says in other words, or ''."""
    return next((word for word, ways in NEARLY.items() if re.fullmatch(ways, key.replace(' ', ''))), '')


def is_several(key: str) -> bool:
    """Return whether a line is nothing but commands, with values or in Chinese: lines that became one.

    >>> is_several('lr 0.1 开始'), is_several('开始，停止'), is_several('stop help'), is_several('开始 吃饭')
    (True, True, False, False)
    """
    key = re.sub(r'(?<=\d)(?=[^\x00-\x7f])|(?<=[^\x00-\x7f])(?=[a-z])', ' ', key)
    parts = [part for part in re.split(f'(?:{BETWEEN}|，)+', key) if part]
    words, others = [part for part in parts if part in WORDS], [part for part in parts if part not in WORDS]
    numbers = words[1:] and not parts[0].isascii() and all(map(NUMBER_LIKE.fullmatch, others))
    return bool(words and (numbers or read_pairs(' '.join(others))))


def as_shown(name: str, friends: Iterable) -> str:
    """Return the name that a friend is shown by, if there is one that reads as `name` behind 允许.

    Of the name's own emoji, brackets and full stops a command would lose those at its end.
    """
    for friend in friends:
        shown = friend.get('RemarkName') or friend.get('NickName') or ''
        if [said.values for said in parse(f'允许 {shown}').commands] == [[name]]:
            return shown
    return name


def explain(line: str) -> str:
    """Return what is wrong with a line that is almost a command, and an example.

    >>> explain('报告')
    '“报告”没看懂，没有执行：“报告”后面要有一个数，例如 报告 5。'
    """
    key, how = key_of(line), ''
    if meant := meant_by(key):
        how = f'要{COMMANDS[meant].chinese}就只发“{COMMANDS[meant].chinese}”'
    elif is_several(key):
        how = '一行只写一个命令，例如第一行 lr 0.1，第二行 开始'
    elif (spelling := (BEGINNING.fullmatch(key) or [''] * 2)[1]) in NAMES:
        how = '例如 ' + LIMITS[NAMES[spelling]][3].split('例如 ')[1]
    elif spelling not in WORDS:  # beside values
        how = '一行写一个命令，“帮助”列出全部命令'
    elif (command := COMMANDS[WORDS[spelling]]).more:
        how = f'“{command.chinese}”后面什么也不写，或者像这样：例如 {command.chinese}{command.more}'
        how += '（名字要三到十二个字，有汉字）' * (command.chinese == '开始')
    else:
        example = f'一个数，例如 {command.chinese}{command.number}'
        if command.number and not command.optional:
            how = f'“{command.chinese}”后面要有{example}'
        else:
            how = f'“{command.chinese}”后面什么也不写' + (f'，或写{example}' if command.number else '')
    return f'“{line[:20]}”没看懂，没有执行：{how}。'


def read_pairs(key: str) -> list:
    """Return [(name, text)] when a line is nothing but values to set, else []. The texts may be wrong ones.

    >>> read_pairs('学习率 lr = 0.05, ti3'), read_pairs('lr abc'), read_pairs('ti amo')
    ([('learning_rate', '0.05'), ('training_iters', '3')], [('learning_rate', 'abc')], [])
    """
    pairs, at = [], 0
    while at < len(key):
        found = PAIR.match(key, at)
        own = OWN_PAIR.match(key, at)
        if own and own[1] in own_params:
            pairs.append((own[1], own[2]))
            at = own.end()
            continue
        if not found:
            return []
        first, name, between, text = found.groups()
        is_value = name not in IN_PHRASES or '=' in (between or '') or NUMBER_LIKE.fullmatch(text)
        if NAMES[first or name] != NAMES[name] or not text.isascii() or not is_value:
            return []
        pairs.append((NAMES[name], re.sub(r'\s', '', text)))
        at = found.end()
    return pairs


def is_attempt(spelling: str, rest: str) -> bool:
    """Return whether what stands behind a word is meant as a number: nothing, numbers, or a lone token.

    >>> is_attempt('报告', ''), is_attempt('早停', ' 5轮'), is_attempt('开始', ' abc')
    (True, True, True)
    >>> is_attempt('stop', ' it'), is_attempt('开始', '吃饭')
    (False, False)
    """
    rest = re.sub(r'(?<=\d)\s*[轮次张个]$|^\s*(?:[改调设降升换变减][成为到至]|为|→|->)(?=\s*[\d.])', '', rest)
    parts = [part for part in re.split(f'{BETWEEN}+', rest) if part]
    names = NAMES if spelling in NAMES else ()
    usual = {'remind': f'.*[<>≥≤]|{"|".join(MEASURES)}|[a-z_]*acc|loss', 'queue': f'({NAME})(?![a-z_])'}
    if re.match(rf'[\s:]*({usual.get(WORDS.get(spelling), "$^")})', rest):
        return rest.isascii() or bool(re.search(r'[\d<>≥≤]', rest))
    numbers = all(NUMBER_LIKE.fullmatch(part) or part in names for part in parts)
    lone = len(parts) == 1 and parts[0].isascii() and not rest.startswith(parts[0])
    lone = lone and (spelling not in IN_PHRASES or '=' in rest)
    return len(rest) <= 12 and (numbers or lone)


def manner_text(report_every: int, patience: int) -> str:
    """Return what was said of reports and of the end, as it is written, where it is not what is usual."""
    return '\n'.join([f'报告 {report_every}'] * (report_every != 1) + [f'早停 {patience}'] * (patience != 0))


def values_text(lr: float, ti: int, bs: int, own: Optional[dict] = None) -> str:
    """Return the three values in words, and those of the training function's own."""
    more = ''.join(f'\n{name} = {value}' for name, value in (own or {}).items())
    return f'学习率 lr = {lr:g}\n轮数 ti = {ti}\n批量 bs = {bs}{more}'


# ------------------------------------------------------------------------------------- outgoing mail


LASTS = {  # seconds in which a letter of a kind is worth sending; all others are for ever
    'notice': 600,  # how things stand: later only the last one is sent, and says from when it is
    'picture': 3600,  # later a line of text that says where it lies
}


class Letter(NamedTuple):
    """What is to be sent to somebody: a text, the report after an epoch, a notice, the path of a picture.

    Of reports that have had to wait, `test_acc` says which is the best.
    """

    content: str
    kind: str = 'text'  # 'report', 'notice', 'picture'
    test_acc: float = 0.0
    key: int = 0  # in the memory
    until: float = math.inf  # when it is no longer worth sending, by time.time(): see LASTS

    def pieces(self, longest: int) -> list:
        """Return letters of at most so many bytes that say the same, cut at line ends, and numbered.

        >>> [piece.content for piece in Letter('a\\nb\\n' + 'c' * 22).pieces(25)]
        ['（1/3）\\na\\nb', '（2/3）\\nccccccccccc', '（3/3）\\nccccccccccc']
        """
        if self.kind == 'picture' or size(self.content) <= longest:
            return [self]
        room, parts = longest - len('（100/100）\n'.encode()), ['']
        for line in self.content.split('\n'):
            while size(line) > room:  # a line that is too long by itself
                start = line.encode()[:room].decode('utf-8', 'ignore')
                parts, line = [*parts, start], line[len(start) :]
            if size(parts[-1]) + 1 + size(line) > room:
                parts.append(line)
            else:
                parts[-1] += '\n' * bool(parts[-1]) + line
        parts = [part for part in parts if part]
        return [self._replace(content=f'（{i}/{len(parts)}）\n{x}') for i, x in enumerate(parts, 1)]

    def is_stale(self) -> bool:
        """Return whether it is no longer worth sending as it is."""
        return self.until < time.time()

    def text(self) -> str:
        """Return what can be sent, or written down, in any case."""
        if self.kind == 'picture':
            return f'图片没有传上去，在 {shown(self.content)}'
        when = f'{local_time(self.until - LASTS[self.kind])}：' if self.is_stale() else ''
        return when + self.content


class Outbox:
    """What is to be sent to one person, texts or pictures, in order. Part of Mail, and guarded as it is."""

    def __init__(self):
        self.letters = collections.deque()
        self.tries = 0  # failed so far, of the first letter
        self.since = 0.0  # when the first of these was, by time.monotonic()
        self.due = 0  # when to try again, likewise
        self.late = False  # has something had to wait? Then it is merged
        self.reported = -math.inf  # when the last report was sent, by time.monotonic()


class Mail:
    """The mail: two outboxes for each person, texts and pictures; a thread empties all of a kind, for ever.

    Every thread puts letters in. `changed` guards everything, and is told of every change; while it is held
    nothing is sent. What is in the outboxes is in the memory as well.
    """

    SCREENFUL, LONGEST = 4, 2000  # reports in a message; bytes in one: WeChat is said to take 2,048
    PACE = 2  # seconds between reports to one person, where several programs share the account's limits

    def __init__(self):
        self.changed = threading.Condition(threading.RLock())
        self.outboxes = {}  # (Person, is it for pictures?) -> Outbox
        self.online = False  # is there a session to send in?
        self.pace = 0  # seconds between this program's reports to one person

    def begin(self) -> None:
        """Take up what an earlier program has not sent, and begin to send."""
        for person, *letter, until in memory.rows(
            'SELECT person, content, kind, test_acc, key, until FROM letter ORDER BY key'
        ):
            person = people.by_key.get(person, OWNER)
            self.add(person, Letter(*letter, until or math.inf)).late = True
        for pictures in (False, True):
            threading.Thread(target=self.deliver, args=(pictures,), name='mail', daemon=True).start()

    def put(self, *pairs: tuple, also: Iterable = ()) -> list:
        """Queue (person, letter or text) pairs; return their keys at once. What else is to be remembered of
        what has happened, statements for the memory, is so together with them or not at all."""
        pairs = [(person, x if isinstance(x, Letter) else Letter(x)) for person, x in pairs]
        pairs = [(person, x) for person, x in pairs if x.content.strip()]  # WeChat takes no empty text
        pairs = [(person, piece) for person, x in pairs for piece in x.pieces(self.LONGEST)]
        now = time.time()
        pairs = [(p, x._replace(until=now + LASTS[x.kind]) if x.kind in LASTS else x) for p, x in pairs]
        with self.changed:
            sql = 'INSERT INTO letter (person, kind, content, test_acc, until) VALUES (?, ?, ?, ?, ?)'
            rows = [(sql, p.key, x.kind, printable(x.content), x.test_acc, x.until) for p, x in pairs]
            keys = memory.write(*rows, *also)
            for key, (person, letter) in zip(keys, pairs):
                self.add(person, letter._replace(key=key))
            self.changed.notify_all()
            return keys[: len(pairs)]

    def add(self, person: Person, letter: Letter) -> Outbox:
        """Put a letter that is in the memory into its outbox, and return that. Needs `changed`."""
        outbox = self.outboxes.setdefault((person, letter.kind == 'picture'), Outbox())
        outbox.letters.append(letter)
        return outbox

    def set_online(self, online: bool) -> None:
        """Note that a session has begun or ended. What was refused in the old one is tried in the new one."""
        with self.changed:
            self.online = online
            for outbox in self.outboxes.values():
                outbox.due = 0
                outbox.late |= not online and bool(outbox.letters)
            self.changed.notify_all()

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait until everything is sent; return False when it was not in `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.unsent(), timeout)

    def is_stuck(self, person: Person, keys: Iterable) -> bool:
        """Return whether nothing gets through to a person, one of the letters with these keys among it."""
        with self.changed:
            outbox = self.outboxes.get((person, False), Outbox())
            stuck = outbox.tries > 0 or not self.online
            return stuck and any(letter.key in keys for letter in outbox.letters)

    def unsent(self) -> int:
        """Return how many letters wait. Needs `changed`, or to be content with about."""
        return sum(len(outbox.letters) for outbox in list(self.outboxes.values()))

    def forget(self) -> None:
        """Write down what was for others than the owner: they are not known any more."""
        with self.changed:
            for (person, _), outbox in self.outboxes.items():
                if person is not OWNER and outbox.letters:
                    for letter in outbox.letters:
                        write_undelivered(person, letter.text(), '换了登录')
                    self.remove(outbox, [letter.key for letter in outbox.letters])

    def deliver(self, pictures: bool) -> None:
        """Send what is in the outboxes for pictures, or for texts: the work of one of the mail's threads."""
        while True:
            with self.changed:
                person, outbox = self.next_outbox(pictures)
                if pictures and outbox.letters[0].is_stale():
                    self.describe_picture(person, outbox)
                    continue
                letter, count = self.next_letter(outbox)
                keys = [each.key for each in itertools.islice(outbox.letters, count)]
            problem, number = self.send(person, letter)
            with self.changed:
                if not problem:
                    self.remove(outbox, keys, number)
                elif not outbox.letters or outbox.letters[0].key != keys[0]:
                    continue  # it was put aside meanwhile: see forget()
                else:
                    self.note_failure(outbox)
                    if pictures and outbox.tries > 2 and problem not in PASSING:
                        self.describe_picture(person, outbox)
                self.changed.notify_all()
            if problem:
                itchat.instance.log(f'还没有发给 {visible(person.name)}（{problem}），会再试。')
                if not pictures and problem not in PASSING:
                    self.give_up(person, outbox, keys[0], problem)

    def note_failure(self, outbox: Outbox) -> None:
        """The first letter has not gone: try it again later. Needs `changed`."""
        now = time.monotonic()
        outbox.since = outbox.since if outbox.tries else now
        outbox.tries, outbox.late = outbox.tries + 1, True
        outbox.due = now + min(options.retry * 2 ** (outbox.tries - 1), 60)

    def remove(self, outbox: Outbox, keys: list, number: str = '') -> list:
        """Letters of an outbox are done with, if they are still there; return them. Needs `changed`.

        The `number` of the message that they were is kept: from 文件传输助手 it comes back, perhaps to the
        next program.
        """
        sent = [letter for letter in outbox.letters if letter.key in keys]
        outbox.letters = collections.deque(letter for letter in outbox.letters if letter.key not in keys)
        if any(letter.kind == 'report' for letter in sent):
            outbox.reported = time.monotonic()
        statements = [('DELETE FROM letter WHERE key = ?', letter.key) for letter in sent]
        if number:
            statements.append(note_message(number))
        memory.write(*statements)
        outbox.tries, outbox.late = 0, outbox.late and bool(outbox.letters)
        return sent

    def next_outbox(self, pictures: bool) -> tuple:
        """Wait for an outbox from which something can be sent; return its person and it. Needs `changed`."""
        while True:
            boxes = [(p, o) for (p, kind), o in self.outboxes.items() if kind == pictures and o.letters]
            person, outbox = min(boxes, key=lambda pair: self.due(pair[1]), default=(None, None))
            now = time.monotonic()
            if self.online and person is not None and self.due(outbox) <= now:
                outbox.due = now  # those who wait longer come first
                return person, outbox
            for _, each in boxes:
                each.late |= not self.online
            self.changed.wait(self.due(outbox) - now if self.online and person is not None else None)

    def due(self, outbox: Outbox) -> float:
        """Return when something may be sent from an outbox: reports alone keep the pace. Needs `changed`."""
        paced = outbox.reported + self.pace
        if paced <= outbox.due or any(letter.kind != 'report' for letter in outbox.letters):
            return outbox.due
        outbox.late |= paced > time.monotonic()
        return paced

    def send(self, person: Person, letter: Letter) -> tuple:
        """Send a letter; return why it did not go, '' when it did, and the number of what comes back of it.

        No exception of a letter ends the thread. Of one only the type is told: what it says may hold the
        session's secrets.
        """
        try:
            problem, number = send(person, letter)
        except Exception as error:  # the network; a bug of ours, of itchat's, an answer nobody has thought of
            return type(error).__name__, ''
        if not problem:
            itchat.instance.log(f'已发送给 {visible(person.name)}：{letter.content}')
        return problem, number if person is OWNER else ''

    def describe_picture(self, person: Person, outbox: Outbox) -> None:
        """Put a text in the place of a picture that does not go, once in a row. Needs `changed`."""
        letter, texts = outbox.letters[0], self.outboxes.get((person, False), Outbox())
        if not texts.letters or texts.letters[-1].content != letter.text():
            self.put((person, letter.text()))
        self.remove(outbox, [letter.key])
        self.changed.notify_all()

    def give_up(self, person: Person, outbox: Outbox, key: int, problem: str) -> None:
        """Write a text down that was refused five times over ten minutes, if a note of that is not refused:
        then it is the text's own fault, and what is behind it must not wait for ever."""
        enough = outbox.tries >= 5 and time.monotonic() - outbox.since >= options.give_up
        note = f'有一条消息微信不收（{problem}），写进了 undelivered.txt。'
        if enough and not self.send(person, Letter(note))[0]:
            with self.changed:
                removed = self.remove(outbox, [key])
                self.changed.notify_all()
            for letter in removed:
                write_undelivered(person, letter.text(), problem)

    def next_letter(self, outbox: Outbox) -> tuple:
        """Return what is to be sent next from an outbox, and how many letters that is. Needs `changed`.

        What was refused twice as one is sent singly: it may be the fault of one.
        """
        if outbox.late and outbox.letters[0].kind != 'picture' and outbox.tries < 3:
            text, count = self.merge(outbox.letters)
            return Letter(text), count
        letter = outbox.letters[0]
        return letter if letter.kind == 'picture' else letter._replace(content=letter.text()), 1

    def merge(self, letters: Iterable) -> tuple:
        """Return one text for the texts at the head of `letters`, and how many they are.

        When there are more reports than a screenful, the first, the best and the last are in it; of notices
        that are too old, the last.
        """
        texts = list(itertools.takewhile(lambda letter: letter.kind != 'picture', letters))
        reports = [letter for letter in texts if letter.kind == 'report']
        stale = [letter.key for letter in texts if letter.is_stale()][:-1]
        kept = reports
        if len(reports) > self.SCREENFUL:
            kept = [reports[0], max(reports, key=lambda report: report.test_acc), reports[-1]]
        merged, left_out, count = [], 0, 0
        for number, letter in enumerate(texts, 1):
            if letter.kind == 'report' and not any(letter is other for other in kept):
                left_out += 1
            elif letter.key not in stale:
                note = [f'（略去 {left_out} 份报告，都在 log.csv 里）'] if left_out else []
                content = letter.text()
                if merged and sum(size(x) + 2 for x in (*merged, *note, content)) > self.LONGEST:
                    break
                merged, left_out, count = [*merged, *note, content], 0, number
        return '\n\n'.join(merged), count


PASSING = [f'Ret {code}' for code in (-1, 1205, 1100, 1101, 1102)]  # not the message's own fault


def size(text: str) -> int:
    """Return how many bytes a text is when it is sent."""
    return len(text.encode('utf-8', 'backslashreplace'))


def printable(text: str) -> str:
    """Return a text that UTF-8 can write: a file's name may hold what it cannot."""
    return text.encode('utf-8', 'backslashreplace').decode()


def send(person: Person, letter: Letter) -> tuple:
    """Send a text or a picture through the client; return why it did not go ('') and its number."""
    to = people.address(person)
    if to is None:
        return '好友里找不到这个人', ''
    if letter.kind == 'picture':
        answer = pass_on(programs.signature(), to, path=letter.content)
    else:
        answer = pass_on(programs.signature(), to, printable(letter.content))
    problem = '' if answer else f'Ret {answer["BaseResponse"].get("Ret")}'
    return problem, str(answer.get('MsgID') or '')


def pass_on(name: str, to: str, text: str = '', path: str = '') -> dict:
    """Have the client send a text, or a picture, of the program with this name, if it needs one."""
    sign = f'[{name}] ' if name else ''
    if not path:
        return itchat.instance.send_msg(sign + text, to)
    if sign:
        itchat.instance.send_msg(f'{sign}图片：', to)
    return itchat.instance.send_image(path, to)


def printed_letter(letter: Any) -> str:
    """Return what stands in the terminal for a letter or a text."""
    letter = letter if isinstance(letter, Letter) else Letter(letter)
    return f'图片：{shown(letter.content)}' if letter.kind == 'picture' else letter.content


def write_undelivered(person: Person, text: str, why: str) -> None:
    """Put what nobody would take into the run's folder."""
    say(f'没有发给 {visible(person.name)}（{why}）：{text}')
    with contextlib.suppress(OSError):
        folder = trainer.run.get('folder') or make_run_folder()
        with open(os.path.join(folder, 'undelivered.txt'), 'a', encoding='utf-8') as f:
            f.write(f'{time.strftime("%F %T")} {printable(person.name)}（{why}）\n{printable(text)}\n\n')


# ------------------------------------------------------------------------------------------- clients


class Client:
    """What carries the words. The interface is itchat's: whatever is not written here or in a class derived
    from this raises NotImplementedError, and a carrier must write the four methods that do.

    The main thread of the talking process calls it; the mail's thread calls send_msg(), send_image() and
    log(), too.
    """

    def __init__(self):
        self.exit_signal = None  # Ctrl-C, SIGTERM or SIGHUP, once it has come
        self.signal_came = 0.0  # when, by time.monotonic()
        self.hears_terminal = False  # is what is typed beside the chat taken in?
        self.interruptible = False  # is the main thread waiting for something that a signal may cut off?
        self.folder_lock = None

    # -- what a carrier is

    def auto_login(self, hotReload: bool = False, statusStorageDir: Optional[str] = None, **callbacks):
        """Call begin(), then get ready to carry words; end the program with one line if that cannot be."""
        raise NotImplementedError

    def run(self) -> None:
        """Hand what comes to trainer.take() until the end, then call end()."""
        raise NotImplementedError

    def send_msg(self, msg: str = '', toUserName: Optional[str] = None) -> dict:
        """Send a text; return what is true if it went, as itchat's ReturnValue."""
        raise NotImplementedError

    def send_image(self, fileDir: Optional[str] = None, toUserName: Optional[str] = None, *args) -> dict:
        """Send a picture, likewise."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or not hasattr(itchat.Core, name):
            raise AttributeError(name)
        raise NotImplementedError(f'{type(self).__name__}.{name}')

    def send(self, msg: str = '', toUserName: Optional[str] = None, *args) -> dict:
        """Send a text, or a picture by the path behind @img@."""
        if msg.startswith('@img@'):
            return self.send_image(msg[len('@img@') :], toUserName)
        return self.send_msg(msg, toUserName)

    def get_friends(self, *args, **kwargs) -> list:
        """Return nobody: there are no contacts."""
        return []

    get_chatrooms = get_mps = search_friends = search_chatrooms = search_mps = get_friends

    def log(self, text: str) -> None:
        """Print what goes through the chat."""
        say(text)

    def typed_lines(self, ctrl_d_ends: bool) -> queue.Queue:
        """Return where the lines arrive that are typed from now on, at a prompt if possible, then None."""
        lines = queue.Queue(1000)
        if not (printer and printer.ask(lines.put, ctrl_d_ends)):
            threading.Thread(target=read_lines, args=(lines.put,), name='typed', daemon=True).start()
        return lines

    def take_line(self, line: str, **how: Any) -> str:
        """Take in a line that was typed, as the owner's message; return its number."""
        number, owner = f'typed {time.time_ns()}', {'UserName': 'filehelper'}
        msg = {'Type': itchat.content.TEXT, 'Text': line, 'User': owner, 'MsgId': number, **how}
        taken = trainer.take({**msg, 'FromUserName': 'filehelper', 'ToUserName': 'filehelper'})
        if not taken and line.strip() and trainer.told.get('commands'):
            print_line('没有这个命令，“帮助”列出全部命令。\n')
        return number

    def hear_terminal(self) -> None:
        """Take in what is typed beside a chat from now on."""
        # Else the terminal is that of an interpreter or a debugger, or is heard already.
        if printer and os.isatty(0) and not self.hears_terminal:
            self.hears_terminal, lines = True, self.typed_lines(ctrl_d_ends=False)
            threading.Thread(target=self.obey_typed, args=(lines,), name='typed', daemon=True).start()

    def obey_typed(self, lines: queue.Queue) -> None:
        """Take in what is typed beside a chat: a thread of its own."""
        while (line := lines.get()) is not None:
            try:
                self.take_line(line, Typed=True)
            except Exception:
                print_traceback()

    def keep_session(self) -> None:
        """Keep the session for the next start, with what has been read."""

    def is_old(self, msg: dict) -> bool:
        """Return whether a message was written while the program was down, more than ten minutes ago."""
        return False

    # -- how the program begins and ends

    def begin(self) -> None:
        """Begin the program, once; end it when another one is at work in this folder."""
        if self.folder_lock is not None:
            return
        self.folder_lock = lock_folder(0) or True
        memory.open()
        people.begin()
        self.take_signals()
        mail.begin()
        trainer.begin()
        warn_of_size()

    def take_signals(self) -> None:
        """Let the signals that end the program come to leave()."""
        signal.signal(signal.SIGTERM, self.leave)
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.leave)

    def leave(self, number: int, frame: Any) -> None:
        """The first signal ends the program in order, one that comes a second later or more at once.

        A closing terminal sends two within a millisecond.
        """
        number, now = trainer.signal or number, time.monotonic()
        if self.exit_signal is not None:
            if now - self.signal_came > 1:
                trainer.kill()
                if printer:
                    printer.restore()
                os._exit(128 + number)
            return
        if programs.stays_for_others(number, now - self.signal_came > 1):
            self.signal_came = self.signal_came or now
            return
        self.exit_signal, self.signal_came = number, now
        if self.interruptible:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def waiting(self) -> Iterator:
        """Around what may take long: a signal cuts it off with SystemExit, also one that came before."""
        outside, self.interruptible = self.interruptible, True
        try:
            if self.exit_signal is not None:
                raise SystemExit(128 + self.exit_signal)
            yield
        finally:
            self.interruptible = outside

    def pause(self, failures: int) -> None:
        """Wait longer after every failure."""
        with self.waiting():
            time.sleep(min(options.retry * 2 ** (failures - 1), 60))

    def end(self) -> None:
        """End the program: stop the run if a signal says so, deliver the last words, exit.

        The status is 0; 1 after a crash; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
        """
        if self.exit_signal is not None:
            countdown.cancel()
        trainer.end(stop=self.exit_signal is not None)
        if self.exit_signal is not None:
            mail.wait(5 if mail.online else 0)
        else:
            countdown.wait()
            mail.wait()
        if mail.unsent():
            say(f'还有 {mail.unsent()} 条没有发出去，下次启动时接着发。')
        sys.exit(trainer.status if self.exit_signal is None else 128 + self.exit_signal)


def use_client(client: Any) -> None:
    """Let itchat's functions be those of `client`."""
    itchat.instance = client
    itchat.instanceList[:] = [client]


def warn_of_size(limit: int = 10**9) -> None:
    """Say so when the runs take more than a gigabyte; nothing is deleted by itself."""
    files = glob.glob(os.path.join(glob.escape(RUNS), '**'), recursive=True)
    size = sum(os.path.getsize(path) for path in files if os.path.isfile(path))
    if size > limit:
        say(f'runs/ 有 {size / 1e9:.1f} GB，不要的训练可以自己删掉。')


class Silent(Client):
    """No chat: for one of the --workers that another machine's program leads."""

    def auto_login(self, **how) -> None:
        """Begin."""
        self.begin()

    def run(self) -> None:
        """Wait for the end."""
        with contextlib.suppress(SystemExit), self.waiting():
            trainer.wait_gone()
        self.end()

    def send_msg(self, msg: str = '', toUserName: Optional[str] = None) -> dict:
        """Print a text."""
        say(msg)
        return ReturnValue({'BaseResponse': {'Ret': 0}})

    send_image = send_msg


class Terminal(Client):
    """The terminal in WeChat's place: a line typed is the owner's message, an answer is printed."""

    def auto_login(self, **how) -> None:
        """Begin."""
        self.begin()
        mail.set_online(True)
        say('在这里输入命令，“帮助”列出全部命令，Ctrl-D 结束。')

    def run(self) -> None:
        """Carry out what is typed, until the end of the input or a signal; end the program."""
        with contextlib.suppress(SystemExit), self.waiting():
            lines, typed, empty = self.typed_lines(ctrl_d_ends=True), os.isatty(0), True
            while (line := lines.get()) is not None:
                empty = False
                if not typed:
                    print_line('> ' + line.rstrip())
                self.receive(line)
            if trainer.is_busy() and typed:
                say('训练完就结束；现在就要停，按 Ctrl-C。')
            elif empty and not typed:  # nohup, < /dev/null
                say('输入是空的，没有命令可做，程序结束。不在终端里，可以这样给命令：')
                say("printf 'ti 5\\n开始\\n' | nohup python …… --console &")
            trainer.end(stop=False)
            countdown.wait()
        self.end()

    def receive(self, line: str) -> None:
        """Carry out a command; its answer stands under it."""
        trainer.wait_answered(self.take_line(line))
        mail.wait()

    def send_msg(self, msg: str = '', toUserName: Optional[str] = None) -> dict:
        """Print a text."""
        print_line(msg + '\n')
        return ReturnValue({'BaseResponse': {'Ret': 0}})

    def send_image(self, fileDir: Optional[str] = None, toUserName: Optional[str] = None, *args) -> dict:
        """Print where a picture is."""
        return self.send_msg(printed_letter(Letter(fileDir, 'picture')), toUserName)

    def log(self, text: str) -> None:
        """Print nothing: the terminal has it already."""


class SessionOver(Exception):
    """The server says that the login is no longer good."""


class Refused(Exception):
    """The server does not let this account log in."""


class Adapter(requests.adapters.HTTPAdapter):
    """What itchat leaves out of a request: a time-out when it logs in, sends or uploads, and for the whole of
    an answer, a look at the status, and what the client wants to change. Called by the main thread and by the
    mail's."""

    def __init__(self, client):
        super().__init__()
        self.client = client

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        limit_headers(self.poolmanager)

    def proxy_manager_for(self, proxy, **kwargs):
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **kwargs)
        return manager if known else limit_headers(manager)

    def send(self, request, stream=False, timeout=None, **kwargs):
        name = urllib.parse.urlsplit(request.url).path.rsplit('/', 1)[-1]
        self.client.change_request(name, request)
        try:
            response = super().send(request, stream, tuple(options.timeout), **kwargs)  # not itchat's own
            if not stream:  # as itchat downloads what may be large
                read_body(response, options.timeout[1])
        except (OSError, ValueError) as error:  # not only RequestException: of a proxy's name, of a file
            trace(request, type(error).__name__)
            known = isinstance(error, requests.RequestException) and not isinstance(error, ValueError)
            told = (type(error) if known else requests.ConnectionError)(f'no answer to {name}')
            told.words = no_answer_in_words(error, request.url, kwargs)
            raise told from None  # the exception's own text holds the session's secrets
        trace(request, response)
        if response.status_code >= 500 or response.status_code == 429:  # 429: too many requests
            raise requests.HTTPError(f'{response.status_code} for {name}', response=response)
        self.client.note_answer(response)
        return response


def limit_headers(manager: Any) -> Any:
    """Let a manager of urllib3's make connections that give the headers of an answer a time; return it.

    The time-out of a socket begins anew with every byte. See read_body(), too.
    """

    def limited(pool):
        class Connection(pool.ConnectionCls):
            def getresponse(self):
                sock, cut = getattr(self.sock, 'socket', self.sock), threading.Event()

                def end():
                    cut.set()
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)

                timer = threading.Timer(options.timeout[1] + 1, end)
                timer.daemon = True
                timer.start()
                try:
                    answer = super().getresponse()
                    if cut.is_set():  # headers that were cut off look like headers that end
                        raise urllib3.exceptions.ProtocolError
                    return answer
                finally:
                    timer.cancel()

        return type('Pool', (pool,), {'ConnectionCls': Connection})

    classes = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: limited(pool) for scheme, pool in classes.items()}
    return manager


def causes(error: Optional[BaseException]) -> Iterator:
    """Yield an exception and all that it came from."""
    if error is not None:
        yield error
        for other in dict.fromkeys((error.__cause__, error.__context__)):
            yield from causes(other)


def no_answer_in_words(error: BaseException, url: str, how: dict) -> str:
    """Return why a request got no answer and the way out; '' where that is not known.

    `how` is what requests makes of the environment: `proxies`, `verify`. The types of the exceptions decide:
    their texts hold the session's secrets, an address of a proxy its password.
    """
    variables = 'https_proxy', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'
    proxy = requests.utils.select_proxy(url, how.get('proxies')) or ''
    variable = next((name for name in variables if os.environ.get(name) == proxy), '系统设置的代理')
    socks = re.match(r'socks(4a?|5h?)://', proxy, re.I)
    proxy_fails = bool(proxy) and isinstance(error, requests.exceptions.ProxyError)
    proxy_fails |= bool(socks) and isinstance(error, requests.ConnectionError)
    if isinstance(how.get('verify'), str) and not is_certificates(how['verify']):
        variable = 'REQUESTS_CA_BUNDLE' if os.environ.get('REQUESTS_CA_BUNDLE') else 'CURL_CA_BUNDLE'
        return f'：{variable} 指的 {visible(how["verify"])} 不是证书文件（PEM），改对它或去掉它'
    if proxy and isinstance(error, ValueError):
        if socks and isinstance(error, requests.exceptions.InvalidSchema):
            return f'：{variable} 是 SOCKS 代理，要先 pip install pysocks，或换成 http:// 的代理'
        forms = 'http://主机:端口，或 socks5h://主机:端口（还要 pip install pysocks）'
        return f'：{variable} 写得不对，要像 {forms}'
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            way_out = '网络在检查流量的话，把它的根证书（PEM 文件）写进 REQUESTS_CA_BUNDLE'
            return f'：证书不被信任（{cause.verify_message}），{way_out}'
        if refused := re.match(r'Tunnel connection failed: (\d{3})\b', str(cause)):
            way_out = f'用户名和密码写进 {variable}：http://用户名:密码@主机:端口' * (refused[1] == '407')
            return f'：代理回答 {refused[1]}，{way_out or f"它不让连，换掉 {variable} 里的代理"}'
        if isinstance(cause, socket.gaierror) and not proxy_fails:
            return '：这个名字解析不了，看网络和 DNS 的设置；只能经过代理上网，就设 HTTPS_PROXY'
    where = f'{visible(proxy.rpartition("@")[2])}（{variable}）'
    return f'：连不上代理 {where}，看它开着没有、地址对不对；不用它就去掉这个设置' if proxy_fails else ''


def is_certificates(path: str) -> bool:
    """Return whether a file, or a folder, can be what the certificates of servers are checked by."""
    try:
        ssl.create_default_context(**{'capath' if os.path.isdir(path) else 'cafile': path})
    except OSError:
        return False
    return True


def read_body(response: Any, seconds: float) -> None:
    """Read an answer to its end, in so many seconds: the time-out of a socket begins anew with every byte.

    Raises ConnectionError.
    """
    raw, parts, deadline = response.raw, [], time.monotonic() + seconds
    try:
        while part := raw.read1(65536, decode_content=False):
            parts.append(part)
            if time.monotonic() > deadline:
                response.close()
                raise requests.ConnectionError
    except requests.exceptions.BaseHTTPError as error:  # urllib3's
        raise requests.ConnectionError from error
    how = {'preload_content': False, 'original_response': raw._original_response}
    response.raw = type(raw)(io.BytesIO(b''.join(parts)), raw.headers, **how)  # to be decoded


def read(response: Any) -> dict:
    """Return the object that an answer is, whatever bytes are in its texts. Raises ValueError."""
    answer = json.loads(response.content.decode('utf-8-sig', 'replace'), strict=False)
    if not isinstance(answer, dict):
        raise ValueError('no object')
    return answer


def listed(answer: dict, name: str) -> list:
    """Return a list in an answer; what is missing is empty."""
    return answer[name] if isinstance(answer.get(name), list) else []


def moment(value: Any) -> int:
    """Return a number that the server has written, a time say, or its digits; 0 for anything else."""
    return int(value) if re.fullmatch(r'\d{1,10}', str(value)) else 0


def sync_key(value: Any) -> str:
    """Return a SyncKey, the place up to which messages were fetched, as synccheck has it; '' for none."""
    with contextlib.suppress(LookupError, TypeError):
        return '|'.join(f'{item["Key"]}_{item["Val"]}' for item in value['List'])
    return ''


HARMLESS = {  # names whose values a trace may show: numbers; in queries and headers, texts, too
    *('appid', 'fun', 'lang', 'version', 'tip', 'loginicon', 'f', 'type', 'redirect', 'mmweb_appid'),
    *(
        'Ret',
        'MsgType',
        'Type',
        'AddMsgCount',
        'ModContactCount',
        'Count',
        'MediaType',
        'UploadType',
        'Scene',
    ),
    *('MemberCount', 'InviteStartCount', 'content-type', 'date', 'origin', 'referer', 'Code'),
}


def trace(request: Any, response: Any) -> None:
    """Append a request and its answer, or why there is none, to --trace's file, with nothing private in it.

    Only names, sizes and the values of HARMLESS are written. Called by the main thread and by the mail's.
    """
    if not options.trace:
        return
    url = urllib.parse.urlsplit(request.url)
    lines = [f'{time.strftime("%F %T")} {request.method} {url.hostname}{url.path}']
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    lines += [
        f'  query {black_out(query, texts=True)}',
        f'  headers {black_out(dict(request.headers), texts=True)}',
    ]
    if request.body:
        lines += [f'  body {black_out_body(request.body)}']
    if isinstance(response, str):
        lines += [f'  no answer: {response}']
    else:
        lines += [f'  answer {response.status_code} {black_out(dict(response.headers), texts=True)}']
        lines += [f'  {black_out_body(response.content)}']
    with contextlib.suppress(OSError):
        private = functools.partial(os.open, mode=0o600)
        with open(options.trace, 'a', encoding='utf-8', errors='backslashreplace', opener=private) as f:
            f.write('\n'.join(lines) + '\n')


def black_out(value: Any, name: str = '', texts: bool = False) -> Any:
    """Return what a trace may show of a value: the names in it, and what they are the names of."""
    if isinstance(value, dict):
        return {str(key): black_out(inner, str(key), texts) for key, inner in value.items()}
    if isinstance(value, list):
        return [black_out(inner) for inner in value[:3]] + ([f'... {len(value)} in all'] if value[3:] else [])
    harmless = name in HARMLESS or name.lower() in HARMLESS
    if value is None or isinstance(value, bool) or (harmless and (texts or isinstance(value, int))):
        return value
    return f'<{type(value).__name__} {len(str(value))}>'


def black_out_body(body: Any) -> Any:
    """Return what a trace may show of a body: JSON's names, XML's tags, the codes of a script."""
    content = body if isinstance(body, bytes) else str(body).encode()
    text = content.decode('utf-8', 'replace')
    try:
        return black_out(json.loads(content))
    except ValueError:
        if text.startswith('--'):  # a form
            return 'form ' + ' '.join(re.findall(r'; name="(\w+)"', text))
        if text.startswith('window.'):
            return ' '.join(
                re.findall(
                    r'window\.[A-Za-z.]+(?:\s?=\s?\d{1,4}\b)?|\b\w+code:"\d{1,4}"|selector:"\d+"', text
                )
            )
        tags = re.findall(r'<([A-Za-z]\w*|ret>\d{1,5})\b', text)
        return f'<{len(content)} bytes{": " if tags else ""}{" ".join(tags[:30])}>'


class ShortLog(logging.Handler):
    """Prints the last line of what itchat logs, without what would show the session's secrets."""

    def emit(self, record):
        line = record.getMessage().strip().split('\n')[-1]
        say('itchat：' + re.sub(r'://\S+|url: \S+', '…', line)[:200])


class WeChat(itchat.Core, Client):
    """Web WeChat, through itchat, made to last for days.

    The main thread logs in, receives and calls the handlers, all in auto_login() and run(); the mail's thread
    calls send_msg() and send_image(). `echo` guards what tells the program's own words from the owner's.
    """

    session_file = 'itchat.pkl'
    queries = {name: {'lang': 'zh_CN'} for name in ('webwxsendmsg', 'webwxsendmsgimg')}  # what is added
    hint = '把“帮助”发给“文件传输助手”，或让好友发给它'
    refusal = '微信没有让这个账号登录网页版：很多账号不开放。请加上 --filehelper 登录，什么账号都可以。'
    unreachable = '连不上微信（{}）{}。没有网络可用 --console 在终端里控制，或用 --demo 试用。'
    most_pages = 200  # of the contacts: who has thousands of friends gets a few
    domains = '.qq.com', '.wechat.com'  # where a login may lead
    busy = '微信说请求太频繁，请过几分钟再试，或用 --console 在终端里控制。'

    def __init__(self):
        super().__init__()
        Client.__init__(self)
        self.s.mount('https://', Adapter(self))
        self.s.mount('http://', Adapter(self))
        self.logins = 0  # sessions so far
        self.sync_ret = 0  # how the last fetch was answered
        self.refusals = self.empty = 0  # fetches in a row that were refused, that brought nothing
        self.silent = 0  # looks in a row that were not answered although the fetch was
        self.odd = 0  # looks in a row that were answered with a log-out
        self.unscanned = 0  # odd answers in a row to whether a QR code was scanned
        self.shown = '', 0  # the QR code that was asked for, and since when, by time.monotonic()
        self.trouble = None  # what kept the server from answering get_msg()
        self.early = []  # messages that came with the login
        self.more = self.caught_up = False  # is there more to fetch? Has all come from before the program?
        self.seen = collections.deque(maxlen=10000)  # MsgIds: after a login the server may send them again
        self.echo = threading.Condition()
        self.sending = []  # the texts that WeChat has been given and has not answered yet
        # MsgIds of what was sent; the text where the answer got lost.
        self.own = collections.deque(maxlen=1000)
        self.callbacks = ()

    # -- logging in

    def auto_login(
        self, hotReload: bool = False, statusStorageDir: Optional[str] = None, callbacks: Iterable = ()
    ) -> None:
        """Log in; with hotReload, by the stored session (default: `session_file`) if it still counts.

        Takes the names of itchat's callbacks that the script has: qrCallback, loginCallback, exitCallback.
        Ends the program with status 1 and one line when it cannot be done.
        """
        self.begin()
        itchat.set_logging(showOnCmd=False, loggingLevel=logging.WARNING)
        logging.getLogger('itchat').addHandler(ShortLog())
        self.useHotReload = hotReload
        self.hotReloadDir = os.path.join(FOLDER, statusStorageDir or self.session_file)
        self.callbacks = callbacks
        if options.logout:
            self.log_out_stored()
        trouble = ''
        with contextlib.suppress(SystemExit):  # of leave()
            trouble = self.reconnect() if trainer.session else self.log_in()
        if self.exit_signal is not None:
            self.end()
        if trouble:
            sys.exit(trouble)

    def log_in(self) -> str:
        """Log in once; return why it did not work, '' when it did."""
        self.alive = self.isLogging = False
        try:
            with self.waiting():
                stored = self.useHotReload and bool(self.load_login_status(self.hotReloadDir))
                if not stored:
                    self.log_in_by_code()
                elif self.early and not self.caught_up:  # are they old?
                    with contextlib.suppress(requests.RequestException, ValueError):
                        self.note_time(self.fetch_account().get('SystemTime'))
        except requests.RequestException as error:
            if getattr(error.response, 'status_code', None) == 429:
                return self.busy
            host = urllib.parse.urlsplit(itchat.config.BASE_URL).hostname
            return self.unreachable.format(host, getattr(error, 'words', ''))
        except (Refused, LookupError, AttributeError, TypeError, ValueError):
            return self.refusal  # but for Refused, itchat has read what is no login
        if not stored:
            self.keep_session()
        self.welcome(new_names=not stored or not self.logins)
        return ''

    def log_in_by_code(self) -> None:
        """Log in with a QR code; or, where the phone still knows this login, by its confirmation alone."""
        del self.memberList[:], self.mpList[:], self.chatroomList[:]  # of the login before
        self.loginInfo.pop('url', None)
        show_qr = self.hand_on_qr if 'qrCallback' in self.callbacks else self.show_qr
        try:
            self.login(qrCallback=show_qr, loginCallback=self.show_login)
        except requests.exceptions.JSONDecodeError:  # the phone cannot be asked: a page instead of an answer
            self.isLogging = False
            self.s.cookies.clear()
            self.login(qrCallback=show_qr, loginCallback=self.show_login)

    def welcome(self, new_names: bool) -> None:
        """Begin the session: find the people, let the mail go out, say who has logged in."""
        if new_names:
            people.find_again([str(self.loginInfo.get('wxuin')), str(self.storageClass.nickName)])
        mail.set_online(True)
        say(f'已登录：{visible(self.storageClass.nickName)}。请{self.hint}。')
        if not self.logins:
            people.say_who_supervises()
        self.logins += 1
        self.call_back('loginCallback')

    def call_back(self, name: str, **how) -> None:
        """Have the training process call the script's own function, if there is one."""
        if name in self.callbacks:
            trainer.line.send('call_back', name=name, how=how)

    def hand_on_qr(self, uuid: str, status: str, qrcode: bytes) -> None:
        """Have the script's own qrCallback show the code."""
        self.call_back('qrCallback', uuid=uuid, status=status, qrcode=qrcode)

    def get_QRuuid(self) -> str:
        """Get the uuid for a QR code; raise where itchat would ask again every second for ever."""
        uuid = super().get_QRuuid()
        if not uuid:
            raise requests.RequestException('no uuid in the answer')
        return uuid

    def check_login(self, uuid: Optional[str] = None) -> str:
        """Ask once if the code was scanned: '408' not yet, '201' scanned, '200' logged in, else run out.

        It has run out when the server says so three times, or after some minutes: somebody may be slow to
        confirm, or refuse and scan again.
        """
        now, uuid = int(time.time()), uuid or self.uuid
        query = {'loginicon': 'true', 'uuid': uuid, 'tip': 1, 'r': -now // 1579, '_': now}
        answer = self.ask(f'{itchat.config.BASE_URL}/cgi-bin/mmwebwx-bin/login', params=query).text
        code = re.search(r'window.code=(\d+)', answer)
        page = re.search(r'window.redirect_uri="(\S+)"', answer)
        if code and code[1] == '200':
            self.open_session(page[1])
        if not code:
            raise requests.RequestException('no answer to login')
        if self.shown[0] != uuid:
            self.shown = uuid, time.monotonic()
        if code[1] in ('200', '201', '408'):
            self.unscanned = 0
            if code[1] != '408' or time.monotonic() - self.shown[1] < options.renew:
                return code[1]
            self.shown = '', 0
            return '400'
        self.unscanned += 1
        if self.unscanned % 3:
            self.pause(min(self.unscanned, 6))
            return '408'
        return code[1]

    def ask(self, url: str, **kwargs) -> Any:
        """Get a page as a browser does."""
        return self.s.get(url, headers={'User-Agent': itchat.config.USER_AGENT}, **kwargs)

    def open_session(self, page: str) -> None:
        """Fetch the login page, through three redirects at most, and take the session's tickets from it.

        Raises Refused when there are none, or when a redirect leads away from WeChat.
        """
        for _ in range(4):
            # No backslash, and no @ before the path: others read the host differently there.
            host = re.fullmatch(r'https://([a-z0-9.-]+)(:443)?/[!-\[\]-~]*', page)
            if not host or not ('.' + host[1]).endswith(self.domains):
                raise Refused
            answer = self.fetch_login_page(page)
            found = dict(re.findall(r'<(\w+)>(?:<!\[CDATA\[)?([^<\]]*)(?:\]\]>)?</\1>', answer.text))
            tickets = {
                **self.s.cookies.get_dict(),
                **{name: html.unescape(v) for name, v in found.items() if v},
            }
            if all(tickets.get(name) for name in ('skey', 'wxsid', 'wxuin', 'pass_ticket')):
                return self.take_tickets(page, tickets)
            onward = tickets.get('redirecturl') or answer.headers.get('Location')
            if not onward:
                raise Refused
            page = urllib.parse.urljoin(page, onward)
        raise Refused

    def fetch_login_page(self, page: str) -> Any:
        """Get the login page as the UOS client does, which gets tickets for more accounts than others."""
        headers = {
            'User-Agent': itchat.config.USER_AGENT,
            'client-version': itchat.config.UOS_PATCH_CLIENT_VERSION,
            'extspam': itchat.config.UOS_PATCH_EXTSPAM,
            'referer': 'https://wx.qq.com/?&lang=zh_CN&target=t',
        }
        return self.s.get(page, headers=headers, allow_redirects=False)

    def take_tickets(self, page: str, tickets: dict) -> None:
        """Begin a session with the tickets of the login page at `page`."""
        url = page.split('?')[0].rsplit('/', 1)[0]
        names = {'Skey': 'skey', 'Sid': 'wxsid', 'Uin': 'wxuin'}
        self.loginInfo.update(
            {name: tickets[name] for name in (*names.values(), 'pass_ticket')},
            BaseRequest={name: tickets[lower] for name, lower in names.items()},
            deviceid='e' + repr(random.random())[2:17],
            logintime=int(time.time() * 1e3),
            url=url,
            fileUrl=url.replace('://', '://file.'),
            syncUrl=url.replace('://', '://webpush.'),
        )

    def show_qr(self, uuid: str, status: str, qrcode: bytes) -> None:
        """Show the state of the login: itchat calls it with the QR code (a PNG) and at every poll."""
        if status == '0':
            print_line(draw_code('https://login.weixin.qq.com/l/' + uuid))
            picture = itchat.config.DEFAULT_QR
            try:
                with open(picture, 'wb', opener=functools.partial(os.open, mode=0o600)) as f:
                    f.write(qrcode)
                instead = f'；终端里的码扫不了，就打开 {os.path.abspath(picture)}'
            except OSError as error:  # a full disk
                instead = f'（{picture} 没有写成：{error.strerror}）'
            say(f'请用微信扫码{"重新" if self.logins else ""}登录{instead}')
        elif status == '201' or (status == '408' and not qrcode):  # no code: after an earlier login
            say('请在手机上确认登录。')
        elif status not in ('200', '408'):
            say('二维码过期了，换一个新的。')

    def show_login(self) -> None:
        """Check that somebody has logged in; without this, itchat would clear the terminal."""
        if not self.storageClass.userName:
            raise Refused
        with contextlib.suppress(OSError):
            os.remove(itchat.config.DEFAULT_QR)

    def show_mobile_login(self) -> None:
        """Tell the phone; nothing depends on it."""
        with contextlib.suppress(requests.RequestException):
            super().show_mobile_login()

    def post(self, name: str, query: dict, **data) -> dict:
        """Post to the session's host, as itchat does; change_request() puts in the tickets named in `query`.

        Raises RequestException, or ValueError for an answer that is none.
        """
        kind = 'application/json; charset=UTF-8'
        headers = {'ContentType': kind, 'User-Agent': itchat.config.USER_AGENT}
        content = json.dumps({'BaseRequest': self.loginInfo['BaseRequest'], **data})
        url = f'{self.loginInfo["url"]}/{name}'
        return read(self.s.post(url, params=query, data=content, headers=headers))

    def fetch_account(self) -> dict:
        """Ask for the account, as a page does that is opened."""
        return self.post('webwxinit', {'r': int(-time.time() / 1579), 'pass_ticket': ''})

    def web_init(self) -> dict:
        """Fetch the account, and where its messages begin. Raises Refused."""
        answer = self.fetch_account()
        user = itchat.utils.struct_friend_info(answer.get('User') or {})
        refused = (answer.get('BaseResponse') or {}).get('Ret')
        if refused or not user['UserName'] or not self.move_on(answer):
            raise Refused
        user['NickName'] = html.unescape(with_emoji(user['NickName'] or ''))
        count = moment(answer.get('InviteStartCount'))
        self.loginInfo.update(User=templates.wrap_user_dict(user), InviteStartCount=count)
        self.memberList.append(self.loginInfo['User'])
        self.storageClass.userName, self.storageClass.nickName = user['UserName'], user['NickName']
        self.note_time(answer.get('SystemTime'))
        contacts = listed(answer, 'ContactList')
        for contact in contacts:
            with contextlib.suppress(LookupError, AttributeError, TypeError):  # of this entry
                if contact['UserName'].startswith('@@'):
                    update_local_chatrooms(self, [{**contact, 'MemberList': []}])
        self.note_contacts(contacts)
        return answer

    def get_contact(self, update: bool = False) -> list:
        """Fetch the friends. Raises RequestException when that fails: without them nobody could command."""
        if not update:
            return super().get_contact()
        url, seq, pause, known = self.loginInfo['url'] + '/webwxgetcontact', 0, 1, set()
        for _ in range(self.most_pages):
            try:
                query = {'r': int(time.time()), 'seq': seq, 'skey': self.loginInfo['skey']}
                answer = read(self.ask(url, params=query))
                if answer['BaseResponse']['Ret'] != 0:
                    raise requests.RequestException('refused')
                names, seq = self.note_contacts(answer['MemberList'] or ()), answer.get('Seq')
                if not seq or names <= known:
                    return []
                known |= names
            except (requests.RequestException, LookupError, TypeError, ValueError) as error:
                if pause > 4:
                    raise requests.RequestException('no contacts') from error
                say('好友名单没有取到，再试。')
                time.sleep(options.retry * pause)
                pause *= 2
        say(f'好友名单没有完：读了 {len(known)} 个就不再读了。')
        return []

    def note_contacts(self, contacts: list) -> set:
        """Note new or changed entries of the contacts, and return whose; groups are of no interest.

        itchat's own function searches all contacts for each.
        """
        noted = {}
        with self.storageClass.updateLock:
            known = {friend['UserName']: friend for friend in [*self.memberList, *self.mpList]}
            for friend in contacts:
                try:
                    if not friend['UserName'].startswith('@@'):
                        noted[friend['UserName']] = self.note_contact(friend, known)
                except Exception as error:  # of this entry
                    say(f'好友名单里有一项没有读成：{type(error).__name__}')
        people.rename(noted.values())
        return set(noted)

    def note_contact(self, friend: dict, known: dict) -> dict:
        """Note an entry of the contacts; `known` are those by UserName. Needs itchat's lock."""
        friend = {**friend, 'VerifyFlag': moment(friend.get('VerifyFlag'))}
        for name in ('NickName', 'RemarkName', 'DisplayName'):
            friend[name] = html.unescape(with_emoji(friend.get(name) or ''))
        if friend['UserName'] in known:
            itchat.utils.update_info_dict(known[friend['UserName']], friend)
        else:
            contacts = self.mpList if friend['VerifyFlag'] & 8 else self.memberList
            contacts.append(friend)  # as one of itchat's own
            known[friend['UserName']] = contacts[-1]
        return friend

    # -- the stored session

    def keep_session(self) -> None:
        if self.useHotReload and self.alive:
            self.dump_login_status()

    def dump_login_status(self, fileDir: Optional[str] = None) -> None:
        """Write the session (who has it is logged in) whole or not at all, readable by the owner alone."""
        path = fileDir or self.hotReloadDir
        folder = path + NEW
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a program that was killed
            os.mkdir(folder, 0o700)  # itchat's file in it is open to all until it is chmodded
            new = os.path.join(folder, 'session')
            super().dump_login_status(new)
            os.chmod(new, 0o600)
            os.replace(new, path)
            os.rmdir(folder)
        except Exception as error:  # OSError, and itchat's Exception('Incorrect fileDir') for it
            with contextlib.suppress(OSError):
                os.remove(path)  # it would bring commands back that have been obeyed
            say(f'登录状态没有存下来，下次启动要重新扫码：{type(error).__name__} {path}')

    def load_login_status(self, fileDir: str, **callbacks) -> Any:
        """Log in with the stored session; return what is false when that is not to be.

        Raises what keeps the server from answering: it is too early for a QR code.
        """
        self.trouble = None
        set_damaged_session_aside(fileDir)
        try:
            answer = super().load_login_status(fileDir, **callbacks)
        except (LookupError, AttributeError, TypeError, ValueError):
            set_aside(fileDir, '内容不对')
            self.loginInfo = {}
            self.s.cookies.clear()
            return False
        if self.trouble is not None:
            raise self.trouble
        with self.waiting():  # a signal that itchat has swallowed
            return answer

    def get_msg(self) -> tuple:
        """Fetch messages, note changed contacts; return (messages, []), or (None, None) at a refusal.

        An answer is read to its end; only then the next one is for what follows.
        """
        info = self.loginInfo
        try:
            info['deviceid'] = 'e' + repr(random.random())[2:17]
            how = {'SyncKey': info['SyncKey'], 'rr': ~int(time.time())}
            answer = self.post('webwxsync', dict.fromkeys(('sid', 'skey', 'pass_ticket'), ''), **how)
            self.sync_ret = answer['BaseResponse']['Ret']
        except Exception as error:  # load_login_status() of itchat swallows it
            self.trouble = requests.RequestException(f'no answer: {type(error).__name__}')
            self.trouble.words = getattr(error, 'words', '')
            raise
        if self.sync_ret != 0:
            if self.sync_ret in (-1, 1205) and self.refusals <= 3:  # a passing refusal
                self.trouble = requests.RequestException(f'Ret {self.sync_ret}')
            return None, None
        messages, self.refusals, self.more = listed(answer, 'AddMsgList'), 0, bool(answer.get('ContinueFlag'))
        self.note_time(*(msg.get('CreateTime') for msg in messages if isinstance(msg, dict)))
        self.note_contacts(listed(answer, 'ModContactList'))
        self.move_on(answer)
        if not self.alive:  # load_login_status() would not look who has written them
            self.early, messages = messages, []
        return messages, []

    def move_on(self, answer: dict) -> bool:
        """Ask next time for what comes after `answer`; return whether it says where that is."""
        keys = [key for key in (answer.get('SyncKey'), answer.get('SyncCheckKey')) if sync_key(key)]
        if keys:
            self.loginInfo.update(SyncKey=keys[0], synckey=sync_key(keys[-1]))
        return bool(keys)

    def log_out_stored(self) -> None:
        """End the stored session on the server, remove its file and end the program."""
        path = self.hotReloadDir
        if not os.path.exists(path):
            sys.exit(f'没有存下的登录（{os.path.abspath(path)}）。')
        self.sync_ret = None
        try:
            with self.waiting():
                good = self.load_login_status(path)
                if good:
                    self.end_session()
        except requests.RequestException:
            sys.exit('连不上微信，登录没有结束，文件还在。')
        if not good and self.sync_ret is None:
            sys.exit('存下的登录不能用，没有问过服务器；请在手机上退出网页版登录。')
        say('已在服务器上退出登录。' if good else '服务器上的登录早已结束。')
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        say(f'删掉了 {os.path.abspath(path)}。')
        people.forget()
        sys.exit()

    def end_session(self) -> None:
        """Log out on the server. Raises RequestException."""
        query = {'redirect': 1, 'type': 1, 'skey': self.loginInfo['skey']}
        self.ask(
            self.loginInfo['url'] + '/webwxlogout', params=query, allow_redirects=False
        ).raise_for_status()

    # -- receiving

    def start_receiving(self, exitCallback=None, getReceivingFnOnly=False) -> None:
        """Note that there is a session; run() receives, in the main thread."""
        self.alive = True

    def run(self) -> None:
        """Receive until a signal comes, in one session after the other; then end the program.

        What is typed in the terminal meanwhile is the owner's, and answered there.
        """
        failures = 0
        self.hear_terminal()
        with contextlib.suppress(SystemExit):  # of leave()
            while self.exit_signal is None:
                try:
                    self.receive()
                    if failures > 1:
                        mail.set_online(True)
                        say('微信又连上了。')
                    failures = 0
                except requests.ReadTimeout:
                    pass  # a long poll that was forgotten on the way
                except SessionOver:
                    self.reconnect()
                except Exception as error:  # the network, the server, what is no answer: all of them pass
                    failures += 1
                    self.silent = 0
                    if failures == 2:
                        mail.set_online(False)
                        say(f'微信断开了（{type(error).__name__}），训练不受影响；连上以后接着说。')
                    self.pause(failures)
        self.end()

    def reconnect(self) -> None:
        """Log in again until it works, or a signal comes."""
        mail.set_online(False)
        say('微信的登录结束了，训练不受影响；重新登录。')
        for failures in itertools.count(1):
            try:
                trouble = self.log_in()
            except Exception as error:
                trouble = f'登录出错：{type(error).__name__}'
            if not trouble:
                return
            say(trouble)
            self.pause(failures)

    def receive(self) -> None:
        """Look for news, and hand every text to its handler. Raises SessionOver."""
        messages, news, self.early = self.early, False, []
        if not messages:
            with self.waiting():
                news = self.look()
                if news:
                    messages, _ = self.get_msg()
                    if messages is None:
                        self.check_refusal()
        fresh = [self.take_new(msg) for msg in messages]
        self.caught_up |= bool(messages) and not self.more
        if messages:
            self.keep_session()  # the commands among them are remembered by now
        self.empty = self.empty + 1 if news and not any(fresh) else 0
        if self.empty:  # it says that there is something, and there is nothing, or the same again
            self.pause(min(self.empty, 3))

    def take_new(self, msg: Any) -> bool:
        """Hand on one message, if it can be read; return False when it has come before."""
        number = str((isinstance(msg, dict) and msg.get('MsgId')) or msg)
        if number in self.seen:
            return False
        self.seen.append(number)
        try:
            self.take({'Url': '', **msg, 'MsgId': number})
        except Exception as error:  # of this message; those behind it must not suffer
            if not isinstance(msg, dict) or msg.get('MsgType', 1) == 1:  # a text
                say(f'一条消息没有读成：{type(error).__name__}')
        return True

    def check_refusal(self) -> None:
        """Raise SessionOver when a fetch was refused for good, RequestException when it may be tried."""
        self.refusals += 1
        if self.sync_ret not in (-1, 1205) or self.refusals > 3:
            raise SessionOver
        raise requests.RequestException('refused')

    def look(self) -> bool:
        """Wait for news, half a minute at most; return whether there is something to fetch.

        Raises RequestException when the answer is none.
        """
        info = self.loginInfo
        names = {'skey': 'skey', 'sid': 'wxsid', 'uin': 'wxuin', 'deviceid': 'deviceid', 'synckey': 'synckey'}
        query = {name: info[key] for name, key in names.items()}
        query.update(r=int(time.time() * 1e3), _=info['logintime'])
        info['logintime'] += 1
        answer = self.ask(info['syncUrl'] + '/synccheck', params=query).text
        found = re.search(r'retcode:\s*"(\d+)",\s*selector:\s*"(\d+)"', answer)
        if not found:
            raise requests.RequestException('no answer to synccheck')
        retcode, selector = found.groups()
        if retcode != '0':  # a log-out; for some clients 1100 only says 'fetch'. The fetch will tell.
            self.odd += 1
            self.pause(min(self.odd, 5))
            return True
        self.odd = 0
        return selector != '0'

    def take(self, msg: dict) -> None:
        """Hand one message to its handler, unless it is a group's or the program's own."""
        chats = msg['FromUserName'] + msg['ToUserName']
        if '@@' in chats or msg['MsgType'] == 51:  # 51: opened on the phone
            return
        [msg] = produce_msg(self, [{**msg, 'Content': with_emoji(msg.get('Content') or '')}])
        if not self.is_own(msg):
            trainer.take(msg)

    def is_old(self, msg: dict) -> bool:
        """Decide by the server's clock alone: this machine's may be wrong by hours."""
        return not self.caught_up and 0 < moment(msg.get('CreateTime')) < self.loginInfo['newest'] - 600

    def note_time(self, *times: Any) -> None:
        """Note what tells the server's time: the newest that is known, also of an earlier program."""
        self.loginInfo['newest'] = max([self.loginInfo.get('newest', 0), *map(moment, times)])

    # -- sending

    def send_raw_msg(self, msgType, content: str, toUserName: str) -> dict:
        """Send, and keep by what to know the message when it comes back; see is_own()."""
        with self.echo:
            self.sending.append(content)
        mark = content
        try:
            answer = super().send_raw_msg(msgType, content, toUserName)
            mark = str(answer.get('MsgID'))
            return answer
        finally:
            with self.echo:
                self.sending.remove(content)
                self.own.append(mark)
                self.echo.notify_all()

    def is_own(self, msg: dict) -> bool:
        """Return whether the program itself sent a message: from 文件传输助手 it comes back."""
        with self.waiting(), self.echo:
            self.echo.wait_for(lambda: msg['Text'] not in self.sending)  # before that its MsgID is not known
            for mark in (str(msg['MsgId']), msg['Text']):
                if mark in self.own:
                    self.own.remove(mark)
                    return True
            return False

    # -- what the adapter asks

    def change_request(self, name: str, request: Any) -> None:
        """Change a request to `name`, the last part of its path, before it is sent: its tickets encoded once.

        itchat puts some into the query as they are, although they contain +, / and, the pass_ticket, %2B.
        """
        url = urllib.parse.urlsplit(request.url)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        query.update(self.queries.get(name, {}))
        tickets = {'skey': 'skey', 'sid': 'wxsid', 'uin': 'wxuin'}
        query.update({key: self.loginInfo[ticket] for key, ticket in tickets.items() if key in query})
        if 'pass_ticket' in query or name in ('webwxsendmsg', 'webwxsendmsgimg'):
            query['pass_ticket'] = urllib.parse.unquote(self.loginInfo['pass_ticket'])
        request.url = url._replace(query=urllib.parse.urlencode(query)).geturl()

    def note_answer(self, response: Any) -> None:
        """Note the time in an answer, which some servers tell."""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            self.note_time(int(email.utils.parsedate_to_datetime(response.headers['Date']).timestamp()))


def draw_code(content: str) -> str:
    """Return a QR code for the terminal; in ASCII, twice as large, where the encoding may lack blocks.

    It is white on black whatever the terminal's colours are: phones do not read an inverted code.
    """
    code, colours = segno.make(content, error='l'), sys.stdout.isatty()
    if sys.stdout.encoding.lower() not in ('utf-8', 'utf8'):
        white, black = ('\033[47m  \033[0m', '\033[40m  \033[0m') if colours else ('##', '  ')
        return '\n'.join(
            ''.join(black if dark else white for dark in row) for row in code.matrix_iter(border=4)
        )
    drawing = io.StringIO()
    code.terminal(drawing, compact=True)
    row = '\033[97;40m%s\033[0m' if colours else '%s'
    return '\n'.join(row % line for line in drawing.getvalue().splitlines())


def set_damaged_session_aside(path: str) -> None:
    """Rename a stored session that is not the user's own, is open to others, or is damaged."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    trouble = ''
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
        trouble = '不是只有你能读写的文件，里面可能是别人放的东西'
    else:
        try:
            with open_private(path) as f:
                session = pickle.load(f)
            if not {'loginInfo', 'cookies', 'storage'} <= set(session):
                trouble = '内容不全'
        except PermissionError:
            trouble = '别人能改写，里面可能是别人放的东西'
        except Exception as error:  # a damaged pickle can raise anything
            trouble = f'已损坏（{type(error).__name__}）'
    if trouble:
        set_aside(path, trouble)


def set_aside(path: str, trouble: str) -> None:
    """Rename a stored session that is not to be used."""
    os.replace(path, path + '.bad')
    say(f'{shown(path)} {trouble}；改名为 {shown(path)}.bad，需要重新扫码。')


class FileHelper(WeChat):
    """The web page of 文件传输助手: web WeChat's protocol with the differences that stand here.

    They are those in which the clients that were written for the page agree; the README names what is known.
    Threads as in WeChat.
    """

    session_file = 'filehelper.pkl'
    hint = '把“帮助”发给“文件传输助手”'
    refusal = (
        '微信没有让这个账号登录文件传输助手网页版。请过一会儿再试，换一个账号，或用 --console 在终端里控制。'
    )
    domains = ('.qq.com',)
    app_id = 'wx_webfilehelper'
    entries = {  # the host of the page -> that of its login, in the order in which they are tried
        'szfilehelper.weixin.qq.com': 'login.wx2.qq.com',
        'filehelper.weixin.qq.com': 'login.wx.qq.com',
    }
    file_hosts = {
        'szfilehelper.weixin.qq.com': 'file.wx2.qq.com',
        'cmfilehelper.weixin.qq.com': 'file.wx8.qq.com',
    }

    def __init__(self):
        super().__init__()
        self.polls = 0  # fetches without a look
        self.init_refused = False
        self.use_entry('szfilehelper.weixin.qq.com')

    def use_entry(self, entry: str) -> None:
        """Log in by way of this host of the page."""
        self.entry = entry
        itchat.config.BASE_URL = 'https://' + self.entries[entry]
        page = f'https://{entry}/cgi-bin/mmwebwx-bin/webwxnewloginpage'
        self.queries = {
            **WeChat.queries,
            'jslogin': {
                'appid': self.app_id,
                'redirect_uri': urllib.parse.quote(page, safe=''),  # so it is encoded twice, as most have it
                '_': int(time.time() * 1e3),
            },
            'login': {'appid': self.app_id},
            'webwxnewloginpage': {'fun': 'new', 'version': 'v2'},
            'webwxinit': {'lang': 'zh_CN'},
            'synccheck': {'mmweb_appid': self.app_id},
        }

    # -- logging in

    def log_in(self) -> str:
        """Log in once, by way of the other host if the first one refuses what the phone has confirmed."""
        self.init_refused, self.silent = False, 0
        trouble = super().log_in()
        others = [entry for entry in self.entries if entry != self.entry]
        if trouble == self.refusal and self.init_refused and self.entry == next(iter(self.entries)):
            say(f'{self.entry} 没有接受这个账号，换 {others[0]}：请再扫一次。')
            self.s.cookies.clear()
            self.loginInfo.pop('url', None)
            self.use_entry(others[0])
            trouble = super().log_in()
        return trouble

    def fetch_login_page(self, page: str) -> Any:
        """Get the login page as a browser does: no UOS client comes here."""
        return self.ask(page, allow_redirects=False)

    def take_tickets(self, page: str, tickets: dict) -> None:
        """Begin a session; the host where the login ended is the entry host, and decides on the file host."""
        super().take_tickets(page, tickets)
        self.loginInfo['syncUrl'] = self.loginInfo['url']
        host = self.file_hosts.get(urllib.parse.urlsplit(page).hostname, 'file.wx.qq.com')
        self.loginInfo['fileUrl'] = f'https://{host}/cgi-bin/mmwebwx-bin'

    def web_init(self) -> dict:
        """Fetch the account; note when it is refused after the login was confirmed."""
        self.init_refused = True
        answer = super().web_init()
        self.init_refused = False
        return answer

    def show_mobile_login(self) -> None:
        """Do nothing: the page does not."""

    def get_contact(self, update: bool = False) -> list:
        """Return nobody: there is only 文件传输助手."""
        return []

    def note_contacts(self, contacts: list) -> set:
        """Note nobody, likewise."""
        return set()

    def load_login_status(self, fileDir: str, **callbacks) -> Any:
        answer = super().load_login_status(fileDir, **callbacks)
        entry = urllib.parse.urlsplit(self.loginInfo.get('url') or '').hostname
        if entry in self.entries:
            self.use_entry(entry)  # the one that took this account
        return answer

    def log_in_by_code(self) -> None:
        self.s.cookies.clear()  # or itchat would ask for a login without a QR code: not there
        super().log_in_by_code()

    def end_session(self) -> None:
        """Log out on the server as the page does. Raises RequestException."""
        form = {'sid': self.loginInfo['wxsid'], 'uin': self.loginInfo['wxuin']}
        query = {'redirect': 1, 'type': 0, 'skey': self.loginInfo['skey']}
        url = self.loginInfo['url'] + '/webwxlogout'
        self.s.post(url, params=query, data=form, allow_redirects=False).raise_for_status()

    # -- receiving and sending

    def look(self) -> bool:
        """Wait for news; where synccheck is not answered, fetch every few seconds, as some clients do."""
        if self.silent < 2:
            try:
                news = super().look()
                self.silent = 0
                return news
            except requests.RequestException:
                self.silent += 1  # if it is the network, the fetch will fail, too
        else:
            self.pause(2)
            self.empty, self.polls = 0, self.polls + 1
            if self.polls % 100 == 0:  # perhaps it is answered again
                self.silent = 1
        return True

    def send_image(self, fileDir: Any = None, toUserName: Optional[str] = None, *args) -> dict:
        """Send a picture; a text with its path where it cannot be uploaded to either file host."""
        first = self.loginInfo['fileUrl']
        other = 'file.wx2.qq.com' if '//file.wx.' in first else 'file.wx.qq.com'
        for url in (first, f'https://{other}/cgi-bin/mmwebwx-bin'):
            with contextlib.suppress(requests.RequestException, AttributeError, TypeError):  # or no object
                answer = self.upload(url, fileDir, toUserName)
                if answer and answer.get('MediaId'):
                    break
        else:
            return self.send_msg(Letter(fileDir, 'picture').text(), toUserName)
        return self.send_media(answer['MediaId'], toUserName)

    def upload(self, url: str, path: str, to: str) -> dict:
        """Upload a picture to a file host, in the form that the page sends."""
        with open(path, 'rb') as f:
            content = f.read()
        request = {
            'UploadType': 2,
            'BaseRequest': self.loginInfo['BaseRequest'],
            'ClientMediaId': int(time.time() * 1e4),
            'TotalLen': len(content),
            'StartPos': 0,
            'DataLen': len(content),
            'MediaType': 4,
            'FromUserName': self.storageClass.userName,
            'ToUserName': to,
            'FileMd5': hashlib.md5(content).hexdigest(),
        }
        form = {
            'name': os.path.basename(path),
            'type': 'image/png',
            'lastModifiedDate': time.strftime('%a %b %d %Y %H:%M:%S GMT+0800 (CST)'),
            'size': str(len(content)),
            'mediatype': 'pic',
            'uploadmediarequest': json.dumps(request, separators=(',', ':')),
            'webwx_data_ticket': self.s.cookies.get_dict().get('webwx_data_ticket', ''),
            'pass_ticket': self.loginInfo['pass_ticket'],  # as it came: the page does not decode it here
        }
        files = {name: (None, value) for name, value in form.items()}
        files['filename'] = (form['name'], content, form['type'])
        query = {'f': 'json', 'random': ''.join(random.choices('abcdefghijklmnopqrstuvwxyz0123456789', k=4))}
        return ReturnValue(rawResponse=self.s.post(url + '/webwxuploadmedia', params=query, files=files))

    def send_media(self, media_id: str, to: str) -> dict:
        """Send a picture that was uploaded."""
        number = int(time.time() * 1e4)
        message = {
            'Type': 3,
            'MediaId': media_id,
            'Content': '',
            'FromUserName': self.storageClass.userName,
            'ToUserName': to,
            'LocalID': number,
            'ClientMsgId': number,
        }
        data = {'BaseRequest': self.loginInfo['BaseRequest'], 'Msg': message, 'Scene': 0}
        url = self.loginInfo['url'] + '/webwxsendmsgimg'
        return ReturnValue(rawResponse=self.s.post(url, params={'fun': 'async', 'f': 'json'}, json=data))

    # -- what the adapter asks

    def change_request(self, name: str, request: Any) -> None:
        super().change_request(name, request)
        entry = urllib.parse.urlsplit(self.loginInfo.get('url') or f'https://{self.entry}').hostname
        headers = {'mmweb_appid': self.app_id, 'Referer': f'https://{entry}/', 'Origin': f'https://{entry}'}
        request.headers.update(headers, **{'User-Agent': itchat.config.USER_AGENT})


# ------------------------------------------------------------------------- several programs, one login

MOST = 2**24  # bytes of a message between two programs
LOST = 10  # seconds without a word after which a program counts as lost


def meeting_point(carrier: str) -> str:
    """Return where the program that has the login is found: a socket in a folder that is the user's alone.

    Raises OSError; PermissionError when the folder is not.
    """
    base = os.environ.get('XDG_RUNTIME_DIR', '')
    folder = os.path.join(base, 'wechat_train')
    if not (os.path.isabs(base) and os.path.isdir(base) and is_own(os.stat(base))):
        folder = os.path.expanduser(f'~/.wechat_train@{socket.gethostname()}')  # machines may share a home
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(0, f'{folder} 不是只有你能读写的文件夹')
    proxy = requests.utils.get_environ_proxies('https://wx.qq.com').get('https', '')
    way = f'-{hashlib.sha256(proxy.encode()).hexdigest()[:8]}' * bool(proxy)
    return os.path.join(folder, f'{carrier.lower()}{way}.sock')


@contextlib.contextmanager
def short(path: str) -> Iterator:
    """Yield another name of `path` where that is longer than the address of a socket may be."""
    if len(os.fsencode(path)) < 100:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f'/proc/self/fd/{folder}/{os.path.basename(path)}'
    finally:
        os.close(folder)


def connect(path: str) -> socket.socket:
    """Return a connection to a socket. Raises OSError: PermissionError if others could have put it there."""
    folder = os.stat(os.path.dirname(path))
    safe = is_own(folder) or folder.st_mode & stat.S_ISVTX
    if not safe or not stat.S_ISSOCK(os.lstat(path).st_mode) or not is_own(os.lstat(path)):
        raise PermissionError(0, f'{path} 不是套接字，或者别人能动它')
    ours = socket.socket(socket.AF_UNIX)
    try:
        ours.settimeout(LOST)
        with short(path) as name:
            ours.connect(name)
        if not peer_of(ours):
            raise PermissionError(0, f'{path} 后面是别人的程序')
        ours.settimeout(None)
        return ours
    except BaseException:
        ours.close()
        raise


def peer_of(ours: socket.socket) -> int:
    """Return the process at the other end of a connection, -1 where that is not told, 0 if it is not one's
    own (or root's: a server of ssh)."""
    if not hasattr(socket, 'SO_PEERCRED'):
        return -1
    pid, uid, _ = struct.unpack('3i', ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return (pid or -1) if uid in (os.getuid(), 0) else 0


class Other:
    """A program that speaks through this one's login. Changed by Programs alone, with its guard."""

    def __init__(self, id: str, name: str, host: str):
        self.id, self.name, self.host = id, name, host
        self.line, self.turn = None, 0  # the connection, while there is one; the number that it gives it
        self.local = False  # is it a process of this machine, which ends where the line ends?
        self.heard = time.monotonic()  # when it was heard last
        self.facts = {}  # what it has told of itself then
        self.errands = {}  # id of a message -> (Person, text): given, not taken yet
        self.person = None  # the key of who spoke to it last
        self.room = threading.BoundedSemaphore(20)  # for what is being sent for it


class Programs:
    """The programs of one user that have one login, as the one that has it sees them: it carries their words.

    Two have the same login when they are the same user's, on the same machine (or brought together by ssh),
    and speak through the same carrier, web WeChat or 文件传输助手, by the same proxy, whoever may scan its
    code: before that nobody knows the account. A folder whose memory knows another account has its own
    login, as with --alone.

    One thread accepts them, one for each listens to it, others send for them; the main thread brings the
    messages that are for them. `guard` guards it all.
    """

    def __init__(self):
        self.guard = threading.RLock()
        self.name = ''  # of this one
        self.others = {}  # name -> Other, of those that are there
        self.left = {}  # id -> name, of those that were
        self.spoken = {}  # Person -> the name of the program that he or she has spoken to last
        self.path, self.identity = '', None  # of the socket, while this one has the login and serves
        self.staying = 0  # the signal after which it has stayed for the others alone

    # -- how they meet

    def choose_client(self, carrier: type) -> Client:
        """Return the client: the carrier itself, or the login of the program that is there already."""
        self.name = tidy(options.name or os.path.basename(FOLDER))
        if options.alone or options.logout:
            return carrier()
        try:
            if options.chat:
                path = os.path.join(FOLDER, os.path.expanduser(options.chat))
                return Joined(carrier, connect(path), path)
            ours = self.meet(carrier)
        except OSError as error:
            if options.chat:
                sys.exit(f'--chat {options.chat}：{error.strerror or error}')
            say(f'不和别的程序合用登录：{error.strerror or error}。')
            return carrier()
        return Joined(carrier, ours) if ours else carrier()

    def meet(self, carrier: type) -> Optional[socket.socket]:
        """Return a connection to the program that has the login, None when this one is to have it: it serves.

        Raises OSError.
        """
        path = meeting_point(carrier.__name__)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0)
        with open(os.open(f'{path}.lock', flags, 0o600)) as lock_file:  # two may begin at the same moment
            fcntl.flock(lock_file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # the latter: a dead one's
                return connect(path)
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            server = socket.socket(socket.AF_UNIX)
            with short(path) as name:
                server.bind(name)
            os.chmod(path, 0o600)
            server.listen(100)
            self.path, self.identity = path, os.lstat(path)
        threading.Thread(target=self.accept, args=(server,), name='accept', daemon=True).start()
        return None

    def close(self) -> None:
        """Remove the socket, if it is this program's."""
        with contextlib.suppress(OSError):
            if self.path and os.path.samestat(os.lstat(self.path), self.identity):
                os.remove(self.path)

    def accept(self, server: socket.socket) -> None:
        """Take in those that come: a thread."""
        while True:
            try:
                ours, _ = server.accept()
                threading.Thread(target=self.listen, args=(ours,), daemon=True).start()
            except OSError:  # too many open files
                time.sleep(1)

    def take_over(self, state: dict) -> None:
        """This program has the login from now on: tell it, and wait for those that spoke through it.

        Needs the guard.
        """
        gone, self.name = state.get('chat', '有登录的程序'), state.get('name', self.name)
        say(f'{visible(gone)} 没有了，训练不受影响；自己登录。')
        known = state.get('programs', ())
        self.others = {name: Other(id, name, host) for id, name, host in known if name != self.name}
        self.left[gone] = gone
        self.note_change()
        if trainer.session:
            text = f'{gone} 没有了，现在由 {self.name} 登录（主机 {socket.gethostname()}）。'
            mail.put(*((person, text) for person in people.audience(None, owner=True)))

    # -- what they say

    def listen(self, ours: socket.socket) -> None:
        """Do what another program says until its end: a thread for each. Rubbish ends it, too."""
        peer, other = peer_of(ours), None
        line = Line(ours.detach(), waits=False)
        try:
            while peer and (message := line.receive(most=MOST)) is not None:
                do = message.pop('do')
                if do == 'beat':
                    other = self.beat(other, line, peer, **message)
                elif do == 'send':
                    words = [message.get(name, '') for name in ('to', 'text', 'path', 'content')]
                    if not other.room.acquire(blocking=False):
                        raise ConnectionError('too much at once')
                    how = other, line, message['n'], *map(str, words)
                    threading.Thread(target=self.send, args=how, daemon=True).start()
                elif do == 'taken':
                    other.errands.pop(message['id'], None)
                elif do == 'bye':
                    self.leave(other, '结束了')
                else:
                    raise ValueError(do)
        except Exception as error:
            say(f'{other.name if other else "一个程序"}送来的看不懂（{type(error).__name__}），断开了。')
        line.cut()
        with self.guard:
            if other and other.line is line:
                other.line = None
                if other.local:
                    self.leave(other, '没有了，没有说再见')
        line.close()

    def beat(self, other: Optional[Other], line: Line, peer: int, id: str, turn: int, **how: Any) -> Other:
        """It lives, and says how far it is; answer with what it has to know. The first is its greeting."""
        facts = {'what': how['what'][:80], 'far': how['far'][:80], 'silent': float(how['silent'])}
        with self.guard:
            new = other is None
            if new:
                other = self.admit(str(id), int(turn), how['name'], visible(how['host'])[:40])
                other.line = line
                other.local = how['host'] == socket.gethostname() and peer == how['pid']
            elif other.line is not line or line.waiting.qsize() > 1000:
                raise ConnectionError('replaced, or it does not read')
            other.heard, other.facts = time.monotonic(), facts
            line.send('state', **self.state(other))
            for number in other.errands if new else ():
                self.deliver(other, number)
        return other

    def admit(self, id: str, turn: int, name: str, host: str) -> Other:
        """Return the program with this id, a new one if there is none. Needs the guard."""
        for other in self.others.values():
            if other.id == id:
                if other.line and turn < other.turn:  # they may be read in another order than they began
                    raise ConnectionError('replaced')
                if other.line:
                    other.line.cut()
                other.turn = turn
                return other
        name = tidy(name)
        taken = {taken.casefold() for taken in (self.name, *self.others, ALL)}
        names = (f'{name}{"-" * name[-1].isdigit()}{i}' for i in itertools.count(2))
        name = next(each for each in itertools.chain([name], names) if each.casefold() not in taken)
        other = self.others[name] = Other(id, name, host)
        other.turn = turn
        back = self.left.pop(id, None)
        text = f'{name}（主机 {host}）{"又连上了" if back else "也用这个微信了"}。'
        say(visible(text))
        if back:
            mail.put(*((person, text) for person in people.audience(None, owner=True)))
        self.note_change()
        return other

    def state(self, other: Other) -> dict:
        """Return what another program has to know, in a form that JSON can write. Needs the guard."""
        client, about = itchat.instance, {'name': other.name, 'chat': self.name, 'local': other.local}
        if not getattr(client, 'logins', 0):
            return {**about, 'account': None}
        about['session'] = client.hotReloadDir if other.local and client.useHotReload else ''
        about['programs'] = [(each.id, each.name, each.host) for each in self.others.values()]
        about['account'] = [client.storageClass.nickName]
        return {**about, 'people': people.facts(), 'owner': memory.get('owner'), 'online': mail.online}

    def send(self, other: Other, line: Line, n: Any, to: str, text: str, path: str, content: str) -> None:
        """Send something for another program, and tell it what has become of that: a thread for each."""
        ret, number = -1, ''
        try:
            with contextlib.ExitStack() as stack:
                if content:
                    picture = stack.enter_context(tempfile.NamedTemporaryFile(suffix='.png'))
                    picture.write(base64.b64decode(content))
                    picture.flush()
                if mail.online and (other.local or not path):
                    answer = pass_on(other.name, to, text, picture.name if content else path)
                    ret, number = answer['BaseResponse'].get('Ret'), str(answer.get('MsgID') or '')
        except Exception as error:  # as in Mail.send()
            ret = type(error).__name__
        other.room.release()
        line.send('sent', n=n, ret=ret, number=number)

    def leave(self, other: Other, why: str) -> None:
        """A program is not there any more: tell those who hear of it."""
        with self.guard:
            if self.others.get(other.name) is not other:
                return
            del self.others[other.name]
            self.left[other.id] = other.name
            text = f'{other.name} {why}（主机 {other.host}）。'
            say(visible(text))
            mail.put(*((person, text) for person in people.audience(other.person, owner=True)))
            for person, words in other.errands.values():
                mail.put((person, f'“{words[:20]}”：{other.name} 还没有说收到。'))
            self.note_change()
            if self.staying and not self.others:
                trainer.do_signal(self.staying)

    def check(self) -> None:
        """Tell who has not been heard for long: the watching thread calls it every second."""
        with self.guard:
            for other in list(self.others.values()):
                if time.monotonic() - other.heard > LOST:
                    if other.line:
                        other.line.cut()
                    self.leave(other, f'断开 {LOST} 秒了，连上以后接着说')
        if self.path and not os.path.lexists(self.path):  # as at the end of a user's last session
            with contextlib.suppress(OSError):
                if ours := self.meet(type(itchat.instance)):
                    ours.close()

    def note_change(self) -> None:
        """Share the account's limits among those that are there, and tell them who is. Needs the guard."""
        mail.pace = Mail.PACE * (len(self.others) + 1) if self.others else 0
        for other in self.others.values():
            if other.line:
                other.line.send('state', **self.state(other))

    # -- what the chat says

    def names(self) -> set:
        """Return how a message may name a program; nothing while there has only been one."""
        with self.guard:
            return {self.name, *self.others, *self.left.values()} if self.others or self.left else set()

    def signature(self) -> str:
        """Return what stands in brackets before what this program says; '' if there is only one."""
        return self.name if self.others else ''

    def hand_out(self, number: str, person: Person, parts: dict, old: bool, typed: bool) -> None:
        """Have what share_out() returns carried out, by each program what is for it.

        What is old, or was typed in this one's terminal, is for this one.
        """
        shares, answers = {}, []
        with self.guard:
            for to, text in parts.items():
                here = old or typed and not to
                targets = [self.name] if here else self.targets(person, to, text)
                answers += [self.ask_back(to, text)] * (not targets)
                for name in targets:
                    shares[name] = f'{shares[name]}\n{text}' if name in shares else text
            own = shares.pop(self.name, '')
            for name, text in shares.items():
                self.others[name].errands[number] = person, text
                self.others[name].person = person.key
                self.deliver(self.others[name], number)
        if self.staying and own and None not in parts:
            own, answers = '', [*answers, f'{self.name} 的训练结束了，它只替别的程序传话。']
        if answers or not own:
            mail.put(*((person, answer) for answer in answers), also=[note_message(number)] * (not own))
        if own:
            trainer.accept(Order(number, person, own, typed=typed), parse(own), old)

    def targets(self, person: Person, to: Optional[str], text: str) -> list:
        """Return the names of the programs that a part of a message is for; none: ask. Needs the guard."""
        present, last = [self.name, *self.others], self.spoken.get(person)
        if to is None:  # 程序, 允许
            return [self.name]
        if to == ALL:
            self.spoken.pop(person, None)
            return present
        if to:
            self.spoken.update({person: to} if to in present else {})
            return [to] if to in present else []
        if last in present or last is None and len(present) == 1:
            return [last or self.name]
        everybody = {said.word for said in parse(text).commands} <= {'status', 'runs', 'params', 'help'}
        return present if everybody else []

    def ask_back(self, to: str, text: str) -> str:
        """Return the answer to a command that is for nobody. Needs the guard."""
        gone = f'{to} 不在了，' if to else ''
        names = '、'.join([self.name, *self.others])
        text = text.split('\n')[0][:20]
        return f'{gone}“{text}”没有执行。要哪一个？{names}：例如“{self.name} {text}”，或“{ALL} {text}”。'

    def deliver(self, other: Other, number: str) -> None:
        """Give another program its part of a message; without a line it waits for that. Needs the guard."""
        if other.line:
            person, text = other.errands[number]
            other.line.send('state', **self.state(other))  # the person may be new
            other.line.send('order', id=number, text=text, user_name=person.user_name)

    def listed(self) -> str:
        """Return what there is to say of each program, in lines."""
        with self.guard:
            others = [(o.name, o.host, o.facts, time.monotonic() - o.heard) for o in self.others.values()]
        lines = []
        for name, host, facts, unheard in [(self.name, socket.gethostname(), trainer.facts(), 0), *others]:
            line = f'{name}（主机 {host}）：{facts.get("what", "")}，{facts.get("far", "还没有回音")}'
            if unheard > 3:
                line += f'，{duration(unheard)}没有回音'
            elif facts.get('silent'):
                line += f'，最近的动静在 {duration(facts["silent"] + unheard)}前'
            lines.append(line)
        return '\n'.join(lines)

    # -- when it ends

    def stays_for_others(self, number: int, later: bool) -> bool:
        """Return whether a signal ends the training alone, not yet the login: others speak through it.

        Called in the handler of the signal: it must not wait for a lock.
        """
        if self.staying:
            return not later and not trainer.signal
        if self.others and trainer.session:
            self.staying = number
            threading.Thread(target=self.stay, daemon=True).start()
        return bool(self.staying)

    def stay(self) -> None:
        """End the training; the login stays: a thread."""
        names = '、'.join(map(visible, list(self.others)))
        say(f'{names} 还用着这个微信：训练停下，登录留着。再按一次 Ctrl-C 才结束，它们会自己登录。')
        countdown.cancel()
        trainer.end(stop=True)


class Joined(Client):
    """The login of another program in WeChat's place: what is said and heard goes through that one.

    The main thread waits for what concerns the login itself; one listens to the other program, one tells it
    every second how far this one is. The mail's threads call send_msg() and send_image().
    """

    def __init__(self, carrier: type, ours: socket.socket, path: str = ''):
        super().__init__()
        self.carrier, self.path = carrier, path  # what logs in if need be; of --chat
        self.first = ours
        self.line, self.turn, self.id = None, 0, os.urandom(8).hex()
        self.state = {}  # what the other one has told, see Programs.state()
        self.news = queue.SimpleQueue()  # for the main thread: 'in', 'gone', 'another account'
        self.heard = 0.0  # when the other one was heard last, by time.monotonic()
        self.lost = False  # has it been told that it is lost?
        self.failures = 0  # connections in a row that have come to nothing
        self.calls, self.numbers = {}, itertools.count()  # number of what is sent -> where its answer goes

    def auto_login(self, **how: Any) -> None:
        """Begin, and wait until the other one is logged in; log in instead of it if it ends before."""
        self.begin()
        self.how, joined = how, True
        with contextlib.suppress(SystemExit), self.waiting(), waiting_for('在等另一个程序登录'):
            self.join(self.first)
            while joined and not self.state.get('account'):
                joined = self.attend()
        if self.exit_signal is not None:
            self.end()
        if not joined:
            return self.succeed()
        say(f'合用 {visible(self.state["chat"])} 的微信，这个程序在那里叫 {visible(self.state["name"])}。')
        if options.supervisor:
            say('--supervisor 不算：谁可以下命令，由有登录的程序决定。')
        if 'loginCallback' in how.get('callbacks', ()):
            trainer.line.send('call_back', name='loginCallback', how={})

    def run(self) -> None:
        """Speak through the other one until a signal comes; log in when that one is gone."""
        self.hear_terminal()
        joined = True
        with contextlib.suppress(SystemExit):
            while joined and self.exit_signal is None:
                joined = self.attend()
        if joined:
            self.end()
        self.succeed()
        itchat.instance.run()

    def succeed(self) -> None:
        """Log in in the place of the one that is gone, with its stored session first."""
        client = self.carrier()
        client.folder_lock, client.exit_signal = self.folder_lock, self.exit_signal
        client.hears_terminal = self.hears_terminal
        client.take_signals()
        session = self.state.get('session')
        use_client(client)
        client.auto_login(**{**self.how, **({'statusStorageDir': session} if session else {})})

    def attend(self) -> bool:
        """Wait for news, and do what they ask for; return False when this program is to log in itself."""
        with self.waiting():
            news = self.news.get()
        if news == 'another account':
            say('这个文件夹以前用的是另一个微信账号：自己登录。')
            return False
        return news == 'in' or self.meet_again()

    def meet_again(self) -> bool:
        """Reach the other one again, or the one that has the login now; return False if nobody has it."""
        mail.set_online(False)
        while True:
            if self.failures and not self.path or self.failures > 1:
                self.pause(min(self.failures, 4))
            self.failures += 1
            if not self.lost and time.monotonic() - self.heard > LOST:
                self.lost = True
                say(f'和有登录的程序断开 {LOST} 秒了，训练不受影响；连上以后接着说。')
            with contextlib.suppress(OSError), programs.guard:  # who comes then waits until it is taken over
                ours = connect(self.path) if self.path else programs.meet(self.carrier)
                if ours is None:
                    programs.take_over(self.state)
                    return False
                self.join(ours)
                return True

    def join(self, ours: socket.socket) -> None:
        """Begin to speak on a connection."""
        self.line = line = Line(ours.detach(), waits=False)
        self.turn += 1
        self.heard = self.heard or time.monotonic()
        threading.Thread(target=self.listen, args=(line,), daemon=True).start()
        threading.Thread(target=self.beat, args=(line,), daemon=True).start()

    def beat(self, line: Line) -> None:
        """Tell every second how far this program is, as long as the other one answers: a thread."""
        never, since = threading.Event(), time.monotonic()
        name = self.state.get('name') or programs.name
        about = {'id': self.id, 'turn': self.turn, 'name': name, 'host': socket.gethostname()}
        while self.line is line:
            line.send('beat', **about, pid=os.getpid(), **trainer.facts())
            never.wait(1)
            if time.monotonic() - max(since, self.heard) > LOST:
                line.cut()

    def listen(self, line: Line) -> None:
        """Do what the other one says until its end: a thread."""
        with contextlib.suppress(ValueError, RecursionError):  # of what is no JSON
            while (message := line.receive(most=MOST)) is not None:
                self.heard = time.monotonic()
                try:
                    getattr(self, 'do_' + message.pop('do'))(**message)
                except Exception:
                    print_traceback()
        self.line = None  # before the answers: who sends from now on sees it
        line.cut()
        line.close()
        for answers in list(self.calls.values()):
            answers.put((-1, ''))
        self.news.put('gone')

    def do_state(self, **state: Any) -> None:
        """The other one tells who may command, and whether it is logged in."""
        if self.lost:
            say('又连上了。')
        if self.state.get('chat', state['chat']) != state['chat']:
            say(visible(f'{self.state["chat"]} 没有了，训练不受影响；现在合用 {state["chat"]} 的微信。'))
        self.lost, self.failures = False, 0
        account, known = state['account'], memory.get('account')
        if account and known and not set(account) & set(known):
            self.line.cut()
            return self.news.put('another account')
        if account:
            if not known:
                memory.write(set_setting('account', account))
            if state['owner'] and not memory.get('owner'):  # as People.permit() has it
                memory.write(set_setting('owner', True))
            people.believe(state['people'])
            mail.pace = Mail.PACE * (len(state['programs']) + 1)
            if not self.state.get('account'):
                self.news.put('in')
            if mail.online != state['online']:
                mail.set_online(state['online'])
        self.state = {**self.state, **state}

    def do_order(self, id: str, text: str, user_name: str) -> None:
        """A message is for this program, of somebody who may command: the other one has decided that."""
        person, parsed = people.known[user_name], parse(text)
        if trainer.ending:
            return
        if parsed and not memory.rows('SELECT 1 FROM message WHERE id = ?', id):
            self.log(f'{visible(person.name)}：{visible(text)}')
            trainer.accept(Order(id, person, text), parsed, False)
        self.line.send('taken', id=id)

    def do_sent(self, n: int, ret: Any, number: str) -> None:
        """The answer to ask()."""
        self.calls.pop(n).put((ret, number))

    def ask(self, **message: str) -> ReturnValue:
        """Have the other one send something; return what has become of that."""
        n, answers = next(self.numbers), queue.SimpleQueue()
        self.calls[n] = answers
        line = self.line
        if line:
            line.send('send', n=n, **message)
        ret, number = answers.get() if line else (-1, '')
        self.calls.pop(n, None)
        return ReturnValue({'BaseResponse': {'Ret': ret, 'ErrMsg': ''}, 'MsgID': number})

    def send_msg(self, msg: str = '', toUserName: Optional[str] = None) -> dict:
        """Have a text sent, of a million characters at most."""
        return self.ask(to=toUserName, text=str(msg)[: 10**6])

    def send_image(self, fileDir: Optional[str] = None, toUserName: Optional[str] = None, *args) -> dict:
        """Have a picture sent: its path, its bytes to another machine, a text where these are too many."""
        path = os.path.abspath(fileDir)
        if self.state.get('local'):
            return self.ask(to=toUserName, path=path)
        with open(path, 'rb') as f:
            content = base64.b64encode(f.read(MOST)).decode()
        if len(content) > MOST - 1000:
            return self.send_msg(Letter(path, 'picture').text(), toUserName)
        return self.ask(to=toUserName, content=content)

    def end(self) -> None:
        """End the program, and say so to the other one."""
        try:
            super().end()
        finally:
            if self.line:
                self.line.send('bye')
                self.line.close()


# ------------------------------------------------------------------------------ the training process


class Order(NamedTuple):
    """A command that is to be carried out by the training process."""

    id: str  # of the message
    person: Person
    text: str
    path: str = ''  # to go on from this checkpoint, without an answer if that works
    typed: bool = False  # beside a chat: to be answered in the terminal
    known: Any = None  # of 排队: in Trainer.known()'s place; all who hear of its runs get the answer

    def words(self) -> dict:
        """Return what the training process is told, with what the memory knows of the runs asked for."""
        parsed = parse(self.text)
        commands = [
            {**said._asdict(), 'known': trainer.known(said) if self.known is None else self.known}
            for said in parsed.commands
        ]
        who = {'person': self.person.key, 'name': self.person.name}
        return {'id': self.id, **who, 'commands': commands, 'almost': parsed.almost, 'path': self.path}


class Queue:
    """What 排队 has said: runs that begin by themselves, each when the one before is over.

    Part of Trainer, and guarded as it is; what statement() remembers outlives the program.
    """

    MOST, SHOWN = 50, 10  # waiting runs; lines that a phone's screen has room for
    QUICK = 60  # seconds: two runs in a row that end by an error within them stop it
    TRIES = 1  # so often a run without a checkpoint is begun again: fewer deaths than Trainer.DEATHS

    def __init__(self):
        self.waiting = []  # dicts: number, person (a key), values of a run's own, tries
        self.current = None  # the one that was begun, and its 'run', the number in 记录, once that is known
        self.done = []  # those that are over
        self.errors = 0  # in a row

    def statement(self) -> tuple:
        """Return the statement that remembers it."""
        return set_setting('queue', vars(self))

    def add(self, runs: list, person: Person) -> str:
        """Let runs wait, each [(name, text)]; return the answer. Changes nothing when a value is wrong."""
        try:
            runs = [{name: read_value(name, text) for name, text in pairs} for pairs in runs]
        except ValueError as error:
            return str(error)
        if len(self.waiting) + len(runs) > self.MOST:
            return f'没有排：最多排 {self.MOST} 次。'
        for values in runs:
            item = {'number': self.last() + 1, 'person': person.key, 'values': values, 'tries': 0}
            self.waiting.append(item)
        return f'好，排了 {len(runs)} 次，一次结束就开始下一次。\n{self.text()}'

    def last(self) -> int:
        """Return the number of the last one."""
        return max((item['number'] for item in (*self.done, *self.waiting, self.current) if item), default=0)

    def clear(self) -> str:
        """Let nothing wait any more; return the answer."""
        count, self.waiting = len(self.waiting), []
        return f'好，排着的 {count} 次不做了。' if count else '没有排着的。'

    def text(self) -> str:
        """Return what waits, and what is being done."""
        lines = [f'正在做：{item_words(self.current)}'] if self.current else []
        lines += [f'排着：{item_words(item)}' for item in self.waiting[: self.SHOWN]]
        more = len(self.waiting) - self.SHOWN
        lines += [f'……还有 {more} 次'] * (more > 0)
        return '\n'.join(lines) or '没有排着的。例如 排队 lr 0.1, 0.05 排两次。'

    def at_stop(self, said: Said) -> str:
        """Return what 停止 is to say of it besides."""
        if said.more or not self.waiting:
            return '排队也清空了。' if said.more else ''
        which = f'只停这一次，还是连排队一起？排着的 {len(self.waiting)} 次会接着做'
        return f'{which}；发“停止 全部”，它们就都不做了。'

    def is_interrupted(self, run: dict) -> bool:
        """Return whether the current one is to be taken up again; `run`: what is known of the last run."""
        if self.current['tries'] >= self.TRIES or self.current['run'] not in (None, run.get('number')):
            return False
        cut_off = run.get('ending') in (Ending.STOPPED.value, Ending.BROKEN.value) and not run.get('stopping')
        return self.current['run'] is None or cut_off  # not by a person

    def took(self, run: dict) -> None:
        """The current one was begun, as `run`; or not, because a person's came first: then it waits again."""
        if run:
            self.current['run'] = run['number']
        else:
            self.current = self.waiting.insert(0, self.current)

    def finish(self, run: dict) -> None:
        """The current one is over, `run` being what is known of it."""
        by_error = run.get('ending') in (Ending.ERROR.value, Ending.BROKEN.value)
        quick = (run.get('ended') or 0) - (run.get('begun') or 0) < self.QUICK
        self.errors = self.errors + 1 if by_error and quick else 0
        self.done.append(self.current)
        self.current = None

    def table(self) -> tuple:
        """Return the text at the end, and [folder, words] of each run that can be drawn; forget all."""
        runs = {run['number']: run for run in known_runs()}
        done = [(item_words(item), runs.get(item['run'], {})) for item in self.done]
        lines = [f'{words}：{outcome(run)}' for words, run in done]
        best = best_places([run for _, run in done])
        kept = sorted(range(len(lines)), key=lambda place: (place in best, merit(done[place][1])))
        kept = sorted(kept[-self.SHOWN :])
        head = f'排队的 {len(lines)} 次做完了'
        if self.errors > 1 and self.waiting:
            head = f'连着两次一分钟内就出错，排队停了，还排着的 {len(self.waiting)} 次不做了'
        head += f'；最好的 {self.SHOWN} 次：' * (len(kept) < len(lines))
        drawn = [
            (run.get('folder'), words) for words, run in map(done.__getitem__, kept) if run.get('epochs')
        ]
        drawn = [pair for pair in drawn if pair[0]]
        self.__init__()
        return '\n'.join([head, *(lines[place] + ' ★' * (place in best) for place in kept)]), drawn


def item_words(item: dict) -> str:
    """Return a run of 排队 in words: its number and its values."""
    shorts = {long: short for short, long in reversed(NAMES.items())}
    return ' '.join([f'{item["number"]}.', *(f'{shorts.get(k, k)} {v:g}' for k, v in item['values'].items())])


class Rules:
    """What 提醒 has said: which numbers of an epoch are to be told. Part of Trainer, and guarded as it is."""

    MOST = 10

    def __init__(self):
        self.rules = []  # dicts: rule (name, sign, number), person (a key), told (number of a run, epoch)

    def statement(self) -> tuple:
        """Return the statement that remembers them."""
        return set_setting('rules', self.rules)

    def add(self, rule: list, person: Person, row: dict) -> str:
        """Add a rule; return the answer. `row` are the numbers of the last epoch, by name."""
        others = [each for each in self.rules if each['rule'] != rule]
        if len(others) >= self.MOST:
            return f'没有记下：最多 {self.MOST} 条，“提醒 清空”以后再写。'
        self.rules = [*others, {'rule': rule, 'person': person.key, 'told': None}]
        text = f'好，哪一轮 {rule_words(rule)} 了，就说一次。'
        return text + f'注意：上一轮没有叫 {rule[0]} 的数。' * bool(row and value_in(row, rule[0]) is None)

    def clear(self) -> str:
        """Forget all; return the answer."""
        self.rules = []
        return '好，没有提醒了。'

    def text(self) -> str:
        """Return all of them."""
        told = (f'（第 {rule["told"][1]} 轮说过了）' if rule['told'] else '' for rule in self.rules)
        lines = [f'{rule_words(rule["rule"])}{note}' for rule, note in zip(self.rules, told)]
        return '\n'.join(lines) or '没有提醒。例如 提醒 test_acc > 0.9。'

    def come_true(self, run: dict) -> list:
        """Return (person, text) for each that has come true in the last epoch of a run; once in a run."""
        found, epoch = [], run['row']['epoch']
        for each in self.rules:
            (name, sign, number), told = each['rule'], each['told'] or [None]
            value = value_in(run['row'], name)
            if value is not None and told[0] != run.get('number') and SIGNS[sign](value, number):
                each['told'] = [run.get('number'), epoch]
                text = f'第 {epoch} 轮提醒：{rule_words(each["rule"])}，是 {value:.6g}'
                found.append((people.by_key.get(each['person'], OWNER), text))
        return found


def rule_words(rule: list) -> str:
    """Return a rule in words."""
    return f'{rule[0]} {rule[1]} {rule[2]:g}'


def value_in(row: dict, name: str) -> Optional[float]:
    """Return one of the numbers of an epoch; phones write a capital where none is meant."""
    alike = [value for key, value in row.items() if key.lower() == name.lower()]
    return row.get(name, [*alike, None][0])


class State(enum.Enum):
    """Of the training process, as the talking one sees it. Changed by Trainer alone:

    GONE -> STARTING -> READY -> GONE, by start(), by its itchat.run(), by its end.
    """

    STARTING, READY, GONE = range(3)


class Trainer:
    """The training process: hands it commands, hears what becomes of them, tells its death, starts it again.

    A thread listens to each such process until its end; the main thread brings the messages. `guard` guards
    everything and is told of every change.
    """

    PATIENCE = 10  # seconds to end, when asked to, or to answer a command before that is told
    DEATHS = 3  # in a row, without progress in between: then it is not started by itself any more

    def __init__(self):
        self.guard = threading.Condition(threading.RLock())
        self.state = State.GONE
        self.process, self.line, self.status = None, None, 0  # the last: what the program exits with
        self.requests = queue.SimpleQueue()  # the first login, the first run(): for the main thread
        self.orders = {}  # id -> Order: not answered yet, in order
        self.sent = {}  # id -> when it was given to the training process
        self.unheard = {}  # Person -> the last commands that changed something, the keys of their answers
        self.run = {}  # what is known of the last run: number, person, ending, folder, checkpoint, how_far
        self.queue, self.rules = Queue(), Rules()
        self.told = {}  # what it has said when it called run(): handlers, values
        self.session = self.ending = self.restarting = False  # session: has the main thread logged in?
        self.asked = False  # has it called auto_login()?
        self.deaths, self.saved, self.progress = 0, False, False  # the last two: since its start
        self.why, self.bye, self.again = '', None, False  # what it has said about its end
        self.gone = None  # since when, when an earlier program was gone
        self.silent = False  # was it told that no batch gets done?
        self.signal = 0  # that has come to the training process, where that is the one the shell started
        self.downloads = collections.OrderedDict()  # MsgId -> itchat's function that fetches the file
        self.calls = concurrent.futures.ThreadPoolExecutor(4, 'calls')  # of itchat's functions

    # -- the process

    def begin(self) -> None:
        """Remember the last run and what was not answered: of an earlier program in this folder."""
        own_params.update(memory.get('own_params', {}))
        look_for_runs()
        self.run = {**self.run, **next(iter(known_runs(1)), {})}
        vars(self.queue).update(memory.get('queue', {}))
        self.rules.rules = memory.get('rules', [])
        self.gone = memory.get('alive')
        output.read(memory.get('output'))
        memory.write(set_setting('alive', time.time()))
        sql = 'SELECT id, person, text, written FROM message WHERE waiting ORDER BY rowid'
        for number, key, text, written in memory.rows(sql):
            order = Order(number, people.by_key.get(key, OWNER), text)
            if time.time() - written > 600 or not parse(text).commands:
                mail.put((order.person, too_old(text)), also=[done(number)])
            else:
                self.orders[number] = order
        threading.Thread(target=self.watch, name='watch', daemon=True).start()

    def start(self, process: Any = None, ours: Optional[socket.socket] = None) -> None:
        """Start the process, or take over the one that is there. Needs the guard."""
        if ours is None:
            place.write(*[0] * 8)
            process, ours = start_training(place_file)
        self.process, self.line = process, Line(ours.detach(), waits=False)
        self.state, self.why, self.bye = State.STARTING, '', None
        self.saved = self.progress = self.silent = False
        self.sent.clear()
        threading.Thread(target=self.listen, args=(process, self.line), daemon=True).start()

    def listen(self, process: Any, line: Line) -> None:
        """Do what the training process says until its end: a thread of its own."""
        oom, last_words, readers = oom_kills(), collections.deque(maxlen=50), []
        others, result = (), []
        if process is not None:
            read, write = os.pipe()
            waiter = threading.Thread(target=wait_for_end, args=(process, result, write), daemon=True)
            waiter.start()
            others = (read,)
            for number, stream in ((1, process.stdout), (2, process.stderr)):
                arguments = number, stream.fileno(), last_words
                readers.append(threading.Thread(target=copy_output, args=arguments, daemon=True))
                readers[-1].start()
        while (message := line.receive(*others)) is not None:
            try:
                getattr(self, 'do_' + message.pop('do'))(**message)
            except Exception:
                print_traceback()
        if process is not None:
            self.collect(process, waiter, readers)
            os.close(read)
        line.close()
        status, megabytes = result or (0, 0)
        by_system = status == -signal.SIGKILL and oom_kills() != oom
        self.is_over(status, megabytes if by_system else 0, last_words)
        for reader, stream in zip(readers, (process and process.stdout, process and process.stderr)):
            if not reader.is_alive():
                stream.close()

    def collect(self, process: Any, waiter: threading.Thread, readers: list) -> None:
        """Wait for the end of a process that has closed the line, and end all that it has left running."""
        waiter.join(self.PATIENCE)
        if self.bye is None or waiter.is_alive():
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        waiter.join()
        for reader in readers:
            reader.join(0.3)  # something that has left the group may hold the stream

    def is_over(self, status: int, megabytes: float, last_words: Iterable) -> None:
        """The process has ended: with a word of good-bye, before it began, or by a death."""
        with self.guard:
            was, self.state = self.state, State.GONE
            if was is State.GONE:
                return
            killed = status < 0 and self.asked and not self.ending and self.deaths + 1 < self.DEATHS
            early = was is State.STARTING and not self.told  # it never got as far as run()
            if early and killed and not self.session:
                self.deaths += 1
                self.start()  # while somebody looks for a phone
            elif early and not killed:
                self.status = status if status >= 0 else 128 - status
                self.requests.put(None)
            elif was is State.STARTING and self.ending:
                pass  # it was asked to before it could say anything
            elif self.bye is not None and (self.ending or not self.restarting):
                self.status = self.bye
                if self.again and not self.ending:
                    self.start()
            else:
                self.tell_death(was, status, megabytes, last_words)
            self.restarting = False
            self.guard.notify_all()

    def tell_death(self, was: State, status: int, megabytes: float, last_words: Iterable) -> None:
        """Tell what has happened and what follows; start the process again. Needs the guard."""
        asked, going = self.restarting, self.is_busy()
        if not asked:
            self.deaths = 1 if self.progress else self.deaths + 1
        cannot_start = was is State.STARTING and status > 0 and not self.why and not asked
        lines = [f'训练的进程没有了：{self.cause(status, megabytes)}（主机 {socket.gethostname()}）']
        if cannot_start:
            words = [line for line in last_words if line.strip()]
            lines = [f'训练的程序启动不了（主机 {socket.gethostname()}）：{words[-1] if words else status}']
        if going:
            lines += self.where()
        again = not self.ending and self.process is not None and not cannot_start
        again = again and (asked or self.deaths < self.DEATHS or isinstance(itchat.instance, Silent))
        kept = (self.saved or asked) and self.run.get('checkpoint')
        resumes = bool(again and going and kept and not self.run.get('stopping'))
        lines += self.what_follows(again, resumes, cannot_start)
        statements = self.refuse_orders(cannot_start)
        if going and not resumes:
            self.run.update(ending=Ending.BROKEN.value, ended=time.time())
            statements.append(self.run_row())
            self.keep_output()
        text = '\n'.join(lines)
        audience = people.audience(self.run.get('person') if going else None, owner=True)
        mail.put(*((person, text) for person in audience), also=statements)
        if not isinstance(itchat.instance, Terminal):
            say(text)
        if self.ending:
            self.status = 1
        if resumes:
            person = people.by_key.get(self.run['person'], OWNER)
            order = Order(f'resume {time.time_ns()}', person, '继续', self.run['checkpoint'])
            self.orders = {order.id: order, **self.orders}
        if again:
            self.start()
        elif self.process is None:  # there is nothing left to talk for
            self.do_signal(signal.SIGTERM)

    def where(self) -> list:
        """Return where the run was and what is kept of it, in lines. Needs the guard."""
        at = place.read()
        lines = ['那时' + so_far(at)] if at['phase'] else []
        if self.run.get('checkpoint'):
            lines.append(f'检查点在 {shown(self.run["checkpoint"])}（{self.run["kept"]}）')
        return lines

    def what_follows(self, again: bool, resumes: bool, cannot_start: bool) -> list:
        """Return what happens next, in lines. Needs the guard."""
        kept = self.run.get('checkpoint')
        words = '发“继续”接着训练，或发“开始”从头训练' if kept else '发“开始”就从头训练'
        if resumes:
            return ['程序正在重新启动它，起来以后自己从检查点接着训练，不用扫码。']
        if again and self.queue.current:
            return ['程序正在重新启动它，起来以后自己接着做排队的训练，不用扫码。']
        if again:
            return [f'程序正在重新启动它，不用扫码；{words}。']
        if self.ending or self.process is None:
            return ['程序结束。']
        times = '改好以后' if cannot_start else f'连着 {self.deaths} 次这样了，不再自己启动'
        return [f'{times}，{words}。']

    def cause(self, status: int, megabytes: float) -> str:
        """Return in words why the process has ended. Needs the guard."""
        if self.restarting:
            return '照“重启”结束了' if self.bye is not None else '不理“重启”，强行结束了'
        if self.why or megabytes:
            return self.why or f'内存不够，被系统杀掉了，它用到了 {megabytes:.0f} MB'
        if status < 0:
            with contextlib.suppress(ValueError):
                return f'被信号 {signal.Signals(-status).name} 结束了'
        return f'自己退出了，退出状态 {status}' if self.process else '没有说再见'

    def refuse_orders(self, all_of_them: bool) -> list:
        """Answer those that cannot be carried out; return what to remember. Needs the guard.

        One that was being carried out at two deaths has caused them.
        """
        statements = []
        for number in list(self.orders):
            tries = [0]
            if number in self.sent:
                statements.append(('UPDATE message SET tries = tries + 1 WHERE id = ?', number))
                tries = [row[0] for row in memory.rows('SELECT tries FROM message WHERE id = ?', number)]
            if all_of_them or tries >= [1]:
                order = self.orders.pop(number)
                why = '启动不了' if all_of_them else '没有了'
                text = f'“{order.text.strip()[:20]}”没有执行：训练的进程{why}。'
                self.reply(order, [text] * (not order.path), [done(number)])
        return statements

    def kill(self) -> None:
        """End the process at once."""
        if self.process is not None and self.state is not State.GONE:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, stop: bool) -> None:
        """Let the process end, after `stop`ping its run or when that is over; wait for that."""
        with self.guard:
            if not stop:
                self.guard.wait_for(lambda: self.state is State.GONE or not (self.is_queued() or self.asks()))
            self.ending = True
            if self.state is not State.GONE:
                self.line.send('end', stop=stop)
            self.guard.wait_for(lambda: self.state is State.GONE)

    def dismiss(self, status: int) -> None:
        """The program ends with `status`: so does the process that trains."""
        with self.guard:
            self.ending = True
            if self.state is not State.GONE:
                self.line.send('exit', status=status)
                if not self.guard.wait_for(lambda: self.state is State.GONE, self.PATIENCE):
                    self.kill()

    def wait_gone(self) -> None:
        """Wait for the end of the process that is not followed by another one."""
        with self.guard:
            self.guard.wait_for(lambda: self.state is State.GONE)

    def is_busy(self) -> bool:
        """Return whether a run is going on."""
        with self.guard:
            return bool(self.run) and self.run.get('ending') is None

    # -- what comes from the chat

    def take(self, msg: dict) -> bool:
        """Take in a message that was received: accept a command, hand on what the script has handlers for.

        Return False when it was neither.
        """
        chat = {templates.MassivePlatform: 'MpChat', templates.Chatroom: 'GroupChat'}
        chat = chat.get(type(msg['User']), 'FriendChat')
        is_text = msg['Type'] == itchat.content.TEXT and chat == 'FriendChat'
        if is_text and self.told.get('commands') and self.hear(msg):
            return True
        if msg['Type'] not in self.told.get('handlers', {}).get(chat, ()):
            return False
        if callable(msg.get('Text')):
            self.downloads[msg['MsgId']] = msg['Text']
            if len(self.downloads) > 100:
                self.downloads.popitem(last=False)
        msg = {**msg, 'User': dict(msg['User'])}
        if self.line.waiting.qsize() <= 1000:  # else it does not read, and these are not commands
            self.line.send('message', chat=chat, msg={k: v for k, v in msg.items() if not callable(v)})
        return True

    def hear(self, msg: dict) -> bool:
        """Accept a command; return False when a message is none, or nobody's who could command."""
        parsed, parts = share_out(msg['Text'], programs.names())
        person = people.writer(msg) if parsed else None
        if person is None or any(said.word == 'allow' for said in parsed.commands) and person is not OWNER:
            return False
        if not parsed.complete and not people.may_command(person):
            return True  # a friend's small talk that looks like one
        name, text, old = visible(person.name), msg['Text'].strip(), itchat.instance.is_old(msg)
        if 'Typed' not in msg:
            itchat.instance.log(f'{name}：{visible(text)}')
        if memory.rows('SELECT 1 FROM message WHERE id = ?', msg['MsgId']):
            return True  # the server sends it again
        if not people.permit(person, text, old):
            itchat.instance.log(f'{name} 不能下命令')
            return True
        programs.hand_out(msg['MsgId'], person, parts, old, 'Typed' in msg)
        return True

    def accept(self, order: Order, parsed: Parsed, old: bool) -> None:
        """Answer a command of somebody who may give it, or have it carried out."""
        sql = 'INSERT INTO message (id, person, text, written, tries, waiting) VALUES (?, ?, ?, ?, 0, ?)'
        row = sql, order.id, order.person.key, order.text, time.time()
        with self.guard:
            answer = too_old(order.text) if old else self.repeated(order, parsed)
            if not answer and len(parsed.commands) + bool(parsed.almost) == 1:
                said = [*parsed.commands, None][0]
                answer = self.own_answer(said, order.person) if said else explain(parsed.almost)
            if not answer and any(said.more == '全部' for said in parsed.commands):
                self.queue.clear()
            also = self.queue.statement(), self.rules.statement()
            if answer:
                self.reply(order, [answer], [(*row, 0), *also])
                self.move_on()
            else:
                memory.write((*row, 1), *also, *forget_messages())
                self.orders[order.id] = order
                if self.state is State.READY:
                    self.hand_over(order)
            if (not answer or self.queue.waiting) and self.state is State.GONE and not self.ending:
                self.start()

    def reply(self, order: Order, letters: Iterable, statements: Iterable) -> list:
        """Answer a command with texts or Letters, where it came from; return the keys of what the mail takes.

        The statements for the memory are executed with it.
        """
        if not order.typed:
            return mail.put(*((order.person, letter) for letter in letters), also=statements)
        memory.write(*statements)
        for letter in letters:
            print_line(f'{printed_letter(letter)}\n')
        return []

    def repeated(self, order: Order, parsed: Parsed) -> str:
        """Return what to say to a command that was only repeated because no answer came, else ''.

        It is one when it is the last that has changed something, and its answer is still waiting to be sent.
        To stop twice harms nobody.
        """
        said = commands_of(order.text)
        before, keys = self.unheard.get(order.person, (None, ()))
        if said == before and mail.is_stuck(order.person, keys) and all(word != 'stop' for word, *_ in said):
            return f'“{order.text.strip()[:20]}”已经做过一次了，那时没能回答；没有再做。'
        if not all(word in SHOWING or word in LISTING and not more for word, _, _, more in said):
            self.unheard[order.person] = said, ()  # its answer has no key yet
        return ''

    def own_answer(self, said: Said, person: Person) -> str:
        """Return the answer to a command that the talking process carries out itself, else ''.

        That is what the training process cannot do while it is not there. Needs the guard.
        """
        if said.word == 'cancel':
            return '好，不执行了。' if countdown.cancel() else '没有要取消的。'
        if said.word == 'restart':
            return self.restart()
        if said.word == 'allow':
            return people.allow(*said.values)
        if said.word in LISTING:
            what = {'queue': self.queue, 'remind': self.rules}[said.word]
            row = [self.run.get('row', {})] * (what is self.rules)
            if said.more in (None, '清空'):
                return what.clear() if said.more else what.text()
            return what.add(said.more, person, *row)
        if said.word == 'programs':
            return programs.listed()
        if said.word == 'status' and self.state is not State.READY:
            return self.status_without_it()
        if said.word in ('runs', 'log'):
            return self.known(said)
        if said.word == 'plot' and said.number and not folder_of_run(said.number):
            return f'记录里只有 {len(listed_runs())} 次训练。'
        if self.state is State.GONE and said.word in ('params', 'help'):
            return self.values() if said.word == 'params' else help_text()
        return ''

    def known(self, said: Said) -> Any:
        """Return what the training process is told with a command, as JSON. Needs the guard."""
        if said.word in ('stop', 'rollback'):
            return self.queue.at_stop(said)
        if said.word == 'start':
            return {'name': said.more or ''}
        if said.word == 'compare':
            runs = enumerate(listed_runs()[:8], 1)
            return {'runs': [[run['folder'], f'{i}. {run_words(run)}'] for i, run in runs]}
        if said.word == 'plot':
            run = next(iter(listed_runs()[(said.number or 1) - 1 :]), None)
            return [run['folder'], run.get('name', '')] if run else ''
        if said.word == 'mistakes':
            return folder_of_run(1)
        if said.word == 'status':
            return [last_run_text(self.run), machine.text]
        if said.word == 'log':
            return self.log_text(said.number)
        return runs_text() if said.word == 'runs' else ''

    def log_text(self, number: Optional[int]) -> str:
        """Return what 日志 says: after an error, the whole of that. Needs the guard."""
        if self.process is None:
            return '这样启动的程序，打印的都在它自己那里，没有日志。'
        return output.text(number or 20, self.run.get('ending') in WRONG or self.state is State.GONE)

    def move_on(self) -> None:
        """Begin the next run of 排队, take up the one that was interrupted, or tell what came of all of them.

        That is, if nothing is going on or is to be answered. Needs the guard.
        """
        queue, busy = self.queue, self.is_busy() or self.ending or self.restarting
        if self.state is not State.READY or busy or self.asks():
            return
        if queue.current and queue.is_interrupted(self.run):
            queue.current['tries'] += 1
        else:
            if queue.current:
                queue.finish(self.run)
            if queue.waiting and queue.errors < 2:
                queue.current = {**queue.waiting.pop(0), 'run': None}
            elif queue.done:
                self.end_queue()
                return
        if queue.current:
            self.begin_queued(queue.current)
        self.guard.notify_all()

    def begin_queued(self, item: dict) -> None:
        """Have a run of 排队 begun, or gone on with. Needs the guard."""
        person, number = people.by_key.get(item['person'], OWNER), f'queue {time.time_ns()}'
        which = f'{item["number"]}/{self.queue.last()}'
        path = self.run.get('checkpoint') if item['run'] is not None else None
        if path and os.path.exists(path):
            order = Order(number, person, '继续', path)
            text, audience = f'第 {which} 次排队：从检查点接着训练', people.audience(person.key)
            mail.put(*((each, text) for each in audience), also=[self.queue.statement()])
        else:
            known = {'queued': which, 'values': item['values']}
            order = Order(number, person, '开始', known=known)
            memory.write(self.queue.statement())
        self.orders[order.id] = order
        self.hand_over(order)

    def end_queue(self) -> None:
        """Tell what has come of the runs of 排队, and have their curves drawn. Needs the guard."""
        person = people.by_key.get(self.queue.done[-1]['person'], OWNER)
        text, drawn = self.queue.table()
        audience = people.audience(person.key)
        mail.put(*((each, text) for each in audience), also=[self.queue.statement()])
        if drawn:
            known = {'runs': drawn, 'losses': True}
            order = Order(f'queue {time.time_ns()}', person, '对比', known=known)
            self.orders[order.id] = order
            self.hand_over(order)
        self.guard.notify_all()

    def hand_over(self, order: Order) -> None:
        """Let the training process carry out a command. Needs the guard."""
        self.sent[order.id] = time.monotonic()
        self.line.send('order', **order.words())

    def wait_answered(self, number: str) -> None:
        """Wait until the message with this id is answered, or it is told that it is not."""
        with self.guard:
            done = lambda: number not in self.orders or self.state is State.GONE  # noqa: E731
            self.guard.wait_for(lambda: done() or self.sent.get(number) == math.inf)

    def restart(self) -> str:
        """End the process, by force if it does not want to, and start it again. Needs the guard."""
        if self.process is None:
            return '这个程序的训练进程不能重新启动。'
        if self.state is State.GONE:
            self.deaths = 0
            self.start()
            return '好，正在启动训练的进程。'
        if not self.restarting:
            self.restarting = True
            self.line.send('end', stop=True, pause=True)
            self.kill_later()
        return '好，重新启动训练的进程。'

    def kill_later(self) -> None:
        """End the process by force unless it ends by itself. Needs the guard."""

        def kill(process=self.process):
            with self.guard:
                if self.process is process:
                    self.kill()

        timer = threading.Timer(self.PATIENCE, kill)
        timer.daemon = True
        timer.start()

    def status_without_it(self) -> str:
        """Return where things stand as far as the talking process knows. Needs the guard."""
        starting = self.state is State.STARTING
        lines = [
            '训练的进程' + ('正在启动，命令会等它' if starting else '没有在运行，“开始”或“继续”会启动它')
        ]
        lines.append(last_run_text(self.run))
        if self.run.get('checkpoint'):
            lines.append(f'检查点在 {shown(self.run["checkpoint"])}（{self.run["kept"]}）')
        lines += [self.values(), f'主机 {socket.gethostname()}', machine.text]
        return '\n'.join(filter(None, lines))

    def facts(self) -> dict:
        """Return what 程序 tells of this program: what it runs, how far, how long nothing was done."""
        at, last = place.read(), self.run.get('how_far')
        states = {State.STARTING: '训练的进程正在启动', State.GONE: '训练的进程没有在运行'}
        idle = '空闲' + f'，上次{last}' * bool(last)
        going = Phase.LOADING <= at['phase'] <= Phase.ENDING
        far = states.get(self.state) or (so_far(at) if going else idle)
        silent = time.monotonic() - at['last_step'] if going else 0
        return {'what': os.path.basename(SCRIPT or FOLDER), 'far': far, 'silent': silent}

    def values(self) -> str:
        """Return the three values for the next run, in words."""
        values = values_text(*{**self.told.get('values', {}), **memory.get('values', {})}.values())
        return f'{values}\n{manner_text(memory.get("report_every", 1), memory.get("patience", 0))}'.strip()

    # -- what the training process says

    def do_login(self, given: dict, how: dict) -> None:
        """It calls auto_login(): the first time the main thread logs in, later there is a session."""
        with self.guard:
            vars(options).update(given)
            if self.session:
                self.let_in()
                if 'loginCallback' in how.get('callbacks', ()):
                    self.line.send('call_back', name='loginCallback', how={})
            elif not self.asked:
                self.asked = True
                self.requests.put(how)

    def open_session(self) -> None:
        """The main thread has logged in."""
        with self.guard:
            self.session = True
            self.let_in()
        threading.Thread(target=machine.watch, name='machine', daemon=True).start()

    def let_in(self) -> None:
        """Tell it that there is a session, and what it has to know."""
        names = 'values', 'chosen', 'report_every', 'patience', 'own', 'lent'
        settings = {name: value for name in names if (value := memory.get(name)) is not None}
        folders = [(run['number'], run['folder']) for run in known_runs() if run.get('folder')]
        last = self.run.get('number', 0)
        self.line.send('logged_in', settings=settings, last=last, folders=folders, params=own_params)

    def do_run(self, commands: bool, handlers: dict, values: dict, offer: str, gpu: str = '') -> None:
        """It calls run(): it is ready for commands and messages; what an earlier one left is to be done."""
        with self.guard:
            first, machine.gpu = not self.told, gpu
            self.told = {'commands': commands, 'handlers': handlers, 'values': values}
            self.state = State.READY
            if first:
                self.requests.put({})
                if offer and not (self.is_busy() and isinstance(itchat.instance, Terminal)):
                    say(offer)
                self.tell_return(offer)
            for order in self.orders.values():
                self.hand_over(order)
            self.move_on()
            self.guard.notify_all()

    def tell_return(self, offer: str) -> None:
        """Tell who heard of a run that is not over that the program was gone. Needs the guard."""
        if self.is_busy():
            gone, now = self.gone, time.time()
            form = '%H:%M' if gone and now - gone < 43200 else '%m-%d %H:%M'
            when = [local_time(moment, form) for moment in (gone or now, now)]
            text = f'程序又启动了：从 {when[0]} 到 {when[1]} 它不在，那时的训练中断了'
            self.run.update(ending=Ending.BROKEN.value, ended=gone or now)
            if self.queue.current and self.queue.is_interrupted(self.run):
                offer = '排队的训练自己接着做。'
            text += f'（主机 {socket.gethostname()}）。\n' + (offer or '没有检查点，发“开始”从头训练。')
            audience = people.audience(self.run['person'], owner=True)
            mail.put(*((person, text) for person in audience), also=[self.run_row()])

    def do_answered(self, id: str, letters: list, settings: dict, run: dict) -> None:
        """A command was carried out: its answer and its effects are remembered together."""
        with self.guard:
            order = self.orders.pop(id, None)
            sent = self.sent.pop(id, None)
            letters = [Letter(**letter) for letter in letters]
            queued = order is not None and order.known is not None
            begins = queued and order.text == '开始' and self.queue.current
            if run.get('begun') and countdown.cancel() and letters:
                letters[0] = letters[0]._replace(content=f'{letters[0].content}\n（“{options.then}”已取消）')
            if order is not None:
                also = [done(id), *(set_setting(*item) for item in settings.items())]
                if run:
                    self.saved &= 'begun' not in run
                    self.run = {**({} if 'begun' in run else self.run), **run}
                    also.append(self.run_row())
                    self.keep_output(sent if 'begun' in run else None)
                if begins:
                    self.queue.took(run)
                    letters, also = letters * bool(run), [*also, self.queue.statement()]
                keys = self.reply(order, letters, also) if not queued else []
                if queued:
                    mail.put(*((p, x) for p in people.audience(order.person.key) for x in letters), also=also)
                if queued or order.path:
                    self.move_on()
                if self.unheard.get(order.person) == (commands_of(order.text), ()):
                    self.unheard[order.person] = commands_of(order.text), keys
            self.guard.notify_all()

    def do_tell(self, letters: list, run: Optional[dict] = None) -> None:
        """Send letters to the run's starter and the supervisors, and note what is new about the run."""
        with self.guard:
            audience = people.audience(self.run.get('person'))
            pairs = [(person, Letter(**letter)) for letter in letters for person in audience]
            run = run or {}
            self.run.update(run)
            self.keep_output()
            self.saved |= 'checkpoint' in run
            self.progress |= bool(run)
            also = [self.run_row()] if run else []
            if 'checkpoint' in run and self.queue.current and self.queue.current['tries']:
                self.queue.current['tries'] = 0  # it gets somewhere between the interruptions
                also.append(self.queue.statement())
            for person, text in self.rules.come_true(self.run) if 'row' in run else ():
                pairs += [(each, text) for each in dict.fromkeys((person, *audience))]
                also.append(self.rules.statement())
            mail.put(*pairs, also=also)
            if 'then' in run:
                self.move_on()
                if run['then'] and options.then and not self.is_queued():
                    countdown.start(self.run.get('person'))
            self.guard.notify_all()

    def asks(self) -> bool:
        """Return whether what this process has asked for is not answered yet. Needs the guard."""
        return any(order.known is not None or order.path for order in self.orders.values())

    def is_queued(self) -> bool:
        """Return whether a run of 排队 is going on or waits. Needs the guard."""
        return bool(self.queue.waiting or self.queue.current)

    def keep_output(self, since: Optional[float] = None) -> None:
        """Let what is printed go to the run's folder; a run has begun at `since`. Needs the guard.

        One that has come to nothing has no folder: its last words get one.
        """
        folder, ending = self.run.get('folder'), self.run.get('ending')
        if not folder and ending in WRONG and output.path is None and self.process is not None:
            with contextlib.suppress(OSError):
                folder = make_run_folder()
        output.follow(folder, since)

    def run_row(self) -> tuple:
        """Return the statement that remembers what is known of the last run. Needs the guard."""
        return run_row(self.run)

    def do_call(self, n: int, name: str, args: list, kwargs: dict) -> None:
        """It calls a function of itchat's."""
        self.calls.submit(self.call, self.line, n, name, args, kwargs)

    def call(self, line: Line, n: int, name: str, args: list, kwargs: dict) -> None:
        """Call a function of the client's, or fetch a file that came with a message; send what it returns."""
        try:
            if 'file_' in kwargs:
                kwargs['file_'] = io.BytesIO(base64.b64decode(kwargs['file_']['bytes']))
            function = self.downloads[args.pop(0)] if name == 'download' else getattr(itchat.instance, name)
            line.send('reply', n=n, value=function(*args, **kwargs))
        except Exception as error:
            line.send('reply', n=n, error=f'{type(error).__name__}: {first_line(error)}')

    def do_bar(self, text: str) -> None:
        """It shows how far an epoch is."""
        printer.show_bar(text)

    def do_dying(self, why: str) -> None:
        """It is about to end, for a reason that its exit status does not tell."""
        self.why = why

    def do_bye(self, status: int, again: bool = False) -> None:
        """It ends, as it was asked to or at the end of the script; or it wants to be started `again`."""
        with self.guard:
            self.bye, self.again = status, again
            if self.process is None:  # it waits for this one's end
                self.is_over(0, 0, ())
            else:
                self.kill_later()

    def do_params(self, params: dict) -> None:
        """The training function lets further values be set."""
        own_params.clear()
        own_params.update(params)
        memory.write(set_setting('own_params', own_params))

    def do_progress(self) -> None:
        """It has got somewhere: what comes is not the death before once more."""
        self.progress = True

    def do_signal(self, number: int) -> None:
        """A signal has come to it, where it is the process that the shell has started."""
        self.signal = number
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    # -- what is told without being asked

    def tell(self, text: Any, key: Optional[int]) -> None:
        """Send a text or a Letter to the one who started the run and to the supervisors."""
        mail.put(*((person, text) for person in people.audience(key)))

    def watch(self) -> None:
        """Tell when a run stands still, and when it goes on; note that the program lives: its own thread."""
        never, noted = threading.Event(), time.time()
        while not never.wait(min(options.silence / 10, 1)):
            if time.time() - noted > self.PATIENCE:
                noted = time.time()
                memory.write(set_setting('alive', noted))
            memory.settle()
            programs.check()
            with self.guard:
                text = self.news() if self.state is State.READY else ''
                if text:
                    self.tell(Letter(text, 'notice'), self.run.get('person'))
                self.tell_unanswered()

    def tell_unanswered(self) -> None:
        """Tell, once, who waits for the answer to a command for too long. Needs the guard."""
        for number, since in self.sent.items():
            if time.monotonic() - since > self.PATIENCE and number in self.orders:
                order = self.orders[number]
                text = f'训练的进程 {self.PATIENCE} 秒没有回答“{order.text.strip()[:20]}”；'
                text += '它要是卡住了，发“重启”。'
                self.reply(order, [Letter(text, 'notice')], [])
                self.sent[number] = math.inf
                self.guard.notify_all()

    def news(self) -> str:
        """Return what to say when no batch was done for long, or one at last; '' when there is nothing."""
        at = place.read()
        silence = time.monotonic() - at['last_step']
        usual = (at['last_step'] - at['epoch_began']) / max(at['batch'] - at['epoch_from'], 1)
        going = Phase.LOADING <= at['phase'] <= Phase.ENDING
        self.silent &= going
        if self.silent and silence < 10 * usual + 1:
            self.silent = False
            return f'又接着算了：{so_far(at)}'
        if self.silent or not going or silence <= max(options.silence, 10 * usual):
            return ''
        self.silent = True
        where = place_in_words(at['epochs'], at['batch'] + 1, at['batches'], '')
        what = STANDING.get(at['phase'], f'没有算完一批，停在{where}')
        return f'已经 {duration(silence)}{what}（主机 {socket.gethostname()}）'


STANDING = {  # what a run that stands still does, where that is no batch
    Phase.LOADING: '还没有准备好数据和网络',
    Phase.TESTING: '没有动静，停在测试',
    Phase.SAVING: '没有动静，停在存检查点',
    Phase.ENDING: '没有动静，停在收尾',
}
WRONG = {each.value for each in (Ending.NAN, Ending.ERROR, Ending.BROKEN)}  # ends of a run
SHOWING = {'status', 'params', 'help', 'plot', 'mistakes', 'runs', 'compare', 'log'}  # what changes nothing
LISTING = {'queue', 'remind'}  # what changes nothing without anything behind it


def known_runs(most: int = 1000) -> list:
    """Return what is known of the last runs, the last one first: their facts, number, person, ending."""
    columns = 'number', 'person', 'begun', 'ended', 'ending'
    rows = memory.rows(f'SELECT {", ".join(columns)}, facts FROM run ORDER BY number DESC LIMIT {most}')
    runs = [{**json.loads(facts), **dict(zip(columns, row))} for *row, facts in rows]
    for run in runs:
        if run.get('folder'):  # all may have been moved, or copied, to another place since
            run['folder'] = os.path.join(RUNS, os.path.basename(run['folder']))
        if run.get('checkpoint'):
            run['checkpoint'] = os.path.join(run['folder'], os.path.basename(run['checkpoint']))
    return runs


def run_row(run: dict) -> tuple:
    """Return the statement that remembers what is known of a run."""
    row = [run.get(name) for name in ('number', 'person', 'begun', 'ended', 'ending')]
    return 'INSERT OR REPLACE INTO run VALUES (?, ?, ?, ?, ?, ?)', *row, json.dumps(run)


def listed_runs() -> list:
    """Return what is known of the runs that have come to something, the last one first."""
    return [run for run in known_runs() if run.get('folder')]


def folder_of_run(place: Optional[int]) -> str:
    """Return the folder of the run at a place, from 1, in 记录's list; '' when there is none."""
    runs = listed_runs()
    return runs[place - 1]['folder'] if place and place <= len(runs) else ''


def last_run_text(run: dict) -> str:
    """Return how the last run went; '' when there was none."""
    if not run.get('begun'):
        return ''
    demo = '演示数据，' * (run.get('data') == 'demo')
    ended = run.get('ending') or '训练中'
    line = f'上次，{local_time(run["begun"])}：{run.get("how_far", "")}，{demo}{ended}'
    return '\n'.join([line, *run.get('best_lines', ())])


def runs_text() -> str:
    """Return a line for each of the last eight runs; of those on the same data the best one is marked."""
    runs = listed_runs()[:8]
    if not runs:
        return '还没有训练过。'
    best, lines = best_places(runs), []
    for place, run in enumerate(runs):
        demo = '演示数据，' * (run.get('data') == 'demo')
        name = f'{run["name"]} ' if run.get('name') else ''
        line = f'{place + 1}. {name}{local_time(run["begun"])} {rates_of(run)}，{demo}{outcome(run)}'
        lines.append(line + ' ★' * (place in best))
    last = min(2, len(lines))
    return '\n'.join([*lines, f'“曲线 {last}”画第 {last} 次的。'])


def rates_of(run: dict) -> str:
    """Return the learning rates and the batch size of a run, in words."""
    first, (last, _, bs) = run.get('first_rate'), run.get('values') or (None, None, None)
    rates = [f'{rate:g}' for rate in dict.fromkeys((first, last)) if rate is not None]
    return ' '.join([f'lr {"→".join(rates)}'] * bool(rates) + [f'bs {bs}'] * bool(bs))


def run_words(run: dict) -> str:
    """Return a run's name, or else its values."""
    return run.get('name') or rates_of(run)


def outcome(run: dict) -> str:
    """Return what came of a run, in words."""
    value = (run.get('best') or [0, None])[1]
    by = (run.get('best_by') or ['test_acc'])[0]
    number = '' if value is None else f'，{value:.3f}' if by == 'test_acc' else f'，{by} {value:.4g}'
    return f'{run.get("epochs", 0)} 轮{number}，{run.get("ending") or "训练中"}'


def merit(run: dict) -> float:
    """Return how good a run was, the more the better; -inf where that was not measured."""
    value = (run.get('best') or [0, None])[1]
    return -math.inf if value is None else -value if (run.get('best_by') or [0, False])[1] else value


def best_places(runs: list) -> set:
    """Return which of runs, from 0, are the best: one for each kind of data and of number that decides."""
    best = {}
    for place, run in enumerate(runs):
        kind = run.get('data') == 'demo', *(run.get('best_by') or ('test_acc', False))
        if merit(run) > merit(runs[best[kind]] if kind in best else {}):
            best[kind] = place
    return set(best.values())


def look_for_runs() -> None:
    """List the runs in runs/ that the memory does not know: of an earlier version, or brought from elsewhere.

    A run is known by when it was begun, a folder by its name: a copy of one that is there is none, but one
    whose folder has another name now is found again.
    """
    known = {run['begun']: run for run in known_runs()}
    of_folder = {run['folder']: run for run in known.values() if run.get('folder')}
    names = {
        os.path.basename(run['folder']) for run in known.values() if 'epochs' in run and run.get('folder')
    }
    found = []
    for folder in sorted(glob.glob(os.path.join(glob.escape(RUNS), '*', ''))):
        with contextlib.suppress(Exception):  # whatever other programs keep in a folder called runs/
            run = {} if os.path.basename(folder[:-1]) in names else facts_in(folder[:-1])
            found += [run] * bool(run)
    found.sort(key=lambda run: (run['number'], run['copied'], run['folder']))
    old = min([run['number'] for run in known.values()], default=1) - sum(not run['number'] for run in found)
    for run in found:
        before = known.get(run['begun']) or of_folder.get(run['folder'])
        if before and os.path.isdir(before.get('folder') or '') and 'epochs' in before:
            continue
        del run['copied']
        numbers = {run['number'] for run in known.values()}
        if before:
            run = {**run, **before, 'folder': run['folder'], 'checkpoint': run['checkpoint']}
        elif not run['number']:  # of an earlier version: before all others
            run['number'], old = old, old + 1
        elif run['number'] in numbers:
            run['number'] = max(numbers) + 1
        known[run['begun']] = run
        memory.write(run_row(run))


def facts_in(folder: str) -> dict:
    """Return what the files in a run's folder tell of it; {} when they tell nothing."""
    state, rows, name = {}, [], os.path.basename(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        with zipfile.ZipFile(os.path.join(folder, 'last.zip')) as checkpoint:
            state = json.loads(checkpoint.read('run.json'))
    with (
        contextlib.suppress(OSError, ValueError),
        open(os.path.join(folder, 'log.csv'), encoding='utf-8') as f,
    ):
        rows = [row for row in csv.DictReader(f) if row['epoch'].isdecimal()]
    if not state and not rows:
        return {}
    moment = re.match(r'\d{8}-\d{6}', name)
    with contextlib.suppress(ValueError):
        moment = moment and time.mktime(time.strptime(moment[0], '%Y%m%d-%H%M%S'))
    by, lower = state.get('best_by') or ('test_acc', False)
    measured = [(float(row.get(by) or math.nan), int(row['epoch'])) for row in rows]
    measured = [pair for pair in measured if not math.isnan(pair[0])]
    best = (min if lower else max)(measured, key=lambda pair: pair[0], default=None)
    rates = [float(row['learning_rate']) for row in rows]
    lr, ti, bs = state.get('params') or (None, None, None)
    whole = state and state.get('epochs', 0) >= ti and not state['batch']
    return {
        'number': state.get('run', 0),
        'begun': state.get('begun') or moment or os.path.getmtime(folder),
        'copied': state.get('folder', name) != name,
        'ending': (Ending.DONE if whole else Ending.BROKEN).value,
        'folder': folder,
        'checkpoint': os.path.join(folder, 'last.zip') if state else None,
        'data': state.get('data'),
        'name': state.get('name', ''),
        'best_by': (by, lower),
        'best': best and best[::-1],
        'epochs': len(rows),
        'first_rate': rates[0] if rates else lr,
        'values': (rates[-1] if rates else lr, ti, bs),
        'how_far': f'完成 {len(rows)} 轮',
        'kept': f'完成 {state.get("epochs", 0)} 轮',
    }


def commands_of(text: str) -> list:
    """Return what a text asks for, in a form that can be compared."""
    return [(said.word, said.number, said.values, said.more) for said in parse(text).commands]


def done(number: str) -> tuple:
    """Return the statement that remembers that a message was answered."""
    return 'UPDATE message SET waiting = 0 WHERE id = ?', number


def note_message(number: str) -> tuple:
    """Return the statement that remembers that a message has come that is not this program's to answer."""
    return "INSERT OR IGNORE INTO message VALUES (?, 0, '', 0, 0, 0)", number


def forget_messages() -> list:
    """Return the statement that forgets all but the last ten thousand messages."""
    return [('DELETE FROM message WHERE rowid < (SELECT max(rowid) FROM message) - 10000',)]


def too_old(text: str) -> str:
    """Return the answer to a command from when the program was not there."""
    return f'“{text.strip()[:20]}”太早了，是程序不在时写的，没有执行。还要就再发一次。'


def wait_for_end(process: subprocess.Popen, result: list, write: int) -> None:
    """Put the exit status of a process and its memory in MB at most into `result`; then close `write`."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    result += process.returncode, usage.ru_maxrss / (1024 if sys.platform == 'linux' else 2**20)
    os.close(write)


def copy_output(number: int, stream: int, last_words: collections.deque) -> None:
    """Print what the training process prints, and keep the last lines: a thread for each of its streams."""
    rest, content = b'', None
    while content != b'':
        content = b''
        with contextlib.suppress(OSError):
            content = os.read(stream, 65536)
        printer.put(number, f'its {number}', content)
        *lines, rest = (rest + (content or b'\n' * bool(rest))).split(b'\n')
        rest = rest[-4 * Output.LONGEST :]
        lines = [line.decode(sys.stderr.encoding, 'replace') for line in lines]
        last_words += lines if number == 2 else ()
        try:
            output.add(lines)
        except Exception:  # of this one piece: what waits in the pipe would hold up the training
            print_traceback()


def oom_kills() -> list:
    """Return how many processes the kernel has killed for want of memory: in all, in this control group."""
    numbers, names = [], ('memory.events', 'memory.oom_control')
    for path in ['/proc/vmstat', *(os.path.join(each, name) for each in memory_groups() for name in names)]:
        with contextlib.suppress(OSError), open(path) as f:
            numbers += re.findall(r'^oom_kill (\d+)', f.read(), re.M)
    return numbers


def memory_groups() -> list:
    """Return the folders of the control groups that limit this process's memory, and its children's."""
    folders = ['/sys/fs/cgroup']  # in a container
    with contextlib.suppress(OSError), open('/proc/self/cgroup') as f:
        for _, kinds, path in (line.rstrip('\n').split(':', 2) for line in f):
            root = '/sys/fs/cgroup' + '/memory' * bool(kinds)
            if not kinds or 'memory' in kinds.split(','):
                parts = path.strip('/').split('/')
                folders += ['/'.join([root, *parts[:n]]) for n in range(len(parts) + 1)]
    return list(dict.fromkeys(folders))


class Output:
    """What the training process has printed: the last lines in memory, all of a run's in its folder.

    The threads that read its streams add to it, the one that listens to it says which run goes on, any thread
    reads it; `guard` guards everything.
    """

    KEPT, LONGEST = 2000, 1000  # lines; characters of one
    MOST, ROOM = 100, 12000  # in an answer: lines; bytes, which are six messages
    FULL = 10**7  # bytes of the file: then another one is begun, and the one before kept

    def __init__(self):
        self.guard = threading.Lock()
        self.lines = collections.deque(maxlen=self.KEPT)  # (when, by time.monotonic(), line)
        self.path, self.since = None, 0.0  # of the run's file, once it has a folder; when the run began

    def add(self, lines: list) -> None:
        """Keep lines as a terminal would show them, without colours, and without secrets."""
        lines = [re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', line.rstrip('\r')).split('\r')[-1] for line in lines]
        lines = [visible(without_queries(line.expandtabs())[: self.LONGEST]) for line in lines]
        with self.guard:
            self.lines += [(time.monotonic(), line) for line in lines]
            self.write(lines)

    def write(self, lines: list) -> None:
        """Write lines to the file, if it can be. Needs the guard."""
        if not self.path or not lines:
            return
        private = functools.partial(os.open, mode=0o600)
        with contextlib.suppress(OSError):
            with open(self.path, 'a', encoding='utf-8', errors='backslashreplace', opener=private) as f:
                f.writelines(line + '\n' for line in lines)
                full = f.tell() > self.FULL
            if full:
                os.replace(self.path, self.path + '.1')

    def follow(self, folder: Optional[str], since: Optional[float]) -> None:
        """The run has this folder, or none yet. One that has begun did so at `since`, by time.monotonic()."""
        path = folder and os.path.join(folder, 'output.log')
        with self.guard:
            if since is not None and path != self.path:
                self.path, self.since = None, min(since, time.monotonic())
            if not path or path == self.path:
                return
            self.path = path
            self.write([line for when, line in self.lines if when >= self.since])
        memory.write(set_setting('output', path))

    def read(self, path: Optional[str]) -> None:
        """Take in the last lines of the file of an earlier program."""
        with contextlib.suppress(OSError), open(path or '', 'rb') as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - self.KEPT * 100))
            lines = f.read().decode('utf-8', 'replace').splitlines()
            with self.guard:
                self.lines.extendleft((-math.inf, line) for line in lines[::-1])

    def text(self, number: int, whole_error: bool) -> str:
        """Return the last lines, at most so many; but the `whole_error` that stands at their end."""
        with self.guard:
            lines, path = [line for _, line in self.lines], self.path
        first = len(lines) - min(number, self.MOST)
        if whole_error:
            first = min(first, start_of_error(lines))
        shown_lines, room = [], self.ROOM
        for line in reversed(lines[max(first, 0) :]):
            room -= size(line) + 1
            if room < 0:
                shown_lines.append('（前面的太长了' + (f'，都在 {shown(path)}）' if path else '）'))
                break
            shown_lines.append(line)
        notes = [f'（最多 {self.MOST} 行）'] * (number > self.MOST)
        return '\n'.join([*notes, *shown_lines[::-1]]).strip('\n') or '还没有打印过什么。'


def start_of_error(lines: list) -> int:
    """Return where the last traceback begins, with those that led to it, or the last words of a crash."""
    first = len(lines)
    for i in reversed(range(len(lines))):
        if re.match('Traceback \\(most recent|Fatal Python error', lines[i]):
            first = i
            if not (i > 1 and lines[i - 2].startswith(('During handling of the', 'The above exception was'))):
                break
    return first


class Machine:
    """What is left of the machine, and warnings before that ends a run.

    A thread of its own looks at it, as a driver or a disk that hangs must hold up nobody; any reads `text`.
    """

    EVERY = 1  # second

    def __init__(self):
        self.gpu = ''  # the one that trains: see gpu_number()
        self.text = ''  # how it is, in words
        self.enough = 0.0  # bytes of memory that were left when it was last a tenth
        self.told = set()  # what was warned of and has not been good since

    def watch(self) -> None:
        """Look at it for ever, and tell what is to be told: the work of its thread."""
        pause, seconds = threading.Event(), 0
        while not pause.wait(seconds):
            seconds = self.EVERY
            try:
                for text in self.look():
                    text = f'{text}（主机 {socket.gethostname()}）'
                    trainer.tell(Letter(text, 'notice'), trainer.run.get('person'))
            except Exception:
                print_traceback()
                seconds = 600

    def look(self) -> list:
        """Look at it; return the warnings that are new."""
        used = memory_of(trainer.process.pid if trainer.process else os.getppid())
        (left, most), room = memory_left(), checkpoint_size()
        free = shutil.disk_usage(RUNS if os.path.isdir(RUNS) else FOLDER).free
        gpu, heat = gpu_now(self.gpu) if self.gpu else ([], None)
        words = f'训练的进程 {amount(used)}，' * bool(used) + f'还剩 {amount(left)}/{amount(most)}'
        load = f'负载 {os.getloadavg()[0]:.1f}/{os.cpu_count()} 核'
        lines = [f'内存：{words}', f'磁盘还剩 {amount(free)}，{load}', *['GPU ' + '，'.join(gpu)] * bool(gpu)]
        self.text = '\n'.join(lines)
        if left >= most / 10 or not self.enough:
            self.enough = left
        falling = left < self.enough - most / 100
        short = f'内存快用完了，还在少下去：{words}。用完了，训练的进程会被系统杀掉'
        full = f'磁盘快满了：runs/ 那里还剩 {amount(free)}，存不下三个检查点'
        return [
            *self.new('memory', left < most / 10 and falling, left > most / 8, short),
            *self.new('disk', room and free < 3 * room, free > 4 * (room or math.inf), full),
            *self.new('GPU', heat and heat > 90, heat and heat < 85, f'GPU 太热了：{heat} °C'),
        ]

    def new(self, what: str, bad: Any, good: Any, text: str) -> list:
        """Return the text when something is bad that was good since that was told, if there is a run."""
        if good:
            self.told.discard(what)
        if not bad or what in self.told or not trainer.is_busy():
            return []
        self.told.add(what)
        return [text]


def memory_of(pid: int) -> int:
    """Return how much memory a process uses, in bytes; 0 when it has just ended."""
    import psutil  # 40 ms: not before the login

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


def memory_left() -> tuple:
    """Return how much memory is left, and of how much, in bytes: of the machine's or a control group's."""
    import psutil

    whole = psutil.virtual_memory()
    rooms = [(whole.available, whole.total)]
    kinds = ('max', 'current'), ('limit_in_bytes', 'usage_in_bytes')
    for folder, names in itertools.product(memory_groups(), kinds):
        with contextlib.suppress(OSError, ValueError):  # there is no such file; no limit
            limit, used, more = (read_text(f'{folder}/memory.{name}') for name in (*names, 'stat'))
            given_up = re.findall(r'^(?:total_)?inactive_file (\d+)', more, re.M)[-1]  # when it is wanted
            rooms.append((int(limit) - int(used) + int(given_up), int(limit)))
    return min(rooms)


def read_text(path: str) -> str:
    """Return what stands in a file. Raises OSError."""
    with open(path) as f:
        return f.read()


def checkpoint_size() -> int:
    """Return how many bytes the last checkpoint takes; 0 when there is none, or one is being written: that
    takes room for a moment."""
    path = trainer.run.get('checkpoint')
    with contextlib.suppress(OSError):
        return os.path.getsize(path) if path and place.read()['phase'] != Phase.SAVING else 0
    return 0


def gpu_now(name: str) -> tuple:
    """Return what NVML knows of a GPU, by its number or UUID, in words, and its temperature in °C or None."""
    import pynvml  # 50 ms, 2 MB: where there is a GPU

    def ask(function: Callable, *what: Any) -> Any:
        with contextlib.suppress(pynvml.NVMLError):  # no driver; a part of a GPU does not know all
            return function(*what)

    ask(pynvml.nvmlInit)
    by = pynvml.nvmlDeviceGetHandleByIndex if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
    gpu = ask(by, int(name) if name.isdecimal() else name)
    if gpu is None:
        return [], None
    use, room = ask(pynvml.nvmlDeviceGetUtilizationRates, gpu), ask(pynvml.nvmlDeviceGetMemoryInfo, gpu)
    heat = ask(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU)
    words = [f'使用率 {use.gpu}%'] if use else []
    words += [f'显存 {room.used / 2**20:.0f}/{room.total / 2**20:.0f} MB'] if room else []
    return words + ([] if heat is None else [f'{heat} °C']), heat


def amount(size: float) -> str:
    """Return a number of bytes in words.

    >>> amount(451 * 2**20), amount(3.25 * 2**30)
    ('451 MB', '3.2 GB')
    """
    return f'{size / 2**20:.0f} MB' if size < 2**30 else f'{size / 2**30:.1f} GB'


class Countdown:
    """The command of --then: announced, held back for a minute, run.

    A thread for each announcement runs it; all threads start and cancel it; `guard` guards it.
    """

    ANNOUNCING = 600  # seconds to wait for a session in which it can be announced

    def __init__(self):
        self.guard = threading.Lock()
        self.cancelled = None  # the Event that calls off what is to be run; None when nothing is
        self.thread = None

    def start(self, person: Optional[int]) -> None:
        """Announce the command and let it run when nobody says 取消."""
        text = f'{options.then_delay:g} 秒后执行：{options.then}\n不要执行就发“取消”。'
        trainer.tell(Letter(text, 'notice'), person)
        with self.guard:
            self.cancelled = threading.Event()
            arguments = self.cancelled, person
            self.thread = threading.Thread(target=self.count, args=arguments, daemon=True)
            self.thread.start()

    def count(self, cancelled: threading.Event, person: Optional[int]) -> None:
        """Wait until the announcement is sent (ten minutes at most), then for the delay; run the command."""
        mail.wait(self.ANNOUNCING)
        if cancelled.wait(options.then_delay):
            return
        with self.guard:
            if cancelled.is_set():
                return
            self.cancelled = None
        status = subprocess.run(options.then, shell=True, stdin=subprocess.DEVNULL).returncode
        trainer.tell(f'已执行：{options.then}\n退出状态 {status}', person)

    def cancel(self) -> bool:
        """Call the command off; return whether one was to run."""
        with self.guard:
            cancelled, self.cancelled = self.cancelled, None
        if cancelled is not None:
            cancelled.set()
        return cancelled is not None

    def wait(self) -> None:
        """Wait until nothing is to be run."""
        if self.thread is not None:
            self.thread.join()


# ------------------------------------------------------------------------------------------ the door


def talk() -> None:
    """Be the process that talks, until the end of the program: what the main thread does."""
    status = 0
    try:
        how = trainer.requests.get()
        if how is not None:
            client = Silent() if options.join else Terminal() if options.console or options.demo else None
            use_client(client or programs.choose_client(FileHelper if options.filehelper else WeChat))
            itchat.instance.auto_login(**how)
            client = itchat.instance  # another one where the program with the login has gone meanwhile
            with client.waiting():
                trainer.open_session()
                how = trainer.requests.get()
        if how is not None:
            client.run()
        status = trainer.status
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        print_traceback()
        status = 1
    trainer.dismiss(status)
    programs.close()
    memory.close()
    if printer:
        printer.close()
    else:
        trainer.line.close()
    os._exit(status)


def silence_logging() -> None:
    """Let nothing log in the talking process but itchat through ShortLog: what else does, urllib3 above all,
    logs a session's secrets. A script's lines above `import utils` have run here, too."""
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).disabled = name != 'itchat'
    logging.getLogger('itchat').handlers.clear()


if TALKS:
    silence_logging()
    make_streams_safe()
    memory, people, mail, countdown, trainer = Memory(), People(), Mail(), Countdown(), Trainer()
    output, machine, programs = Output(), Machine(), Programs()
    printer = None
    if role:  # the one that trains has started it, and prints
        place = Place(int(role_words[1]))
        let_print(lambda number, who, content: trainer.line.send('print', number=number, content=content))
        trainer.start(None, socket.socket(fileno=int(role_words[0])))
    else:
        printer, place = Printer(), Place(place_file.fileno())
        let_print(printer.put)
        trainer.start(*first_process)
    talk()

# ------------------------------------------------------------------------------------- before MXNet

import atexit
import copy
import ctypes
import faulthandler
import gc
import gzip
import importlib.util
import inspect
import statistics
import zlib

import numpy as np
import pooch
from PIL import Image, ImageDraw

# What MXNet reads when it is imported is set here; the user's own settings win. So `import utils` comes
# before `import mxnet` in every script.
if hasattr(os, 'sched_getaffinity'):  # not on macOS
    CORES = len(os.sched_getaffinity(0))
else:
    CORES = os.cpu_count() or 1
FOLLOWS_MACHINE = 'OMP_NUM_THREADS' not in os.environ  # see class Threads
os.environ.setdefault('OMP_NUM_THREADS', str(CORES))  # MXNet itself takes half of them: 1.8 times
HAS_CUDA = glob.glob(
    os.path.join(os.path.dirname(importlib.util.find_spec('mxnet').origin), '..', 'mxnet_cu*')
)
if not HAS_CUDA:  # a GPU needs the other engine
    os.environ.setdefault('MXNET_ENGINE_TYPE', 'NaiveEngine')  # up to 1.04 times
    os.environ.setdefault('MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN', '100')  # 1.02 times with 16 images
    if CORES <= 4:  # of many threads, small operations would wait
        os.environ.setdefault('MXNET_USE_OPERATOR_TUNING', '0')  # all cores fill arrays: 1.04 times with 64
    os.environ.setdefault('MXNET_OPTIMIZER_AGGREGATION_SIZE', '60')  # parameters: see update_by_size()

NUMPY_2 = int(np.__version__.split('.')[0]) >= 2
GONE = {  # names that numpy 2 no longer has and MXNet 1.9.1 reads while it is imported; it calls none of them
    **{'PZERO': 0.0, 'NZERO': -0.0, 'PINF': math.inf, 'NINF': -math.inf, 'Inf': math.inf},
    **{'NAN': math.nan, 'NaN': math.nan},
    **dict.fromkeys('alltrue sometrue product round_ mirr msort npv pmt ppmt pv rate in1d trapz'.split()),
}
PACKAGES = {'libgomp': 'libgomp1', 'libquadmath': 'libquadmath0'}  # of Debian and Ubuntu


def explain_missing_library(error: OSError) -> str:
    """Return in one line which shared library MXNet lacks and which package brings it."""
    library = re.match(r'(lib[\w+-]+)\.so[\w.]*', str(error))
    if not library:
        return f'MXNet 装不进来：{error}'
    if library[1] in PACKAGES:
        package = f'apt-get install -y {" ".join(PACKAGES.values())}'
    elif library[1].startswith(('libcu', 'libnv', 'libnccl')):
        package = 'NVIDIA 的驱动和对应版本的 CUDA'
    else:
        package = '带有它的软件包'
    return f'MXNet 缺少系统库 {library[0]}，请安装：{package}'


@contextlib.contextmanager
def silent_stderr() -> Iterator:
    """Throw away what is written to file descriptor 2: the engine of MXNet says there that it starts."""
    with open(os.devnull, 'w') as devnull:
        stderr = os.dup(2)
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def import_mxnet() -> None:
    """Import MXNet with the names of numpy that it expects, and start its engine.

    Ends the program with one line when a shared library is missing.
    """
    vars(np).setdefault('bool', bool)  # gone since numpy 1.24, wanted later on, too; numpy 2 has its own
    added = {name: value for name, value in GONE.items() if NUMPY_2 and name not in vars(np)}
    vars(np).update(added)
    try:
        with silent_stderr():
            import mxnet

            mxnet.nd.waitall()
    except OSError as error:
        sys.exit(explain_missing_library(error))
    finally:
        for name in added:
            delattr(np, name)


with waiting_for('正在载入 MXNet'):
    import_mxnet()

import mxnet as mx
from mxnet import nd
from mxnet.gluon import nn
from mxnet.gluon.contrib import estimator

sys.excepthook = previous_hook

# --------------------------------------------------------------------------------- the command line


INTERACTIVE = hasattr(sys, 'ps1') or bool(sys.flags.interactive)  # a notebook, too: it outlives a program


options_are_read = False


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Read the command line (or `argv`) into `options`; return them. The login hands them to what talks.

    A script need not call this: chat_supervisor() and auto_login() read the options that are ours and leave
    the others to the script. Called before them it decides: it refuses what is not ours, and parse_args([])
    says that all are the script's own. A notebook's cell has no command line. Ends the program with status 2,
    after a line that says why, when an option is wrong.
    """
    return read_options(argv, make_parser().parse_args)


def read_own_options() -> None:
    """Do what parse_args() does with those options that are ours, unless it was called."""
    if not options_are_read:
        read_options(None, make_parser().parse_known_args)


def read_options(argv: Optional[list], parse: Callable) -> argparse.Namespace:
    """Read, with this method of a parser, and check; see parse_args()."""
    global options_are_read, learning_rate
    options_are_read = True
    make_streams_safe()
    for name in (*FLAGS, *OPTIONS) if INTERACTIVE else ():  # what another cell has said
        delattr(options, name)
    if argv is None and INTERACTIVE and not hasattr(sys.modules['__main__'], '__file__'):
        argv = []
    parser, read = make_parser(), parse(argv, namespace=options)
    others = [text for text in read[1] if text.startswith('--')] if isinstance(read, tuple) else []
    if others:
        say(f'{" ".join(others)} 不是这里的选项，留给脚本自己用。')
    options.supervisor = list(dict.fromkeys(options.supervisor))  # they may have been read before
    for one, other in CONTRADICTIONS:
        if getattr(options, one) and getattr(options, other):
            parser.error(f'--{one} 和 --{other} 不能一起写')
    if options.demo and learning_rate == 0.5:
        learning_rate = DEMO_LEARNING_RATE
    if not all(map(canonical, options.supervisor)):
        parser.error('--supervisor：名字是空的')
    if options.name is not None and (not options.name.strip() or tidy(options.name) == ALL):
        parser.error(f'--name：不能是空的，也不能叫“{ALL}”')
    if options.chat and options.alone:
        parser.error('--chat 和 --alone 不能一起写')
    if options.trace:
        try:
            open(options.trace, 'a', opener=functools.partial(os.open, mode=0o600)).close()
        except OSError as error:
            parser.error(f'--trace：{error}')
    if options.data:
        try:
            find_files(options.data)
        except OSError as error:
            parser.error(f'--data：{error}')
    check_workers(parser)
    return options


def check_workers(parser: argparse.ArgumentParser) -> None:
    """Make `team` what the options say; end the program when they are wrong."""
    if role == 'follows':
        options.join, options.gpu = role_words[0], int(role_words[1])
    team.size = team.num_workers = options.workers
    if options.workers < 1 or (options.workers == 1 and (options.host or options.join)):
        parser.error('--workers：要大于 0；和 --host、--join 一起时要大于 1，各台机器上一样')
    if options.workers > 1 and INTERACTIVE:
        parser.error('--workers：几个进程各自运行同一个脚本，笔记本里不行')
    if options.host and options.join:
        parser.error('--host 写在扫码的那台机器上，--join 写在别的机器上，不能一起写')
    if options.host in ('0.0.0.0', ''):
        parser.error('--host：要写别的机器找得到这台机器的那个地址')
    if options.join:
        host, _, port = options.join.rpartition(':')
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            parser.error('--join：要写成 IP:PORT')
        team.leads, team.address, options.then = False, (host, int(port)), None
    elif options.workers > 1:
        try:
            team.address = find_address()
        except (OSError, OverflowError) as error:
            parser.error(
                f'--host {options.host} --port {options.port} 用不了（{error}）：'
                '地址要是这台机器自己的（IPv4，用 ip addr 看），端口要没有别人在用'
            )


# ------------------------------------------------------------------------------------------ the data

DEMO = object()  # drawn images
DEMO_LEARNING_RATE = 0.2  # with 0.5, the tutorial's, some seeds learn nothing of them
data_dir = None  # a folder with the four IDX files, or DEMO; None: what the command line says

FILES = {  # the official files and their MD5, from https://github.com/zalandoresearch/fashion-mnist
    'train-images-idx3-ubyte.gz': '8d4fb7e6c68d591d4c3dfef9ec88bf0d',
    'train-labels-idx1-ubyte.gz': '25c81989df183df01b3e8a0aad5dffbe',
    't10k-images-idx3-ubyte.gz': 'bef4ecab320f06d8554ea6380940ec79',
    't10k-labels-idx1-ubyte.gz': 'bb300cfdad3c16e7a12a480ee83cd310',
}
MIRRORS = (  # MXNet's own bucket; the publisher's bucket and repository for the day when that is gone
    'https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/gluon/dataset/fashion-mnist/',
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/',
    'https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/',
)


def load_data_fashion_mnist(batch_size: int, resize: Optional[int] = None) -> 'tuple[Batches, Batches]':
    """Return (train_data, test_data), the batches of Fashion-MNIST, or of what `data_dir` or --data names.

    Each yields (data, label): float32 (N, 1, 28, 28) in 0..1 and float32 (N,). `resize` makes the images
    resize x resize. Only the training images are shuffled, anew for every epoch; a loop over them shows a
    progress bar and ends at 停止, see progress().
    Raises OSError when the files cannot be had, ValueError when one is damaged.
    """
    images, labels, test_images, test_labels = read_arrays(data_source())
    return (
        Batches(images, labels, batch_size, resize, training=True),
        Batches(test_images, test_labels, max(batch_size, 256), resize),  # small batches would only be slower
    )


def data_source() -> Any:
    """Return the folder that the data come from, DEMO, or None: fetch Fashion-MNIST."""
    return data_dir or (DEMO if options.demo else options.data)


def data_name() -> str:
    """Return what the data are, for checkpoints."""
    source = data_source()
    return 'demo' if source is DEMO else os.path.abspath(source) if source else 'Fashion-MNIST'


class Batches:
    """The batches of an array of images: len() of them, the last one may be smaller.

    Made and read by the training thread alone. A loop over the batches of a training set is a pass that
    progress() counts.
    """

    def __init__(self, images, labels, batch_size, resize=None, training=False):
        self.images, self.labels = images, labels  # uint8 (N, 28, 28), uint8 (N,); floats are no faster
        self.batch_size, self.resize, self.training = batch_size, resize, training
        self.epoch = 0  # of the last pass; it decides the order of the images

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator:
        return progress(self, train=True) if self.training else self.read()

    def read(self, epoch: Optional[int] = None, start: int = 0) -> Iterator:
        """Yield the batches of an epoch (default: the next) from number `start` on, which counts from 0."""
        self.epoch = epoch or self.epoch + 1
        n = len(self.labels)
        order = np.arange(n)
        if self.training:
            order = np.random.RandomState([run.seed % 2**32, self.epoch]).permutation(n)
        size = self.batch_size * max(1, 1024 // self.batch_size)  # of what is converted at once: 1.03 times
        for i in range(start * self.batch_size, n, size):
            chosen = order[i : i + size]
            images = nd.from_numpy(np.divide(self.images[chosen, None], np.float32(255), dtype=np.float32))
            labels = nd.from_numpy(self.labels[chosen].astype(np.float32))
            for j in range(0, len(chosen), self.batch_size):
                data = images[j : j + self.batch_size]
                if self.resize:
                    data = nd.contrib.BilinearResize2D(data, height=self.resize, width=self.resize)
                batch = data, labels[j : j + self.batch_size]
                yield tuple(x.as_np_ndarray() for x in batch) if mx.util.is_np_array() else batch


@functools.lru_cache(maxsize=1)
def read_arrays(source: Any) -> tuple:
    """Return train images, train labels, test images, test labels as uint8 arrays."""
    if source is DEMO:
        return (*draw_garments(12000, seed=0), *draw_garments(1000, seed=1))
    paths = find_files(source) if source else fetch_files()
    arrays = tuple(read_idx(path) for path in paths)
    for i in (0, 2):
        if len(arrays[i]) != len(arrays[i + 1]):
            raise ValueError(
                f'{paths[i]} 有 {len(arrays[i])} 张图，{paths[i + 1]} 却有 {len(arrays[i + 1])} 个标签'
            )
    return arrays


def find_files(folder: str) -> list:
    """Return the paths of the four IDX files in `folder`, gzipped or not; OSError names a missing one."""
    paths = []
    for name in FILES:
        candidates = [os.path.join(folder, name), os.path.join(folder, name[: -len('.gz')])]
        paths += [next((path for path in candidates if os.path.isfile(path)), None)]
        if paths[-1] is None:
            raise FileNotFoundError(f'{folder} 里没有 {name}')
    return paths


def fetch_files() -> list:
    """Return the paths of the four IDX files where MXNet keeps its data sets, fetched if need be.

    A file that does not have the published checksum is set aside and fetched again. Raises OSError.
    """
    home = os.environ.get('MXNET_HOME', os.path.expanduser('~/.mxnet'))
    folder = os.path.join(home, 'datasets', 'fashion-mnist')
    download = pooch.HTTPDownloader(progressbar=True, timeout=30)
    pooch.get_logger().setLevel('WARNING')
    paths = []
    for name, md5 in FILES.items():
        path = os.path.join(folder, name)
        if os.path.exists(path) and pooch.file_hash(path, 'md5') != md5:
            os.replace(path, path + '.damaged')
            say(f'{path} 已损坏，改名为 {name}.damaged，重新下载')
        for mirror in MIRRORS:
            try:
                paths.append(pooch.retrieve(mirror + name, 'md5:' + md5, name, folder, downloader=download))
                break
            except (requests.RequestException, ValueError) as error:  # ValueError: the checksum is wrong
                print(f'{mirror}{name}: {error}', file=sys.stderr)
        else:
            raise OSError(f'下载不到 {name}；可以自己下载四个文件，用 --data 指定文件夹')
    return paths


def read_idx(path: str) -> np.ndarray:
    """Return the uint8 array in an IDX file (http://yann.lecun.com/exdb/mnist), gzipped or not.

    Raises ValueError when the file is damaged.
    """
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            zeros, dtype, ndim = struct.unpack('>HBB', f.read(4))
            shape = struct.unpack('>%dI' % ndim, f.read(4 * ndim))
            content = f.read()
    except (EOFError, gzip.zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise ValueError(f'{path} 已损坏：{error}') from None
    if zeros != 0 or dtype != 8 or len(content) != math.prod(shape):
        raise ValueError(f'{path} 已损坏：长度或格式不对')
    return np.frombuffer(content, np.uint8).reshape(shape)


# fmt: off
GARMENTS = (  # outlines on a 28 x 28 grid, in the order of the ten classes: T-shirt, trouser,
    # pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot
    [[(9, 5), (19, 5), (25, 10), (22, 14), (20, 12), (20, 24), (8, 24), (8, 12), (6, 14), (3, 10)]],
    [[(9, 3), (19, 3), (20, 25), (15, 25), (14, 10), (13, 25), (8, 25)]],  # trouser
    [[(9, 4), (19, 4), (24, 24), (21, 24), (19, 12), (19, 24), (9, 24), (9, 12), (7, 24), (4, 24)]],
    [[(11, 3), (17, 3), (16, 11), (20, 25), (8, 25), (12, 11)]],  # dress
    [[(9, 3), (13, 4), (13, 25), (4, 25), (4, 10)], [(15, 4), (19, 3), (24, 10), (24, 25), (15, 25)]],  # coat
    [[(3, 19), (12, 15), (25, 21), (25, 23), (3, 23)], [(8, 11), (10, 11), (16, 17), (14, 18)]],  # sandal
    [[(9, 4), (13, 4), (14, 8), (15, 4), (19, 4), (24, 12), (21, 14), (19, 24), (9, 24), (7, 14), (4, 12)]],
    [[(3, 14), (9, 12), (16, 17), (25, 19), (25, 22), (3, 22)]],  # sneaker
    [[(4, 12), (24, 12), (24, 24), (4, 24)],
     [(9, 12), (10, 6), (18, 6), (19, 12), (17, 12), (16, 8), (12, 8), (11, 12)]],  # bag
    [[(9, 4), (17, 4), (17, 15), (25, 19), (25, 24), (8, 24)]])  # ankle boot
# fmt: on


def draw_garments(n: int, seed: int) -> 'tuple[np.ndarray, np.ndarray]':
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


# ------------------------------------------------------------------------- the device, the accuracy


def try_gpu() -> mx.Context:
    """Return mx.gpu(), or the one that --gpu names, when MXNet sees a GPU, else mx.cpu()."""
    return mx.gpu(options.gpu) if mx.context.num_gpus() else mx.cpu()


def accuracy(output: nd.NDArray, label: nd.NDArray) -> float:
    """Return the share of rows of `output` (N, classes) whose largest entry is at `label`: N numbers.

    These may be of any shape and type, both. With --workers, in a loop over the training data: this process's
    part of it. Raises ValueError when the shapes do not fit.
    """
    team.called.add('accuracy')
    said, label = classes(output, label)
    right = np.count_nonzero(said == label)
    return Share(right / (team.images or len(label)), right, len(label))


def classes(output: nd.NDArray, label: nd.NDArray) -> tuple:
    """Return the classes that `output` (N, classes) and `label` (N numbers) name, as numpy arrays (N,)."""
    for array in (output, label):
        if not isinstance(array, nd.NDArray):
            raise TypeError(f'精度：输出和标签各要是一个 NDArray，现在是 {type(array).__name__}')
    output, label = as_numpy(output), as_numpy(label)
    if output.ndim != 2 or output.shape[1] < 2 or label.size != len(output):
        raise ValueError(f'精度：输出要是 (N, 类数)，标签要是 N 个；现在是 {output.shape} 和 {label.shape}')
    return output.argmax(axis=1), label.ravel()


def as_numpy(array: nd.NDArray) -> np.ndarray:
    """Return its numbers, those of 16 bits as float32: numpy adds float16 up badly, and knows no bfloat16."""
    return (array.astype('float32') if np.dtype(array.dtype).itemsize == 2 else array).asnumpy()


def evaluate_accuracy(data_iterator: Iterable, net: Any, ctx: Any = None) -> float:
    """Return the share of all examples of `data_iterator` that `net` classifies correctly.

    Its batches are (data, label), (several inputs, ..., label) or DataBatches, whose padding does not count.
    Of a list, as the tutorials' `ctx` is one, the first device computes. Raises TypeError when a batch is
    something else, ValueError when shapes do not fit or there is no batch.
    """
    correct, total, mistakes = 0, 0, Mistakes()
    device = (ctx[0] if isinstance(ctx, (list, tuple)) else ctx) or try_gpu()
    tests = not getattr(data_iterator, 'training', False)
    if isinstance(data_iterator, Batches):  # the training data, too: this is no pass that trains
        data_iterator = data_iterator.read(max(data_iterator.epoch, 1))
    even_out(net)
    for batch in run.seen(one_pass(data_iterator)):
        batch = inputs_and_label(batch)
        mistakes.shapes.add(arrays_in(batch)[0].shape[1:])
        batch = team.part(batch, trains=False)
        if batch is None:  # fewer images than --workers
            continue
        *inputs, label = batch
        output = net(
            *map_arrays(lambda x: x.as_in_context(device) if isinstance(x, nd.NDArray) else x, inputs)
        )
        said, label = classes(output, label)
        wrong = np.flatnonzero(said != label)
        correct += len(label) - len(wrong)
        total += len(label)
        if tests and len(wrong):
            mistakes.add(arrays_in(inputs)[0], as_numpy(output)[wrong], label, said, wrong)
    correct, total = team.meet(correct, total)
    if tests:
        mistakes.merge()
        with lock:
            run.mistakes = mistakes.kept
    if not total:
        raise ValueError('evaluate_accuracy：一批数据也没有（生成器只能读一遍）')
    return correct / total


def inputs_and_label(batch: Any) -> list:
    """Return what a network takes of a batch, and the labels behind it. Raises TypeError."""
    if isinstance(batch, mx.io.DataBatch):
        n = len(batch.data[0]) - (batch.pad or 0)
        batch = [array[:n] for array in [*batch.data, *(batch.label or ())]]
    if isinstance(batch, (list, tuple)) and len(batch) > 1 and isinstance(batch[-1], nd.NDArray):
        return list(batch)
    raise TypeError(
        'evaluate_accuracy：每一批要是 (data, label)、(几个输入, label) 或 DataBatch，'
        f'现在是 {type(batch).__name__}；别的请自己算好精度，交给 chat_inf'
    )


def one_pass(data: Iterable, start: int = 0, epoch: Optional[int] = None) -> Iterator:
    """Return an iterator over the batches from number `start` on: an NDArrayIter and its like begin anew."""
    if isinstance(data, Batches):
        return data.read(epoch, start)
    if isinstance(data, mx.io.DataIter):
        data.reset()
    return itertools.islice(data, start, None)


def map_arrays(function: Callable, batch: Any) -> Any:
    """Return a batch of any kind, however nested, with function(array) in the place of each array."""
    if isinstance(batch, (nd.NDArray, np.ndarray)):
        return function(batch)
    if isinstance(batch, mx.io.DataBatch):
        mapped = copy.copy(batch)
        mapped.data, mapped.label = map_arrays(function, [batch.data, batch.label])
        return mapped
    if isinstance(batch, dict):
        return {key: map_arrays(function, value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        mapped = [map_arrays(function, value) for value in batch]
        return type(batch)(*mapped) if hasattr(batch, '_fields') else type(batch)(mapped)
    return batch


def arrays_in(batch: Any) -> list:
    """Return the arrays in a batch of any kind."""
    found = []
    map_arrays(found.append, batch)
    return found


def batch_size_of(batch: Any) -> Optional[int]:
    """Return how many examples a batch of any kind holds, by its first array; None when it has none."""
    return next((array.shape[0] for array in arrays_in(batch) if array.shape), None)


def seed_epoch(seed: int, epoch: int) -> None:
    """Let numpy's, Python's and MXNet's random numbers of an epoch depend on both numbers alone."""
    text = f'{seed} {epoch}'
    np.random.seed(list(text.encode()))
    random.seed(text)
    mx.random.seed(int(np.random.randint(2**31)))


def even_out(net: Any) -> None:
    """Give all --workers the mean of what each network has gathered without gradients: BatchNorm's."""
    if team.size > 1 and hasattr(net, 'collect_params'):
        for name, parameter in net.collect_params().items():
            if name.endswith(('running_mean', 'running_var')) and parameter._data is not None:
                value = parameter.data(parameter.list_ctx()[0])
                mean = team.sum('means', value.asnumpy().astype(np.float32)) / team.size
                parameter.set_data(nd.array(mean, dtype=value.dtype))


class Mistakes:
    """The examples that a network gets wrong although it is most sure. Used by the training thread alone."""

    ROOM = 16

    def __init__(self):
        self.kept = []  # (how sure: 0 to 1, the example, its label, what the network says), the surest first
        self.shapes = set()  # of the examples, in all processes

    def add(self, data: nd.NDArray, outputs: np.ndarray, label: np.ndarray, said: np.ndarray, wrong: Any):
        """Note those of a batch: `outputs` (n, classes), before softmax, of the n examples at `wrong`."""
        sure = 1 / np.exp(outputs - outputs.max(axis=1, keepdims=True)).sum(axis=1)  # softmax of the largest
        least = self.kept[-1][0] if len(self.kept) == self.ROOM else 0
        best = [i for i in np.argsort(-sure)[: self.ROOM] if sure[i] > least]
        if best:
            examples = as_numpy(data)
            new = [(float(sure[i]), wrong[i]) for i in best]
            self.kept += [(p, examples[j].copy(), int(label[j]), int(said[j])) for p, j in new]
            self.keep_surest()

    def keep_surest(self) -> None:
        """Keep as many as there is room for."""
        self.kept = sorted(self.kept, key=lambda mistake: -mistake[0])[: self.ROOM]

    def merge(self) -> None:
        """Take in what the other processes have kept, with --workers, if all examples are of one shape."""
        if team.size > 1 and len(self.shapes) == 1:
            (shape,) = self.shapes
            own = np.full((self.ROOM, 3 + math.prod(shape)), -1, np.float32)
            for row, (sure, example, label, said) in zip(own, self.kept):
                row[:3], row[3:] = (sure, label, said), example.ravel()
            rows = [row for row in np.concatenate(team.gather(own)) if row[0] >= 0]
            self.kept = [(float(r[0]), r[3:].reshape(shape), int(r[1]), int(r[2])) for r in rows]
            self.keep_surest()


# --------------------------------------------------------------- its speed: the number of threads


class Threads:
    """How many threads MXNet computes with: the training thread says after every batch how long it took.

    The threads of a kernel wait for each other in a loop; one that has lost its core to another program
    holds all of them up, three times longer than computing with a thread less. So one fewer or one more (a
    quarter, of many) is tried now and then, at once when the batches take unevenly long, and the faster kept.
    """

    SHARE = 0.01  # of the time may be lost by trying; one trial may overdraw it
    WINDOW = 30  # batches to compare with

    def __init__(self, most: int, tries: bool):
        self.most, self.tries = most, tries
        self.sets = tries  # does it set the number?
        self.used = self.kept = most  # now; when nothing is being tried
        self.fewer = True  # is the next trial to be with fewer?
        self.times = collections.deque(maxlen=self.WINDOW)  # seconds of the last batches with `kept`
        self.trial = []  # seconds of the batches of a trial
        self.seconds, self.lost = 0.0, 0.0  # of all batches; by trying

    def limit(self, number: int) -> None:
        """Compute with so many threads, and try no others."""
        self.used = self.kept = self.most = number
        self.tries, self.sets = False, True

    def use(self, number: int) -> None:
        """Compute with so many threads from here on, in the thread that calls this."""
        self.used = number
        if self.sets:
            mx.base.check_call(mx.base._LIB.MXSetNumOMPThreads(number))

    def begin(self) -> None:
        """A thread begins to train: what an earlier one has found out counts, its times do not."""
        self.times.clear()
        self.trial.clear()
        self.use(self.kept)

    def count(self, seconds: float) -> None:
        """Note that a batch took so long, and begin or end a trial."""
        if not self.tries:
            return
        self.seconds += seconds
        if self.used == self.kept:
            self.times.append(seconds)
            if len(self.times) >= 8:
                self.try_another()
            return
        self.trial.append(seconds)
        best = 0.9 * statistics.fmean(self.times) * self.length()  # what they may take in all
        if len(self.trial) > self.length() or sum(self.trial[1:]) > best:  # the first one has compiled
            self.decide(best)

    def length(self) -> int:
        """Return how many batches of a trial count: for 50 ms, so that other programs get their turns."""
        return max(4, math.ceil(0.05 / statistics.fmean(self.times)))

    def try_another(self) -> None:
        """Begin a trial if half of what may be lost covers it, or if there is reason for one with fewer."""
        mean = statistics.fmean(self.times)
        uneven = statistics.fmean(itertools.islice(reversed(self.times), 8)) > 1.3 * min(self.times)
        cost = 0 if uneven and self.kept > 1 else (self.length() + 1) * mean
        if self.lost + cost <= self.SHARE * self.seconds * (0.5 if cost else 1):
            step = max(1, self.kept // 4) * (-1 if self.fewer or not cost else 1)
            self.fewer = step > 0  # the next time
            self.use(min(max(self.kept + step, 1), self.most))

    def decide(self, best: float) -> None:
        """End a trial: keep what it tried if that is faster, on the whole and not by one slow batch."""
        mean, median = statistics.fmean(self.times), statistics.median(self.times)
        self.lost += max(0, sum(self.trial) - len(self.trial) * mean)
        trial = self.trial[1:]
        if sum(trial) <= best and statistics.median(trial) < 1.05 * median:
            self.fewer = self.used < self.kept  # further that way
            self.kept = self.used
            self.times.clear()
            self.times.extend(trial)
        self.trial.clear()
        self.use(self.kept)


threads = Threads(CORES, FOLLOWS_MACHINE and CORES > 1)


# ------------------------------------------------------ its speed: convolution in blocks of channels


def channels_of_a_block() -> int:
    """Return how many channels oneDNN's kernels compute at once: as many as a vector has floats."""
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as f:
        return 16 if 'avx512f' in f.read() else 8
    return 8  # macOS


BLOCK = channels_of_a_block()


def speed_up(net: nn.HybridSequential, *blocks: nn.HybridBlock) -> None:
    """Compile a HybridSequential and other `blocks`, like a loss; on a CPU, compute in blocks of channels.

    Parameters, their gradients and the outputs stay what they are, to the rounding of float32. (So does what
    MXNet 1.9.1 gets wrong in compiled networks: in some the gradient of nn.PReLU's slope is too small.)
    What MXNet cannot compile is left alone, and said.
    """
    for block in (net, *blocks):
        if isinstance(block, mx.gluon.HybridBlock):
            block.hybridize(static_alloc=True, static_shape=True)
        else:
            say(f'speed_up：{type(block).__name__} 不是 nn.HybridSequential 这样的 HybridBlock，没有动它')
    if type(net).forward is not mx.gluon.HybridBlock.forward or try_gpu().device_type != 'cpu':
        return  # nothing compiles it as a whole, or it has done so itself, as a SymbolBlock does
    amp = sys.modules.get('mxnet.contrib.amp.amp')
    if mx.util.is_np_array() or (amp and amp._amp_initialized):
        say('speed_up：用了 npx.set_np() 或 AMP，网络只编译，不另外加速')
    elif not any(isinstance(hook, Compiler) for hook in net._forward_pre_hooks.values()):
        net.register_forward_pre_hook(Compiler())


class Compiler:
    """Has a network compiled for its first batch, and for every other number of threads: a convolution of
    MXNet keeps the number that it was first computed with. Called before every forward pass.
    """

    def __init__(self):
        self.threads, self.kept = None, {}  # what it is compiled for; the last forms for two other numbers
        self.told = False  # was it said that this network is compiled within another one?

    def __call__(self, net, inputs):
        arrays = arrays_in(inputs)
        if not arrays:  # Symbols: another network is being compiled
            if not self.told:
                self.told = True
                say(f'speed_up：{net.name} 编译在另一个网络里，照原样算；要加速就 speed_up 外面的那个')
            return
        if net._cached_op is None:  # the first time, or after hybridize()
            self.kept.clear()
        elif self.threads == threads.used:
            return
        else:
            self.kept[self.threads] = net._cached_op, net._cached_op_args, net._cached_graph
        self.threads = threads.used
        net._clear_cached_op()
        if self.threads in self.kept:
            net._cached_op, net._cached_op_args, net._cached_graph = self.kept.pop(self.threads)
            return
        if len(self.kept) > 2:  # each has memory of its own: the one that was used longest ago goes
            del self.kept[next(iter(self.kept))]
        # Blocks of 8 waste too little for it; cutting fewer images costs more than it saves, too: 1.1 times.
        copying = BLOCK == 16 and (batch_size_of(arrays) or 0) >= 64
        net.apply(self.prepare)
        if type(net).hybrid_forward is not nn.HybridSequential.hybrid_forward:
            return  # its layers do not just follow each other
        net.hybrid_forward = functools.partial(forward_in_blocks, net, copying)
        layers = list(net._children.values())
        if in_blocks(*layers):
            set_channels(layers[0], *arrays[0].shape[1:2])

    def prepare(self, layer):
        """Have a convolution keep to so many threads, and a Dense layer compute its ReLU quickly."""
        if type(layer) is nn.Conv2D:
            # MXNet keeps kernels by their parameters, of which this one means nothing on a CPU.
            layer._kwargs['workspace'] = 1024 + self.threads
        elif type(layer) is nn.Dense and type(layer.act) is nn.Activation and layer.act._act_type == 'relu':
            layer.act.hybrid_forward = relu


def relu(F, x):
    """Compute it without oneDNN, whose preparations take longer for few numbers."""
    return F.relu(x)


def in_blocks(*layers):
    """Return whether `layers` begin with what can be computed in blocks: a convolution, then max-pooling."""
    return (
        [type(layer) for layer in layers[:2]] == [nn.Conv2D, nn.MaxPool2D]  # not what others derive from them
        and layers[0]._kwargs['num_group'] == 1
        and np.dtype(layers[0].weight.dtype) == np.float32
    )


def forward_in_blocks(net, copying, F, x):
    """Compute what HybridSequential.hybrid_forward does, in the form that oneDNN has fast kernels for."""
    if F is nd:  # hybridize(False): nothing is compiled
        return type(net).hybrid_forward(net, F, x)
    layers = list(net._children.values())
    parts = [(x, 0, 0)]  # what the next layer computes with: see convolve()
    while layers:
        layer, *layers = layers
        if not in_blocks(layer, *layers):
            parts = [(layer(parts[0][0]), 0, 0)]
            continue
        pool, *layers = layers
        channels, copies = layer._channels, copying and room_for_copies(layer, pool, *layers)
        whole = channels - channels % BLOCK if copies else channels
        if parts[-1][2]:
            set_channels(layer, parts[-1][2])
        filters = [array.var() for array in (layer.weight, layer.bias) if array is not None]
        if not copies:
            outputs = [(convolve(F, layer, parts, filters, channels), 0, channels)]
        else:
            # The last 4 of 20 filters would waste most of a block. Copies of them fill it, each moved by one
            # column of the next layer's input; there a kernel of one column does what took three: 1.09 times.
            step = layer._kwargs['stride'][1] * pool._kwargs['stride'][1]
            filters, left_over = zip(*(split(F, array, whole, 0) for array in filters))
            outputs = [
                (convolve(F, layer, parts, filters, whole), 0, whole),
                (convolve(F, layer, parts, left_over, channels - whole, copies, step), whole, channels),
            ]
        # Pooling before the activation, which grows, is the same with a quarter of the work: 1.1 times.
        parts = [(pool(y), first, last) for y, first, last in outputs]
        if not in_blocks(*layers):
            parts = [(cut(F, *parts), 0, 0)]
        if layer.act is not None:
            parts = [(layer.act(y), first, last) for y, first, last in parts]
    return parts[0][0]


def set_channels(layer, *channels):
    """Let a convolution know how many channels come in: MXNet finds out too late to cut its filters."""
    known = layer.weight.shape
    layer.weight.shape = layer._channels, *channels, *layer._kwargs['kernel']
    if layer.weight.shape != known:
        layer.weight._var = None  # a Symbol that was asked for before does not know


def cut(F, part):
    """Return the array of the only part without the zeros behind its channels."""
    x, first, last = part
    return F.slice_axis(x, axis=1, begin=first, end=last) if last else x


def room_for_copies(layer, pool, *following):
    """Return how many columns the next convolution's kernel has, if a block holds as many copies of the
    left-over filters, else 0."""
    if not in_blocks(*following) or layer._channels < BLOCK or not layer.weight.shape[1]:
        return 0
    this, pooling, after = layer._kwargs, pool._kwargs, following[0]._kwargs
    if this['dilate'] != (1, 1) or after['dilate'] != (1, 1) or after['pad'] != (0, 0):
        return 0
    if pooling['pad'] != (0, 0) or pooling['pooling_convention'] != 'valid':
        return 0
    columns = after['kernel'][1]
    return columns if 0 < layer._channels % BLOCK * columns <= BLOCK else 0


def convolve(F, layer, parts, filters, n, copies=1, step=0):
    """Convolve with `n` filters of `layer` (weight and bias), `copies` of each, `step` columns apart.

    The input is the sum of `parts`: (array, first, last) has these channels in its array, then zeros up to a
    multiple of BLOCK; (array, 0, 0) has all of them and no zeros. A part with first > 0 has copies of its
    channels, moved by a column each.
    """
    sums, weights = [], [filters[0]]
    if len(parts) > 1:
        weights = split(F, filters[0], parts[1][1], 1)
    for (x, first, last), weight in zip(parts, weights):
        channels, kwargs = last - first if last else layer.weight.shape[1], layer._kwargs
        alone = channels == 1 and not last  # not one channel with zeros behind it
        if BLOCK == 8 and alone and kwargs['kernel'][0] > 1 and kwargs['dilate'] == (1, 1):
            x, weight, kwargs = in_three_channels(F, x, weight, n, kwargs)
            channels = 3
        height, width = kwargs['kernel']
        if first:
            weight = F.swapaxes(F.reshape(weight, shape=(0, -3, 0)), 1, 2)  # transpose() keeps its threads
            weight = F.reshape(weight, shape=(0, -1, height, 1))
            channels, width = channels * width, 1
        if last:
            weight = append_zeros(F, [weight], 1, (n, -channels % BLOCK, height, width))
            channels += -channels % BLOCK
        beside = [(step * i, step * (copies - 1 - i)) for i in range(copies)]  # columns of zeros
        width += step * (copies - 1)
        moved = [
            F.pad(weight, mode='constant', pad_width=(0,) * 6 + pad) if step else weight for pad in beside
        ]
        # Filters of zeros up to whole blocks: 1.3 times.
        missing = -n * copies % BLOCK
        arrays = [append_zeros(F, moved, 0, (missing, channels, height, width))]
        arrays += [append_zeros(F, [bias] * copies, 0, (missing,)) for bias in filters[1:] if not sums]
        changed = {'kernel': (height, width), 'num_filter': n * copies + missing, 'no_bias': len(arrays) == 1}
        sums += [F.Convolution(x, *arrays, **{**kwargs, **changed})]
    return sum(sums[1:], sums[0])


def in_three_channels(F, x, weight, n, kwargs):
    """Return a convolution of one channel, by `n` filters, as one of three: the array, weight and kwargs.

    The rows of the filters are dealt out to channels that hold the image moved up by as many rows. oneDNN has
    a kernel for AVX2 that computes the gradient of such filters, none for one channel: 1.2 times.
    """
    (height, width), pad = kwargs['kernel'], kwargs['pad']
    rows = math.ceil(height / 3)
    missing = 3 * rows - height
    if any(pad):
        x = F.pad(x, mode='constant', pad_width=(0,) * 4 + (pad[0], pad[0] + missing, pad[1], pad[1]))
    elif missing:  # rows below the image, whichever, for the zeros below the filters
        x = F.concat(x, F.slice_axis(x, axis=2, begin=0, end=missing), dim=2)
    moved = (F.slice_axis(x, axis=2, begin=i * rows, end=(i - 2) * rows or None) for i in range(3))
    weight = append_zeros(F, [weight], 2, (n, 1, missing, width))
    weight = F.reshape(weight, shape=(0, 3, rows, width))
    return F.concat(*moved, dim=1), weight, {**kwargs, 'kernel': (rows, width), 'pad': (0, 0)}


def split(F, array, at, axis):
    """Cut an array in two. The gradient of split_v2 alone does not add up where grad_req is 'add'."""
    return F.split_v2(F.identity(array), (at,), axis=axis)


def append_zeros(F, arrays, axis, shape):
    """Put `arrays` and zeros of this shape together along `axis`."""
    arrays = [*arrays, F.zeros(shape)] if shape[axis] else arrays
    return F.concat(*arrays, dim=axis) if len(arrays) > 1 else arrays[0]


# ------------------------------------------------------------- its speed: few calls for an update

LARGE = 20000  # numbers in a weight


def update_by_size(sgd, indices, weights, grads, states, multi_precision=False):
    """Do what SGD._update_impl does, to float32's rounding: small weights in one call, large ones one by one.

    MXNet's kernel for several weights goes through all of them as often as the largest has numbers.
    """
    if multi_precision or not isinstance(indices, tuple):
        return sgd_update(sgd, indices, weights, grads, states, multi_precision=multi_precision)
    small, large = [], []
    for row in zip(indices, weights, grads, states):
        is_large = row[1].size >= LARGE and row[1].stype == row[2].stype == 'default'
        (large if is_large else small).append(row)
    sgd._update_count([row[0] for row in large])  # all counts come before the first learning rate
    if small:
        sgd_update(sgd, *zip(*small))
    for index, weight, grad, state in large:
        how = {'lr': sgd._get_lr(index), 'wd': sgd._get_wd(index), 'rescale_grad': sgd.rescale_grad}
        if sgd.clip_gradient:
            how['clip_gradient'] = sgd.clip_gradient
        if sgd.momentum > 0:
            nd.sgd_mom_update(weight, grad, state, out=weight, momentum=sgd.momentum, **how)
        else:
            nd.sgd_update(weight, grad, out=weight, **how)


sgd_update = mx.optimizer.SGD._update_impl
if not HAS_CUDA:
    mx.optimizer.SGD._update_impl = update_by_size  # 1.1 times with 16 images, where every call counts


# ------------------------------------------------------------------- several processes, one chat


class Team(mx.kvstore.KVStoreBase):
    """The processes that train together with --workers: one leads, the others follow. Alone, it does nothing.

    MXNet's parameter server adds up their gradients, each updates its own network: they stay equal to the
    bit. What the leading one wants travels the same way between two batches, added to the others' zeros; so
    each must call what adds up equally often, and decide by what came back alone.
    The main thread starts it, trains with it and ends it, one thread connects, one watches for deaths and
    then ends this process: the talking one starts all again. `ready` and `over` are what they know of each
    other. It has no lock.
    """

    type, rank, num_workers = 'dist_sync', 0, 1
    NEEDED = 'progress', 'store', 'total', 'accuracy', 'batch_loss'  # what every training function must call
    WORDS = 512  # bytes of what the leading one says; each travels as a float32, there are no others
    SILENT = 8  # seconds without a sign of life, of which there is one a second; it is asked for twice more

    def __init__(self):
        self.size, self.leads = 1, True
        self.address = None  # of the scheduler: host, port
        self.children = {}  # name -> process on this machine
        self.ready, self.over = threading.Event(), threading.Event()
        self.kv, self.keys, self.silences = None, set(), 0  # the last: how many, in a row
        self.agreed = None  # in all of them: running, learning rate, epochs, chat_param()'s values, Run.scale
        self.images, self.loss = None, None  # of the batch: how many in all; this one's part of its loss
        self.called = set()  # which of NEEDED nn_train has called

    # -- until all are there

    def start(self) -> None:
        """Be the one that leads: start the scheduler, the server and, without --host, the others."""
        one_machine = self.address[0].startswith('127.')
        self.set_up(self.address[0], CORES // self.size if one_machine else CORES - 1)
        for work in (self.watch, self.connect):
            threading.Thread(target=work, daemon=True).start()

    def add_all(self) -> None:
        """Start the others: they live no longer than the thread that calls this."""
        # Those on other machines must have noticed that it is another scheduler, or they disturb it.
        pause = self.SILENT + 4 if options.host else 0
        for name, role in (('调度', 'scheduler'), ('求和', 'server')):
            self.add(name, '-c', SERVE, os.path.dirname(os.path.abspath(__file__)), role, str(pause))
        for i in range(1, 1 if options.host else self.size):
            gpu = (options.gpu + i) % max(mx.context.num_gpus(), 1)
            mark = '%d follows %s:%d %d' % (os.getpid(), *self.address, gpu)
            self.add(f'第 {i + 1} 个训练', *COMMAND, **{ROLE: mark})

    def set_up(self, own_host: str, cores: int) -> None:
        """Let MXNet know where they meet, and how many cores are for this one."""
        host, port = self.address
        where = {'DMLC_PS_ROOT_URI': host, 'DMLC_PS_ROOT_PORT': str(port), 'DMLC_NODE_HOST': own_host}
        who = {'DMLC_NUM_WORKER': str(self.size), 'DMLC_NUM_SERVER': '1', 'DMLC_ROLE': 'worker'}
        os.environ.update(where, **who, PS_HEARTBEAT_INTERVAL='1')
        if FOLLOWS_MACHINE:  # one busy thread more than cores, and it is thirty times slower
            threads.limit(max(1, cores))
            os.environ['OMP_NUM_THREADS'] = str(threads.most)

    def add(self, name: str, *arguments: str, **env: str) -> None:
        """Start a process on this machine."""
        alone = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL, 'start_new_session': True}
        alone.update(preexec_fn=functools.partial(end_with, os.getpid(), ctypes.CDLL(None)), cwd=FOLDER)
        env = {**os.environ, **env}
        self.children[name] = subprocess.Popen([sys.executable, *arguments], env=env, **alone)

    def connect(self) -> None:
        """Wait until all have come."""
        self.kv = mx.kv.create(self.type)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.kv))  # to free it is to wait for the others
        self.rank = self.kv.rank  # in the order of addresses and ports: the one that leads may have any
        self.ready.set()

    # -- while they train

    def begin(self, this_run: Any) -> bool:
        """Wait until all are there and begin with `this_run`; return False when 停止 came before."""
        if self.size == 1:
            return True
        while self.leads and not self.ready.wait(0.2):
            with lock:
                if not running:
                    return False
        if self.leads:
            content = read_private(this_run.checkpoint) if this_run.resumed is not None else b''
            self.agreed = True, this_run.learning_rate, this_run.training_iters, settings.own, this_run.scale
            about = this_run.seed, this_run.batch_size, this_run.person.name[:20]
            self.exchange((self.size, self.agreed, *about, len(content)))
            self.share(content)
        return True

    def part(self, batch: Any, trains: bool = True) -> Any:
        """Return this process's share of a batch, that is of the rows of each array in it."""
        n = batch_size_of(batch) if self.size > 1 else 0
        if trains and not n and self.size > 1:
            raise TypeError(f'几个进程一起训练：{type(batch).__name__} 这样的一批没有数组，分不开')
        if trains and n:
            self.called.add('progress')
            self.images = n if n >= self.size else n * self.size
        if not n or trains and n < self.size:  # not one for each: each takes them all
            return batch
        first, last = n * self.rank // self.size, n * (self.rank + 1) // self.size
        share = functools.partial(map_arrays, lambda x: x[first:last] if x.shape[:1] == (n,) else x)
        return share(batch) if last > first else None

    def check_calls(self, *excused: str) -> None:
        """Raise RuntimeError, in all processes, when the training function has not called what it must."""
        missing = [f'utils.{name}' for name in self.NEEDED if name not in {*excused, *self.called}]
        if self.size > 1 and missing:
            raise RuntimeError(
                f'{self.size} 个进程一起训练，训练函数要调用 {"、".join(missing)}（见 README）'
            )

    def end_batch(self) -> None:
        """Agree on how to go on after a batch; raise NotFinite in all when one's loss is NaN."""
        if self.size > 1:
            if run.steps:  # not before: it may add up the gradients of several batches
                self.check_calls('accuracy')
            loss, self.loss = self.loss, None
            (mean,) = self.meet(loss or 0.0)
            if loss is not None:
                keep_loss(mean)

    def meet(self, *sums: float) -> Any:
        """Return `sums` added up over all processes, and agree on how to go on."""
        if self.size == 1:
            return sums
        with lock:
            words = running, run.learning_rate, run.training_iters, settings.own, run.scale
        self.agreed, sums = self.exchange(words, sums)
        return sums

    def exchange(self, words: Any, sums: Any = ()) -> tuple:
        """Return the leading one's words (JSON) and the sums of all processes' numbers (float32)."""
        text = json.dumps(words).encode() if self.leads else b''
        numbers = np.zeros(self.WORDS + len(sums), np.float32)
        numbers[: len(text)] = np.frombuffer(text, np.uint8)
        numbers[self.WORDS :] = sums
        numbers = self.sum('words', numbers)
        text = numbers[: self.WORDS].astype(np.uint8).tobytes().rstrip(b'\0')
        return json.loads(text), numbers[self.WORDS :].tolist()

    def share(self, content: bytes) -> bytes:
        """Return the leading one's bytes; the others give as many zeros."""
        numbers = np.zeros(-(-len(content) // 2**20) * 2**20, np.float32)  # the server keeps every shape
        numbers[: len(content)] = np.frombuffer(content, np.uint8)
        numbers = self.sum('bytes', numbers) if content else numbers
        return numbers[: len(content)].astype(np.uint8).tobytes()

    def gather(self, array: np.ndarray) -> list:
        """Return the arrays of all processes, in the order of their ranks: of one shape, float32 or bytes."""
        numbers = np.zeros((self.size, *array.shape), np.float32)
        numbers[self.rank] = array
        return list(self.sum('arrays', numbers).astype(array.dtype))

    def sum(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Return the sum of all processes' `numbers` (float32, one shape)."""
        numbers = nd.from_numpy(numbers)
        self.pushpull(name, [numbers])
        return numbers.asnumpy()

    def pushpull(self, key, value, out=None, priority=0):
        """Let `out` become the sum of all processes' `value`, a list for one device: Trainer's gradients."""
        (value,), (out,) = ([each.as_nd_ndarray() for each in arrays] for arrays in (value, out or value))
        key = f'{key} {value.shape}'
        if key not in self.keys:  # once: a second time would wait for ever
            self.kv.init(key, nd.zeros(value.shape))
            self.keys.add(key)
        if value.dtype == np.float32:
            return self.kv.pushpull(key, value, out, priority)
        whole = value.astype(np.float32)  # the store knows nothing else
        self.kv.pushpull(key, whole, whole, priority)
        out[:] = whole

    def broadcast(self, key, value, out, priority=0):
        """Let `out` become what the leading one has: a Trainer's parameters, before its first step."""
        value = value.as_nd_ndarray()
        self.pushpull(key, [value if self.leads else nd.zeros_like(value)], out)
        nd.waitall()  # or the first gradients might overtake them

    @staticmethod
    def is_capable(capability):
        return False  # no optimizer on the server: it would not hear of a new learning rate

    # -- what the others do

    def follow(self, nn_train: Callable) -> None:
        """Train along with the one that leads whenever it begins, until its end."""
        global run
        if role != 'follows':  # on another machine
            itchat.instance.auto_login()
            itchat.instance.get_ready()
        with waiting_for('在等 %s:%d 上的程序（它启动了吗？防火墙？）' % self.address):
            while not (own_host := own_address(self.address)):  # MXNet would wait for one that is gone
                self.over.wait(0.5)
        self.set_up(own_host, CORES // self.size if own_host == self.address[0] else CORES)
        threading.Thread(target=self.leave_when_silent, args=(1,), daemon=True).start()
        self.connect()
        itchat.instance.report('progress')
        say('都到了，等那边说“开始”。')
        while True:
            said, _ = self.exchange(None)
            if said is None or said[0] != self.size:
                say('那边结束了。' if said is None else f'那边是 --workers {said[0]}，这里要一样。')
                itchat.instance.report('bye', status=int(said is not None))
                os._exit(int(said is not None))
            _, self.agreed, seed, batch_size, name, length = said
            content = self.share(bytes(length))
            with lock:
                run = Run(Caller(None, name))
                if content:
                    run.resume('', read_checkpoint(content))
                    run.checkpoint = content
                run.seed, run.batch_size = seed, batch_size
                run.enter(Phase.LOADING)
            train(nn_train, run)

    # -- deaths

    def is_silent(self, group: int) -> bool:
        """Return whether one of a group (1: the scheduler; 6: all but that) has given no sign of life."""
        n = ctypes.c_int()
        call = mx.base._LIB.MXKVStoreGetNumDeadNode
        mx.base.check_call(call(self.kv.handle, group, ctypes.byref(n), self.SILENT))
        self.silences = self.silences + 1 if n.value else 0
        return self.silences > 2

    def leave_when_silent(self, group: int) -> None:
        """End this process when one of a group is silent: a thread of those that do not lead."""
        while not self.is_silent(group) if self.ready.is_set() else own_address(self.address):
            self.over.wait(1)
        self.leave()

    def leave(self) -> None:
        """End this process after a death or an error; what talks on its machine starts it again."""
        os._exit(1)

    def watch(self) -> None:
        """Wait for a death, say so and end this process: a thread of the one that leads."""
        self.add_all()
        began, dead, silent = time.monotonic(), [], False
        while not dead and not silent:
            if self.over.wait(1):
                return
            dead = [name for name, child in self.children.items() if child.poll() is not None]
            silent = self.ready.is_set() and self.is_silent(1)
        what = f'{dead[0]}进程没有了' if dead and dead != ['调度'] else '有一个训练进程没有回应了'
        if not self.ready.is_set() and time.monotonic() - began < 30:
            what += '：几个进程没有能一起开始，原因可能在终端上'
        itchat.instance.report('dying', why=what)
        os._exit(1)

    def end_run(self, this_run: Any) -> None:
        """A run is over. After an error in one, the others may wait for it for ever: begin all again."""
        if self.size > 1 and not isinstance(this_run.error, (NotFinite, type(None))):
            if not self.leads:
                self.over.wait(5)  # if the one that leads has met with the same, it is the one to tell it
                self.leave()
            itchat.instance.leave(1, again=True)

    def end(self) -> None:
        """End the other processes."""
        if self.ready.is_set() and not self.over.is_set():
            words = threading.Thread(target=self.exchange, args=(None,), daemon=True)
            words.start()
            words.join(5)
        self.over.set()
        for child in list(self.children.values()):  # one that is just being started ends with this process
            child.kill()
            child.wait()


SERVE = 'import sys; sys.path.insert(0, sys.argv[1]); import utils; utils.serve(*sys.argv[2:])'


def own_address(scheduler: tuple) -> str:
    """Return by which of its addresses this machine reaches (host, port); '' when it does not."""
    with contextlib.suppress(OSError), socket.create_connection(scheduler, 5) as s:
        return s.getsockname()[0]
    return ''


def end_with(parent: int, libc: Any) -> None:
    """In a new process: be killed when the thread ends that has started it, or `parent`, however it does."""
    with contextlib.suppress(AttributeError):  # not on Linux
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def serve(role: str, pause: str) -> None:
    """Be the scheduler or the server, after a pause, until the one that leads ends it: a whole process."""
    team.over.wait(float(pause))
    os.environ['DMLC_ROLE'] = role
    team.kv = mx.kv.create('dist')
    if role == 'scheduler':  # it alone can tell when another one is silent
        threading.Thread(target=watch_nodes, daemon=True).start()
    # MXNet's own function would unpickle what comes, from whomever.
    ignore = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *args: None)
    mx.base.check_call(mx.base._LIB.MXKVStoreRunServer(team.kv.handle, ignore, None))


def watch_nodes() -> None:
    """End the scheduler when another process is silent: a thread of it."""
    team.address = os.environ['DMLC_PS_ROOT_URI'], int(os.environ['DMLC_PS_ROOT_PORT'])
    while not own_address(team.address):  # before it listens, MXNet would crash at the question
        team.over.wait(0.5)
    team.ready.set()
    team.leave_when_silent(6)


def find_address() -> tuple:
    """Return where the scheduler is to be, host and port. Raises OSError when that cannot be."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((options.host or '127.0.0.1', options.port if options.host else 0))
        return s.getsockname()


def compare(what: str, own: Any) -> None:
    """Raise RuntimeError in all --workers when what they give here does not print the same."""
    number = zlib.crc32(repr(own).encode('utf-8', 'replace')) % 2**24  # as many are exact in a float32
    if len(set(np.concatenate(team.gather(np.array([number], np.float32))))) > 1:
        raise RuntimeError(f'几个进程的{what}不一样，一样才能一起训练')


def source_of(what: Any) -> str:
    """Return its source text; '' when there is none."""
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(what)
    return ''


def missing_processes() -> str:
    """Return how many processes are still to come, in words; '' when all are there."""
    if team.size == 1 or team.ready.is_set():
        return ''
    come = connected_to(team.address[1])  # the scheduler's own and the server's are among them
    others = sorted({host for host in come if host != team.address[0]})
    note = f'，从 {"、".join(others)} 来的已经到了' if others else ''
    note += '：--workers %d --join %s:%d' % (team.size, *team.address) if options.host else ''
    return f'在等 {min(max(team.size + 2 - len(come), 1), team.size - 1)} 个训练进程加入{note}'


def connected_to(port: int) -> list:
    """Return the addresses from which somebody is connected to a port of this machine (Linux)."""
    with contextlib.suppress(OSError), open('/proc/net/tcp') as f:
        rows = [line.split()[1:4] for line in f][1:]  # local and remote address, state: 01 is connected
        hosts = [remote[:8] for local, remote, state in rows if (local[9:], state) == (f'{port:04X}', '01')]
        return [socket.inet_ntoa(bytes.fromhex(host)[::-1]) for host in hosts]
    return []


# ------------------------------------------------------------------------- what a training loop calls

# `lock` guards the variables from here to `run`, and everything in a Run: the listening thread changes them
# when a person says so, the training thread reads them between batches. Hold it for a moment only.
lock = threading.Lock()
running = False  # may the training go on? Changed by Run.enter() alone
batch_size = 256  # images
learning_rate = 0.5
training_iters = 2  # epochs


def lock_start() -> bool:
    """Return True while the run may go on: from 开始 until 停止. A training loop asks before an epoch."""
    team.meet()
    with lock:
        run.begin_epoch()
        return run.now()[0]


def params() -> tuple:
    """Return learning_rate, training_iters, batch_size as they now stand for this run.

    A training loop that asks has the changes that a person makes while it trains: lr from the next batch on,
    ti as the new end.
    """
    with lock:
        run.take_values()
        return (*run.now()[1:], run.batch_size)


def store() -> Any:
    """Return what a Trainer takes as its kvstore: with --workers, the one that adds up all gradients."""
    team.called.add('store')
    return team if team.size > 1 else 'device'


def total(n: int) -> int:
    """Return how many images the batch has in which this process has `n`: what trainer.step() takes.

    Raises RuntimeError when there are --workers and the batch does not come from progress().
    """
    team.called.add('total')
    if team.size > 1 and not team.images:
        raise RuntimeError('几个进程一起训练，训练的数据要从 utils.progress(train_data) 来')
    return team.images or n


def progress(data: Iterable, train: Optional[bool] = None) -> Iterator:
    """Yield what `data` yields, with a progress bar on the terminal.

    In a pass that trains the batches are counted, nothing more comes after 停止, and in a resumed epoch those
    done before are left out. A pass trains when `train` says so. When it says nothing, the first pass of an
    epoch does, unless no Trainer takes a step in it; without any Trainer, it does. A loop over the train_data
    of load_data_fashion_mnist trains; evaluate_accuracy() does not.
    """
    size = operator.length_hint(data)  # 0 when nobody knows
    with lock:
        walk = run.begin_pass(size, train)
    if walk.trains:
        seed_epoch(run.seed, walk.epoch)
    if walk.trains and team.size > 1:
        labels = data.labels.tobytes() if isinstance(data, Batches) else b''
        compare('训练数据', [size, walk.first, labels])
    batches = one_pass(data, walk.first, walk.epoch if walk.trains else None)
    name = f'第 {walk.epoch} 轮' if walk.trains else None
    how = itchat.instance.bar() if team.leads else {'disable': True}
    whole = False
    try:
        with tqdm(batches, name, size or None, initial=walk.first, unit='批', leave=False, **how) as bar:
            for batch in waiting_for_first(bar, '第一批正在算') if walk.trains and not run.steps else bar:
                began = time.perf_counter()
                images = batch_size_of(batch) or 0
                yield team.part(batch) if walk.trains else batch
                if walk.trains:
                    if 1 < walk.done + 1 < size:  # the first one compiles, the last one may be smaller
                        threads.count(time.perf_counter() - began)
                    team.end_batch()
                with lock:
                    run.count_batch(walk, images)
                if walk.state is Walk.CUT:
                    return
        whole = True
    finally:  # also when the loop is left in the middle
        team.images = None if walk.trains else team.images
        with lock:
            run.end_pass(walk, whole)


def waiting_for_first(batches: Iterable, what: str) -> Iterator:
    """Yield what `batches` yields; say what is being waited for when the first one takes long."""
    batches = iter(batches)
    with waiting_for(what):  # until the second one is asked for
        yield from itertools.islice(batches, 1)
    yield from batches


def batch_loss(loss: nd.NDArray) -> float:
    """Return the mean of the losses of a batch (N,), and keep it for 状态 and 曲线.

    A sum of such means knows how many examples each had, see class Share. With --workers, return this
    process's part of it. Raises FloatingPointError when it is NaN or infinite: nothing good can come of
    that run.
    """
    team.called.add('batch_loss')
    numbers = as_numpy(loss)
    count = numbers.shape[0] if numbers.ndim else 1
    if team.images:  # progress() adds up the parts
        team.loss = float(numbers.sum()) / team.images
        return Share(team.loss, float(numbers.sum()), count)
    value = float(numbers.mean())
    keep_loss(value)
    return Share(value, value * count, count)


def keep_loss(value: float) -> None:
    """Keep the loss of a batch. Raises FloatingPointError when it is not finite."""
    with lock:
        run.keep_loss(value)
    check_finite(value)


class NotFinite(FloatingPointError):
    """A loss or a parameter is NaN or infinite, in all --workers: they have added it up."""


def check_finite(loss: float) -> None:
    """Raise FloatingPointError when `loss` is NaN or infinite."""
    if not math.isfinite(loss):
        with lock:
            run.bad_batch = run.walk.done + 1 if run.walk and run.walk.state is Walk.GOING else 0
        raise NotFinite(f'损失成了 {loss}')


def best_by(name: str, lower: bool = False) -> None:
    """Let one of the run's numbers decide which epoch is the best: test_acc, loss, or one of chat_inf()'s.

    `lower`: the smaller the better. 最好, 早停, 回退 and ★ go by it. To be called once, before the loop.
    """
    with lock:
        if run.busy:
            run.history.decide_by(name, lower)
        else:
            settings.best_by = name, lower


def chat_inf(
    wechat_name: str,
    epoch: int,
    train_loss: Any,
    train_acc: Any,
    train_data: Any = None,
    test_acc: Any = None,
    **numbers: float,
) -> None:
    """Send the report after an epoch, which counts from 1, to who started the run and the supervisors.

    `train_loss` and `train_acc` are sums over the batches, of which `train_data` has len(), or progress() has
    counted them; numbers or NDArrays of one element. `train_acc` and `test_acc` may be None: not measured.
    After an epoch that 停止 cut short nothing is reported. Your own `numbers`, like f1=0.83, stand in the
    report, in log.csv and in the curve; seconds=3, as a column is called, as seconds_.
    Raises FloatingPointError when the loss is not finite, TypeError when nobody knows of how many batches.
    """
    sums = team.meet(*parts_of(train_loss), *parts_of(train_acc))
    with lock:
        run.leave_pass()
        if run.is_cut_short():
            return
        batches = run.batches_reported(train_data)
    team.check_calls(*['accuracy'] * (not sums[3]))
    loss = mean_of(*sums[:3], batches) if train_loss is not None else None
    accuracy = mean_of(*sums[3:], batches) if train_acc is not None else None
    test_acc = None if test_acc is None else float(test_acc)
    numbers = {name + '_' * (name in History.COLUMNS): float(value) for name, value in numbers.items()}
    if loss is not None:
        check_finite(loss)
    with lock:
        report = run.finish_epoch(epoch, loss, accuracy, test_acc, numbers)
        row = {**values_of(run.history.rows[-1]), 'epoch': run.epochs}
        run.tell(*[report] * run.is_due(), **run.facts(), row=row)
        if run.has_no_patience_left():
            run.patience = settings.patience
            run.enter(Phase.ENDING, Ending.EARLY)
    run.write_log()


def load_checkpoint(net: Any, trainer: Any, extra: Optional[dict] = None) -> tuple:
    """Return the epoch to go on with, which counts from 1, and the sums of loss and accuracy in it so far.

    That is 1, 0, 0, unless a person has said 继续: then `net` and `trainer`, each one or a list of several,
    become what they were, `extra` what save_checkpoint() was given, and the learning rate is the one that was
    announced, where no scheduler decides. Raises RuntimeError when the checkpoint has another number of them.
    """
    nets, trainers = as_list(net), as_list(trainer)
    run.keepers = {id(each) for each in trainers}
    state = run.resumed
    seed_epoch(run.seed, state['epoch'] if state else 1)
    if state is None:
        return 1, 0, 0
    where = run.folder or FOLDER  # TMPDIR may have no room; one of the --workers has no folder of the run
    unpacked = tempfile.TemporaryDirectory(dir=where, prefix='checkpoint-', suffix=NEW)
    with unpacked as folder, open_private(run.checkpoint) as f:
        with zipfile.ZipFile(f) as checkpoint:
            checkpoint.extractall(folder)
        kept = [
            len(glob.glob(os.path.join(glob.escape(folder), f'*.{kind}'))) for kind in ('params', 'states')
        ]
        if kept != [len(nets), len(trainers)]:
            raise RuntimeError('检查点里有 %d 个网络、%d 个 Trainer，和这个训练函数的不一样' % tuple(kept))
        for path, each in zip(part_names(folder, 'net.params'), nets):
            ready = any(p._data or p._deferred_init for p in each.collect_params().values())
            each.load_parameters(path, ctx=None if ready else try_gpu())  # None: where it has been put
        orders = zip(part_names(folder, 'trainer.states'), trainers, state['orders'])
        for path, each, order in orders:
            reorder_states(path, order, names_in_order(nets, each))
            each.load_states(path)
        if extra is not None:
            extra.update(read_extra(folder))
    with lock:
        learning_rate = run.now()[1]
        run.loaded = True
    for each in trainers:
        if each.optimizer.lr_scheduler is None and len(trainers) == 1:
            each.set_learning_rate(learning_rate)
    return (state['epoch'], *own_sums(state))


def save_checkpoint(
    net: Any, trainer: Any, epoch: int, train_loss: Any, train_acc: Any, extra: Optional[dict] = None
) -> tuple:
    """Keep what 继续 needs; return the epoch to go on with and the sums in it so far, as load_checkpoint().

    `net` and `trainer` are one each, or lists of several; `extra` is what else is to be kept, by name:
    numbers, texts, lists, tuples, dicts, arrays. After a whole epoch the epoch is epoch + 1, the sums 0,
    0; after one that 停止 cut short, what was given. A failure (a full disk) is told, and the training goes
    on: the checkpoint before stays whole. Raises FloatingPointError, and keeps the checkpoint before,
    when a parameter is not finite.
    """
    nets = as_list(net)
    with run.during(Phase.SAVING):
        with lock:
            run.leave_pass()
            here = (epoch, train_loss, train_acc) if run.is_cut_short() else (epoch + 1, 0, 0)
            run.finish_unreported(epoch)
            state, log, losses = run.state(*here), run.history.csv(), np.array(run.losses.points)
            row = run.history.row_of(epoch) if not state['batch'] else None
            is_best, state['row'] = row is not None and row is run.history.best, row and row.number
            state['orders'] = [names_in_order(nets, each) for each in as_list(trainer)]
        seed_epoch(run.seed, here[0])
        if team.size > 1:
            add_sums(state)
        for each in nets:
            even_out(each)
        if not state['epochs'] and not state['batch']:
            return here  # nothing has been learned yet
        check_parameters(nets)
        if is_best:
            run.write('best.params', '最好的网络', nets[0].save_parameters)
        kept = nets, trainer, state, losses, log, extra, run.mistakes
        path = run.write('last.zip', '检查点', lambda path: write_checkpoint(path, *kept))
        if path and is_best:
            run.write('best.zip', '最好的检查点', lambda best: shutil.copyfile(path, best))
        if path:
            with lock:
                run.checkpoint = path
                run.tell(checkpoint=path, kept=run.how_far())
    return here


def check_parameters(nets: list) -> None:
    """Raise FloatingPointError when a parameter is not finite; one that was never computed has no numbers."""
    for name, parameter in [pair for each in nets for pair in each.collect_params().items()]:
        if parameter._data and not np.isfinite(as_numpy(parameter._data[0])).all():
            raise NotFinite(f'网络的 {name} 里有 NaN 或无穷大')


def names_in_order(nets: list, trainer: Any) -> list:
    """Return where in the networks each of a Trainer's parameters is, in its order.

    That order is of MXNet's names, dense9 behind dense10, and these count on from run to run in a process.
    """
    found = {}
    for number, net in enumerate(nets):
        inside = net._collect_params_with_prefix() if hasattr(net, '_collect_params_with_prefix') else {}
        found.update({id(parameter): f'{number}.{name}' for name, parameter in inside.items()})
    return [found.get(id(parameter), parameter.name) for parameter in trainer._params]


def reorder_states(path: str, before: list, now: list) -> None:
    """Bring the states of an optimizer that Trainer.save_states() has written into another order."""
    if before == now or sorted(before) != sorted(now):
        return
    with open_private(path) as f:
        states, optimizer = pickle.load(f)
    place = {i: now.index(name) for i, name in enumerate(before)}
    for counts in optimizer._all_index_update_counts.values():
        moved = {place[i]: count for i, count in counts.items()}
        counts.clear()
        counts.update(moved)
    with open(path, 'wb') as f:
        pickle.dump(({place[i]: state for i, state in states.items()}, optimizer), f)


def as_list(value: Any) -> list:
    """Return the elements of a list or tuple, or the value alone."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def part_names(folder: str, name: str) -> Iterator:
    """Yield the names of the files for several of a kind: net.params, net-2.params and so on."""
    yield os.path.join(folder, name)
    for number in itertools.count(2):
        yield os.path.join(folder, f'-{number}'.join(os.path.splitext(name)))


def chat_param(name: str, default: Any, smallest: Any = None, largest: Any = None) -> Any:
    """Return a value of the training function's own that can be set by chat, `name 0.001`, as it stands.

    It is `default`, an int or a float, until a person sets it; a checkpoint keeps it. To be called where the
    value is used, for each batch or epoch. A default that is not negative makes 0 the `smallest`.
    Raises ValueError for a name that cannot be one, TypeError for another kind of value.
    """
    spec = type(default), default, smallest, largest
    if run.declared.get(name) != spec:
        declare(name, default, smallest, largest)
        run.declared[name] = spec
    with lock:
        own = team.agreed[3] if team.agreed else settings.own
        value = own.get(name, run.own.get(name, default))
        if run.own.get(name, value) != value:
            run.marks.append((run.epochs_done(), f'{name} {value}'))
        run.own[name] = value
        return value


def declare(name: str, default: Any, smallest: Any, largest: Any) -> None:
    """Let a value be set by chat, and the talking process know of it."""
    if not re.fullmatch(r'[a-z][a-z_0-9]{0,19}', name) or name in WORDS or name in NAMES:
        raise ValueError(
            f'chat_param：“{name}”不能当名字，要用小写字母、数字和 _，不能和命令、lr、ti、bs 相同'
        )
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        raise TypeError(f'chat_param：{name} 的初值要是 int 或 float')
    lowest = 0 if default >= 0 else -math.inf
    kind = 'int' if isinstance(default, int) else 'float'
    limits = lowest if smallest is None else smallest, math.inf if largest is None else largest
    with lock:
        own_params[name] = (kind, *limits, default)
        for values in (settings.own, run.own):  # set when the script had another kind or other limits
            with contextlib.suppress(KeyError, ValueError):
                values[name] = read_value(name, str(values.pop(name)))
    itchat.instance.report('params', params=own_params)


def lock_end(wechat_name: str) -> None:
    """The run is over: free the lock for the next 开始, which works when nn_train has returned.

    Then the one who started the run and the supervisors are told; see train().
    """
    with lock:
        run.enter(Phase.ENDING, Ending.DONE)


def chat_send(text: str) -> None:
    """Send `text` to the one who started the run and to the supervisors; returns at once."""
    with lock:
        run.tell(text)


class ChatHandler(
    estimator.TrainBegin, estimator.EpochBegin, estimator.BatchBegin, estimator.BatchEnd, estimator.EpochEnd
):
    """Lets an Estimator's fit() inside nn_train be watched and steered like a training loop.

    est.fit(train_data, val_data, epochs=params[1], event_handlers=[utils.ChatHandler(wechat_name)]) reports
    every epoch with all metrics, takes lr and ti by chat, ends at 停止, and is saved and gone on with in the
    middle of an epoch. Called by fit(), in the training thread.
    """

    priority = -1  # after the step and the metrics (-2000, -1000), before the Estimator's own StoppingHandler

    def __init__(self, wechat_name: str):
        self.wechat_name = wechat_name
        self.epoch, self.loss, self.acc = 1, 0, 0
        self.begins = False  # is the next pass over the loader the one that trains?

    def train_begin(self, estimator: Any, *args, **kwargs) -> None:
        """Take up a checkpoint; from now on the loader's batches are counted, and ti decides the end."""
        self.epoch, self.loss, self.acc = load_checkpoint(estimator.net, estimator.trainer)
        frame = sys._getframe(1)
        while 'train_data' not in frame.f_locals:  # fit()'s, which gives it to no handler
            frame = frame.f_back
        loader = frame.f_locals['train_data']
        kind = type(loader)

        class Counted(kind):
            def __iter__(loader):
                begins, self.begins = self.begins, False
                batches = SizedIterable(len(loader), lambda: kind.__iter__(loader))
                return progress(batches, train=True) if begins else iter(batches)

        loader.__class__ = Counted
        if not estimator.max_epoch:
            return
        with lock:
            if not run.resumed and 'training_iters' not in settings.chosen:
                run.training_iters = estimator.max_epoch
        estimator.max_epoch = LIMITS['training_iters'][2]  # before the StoppingHandler sees it

    def epoch_begin(self, estimator: Any, *args, **kwargs) -> None:
        """An epoch begins."""
        lock_start()
        self.begins = True

    def batch_begin(self, estimator: Any, *args, **kwargs) -> None:
        """Let a new learning rate count, where no scheduler decides."""
        if estimator.trainer.optimizer.lr_scheduler is None:
            estimator.trainer.set_learning_rate(params()[0])

    def batch_end(self, estimator: Any, *args, loss: Any = None, **_) -> bool:
        """Add up; return True at 停止."""
        self.loss += batch_loss(joined(loss))
        return not running

    def epoch_end(self, estimator: Any, *args, **kwargs) -> bool:
        """Report and keep a checkpoint; return True when this was the last epoch."""
        numbers, test_acc = {}, None
        for metric in estimator.val_metrics:
            name, value = metric.get()
            if isinstance(metric, mx.metric.Accuracy):
                test_acc = None if math.isnan(value) else value
            elif not isinstance(metric, mx.metric.Loss) and not math.isnan(value):
                numbers[name] = value
        for metric in estimator.train_metrics:
            if isinstance(metric, mx.metric.Accuracy):
                self.acc += Share(metric.get()[1], metric.sum_metric, metric.num_inst)
        acc = self.acc if isinstance(self.acc, Share) else None
        chat_inf(self.wechat_name, self.epoch, self.loss, acc, None, test_acc, **numbers)
        kept = estimator.net, estimator.trainer, self.epoch, self.loss, self.acc
        self.epoch, self.loss, self.acc = save_checkpoint(*kept)
        return not lock_start() or self.epoch > params()[1]


class SizedIterable:
    """What a function returns an iterator over, with a length."""

    def __init__(self, size: int, start: Callable):
        self.size, self.start = size, start

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator:
        return self.start()


def joined(arrays: Any) -> nd.NDArray:
    """Return the parts of a batch on several devices as one array; an array as it is."""
    if not isinstance(arrays, list):
        return arrays
    return arrays[0] if len(arrays) == 1 else nd.concat(*(a.as_in_context(mx.cpu()) for a in arrays), dim=0)


class Share(float):
    """A mean over a batch, or the sum of several, that knows how many examples it is of.

    As a number it is what a tutorial's `train_acc += accuracy(...)` adds up; a last batch of one image then
    weighs as much as one of 256. `total` / `count` is the mean over the examples, by which chat_inf() goes.
    """

    def __new__(cls, value: float, total: float, count: float):
        share = super().__new__(cls, value)
        share.total, share.count = total, count
        return share

    def __add__(self, other):
        if isinstance(other, Share):
            return Share(float(self) + float(other), self.total + other.total, self.count + other.count)
        added = float(self) + other
        return (
            Share(added, self.total, self.count) if isinstance(other, (int, float)) and not other else added
        )

    __radd__ = __add__

    def __reduce__(self):
        return Share, (float(self), self.total, self.count)


def parts_of(value: Any) -> tuple:
    """Return what all processes can add up of a sum: itself, and the total and the count of a Share."""
    if value is None:
        return 0.0, 0.0, 0.0
    return float(value), getattr(value, 'total', 0.0), getattr(value, 'count', 0.0)


def mean_of(value: float, total: float, count: float, batches: Optional[int]) -> float:
    """Return the mean of what parts_of() has taken apart: over the examples, else over the batches."""
    if count:
        return total / count
    if not batches:
        raise TypeError('不知道这一轮有几批：train_data 没有 len()，训练也没有用 utils.progress(train_data)')
    return value / batches


def add_sums(state: dict) -> None:
    """Put the sums of all processes into what a checkpoint holds, and each one's own."""
    own = np.array(state['sums'])
    rows = [row.view(float).tolist() for row in team.gather(own.view(np.uint8))]
    state.update(sums=[sum(column) for column in zip(*rows)], parts=rows)


def own_sums(state: dict) -> tuple:
    """Return the sums of loss and accuracy with which this process goes on from a checkpoint."""
    sums, parts = state['sums'], state.get('parts', ())
    if len(parts) == team.size:
        sums = parts[team.rank]
    elif not team.leads:
        return 0, 0
    return tuple(Share(*three) if three[2] else three[0] for three in (sums[:3], sums[3:]))


# --------------------------------------------------------------------------------------- a run


class Losses:
    """The losses of all batches, at most POINTS of them: when there are more, neighbours are merged.

    Part of a Run, and guarded as it is.
    """

    POINTS = 10000
    RECENT, TIMES, HIGH = 100, 3, 50  # see jump()

    def __init__(self, points=(), size=1, rest=(0, 0, 0), last=None):
        self.points = list(points)  # pairs: epochs done by then (2.5 is amid the third), mean loss
        self.size = size  # batches in a point
        self.rest = rest  # of the next point: batches so far, the sums of both numbers
        self.last = last  # the loss of the last batch
        self.of_epoch = len(self.points)  # where those of this epoch begin
        self.recent, self.ordered = collections.deque(), []  # the last hundred; the same, by size
        self.high = 0  # batches in a row that stood high above them

    def add(self, epochs: float, loss: float) -> None:
        """Keep the loss of a batch, after which so many epochs were done."""
        self.last = loss
        n, epochs_sum, loss_sum = self.rest
        self.rest = n + 1, epochs_sum + epochs, loss_sum + loss
        if self.rest[0] == self.size:
            self.points.append((self.rest[1] / self.size, self.rest[2] / self.size))
            self.rest = 0, 0, 0
        if len(self.points) == self.POINTS:
            pairs = zip(self.points[::2], self.points[1::2])
            self.points = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in pairs]
            self.size *= 2
            self.of_epoch //= 2

    def jump(self, loss: float) -> Optional[float]:
        """Return the median of the last hundred when this is the fiftieth loss in a row that is above three
        times that; those of such a row are not among the hundred until then."""
        half = self.RECENT // 2
        median = sum(self.ordered[half - 1 : half + 1]) / 2 if len(self.ordered) == self.RECENT else 0
        self.high = self.high + 1 if 0 < self.TIMES * median < loss else 0
        if self.high == self.HIGH:
            return median
        if math.isfinite(loss) and not self.high:
            if len(self.ordered) == self.RECENT:
                del self.ordered[bisect.bisect_left(self.ordered, self.recent.popleft())]
            self.recent.append(loss)
            bisect.insort(self.ordered, loss)
        return None


class Row(NamedTuple):
    """An epoch that was reported: a row of log.csv. None: not measured."""

    epoch: int
    loss: Optional[float]
    train_acc: Optional[float]
    test_acc: Optional[float]
    learning_rate: float  # of the last batch
    seconds: float
    number: int  # of all rows of the run; the checkpoint of that epoch carries it
    numbers: dict = {}  # a person's own, by name


class History:
    """The epochs of a run that were reported, as text, too, and which of them is the best.

    Part of a Run, and guarded as it is. There may be a hundred thousand: nothing goes through all of them
    at the end of an epoch, but what joins their texts.
    """

    COLUMNS = Row._fields[:-1]

    def __init__(self, rows: Iterable = (), by: str = 'test_acc', lower: bool = False):
        self.rows, self.own, self.best = [], [], None  # own: the names of a person's own numbers
        self.lines = []  # of log.csv, one for each row
        self.by, self.lower = by, lower  # which number decides, and is less of it better?
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Note another row."""
        self.rows.append(row)
        new = [name for name in row.numbers if name not in self.own]
        if new:  # another column
            self.own = sorted([*self.own, *new])
            self.lines = [self.line(each) for each in self.rows]
        else:
            self.lines.append(self.line(row))
        if self.score(row) > (self.score(self.best) if self.best else -math.inf):
            self.best = row

    def score(self, row: Row) -> float:
        """Return how good an epoch was, the more the better; -inf where that was not measured."""
        value = self.decisive(row)
        return -math.inf if value is None or math.isnan(value) else -value if self.lower else value

    def decisive(self, row: Row) -> Optional[float]:
        """Return the number of an epoch that decides which is the best."""
        return getattr(row, self.by) if self.by in self.COLUMNS else row.numbers.get(self.by)

    def decide_by(self, by: str, lower: bool) -> None:
        """Let another number decide."""
        if (by, lower) != (self.by, self.lower):
            self.__init__(self.rows, by, lower)

    def next_number(self) -> int:
        """Return the number of the next row."""
        return self.rows[-1].number + 1 if self.rows else 1

    def row_of(self, epoch: int) -> Optional[Row]:
        """Return the last row if that is of an epoch."""
        return self.rows[-1] if self.rows and self.rows[-1].epoch == epoch else None

    def line(self, row: Row) -> str:
        """Return a row as a line of CSV."""
        return csv_line([*row[:-1], *(row.numbers.get(name) for name in self.own)])

    def header(self) -> str:
        """Return the line above them."""
        return csv_line([*self.COLUMNS, *self.own])

    def csv(self) -> str:
        """Return the whole as CSV."""
        return self.header() + ''.join(self.lines)

    @classmethod
    def read(cls, text: str) -> list:
        """Return the rows in what csv() returned. Raises ValueError."""
        rows = []
        for number, cells in enumerate(csv.DictReader(io.StringIO(text)), 1):
            values = {name: float(cell) if cell else None for name, cell in cells.items()}
            fixed = [values.pop(name, None) for name in cls.COLUMNS]
            fixed[0], fixed[-1] = int(fixed[0]), int(fixed[-1] or number)
            rows.append(Row(*fixed, {name: value for name, value in values.items() if value is not None}))
        return rows


def csv_line(cells: Iterable) -> str:
    """Return a line of CSV; None is an empty cell."""
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


class Scaled(mx.lr_scheduler.LRScheduler):
    """A Trainer's scheduler, and a factor by which a person multiplies its rate: lr x0.5.

    It travels in a checkpoint with the Trainer's states.
    """

    def __init__(self, scheduler: mx.lr_scheduler.LRScheduler, factor: float):
        super().__init__(scheduler.base_lr)
        self.scheduler, self.factor_by_chat = getattr(scheduler, 'scheduler', scheduler), factor

    def __call__(self, num_update: int) -> float:
        return self.scheduler(num_update) * self.factor_by_chat


class Walk(enum.Enum):
    """Of a pass: GOING -> DONE, when the loop has ended or was left, or CUT, by 停止 in its middle."""

    GOING, DONE, CUT = range(3)


class Pass:
    """A pass over data, by progress(). The training thread makes it; it is guarded as the Run is."""

    def __init__(self, place: tuple, size: int, said: Optional[bool], trains: bool, this_run: 'Run'):
        self.epoch, self.first = place  # the latter: the batch that it begins with, from 0
        self.size = size  # batches in all; 0: nobody knows
        self.said = said  # what progress() was told: does it train?
        self.trains = trains  # does it, as far as is known?
        self.proven = bool(said)  # is that sure?
        self.steps, self.before = this_run.steps, this_run.phase  # when it began
        self.counted = self.steps  # steps that Trainers had taken by the end of the last batch
        self.state = Walk.GOING
        self.done = self.first  # batches of the epoch
        self.images = 0  # in those of this pass


class Clock:
    """What a run takes: in all, in this epoch, for a batch, and from one training pass to the next. Seconds.

    Part of a Run, and guarded as it is.
    """

    def __init__(self, before: float = 0.0, in_epoch: float = 0.0, rest: Optional[float] = None):
        self.began = self.epoch_began = self.stepped = time.monotonic()  # the last: when a batch was done
        self.last = self.began  # a sign of life
        self.ended = None
        self.before, self.epoch_before = before, in_epoch  # of the run, of the epoch, before 继续
        self.batches, self.training = 0, 0.0  # measured, and what they took
        self.epochs, self.in_epochs = 0, 0.0  # likewise
        self.rest = rest  # from the end of a pass to the next one's beginning: test, checkpoint
        self.pass_ended = None
        self.since = self.began  # from when on what left() says counts down; None: it does not

    def elapsed(self) -> float:
        """Return for how long the run has been going on."""
        return self.before + (self.ended or time.monotonic()) - self.began

    def in_epoch(self) -> float:
        """Return how long this epoch has taken so far."""
        return self.epoch_before + time.monotonic() - self.epoch_began

    def begin_pass(self) -> None:
        """A pass over the training data begins; an epoch does, unless it had been cut short."""
        now = time.monotonic()
        if self.pass_ended is not None:
            self.rest, self.pass_ended = now - self.pass_ended, None
        self.epoch_began = self.last = self.since = self.stepped = now

    def end_pass(self) -> None:
        """It is over."""
        self.pass_ended = self.last = self.since = time.monotonic()

    def count_batch(self, batches: int) -> None:
        """So many batches are done since the last time."""
        now = time.monotonic()
        self.batches, self.training = self.batches + batches, self.training + now - self.stepped
        self.since = self.stepped = now

    def finish_epoch(self) -> float:
        """An epoch is done; return what it took."""
        now, seconds = time.monotonic(), self.in_epoch()
        self.epochs, self.in_epochs = self.epochs + 1, self.in_epochs + now - self.epoch_began
        if self.rest is None and self.pass_ended is not None:
            self.rest = now - self.pass_ended
        self.epoch_began, self.epoch_before, self.last, self.since = now, 0.0, now, None
        return seconds

    def left(self, batches: int, epochs: int) -> Optional[float]:
        """Return what so many batches, or at least so many epochs, will take; None when nobody knows."""
        now = time.monotonic()
        if self.batches and batches is not None:
            batch, rest = self.training / self.batches, self.rest or 0.0
            spent = min(now - (self.since or now), batch if self.pass_ended is None else rest)
            return max(0.0, batch * batches + rest * epochs - spent)
        if self.epochs:
            epoch = self.in_epochs / self.epochs
            return max(0.0, epoch * epochs - min(now - self.epoch_began, epoch))
        return None


class Run:
    """One training run: what is known of it, and what can be said about it.

    The training thread writes it, the listening and the drawing one read it. `lock` guards it: every method
    needs it but for make_folder(), during(), write() and write_log(), which are called without it.
    """

    def __init__(self, person: 'Optional[Caller]' = None):
        self.person = person  # who started it
        self.number, self.data = 0, data_name()  # of all runs in this folder; what it trains with
        self.name, self.queued = '', ''  # 开始 小学习率; its number among those of 排队, '2/3'
        self.jumped = False  # was it told that its loss has jumped?
        self.begun = time.time()  # by which it is known, wherever its folder goes
        self.learning_rate, self.training_iters = learning_rate, training_iters
        self.batch_size, self.seed = batch_size, options.seed  # a resumed run keeps its own
        self.phase, self.reason = Phase.WAITING, None  # the latter: an Ending
        self.error = None  # what nn_train raised
        self.bad_batch = 0  # whose loss was not finite; 0: it was none of a batch
        self.folder = None  # its checkpoints and its log; made when there is something to keep
        self.checkpoint = None  # the file that can be resumed from
        self.resumed = None  # what read_checkpoint() returned, if the run goes on with an earlier one
        self.loaded = False  # has nn_train called load_checkpoint() for it?
        self.unwritten = set()  # what could not be written, and the person was told so
        self.logged, self.columns = 0, []  # rows in log.csv, a person's own columns there
        self.patience = 0  # with which it ended by itself
        self.history = History((), *settings.best_by)
        self.mistakes = []  # of the last evaluation: see Mistakes
        self.rolling_back = False  # is it to go back to the best epoch when it has ended?
        self.marks = []  # pairs: epochs done, what happened there, for the curve
        self.losses = Losses()
        self.live = None  # does nn_train ask for new values? None: it has not come to that yet
        self.wanted = {}  # values that were set by then
        self.steps, self.rate = 0, None  # that Trainers have taken; the learning rate of the last batch
        self.steppers, self.keepers = set(), None  # id() of Trainers: that step; in load_checkpoint()
        self.first_rate = self.last_rate = None  # as a Trainer has used them; the former: in its first step
        self.scheduled, self.scale = False, 1.0  # has the Trainer a scheduler? by what is its rate multiplied
        self.own = {}  # name -> value, as chat_param() has returned it last
        self.declared = {}  # name -> kind, default and limits, as nn_train has asked for it last
        self.epochs = 0  # done
        self.batch = self.batches = 0  # done and in all in this epoch; 0 when progress() is not used
        self.unfinished = 0  # batches of the epoch that 继续 goes on with, until its pass begins
        self.walk = None  # the Pass of this epoch that trains
        self.open = True  # is the next pass the first of an epoch?
        self.proven = False  # has a Trainer taken a step in a pass?
        self.believed = 0  # epochs that only seem so
        self.promised = 0  # the epoch that is trained at least, as nn_train has asked for ti
        self.clock = Clock()

    def resume(self, path: str, state: dict) -> None:
        """Go on with the checkpoint in `path`, which holds `state`."""
        self.folder, self.checkpoint, self.resumed = os.path.dirname(path), path, state
        self.learning_rate, self.training_iters, self.batch_size = state['params']
        self.seed, self.losses, self.number = state['seed'], state['losses'], state['run']
        self.data, self.marks, self.begun = state['data'], state['marks'], state['begun']
        self.name, self.queued = state.get('name', ''), state.get('queued', '')
        self.history = History(state['history'], *state['best_by'])
        self.epochs, self.batch, self.batches = state['epochs'], state['batch'], state['batches']
        self.unfinished, self.proven, self.rate = self.batch, state['proven'], state['rate']
        self.scheduled, self.scale, self.own = state['scheduled'], state['scale'], state['own']
        self.last_rate = self.rate or self.history.rows and self.history.rows[-1].learning_rate
        self.clock = Clock(*state['clock'])

    def state(self, epoch: int, train_loss: Any, train_acc: Any) -> dict:
        """Return what a checkpoint holds beside the network, the optimizer, the losses and the history."""
        cut = self.is_cut_short()
        return {
            'epoch': int(epoch),
            'sums': [*parts_of(train_loss), *parts_of(train_acc)],
            'data': data_name(),
            'name': self.name,
            'queued': self.queued,
            'seed': self.seed,
            'run': self.number,
            'begun': self.begun,
            'folder': self.folder and os.path.basename(self.folder),
            'epochs': int(epoch) - 1,
            'batch': self.batch if cut else 0,
            'batches': self.batches,
            'marks': self.marks[:],
            'best_by': (self.history.by, self.history.lower),
            'proven': self.proven,
            'rate': self.rate if cut else None,
            'scheduled': self.scheduled,
            'scale': self.scale,
            'own': dict(self.own),
            'losses': {'size': self.losses.size, 'rest': self.losses.rest, 'last': self.losses.last},
            'clock': (self.clock.elapsed(), self.clock.in_epoch() if cut else 0.0, self.clock.rest),
            'params': (self.learning_rate, self.training_iters, self.batch_size),
        }

    # -- its phase

    def enter(self, phase: Phase, reason: Optional[Ending] = None) -> None:
        """Change the phase, as is drawn above class Phase; what is not drawn there changes nothing."""
        global running
        worse = reason in (Ending.NAN, Ending.ERROR) or (reason, self.reason) == (
            Ending.STOPPED,
            Ending.EARLY,
        )
        if self.phase is Phase.ENDING and (phase is Phase.OVER or worse):
            self.phase, self.reason = phase, reason or self.reason
        elif self.is_going() or phase is Phase.LOADING and self.phase is Phase.WAITING:
            self.phase, self.reason = phase, reason
        if self.phase is Phase.OVER:
            self.clock.ended = self.clock.ended or time.monotonic()
        if self is run:
            running = self.is_going()
            self.note_place()

    def is_going(self) -> bool:
        """Return whether it is to go on."""
        return Phase.LOADING <= self.phase <= Phase.SAVING

    @property
    def busy(self) -> bool:
        """Is nn_train at work? It still is for a moment after 停止."""
        return Phase.LOADING <= self.phase <= Phase.ENDING

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator:
        """Be in a phase, and then in the one before, unless the run is to end."""
        with lock:
            before = self.phase
            self.enter(phase)
            self.clock.last = time.monotonic()
        try:
            yield
        finally:
            with lock:
                self.clock.last = time.monotonic()
                self.enter(before)

    def seen(self, batches: Iterable) -> Iterator:
        """Yield batches to test with: each is a sign of life."""
        with self.during(Phase.TESTING):
            for batch in batches:
                yield batch
                with lock:
                    self.clock.last = time.monotonic()
                    self.note_place()

    # -- what the training loop does

    def now(self) -> tuple:
        """Return what training goes by: may it go on, learning rate, number of epochs."""
        return team.agreed[:3] if team.agreed else (running, self.learning_rate, self.training_iters)

    def note_place(self) -> None:
        """Let the talking process see where the run is."""
        first = self.walk.first if self.walk else 0
        times = first, self.clock.epoch_began, self.clock.last
        place.write(self.phase, self.epochs, self.length(), self.batch, self.batches, *times)

    def check_loaded(self) -> None:
        """Raise RuntimeError when 继续 was said to an nn_train that begins from the start all the same."""
        if self.resumed is not None and not self.loaded:
            raise RuntimeError('这个训练函数没有调用 utils.load_checkpoint，不能“继续”，只能“开始”')

    def take_values(self) -> None:
        """Nn_train asks for the values: it has those that were set before from now on."""
        self.live = True
        for name in list(self.wanted):
            self.change(name, self.wanted.pop(name))
        if self.walk is None or self.walk.state is not Walk.GOING:
            self.promised = min(self.epochs + 1, self.now()[2])

    def change(self, name: str, value: Any) -> None:
        """Have a new value from now on."""
        setattr(self, name, value)
        if name == 'learning_rate':
            self.marks.append((self.epochs_done(), f'lr {value:g}'))

    def count_step(self, trainer: Any) -> None:
        """A Trainer takes a step. What went before the first one was no pass that trains."""
        self.steps += 1
        self.steppers.add(id(trainer))
        scheduler = trainer.optimizer.lr_scheduler
        self.scheduled = scheduler is not None
        scale = team.agreed[4] if team.agreed else self.scale
        if self.scheduled and scale != getattr(scheduler, 'factor_by_chat', 1):
            trainer.optimizer.lr_scheduler = Scaled(scheduler, scale)
        optimizer = trainer.optimizer  # a scheduler is asked when the step is counted
        rate = optimizer.lr_scheduler(optimizer.num_update + 1) if self.scheduled else optimizer.lr
        self.rate = self.last_rate = float(rate)
        if self.steps == 1 and self.resumed is None:
            self.first_rate = self.rate
        if self.steps == 1 and self.walk and self.walk.state is Walk.DONE and not self.walk.proven:
            self.epochs, self.believed, self.batch, self.walk = self.epochs - self.believed, 0, 0, None
            self.enter(Phase.TRAINING)

    def begin_epoch(self) -> None:
        """Lock_start() was called: what comes belongs to a new epoch."""
        if self.phase is Phase.LOADING:
            self.clock.epoch_began = self.clock.last = time.monotonic()
        self.open |= self.walk is not None and self.walk.state is Walk.DONE
        self.enter(Phase.TRAINING)

    def begin_pass(self, size: int, said: Optional[bool]) -> Pass:
        """Begin a pass over data of `size` batches (0: nobody knows)."""
        trains = self.busy and (self.open if said is None else said)
        if not trains:
            walk = Pass((0, 0), size, said if self.busy else False, False, self)
            self.enter(Phase.TESTING)
            return walk
        self.check_loaded()
        if not self.unfinished:
            self.leave_unreported()
        walk = Pass((self.epochs + 1, self.unfinished), size, said, True, self)
        self.walk, self.open, self.unfinished, self.batch = walk, False, 0, self.unfinished
        self.batches = size or self.batches
        self.clock.begin_pass()
        self.enter(Phase.TRAINING)
        self.note_place()
        return walk

    def leave_unreported(self) -> None:
        """Another epoch begins, though none was reported since the last one did."""
        if self.walk and self.batch:
            self.epochs += 1
            self.believed += not self.walk.proven
        self.batch = 0

    def count_batch(self, walk: Pass, images: int) -> None:
        """Note that a batch is done; cut the pass short if it trains and 停止 was said."""
        walk.done, walk.images, walk.counted = walk.done + 1, walk.images + images, self.steps
        walk.proven |= walk.said is None and self.steps > walk.steps
        if walk.proven and walk is not self.walk and (self.walk is None or self.walk.state is Walk.DONE):
            self.leave_unreported()
            self.walk, self.open, self.batches = walk, False, walk.size or self.batches
            self.enter(Phase.TRAINING)
        self.proven |= walk.proven
        if walk is self.walk and self.counts(walk):
            self.clock.count_batch(walk.done - self.batch)
            self.batch = walk.done
            if self.steps == walk.steps:
                self.rate = self.learning_rate
            self.no_longer_waits_for_questions()
            if not self.now()[0]:
                walk.state = Walk.CUT
        self.clock.last = time.monotonic()
        self.note_place()

    def counts(self, walk: Pass) -> bool:
        """Return whether a pass trains: that is said or a Trainer steps in it, or there is none."""
        return walk.proven or not (self.steps or self.proven)

    def no_longer_waits_for_questions(self) -> None:
        """Nn_train has trained without asking for the values: it will not."""
        if self.live is None:
            self.live, self.wanted = False, {}

    def leave_pass(self) -> None:
        """The loop has been left: so has its pass, though a variable may keep what progress() returned."""
        if self.walk and self.walk.state is Walk.GOING:
            self.end_pass(self.walk, False)

    def end_pass(self, walk: Pass, whole: bool) -> None:
        """Note that a pass is over: the `whole` of it, or the loop was left in the middle of a batch."""
        if walk.state is Walk.DONE:
            return
        if not whole and self.steps > walk.counted and walk.state is Walk.GOING:
            self.count_batch(walk, 0)
        walk.proven |= walk.trains and walk.done == walk.first > 0  # 停止 came at the end of its pass
        if walk.state is Walk.GOING:
            cut = walk is self.walk and not whole and not self.now()[0] and self.counts(walk)
            walk.state = Walk.CUT if cut else Walk.DONE
        if walk is not self.walk:
            self.enter(walk.before)
            return
        if not self.counts(walk):
            self.walk, self.open, self.unfinished = None, True, walk.first
        elif whole:
            self.batches = self.batch
        self.clock.end_pass()
        self.enter(Phase.TESTING)
        self.note_place()

    def keep_loss(self, loss: float) -> None:
        """Keep the loss of a batch that is being computed."""
        batch = self.walk.done + 1 if self.walk else len(self.losses.points) - self.losses.of_epoch + 1
        # Without progress() nobody knows how far the epoch is: see spread(), which draws them.
        self.losses.add(self.epochs + (batch / max(self.batches, batch) if self.walk else 1), loss)
        median = None if self.jumped else self.losses.jump(loss)
        if median is not None:
            self.jumped = True
            self.tell(f'{self.place(batch)}：{self.jump_in_words(median)}')
        if not self.steps:
            self.rate = self.learning_rate
        self.clock.last = time.monotonic()

    def jump_in_words(self, median: float) -> str:
        """Return that the loss has jumped, and what 回退 would do."""
        text = f'损失跳升，{Losses.HIGH} 批都高于平时（{median:.4g}）的 {Losses.TIMES} 倍，'
        text += f'现在 {self.losses.last:.4g}{self.label()}\n'
        if not self.has_best():
            return text + '“回退”还没有地方可回：有过一轮、量过好坏以后才有'
        best = self.history.best
        where = f'最好的第 {best.epoch} 轮（{in_words(self.history, best)}）'
        return f'{text}发“回退”会停下，回到{where}；再发“继续”从那里接着训练'

    def label(self) -> str:
        """Return what the run is called, in brackets; '' when nobody has called it anything."""
        names = [self.name] * bool(self.name) + [f'排队 {self.queued}'] * bool(self.queued)
        return f'（{"，".join(names)}）' * bool(names)

    def is_cut_short(self) -> bool:
        """Return whether 停止 came in the middle of a pass over the training data."""
        return self.walk is not None and self.walk.state is Walk.CUT

    def batches_reported(self, train_data: Any) -> Optional[int]:
        """Return over how many batches nn_train has summed up; None when nobody knows."""
        whole = self.walk is None or self.walk.done >= self.batches  # not left by a break
        return whole and operator.length_hint(train_data) or self.batch or None

    def finish_epoch(
        self,
        epoch: int,
        loss: Optional[float],
        train_acc: Optional[float],
        test_acc: Optional[float],
        numbers: dict,
    ) -> Letter:
        """Note that an epoch is done, and what came of it; return the report."""
        self.check_loaded()
        self.no_longer_waits_for_questions()
        seconds = self.clock.finish_epoch()
        rate = self.learning_rate if self.rate is None else self.rate
        number = self.history.next_number()
        row = Row(int(epoch), loss, train_acc, test_acc, rate, round(seconds, 3), number, numbers)
        self.history.add(row)
        self.losses.of_epoch = len(self.losses.points)
        self.epochs, self.batch, self.unfinished, self.rate = row.epoch, 0, 0, None
        self.walk, self.open, self.believed = None, True, 0
        self.enter(Phase.TRAINING)
        self.note_place()
        lines = [
            f'第 {row.epoch}/{self.length()} 轮{self.label()}',
            *measured(row),
            *[f'学习率 {row.learning_rate:.4g}'] * self.scheduled,
            *self.forgotten(),
            f'用时 {duration(seconds)}{self.time_left()}',
        ]
        return Letter('\n'.join(lines), 'report', self.history.score(row))

    def forgotten(self) -> list:
        """Return, in the first report, a line about Trainers that are in no checkpoint, if there are any."""
        steppers, self.steppers = self.steppers, set()
        if self.keepers is None or len(self.history.rows) > 1:
            return []
        lost = len(steppers - self.keepers)
        how = '给 load_checkpoint、save_checkpoint 的 net 和 trainer 都可以是几个：[G, D]、[tG, tD]'
        return [f'注意：有 {lost} 个 Trainer 不在检查点里，“继续”时它会从头开始；{how}'] * bool(lost)

    def finish_unreported(self, epoch: int) -> None:
        """Note that an epoch is done, of which there was no report, unless 停止 cut it short."""
        if epoch > self.epochs and not self.is_cut_short() and self.batch:
            self.epochs, self.batch, self.walk, self.open, self.believed = int(epoch), 0, None, True, 0
            self.note_place()

    def is_due(self) -> bool:
        """Return whether 报告 asks for the epoch that has just ended; with 报告 0, for a new best one."""
        every = settings.report_every
        return self.epochs % every == 0 if every else self.history.best is self.history.rows[-1]

    def has_no_patience_left(self) -> bool:
        """Return whether 早停 ends the run: so many epochs have passed without a better one."""
        best = self.history.best
        since = self.epochs - max(best.epoch if best else 0, self.resumed['epochs'] if self.resumed else 0)
        return running and best is not None and 0 < settings.patience <= since and self.epochs < self.length()

    # -- how far it has come

    def length(self) -> int:
        """Return the number of epochs that the run is to train."""
        begun = self.batch > 0 or self.walk is not None and self.walk.proven
        return max(self.training_iters, self.epochs + begun, self.promised)

    def epochs_done(self) -> float:
        """Return how many epochs the run has done; 2.5 is amid the third."""
        return self.epochs + (self.batch / self.batches if self.batches else 0)

    def time_left(self) -> str:
        """Return how long the run will take from here, in words; '' when nobody knows."""
        epochs = self.length() - self.epochs
        left = self.clock.left(self.batches * epochs - self.batch if self.batches else None, epochs)
        return '，还需约 ' + duration(left) if self.busy and epochs and left is not None else ''

    def how_far(self) -> str:
        """Return how far the run has come."""
        places = {'epochs': self.epochs, 'length': self.length()}
        return so_far({**places, 'batch': self.batch, 'batches': self.batches})

    def place(self, batch: int, to: str = '到') -> str:
        """Return a place in the current epoch, in words."""
        return place_in_words(self.epochs, batch, self.batches, to)

    def best_lines(self) -> list:
        """Return which epoch was the best, in a line, if that was measured."""
        best = self.history.best
        return [f'最好的{in_words(self.history, best)}（第 {best.epoch} 轮）'] if best else []

    # -- what can be said about it

    def tell(self, *letters: Any, **facts: Any) -> None:
        """Send texts and Letters to the one who started the run and to every supervisor.

        `facts` are what is to be remembered of the run.
        """
        if team.leads and self.person is not None:
            letters = [letter if isinstance(letter, Letter) else Letter(letter) for letter in letters]
            itchat.instance.tell(letters, facts)

    def facts(self) -> dict:
        """Return what changes from epoch to epoch of what is remembered of the run."""
        best = self.history.best
        found = best and [best.epoch, self.history.decisive(best)]
        rate = self.history.rows[-1].learning_rate if self.history.rows else self.learning_rate
        values = rate, self.training_iters, self.batch_size
        about = {'data': self.data, 'best_by': (self.history.by, self.history.lower), 'values': values}
        first = self.history.rows[0].learning_rate if self.history.rows else self.learning_rate
        about['first_rate'] = first if self.first_rate is None else self.first_rate
        numbers = {'epochs': len(self.history.rows), 'best': found, 'best_lines': self.best_lines()}
        about['name'] = self.name
        return {**about, 'how_far': self.how_far(), **numbers}

    def status(self, last: str = '', machine: str = '') -> str:
        """Return where things stand; how the last run went and the machine is, the talking process knows."""
        lines = ['训练中' if self.is_going() else '正在停止' if self.busy else '空闲']
        if self.history.rows or self.batch or self.busy:
            lines[0] += '：' + self.how_far() + ('' if self.busy else '（上次）')
        else:
            lines += filter(None, [last, resume_offer()])
        lines += filter(None, [PHASES.get(self.phase), missing_processes()])
        if self.losses.last is not None:
            lines.append(f'最近一批损失 {self.losses.last:.4g}')
        if self.history.rows:
            row = self.history.rows[-1]
            lines += [f'第 {row.epoch} 轮：' + '\n'.join(measured(row, short=True)), *self.best_lines()]
        if self.busy:
            lines += filter(None, [self.speed()])
            lines.append(f'已用 {duration(self.clock.elapsed())}{self.time_left()}')
        lines.append(self.values() if self.busy else values_now())
        return '\n'.join([*lines, f'设备 {device()}', f'主机 {socket.gethostname()}', machine]).strip()

    def speed(self) -> str:
        """Return how many images a second the present pass has trained, in words; '' when nobody knows."""
        if self.walk is None or not self.walk.images or self.walk.state is not Walk.GOING:
            return ''
        return f'速度 {self.walk.images / (self.clock.last - self.clock.epoch_began):.0f} 张/秒'

    def values(self) -> str:
        """Return the values that the run trains with, in words."""
        rate = self.last_rate if self.scheduled and self.last_rate else self.learning_rate
        return values_text(rate, self.training_iters, self.batch_size, self.own)

    def closing_report(self) -> str:
        """Return how the run ended."""
        error, lines = self.error, [CLOSING.get(self.reason, '训练完成'), self.how_far()]
        if self.reason is Ending.NAN:
            place = self.place(self.bad_batch, '') if self.bad_batch else f'第 {self.epochs + 1} 轮'
            rate = self.learning_rate if self.rate is None else self.rate
            again = '继续' if self.checkpoint else '开始'
            lines = [f'训练停下了：{error}', f'{place}，lr = {rate:g}']
            how = f' lr {rate / 10:g}，再发“{again}”'
            if self.scheduled and self.checkpoint:  # there, lr decides nothing
                how = '“继续”，再发 lr x0.1'
            lines += [f'可以试试{how}']
            if self.has_best():
                lines += ['也可以先发“回退”，回到存下来的最好的一轮']
        elif error is not None:
            lines = [f'训练出错，已结束（主机 {socket.gethostname()}）', *error_lines(error), self.how_far()]
        elif self.reason is Ending.EARLY:
            lines[0] = f'训练完成：{self.patience} 轮没有更好，早停了'
        lines[0] += self.label()
        lines += self.best_lines()
        kept = self.checkpoint and os.path.exists(self.checkpoint)
        if kept and (error is not None or self.epochs_done() < self.training_iters):
            lines.append(f'检查点在 {shown(self.checkpoint)}，发“继续”接着训练')
        return data_note() + '\n'.join([*lines, '用时 ' + duration(self.clock.elapsed())])

    def forget_params(self) -> None:
        """Forget the values by chat that the script, an epoch later, no longer asks for."""
        gone = own_params.keys() - self.declared if self.history.rows else ()
        for name in gone:
            del own_params[name]
        if gone:
            itchat.instance.report('params', params=own_params)

    def has_best(self) -> bool:
        """Return whether 回退 has something to go back to."""
        return bool(self.folder) and os.path.exists(os.path.join(self.folder, 'best.zip'))

    def drawn(self) -> dict:
        """Return what draw_curve() draws of the run; of one with a scheduler, the learning rate, too."""
        rows = self.history.rows[:]
        numbers = [
            {**row.numbers, 'lr': row.learning_rate} if self.scheduled else row.numbers for row in rows
        ]
        kept = {'losses': self.losses.points[:], 'marks': self.marks[:], 'data': self.data}
        kept.update(name=self.name, queued=self.queued)
        return {**kept, 'history': rows, 'numbers': numbers}

    def curve(self) -> Callable:
        """Return a function that draws the curves so far and returns the path of the picture.

        The drawing thread calls it, without the lock: drawing takes a second.
        """
        draw = functools.partial(draw_curve, **self.drawn())

        def picture():
            path = self.write('curve.png', '曲线图', draw)
            return Letter(path, 'picture') if path else '曲线图没有画成。'

        return trying('图没有画成', picture)

    # -- its files

    def make_folder(self) -> str:
        """Return the folder of the run, made now if there is none."""
        with lock:
            if self.folder is None:
                self.folder = make_run_folder()
                folders[self.number] = self.folder
                self.tell(folder=self.folder, **self.facts())
            os.makedirs(self.folder, mode=0o755, exist_ok=True)  # somebody may have removed it
            return self.folder

    def write(self, name: str, what: str, write: Callable, whole: bool = True) -> Optional[str]:
        """Let write(path) write the file `name`, `whole` or not at all; return its path.

        When that fails, for whatever reason, tell that `what` was not written, once until it works again, and
        return None. One of the --workers that does not lead writes nothing.
        """
        if not team.leads:
            return None
        try:
            path = os.path.join(self.make_folder(), name)
            write_whole(path, write) if whole else write(path)
            with lock:
                self.unwritten.discard(what)
            return path
        except Exception as error:  # a full disk; of a Trainer, what cannot be pickled
            with lock:
                if what not in self.unwritten:
                    before = (
                        '，以前写的还在'
                        if self.folder and os.path.exists(os.path.join(self.folder, name))
                        else ''
                    )
                    self.tell(
                        f'{what}没有写成：{type(error).__name__}: {first_line(error)}\n训练继续{before}。'
                    )
                self.unwritten.add(what)
            return None

    def write_log(self) -> None:
        """Bring log.csv up to date: what is new goes to its end, if all that it has is right."""
        with lock:
            rows, own = len(self.history.rows), self.history.own
            path = self.folder and os.path.join(self.folder, 'log.csv')
            whole = not self.logged or self.history.own != self.columns or not os.path.exists(path)
            text = self.history.csv() if whole else ''.join(self.history.lines[self.logged :])
            first, self.logged, self.columns = not self.logged, 0, own
        if first and path and os.path.exists(path):  # it may tell of epochs that the checkpoint does not know
            with (
                contextlib.suppress(OSError),
                open(path, encoding='utf-8', errors='replace', newline='') as f,
            ):
                if not text.startswith(f.read()):
                    keep_aside(path)
        write = functools.partial(append, text=text, mode='w' if whole else 'a')
        if self.write('log.csv', '日志', write, whole):
            self.logged = rows


TITLES = {'test_acc': '测试精度', 'train_acc': '训练精度', 'loss': '损失'}
FORMATS = {'test_acc': '.3f', 'train_acc': '.3f'}
PHASES = {
    Phase.LOADING: '现在：载入数据、准备网络',
    Phase.TESTING: '现在：测试',
    Phase.SAVING: '现在：存检查点',
}
CLOSING = {Ending.STOPPED: '训练已停止'}


def values_of(row: Row) -> dict:
    """Return what was measured in an epoch, by name."""
    values = {'loss': row.loss, 'train_acc': row.train_acc, 'test_acc': row.test_acc, **row.numbers}
    return {name: value for name, value in values.items() if value is not None}


def measured(row: Row, short: bool = False) -> list:
    """Return what was measured in an epoch, in words, a line each; both accuracies in one if `short`."""
    values = values_of(row)
    lines = [f'{TITLES.get(name, name)} {value:{FORMATS.get(name, ".4g")}}' for name, value in values.items()]
    if short and {'train_acc', 'test_acc'} <= set(values):
        both = f'精度：训练 {row.train_acc:.3f}，测试 {row.test_acc:.3f}'
        lines = [
            both if line.startswith('训练精度') else line for line in lines if not line.startswith('测试精度')
        ]
    return lines


def in_words(history: History, row: Row) -> str:
    """Return the number that decides which epoch is the best, of this one."""
    value, by = history.decisive(row), history.by
    return f'{TITLES.get(by, by)} {value:{FORMATS.get(by, ".4g")}}'


def append(path: str, text: str, mode: str) -> None:
    """Write a text to a file, or (mode 'a') to its end."""
    with open(path, mode, newline='', encoding='utf-8', errors='backslashreplace') as f:
        f.write(text)


def count_steps(prepare: Callable) -> Callable:
    """Return a Trainer's method `prepare`, with which a step begins, that lets the run know of the step."""

    @functools.wraps(prepare)
    def prepare_and_count(self, *args, **kwargs):
        with lock:
            run.count_step(self)
        return prepare(self, *args, **kwargs)

    return prepare_and_count


# Whether a pass trains, and with which learning rate, is what a Trainer does, not what it is called.
mx.gluon.Trainer._check_and_rescale_grad = count_steps(mx.gluon.Trainer._check_and_rescale_grad)


def trying(what: str, function: Callable) -> Callable:
    """Return a function that does what `function` does, and returns `what` has happened if that raises."""

    def tried():
        try:
            return function()
        except Exception as error:
            print_traceback()
            return f'{what}：{first_line(error)}'

    return tried


def values_now() -> str:
    """Return the values as they stand for the next run. Needs the lock."""
    own = {name: settings.own.get(name, own_params[name][3]) for name in own_params}
    return values_text(*map(settings.standing, LIMITS), own)


def data_note() -> str:
    """Return a line that says so when the images are no real ones."""
    return '演示数据：程序画的图，不是 Fashion-MNIST\n' if data_source() is DEMO else ''


def device() -> str:
    """Return the name of the device that trains."""
    ctx = try_gpu()
    name = f'GPU {ctx.device_id}' if ctx.device_type == 'gpu' else 'CPU'
    return name + (f'，{team.size} 个进程一起' if team.size > 1 else '')


def gpu_number() -> str:
    """Return by what NVML knows the GPU that trains, a number or a UUID; '' when there is none."""
    if try_gpu().device_type == 'cpu':
        return ''
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')  # MXNet counts among these alone
    return visible[options.gpu].strip() if visible[0] and options.gpu < len(visible) else str(options.gpu)


def error_lines(error: BaseException) -> list:
    """Return what an exception says and the last line of a person's own that led to it, for a phone."""
    frames, ours = traceback.extract_tb(error.__traceback__), re.escape(__file__)
    library = re.escape(os.path.dirname(os.__file__) + os.sep)
    others = re.compile(rf'{ours}\Z|{library}|.*/(?:site|dist)-packages/|<(?!ipython)')
    own = [frame for frame in frames if not others.match(frame.filename)]
    lines = [f'{type(error).__name__}: {first_line(error)}']
    return lines + [f'{os.path.basename(p.filename)} 第 {p.lineno} 行：{p.line}' for p in own[-1:]]


CHINESE_FONTS = (  # names of files, the best first
    *(r'(NotoSansCJK|NotoSansSC|SourceHanSans).*Regular', 'wqy-microhei', 'wqy-zenhei', 'msyh', 'simhei'),
    *('PingFang', 'Hiragino Sans GB', 'STHeiti', 'DroidSansFallback', 'NotoSans(CJK|SC)', 'SourceHan'),
    *('NotoSerif(CJK|SC)', 'simsun', 'Songti', 'uming', 'ukai', 'Arial Unicode'),
)
MARKS = {'restarted': '重启', 'back here': '回退到这里'}
CLASSES = 'T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot'.split()  # of Fashion-MNIST
CHINESE_CLASSES = 'T恤 裤子 套头衫 连衣裙 外套 凉鞋 衬衫 运动鞋 包 短靴'.split()


@functools.lru_cache(1)
def chinese_font() -> tuple:
    """Return (path of a font file of this machine's with Chinese, the numbers of its characters).

    (None, those of ASCII) where there is none.
    """
    from matplotlib import font_manager, ft2font

    paths = sorted(font_manager.findSystemFonts())
    for pattern in CHINESE_FONTS:
        for path in paths:
            with contextlib.suppress(OSError, RuntimeError):  # damaged, no font at all
                if re.search(pattern, os.path.basename(path), re.I):
                    characters = frozenset(ft2font.FT2Font(path).get_charmap())
                    if characters.issuperset(map(ord, '损失精度轮')):
                        return path, characters
    return None, frozenset(range(32, 127))


def in_picture(chinese: str, english: str = '') -> str:
    """Return what a picture can say: the Chinese where there is a font for all of it, else the English.

    Without that, the characters of it that can be drawn.
    """
    drawable = [c for c in chinese if ord(c) in chinese_font()[1]]
    text = english if english and len(drawable) < len(chinese) else ''.join(drawable)
    return text.replace('$', r'\$')  # matplotlib's sign for a formula


def font(size: float) -> Any:
    """Return the font of what is written in pictures, in points; 12 are 13 pixels on a phone 390 wide."""
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=chinese_font()[0], size=size)


def draw_curve(
    path: str,
    history: list,
    losses: list,
    marks: Iterable = (),
    numbers: Iterable = (),
    data: str = '',
    name: str = '',
    queued: str = '',
) -> None:
    """Draw losses, accuracies and a person's own numbers over the epochs, as a PNG for a phone.

    `losses` are pairs (epochs done by then, loss of a batch), `marks` (epochs, word), `numbers` a dict for
    each row of `history`. What is None, NaN or zero in every epoch was not measured and gets no panel.
    """
    from matplotlib.figure import Figure  # takes half a second, so not before it is needed

    rows = np.array([row[:4] for row in history], float).reshape(-1, 4).T
    own = sorted({name for row in numbers for name in row})[:8]
    measured = bool(np.nan_to_num(rows[2:]).any())
    end = max([1, *rows[0], *(epochs for epochs, _ in (*losses[-1:], *marks))])
    words, marks = labels_of(marks, end), list(marks)
    lanes = 1 + max((lane for lane, _, _ in words), default=-1)
    heights = [0.25 * lanes] * bool(lanes) + [2.85] * (1 + measured) + [1.7] * len(own)
    title = label_in_picture(name, queued) + curve_title(rows, measured, data)
    figure = Figure(figsize=(5, 0.8 + 0.25 * title.count('\n') + sum(heights)), dpi=160, layout='constrained')
    figure.suptitle(title, fontproperties=font(13))
    panels = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    if lanes:
        draw_labels(panels.pop(0), words, lanes)
    draw_axes(panels, end, [epochs for epochs, _ in marks])
    draw_losses(panels.pop(0), losses, *rows[:2])
    if measured:
        names = in_picture('训练', 'train'), in_picture('测试', 'test')
        lines = (('tab:orange', '-', rows[2], names[0]), ('tab:green', '--', rows[3], names[1]))
        draw_lines(panels.pop(0), in_picture('精度', 'accuracy'), rows[0], lines)
    for axes, name, title in zip(panels, own, own_titles(own)):
        values = np.array([row.get(name, np.nan) for row in numbers], float)
        draw_lines(axes, title, rows[0], [('tab:purple', '-', values, '')], wild=True)
    figure.savefig(path, format='png')


def draw_axes(panels: list, end: float, marks: list) -> None:
    """Draw the grids, the epochs below, up to `end`, and a dashed line at each of `marks`."""
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=11)
        for epochs in marks:
            axes.axvline(epochs, color='gray', linestyle='--', linewidth=0.8, alpha=min(1, 20 / len(marks)))
    panels[-1].set_xlim(-0.02 * end, 1.03 * end)
    panels[-1].set_xlabel(in_picture('轮', 'epoch'), fontproperties=font(12))
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_comparison(path: str, runs: list, losses: bool = False) -> None:
    """Draw the test accuracies of several runs, pairs (words, rows), as a PNG for a phone.

    Where no run has one, or with `losses` beside them, the losses.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tested = any(row.test_acc for _, rows in runs for row in rows)
    panels = [('test_acc', in_picture('测试精度', 'test accuracy'))] * tested
    panels += [('loss', in_picture('损失', 'loss'))] * (losses or not tested)
    height = 0.8 + 2.85 * len(panels) + 0.22 * len(runs)
    figure = Figure(figsize=(5, height), dpi=160, layout='constrained')
    for axes, (name, title) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels):
        axes.set_prop_cycle(color=colormaps['tab10'].colors)
        values = [np.array([getattr(row, name) for row in rows], float) for _, rows in runs]
        for i, (words, rows) in enumerate(runs):
            style = ('o' if len(rows) <= 40 else '') + ('-', '--')[i % 2]
            how = {'markersize': 5, 'label': in_picture(words) or str(i + 1)}
            axes.plot([row.epoch for row in rows], values[i], style, **how)
        axes.set_title(title, loc='left', fontproperties=font(12))
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=11)
        fit(axes, *values, wild=name == 'loss')
    axes.set_xlabel(in_picture('轮', 'epoch'), fontproperties=font(12))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower left', prop=font(12), frameon=False)
    figure.savefig(path, format='png')


def label_in_picture(name: str, queued: str) -> str:
    """Return a line with what a run is called, if it is called anything that a picture can say."""
    words = [in_picture(name)] + [in_picture(f'排队 {queued}', f'queue {queued}')] * bool(queued)
    return '  '.join(filter(None, words)) + '\n' * any(words)


def curve_title(rows: np.ndarray, measured: bool, data: str) -> str:
    """Return the title of the curves of epochs: float (4, N)."""
    drawn = in_picture('（演示数据）', ' (drawn images)') if data == 'demo' else ''
    if not rows.size:
        return in_picture('第一轮', 'first epoch') + drawn
    epoch, loss, _, test_acc = rows[:, -1]
    what, name, value = '测试精度', 'test acc', f'{test_acc:.3f}' if test_acc <= 1 else f'{test_acc:.4g}'
    if not measured or not math.isfinite(test_acc):
        what, name, value = '损失', 'loss', f'{loss:.4g}'
    many = '' if epoch == 1 else 's'
    return in_picture(f'{epoch:.0f} 轮，{what} {value}', f'{name} {value}, {epoch:.0f} epoch{many}') + drawn


def own_titles(names: list) -> list:
    """Return what a picture calls a person's own numbers: by a number, where it cannot write the name."""
    titles = [in_picture(name)[:30] if set(map(ord, name)) <= chinese_font()[1] else '' for name in names]
    counted = [f'{title or in_picture("自己的数", "own number")} {i}' for i, title in enumerate(titles, 1)]
    return [title if title and titles.count(title) == 1 else other for title, other in zip(titles, counted)]


def draw_losses(axes: Any, losses: list, epochs: np.ndarray, means: np.ndarray) -> None:
    """Draw the losses of the batches as a smooth line with its band, and their mean in each epoch."""
    lines = [('tab:blue', '-', means, in_picture('每轮', 'epoch'))]
    draw_lines(axes, in_picture('损失', 'loss'), epochs, lines, wild=True)
    places, batches = np.array(losses, float).reshape(-1, 2).T
    if np.isfinite(batches).any():
        x, line, low, high = smooth(spread(places), batches)
        axes.fill_between(x, low, high, color='tab:blue', alpha=0.15, linewidth=0)
        axes.plot(x, line, color='tab:blue', alpha=0.6, linewidth=1, label=in_picture('每批', 'batch'))
        add_legend(axes)
        fit(axes, means, line, low, high, wild=True)


def draw_lines(axes: Any, title: str, epochs: np.ndarray, lines: Iterable, wild: bool = False) -> None:
    """Draw lines (colour, style, values, name) under a title; what is not finite is left out."""
    markers = 'os' if len(epochs) <= 40 else ('', '')
    for marker, (colour, style, values, name) in zip(markers, lines):
        there = np.isfinite(values)
        if there.any():
            axes.plot(epochs[there], values[there], marker + style, color=colour, markersize=5, label=name)
    axes.set_title(title, loc='left', fontproperties=font(12))
    if any(name for *_, name in lines):
        add_legend(axes)
    fit(axes, *(values for _, _, values, _ in lines), wild=wild)


def add_legend(axes: Any) -> None:
    """Put the names of the lines beside the panel: above it, to the right."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        how = {'loc': 'lower right', 'bbox_to_anchor': (1, 1), 'borderaxespad': 0.2, 'ncols': len(handles)}
        axes.legend(handles, names, frameon=False, prop=font(12), columnspacing=1, handlelength=1.5, **how)


def fit(axes: Any, *lines: np.ndarray, wild: bool = False) -> None:
    """Let an axis show the values of lines: all, or, of a `wild` one, those not far from the rest."""
    shown = []
    for values in lines:
        values = values[np.isfinite(values)]
        if wild and len(values) >= 10:
            low, high = np.percentile(values, [5, 95])
            near = np.abs(values - (low + high) / 2) <= 3.5 * (high - low)
            values = values[near] if high > low else values
        shown.extend(values)
    if shown:
        low, high = min(shown), max(shown)
        room = 0.07 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(low - room, high + room)
    axes.ticklabel_format(axis='y', useOffset=False)


def spread(places: np.ndarray) -> np.ndarray:
    """Return where losses stand, with those of one place, an epoch without progress(), spread out up to it.

    >>> spread(np.array([1.0, 1, 2, 2.5])).tolist()
    [0.5, 1.0, 2.0, 2.5]
    """
    ends, first, counts = np.unique(places, return_index=True, return_counts=True)
    before = np.concatenate([[max(0.0, ends[0] - 1)], ends[:-1]])
    part = (np.arange(len(places)) - np.repeat(first, counts) + 1) / np.repeat(counts, counts)
    return np.repeat(before, counts) + part * np.repeat(ends - before, counts)


def smooth(x: np.ndarray, y: np.ndarray) -> tuple:
    """Return the places, the means and the 10th and 90th percentiles of about 200 windows over (N,) points.

    What is beyond the percentiles counts as they do; of few points each is its own window.
    """
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    width = max(1, len(y) // 50)
    windows = np.lib.stride_tricks.sliding_window_view(y, width)[:: max(1, width // 4)]
    low, high = np.percentile(windows, [10, 90], axis=1)
    means = np.clip(windows, low[:, None], high[:, None]).mean(axis=1)
    places = np.lib.stride_tricks.sliding_window_view(x, width)[:: max(1, width // 4)].mean(axis=1)
    return places, means, low, high


def labels_of(marks: Iterable, end: float) -> list:
    """Return [(lane, from where, text)] for the words of marks: those that would cover each other stand in
    different lanes, or are one with a number. What finds no room in four lanes is left out."""
    unit = end / 4.1 * 11 / 72  # how wide a Chinese character of 11 points is, in epochs, on 4.1 inches
    groups, lanes, placed = [], [0.0] * 4, []
    for epochs, word in sorted(marks, key=lambda mark: mark[0]):
        text = in_picture(MARKS.get(word, word), word)
        width = unit * sum(1.0 if ord(c) > 255 else 0.6 for c in text + ' x99')
        if groups and groups[-1][1] == text and epochs - groups[-1][0] < width:
            groups[-1][2] += 1
        else:
            groups.append([epochs, text, 1, width])
    for epochs, text, count, width in groups:
        start = min(max(epochs - width / 2, 0), max(end - width, 0))
        for lane, until in enumerate(lanes):
            if start >= until:
                lanes[lane] = start + width
                placed.append((lane, start, text + f' x{count}' * (count > 1)))
                break
    return placed


def draw_labels(axes: Any, labels: list, lanes: int) -> None:
    """Write what labels_of() returned into a strip above the panels."""
    axes.set_axis_off()
    axes.set_ylim(lanes, 0)
    for lane, start, text in labels:
        axes.text(start, lane + 0.5, text, va='center', color='dimgray', fontproperties=font(11))


def draw_mistakes(mistakes: list, path: str) -> None:
    """Draw what Mistakes has kept, each with 'true > said' and how sure, as a PNG for a phone."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(mistakes) / 4)
    columns = math.ceil(len(mistakes) / rows)
    size = 5 / columns
    figure = Figure(figsize=(5, rows * (size + 0.3)), dpi=160, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = CHINESE_CLASSES if chinese_font()[0] else CLASSES
    names = names if max(max(true, said) for _, _, true, said in mistakes) < len(CLASSES) else None
    for ax in axes:
        ax.axis('off')
    for ax, (sure, image, true, said) in zip(axes, mistakes):
        ax.imshow(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0), cmap='gray')
        true, said = (names[label] if names else label for label in (true, said))
        arrow = in_picture('→', '>')
        ax.set_title(
            f'{true}\n{arrow} {said} {sure:.0%}', fontproperties=font(11 if chinese_font()[0] else 10)
        )
    figure.savefig(path, format='png')


# ---------------------------------------------------------------------------------- the files of a run

# runs/<start of the run>/ holds last.zip (net.params, trainer.states, run.json, losses.npy, log.csv,
# mistakes.npz), best.zip, best.params, log.csv, curve.png and output.log. Each but the logs is written under
# another name and then put in its place, so that there is always a whole one; last.zip carries the checksums
# of what it holds.


def write_whole(path: str, write: Callable) -> None:
    """Let write() write a file under another name, then put it in its place."""
    try:
        write(path + NEW)
        os.chmod(path + NEW, 0o644)
        with open(path + NEW, 'rb+') as f:
            os.fsync(f.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(path + NEW, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + NEW)


def write_checkpoint(
    path: str,
    net: Any,
    trainer: Any,
    state: dict,
    losses: np.ndarray,
    log: str,
    extra: Optional[dict] = None,
    mistakes: Iterable = (),
) -> None:
    """Write last.zip to `path`."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path), suffix=NEW) as folder:
        for name, each in zip(part_names(folder, 'net.params'), as_list(net)):
            each.save_parameters(name)
        for name, each in zip(part_names(folder, 'trainer.states'), as_list(trainer)):
            each.save_states(name)
        write_extra(folder, extra or {})
        np.save(os.path.join(folder, 'losses.npy'), losses)
        write_mistakes(os.path.join(folder, 'mistakes.npz'), mistakes)
        append(os.path.join(folder, 'run.json'), json.dumps(state, ensure_ascii=False), 'w')
        append(os.path.join(folder, 'log.csv'), log, 'w')
        with zipfile.ZipFile(path, 'w') as checkpoint:
            for name in os.listdir(folder):
                checkpoint.write(os.path.join(folder, name), name)


def write_extra(folder: str, extra: dict) -> None:
    """Write what a person wants kept: JSON, with the arrays in it in a file beside."""
    arrays = []

    def packed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: packed(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            parts = [packed(each) for each in value]
            return {'__tuple__': parts} if isinstance(value, tuple) else parts
        if value is None or isinstance(value, (str, int, float)):
            return value
        array = value.asnumpy() if isinstance(value, nd.NDArray) else value
        if not isinstance(array, (np.ndarray, np.generic)) or array.dtype.hasobject:
            raise TypeError(f'extra：{type(value).__name__} 存不了，要是数、文字、列表、字典或数的数组')
        arrays.append(array)
        kind = 'mxnet.np' if isinstance(value, mx.np.ndarray) else 'mxnet' * isinstance(value, nd.NDArray)
        return {'__array__': len(arrays) - 1, 'of': kind}

    append(os.path.join(folder, 'extra.json'), json.dumps(packed(extra)), 'w')
    np.savez(os.path.join(folder, 'extra.npz'), *arrays)


def read_extra(folder: str) -> dict:
    """Return what write_extra() has written."""
    with np.load(os.path.join(folder, 'extra.npz')) as arrays:

        def revive(value: dict) -> Any:
            if '__tuple__' in value:
                return tuple(value['__tuple__'])
            if '__array__' not in value:
                return value
            array = arrays[f'arr_{value["__array__"]}']
            make = {'mxnet': nd.array, 'mxnet.np': mx.np.array}.get(value['of'])
            return make(array, dtype=array.dtype) if make else array[()]

        with open(os.path.join(folder, 'extra.json'), encoding='utf-8') as f:
            return json.load(f, object_hook=revive)


def write_mistakes(path: str, mistakes: Iterable) -> None:
    """Write what Mistakes has kept."""
    sure, images, true, said = [np.array(column) for column in zip(*mistakes)] or [[]] * 4
    np.savez_compressed(path, sure=sure, images=images, true=true, said=said)


def read_mistakes(folder: Optional[str]) -> list:
    """Return them as a run's checkpoint has them; [] where there is none, or it is of an earlier version."""
    with contextlib.suppress(OSError, KeyError, ValueError, zipfile.BadZipFile):
        with open_private(os.path.join(folder or '', 'last.zip')) as f, zipfile.ZipFile(f) as checkpoint:
            with np.load(io.BytesIO(checkpoint.read('mistakes.npz'))) as kept:
                return list(zip(*(kept[name] for name in ('sure', 'images', 'true', 'said'))))
    return []


def back_to_best(folder: Optional[str]) -> str:
    """Make the best checkpoint of a run the one that 继续 takes, with a mark; return what to say of it.

    What came after it is kept under other names.
    """
    best, last, log = (os.path.join(folder or RUNS, name) for name in ('best.zip', 'last.zip', 'log.csv'))
    try:
        state = read_checkpoint(best)
        with open_private(best) as f, zipfile.ZipFile(f) as checkpoint:
            content = {name: checkpoint.read(name) for name in checkpoint.namelist()}
        kept = json.loads(content['run.json'])
        kept['marks'].append((state['epochs'], 'back here'))
        content['run.json'] = json.dumps(kept).encode()
        kept_as = keep_aside(last, log)
        write_whole(last, lambda path: write_zip(path, content))
        write_whole(log, lambda path: append(path, content['log.csv'].decode(), 'w'))
    except FileNotFoundError:
        return '没有可以回去的检查点：有过一轮、量过好坏以后才有。'
    except (OSError, ValueError) as error:
        return f'回不去：{first_line(error)}'
    history = History(state['history'], *state['best_by'])
    words = in_words(history, history.rows[-1])
    say(f'后来的部分留在 {"、".join(map(shown, kept_as))}。')
    return f'回到了第 {history.rows[-1].epoch} 轮（{words}），发“继续”从那里接着训练。'


def keep_aside(*paths: str) -> list:
    """Copy those files that are there to names of their own, such as last-1.zip; return these."""
    paths = [path for path in paths if os.path.exists(path)]
    for number in itertools.count(1):
        copies = [f'-{number}'.join(os.path.splitext(path)) for path in paths]
        if not any(map(os.path.exists, copies)):
            for path, copy in zip(paths, copies):
                shutil.copyfile(path, copy)
            return copies


def write_zip(path: str, content: dict) -> None:
    """Write a zip file of {name: bytes}."""
    with zipfile.ZipFile(path, 'w') as z:
        for name, data in content.items():
            z.writestr(name, data)


def in_runs(name: str) -> list:
    """Return the paths of the files called so in the folders of the runs."""
    return glob.glob(os.path.join(glob.escape(RUNS), '*', name))


def read_run(folder: str) -> Run:
    """Return a run on disk: from its checkpoint, or from what log.csv tells of it.

    Raises OSError, ValueError.
    """
    found = Run()
    with contextlib.suppress(OSError, ValueError):
        path = os.path.join(folder, 'last.zip')
        found.resume(path, read_checkpoint(path))
        return found
    with open(os.path.join(folder, 'log.csv'), encoding='utf-8', errors='replace') as f:
        found.history = History(History.read(f.read()))
    return found


def read_checkpoint(path: Any) -> dict:
    """Return what save_checkpoint() kept in `path`, less the network and the optimizer.

    Raises ValueError when it is damaged, PermissionError when others could have put it there, OSError when an
    earlier version of this program has written it.
    """
    with open_private(path) as f:
        try:
            with zipfile.ZipFile(f) as checkpoint:
                if checkpoint.testzip() is not None:
                    raise ValueError('checksum')
                state = json.loads(checkpoint.read('run.json'))
                if 'train_loss' in state:
                    raise OSError(0, '是旧版本存的')
                points = np.load(io.BytesIO(checkpoint.read('losses.npy'))).tolist()
                state['losses'] = Losses(map(tuple, points), **state['losses'])
                state['history'] = History.read(checkpoint.read('log.csv').decode())
                Run().resume(path, state)  # nothing is missing
                return state
        except OSError:
            raise
        except Exception as error:  # whatever zipfile, json and numpy make of damaged bytes
            raise ValueError(f'{path} 已损坏（{type(error).__name__}）') from None


def last_checkpoint() -> tuple:
    """Return (path, what it holds) of the last run on the data now used that can go on, or (None, None).

    One that is damaged is set aside under another name, one that others could have written is passed over.
    """
    for number in sorted(folders, reverse=True):
        path = os.path.join(folders[number], 'last.zip')
        try:
            state = read_checkpoint(path)
            if state['data'] == data_name():
                return path, {**state, 'run': number}
        except FileNotFoundError:
            continue
        except ValueError as error:
            say(f'{error}，改名为 last.zip.damaged')
            with contextlib.suppress(OSError):
                os.replace(path, path + '.damaged')
        except OSError as error:
            say(f'不用 {path}：{error.strerror or error}')
    return None, None


def folder_to_go_back_in() -> Optional[str]:
    """Return the folder of the run that 回退 is about: the last one on the data now used, if there is one."""
    if run.folder:
        return run.folder
    for number in sorted(folders, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            if read_run(folders[number]).data == data_name():
                return folders[number]
    return None


def resume_offer() -> str:
    """Return what 继续 would go on with, in words; '' when there is nothing, or it was trained to its end."""
    path, state = last_checkpoint()
    if path is None:
        return ''
    found = Run()
    found.resume(path, state)
    if 'training_iters' in settings.chosen:
        found.training_iters = training_iters
    if found.epochs >= found.training_iters:
        return ''
    return f'有没训练完的：{found.how_far()}，发“继续”接着训练'


def read_private(path: str) -> bytes:
    """Return the bytes of such a file."""
    with open_private(path) as f:
        return f.read()


def remove_leftovers() -> None:
    """Remove what a program that was killed has left half written."""
    for path in [*in_runs('*' + NEW), *glob.glob(os.path.join(glob.escape(FOLDER), 'checkpoint-*' + NEW))]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


# --------------------------------------------------------------------------------------- the commands


class Caller(NamedTuple):
    """Who gave a command: the key under which the talking process knows the person, and the name."""

    key: Optional[int]
    name: str


class Asked(NamedTuple):
    """What a command's method is called with, by the listening thread, which holds the lock."""

    person: Caller
    number: int = 0  # behind the word
    path: str = ''  # the checkpoint to go on from
    known: Any = ''  # what the talking process knows of it: see Trainer.known()


class Settings:
    """What was said that counts for all runs, besides the three values. Guarded by `lock`."""

    def __init__(self):
        self.chosen = set()  # which of the three values a person has set: 继续 takes the others from it
        self.touched = set()  # which of them are no longer the script's: set, or taken from a checkpoint
        self.report_every, self.patience = 1, 0
        self.own = {}  # what was set of chat_param()'s values
        self.best_by = ('test_acc', False)  # of runs to come: see best_by()
        self.lent = {}  # what stood before the values that a run of 排队 brings; the next 开始 has it again

    def lend(self, values: dict) -> None:
        """Set the values that only the next run is to have; those of the one before are over."""
        self.put(self.lent)
        self.lent = {name: globals()[name] if name in LIMITS else self.own.get(name) for name in values}
        self.put(values)

    def put(self, values: dict) -> None:
        """Set values; None: as the script has it."""
        globals().update({name: value for name, value in values.items() if name in LIMITS})
        self.own.update({name: value for name, value in values.items() if name not in LIMITS})
        self.own = {name: value for name, value in self.own.items() if value is not None}

    def standing(self, name: str) -> Any:
        """Return one of the three values as it stands for the next 开始."""
        return globals()[name] if run.busy else self.lent.get(name, globals()[name])

    def kept(self) -> dict:
        """Return what is to be remembered."""
        values = {name: self.lent.get(name, globals()[name]) for name in LIMITS if name in self.touched}
        own = {'chosen': sorted(self.chosen), 'report_every': self.report_every, 'patience': self.patience}
        return {'values': values, 'own': dict(self.own), 'lent': dict(self.lent), **own}

    def adopt(self, kept: dict) -> None:
        """Go by what was remembered."""
        values = kept.pop('values', {})
        globals().update(values)
        self.touched.update(values)
        vars(self).update(kept, chosen=set(kept.pop('chosen', ())))


class Commands:
    """What each word of COMMANDS does: a method of its name, which returns the answer.

    That is a text, or a function for the drawing thread that returns one or a Letter. The listening thread
    calls them with an Asked and holds `lock`.
    """

    def __init__(self, nn_train: Callable):
        self.nn_train = nn_train
        self.switches = ()  # of MXNet, each thread's own: see note_switches()
        self.runs_so_far = 0
        self.news = {}  # what the commands have done that is to be remembered of the run
        self.wrong = False  # was one of them wrong?
        self.job = None  # what the main thread is to train, when that is answered

    def note_switches(self) -> None:
        """Note how MXNet computes in this thread, the script's own: nn_train may have to run in another."""
        numpy = mx.util.is_np_shape(), mx.util.is_np_array()
        recording = mx.autograd.is_recording(), mx.autograd.is_training()
        self.switches = threading.get_ident(), numpy, recording, mx.current_context()

    def adopt_switches(self) -> None:
        """Let MXNet compute so in this thread, if that is another one."""
        thread, numpy, (recording, training), ctx = self.switches
        if thread != threading.get_ident():
            mx.util.set_np(*numpy)
            mx.autograd.set_recording(recording)
            mx.autograd.set_training(training)
            ctx.__enter__()  # for good

    def carry_out(self, commands: list, almost: str, asked: Asked) -> list:
        """Carry out commands, from dicts of Said, up to the first wrong one; return the answers."""
        answers, self.news, self.wrong = [], {}, False
        for said, following in zip(commands, [*commands[1:], None]):
            answers.append(self.obey(said, asked))
            if said['word'] == 'set' and (self.wrong or not following or following['word'] != 'set'):
                answers[-1] = '\n'.join([answers[-1], values_now()]).strip()
            if self.wrong:
                rest = following['text'] if following else almost
                return answers + [f'从“{rest[:20]}”起没有执行。'] * bool(rest)
        return [*answers, explain(almost)] if almost else answers

    def obey(self, said: dict, asked: Asked) -> Any:
        """Carry out one command and return the answer."""
        try:
            if said['word'] == 'set':
                return self.set_values(said['values'])
            asked = asked._replace(number=said['number'] or 0, known=said.get('known', ''))
            return getattr(self, said['word'])(asked)
        except Exception as error:  # the person would wait for an answer
            print_traceback()
            self.wrong = True
            return f'程序出错：{type(error).__name__}: {first_line(error)}'

    # -- runs

    def start(self, asked: Asked) -> str:
        """Train from the beginning."""
        refusal = is_busy()
        if refusal:
            return refusal
        how = asked.known or {}
        settings.lend(how.get('values', {}))
        this_run = Run(asked.person)
        self.runs_so_far += 1
        this_run.number = self.runs_so_far
        this_run.name, this_run.queued = how.get('name', ''), how.get('queued', '')
        self.begin(this_run)
        waiting = missing_processes()
        note = waiting and '\n' + waiting
        which = f'第 {run.queued} 次排队：' * bool(run.queued) + data_note()
        named = f'（{run.name}）' * bool(run.name)
        return f'{which}开始训练{named}\n设备 {device()}{note}\n{run.values()}'

    def resume(self, asked: Asked) -> str:
        """Go on from the last checkpoint, or silently from the one that is asked for."""
        global learning_rate, training_iters, batch_size
        refusal = is_busy()
        if refusal:
            return refusal
        path, state = (asked.path, read_checkpoint(asked.path)) if asked.path else last_checkpoint()
        if path is None:
            return '没有可以继续的训练，发“开始”从头训练。'
        mine = learning_rate, training_iters, batch_size
        lr, ti, bs = (
            value if name in settings.chosen and name not in settings.lent else kept
            for name, value, kept in zip(LIMITS, mine, state['params'])
        )
        if state['epochs'] >= ti and not asked.path:
            more = state['epochs'] + 3
            return f'上次的 {state["epochs"]} 轮都训练完了。要再训练，先发 ti {more}，再发“继续”。'
        waiting = missing_processes()
        note = waiting and '\n' + waiting
        if state['batch'] and bs != state['params'][2]:  # another batch size does not fit the epoch begun
            note += f'\nbs {bs}：下次开始时生效，没训练完的这一轮接着用原来的'
        learning_rate, training_iters, batch_size = lr, ti, bs
        settings.touched.update(LIMITS)
        changed = [f'lr {lr:g}'] * (lr != state['params'][0] and not state['scheduled'])
        changed += ['restarted'] * bool(asked.path)
        state['params'] = lr, ti, state['params'][2] if state['batch'] else bs
        this_run = Run(asked.person)
        this_run.resume(path, state)
        of_folder = [number for number, folder in folders.items() if folder == this_run.folder]
        this_run.number = of_folder[0] if of_folder else this_run.number
        this_run.marks += [(this_run.epochs_done(), word) for word in changed]
        self.begin(this_run)
        text = f'{data_note()}继续训练\n{run.how_far()}\n设备 {device()}\n{run.values()}{note}'
        return '' if asked.path else text

    def begin(self, this_run: Run) -> None:
        """Let the main thread train."""
        global run
        run = this_run
        run.enter(Phase.LOADING)
        about = {'number': run.number, 'person': run.person.key, 'begun': run.begun, 'ending': None}
        kept = {'folder': run.folder, 'checkpoint': run.checkpoint, 'kept': run.how_far()}
        self.news = {**about, **kept, **run.facts(), 'stopping': False}
        self.job = self.nn_train, run

    def stop(self, asked: Optional[Asked] = None) -> str:
        """Let the run end after the batch that it is at."""
        note = '\n' + asked.known if asked and asked.known else ''
        if run.is_going() or run.phase is Phase.ENDING and run.reason is Ending.EARLY:
            run.enter(Phase.ENDING, Ending.STOPPED)
            self.news = {'stopping': True}
            return '好，这一批算完就停。' + note
        return ('已经在停了，请等结束报告。' if run.busy else '现在没有训练，发“开始”就开始。') + note

    def rollback(self, asked: Asked) -> str:
        """Go back to the best epoch: the next 继续 goes on from there."""
        if not run.busy:
            return back_to_best(folder_to_go_back_in())
        if not run.has_best():
            return '没有可以回去的检查点：有过一轮、量过好坏以后才有。训练接着做。'
        run.rolling_back = True
        return f'{self.stop(asked)}\n停下以后回到最好的一轮。'

    # -- what can be asked for

    def status(self, asked: Asked) -> Any:
        """Say where things stand."""
        text = run.status(*asked.known)
        return f'{text}\n{manner_text(settings.report_every, settings.patience)}'.strip()

    def plot(self, asked: Asked) -> Any:
        """Draw the curves; with a number, those of that run in 记录's list; after a restart, of the last."""
        if not asked.number and (run.phase is not Phase.WAITING or not asked.known):
            drawable = run.losses.points or run.history.rows
            return run.curve() if drawable else '还没有可画的：训练开始后再发“曲线”。'

        def picture():
            folder, name = asked.known
            found, path = read_run(folder), os.path.join(folder, 'curve.png')
            found.name = found.name or name
            write_whole(path, functools.partial(draw_curve, **found.drawn()))
            return Letter(path, 'picture')

        return trying('图没有画成', picture)

    def compare(self, asked: Asked) -> Any:
        """Draw what the last runs, or those of 排队, have come to."""

        def picture():
            runs = []
            for folder, words in asked.known['runs']:
                with contextlib.suppress(OSError, ValueError):
                    with open(os.path.join(folder, 'log.csv'), encoding='utf-8', errors='replace') as f:
                        runs.append((words, History.read(f.read())))
            if not runs:
                return '还没有可比的：有过一轮以后才有。'
            path = os.path.join(RUNS, 'compare.png')
            losses = asked.known.get('losses', False)
            write_whole(path, functools.partial(draw_comparison, runs=runs, losses=losses))
            return Letter(path, 'picture')

        return trying('图没有画成', picture)

    def mistakes(self, asked: Asked) -> Any:
        """Draw the test examples that the network got wrong, the surest first."""
        this_run, mistakes = run, run.mistakes
        folder = asked.known if run.phase is Phase.WAITING else run.folder

        def picture():
            shown = mistakes or read_mistakes(folder)
            if not shown:
                return '还没有错图：测试过一次以后才有。'
            if shown[0][1].ndim != 3 or shown[0][1].shape[0] not in (1, 3):
                return '这些数据不是图，画不出来。'
            draw = functools.partial(draw_mistakes, shown)
            if mistakes:
                path = this_run.write('mistakes.png', '错图', draw)
            else:
                path = os.path.join(folder, 'mistakes.png')
                write_whole(path, draw)
            return Letter(path, 'picture') if path else '错图没有画成。'

        return trying('图没有画成', picture)

    def runs(self, asked: Asked) -> str:
        """Say what the talking process knows."""
        return asked.known

    log = runs

    def params(self, asked: Asked) -> str:
        """Say the three values, and what else was set."""
        return f'{values_now()}\n{manner_text(settings.report_every, settings.patience)}'.strip()

    def help(self, asked: Asked) -> str:
        """List the commands."""
        return help_text()

    # -- settings

    def report(self, asked: Asked) -> str:
        """Report every so many epochs; with 0, only a new best one, the end and trouble."""
        settings.report_every = asked.number
        if not asked.number:
            return '好，只说更好的一轮、结束和麻烦。要每轮都说，发“报告 1”。'
        return f'好，{"每轮都" if asked.number == 1 else f"每 {asked.number} 轮"}报告。'

    quiet = report

    def patience(self, asked: Asked) -> str:
        """Let a run end by itself after so many epochs without a better test accuracy; with 0, not."""
        settings.patience = asked.number
        if not asked.number:
            return '好，不早停了。'
        by = run.history.by if run.busy or run.history.rows else settings.best_by[0]
        what = TITLES.get(by, by)
        return f'好，{what} {asked.number} 轮没有更好，训练就自己结束。不要了就发“早停 0”。'

    def set_values(self, pairs: list) -> str:
        """Set each of [(name, text)] that is allowed; return the answer."""
        answer = []
        for name, text in pairs:
            try:
                answer += self.set_value(name, text)
            except ValueError as error:
                answer.append(str(error))
                self.wrong = True
        return '\n'.join(answer)

    def set_value(self, name: str, text: str) -> list:
        """Set a value; return what is to be said of it besides what it is. Raises ValueError."""
        relative = text[0] in 'x*/'
        if name in own_params:
            settings.own[name] = read_value(name, text)
            settings.lent.pop(name, None)
            return [f'{name} = {settings.own[name]}'] if running else []
        if name == 'learning_rate' and relative and running and run.scheduled:
            factor = read_value(name, text, 1.0)
            run.scale *= factor
            run.marks.append((run.epochs_done(), f'lr x{factor:g}'))
            return [f'lr：scheduler 给的学习率从下一批起乘 {run.scale:g}']
        old = settings.standing('learning_rate')
        globals()[name] = read_value(name, text, old)
        settings.lent.pop(name, None)
        settings.chosen.add(name)
        settings.touched.add(name)
        answer = [f'lr：{old:g} → {learning_rate:g}'] if relative else []
        return answer + [apply_to_run(name)] if running else answer

    def alone(self, asked: Asked) -> str:
        """Say that a command is the talking process's, which carries it out only by itself."""
        self.wrong = True
        return '“重启”“取消”“允许”“程序”“排队”“提醒”请单独发一条。'

    cancel = restart = allow = programs = queue = remind = alone


def is_busy() -> str:
    """Return what to answer when no run can begin now, else ''. Needs the lock."""
    if running:
        return f'已经在训练了：{run.how_far()}。\n发“停止”可以停下。'
    return '上一次训练正在收尾，收到它的结束报告后再发一次。' if run.busy else ''


def apply_to_run(name: str) -> str:
    """Give a new value to the run, if it asks for new ones; return from when. Needs the lock."""
    short, later = text_of(name), '下次开始时生效'
    if name == 'learning_rate' and run.scheduled:
        return f'{short}：Trainer 的 scheduler 决定它，{later}；现在要改就发 lr x0.5'
    if name == 'batch_size' or run.live is False:
        return f'{short}：{later}'
    value = globals()[name]
    if run.live:
        run.change(name, value)
    else:  # nn_train has not come to where it could ask for it
        run.wanted[name] = value
    length = run.length() if run.live else max(value, run.epochs + (run.batch > 0))
    answer = f'{short}：' + ('从下一批起生效' if name == 'learning_rate' else f'这次训练到第 {length} 轮为止')
    return answer if run.live else f'{answer}；训练函数不问 utils.params 的话，{short}：{later}'


def text_of(name: str) -> str:
    """Return how a person writes the name of a value."""
    return next(short for short, long in NAMES.items() if long == name)


def chat_supervisor(nn_train: Callable) -> None:
    """Register what friends' commands do: 开始 trains with nn_train(wechat_name, params).

    Any `nn_train` will do that calls lock_start, chat_inf and lock_end as a tutorial's loop does. `params`
    is (learning_rate, training_iters, batch_size). With --join there is no chat: this trains along and does
    not return.
    """
    read_own_options()
    if itchat.instance.commands is None:
        itchat.instance.commands = Commands(nn_train)
    itchat.instance.commands.nn_train = nn_train  # the cell of a notebook was run again
    itchat.instance.commands.note_switches()
    if not team.leads:
        try:
            team.follow(nn_train)
        except Exception:
            print_traceback()
            team.leave()


def train(nn_train: Callable, this_run: Run) -> None:
    """Run nn_train to its end, in the main thread; whatever it raises, the next 开始 works."""
    threads.begin()
    seed_epoch(this_run.seed, 0)
    if NUMPY_2:  # MXNet passes on numbers as they print; numpy's would print as np.int64(3)
        np.set_printoptions(legacy='1.25')
    try:
        if team.begin(this_run):
            if this_run.resumed and this_run.history.rows:
                this_run.write_log()
            if team.size > 1:
                compare('训练函数或 utils.py ', [source_of(nn_train), source_of(sys.modules[__name__])])
            nn_train(this_run.person.name, (*this_run.now()[1:], this_run.batch_size))
    except BaseException as error:  # sys.exit(), too
        with lock:
            this_run.error = error
            this_run.enter(Phase.ENDING, Ending.NAN if isinstance(error, NotFinite) else Ending.ERROR)
        if team.leads or not isinstance(error, NotFinite):  # which is the same in all
            print_traceback()
    finally:
        lock_end(this_run.person.name)
        close(this_run)
        team.end_run(this_run)
        gc.collect()  # a network refers to itself; its 60 MB would wait for days


def close(this_run: Run) -> None:
    """Tell how a run ended and let the next one begin. One that is to go on by itself has not ended."""
    paused = itchat.instance.pausing and this_run.error is None
    note = ''
    while True:
        if this_run.rolling_back and not note:
            note = back_to_best(this_run.folder)
        with lock:
            if this_run.rolling_back and not note:  # somebody has just said so
                continue
            this_run.forget_params()
            try:
                if not paused:
                    tell_end(this_run, note)
            finally:
                this_run.enter(Phase.OVER)
            return


def tell_end(this_run: Run, note: str) -> None:
    """Tell how a run ended, and a note. Needs the lock."""
    ended = {'ending': this_run.reason.value, 'ended': time.time()}
    this_run.tell(this_run.closing_report(), **{**this_run.facts(), **ended})
    if len(this_run.history.rows) > 1:
        itchat.instance.draw_for(this_run, this_run.curve())
    by_itself = this_run.reason in (Ending.DONE, Ending.EARLY) and this_run.error is None
    this_run.tell(*[note] * bool(note), then=by_itself)


# ------------------------------------------------------------------------- the client in itchat's place


class Remote(itchat.Core):
    """The client of the process that trains: itchat's functions, carried out by the process that talks.

    The main thread logs in, then trains what the commands put into `jobs`. The listening thread receives
    what comes on the line and carries out the commands, the drawing thread draws, one more calls the script's
    own handlers. Any thread calls itchat's functions.
    """

    ORPHANED = 120  # seconds to end by itself, when nobody talks any more

    def __init__(self):
        super().__init__()
        self.functionDict = itchat.instance.functionDict  # the handlers that were registered already
        self.line, self.talker = None, None  # the latter: the process, where this one has started it
        self.commands = getattr(itchat.instance, 'commands', None)
        self.listener, self.training = None, None  # threads; the latter if run() does not keep the caller's
        self.jobs = queue.SimpleQueue()  # (nn_train, Run); None at the end
        self.admitted = queue.SimpleQueue()  # the answer to the login
        self.replies, self.numbers = {}, itertools.count()  # number of a call -> where its answer goes
        self.sent = {}  # the settings that are remembered
        self.callbacks = {}
        self.pausing = False  # is what is going on to go on after a restart?
        self.signal_came = 0.0
        self.drawing = concurrent.futures.ThreadPoolExecutor(1, 'drawing')
        self.handling = Worker('handlers')
        self.printing = Worker('printing')
        self.orphaned = False  # has nobody talked for a while?
        self.folder_lock = None

    # -- what the script calls

    def auto_login(
        self, hotReload: bool = False, statusStorageDir: Optional[str] = None, *args, **callbacks
    ) -> None:
        """Have the talking process log in, and wait for that; end the program when it cannot be done.

        Takes itchat's qrCallback, loginCallback and exitCallback.
        """
        if self.line is not None:
            return  # there is a session
        make_streams_safe()
        read_own_options()
        self.connect()
        with self.taking_signals():
            self.log_in(hotReload, statusStorageDir, callbacks)

    def log_in(self, hotReload: bool, statusStorageDir: Optional[str], callbacks: dict) -> None:
        """Do what auto_login() is for."""
        self.callbacks = {name: function for name, function in callbacks.items() if callable(function)}
        how = {'hotReload': bool(hotReload), 'statusStorageDir': statusStorageDir}
        self.line.send('login', given=vars(options), how={**how, 'callbacks': list(self.callbacks)})
        self.listener = threading.Thread(target=self.listen, name='listening', daemon=True)
        self.listener.start()
        answer = self.admitted.get()
        if answer['do'] == 'exit':
            self.line.send('bye', status=answer['status'])
            self.exit(answer['status'])
            sys.exit(answer['status'])  # the cell of a notebook
        with waiting_for('在等上一个训练进程存完检查点'):
            self.folder_lock = lock_folder(1, wait=True)
        remove_leftovers()
        with lock:
            settings.adopt(answer['settings'])
            self.sent = settings.kept()
            folders.update(answer['folders'])
            own_params.update(answer['params'])
            if self.commands:
                self.commands.runs_so_far = answer['last']
        if team.size > 1 and team.leads:
            team.start()

    def connect(self) -> None:
        """Reach the talking process: the one that has started this, else one that is started now."""
        global place
        if role == 'trains':
            self.line = Line(int(role_words[0]))
        else:
            with make_place_file() as shared:
                place = Place(shared.fileno())
                here = os.path.dirname(os.path.abspath(__file__))
                code = f'import sys; sys.path.insert(0, {here!r}); import utils'
                # A notebook has no terminal to type into; the end of the input would end the program.
                how = {'stdin': subprocess.PIPE} if INTERACTIVE else {}
                self.talker, ours = start_process('talks', ['-c', code], shared, **how)
            self.line = Line(ours.detach())

    @contextlib.contextmanager
    def taking_signals(self) -> Iterator:
        """Have the program end in order at a signal from here on; in a notebook only within this."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[: 1 if role == 'trains' else 3]
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    before[number] = signal.signal(number, self.hand_on_signal)
        try:
            yield
        except KeyboardInterrupt:
            if INTERACTIVE:  # the second signal
                self.talker.kill()
                self.exit(130)
            raise
        finally:
            for number, handler in before.items() if INTERACTIVE else ():
                signal.signal(number, handler)

    def run(self, debug: bool = False, blockThread: bool = True) -> None:
        """Train whenever somebody says so, until the end of the program."""
        if self.training is None:
            self.get_ready()
        if self.training is None and blockThread:
            if INTERACTIVE and (options.console or options.demo):
                say('这里不能输入：请用 itchat.run(blockThread=False)，再 itchat.instance.receive("开始")')
            self.train_all()
        elif self.training is None:
            say('训练在另一个线程里：其中的 DataLoader 不能有工作进程（num_workers 要是 0）。')
            atexit.register(lambda: self.line.send('bye', status=int(hasattr(sys, 'last_value'))))
            self.training = threading.Thread(target=self.train_all, name='training', daemon=True)
            self.training.start()
        elif blockThread:
            self.training.join()

    def train_all(self) -> None:
        """Do what comes into `jobs`, until the end of the program."""
        with self.taking_signals():
            while (job := self.jobs.get()) is not None:
                self.commands.adopt_switches()
                train(*job)
            if self.pausing == 'orphan':
                self.exit(1)
            else:
                self.leave(int(run.error is not None))

    def get_ready(self) -> None:
        """Tell the talking process that commands and messages can come."""
        with lock:
            values = {name: globals()[name] for name in LIMITS}
            offer = resume_offer() if self.commands else ''
            handlers = {chat: list(functions) for chat, functions in self.functionDict.items()}
        can = self.commands is not None and team.leads
        self.line.send('run', commands=can, handlers=handlers, values=values, offer=offer, gpu=gpu_number())

    def leave(self, status: int, again: bool = False) -> None:
        """Say good-bye and end the process; `again`: to be started anew."""
        self.drawing.shutdown()
        team.end()
        if not again and not self.pausing:
            self.do_call_back('exitCallback', {})
            self.handling.wait(2)
        self.line.send('bye', status=status, again=again)
        if self.talker is not None:
            status = self.talker.wait()
            self.printing.wait(2)
        self.exit(status)

    def exit(self, status: int) -> None:
        """End the process; by force where MXNet would wait for others, or this is not the main thread.

        A notebook goes on: what was run there, run again, logs in again.
        """
        if INTERACTIVE:
            self.talker.wait()
            self.listener.join()
            if self.folder_lock:
                self.folder_lock.close()  # or it would take the next one's lock with it
            say('会话结束了；再运行一次，就再登录。')
            use_client(Remote())
            return
        if team.size > 1 or threading.current_thread() is not threading.main_thread():
            sys.stdout.flush()
            os._exit(status)
        sys.exit(status)

    def receive(self, text: str) -> None:
        """Carry out a command as if the owner had typed it into the terminal; wait for its answer."""
        self.call('receive', text)

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the client in the talking process. Raises RuntimeError where that raises."""
        if self.line is None:
            raise RuntimeError(f'itchat.{name}：要先 itchat.auto_login()')
        number, answers = next(self.numbers), queue.SimpleQueue()
        self.replies[number] = answers
        self.line.send('call', n=number, name=name, args=args, kwargs=kwargs)
        if self.orphaned:
            answers.put(NOBODY)
        answer = answers.get()
        if 'error' in answer:
            raise RuntimeError(f'itchat.{name}：{answer["error"]}')
        return self.revive(answer.get('value'))

    def revive(self, value: Any) -> Any:
        """Return what itchat would have returned for what has come on the line."""
        if isinstance(value, list):
            return [self.revive(each) for each in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {'bytes'}:
            return base64.b64decode(value['bytes'])
        if 'BaseResponse' in value:
            return ReturnValue(value)
        if 'UserName' in value:
            value = templates.User(value)
            value.core = self
        return value

    # -- what nn_train and the commands say

    def report(self, do: str, **message: Any) -> None:
        """Send something to the talking process, if there is one."""
        if self.line is not None:
            self.line.send(do, **message)

    def tell(self, letters: list, facts: dict) -> None:
        """Send letters to the run's starter and the supervisors, and what is to be remembered of the run."""
        self.report('tell', letters=[letter._asdict() for letter in letters], run=facts)

    def answer(self, number: str, answers: list, news: dict, job: Any) -> None:
        """Answer commands, texts in one message, with Letters; the effects go with it. Needs the lock."""
        texts = [text for text in answers if isinstance(text, str) and text]
        letters = [Letter('\n\n'.join(texts))] if texts else []
        letters += [letter for letter in answers if isinstance(letter, Letter)]
        kept = settings.kept()
        changed = {name: value for name, value in kept.items() if self.sent.get(name) != value}
        self.sent = kept
        letters = [letter._asdict() for letter in letters]
        self.report('answered', id=number, letters=letters, settings=changed, run=news)
        if job:
            self.jobs.put(job)

    def draw_for(self, this_run: Run, draw: Callable) -> None:
        """Draw something and send it to all who hear of the run."""
        self.drawing.submit(lambda: this_run.tell(draw()))

    def bar(self) -> dict:
        """Return how tqdm is to show how far an epoch is: on the terminal of the talking process."""
        if role != 'trains':
            return {'disable': None}  # if there is a terminal
        columns = int(role_words[2])
        return {'file': Bar(self.line), 'ncols': columns - 1} if columns else {'disable': True}

    # -- what the talking process says

    def listen(self) -> None:
        """Do what the talking process says until its end: the work of the listening thread."""
        while (message := self.line.receive()) is not None:
            try:
                getattr(self, 'do_' + message['do'])(**{k: v for k, v in message.items() if k != 'do'})
            except Exception:
                print_traceback()
        self.orphaned = True  # before the replies: who calls from now on sees it
        for answers in list(self.replies.values()):
            answers.put(NOBODY)
        self.admitted.put({'do': 'exit', 'status': 1})
        if not INTERACTIVE:
            timer = threading.Timer(self.ORPHANED, os._exit, [1])
            timer.daemon = True
            timer.start()
        self.do_end(stop=True, pause='orphan')

    def do_logged_in(self, **answer: Any) -> None:
        """There is a session."""
        self.admitted.put({'do': 'logged_in', **answer})

    def do_exit(self, status: int) -> None:
        """The program ends: it could not log in, or something has gone wrong."""
        self.admitted.put({'do': 'exit', 'status': status})
        self.jobs.put(None)

    def do_end(self, stop: bool, pause: Any = False) -> None:
        """End when the run is over; or stop it. To `pause`: it has not ended, and goes on after a restart."""
        with lock:
            self.pausing = pause or self.pausing
            if stop and self.commands:
                self.commands.stop()
        self.admitted.put({'do': 'exit', 'status': 0})
        self.jobs.put(None)

    def do_order(
        self, id: str, person: Optional[int], name: str, commands: list, almost: str, path: str
    ) -> None:
        """Carry out the commands of a message."""
        if path:
            commands, almost = [{'word': 'resume', 'number': None, 'values': []}], ''
        with lock:  # the answer is sent before it is let go: no report of the run overtakes it
            answers = self.commands.carry_out(commands, almost, Asked(Caller(person, name), 0, path))
            broken = {'ending': Ending.BROKEN.value, 'ended': time.time()} if path else {}
            news = self.commands.news or broken
            job, self.commands.job = self.commands.job, None
            if not any(map(callable, answers)):
                self.answer(id, answers, news, job)
                return

        def draw():
            drawn = [answer() if callable(answer) else answer for answer in answers]
            with lock:
                self.answer(id, drawn, news, job)

        self.drawing.submit(draw)

    def do_message(self, chat: str, msg: dict) -> None:
        """Hand a message to the script's own handler."""
        kinds = {'MpChat': templates.MassivePlatform, 'GroupChat': templates.Chatroom}
        msg = Message(msg)
        msg['User'] = kinds.get(chat, templates.User)(msg['User'])
        msg['User'].core = self
        if 'Text' not in msg:
            msg['Text'] = functools.partial(self.call, 'download', msg['MsgId'])
        self.handling.put(functools.partial(self.handle, self.functionDict[chat].get(msg['Type']), msg))

    def handle(self, handler: Optional[Callable], msg: dict) -> None:
        """Call a handler, and send what it returns to the chat that the message is from."""
        answer = handler(msg)
        if answer is not None:
            self.send(answer, msg.get('FromUserName'))

    def do_call_back(self, name: str, how: dict) -> None:
        """Call the script's own qrCallback, loginCallback or exitCallback."""

        function = self.callbacks.get(name)
        if function:
            self.handling.put(lambda: function(**{key: self.revive(value) for key, value in how.items()}))

    def do_reply(self, n: int, **answer: Any) -> None:
        """The answer to call()."""
        self.replies.pop(n).put(answer)

    def do_print(self, number: int, content: dict) -> None:
        """Print what the talking process prints, where this one has the terminal."""
        stream = sys.stdout if number == 1 else sys.stderr
        text = self.revive(content).decode('utf-8', 'replace')
        self.printing.put(functools.partial(tqdm.write, text, stream, ''))

    def hand_on_signal(self, number: int, frame: Any) -> None:
        """Have the program end in order; at once at a second signal, a second later or more."""
        if os.getpid() != process_number:  # a worker of a DataLoader, say: this batch is still to be done
            return
        now = time.monotonic()
        if self.signal_came and now - self.signal_came > 1:
            if INTERACTIVE and number == signal.SIGINT:
                raise KeyboardInterrupt
            os._exit(128 + number)
        if not self.signal_came:
            self.signal_came = now
            threading.Thread(target=self.line.send, args=('signal',), kwargs={'number': number}).start()


# The answer to a call when nobody talks any more: what nn_train wants of itchat must not cost the checkpoint.
NOBODY = {'value': {'BaseResponse': {'Ret': -1, 'ErrMsg': 'nobody talks any more'}}}


class Worker:
    """A thread that calls what is put in, one after the other; it keeps no process from ending."""

    def __init__(self, name: str):
        self.waiting = queue.SimpleQueue()
        threading.Thread(target=self.work, name=name, daemon=True).start()

    def put(self, function: Callable) -> None:
        """Let a function be called; return at once. What is too much is left out."""
        if self.waiting.qsize() < 1000:
            self.waiting.put(function)

    def work(self) -> None:
        """Call them: the thread's work."""
        while True:
            try:
                self.waiting.get()()
            except Exception:
                print_traceback()

    def wait(self, seconds: float) -> None:
        """Wait until all that was put in before is called, so many seconds at most."""
        done = threading.Event()
        self.waiting.put(done.set)
        done.wait(seconds)


class Bar:
    """The file that tqdm writes a progress bar to: the line to the process that has the terminal."""

    encoding = property(lambda self: sys.stderr.encoding)

    def __init__(self, line: Line):
        self.line = line

    def write(self, text: str) -> None:
        self.line.send('bar', text=text.strip('\r\n '))

    def flush(self) -> None:
        """Do nothing."""


def remote(name: str) -> Callable:
    """Return the method of Remote that has the talking process call its client's method `name`."""

    def function(self, *args, **kwargs):
        args = list(args)
        if args and name == 'send' and re.match('@(img|fil|vid)@', str(args[0])):
            args[0] = args[0][:5] + os.path.abspath(args[0][5:])
        elif args and name in ('send_image', 'send_file', 'send_video', 'upload_file'):
            args[0] = args[0] and os.path.abspath(args[0])  # it may have another folder
        if kwargs.get('fileDir'):
            kwargs['fileDir'] = os.path.abspath(kwargs['fileDir'])
        if kwargs.get('file_'):
            kwargs['file_'] = kwargs['file_'].read()
        return self.call(name, *args, **kwargs)

    return function


def delegate(name: str) -> Callable:
    """Return a function that does what the client's method `name` does, whichever client is in use."""

    def function(*args, **kwargs):
        return getattr(itchat.instance, name)(*args, **kwargs)

    return function


# This is the one spot where something of itchat is replaced: the functions of its module are its instance's
# methods, and are made those of ours. Whoever imports itchat after utils has them.
for name, value in list(vars(itchat).items()):
    if isinstance(getattr(value, '__self__', None), itchat.Core):
        setattr(itchat, name, delegate(name))
        if name not in vars(Remote) and name not in ('msg_register', 'configured_reply'):
            setattr(Remote, name, remote(name))


def forget_signals() -> None:
    """Let what ends any process end one that was forked, a DataLoader's worker, say, at once: Python's own
    handler would wait until the main thread wakes, and the signal may have come to one of MXNet's threads."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if getattr(signal.getsignal(number), '__func__', None) is Remote.hand_on_signal:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=forget_signals)
settings = Settings()
process_number = os.getpid()
place = Place(int(role_words[1]) if role == 'trains' else -1)
team = Team()
folders = {}  # number -> folder of each run that is remembered
run = Run()  # the run that is going on, or the last one
use_client(Remote())
if role == 'trains':
    make_streams_safe()
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # MXNet's own handler exits with 255, and nobody knows why
    faulthandler.enable(2, all_threads=False)  # the last words of a segmentation fault
    for number in map(int, role_words[:2]):
        os.set_inheritable(number, False)
