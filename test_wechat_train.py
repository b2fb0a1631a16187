"""The tests: the real program and the real itchat client against a WeChat server on loopback.

The programs run as subprocesses with nothing in them changed: HTTPS_PROXY leads every request to the
server in this file, REQUESTS_CA_BUNDLE makes its certificate trusted. Read from top to bottom:
the server -> a program under test -> tests of the helpers -> of the parser -> of whole sessions.
"""
import contextlib
import gzip
import hashlib
import html
import http.server
import json
import os
import re
import shutil
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pytest
import trustme
from hypothesis import given, settings, strategies as st

import utils
from mxnet import nd
from mxnet.gluon import nn

HERE = os.path.dirname(os.path.abspath(__file__))
SAMPLE = os.path.join(HERE, '..', 'shared', 'fashion-mnist-sample')  # real images, if they are there
DEADLINE = 60  # seconds until a condition that is waited for counts as failed

# ----------------------------------------------------------------------- a WeChat server on loopback


class WeChat(http.server.ThreadingHTTPServer):
    """A WeChat server for one account, strict: what the protocol does not allow goes into `faults`.

    It is an HTTP proxy as well, so that a client reaches every https host of WeChat here. The test
    plays the phone of account A (scan, notes to oneself) and of everybody who writes to A.
    """
    daemon_threads = True
    owner = 'A'
    friends = ('B', 'C')       # nicknames; the address of each changes at every login
    group, public = '@@group', 'News'

    def __init__(self, folder):
        super().__init__(('127.0.0.1', 0), Answerer)
        ca = trustme.CA()
        self.bundle = os.path.join(folder, 'ca.pem')
        ca.cert_pem.write_to_path(self.bundle)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert('*.qq.com', '*.weixin.qq.com', '*.wx2.qq.com', '*.s3-accelerate.dualstack.amazonaws.com',
                      '*.dualstack.amazonaws.com').configure_cert(self.tls)
        self.changed = threading.Condition()  # guards what follows; notified at every change
        self.faults, self.requests = [], []
        self.uuid = None                      # of the QR code now shown
        self.logins = 0
        self.waiting = []                     # messages for the client
        self.sent = []                        # (name, text) that the client sent
        self.phone = 'scans'                  # what A does when a QR code is shown
        self.files = {}                       # url -> bytes, for downloads
        self.numbers = iter(range(1, 10 ** 9))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    # -- what the test does and sees

    def env(self):
        """Return the environment in which every request of a program comes here."""
        proxy = 'http://127.0.0.1:%d' % self.server_port
        return {'HTTPS_PROXY': proxy, 'HTTP_PROXY': proxy, 'NO_PROXY': '', 'REQUESTS_CA_BUNDLE': self.bundle}

    def wait(self, condition):
        """Wait until condition() is true and return it."""
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE), 'waited in vain; sent so far: %r' % (self.sent,)
            return condition()

    def says(self, name, text, to=None, **fields):
        """Let `name` write `text` to A; the owner writes to 'filehelper' unless `to` names another."""
        with self.changed:
            sender = self.address(name)
            receiver = self.address(to or ('filehelper' if name == self.owner else self.owner))
            number = next(self.numbers)
            self.waiting.append(dict({
                'MsgId': str(number), 'NewMsgId': number, 'FromUserName': sender, 'ToUserName': receiver,
                'MsgType': 1, 'Url': '', 'Content': html.escape(text, quote=False).replace('\n', '<br/>'),
                'Status': 3, 'CreateTime': int(time.time()), 'StatusNotifyUserName': ''}, **fields))
            self.changed.notify_all()

    def heard(self, name='B', since=0):
        """Return the texts that `name` got, from the `since`-th on."""
        return [text for to, text in self.sent if to == name][since:]

    def ask(self, text, name='B'):
        """Let `name` write `text`, wait for the next message to `name` and return it."""
        so_far = len(self.heard(name))
        self.says(name, text)
        return self.wait(lambda: self.heard(name, so_far))[0]

    def wait_text(self, pattern, name='B', since=0):
        """Wait for a message to `name` that `pattern` is found in and return it."""
        return self.wait(lambda: [t for t in self.heard(name, since) if re.search(pattern, t)])[0]

    # -- what the client asks

    def address(self, name):
        """Return the UserName of `name` in this login."""
        if name in ('filehelper', self.group):
            return name
        return '@' + hashlib.md5(('%s %d' % (name, self.logins)).encode()).hexdigest()

    def contact(self, name):
        return {'UserName': self.address(name), 'NickName': name, 'RemarkName': '', 'Sex': 0, 'MemberList': [],
                'VerifyFlag': 8 if name == self.public else 0, 'HeadImgUrl': '', 'ContactFlag': 3}

    def keys(self):
        return {'Count': 1, 'List': [{'Key': 1, 'Val': self.logins}]}

    def respond(self, host, path, query, headers, body):
        """Answer one request: return (status, headers, body)."""
        with self.changed:
            self.requests.append(host + path)
            self.changed.notify_all()
            name = path.rsplit('/', 1)[-1]
            if host + path in self.files:
                return 200, {}, self.files[host + path]
            if host == 'login.weixin.qq.com' and name in ('', 'jslogin', 'login', 'webwxpushloginurl'):
                return 200, {}, getattr(self, 'on_' + (name or 'front'))(query)
            expected = {'webwxuploadmedia': 'file.wx2.qq.com', 'synccheck': 'webpush.wx2.qq.com'}.get(name, 'wx2.qq.com')
            answer = getattr(self, 'on_' + name, None)
            if host != expected or answer is None:
                self.faults.append('unknown request to %s%s' % (host, path))
                return 404, {}, ''
            if name == 'webwxnewloginpage':
                return answer(query)
            if 'wxsid=sid%d' % self.logins not in headers.get('Cookie', ''):
                self.faults.append('%s without the cookies of this login' % name)
            if name in ('synccheck', 'webwxgetcontact', 'webwxlogout'):
                return 200, {}, answer(query)
            request = json.loads(body)
            base = {'Ret': 0 if request['BaseRequest']['Skey'] == 'skey%d' % self.logins else 1, 'ErrMsg': ''}
            return 200, {}, json.dumps(dict({'BaseResponse': base}, **answer(request)))

    def on_front(self, query):
        return 'WeChat'

    def on_jslogin(self, query):
        self.uuid = 'uuid%d==' % next(self.numbers)
        return 'window.QRLogin.code = 200; window.QRLogin.uuid = "%s";' % self.uuid

    def on_webwxpushloginurl(self, query):
        return json.dumps({'ret': '-1', 'msg': 'all push url fail'})

    def on_login(self, query):
        if query['uuid'] != self.uuid:
            return 'window.code=400;'
        polls = self.requests.count('login.weixin.qq.com/cgi-bin/mmwebwx-bin/login')
        if self.phone != 'scans' or polls % 3 == 1:
            self.changed.wait(0.05)  # a short long poll
            return 'window.code=408;'
        if polls % 3 == 2:
            return 'window.code=201;'
        return 'window.code=200;\nwindow.redirect_uri="https://wx2.qq.com/cgi-bin/mmwebwx-bin/webwxnewloginpage?ticket=t";'

    def on_webwxnewloginpage(self, query):
        self.logins += 1
        self.waiting.clear()
        cookies = ['wxsid=sid%d', 'wxuin=%d', 'webwx_data_ticket=data%d']
        return 200, [('Set-Cookie', c % self.logins + '; Domain=.qq.com; Path=/') for c in cookies], (
            '<error><ret>0</ret><skey>skey%d</skey><wxsid>sid%d</wxsid><wxuin>%d</wxuin>'
            '<pass_ticket>pass%d</pass_ticket></error>' % ((self.logins,) * 4))

    def on_webwxinit(self, request):
        return {'User': self.contact(self.owner), 'SyncKey': self.keys(), 'ContactList': [], 'InviteStartCount': 0}

    def on_webwxstatusnotify(self, request):
        return {'MsgID': '1'}

    def on_webwxgetcontact(self, query):
        members = [self.contact(name) for name in (*self.friends, self.public)]
        return json.dumps({'BaseResponse': {'Ret': 0}, 'MemberList': members, 'MemberCount': len(members), 'Seq': 0})

    def on_webwxbatchgetcontact(self, request):
        group = dict(self.contact(self.group), MemberList=[self.contact('B')])
        return {'ContactList': [group]}

    def on_synccheck(self, query):
        self.changed.wait_for(lambda: self.waiting, 0.5)
        return 'window.synccheck={retcode:"0",selector:"%d"}' % (2 if self.waiting else 0)

    def on_webwxsync(self, request):
        messages, self.waiting = self.waiting, []
        return {'AddMsgList': messages, 'ModContactList': [], 'SyncKey': self.keys(), 'SyncCheckKey': self.keys()}

    def on_webwxsendmsg(self, request):
        names = {self.address(name): name for name in (*self.friends, self.owner, self.public, 'filehelper', self.group)}
        message = request['Msg']
        if message['FromUserName'] != self.address(self.owner) or message['ToUserName'] not in names:
            self.faults.append('a message from or to nobody: %r' % message)
        self.sent.append((names.get(message['ToUserName']), message['Content']))
        self.changed.notify_all()
        return {'MsgID': str(next(self.numbers)), 'LocalID': message['LocalID']}

    def on_webwxlogout(self, query):
        return ''


class Answerer(http.server.BaseHTTPRequestHandler):
    """Reads one connection's requests and lets the server answer them."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.host = self.path.rsplit(':', 1)[0]
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile('rb')
        self.wfile = self.connection.makefile('wb')
        self.close_connection = False

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        status, headers, answer = self.server.respond(
            url.hostname or self.host, url.path, dict(urllib.parse.parse_qsl(url.query)), self.headers, body)
        answer = answer if isinstance(answer, bytes) else answer.encode()
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        self.wfile.flush()

    do_POST = do_GET

    def handle(self):
        with contextlib.suppress(OSError):  # the client is gone: killed by the test
            super().handle()

    def log_message(self, *args):
        pass


# --------------------------------------------------------------------------- a program under test


class Program:
    """wechat_train.py, or another script that uses utils, in a subprocess and a folder of its own."""

    def __init__(self, folder, *args, env=None, script=os.path.join(HERE, 'wechat_train.py'), python=()):
        self.log = open(os.path.join(folder, 'output.txt'), 'w+', encoding='utf-8')
        env = dict(os.environ, PYTHONPATH=HERE, PYTHONUNBUFFERED='1', PYTHONIOENCODING='utf-8',
                   MXNET_HOME=str(folder), **(env or {}))
        self.process = subprocess.Popen([sys.executable, *python, script, *args], cwd=folder, env=env,
                                        stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, text=True)

    def output(self):
        self.log.seek(0)
        return self.log.read()

    def types(self, text):
        """Type `text` and the end of the input, wait for the program's end; return (status, output)."""
        self.process.communicate(text, DEADLINE)
        return self.process.returncode, self.output()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        print(self.output())  # shown by pytest when the test fails
        self.log.close()


@pytest.fixture
def wechat(tmp_path):
    """A WeChat server; at the end of the test, nothing may have gone against the protocol."""
    server = WeChat(str(tmp_path))
    yield server
    server.shutdown()
    assert server.faults == []


@pytest.fixture
def images(tmp_path):
    """A folder with the four IDX files: the real sample when it is there, else drawn images."""
    folder = tmp_path / 'images'
    if os.path.isdir(SAMPLE):
        shutil.copytree(SAMPLE, folder)
    else:
        folder.mkdir()
        for part, n, seed in (('train', 3000, 0), ('t10k', 600, 1)):
            for kind, array in zip(('images-idx3', 'labels-idx1'), utils.draw_garments(n, seed)):
                write_idx(folder / ('%s-%s-ubyte.gz' % (part, kind)), array)
    return str(folder)


def write_idx(path, array):
    with gzip.open(path, 'wb') as f:
        f.write(struct.pack('>HBB%dI' % array.ndim, 0, 8, array.ndim, *array.shape) + array.tobytes())


# ------------------------------------------------------------------------------ the data, the helpers


def test_loader_yields_every_image_once(images, monkeypatch):
    monkeypatch.setattr(utils, 'data_dir', images)
    train_data, test_data = utils.load_data_fashion_mnist(256)
    raw = utils.read_idx(os.path.join(images, 'train-images-idx3-ubyte.gz'))
    assert (len(train_data), len(test_data)) == (12, 3)
    epochs = []
    for _ in range(2):
        batches = list(train_data)
        assert [d.shape for d, _ in batches] == [(256, 1, 28, 28)] * 11 + [(3000 - 11 * 256, 1, 28, 28)]
        epochs.append(np.concatenate([d.asnumpy() for d, _ in batches]))
        assert epochs[-1].dtype == np.float32 and epochs[-1].min() == 0 and epochs[-1].max() == 1
        rows = {image.tobytes() for image in epochs[-1]}
        assert rows == {(image[None] / np.float32(255)).tobytes() for image in raw}
    assert not np.array_equal(*epochs)  # shuffled anew
    labels = np.concatenate([label.asnumpy() for _, label in test_data])
    assert np.array_equal(labels, utils.read_idx(os.path.join(images, 't10k-labels-idx1-ubyte.gz')))


def test_loader_resizes(monkeypatch):
    monkeypatch.setattr(utils, 'data_dir', utils.DEMO)
    data, label = next(iter(utils.load_data_fashion_mnist(16, resize=96)[0]))
    assert data.shape == (16, 1, 96, 96) and label.shape == (16,)
    assert 0 <= data.min().asscalar() and 0.2 < data.max().asscalar() <= 1


def test_demo_images_are_ten_kinds_and_always_the_same():
    images, labels = utils.draw_garments(300, seed=3)
    again, _ = utils.draw_garments(300, seed=3)
    other, _ = utils.draw_garments(300, seed=4)
    assert images.shape == (300, 28, 28) and images.dtype == np.uint8 and set(labels) == set(range(10))
    assert np.array_equal(images, again) and not np.array_equal(images, other)


@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b'<html>' + b, lambda b: b[:3],
                                    lambda b: gzip.compress(gzip.decompress(b)[:-1])])
def test_damaged_file_is_recognised(images, damage):
    path = os.path.join(images, 't10k-labels-idx1-ubyte.gz')
    with open(path, 'rb') as f:
        whole = f.read()
    assert len(utils.read_idx(path)) == 600
    with open(path, 'wb') as f:
        f.write(damage(whole))
    with pytest.raises(ValueError, match='t10k-labels.*已损坏'):
        utils.read_idx(path)


def test_download_goes_on_at_the_next_mirror_and_fetches_damaged_files_again(wechat, images, tmp_path, monkeypatch):
    for key, value in dict(wechat.env(), MXNET_HOME=str(tmp_path)).items():
        monkeypatch.setenv(key, value)
    first, second = (urllib.parse.urlsplit(mirror) for mirror in utils.MIRRORS)
    content = {}
    for name in utils.FILES:
        with open(os.path.join(images, name), 'rb') as f:
            content[name] = f.read()
    monkeypatch.setattr(utils, 'FILES', {n: hashlib.md5(c).hexdigest() for n, c in content.items()})
    with pytest.raises(OSError, match='--data'):  # both mirrors are gone
        utils.fetch_files()
    for name in content:
        wechat.files[second.hostname + second.path + name] = content[name]
    wechat.files[first.hostname + first.path + 'train-images-idx3-ubyte.gz'] = b'damaged'
    paths = utils.fetch_files()
    assert [os.path.dirname(p) for p in paths] == [str(tmp_path / 'datasets' / 'fashion-mnist')] * 4
    assert len(utils.read_idx(paths[0])) == 3000
    with open(paths[1], 'r+b') as f:
        f.truncate(100)  # cut off
    so_far = len(wechat.requests)
    assert len(utils.read_idx(utils.fetch_files()[1])) == 3000
    assert {r.rsplit('/')[-1] for r in wechat.requests[so_far:]} - {''} == {'train-labels-idx1-ubyte.gz'}
    wechat.faults.clear()  # the 404s of the mirrors


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10 ** 6))
@settings(max_examples=25, deadline=None)
def test_accuracy_equals_numpy(n, classes, seed):
    rng = np.random.RandomState(seed)
    output, label = rng.permutation(n * classes).reshape(n, classes), rng.randint(classes, size=n)
    expected = np.mean(output.argmax(axis=1) == label)
    got = utils.accuracy(nd.array(output, dtype='float32'), nd.array(label, dtype='float32'))
    assert float(got) == pytest.approx(expected, abs=1e-6)


def test_evaluate_accuracy_equals_numpy_with_a_smaller_last_batch():
    rng = np.random.RandomState(0)
    images, labels = rng.randint(256, size=(103, 28, 28)).astype(np.uint8), rng.randint(10, size=103).astype(np.uint8)
    net = nn.Dense(10)
    net.initialize()
    outputs = net(nd.array(images[:, None] / 255, dtype='float32')).asnumpy()
    got = utils.evaluate_accuracy(utils.Batches(images, labels, 25), net, utils.try_gpu())
    assert got == pytest.approx(np.mean(outputs.argmax(axis=1) == labels))


def test_try_gpu_is_the_gpu_when_there_is_one():
    import mxnet as mx
    assert utils.try_gpu() == (mx.gpu() if mx.context.num_gpus() else mx.cpu())


def test_durations_fit_a_phone():
    assert [utils.duration(s) for s in (0.04, 9.96, 10, 59.7, 61, 3600, 90061)] == [
        '0.0 秒', '10.0 秒', '10 秒', '1 分 0 秒', '1 分 1 秒', '1 小时 0 分', '25 小时 1 分']


# --------------------------------------------------------------------------- what a person can write

@pytest.mark.parametrize('text, command', [
    ('开始', 'start'), (' start\n', 'start'), ('ＳＴＯＰ', 'stop'), ('停止！', 'stop'), ('参数', 'params'), ('Help', 'help'),
    ('lr 0.1', [('learning_rate', '0.1')]), ('LR=0.1', [('learning_rate', '0.1')]),
    ('learning_rate：1e-3', [('learning_rate', '1e-3')]), ('ｌｒ　０．１', [('learning_rate', '0.1')]),
    ('ti: 5', [('training_iters', '5')]), ('Batch_Size = １２８', [('batch_size', '128')]),
    ('lr 0.1, ti 5\nbs=128', [('learning_rate', '0.1'), ('training_iters', '5'), ('batch_size', '128')]),
    ('lr abc', [('learning_rate', 'abc')]), ('lr -1', [('learning_rate', '-1')])])
def test_commands(text, command):
    assert utils.parse(text) == command


@pytest.mark.parametrize('text', ['', ' ', '开始吃饭', '别停止', 'lr', 'lr 0.1 吗', 'bs 你', '0.1', 'lr 0.1 ti', 'startle',
                                  'let us start', '[微笑]', '<xml/>', 'lr ' * 10 ** 5, '：', 'filehelper'])
def test_small_talk_is_no_command(text):
    assert utils.parse(text) is None


@given(st.text())
def test_any_text_is_parsed_without_an_error(text):
    command = utils.parse(text)
    assert command is None or command in utils.WORDS.values() or isinstance(command, list)


WRITTEN = st.tuples(st.sampled_from(['lr', 'Learning_Rate', 'ｌｒ', 'TI', 'training_iters', 'bs', 'batch_size']),
                    st.sampled_from([' ', '=', ' = ', '：', ':', '\u3000', '\n']))


@given(st.lists(st.tuples(WRITTEN, st.integers(0, 10 ** 6)), min_size=1, max_size=6), st.sampled_from([' ', '，', ', ', '\n', '；']),
       st.booleans())
def test_any_way_to_write_numbers_is_read(pairs, between, full_width):
    text = between.join(name + sign + str(value) for (name, sign), value in pairs)
    if full_width:
        text = text.translate({ord('0') + i: chr(0xFF10 + i) for i in range(10)})
    if len(text) <= 200:
        assert [value for _, value in utils.parse(text)] == [str(value) for _, value in pairs]


@pytest.mark.parametrize('name, text, value', [
    ('learning_rate', '0.1', 0.1), ('learning_rate', '.5', 0.5), ('learning_rate', '1e-3', 1e-3), ('learning_rate', '+1', 1),
    ('learning_rate', '100', 100), ('training_iters', '1', 1), ('training_iters', '007', 7), ('batch_size', '10000', 10000)])
def test_good_values(name, text, value):
    assert utils.read_value(name, text) == value


@pytest.mark.parametrize('name, text', [
    *(('learning_rate', t) for t in ('abc', '-1', '0', 'nan', 'inf', '1e400', '101', '1_0', '0x1', '1e', '--1', '.')),
    *(('training_iters', t) for t in ('0', '2.5', '-3', '1e2', '1' * 5000, 'x')),
    *(('batch_size', t) for t in ('100000', '0', '12.0'))])
def test_bad_values_are_refused_with_what_is_allowed(name, text):
    with pytest.raises(ValueError, match='例如') as refused:
        utils.read_value(name, text)
    assert len(str(refused.value)) < 80


# --------------------------------------------------------------------------------------- whole sessions


def test_a_session_in_wechat(wechat, images, tmp_path):
    """QR code, login, commands, two epochs, stop in the middle of one, start again."""
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.wait(lambda: 'webpush.wx2.qq.com/cgi-bin/mmwebwx-bin/synccheck' in wechat.requests)
        output = program.output()
        assert '█▀▀' in output or '▄▄▄▄▄' in output  # the QR code
        assert '已扫码' in output and '已登录：A' in output
        assert wechat.ask('lr 0.1') == '学习率 lr = 0.1\n轮数 ti = 2\n批量 bs = 256'
        assert wechat.ask('ＢＳ：６４，ti=2') == '学习率 lr = 0.1\n轮数 ti = 2\n批量 bs = 64'
        for bad, allowed in (('lr abc', '学习率'), ('lr nan', '学习率'), ('ti 2.5', '轮数'), ('bs 100000', '批量')):
            answer = wechat.ask(bad)
            assert bad.split()[1] in answer and allowed in answer and 'bs = 64' in answer and 'ti = 2' in answer
        assert wechat.ask('停止') == '现在没有训练，发“开始”就开始。'

        since = len(wechat.heard())
        wechat.says('B', '开始')
        wechat.says('B', 'start')
        wechat.wait_text('训练完成')
        texts = wechat.heard('B', since)
        assert texts[0].startswith('开始训练\n设备 ') and 'lr = 0.1' in texts[0]
        assert texts[1].startswith('已经在训练了')
        assert [t.split('\n')[0] for t in texts[2:]] == ['第 1/2 轮', '第 2/2 轮', '训练完成']
        assert re.fullmatch(r'第 1/2 轮\n损失 \d\.\d{4}\n训练精度 0\.\d{3}\n测试精度 0\.\d{3}\n用时 .+ 秒，还需约 .+ 秒', texts[2])
        assert '还需' not in texts[3] and '完成 2/2 轮' in texts[4]

        wechat.ask('ti 50 bs 4')
        assert wechat.ask('开始').startswith('开始训练')
        program_saw = len(wechat.heard())
        assert wechat.ask('停止') == '好，这一批算完就停。'
        assert re.search(r'完成 0/50 轮', wechat.wait_text('训练已停止', since=program_saw))
        wechat.ask('ti 1 bs 1000')
        since = len(wechat.heard())
        assert wechat.ask('START').startswith('开始训练')
        assert wechat.wait_text('训练完成', since=since)
        assert program.process.poll() is None


def test_only_commands_of_friends_and_of_the_owner_are_answered(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.wait(lambda: wechat.logins)
        for text in ('你好', 'lr', '开始吃饭了吗', 'bs 你', '<b>开始</b>', '开始\n吃饭', 'x' * 10 ** 6):
            wechat.says('B', text)
        wechat.says('nobody', '参数')                   # no friend
        wechat.says(wechat.public, '参数')              # a public account
        wechat.says(wechat.group, '%s:\n参数' % wechat.address('B'))
        wechat.says('A', '参数', to='B')                # the owner to a friend
        wechat.says('B', '参数', MsgType=3)             # a picture
        assert '学习率' in wechat.ask('参数')
        wechat.says('A', 'help')                        # the owner to filehelper
        wechat.wait(lambda: wechat.heard('filehelper'))
        assert wechat.sent == [('B', '学习率 lr = 0.5\n轮数 ti = 2\n批量 bs = 256'), ('filehelper', utils.HELP)]
        assert '吃饭' not in program.output()           # what is no command is not logged


CRASHING = """
import itchat, utils

def nn_train(wechat_name, params):
    utils.lock_start()
    if params[1] == 1:
        raise RuntimeError('the disk is on fire\\nsecond line')
    utils.lock_end(wechat_name)

if __name__ == '__main__':
    utils.wechat_reachable()
    utils.chat_supervisor(nn_train)
    itchat.auto_login(hotReload=True, qrCallback=utils.show_qr, loginCallback=utils.show_login)
    itchat.run()
"""


def test_a_crash_is_told_and_the_next_start_works(wechat, tmp_path):
    script = tmp_path / 'crashing.py'
    script.write_text(CRASHING)
    with Program(tmp_path, env=wechat.env(), script=str(script)) as program:
        wechat.wait(lambda: wechat.logins)
        wechat.ask('ti 1')
        wechat.ask('开始')
        told = wechat.wait_text('出错')
        assert 'RuntimeError: the disk is on fire' in told and 'second' not in told
        assert 'Traceback' in program.output() and 'in nn_train' in program.output()
        wechat.ask('ti 2')
        since = len(wechat.heard())
        wechat.ask('开始')
        wechat.wait_text('训练完成', since=since)


def test_a_kept_session_needs_no_second_scan(wechat, tmp_path):
    for _ in range(2):
        with Program(tmp_path, env=wechat.env()):
            wechat.wait(lambda: wechat.logins)
            assert 'lr' in wechat.ask('参数')
            wechat.wait(lambda: os.path.exists(tmp_path / 'itchat.pkl'))
    assert wechat.logins == 1


# ----------------------------------------------------------------------------------- the command line


def test_the_demo_trains_to_the_end_without_wechat(tmp_path):
    with Program(tmp_path, '--demo', env={'HTTPS_PROXY': 'http://127.0.0.1:9'}) as program:
        status, output = program.types('ti 2\n你好\n开始\n')
    assert status == 0
    reports = re.findall(r'(.*)\n第 (\d)/2 轮', output)
    assert reports == [('演示数据：程序画的图，不是 Fashion-MNIST', '1'), ('演示数据：程序画的图，不是 Fashion-MNIST', '2')]
    assert '训练完成\n完成 2/2 轮' in output and 'Traceback' not in output


def test_the_console_tells_a_crash_and_exits_with_1(images, tmp_path):
    with open(os.path.join(images, 'train-labels-idx1-ubyte.gz'), 'wb') as f:
        f.write(b'damaged')
    with Program(tmp_path, '--console', '--data', images) as program:
        status, output = program.types('开始\n')
    assert status == 1 and 'ValueError' in output and '已损坏' in output


def test_no_network_is_one_line_and_a_failure(tmp_path):
    with Program(tmp_path, env={'HTTPS_PROXY': 'http://127.0.0.1:9', 'NO_PROXY': ''}) as program:
        status, output = program.types('')
    assert status == 1 and len(output.splitlines()) == 1
    assert '连不上微信' in output and '--console' in output and '--demo' in output


def test_help_and_wrong_options(tmp_path):
    with Program(tmp_path, '--help') as program:
        status, output = program.types('')
    assert status == 0 and all(option in output for option in ('--console', '--data DIR', '--demo', '--seed'))
    with Program(tmp_path, '--console', '--data', str(tmp_path)) as program:
        status, output = program.types('')
    assert status == 2 and 'train-images-idx3-ubyte.gz' in output and 'Traceback' not in output


def test_an_unsupported_python_is_told_in_one_line(tmp_path):
    pretend = "import sys; sys.version_info = (3, 13, 0, 'final', 0); exec(open(sys.argv[1], encoding='utf-8').read())"
    with Program(tmp_path, python=('-c', pretend)) as program:
        status, output = program.types('')
    assert status == 1 and len(output.splitlines()) == 1 and '3.9' in output and '3.13' in output
