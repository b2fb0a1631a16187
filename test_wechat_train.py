"""The tests: the real program and the real itchat client against a WeChat server on loopback.

The programs run as subprocesses with nothing in them changed: HTTPS_PROXY leads every request to the
server in this file, REQUESTS_CA_BUNDLE makes its certificate trusted. Read from top to bottom:
the server -> a program under test -> tests of the helpers -> of the parser -> of whole sessions.
"""

import ast
import codecs
import collections
import contextlib
import copy
import csv
import difflib
import email.utils
import fcntl
import functools
import glob
import gzip
import hashlib
import html
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
import unicodedata
import urllib.parse
import warnings
import zipfile
from importlib import metadata
from importlib.util import find_spec

import matplotlib
import numpy as np
import pytest
import segno
import trustme
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from packaging import requirements
from PIL import Image

import utils  # before MXNet
import mxnet as mx
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

HERE = os.path.dirname(os.path.abspath(__file__))
SAMPLE = os.path.join(HERE, '..', 'shared', 'fashion-mnist-sample')  # real images, if they are there
NEWS = r'第 \d|排队的|连着两次|训练(完成|已停止|出错|停下|的进程没有了|的程序)|程序又启动|从现在起|\d+ 秒后'
ANSWER = rf'\A(?!{NEWS})'  # a text that is no report
TICKETS = 'skey', 'wxsid', 'wxuin', 'pass_ticket'
DEADLINE = 120  # seconds until a condition that is waited for counts as failed
with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as readme:
    README = readme.read()


def blocks(language):
    """Return what the README shows in this language between fences, if it is marked to be run."""
    return re.findall(rf'^```{language} run\n(.*?)^```$', README, re.M | re.S)


# ----------------------------------------------------------------------- a WeChat server on loopback


class WeChat(http.server.ThreadingHTTPServer):
    """A WeChat server for one account, strict: what the protocol does not allow goes into `faults`.

    It is an HTTP proxy as well, so that a client reaches every https host of WeChat here. The test
    plays the phone of account A (scan, notes to oneself) and of everybody who writes to A.
    """

    daemon_threads = True
    over = '1101'  # what synccheck answers after a log-out
    login_host, host, sync_host = 'login.weixin.qq.com', 'wx2.qq.com', 'webpush.wx2.qq.com'
    file_hosts = ('file.wx2.qq.com',)
    owner = 'A'
    friends = 'B', 'C', 'D', 'E', 'F', 'G', 'H'  # the address of each changes at every login
    nicknames, remarks = {'G': 'H'}, {'D': '老王', 'F': 'E'}  # nicknames that are not the names here
    ahead, dated = 0, False  # its clock against this machine's, in seconds; do its answers have a Date?
    patience = 0.5  # seconds that synccheck waits for a message; WeChat's own: 25
    group, public, cookies_for = '@@group', 'News', '.qq.com'

    def __init__(self, folder):
        super().__init__(('127.0.0.1', 0), Answerer)
        self.nicknames, self.remarks = dict(self.nicknames), dict(self.remarks)  # a test may change them
        ca = trustme.CA()
        self.bundle = os.path.join(folder, 'ca.pem')
        ca.cert_pem.write_to_path(self.bundle)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(
            '*.qq.com',
            '*.weixin.qq.com',
            '*.wx.qq.com',
            '*.wx2.qq.com',
            '*.wx8.qq.com',
            'raw.githubusercontent.com',
            '*.s3-accelerate.dualstack.amazonaws.com',
            '*.dualstack.amazonaws.com',
        ).configure_cert(self.tls)
        self.changed = threading.Condition()  # guards what follows; notified at every change
        self.faults, self.requests = [], []
        self.uuid = None  # of the QR code now shown
        self.logins = self.receiving = self.seen = (
            0  # the number of the login, and of the one that asks for messages
        )
        self.messages = []  # to the client; it has those before its SyncKey
        self.logged_out = False  # on the phone
        self.breaking = lambda name: (
            None
        )  # what goes wrong with a request: None, 'drop', 'drip', 'hang', 'mute', 'late', 500, 429 or a Ret
        self.healed = threading.Event()  # ends what hangs
        self.sent = []  # (name, text) that the client sent; a picture is its bytes
        self.refusing = {}  # name -> the Ret with which what is sent to it is refused
        self.contact_changes = []  # names whose entries in the contacts come with the next messages
        self.uploads = {}  # MediaId -> bytes
        self.phone = 'scans'  # what A does when a QR code is shown
        self.files = {}  # url -> bytes, for downloads
        self.numbers = iter(range(1, 10**9))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    # -- what the test does and sees

    def env(self):
        """Return the environment in which every request of a program comes here."""
        proxy = 'http://127.0.0.1:%d' % self.server_port
        return {'HTTPS_PROXY': proxy, 'HTTP_PROXY': proxy, 'NO_PROXY': '', 'REQUESTS_CA_BUNDLE': self.bundle}

    def wait(self, condition):
        """Wait until condition() is true and return it."""
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE), 'waited in vain; sent so far: %r' % (
                self.sent,
            )
            return condition()

    def says(self, name, text, to=None, **fields):
        """Let `name` write `text` to A; the owner writes to 'filehelper' unless `to` names another."""
        with self.changed:
            sender = self.address(name)
            receiver = self.address(to or ('filehelper' if name == self.owner else self.owner))
            number = next(self.numbers)
            self.messages.append(
                dict(
                    {
                        'MsgId': str(number),
                        'NewMsgId': number,
                        'FromUserName': sender,
                        'ToUserName': receiver,
                        'MsgType': 1,
                        'Url': '',
                        'Content': html.escape(text, quote=False).replace('\n', '<br/>'),
                        'Status': 3,
                        'CreateTime': self.now(),
                        'StatusNotifyUserName': '',
                    },
                    **fields,
                )
            )
            self.changed.notify_all()

    def now(self):
        """Return the time by the server's clock."""
        return int(time.time()) + self.ahead

    def heard(self, name='B', since=0):
        """Return the texts that `name` got, from the `since`-th on."""
        return [text for to, text in self.sent if to == name][since:]

    def ready(self):
        """Wait for the login and let B, by the first command, become the supervisor."""
        self.wait(lambda: self.receiving)
        so_far = len(self.heard())
        self.says('B', '参数')
        self.wait_text('学习率', since=so_far)

    def ask(self, text, name='B'):
        """Let `name` write `text`, wait for the answer and return it: the next text that is no report."""
        so_far = len(self.heard(name))
        self.says(name, text)
        return self.wait_text(ANSWER, name, so_far)

    def wait_text(self, pattern, name='B', since=0):
        """Wait for a text to `name` that `pattern` is found in and return it."""
        return self.wait(
            lambda: [t for t in self.heard(name, since) if isinstance(t, str) and re.search(pattern, t)]
        )[0]

    def wait_picture(self, name='B', since=0):
        """Wait for a picture to `name` and return it as an array (height, width, channels)."""
        png = self.wait(lambda: [t for t in self.heard(name, since) if isinstance(t, bytes)])[0]
        assert png.startswith(b'\x89PNG')
        return np.asarray(Image.open(io.BytesIO(png)))

    # -- what the client asks

    def address(self, name):
        """Return the UserName of `name` in this login."""
        if name in ('filehelper', self.group):
            return name
        return '@' + hashlib.md5(('%s %d' % (name, self.logins)).encode()).hexdigest()

    def contact(self, name):
        return {
            'UserName': self.address(name),
            'NickName': self.nicknames.get(name, name),
            'RemarkName': self.remarks.get(name, ''),
            'Sex': 0,
            'MemberList': [],
            'VerifyFlag': 8 if name == self.public else 0,
            'HeadImgUrl': '',
            'ContactFlag': 3,
        }

    def keys(self):
        return {'Count': 1, 'List': [{'Key': 1, 'Val': len(self.messages)}]}

    def respond(self, host, path, query, headers, body, code):
        """Answer one request, with Ret `code` if there is one: return (status, headers, body)."""
        with self.changed:
            self.requests.append(host + path)
            self.changed.notify_all()
            name = path.rsplit('/', 1)[-1]
            if host + path in self.files:
                return 200, {}, self.files[host + path]
            self.check(name, query, headers)
            if host == self.login_host and name in ('', 'jslogin', 'login', 'webwxpushloginurl'):
                return 200, {}, getattr(self, 'on_' + (name or 'front'))(query)
            hosts = {'webwxuploadmedia': self.file_hosts, 'synccheck': (self.sync_host,)}.get(
                name, (self.host,)
            )
            answer = getattr(self, 'on_' + name, None)
            if host not in hosts or answer is None:
                self.faults.append('unknown request to %s%s' % (host, path))
                return 404, {}, ''
            if name == 'webwxnewloginpage':
                return answer(query)
            if self.logged_out:
                refusal = json.dumps({'BaseResponse': {'Ret': 1101, 'ErrMsg': ''}})
                sync = 'window.synccheck={retcode:"%s",selector:"0"}' % self.over
                return 200, {}, sync if name == 'synccheck' else refusal
            if 'wxsid=' + self.ticket('wxsid') not in headers.get('Cookie', '') and host.endswith(
                self.cookies_for
            ):
                self.faults.append('%s without the cookies of this login' % name)
            if name in ('synccheck', 'webwxgetcontact', 'webwxlogout'):
                return 200, {}, answer(query)
            request = json.loads(body) if name != 'webwxuploadmedia' else self.form(headers, body)
            base = {'Skey': 'skey', 'Sid': 'wxsid', 'Uin': 'wxuin'}
            if request['BaseRequest'] != {key: self.ticket(ticket) for key, ticket in base.items()}:
                self.faults.append('%s with the BaseRequest %r' % (name, request['BaseRequest']))
            answer = {} if code else answer(request)
            return 200, {}, json.dumps({'BaseResponse': {'Ret': code, 'ErrMsg': ''}, **answer})

    def ticket(self, name):
        """Return a ticket of this login as the login page tells it."""
        forms = {
            'skey': '@crypt_ab/c+d%d',
            'wxsid': 'si+d/%d',
            'wxuin': '%d23456789',
            'pass_ticket': 'pa%%2Bss%%2Ft%d',
        }
        return forms[name] % self.logins

    def check_tickets(self, name, query):
        """Note a ticket in the query of a request that is missing, or not encoded just once."""
        names = {'webwxsync': 'sid skey pass_ticket', 'synccheck': 'sid skey uin', 'webwxgetcontact': 'skey'}
        names.update(
            dict.fromkeys(('webwxsendmsg', 'webwxsendmsgimg'), 'lang pass_ticket'), webwxlogout='skey'
        )
        names.update(dict.fromkeys(('webwxinit', 'webwxstatusnotify'), 'pass_ticket'))
        for key in names.get(name, '').split():
            ticket = {'sid': 'wxsid', 'uin': 'wxuin'}.get(key, key)
            wanted = 'zh_CN' if key == 'lang' else urllib.parse.unquote(self.ticket(ticket))
            if query.get(key) != wanted:
                self.faults.append('%s with the %s %r' % (name, key, query.get(key)))

    def check(self, name, query, headers):
        """Note what is wrong with a request to any host."""
        self.check_tickets(name, query)
        if headers.get('mmweb_appid'):
            self.faults.append('%s as for 文件传输助手' % name)

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
        polls = self.requests.count(self.login_host + '/cgi-bin/mmwebwx-bin/login')
        if self.phone != 'scans' or polls % 3 == 1:
            self.changed.wait(0.05)  # a short long poll
            return 'window.code=408;'
        if polls % 3 == 2:
            return 'window.code=201;'
        return (
            'window.code=200;\n'
            'window.redirect_uri="https://%s/cgi-bin/mmwebwx-bin/webwxnewloginpage?ticket=t";' % self.host
        )

    def on_webwxnewloginpage(self, query):
        self.logins += 1
        self.logged_out = False
        values = {name: self.ticket(name) for name in ('wxsid', 'wxuin')}
        values['webwx_data_ticket'] = 'data%d' % self.logins
        cookies = [
            ('Set-Cookie', '%s=%s; Domain=%s; Path=/' % (*c, self.cookies_for)) for c in values.items()
        ]
        tags = ''.join('<%s>%s</%s>' % (name, self.ticket(name), name) for name in TICKETS)
        return 200, cookies, '<error><ret>0</ret>%s</error>' % tags

    def on_webwxinit(self, request):
        return {
            'User': self.contact(self.owner),
            'SyncKey': self.keys(),
            'ContactList': [],
            'InviteStartCount': 0,
            'SystemTime': self.now(),
        }

    def on_webwxstatusnotify(self, request):
        return {'MsgID': '1'}

    def on_webwxgetcontact(self, query):
        members = [self.contact(name) for name in (*self.friends, self.public)]
        return json.dumps(
            {'BaseResponse': {'Ret': 0}, 'MemberList': members, 'MemberCount': len(members), 'Seq': 0}
        )

    def on_webwxbatchgetcontact(self, request):
        group = dict(self.contact(self.group), MemberList=[self.contact('B')])
        return {'ContactList': [group]}

    def on_synccheck(self, query):
        self.receiving = self.logins
        self.changed.notify_all()
        self.seen = has = int(query['synckey'].split('_')[1])
        self.changed.wait_for(lambda: len(self.messages) > has or self.logged_out, self.patience)
        return 'window.synccheck={retcode:"0",selector:"%d"}' % (2 if len(self.messages) > has else 0)

    def on_webwxsync(self, request):
        messages = self.messages[request['SyncKey']['List'][0]['Val'] :]
        self.seen = len(self.messages)
        self.changed.notify_all()
        return {
            'AddMsgList': messages,
            'ModContactList': [self.contact(self.contact_changes.pop()) for _ in self.contact_changes[:]],
            'SyncKey': self.keys(),
            'SyncCheckKey': self.keys(),
        }

    def on_webwxsendmsg(self, request):
        names = {
            self.address(name): name
            for name in (*self.friends, self.owner, self.public, 'filehelper', self.group)
        }
        message = request['Msg']
        if names.get(message['ToUserName']) in self.refusing:
            return {'BaseResponse': {'Ret': self.refusing[names[message['ToUserName']]], 'ErrMsg': ''}}
        if message['FromUserName'] != self.address(self.owner) or message['ToUserName'] not in names:
            self.faults.append('a message from or to nobody: %r' % message)
        self.sent.append(
            (names.get(message['ToUserName']), message.get('Content') or self.uploads[message['MediaId']])
        )
        number = str(next(self.numbers))
        self.come_back(message, number)
        self.changed.notify_all()
        return {'MsgID': number, 'LocalID': message['LocalID']}

    def come_back(self, message, number):
        """Put what the client sent among the messages to it: only 文件传输助手 does."""

    on_webwxsendmsgimg = on_webwxsendmsg

    def form(self, headers, body):
        """Return the JSON in an upload, with the file's bytes as 'file'."""
        parts = email.message_from_bytes(b'Content-Type: %s\n\n' % headers['Content-Type'].encode() + body)
        fields = {
            p.get_param('name', header='Content-Disposition'): p.get_payload(decode=True)
            for p in parts.get_payload()
        }
        tickets = {'webwx_data_ticket': 'data%d' % self.logins, 'pass_ticket': self.ticket('pass_ticket')}
        if tickets.items() - {name: value.decode('latin-1') for name, value in fields.items()}.items():
            self.faults.append('an upload without its tickets')
        self.check_form(list(fields))
        return dict(json.loads(fields['uploadmediarequest']), file=fields['filename'])

    def check_form(self, names):
        """Note what is wrong with the fields of an upload: in web WeChat, nothing."""

    def on_webwxuploadmedia(self, request):
        content = request['file']
        if (request['TotalLen'], request['FileMd5']) != (len(content), hashlib.md5(content).hexdigest()):
            self.faults.append('an upload that is not what it says')
        self.uploads['media%d' % len(self.uploads)] = content
        return {'MediaId': 'media%d' % (len(self.uploads) - 1)}

    def on_webwxlogout(self, query):
        return ''


class FileHelper(WeChat):
    """The web page of 文件传输助手, for one account: the same protocol but for what stands here."""

    login_host, host = 'login.wx2.qq.com', 'szfilehelper.weixin.qq.com'
    sync_host, file_hosts = host, ('file.wx2.qq.com',)
    friends, public, cookies_for = (), 'nobody', '.weixin.qq.com'
    entries = {'login.wx2.qq.com': host, 'login.wx.qq.com': 'filehelper.weixin.qq.com'}  # login host -> page
    app_id = 'wx_webfilehelper'

    def respond(self, host, path, *args):
        if path == '/jslogin' and host in self.entries:  # a login begins by way of this host
            self.login_host, self.host = host, self.entries[host]
            self.sync_host = self.host
            self.file_hosts = ('file.wx2.qq.com' if host == 'login.wx2.qq.com' else 'file.wx.qq.com',)
        return super().respond(host, path, *args)

    def check(self, name, query, headers):
        self.check_tickets(name, query)
        page = urllib.parse.quote('https://%s/cgi-bin/mmwebwx-bin/webwxnewloginpage' % self.host, safe='')
        wanted = {
            'jslogin': {'appid': self.app_id, 'redirect_uri': page, 'fun': 'new', 'lang': 'zh_CN'},
            'login': {'appid': self.app_id},
            'webwxnewloginpage': {'fun': 'new', 'version': 'v2', 'ticket': 't'},
            'webwxinit': {'lang': 'zh_CN'},
            'synccheck': {'mmweb_appid': self.app_id},
            'webwxuploadmedia': {'f': 'json'},
            'webwxsendmsgimg': {'fun': 'async', 'f': 'json'},
        }.get(name, {})
        origin = 'https://' + self.host
        sent = {key.lower(): value for key, value in headers.items()}
        if (sent.get('mmweb_appid'), sent.get('origin'), sent.get('referer')) != (
            self.app_id,
            origin,
            origin + '/',
        ):
            self.faults.append('%s with the headers %r' % (name, sent))
        if {'extspam', 'client-version'} & set(sent) or not wanted.items() <= query.items():
            self.faults.append('%s as for web WeChat: %r' % (name, query))
        if name in ('webwxgetcontact', 'webwxbatchgetcontact', 'webwxpushloginurl', 'webwxstatusnotify'):
            self.faults.append(name)

    def check_form(self, names):
        """Note where an upload's form is not that of the page."""
        fields = 'name type lastModifiedDate size mediatype uploadmediarequest'
        if names != [*fields.split(), 'webwx_data_ticket', 'pass_ticket', 'filename']:
            self.faults.append('an upload with the fields %r' % names)

    def on_webwxinit(self, request):
        return {'User': self.contact(self.owner), 'SyncKey': self.keys(), 'SystemTime': self.now()}

    def on_webwxsync(self, request):
        answer = super().on_webwxsync(request)
        return {'AddMsgList': answer['AddMsgList'], 'SyncKey': answer['SyncKey']}

    def come_back(self, message, number):
        if message['ToUserName'] != 'filehelper':
            self.faults.append('a message to %s' % message['ToUserName'])
        kind = {'MsgType': message['Type'], 'MsgId': number, 'NewMsgId': int(number)}
        self.says(self.owner, message.get('Content', ''), **kind)

    def ready(self):
        self.wait(lambda: self.receiving)

    def ask(self, text, name='filehelper'):
        so_far = len(self.heard('filehelper'))
        self.says(self.owner, text)
        return self.wait_text(ANSWER, 'filehelper', so_far)


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
        # urllib3 leaves Nagle's algorithm on when it goes through a proxy: it waits for this before the body.
        self.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, 'TCP_QUICKACK', socket.TCP_NODELAY), 1)
        length = int(self.headers.get('Content-Length', 0))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError('the client is gone')
        fault = self.server.breaking(url.path.rsplit('/', 1)[-1])
        if fault == 'hang':
            self.server.healed.wait(DEADLINE)
        if fault in ('hang', 'drop'):
            raise ConnectionError('cut off by the test')
        if fault in ('drip', 'drip headers'):
            return self.drip(fault == 'drip')
        if fault in (500, 429):
            return self.answer(fault, {}, '')
        if fault == 'list':
            return self.answer(200, {}, '[]')
        status, headers, answer = self.server.respond(
            url.hostname or self.host,
            url.path,
            dict(urllib.parse.parse_qsl(url.query)),
            self.headers,
            body,
            fault if isinstance(fault, int) else 0,
        )
        if fault == 'mute':
            raise ConnectionError('done, but not said by the test')
        if fault == 'late':  # the client has the message before the answer that tells its number
            self.server.wait(lambda: self.server.seen == len(self.server.messages))
        self.answer(status, headers, answer)

    def answer(self, status, headers, answer):
        answer = answer if isinstance(answer, bytes) else answer.encode()
        (self.send_response if self.server.dated else self.send_response_only)(status)
        for header in headers:
            self.send_header(*header)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        self.wfile.flush()

    do_POST = do_GET

    def drip(self, has_headers):
        """Answer a byte at a time, without an end."""
        self.send_response_only(200)
        if has_headers:
            self.send_header('Content-Length', '1000000')
            self.end_headers()
        else:
            self.flush_headers()
        while not self.server.healed.wait(0.2):
            self.wfile.write(b' ')
            self.wfile.flush()
        raise ConnectionError('cut off by the test')

    def date_time_string(self, timestamp=None):
        return email.utils.formatdate(self.server.now(), usegmt=True)

    def handle(self):
        with contextlib.suppress(OSError):  # the client is gone, or is to be cut off
            super().handle()

    def log_message(self, *args):
        pass


# --------------------------------------------------------------------------- a program under test

QUICK = """
import utils, itchat, runpy, sys
utils.options.retry = 0.1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""  # what failed is tried again sooner
GIVING_UP = QUICK.replace('sys.argv =', 'utils.options.give_up = 0\nsys.argv =')
SHORT_TIMEOUTS = QUICK.replace('sys.argv =', 'utils.options.timeout = 1, 2\nsys.argv =')


class Program:
    """wechat_train.py, or another script that uses utils, in a subprocess and a folder of its own."""

    def __init__(
        self,
        folder,
        *args,
        env=None,
        script=os.path.join(HERE, 'wechat_train.py'),
        python=(),
        before='',
        preexec_fn=None,
        log='output.txt',
    ):
        self.log = os.path.join(folder, log)
        if before:  # a script that runs the other one, with something changed
            path = os.path.join(folder, 'before.py')
            with open(path, 'w', encoding='utf-8') as f:
                f.write(before)
            script, args = path, (script, *args)
        settings = {'PYTHONPATH': HERE, 'PYTHONIOENCODING': 'utf-8', 'MXNET_HOME': str(folder), 'TZ': 'CST-8'}
        settings['XDG_RUNTIME_DIR'] = str(folder)  # it meets no other program unless the test says so
        env = {**os.environ, **settings, **(env or {})}
        env.pop('PYTHONUNBUFFERED', None)  # nobody's lines may be kept back
        env.pop('PYTHONDONTWRITEBYTECODE', None)  # compiled anew, it would be slower and larger
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, *python, script, *args],
                cwd=folder,
                env=env,
                text=True,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                preexec_fn=preexec_fn,
            )

    def output(self):
        with open(self.log, encoding='utf-8', errors='replace') as log:
            return log.read()

    def wait_output(self, text, times=1):
        """Wait until the program has printed `text`, so many times."""
        deadline = time.monotonic() + DEADLINE
        while self.output().count(text) < times:
            assert time.monotonic() < deadline and self.process.poll() is None, 'waited in vain for ' + text
            time.sleep(0.02)

    def types(self, text):
        """Type `text` and the end of the input, wait for the program's end; return (status, output)."""
        self.process.communicate(text, DEADLINE)
        return self.process.returncode, self.output()

    def __enter__(self):
        return self

    def kill(self):
        """End all its processes at once."""
        others = others_of(self)
        self.process.kill()
        self.process.wait()
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_gone(others)

    def __exit__(self, *exception):
        self.kill()
        print(self.output())  # shown by pytest when the test fails


class Screen:
    """What a terminal shows, with the lines that have left it at the top."""

    COLUMNS = 80

    def __init__(self):
        self.rows, self.row, self.column = [[]], 0, 0
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.rest = ''

    def feed(self, content):
        """Show what a program has written."""
        text = self.rest + self.decoder.decode(content)
        whole = re.search(r'(\x1b\[?[?\d;]*)?\Z', text).start()  # a sequence may be cut
        text, self.rest = text[:whole], text[whole:]
        for number, letter, other in re.findall(r'\x1b\[\??([\d;]*)([A-Za-z])|([^\x1b])', text):
            if letter:
                self.obey(letter, int(number or 1) if number.isdigit() or not number else 0)
            elif other in '\r\n\b':
                self.row += other == '\n'
                self.column = 0 if other == '\r' else max(0, self.column - (other == '\b'))
            else:
                self.put(other)

    def obey(self, letter, number):
        """Move the cursor, or erase from where it is to the end of the line, or of all."""
        self.row = max(0, self.row + number * {'A': -1, 'B': 1}.get(letter, 0))
        self.column = max(0, self.column + number * {'C': 1, 'D': -1}.get(letter, 0))
        if letter in 'JK':
            del self.current()[self.column :]
            del self.rows[self.row + 1 if letter == 'J' else len(self.rows) :]

    def current(self):
        """Return the cells of the line of the cursor."""
        self.rows += [[] for _ in range(self.row + 1 - len(self.rows))]
        return self.rows[self.row]

    def put(self, character):
        """Write a character where the cursor is; a wide one takes two cells."""
        cells = [character, ''] if unicodedata.east_asian_width(character) in 'WF' else [character]
        if self.column + len(cells) > self.COLUMNS:
            self.row, self.column = self.row + 1, 0
        row = self.current()
        row += [' '] * (self.column + len(cells) - len(row))
        row[self.column : self.column + len(cells)] = cells
        self.column += len(cells)

    def lines(self):
        """Return the lines."""
        return [''.join(row).rstrip() for row in self.rows]


class AtTerminal(Program):
    """The same on a terminal of its own, which it controls: what stands there is its output."""

    def __init__(self, folder, *args, env=None, term='xterm', **how):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('4H', 24, Screen.COLUMNS, 0, 0))

        def preexec():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for number in range(3):
                os.dup2(slave, number)

        super().__init__(folder, *args, env={**(env or {}), 'TERM': term}, preexec_fn=preexec, **how)
        os.close(slave)
        self.screen, self.guard = Screen(), threading.Lock()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        with contextlib.suppress(OSError):  # it is closed
            while content := os.read(self.master, 65536):
                with self.guard:
                    self.screen.feed(content)

    def output(self, since=0):
        """Return what stands there, from a line on."""
        with self.guard:
            return '\n'.join(self.screen.lines()[since:])

    def sees(self, pattern, since=0):
        """Wait until the pattern is found on the terminal, from a line on."""
        deadline = time.monotonic() + DEADLINE
        while not re.search(pattern, self.output(since), re.S | re.M):
            assert time.monotonic() < deadline, f'waited in vain for {pattern} in\n' + self.output(since)
            time.sleep(0.02)

    def press(self, keys, pattern=None):
        """Type `keys`; wait until the pattern is found below what stood there; return which line that is."""
        with self.guard:
            since = self.screen.row
        os.write(self.master, keys.encode())
        if pattern:
            self.sees(pattern, since)
        return since

    def echoes(self):
        """Return whether the terminal itself shows what is typed, as it does for a shell's programs."""
        return bool(termios.tcgetattr(self.master)[3] & termios.ECHO)

    def __exit__(self, *exception):
        super().__exit__(*exception)
        os.close(self.master)


def lines_of(output):
    """Return the lines of an output, but for those that say on a busy machine what is being waited for."""
    return [line for line in output.splitlines() if '请稍候' not in line]


@pytest.fixture(scope='session', autouse=True)
def surroundings(tmp_path_factory):
    """Let the programs compute with one thread: two wait for each other when the machine is busy.

    And let those of others, of other tests that run now, be out of sight.
    """
    os.environ['OMP_NUM_THREADS'] = '1'
    os.environ['XDG_RUNTIME_DIR'] = str(tmp_path_factory.mktemp('runtime'))


@pytest.fixture
def wechat(tmp_path):
    """A WeChat server; at the end of the test, nothing may have gone against the protocol."""
    server = WeChat(str(tmp_path))
    yield server
    server.shutdown()
    assert server.faults == []


@pytest.fixture
def helper(tmp_path):
    """The server of 文件传输助手's web page, as strict."""
    server = FileHelper(str(tmp_path))
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
    assert utils.load_data_fashion_mnist(10)[1].batch_size == 256  # evaluating is faster so
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


@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b[: len(b) // 2],
        lambda b: b'<html>' + b,
        lambda b: b[:3],
        lambda b: gzip.compress(gzip.decompress(b)[:-1]),
    ],
)
def test_damaged_file_is_recognised(images, damage):
    path = os.path.join(images, 't10k-labels-idx1-ubyte.gz')
    with open(path, 'rb') as f:
        whole = f.read()
    assert len(utils.read_idx(path)) == 600
    with open(path, 'wb') as f:
        f.write(damage(whole))
    with pytest.raises(ValueError, match='t10k-labels.*已损坏'):
        utils.read_idx(path)


def test_download_goes_on_at_the_next_mirror_and_fetches_damaged_files_again(
    wechat, images, tmp_path, monkeypatch
):
    for key, value in dict(wechat.env(), MXNET_HOME=str(tmp_path)).items():
        monkeypatch.setenv(key, value)
    first, second, third = (urllib.parse.urlsplit(mirror) for mirror in utils.MIRRORS)
    content = {}
    for name in utils.FILES:
        with open(os.path.join(images, name), 'rb') as f:
            content[name] = f.read()
    monkeypatch.setattr(utils, 'FILES', {n: hashlib.md5(c).hexdigest() for n, c in content.items()})
    with pytest.raises(OSError, match='--data'):  # all mirrors are gone
        utils.fetch_files()
    for name in content:
        wechat.files[third.hostname + third.path + name] = content[name]
    wechat.files[first.hostname + first.path + 'train-images-idx3-ubyte.gz'] = b'damaged'
    paths = utils.fetch_files()
    assert [os.path.dirname(p) for p in paths] == [str(tmp_path / 'datasets' / 'fashion-mnist')] * 4
    assert len(utils.read_idx(paths[0])) == 3000
    with open(paths[1], 'r+b') as f:
        f.truncate(100)  # cut off
    so_far = len(wechat.requests)
    assert len(utils.read_idx(utils.fetch_files()[1])) == 3000
    assert {r.rsplit('/')[-1] for r in wechat.requests[so_far:]} - {''} == {'train-labels-idx1-ubyte.gz'}
    assert os.path.getsize(paths[1] + '.damaged') == 100
    wechat.faults.clear()  # the 404s of the mirrors


@given(
    st.integers(1, 40),
    st.integers(2, 12),
    st.integers(0, 10**6),
    st.sampled_from([(-1,), (-1, 1), (1, -1), (1, -1, 1)]),
    st.sampled_from(['float32', 'float16', 'float64']),
    st.sampled_from(['float32', 'float16', 'float64', 'int8', 'uint8', 'int32', 'int64']),
)
@settings(max_examples=100, deadline=None)
def test_accuracy_equals_numpy(n, classes, seed, shape, of_output, of_label):
    """Whatever the shape of the N labels, and of whatever type the numbers are."""
    rng = np.random.RandomState(seed)
    output, label = rng.permutation(n * classes).reshape(n, classes), rng.randint(classes, size=n)
    expected = np.mean(output.argmax(axis=1) == label)
    output, label = nd.array(output, dtype=of_output), nd.array(label.reshape(shape), dtype=of_label)
    assert float(utils.accuracy(output, label)) == pytest.approx(expected, abs=1e-6)
    assert utils.evaluate_accuracy([(output, label)], lambda data: data) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('shapes', [((4, 3), (5,)), ((4, 3), (4, 3)), ((4, 3, 2), (4, 2)), ((4, 1), (4,))])
def test_an_accuracy_of_what_does_not_fit_says_both_shapes(shapes):
    with pytest.raises(ValueError) as raised:
        utils.accuracy(*map(nd.zeros, shapes))
    assert str(shapes[0]) in str(raised.value) and str(shapes[1]) in str(raised.value)


class Summing(gluon.Block):
    """Computes with however many inputs, also when they come in a list."""

    def forward(self, *inputs):
        inputs = inputs[0] if isinstance(inputs[0], tuple) else inputs
        return sum(inputs[1:], inputs[0])


def test_the_accuracy_of_whatever_a_tutorial_iterates_over():
    rng = np.random.RandomState(0)
    data, label = rng.rand(10, 5).astype(np.float32), rng.randint(5, size=10)
    expected = np.mean(data.argmax(axis=1) == label)
    parts = [slice(i, i + 4) for i in (0, 4, 8)]
    batches = [(nd.array(data[part]), nd.array(label[part], dtype='int32')) for part in parts]
    padded = mx.io.NDArrayIter(data, label, 4)  # its last batch has two images of the first
    zeros = [nd.zeros_like(x) for x, _ in batches]
    kinds = {
        'NDArrayIter': padded,
        'NDArrayIter, at its end': padded,
        'a named tuple': [collections.namedtuple('Batch', 'x y')(*batch) for batch in batches],
        'a length between': [(x, zero, y.reshape((-1, 1))) for (x, y), zero in zip(batches, zeros)],
        'a list of inputs': [((x, zero), y) for (x, y), zero in zip(batches, zeros)],
        'a generator': (batch for batch in batches),
    }
    for kind, iterator in kinds.items():
        for ctx in (None, mx.cpu(), [mx.cpu()]) if kind != 'a generator' else ([mx.cpu(0), mx.cpu(1)],):
            assert utils.evaluate_accuracy(iterator, Summing(), ctx) == expected, kind
    with pytest.raises(ValueError, match='一批数据也没有'):
        utils.evaluate_accuracy(kinds['a generator'], Summing())
    with pytest.raises(TypeError, match='一个 NDArray，现在是 tuple'):
        utils.evaluate_accuracy(batches, lambda data: (data, data))
    for batch in ({'data': batches[0][0], 'label': batches[0][1]}, batches[0][0], [batches[0][0]]):
        with pytest.raises(TypeError, match=f'每一批要是 .data, label.*{type(batch).__name__}'):
            utils.evaluate_accuracy([batch], Summing())


def test_how_many_examples_a_batch_of_any_kind_holds():
    x, y, scalar = nd.zeros((6, 2)), nd.zeros((6, 1)), nd.zeros(6)
    with mx.util.np_shape(True):
        scalar = scalar.sum().reshape(())
    iterator = mx.io.NDArrayIter(x, scalar if scalar.shape else y, 4)
    six = (
        (x, y),
        [x],
        {'text': ['a'] * 7, 'data': (x, y)},
        x,
        ((x, x), y),
        (0, [x, y]),
        x.tostype('csr'),
        [x.asnumpy()],
    )
    assert [utils.batch_size_of(batch) for batch in six] == [6] * len(six)
    assert [utils.batch_size_of(batch) for batch in iterator] == [4, 4]
    assert [utils.batch_size_of(batch) for batch in (3, 'text', [], None, {}, [1, 2])] == [None] * 6


def test_evaluate_accuracy_equals_numpy_with_a_smaller_last_batch():
    rng = np.random.RandomState(0)
    images, labels = (
        rng.randint(256, size=(103, 28, 28)).astype(np.uint8),
        rng.randint(10, size=103).astype(np.uint8),
    )
    net = nn.Dense(10)
    net.initialize()
    outputs = net(nd.array(images[:, None] / 255, dtype='float32')).asnumpy()
    got = utils.evaluate_accuracy(utils.Batches(images, labels, 25), net, utils.try_gpu())
    assert got == pytest.approx(np.mean(outputs.argmax(axis=1) == labels))


def cnn(net, layers):
    with net.name_scope():
        net.add(*layers())
    return net


NETWORKS = {
    'the tutorial': lambda: (
        nn.Conv2D(channels=20, kernel_size=5, activation='relu'),
        nn.MaxPool2D(pool_size=2, strides=2),
        nn.Conv2D(channels=50, kernel_size=3, activation='relu'),
        nn.MaxPool2D(pool_size=2, strides=2),
        nn.Flatten(),
        nn.Dense(128, activation='relu'),
        nn.Dense(10),
    ),
    'few and many channels': lambda: (
        nn.Conv2D(3, 3, activation='tanh'),
        nn.MaxPool2D(),
        nn.Conv2D(40, 3, use_bias=False, activation='relu'),
        nn.MaxPool2D(3, 2, 1),
        nn.Conv2D(32, 3, padding=1),
        nn.MaxPool2D(2),
        nn.Dense(10),
    ),
    'other neighbours': lambda: (
        nn.Conv2D(6, 3),
        nn.BatchNorm(),
        nn.Activation('relu'),
        nn.MaxPool2D(),
        nn.MaxPool2D(),
        nn.Conv2D(20, 3),
        nn.MaxPool2D(2, 1),
        nn.AvgPool2D(),
        nn.Dense(10),
    ),
    'filters left over': lambda: (
        nn.Conv2D(18, (3, 4), padding=1, activation='relu'),
        nn.MaxPool2D(3, 2),
        nn.Conv2D(21, (2, 3), activation='relu'),
        nn.MaxPool2D((1, 2)),
        nn.Conv2D(33, 2, use_bias=False, strides=2, activation='sigmoid'),
        nn.MaxPool2D(2, 1),
        nn.Conv2D(17, 1),
        nn.MaxPool2D(1),
        nn.Dense(10),
    ),
    'groups, and the pool at the end': lambda: (
        nn.Conv2D(8, 3, activation='relu'),
        nn.MaxPool2D(),
        nn.Conv2D(10, 3, groups=2),
        nn.MaxPool2D(),
        nn.Conv2D(10, 3, activation='relu'),
        nn.MaxPool2D(3),
    ),
    'one channel in the middle': lambda: (
        nn.Conv2D(1, 3),
        nn.MaxPool2D(),
        nn.Conv2D(20, 5),
        nn.MaxPool2D(),
        nn.Dense(10),
    ),
    'unknown channels': lambda: (nn.BatchNorm(), *two_convolutions()),
}


def two_convolutions(first={}, pool={}, after={}):
    return (
        nn.Conv2D(20, **{'kernel_size': 3, **first}),
        nn.MaxPool2D(**{'pool_size': 3, 'strides': 2, **pool}),
        nn.Conv2D(20, **{'kernel_size': 3, **after}),
        nn.MaxPool2D(2, 1),
        nn.Dense(10),
    )


for options in (
    {'first': {'dilation': 2}},
    {'first': {'strides': 2}},
    {'first': {'padding': 2}},
    {'first': {'kernel_size': (7, 2), 'strides': (2, 1), 'padding': (1, 0)}},
    {'first': {'kernel_size': (4, 1)}},
    {'first': {'kernel_size': (2, 3), 'padding': (0, 1)}},
    {'first': {'kernel_size': (1, 3)}},
    {'pool': {'padding': 1}},
    {'pool': {'ceil_mode': True}},
    {'after': {'dilation': 2}},
    {'after': {'padding': 1}},
    {'after': {'strides': 2}},
    {'after': {'kernel_size': 5}},
    {'after': {'groups': 2}},
):
    NETWORKS[str(options)] = functools.partial(two_convolutions, **options)


@pytest.mark.parametrize('layers', NETWORKS.values(), ids=NETWORKS)
def test_speed_up_changes_neither_outputs_nor_gradients_nor_parameters(layers, tmp_path, monkeypatch):
    def compute(net):
        with autograd.record():
            output = net(data)
            loss = gluon.loss.SoftmaxCrossEntropyLoss()(output.reshape((20, 10)), label)
        loss.backward()
        parameters = net.collect_params('.*(weight|bias|gamma|beta)')
        return output.asnumpy(), {name: p.grad().asnumpy() for name, p in parameters.items()}

    # What decides how it is computed: the channels of a block, the images in the first batch.
    left = [(8, 7), (16, 7), (16, 64)]
    # Where rounding decides which of two pixels is the maximum, the gradient goes to another one: 1 in 30.
    for seed in range(3):
        rng = np.random.RandomState(seed)
        data, label = nd.array(rng.rand(20, 1, 28, 28)), nd.array(rng.randint(10, size=20))
        mx.random.seed(seed)
        plain = cnn(nn.Sequential(prefix='net_'), layers)
        plain.initialize()
        output, gradients = compute(plain)
        plain.save_parameters(str(tmp_path / 'net.params'))
        for block, first in left[:]:
            monkeypatch.setattr(utils, 'BLOCK', block)
            fast = cnn(nn.HybridSequential(prefix='net_'), layers)
            utils.speed_up(fast)
            fast.initialize()
            fast(nd.zeros((first, 1, 28, 28)))
            fast.load_parameters(str(tmp_path / 'net.params'))
            fast_output, fast_gradients = compute(fast)
            assert fast_output.shape == output.shape and np.abs(fast_output - output).max() < 1e-5
            shapes = [
                [(name, array.shape) for name, array in each.items()] for each in (fast_gradients, gradients)
            ]
            assert shapes[0] == shapes[1]
            if all(np.abs(array - gradients[name]).max() < 1e-5 for name, array in fast_gradients.items()):
                left.remove((block, first))
    assert not left


def test_speed_up_computes_the_tutorials_network_in_blocks(monkeypatch):
    few = [('(3, 3)', '64'), ('(5, 5)', '32')]
    many = [('(3, 1)', '64'), ('(3, 3)', '64'), ('(5, 5)', '16'), ('(5, 9)', '16')]
    narrow = [('(2, 5)', '24'), ('(3, 3)', '56')]
    for block, images, expected in ((16, 63, few), (16, 64, many), (8, 64, narrow)):
        monkeypatch.setattr(utils, 'BLOCK', block)
        net = cnn(nn.HybridSequential(), NETWORKS['the tutorial'])
        utils.speed_up(net)
        net.initialize()
        net(nd.zeros((images, 1, 28, 28)))
        nodes = json.loads(net._cached_graph[1].tojson())['nodes']
        attributes = [node['attrs'] for node in nodes if node['op'] == 'Convolution']
        assert sorted((each['kernel'], each['num_filter']) for each in attributes) == expected


@pytest.mark.parametrize('how', [{'momentum': -0.5}, {'wd': 0.1, 'momentum': 0.9, 'clip_gradient': 0.01}])
def test_the_update_is_the_optimizers(how, monkeypatch):
    def weights(update):
        monkeypatch.setattr(mx.optimizer.SGD, '_update_impl', update)
        mx.random.seed(0)
        net = nn.Dense(300, in_units=utils.LARGE // 200)
        net.initialize(mx.init.Normal(1))
        schedule = mx.lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.1)
        trainer = gluon.Trainer(net.collect_params(), 'sgd', {'lr_scheduler': schedule, **how})
        for i in range(6):
            with autograd.record():
                loss = net(nd.random.normal(shape=(7, utils.LARGE // 200))).square().sum()
                loss = net.bias.data().sum() if i == 1 else loss
            loss.backward()
            trainer.step(7, ignore_stale_grad=True)
        assert trainer.optimizer._index_update_count == {0: 6, 1: 5}
        return [p.data().asnumpy() for p in net.collect_params().values()]

    own, mxnets = weights(utils.update_by_size), weights(utils.sgd_update)
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(own, mxnets))


def test_threads_follow_what_a_batch_takes():
    def train(threads, seconds, batches):
        for _ in range(batches):
            threads.count(seconds(threads.used, next(step)))
        return threads.kept

    def alone(n, i):
        return (0.03 if i % 50 else 0.09) / n

    def crowded(n, i):  # another program has one of the four cores
        return alone(n, i) if n < 4 else alone(1, i) * (3 if i % 3 else 0.25)

    step, threads = itertools.count(1), utils.Threads(4, tries=True)
    try:
        assert train(threads, alone, 5000) == 4 and threads.lost <= 0.011 * threads.seconds
        assert train(threads, crowded, 600) == 3
        threads.begin()
        assert train(threads, crowded, 5000) == 3 and threads.lost <= 0.02 * threads.seconds
        assert train(threads, alone, 5000) == 4
        assert train(threads, lambda n, i: 0.01 * n, 20000) == 1
        still = utils.Threads(4, tries=False)
        assert train(still, crowded, 100) == still.used == 4
    finally:
        mx.base._LIB.MXSetNumOMPThreads(1)


@pytest.mark.parametrize('block, number_of_convolutions', [(8, 2), (16, 4)])
def test_a_network_computes_the_same_with_another_number_of_threads(
    block, number_of_convolutions, monkeypatch
):
    monkeypatch.setattr(utils, 'BLOCK', block)
    monkeypatch.setattr(utils, 'threads', utils.Threads(2, tries=True))
    net, data = cnn(nn.HybridSequential(), NETWORKS['the tutorial']), nd.random.uniform(shape=(64, 1, 28, 28))
    utils.speed_up(net)
    net.initialize()
    try:
        outputs = []
        for number in (2, 1, 2, 1):
            utils.threads.use(number)
            outputs.append(net(data).asnumpy())
            convolutions = [node for node in net._cached_graph[1].tojson().split('{') if 'workspace' in node]
            assert len(convolutions) == number_of_convolutions
            assert all(f'"{1024 + number}"' in node for node in convolutions)
        assert (outputs[0] == outputs[2]).all() and (outputs[1] == outputs[3]).all()
        assert np.abs(outputs[0] - outputs[1]).max() < 1e-5
    finally:
        utils.threads.use(1)


def test_mxnet_is_set_up_for_speed_and_the_users_settings_win():
    names = 'MXNET_ENGINE_TYPE', 'OMP_NUM_THREADS'
    code = f'import wechat_train, os; print(*map(os.environ.get, {names}), wechat_train.utils.threads.tries)'
    env = {k: v for k, v in os.environ.items() if k not in names}

    def said(own):
        done = subprocess.run(
            [sys.executable, '-c', code], cwd=HERE, env={**env, **own}, capture_output=True, text=True
        )
        return '\n'.join(lines_of(done.stdout)) + '\n'

    cores = len(os.sched_getaffinity(0))
    assert said({}) == f'NaiveEngine {cores} {cores > 1}\n'
    assert said({names[0]: 'ThreadedEngine', names[1]: '3'}) == 'ThreadedEngine 3 False\n'


def test_try_gpu_is_the_gpu_when_there_is_one():
    import mxnet as mx

    assert utils.try_gpu() == (mx.gpu() if mx.context.num_gpus() else mx.cpu())


def test_durations_fit_a_phone():
    assert [utils.duration(s) for s in (0.04, 9.96, 10, 59.7, 61, 3600, 90061)] == [
        '0.0 秒',
        '10.0 秒',
        '10 秒',
        '1 分 0 秒',
        '1 分 1 秒',
        '1 小时 0 分',
        '25 小时 1 分',
    ]


# --------------------------------------------------------------------------- what a person can write


LR, TI, BS = utils.LIMITS
TALK = utils.Parsed([], '')


def result(text):
    """Return what a text says in short: (word, number) or the values of each command, '?' and the line
    that is almost one.
    """
    parsed = utils.parse(text)
    short = [said.values if said.word == 'set' else (said.word, said.number) for said in parsed.commands]
    return short + ['? ' + parsed.almost] * bool(parsed.almost)


def word(name, number=None):
    return [(name, number)]


BEFORE = [  # the cards of the parser that was there before
    ('继续', word('resume')),
    ('状态', word('status')),
    ('plot', word('plot')),
    ('取消', word('cancel')),
    ('开始', word('start')),
    (' start\n', word('start')),
    ('ＳＴＯＰ', word('stop')),
    ('停止！', word('stop')),
    ('参数', word('params')),
    ('Help', word('help')),
    ('START', word('start')),
    ('曲线 2', word('plot', 2)),
    ('曲线2', word('plot', 2)),
    ('报告 5', word('report', 5)),
    ('报告\n5', word('report', 5)),
    ('报告：0', word('report', 0)),
    ('早停 3', word('patience', 3)),
    ('report = ５', word('report', 5)),
    ('安静', word('quiet')),
    ('lr 0.1', [[(LR, '0.1')]]),
    ('LR=0.1', [[(LR, '0.1')]]),
    ('learning_rate：1e-3', [[(LR, '1e-3')]]),
    ('ｌｒ　０．１', [[(LR, '0.1')]]),
    ('ti: 5', [[(TI, '5')]]),
    ('Batch_Size = １２８', [[(BS, '128')]]),
    ('lr 0.1, ti 5\nbs=128', [[(LR, '0.1'), (TI, '5')], [(BS, '128')]]),
    ('ＢＳ：６４，ti=2', [[(BS, '64'), (TI, '2')]]),
    ('lr 0.1 ti 2 bs 8', [[(LR, '0.1'), (TI, '2'), (BS, '8')]]),
    ('lr abc', [[(LR, 'abc')]]),
    ('lr nan', [[(LR, 'nan')]]),
    ('lr -1', [[(LR, '-1')]]),
    ('lr @img@x', [[(LR, '@img@x')]]),
    ('lr \x1b[31m', [[(LR, '\x1b[31m')]]),
    ('ti 2.5', [[(TI, '2.5')]]),
    ('bs 100000', [[(BS, '100000')]]),
    ('lr\n5', [[(LR, '5')]]),
    ('lr x0.5', [[(LR, 'x0.5')]]),
    ('lr × 0.5', [[(LR, 'x0.5')]]),
    ('lr*0.5', [[(LR, '*0.5')]]),
    ('lr=÷2', [[(LR, '/2')]]),
    ('lr /2', [[(LR, '/2')]]),
]
NEW = [
    ('Stop!', word('stop')),
    ('Stop.', word('stop')),
    ('停止。。。', word('stop')),
    ('停止~', word('stop')),
    ('停止～～', word('stop')),
    ('停止——', word('stop')),
    ('停止……', word('stop')),
    ('停止⋯⋯', word('stop')),
    ('状态？', word('status')),
    ('状态？！', word('status')),
    ('状态，', word('status')),
    ('、状态；', word('status')),
    *(
        (quoted, word('stop'))
        for quoted in '“停止”/"停止"/‘停止’/「停止」/『停止』/《停止》/〝停止〞'.split('/')
    ),
    *(
        (quoted, word('stop'))
        for quoted in ("'停止'", '＂停止＂', '【停止】', '（停止）', '“停止”。', '“停止。”')
    ),
    *((f'停{c}止{c}', word('stop')) for c in '\u200b\u200e\ufeff\u2060\u00ad\ufe0f\u200d'),
    *((c + 'lr 0.1' + c, [[(LR, '0.1')]]) for c in '\u200b\u200e\ufeff\u2060\u202a'),
    *((f'lr 1e{minus}3', [[(LR, '1e-3')]]) for minus in '-−–—‐‑－﹣'),
    ('lr −1', [[(LR, '-1')]]),
    ('开始🚀', word('start')),
    ('🚀 开始', word('start')),
    ('开始👍🏻', word('start')),
    ('开始❤️🤷‍♂️！', word('start')),
    ('停止👨‍👩‍👧‍👦🇨🇳', word('stop')),
    ('报告 5️⃣', word('report', 5)),
    ('lr 0.1👌', [[(LR, '0.1')]]),
    ('開始', word('start')),
    ('繼續', word('resume')),
    ('停止', word('stop')),
    ('狀態', word('status')),
    ('曲線', word('plot')),
    ('曲線 3', word('plot', 3)),
    ('錯圖', word('mistakes')),
    ('記錄', word('runs')),
    ('紀錄', word('runs')),
    ('回退', word('rollback')),
    ('參數', word('params')),
    ('報告 5', word('report', 5)),
    ('安靜', word('quiet')),
    ('幫助', word('help')),
    ('重啟', word('restart')),
    ('重啓', word('restart')),
    ('學習率 0.1', [[(LR, '0.1')]]),
    ('輪數：5', [[(TI, '5')]]),
    ('@小号 停止', word('stop')),
    ('@小号\u2005停止', word('stop')),
    ('@小 号\u2005停止', word('stop')),
    ('＠小号\u2005 停止！', word('stop')),
    ('@小号\nlr 0.1', [[(LR, '0.1')]]),
    ('\u200b@小号\u2005停止', word('stop')),
    ('lr 0。1', [[(LR, '0.1')]]),
    ('lr：0。05。', [[(LR, '0.05')]]),
    ('lr 。5', [[(LR, '.5')]]),
    ('LR 0,1', [[(LR, '0.1')]]),
    ('学习率 0，05', [[(LR, '0.05')]]),
    ('lr x0,5', [[(LR, 'x0.5')]]),
    ('lr 0.1,ti 5', [[(LR, '0.1'), (TI, '5')]]),
    ('lr 0.1，ti 5', [[(LR, '0.1'), (TI, '5')]]),
    ('lr 0,1,ti 5', [[(LR, '0.1'), (TI, '5')]]),
    ('ti 3,bs 64', [[(TI, '3'), (BS, '64')]]),
    ('ti 3。bs 64。', [[(TI, '3'), (BS, '64')]]),
    ('lr0.1', [[(LR, '0.1')]]),
    ('lr.1', [[(LR, '.1')]]),
    ('lrx0.5', [[(LR, 'x0.5')]]),
    ('bs128', [[(BS, '128')]]),
    ('ti5', [[(TI, '5')]]),
    ('ti5，bs128', [[(TI, '5'), (BS, '128')]]),
    ('学习率 0.1', [[(LR, '0.1')]]),
    ('学习率0.1', [[(LR, '0.1')]]),
    ('学习率：x0.5', [[(LR, 'x0.5')]]),
    ('轮数 5', [[(TI, '5')]]),
    ('批量 128', [[(BS, '128')]]),
    ('学习率 lr = 0.05', [[(LR, '0.05')]]),
    ('学习率lr=0.05', [[(LR, '0.05')]]),
    ('轮数 ti = 7', [[(TI, '7')]]),
    ('批量 bs = 64', [[(BS, '64')]]),
    ('学习率 lr = 0.05\n轮数 ti = 7\n批量 bs = 64', [[(LR, '0.05')], [(TI, '7')], [(BS, '64')]]),
    ('学习率 lr = 0.05，轮数 ti = 7', [[(LR, '0.05'), (TI, '7')]]),
    ('lr 10⁻³', [[(LR, '10^-3')]]),  # refused by utils.read_value(), not 10-3
    ('bs 2⁷', [[(BS, '2^7')]]),  # not 27
    ('lr ½', [[(LR, '1/2')]]),  # refused, too
    ('lr 5%', [[(LR, '5%')]]),  # and never 5
    ('lr 0.1×', [[(LR, '0.1x')]]),
    ('lr 10^', [[(LR, '10^')]]),
    ('ti=abc', [[(TI, 'abc')]]),
    ('bs inf', [[(BS, 'inf')]]),
    ('ti 3\nlr 0.1\n开始', [[(TI, '3')], [(LR, '0.1')], ('start', None)]),
    ('ti 3\r\n\r\n \n开始！\r\n', [[(TI, '3')], ('start', None)]),
    ('停止<br/>状态', [('stop', None), ('status', None)]),
    ('停止\n👍\n。。。', word('stop')),  # lines with nothing in them
    ('停止[强]', word('stop')),  # WeChat's own emoji come as words
    ('lr 0.1 [OK][玫瑰]\n开始[捂脸]', [[(LR, '0.1')], ('start', None)]),
    ('[停止]', word('stop')),
    ('ti 3\u2028开始', [[(TI, '3')], ('start', None)]),  # phones paste such ends of lines
    ('允许小波', word('allow')),
    ('\n'.join(['状态'] * utils.MOST_LINES), word('status') * utils.MOST_LINES),
]


@pytest.mark.parametrize('text, expected', BEFORE + NEW)
def test_commands(text, expected):
    assert result(text) == expected
    assert utils.parse(text) and utils.parse(text).almost == ''


def test_the_text_of_a_command_is_its_line():
    texts = [said.text for said in utils.parse('“ＴＩ ３”\nlr\n0.1。\n開始🚀').commands]
    assert texts == ['TI 3', 'lr 0.1', '開始']


@pytest.mark.parametrize(
    'text, complete',
    [
        ('开始', True),
        ('报告 5', True),
        ('lr 0.1', True),
        ('lr x0.5', True),
        ('ti 3\nlr 0.1\n开始', True),
        ('', False),
        ('你好', False),
        ('ti amo', False),
        ('lr abc', False),
        ('lr nan', False),
        ('lr /0', False),
        ('ti 0', False),
        ('ti 2.5', False),
        ('bs 100000', False),
        ('bs 2⁷', False),
        ('lr ½', False),
        ('lr 0.1 ti 0', False),
        ('开始\n报告', False),
        ('报告', False),
    ],
)
def test_complete(text, complete):
    assert utils.parse(text).complete is complete


@pytest.mark.parametrize(
    'text',
    '报告/早停/lr/LR/ti/bs/学习率/批量/learning_rate/batch_size =/lr =/lr:/报告 x/报告 abc/report/'
    '停止 5/停止5/开始 abc/开始 1/stop 5/报告 -1/报告 2.5/报告 1234567/報告 x/早停 五/报告五/lr 五/'
    'ti 五/报告 5轮/早停 3 轮/ti 5轮/lr 0.1 ti/lr 0.1 0.2/'
    'lr 0. 1/lr 0, 1/lr 0.1,5/lr 0,1.5/报告 零/ti 1,000/bs 1,024/'
    'ti 5:30/参数 lr/学习率 ti = 5/安静 5/stop = abc/曲线 x/曲线 1 2/'
    '停/暂停/停止训练/停止訓練吧/开始训练/开始 训练/继续训练/重启训练/stop training/'
    '状态怎么样/进度/进度怎么样了/'
    'lr 0.1 开始/开始 lr 0.1/lr0.1开始/开始lr0.1/ti 5 lr 0.1 开始/lr 0.1,开始/lr x0.5 继续/lr 0.1 start/'
    '停止 状态/开始,停止/开始 停止/报告 5 开始/曲线 2 状态/lr改成0.1/学习率调到 0.05/报告改成 5/'
    'lr:0.5 → 0.1/lr为0.1/lr 0·1'.split('/'),
)
def test_almost_a_command(text):
    parsed = utils.parse(text)
    assert parsed and not parsed.commands and not parsed.complete
    assert parsed.almost == unicodedata.normalize('NFKC', text).rstrip(':')
    assert re.fullmatch(
        r'“.*”没看懂，没有执行：.*(例如|后面什么也不写|就只发).*。', utils.explain(parsed.almost)
    )


@pytest.mark.parametrize(
    'text, expected',
    [
        ('开始\n报告', [('start', None), '? 报告']),
        ('ti 3\n“报告 x”\n停止\n早停', [[(TI, '3')], '? 报告 x']),
        ('报告\n停止', ['? 报告']),  # nothing behind a wrong line, nor a command below it, is obeyed
        ('ti 3\nlr\n开始', [[(TI, '3')], '? lr']),
        ('lr 0.1\n开始吧\n谢谢', [[(LR, '0.1')], '? 开始吧']),  # values are no small talk
        ('谢谢\nlr 0.1', ['? 谢谢']),
        ('开始\n吃饭', []),
        ('吃饭\n开始', []),
        ('开始\n报告\n吃饭', []),
        ('报告\n吃饭', []),
        ('\n'.join(['状态'] * (utils.MOST_LINES + 1)), []),
    ],
)
def test_lines(text, expected):
    assert result(text) == expected


DASHED = ('- - - - - - - - - - - - - - -', '———————', '-----', '— — — —', '──────')


@pytest.mark.parametrize('end', ['\n', '<br/>', '\r\n'])
@pytest.mark.parametrize('dashes', DASHED)
def test_only_what_stands_below_a_quotation_counts(dashes, end):
    def reply(quoted, text):
        return f'「账号A：{quoted}」{end}{dashes}{end}{text}'

    assert result(reply('停止', '开始')) == word('start')
    assert result(reply('停止', '')) == result(reply('停止', '')[: -len(end)]) == []
    assert result(reply('停止', '好的')) == []
    assert result(reply('你好', f'ti 3{end}开始')) == [[(TI, '3')], ('start', None)]
    assert result(reply(f'停止{end}开始', '状态？')) == word('status')
    assert result(reply(reply('停止', '开始'), '状态')) == word('status')  # who quotes a quoting reply
    assert result(reply(reply('停止', '开始'), '')) == []
    assert result(reply('很长' * 500, '状态')) == word('status')
    assert result(reply('停止', '长' * 201)) == result(reply('很长' * 10**4, '状态')) == []
    assert result(f'「停止」{end}{dashes}{end}') == []
    assert result(f'\ufeff「停止」 {end} {dashes} {end}报告 x') == ['? 报告 x']


def test_a_quotation_without_a_reply_is_no_command():
    assert result('「账号A：停止」') == result('「账号A：\n停止」') == []
    assert result('停止\n- - - - - -\n开始') == []


TALKED_SMALL = """
今天晚上吃什么？ / lr这个参数怎么选比较好 / 停一下我去吃饭 / 开始下雨了 / 开始吃饭了吗 / 状态不好
取消关注 / 帮助我 / 继续吗 / start it / ti amo / Stop the car / help me please / stop it / start now
Help me! / stop, please / cancel that / 开始吃饭 / 别停止 / lr 0.1 吗 / bs 你 / 0.1 / startle
let us start / [微笑] / <xml/> / ： / filehelper / 你好 / 停了 / 开始吧 / 开始了吗 / 开始了 / 开始啦！
现在开始 / 什么时候开始 / 开始上课了 / 开始ing / 开始讨厌他了 / 重新开始 / 还没开始呢 / 停止吧 / 停止了
停止营业 / 雨停止了 / 停止供水通知 / 能不能停止 / 停止5分钟吧 / 停不下来 / 停车费20 / 继续睡 / 继续努力
继续加油💪 / 继续说 / 我们继续 / 别继续了 / 继续教育学院 / 你状态怎么样 / 今天状态真好 / 状态栏在哪
什么状态 / 状态还行吧。 / 发个状态看看 / 曲线救国 / 身材曲线真好 / 曲线运动好难 / 错图了 / 发错图了
记录一下 / 做个记录 / 记录仪多少钱 / 记录在本子上了 / 聊天记录发我 / 回退货款 / 可以回退吗 / 参数是多少
什么参数 / 参数表发我 / 手机参数对比 / 参数3个 就够了吗？ / 报告写完了吗 / 报告老师 / 报告！我到了
报告5点前交 / 体检报告 / 报告在哪 / 写报告好累 / 报告一下 / 安静点 / 安静！孩子睡了 / 安静下来 / 好安静
早停电了 / 早停了 / 早停早好 / 取消吧 / 取消订单 / 取消了 / 订单取消 / 取消会议通知 / 帮助中心 / 谢谢帮助
帮助很大 / 需要帮助吗 / 重启手机试试 / 重启电脑 / 重启了吗 / 手机重启 / 学习率先进班 / 学习率高
轮数太多了 / 批量生产 / 批量采购便宜 / 批量处理 / 轮数不够吧 / lr是什么 / lr 是多少 / LR相机怎么样
lr 怎么调才好？ / lrc歌词 / bs专业 / bs你 / bs吗 / BS detector / bs artist / ti voglio bene / ti prego
TI杯看了吗 / ti8夺冠了 / ti 是什么 / tired / time 5 / tip 10 / title / bsd 12 / lr is too high
lr 0.1 is good / starting 5 / start over / Start the game / status quo / Status update? / plot twist
Plot armor / params? no idea / cancel culture / Report card / report bugs / report it / quiet please
Quiet! I sleep / patience my friend / resume attached / my resume / runs fast / it runs / helpful
help yourself / helpless / help desk / mistakes happen / mistakes were made / rollback now please
restart pls / Stop by at 5 / stop 4 me / start of 2024 / I cannot stop / don't stop / non-stop / one-stop
stop-loss / the plot / stop👍it / stop BS / 是 / 好的 / 嗯嗯 / 哈哈哈哈 / OK / 👍 / 🚀🚀 / ？？？ / ...
—— / 666 / 1 / 12:30 / 3天后开始 / 2个参数 / 1. 开始 / @小号 / @小号 你好 / </br>停止 / <b>开始</b>
/停止 / #停止# / 停止开始 / 开始停止 / start stop / lr ti bs 怎么选 / 开始-abc / tinan
lr 0.1 0.2 0.3 0.4 / lr 0.1 ti amo / ti 3 然后开始
停车 / 停电了 / 停水通知 / 停一会儿 / 停在楼下 / 雨停 / 暂停营业 / 暂停一下 / 进度条 / 进度太慢 / 进度款 5
进度怎么这么慢 / 状态怎么这么差 / 结束了 / 终止合同 / 中止谈判 / 恢复得不错 / 恢复出厂设置 / 启动仪式
启动不了 / 训练完回家 / 训练很累 / 开始训练了吗 / 开始训练营报名 / 停止训练补贴 / 继续训练孩子 / 重启训练营
状态 不好 / 开始 吃饭 / 停止 供水 / 报告 老师 / 开始，吃饭 / 停止，谢谢 / 开始 3 楼集合 / 参数，价格
帮助 他人 / 继续，加油 / status report / help start / cancel plot / stop help / stop starting 5
学习率改天再说 / 轮数减少了 / 批量改价 / lr改不改 / 报告改好了 / 报告交到3班 / 开始降温了 / 开始降到3度
记录变多了 / 开始100天 / 停止lr / 开始上lr / bs 5 开会 / ti 3 比赛开始 / lr 0.1 开始下降 / 曲线 2 号线
状态 5 颗星 / 停 3 天 / 停 5 / 停5分钟
"""
SMALL_TALK = [text for line in TALKED_SMALL.strip().split('\n') for text in line.split(' / ')]


def test_small_talk():
    for text in ['', ' ', '\n\n', 'lr ' * 10**5, 'x' * 10**4, '停止' + ' ' * 200, *SMALL_TALK]:
        assert utils.parse(text) == TALK and not utils.parse(text), text


def test_there_is_enough_small_talk():
    assert len(set(SMALL_TALK)) > 260


@pytest.mark.parametrize('around', ['“{}”', '{}👍', '\u200b{}。', '停止\n{}', '{}\n停止'])
def test_small_talk_stays_small_talk(around):
    for text in SMALL_TALK:
        if not re.fullmatch(
            r'\W+|\[微笑\]|@小号', text
        ):  # an empty line; a mention alone in the line above is one
            parsed = utils.parse(around.format(text))
            # A number belongs to the line above: 停止 666 is almost a command.
            assert not parsed.commands if text[0].isdigit() else parsed == TALK, text


@given(
    st.one_of(
        st.text(), st.text(st.characters()), st.text('停止开始lrtibs 0.15。,，：=\n「」-— @\u2005x*/①²½🚀"')
    )
)
@settings(max_examples=1000)
def test_any_text_is_parsed_without_an_error(text):
    parsed = utils.parse(text)
    assert isinstance(parsed.complete, bool) and isinstance(parsed.almost, str)
    assert not parsed.almost or '没有执行：' in utils.explain(parsed.almost)
    for said in parsed.commands:
        assert said.word == 'set' or said.word in utils.COMMANDS
        assert bool(said.values) == (said.word in ('set', 'allow')) and said.text
        assert said.word == 'allow' or all(
            name in utils.LIMITS and value.isascii() and value for name, value in said.values
        )
        assert said.number is None or utils.COMMANDS[said.word].number


QUOTES = '“”,"",\'\',‘’,「」,『』,《》,〈〉,«»,【】,（）'.split(',')
INVISIBLE = '\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\ufe0e\ufe0f\u202a\u202c'
PUNCTUATION = '。.!！?？~～…,，;；、⋯·'
EMOJI = ['🚀', '👍🏻', '❤️', '🤷‍♂️', '🇨🇳', '⭐', '👨‍👩‍👧']
TO_TRADITIONAL = str.maketrans(
    '开继续状态线错图记参数报静帮学轮启队对', '開繼續狀態線錯圖記參數報靜幫學輪啟隊對'
)
SPELLED = [
    *(
        (text, word(key))
        for key, c in utils.COMMANDS.items()
        if not c.number or c.optional
        for text in (key, c.chinese)
    ),
    *((f'{t} 5', word(key, 5)) for key, c in utils.COMMANDS.items() if c.number for t in (key, c.chinese)),
    *((f'{name} 5', [[(long, '5')]]) for name, long in utils.NAMES.items()),
    ('lr 1e-3', [[(LR, '1e-3')]]),
    ('学习率 lr = 0.05，轮数 ti = 7', [[(LR, '0.05'), (TI, '7')]]),
]


@st.composite
def decorated(draw):
    """A command as phones may write it, and what it is."""
    text, expected = draw(st.sampled_from(SPELLED))
    if draw(st.booleans()):
        text = text.translate({c: c + 0xFEE0 for c in range(0x21, 0x7F)})  # full-width
    if draw(st.booleans()):
        text = text.translate(TO_TRADITIONAL)
    if draw(st.booleans()):
        text = text.upper()
    for _ in range(draw(st.integers(0, 4))):
        around = draw(st.sampled_from(['quotes', 'invisible', 'punctuation', 'emoji', 'blank']))
        if around == 'quotes':
            text = draw(st.sampled_from(QUOTES))[0] + text + draw(st.sampled_from(QUOTES))[1]
        elif around == 'invisible':
            at = draw(st.integers(0, len(text)))
            text = text[:at] + draw(st.sampled_from(INVISIBLE)) + text[at:]
        elif around == 'punctuation':
            text += draw(st.text(PUNCTUATION, max_size=3))
        elif around == 'emoji':
            text = draw(st.sampled_from(['', *EMOJI])) + text + draw(st.sampled_from(EMOJI))
        else:
            text = draw(st.sampled_from([' ', '\n', '\u3000', '\xa0'])) + text + ' '
    return draw(st.sampled_from(['', '@小号 ', '@小 号\u2005', '「A：停止」\n- - - - -\n'])) + text, expected


@given(decorated())
@settings(max_examples=1000)
def test_a_command_survives_what_phones_add(case):
    text, expected = case
    assert result(text) == expected


@given(st.lists(decorated(), min_size=1, max_size=4))
def test_lines_survive_it_too(cases):
    texts = [text for text, _ in cases if '@' not in text and 'A' not in text and '「' not in text]
    expected = [said for text, said in cases if text in texts for said in said]
    whole = '\n'.join(texts)
    if len(whole) <= 200:
        assert result(whole) == expected


ANY_NUMBER = st.one_of(
    st.integers(0, 10**6).map(str),
    st.floats(1e-9, 100).map(str),
    st.floats(1e-9, 100).map('{:g}'.format),
    st.decimals(0, 100, places=3).map(str),
)
BETWEEN = st.sampled_from([' ', '=', ' = ', '：', ':', '\u3000', '\n', ''])


@given(
    st.sampled_from([*utils.NAMES, 'LR', '學習率', 'ｌｒ']),
    BETWEEN,
    ANY_NUMBER,
    st.sampled_from(['.', '。', '．', ',', '，']),
)
def test_numbers_come_back(name, sign, number, point):
    long = utils.NAMES.get(name, LR)
    if point in ',，' and (long != LR or '.' not in number):
        point = '.'
    written = number.replace('.', point).replace('-', '−')
    assert result(name + sign + written) == [[(long, number)]]
    if long == LR and 1e-9 <= float(number) <= 100:
        assert utils.read_value(long, number) == float(number)


WRITTEN = st.tuples(
    st.sampled_from(['lr', 'Learning_Rate', 'ｌｒ', 'TI', 'training_iters', 'bs', 'batch_size']),
    st.sampled_from([' ', '=', ' = ', '：', ':', '\u3000', '\n']),
)


@given(
    st.lists(st.tuples(WRITTEN, st.integers(0, 10**6)), min_size=1, max_size=6),
    st.sampled_from([' ', '，', ', ', '\n', '；']),
    st.booleans(),
)
def test_any_way_to_write_numbers_is_read(pairs, between, full_width):
    text = between.join(name + sign + str(value) for (name, sign), value in pairs)
    if full_width:
        text = text.translate({ord('0') + i: chr(0xFF10 + i) for i in range(10)})
    if len(text) <= 200:
        values = [value for said in utils.parse(text).commands for _, value in said.values]
        assert values == [str(value) for _, value in pairs]


@pytest.mark.parametrize(
    'name, text, value',
    [
        ('learning_rate', '0.1', 0.1),
        ('learning_rate', '.5', 0.5),
        ('learning_rate', '1e-3', 1e-3),
        ('learning_rate', '+1', 1),
        ('learning_rate', '100', 100),
        ('training_iters', '1', 1),
        ('training_iters', '007', 7),
        ('batch_size', '10000', 10000),
    ],
)
def test_good_values(name, text, value):
    assert utils.read_value(name, text) == value
    assert utils.parse(f'{name} {text}').complete


@pytest.mark.parametrize(
    'name, text',
    [
        *(
            ('learning_rate', t)
            for t in ('abc', '-1', '0', 'nan', 'inf', '1e400', '101', '1_0', '0x1', '1e', '--1', '.', '10^-3')
        ),
        *(('training_iters', t) for t in ('0', '2.5', '-3', '1e2', '1' * 5000, 'x')),
        *(('batch_size', t) for t in ('100000', '0', '12.0', '2^7')),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(name, text):
    with pytest.raises(ValueError, match='例如') as refused:
        utils.read_value(name, text)
    assert len(str(refused.value)) < 80
    assert not utils.parse(f'{name} {text}').complete


# --------------------------------------------------------------------------------------- whole sessions


def test_a_session_in_wechat(wechat, images, tmp_path):
    """QR code, login, commands, two epochs, stop in the middle of one, start again."""
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.wait(lambda: 'webpush.wx2.qq.com/cgi-bin/mmwebwx-bin/synccheck' in wechat.requests)
        output = program.output()
        assert '█▀▀' in output or '▄▄▄▄▄' in output  # the QR code
        assert '请在手机上确认' in output and '已登录：A' in output
        wechat.ready()
        assert wechat.heard()[0].startswith('从现在起，只有你')
        assert wechat.ask('lr 0.1') == '学习率 lr = 0.1\n轮数 ti = 2\n批量 bs = 256'
        assert wechat.ask('ＢＳ：６４，ti=2') == '学习率 lr = 0.1\n轮数 ti = 2\n批量 bs = 64'
        for bad, allowed in (
            ('lr abc', '学习率'),
            ('lr nan', '学习率'),
            ('ti 2.5', '轮数'),
            ('bs 100000', '批量'),
        ):
            answer = wechat.ask(bad)
            assert (
                bad.split()[1] in answer and allowed in answer and 'bs = 64' in answer and 'ti = 2' in answer
            )
        assert wechat.ask('停止') == '现在没有训练，发“开始”就开始。'

        since = len(wechat.heard())
        wechat.says('B', '开始')
        wechat.says('B', 'start')
        wechat.wait_text('训练完成')
        texts = wechat.heard('B', since)
        assert texts[0].startswith('开始训练\n设备 ') and 'lr = 0.1' in texts[0]
        assert texts[1].startswith('已经在训练了')
        assert [t.split('\n')[0] for t in texts[2:5]] == ['第 1/2 轮', '第 2/2 轮', '训练完成']
        wechat.wait_picture(since=since)
        assert re.fullmatch(
            r'第 1/2 轮\n损失 \d\.\d+\n训练精度 0\.\d{3}\n测试精度 0\.\d{3}\n用时 .+ 秒，还需约 .+ 秒',
            texts[2],
        )
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
        wechat.wait(lambda: wechat.receiving)
        for text in ('你好', 'lr', '开始吃饭了吗', 'bs 你', '<b>开始</b>', '开始\n吃饭', 'x' * 10**6):
            wechat.says('B', text)
        wechat.says('nobody', '参数')  # no friend
        wechat.says(wechat.public, '参数')  # a public account
        wechat.says(wechat.group, '%s:\n参数' % wechat.address('B'))
        wechat.says('A', '参数', to='B')  # the owner to a friend
        wechat.says('B', '参数', MsgType=3)  # a picture
        wechat.ask('参数')
        wechat.says('A', 'help')  # the owner to filehelper
        wechat.wait(lambda: wechat.heard('filehelper'))
        assert [name for name, _ in wechat.sent] == ['B', 'B', 'filehelper']
        assert wechat.sent[1:] == [
            ('B', '学习率 lr = 0.5\n轮数 ti = 2\n批量 bs = 256'),
            ('filehelper', utils.HELP),
        ]
        assert '吃饭' not in program.output()  # what is no command is not logged


MAIN = """
if __name__ == '__main__':
    utils.chat_supervisor(nn_train)
    itchat.auto_login(hotReload=True)
    itchat.run()
"""

CRASHING = (
    """
import utils, itchat, sys

def nn_train(wechat_name, params):
    utils.lock_start()
    if params[1] == 1:
        raise RuntimeError('the disk is on fire\\nsecond line')
    utils.lock_end(wechat_name)
"""
    + MAIN
)


def test_a_crash_is_told_and_the_next_start_works(wechat, tmp_path):
    script = tmp_path / 'crashing.py'
    script.write_text(CRASHING)
    with Program(tmp_path, env=wechat.env(), script=str(script)) as program:
        wechat.ready()
        wechat.ask('ti 1')
        wechat.ask('开始')
        told = wechat.wait_text('出错')
        assert 'RuntimeError: the disk is on fire' in told and '\nsecond' not in told
        assert socket.gethostname() in told and 'crashing.py 第 7 行：raise' in told and '用时' in told
        program.wait_output('Traceback')
        program.wait_output('in nn_train')
        wechat.ask('ti 2')
        since = len(wechat.heard())
        wechat.ask('开始')
        wechat.wait_text('训练完成', since=since)


def test_a_kept_session_needs_no_second_scan(wechat, tmp_path):
    for _ in range(2):
        with Program(tmp_path, env=wechat.env()):
            wechat.ready()
            wechat.wait(lambda: os.path.exists(tmp_path / 'itchat.pkl'))
    assert wechat.logins == 1


def test_a_long_run_from_the_phone(wechat, images, tmp_path):
    """状态, values changed in flight, 曲线, 停止 in the middle, 继续 after a kill, best and last on disk."""
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.ready()
        assert '空闲' in wechat.ask('状态')
        assert '还没有可画的' in wechat.ask('曲线')
        wechat.ask('lr 0.1 ti 2 bs 8')
        wechat.ask('开始')
        wechat.wait_text('第 1/2 轮')
        status = wechat.ask('状态')
        for line in (
            '训练中：完成 1/2 轮',
            r'第 1 轮：损失 \d',
            r'最好的测试精度 0.\d{3}（第 1 轮）',
            '已用 .*，还需约',
            'lr = 0.1',
            '设备 ',
            '主机 ' + re.escape(socket.gethostname()),
        ):
            assert re.search(line, status)
        assert max(len(line) for line in status.split('\n')) < 45 and status.count('\n') < 14
        assert wechat.ask('lr 0.05').startswith('lr：从下一批起生效\n')
        assert wechat.ask('ti 30 bs 4').startswith('ti：这次训练到第 30 轮为止\nbs：下次开始时生效\n')
        wechat.says('B', '曲线')
        assert wechat.wait_picture().shape[:2] == (1080, 800)  # with a line for the words of the marks
        assert '批' in wechat.ask('状态')
        assert wechat.ask('停止') == '好，这一批算完就停。'
        stopped = wechat.wait_text('训练已停止')
        assert '发“继续”接着训练' in stopped
        where = re.search(r'完成 (\d+)/30 轮，第 (\d+) 轮到第 (\d+)/375 批', stopped)
        assert where, stopped
        program.process.kill()

    [folder] = (tmp_path / 'runs').iterdir()
    assert {path.name for path in folder.iterdir()} == {
        *('last.zip', 'best.zip', 'best.params'),
        *('log.csv', 'curve.png'),
    }
    with open(folder / 'log.csv') as f:
        rows = list(csv.DictReader(f))
    assert [row['epoch'] for row in rows] == [str(i + 1) for i in range(int(where[1]))]
    assert rows[0]['learning_rate'] == '0.1' and 0 < float(rows[0]['test_acc']) < 1
    state = utils.read_checkpoint(str(folder / 'last.zip'))
    assert (state['epoch'], state['batch'], state['params']) == (int(where[2]), int(where[3]), [0.05, 30, 8])
    assert len(state['losses'].points) == 375 * int(where[1]) + int(where[3])

    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.ready()
        since = len(wechat.heard())
        assert re.search('没训练完的：%s，发“继续”' % where[0], program.output())
        assert where[0] in wechat.ask('状态')
        wechat.ask('ti %d' % (int(where[1]) + 1))
        answer = wechat.ask('继续')
        assert (
            where[0].replace('/30', '/%d' % (int(where[1]) + 1)) in answer
            and 'lr = 0.05' in answer
            and 'bs = 8' in answer
        )
        wechat.wait_text('训练完成', since=since)
        assert '都训练完了' in wechat.ask('继续')
    assert len(list((tmp_path / 'runs').iterdir())) == 1
    assert len(utils.read_checkpoint(str(folder / 'last.zip'))['losses'].points) == 375 * (int(where[1]) + 1)


def parameters(path):
    """Return the parameters in a last.zip as numpy arrays, read by the plain network."""
    with zipfile.ZipFile(path) as z:
        z.extract('net.params', os.path.dirname(path))
    return {k: v.asnumpy() for k, v in nd.load(os.path.join(os.path.dirname(path), 'net.params')).items()}


STOPPING = """
import utils, itchat, sys, wechat_train

stop_at, batches = int(sys.argv[1]), 0
utils.parse_args(sys.argv[2:])

def accuracy(output, label, accuracy=utils.accuracy):
    global batches
    batches += 1
    if batches == stop_at:
        itchat.instance.receive('停止')
    return accuracy(output, label)

utils.accuracy = accuracy
utils.chat_supervisor(wechat_train.nn_train)
itchat.auto_login()
itchat.run()
"""


def test_a_resumed_run_is_the_unbroken_run(images, tmp_path):
    """Stopped after 20 batches and resumed: parameters, losses, accuracies equal bit for bit."""
    script = tmp_path / 'stopping.py'
    script.write_text(STOPPING)
    results = []
    for name, stop_at in (('unbroken', '0'), ('broken', '20')):
        folder = tmp_path / name
        folder.mkdir()
        options = '--console', '--data', images
        with Program(folder, stop_at, *options, script=str(script)) as program:
            status, output = program.types('lr 0.1 ti 2 bs 100\n开始\n')
            assert status == 0 and (stop_at == '0' or '第 1 轮到第 20/30 批' in output)
        [path] = folder.glob('runs/*/last.zip')
        if stop_at == '20':
            with Program(folder, '0', '--seed', '5', *options, script=str(script)) as program:
                for word, done in (('继续', 1), ('开始', 2)):
                    program.process.stdin.write(word + '\n')
                    program.process.stdin.flush()
                    program.wait_output('训练完成', done)
                assert program.types('')[0] == 0
            [other] = set(folder.glob('runs/*/last.zip')) - {path}
            assert utils.read_checkpoint(str(other))['seed'] == 5  # the program's, for new runs
        results.append((parameters(str(path)), utils.read_checkpoint(str(path))))
    (whole, whole_state), (broken, broken_state) = results
    assert whole.keys() == broken.keys() and len(whole) == 8
    assert all(np.array_equal(whole[name], broken[name]) for name in whole)
    assert whole_state['losses'].points == broken_state['losses'].points
    assert len(whole_state['losses'].points) == 60
    assert [row[:4] for row in whole_state['history']] == [row[:4] for row in broken_state['history']]


def test_a_damaged_checkpoint_is_set_aside(tmp_path, monkeypatch, capsys):
    folders = {int(name): str(tmp_path / 'runs' / name) for name in '12'}
    monkeypatch.setattr(utils, 'folders', folders)
    for name, content in (('1', b'PK'), ('2', b'')):
        (tmp_path / 'runs' / name).mkdir(parents=True)
        (tmp_path / 'runs' / name / 'last.zip').write_bytes(content)
    assert utils.last_checkpoint() == (None, None)
    assert capsys.readouterr().out.count('已损坏') == 2
    assert len(list(tmp_path.glob('runs/*/last.zip.damaged'))) == 2


def test_who_may_command(wechat, tmp_path):
    options = [word for name in ('老王', 'E', 'H', 'nobody') for word in ('--supervisor', name)]
    with Program(tmp_path, *options, env=wechat.env()) as program:
        wechat.wait(lambda: 'webpush.wx2.qq.com/cgi-bin/mmwebwx-bin/synccheck' in wechat.requests)
        assert '“H”：有 2 个好友' in program.output() and '“nobody”：好友里没有' in program.output()
        for _ in range(3):
            wechat.says('B', 'lr 0.9')
        wechat.says('B', '你好')
        assert 'lr = 0.5' in wechat.ask('参数', 'D')
        wechat.says('A', 'lr 0.2')  # the owner may always
        wechat.wait(lambda: wechat.heard('filehelper'))
        assert 'lr = 0.2' in wechat.ask('参数', 'D')
        assert 'lr = 0.2' in wechat.ask('参数', 'F')  # the owner's remark counts before a nickname
        assert wechat.ask('参数', 'E').startswith('抱歉')
        assert wechat.heard('B') == ['抱歉，这里的训练由别人监督，你的命令没有执行。']
        assert 'B 不能下命令' in program.output()


LINEAR_REGRESSION = (
    """
import utils, itchat, sys
from mxnet import autograd, gluon, nd

utils.options.then, utils.options.then_delay = 'echo done > then.txt', float(sys.argv[1])

def nn_train(wechat_name, params):
    learning_rate, training_iters, batch_size = params
    X = nd.random.normal(shape=(1000, 2))
    y = X[:, 0] * 2 - X[:, 1] * 3.4 + 4.2
    train_data = gluon.data.DataLoader(gluon.data.ArrayDataset(X, y), batch_size, shuffle=True)
    net = gluon.nn.Dense(1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': learning_rate})
    square_loss = gluon.loss.L2Loss()
    epoch = 1
    while utils.lock_start() and epoch <= training_iters:
        train_loss = 0
        for data, label in train_data:
            with autograd.record():
                loss = square_loss(net(data), label)
            loss.backward()
            trainer.step(batch_size)
            train_loss += nd.mean(loss).asscalar()
        utils.chat_inf(wechat_name, epoch, train_loss, 0, train_data, 0)
        epoch += 1
    utils.lock_end(wechat_name)
"""
    + MAIN
)


def test_another_training_function_with_the_tutorials_calls_alone(wechat, tmp_path):
    script = tmp_path / 'regression.py'
    script.write_text(LINEAR_REGRESSION)
    with Program(tmp_path, '1', env=wechat.env(), script=str(script)):
        wechat.ready()
        wechat.ask('lr 0.03 ti 3 bs 10')
        wechat.ask('开始')
        losses = [float(re.search('损失 (.*)', wechat.wait_text('第 %d/3 轮' % i))[1]) for i in (1, 2, 3)]
        assert losses[2] < 0.01 < losses[0]
        wechat.wait_picture()
        assert '没有可以继续的训练' in wechat.ask('继续')
        wechat.wait_text('已执行：echo done > then.txt\n退出状态 0')  # --then, after its delay
        assert (tmp_path / 'then.txt').read_text() == 'done\n'
        since = len(wechat.heard())
        wechat.ask('ti 100000')
        wechat.ask('开始')
        assert 'lr：下次开始时生效' in wechat.ask('lr 0.1')
        wechat.wait_text('第 2/100000 轮', since=since)
        assert '训练中' in wechat.ask('状态')
        wechat.ask('停止')
        wechat.wait_text('训练已停止', since=since)
        assert len(list((tmp_path / 'runs').glob('*/log.csv'))) == 2


FULL_REGRESSION = (
    LINEAR_REGRESSION.replace(
        """
    epoch = 1
    while""",
        """
    epoch, train_loss, train_acc = utils.load_checkpoint(net, trainer)
    while""",
    )
    .replace(
        """        train_loss = 0
        for data, label in train_data:
""",
        """        for data, label in utils.progress(train_data):
            trainer.set_learning_rate(utils.params()[0])
""",
    )
    .replace('nd.mean(loss).asscalar()', 'utils.batch_loss(loss)')
    .replace(
        """
        utils.chat_inf(wechat_name, epoch, train_loss, 0, train_data, 0)
        epoch += 1
""",
        """
        utils.chat_inf(wechat_name, epoch, train_loss, 0, train_data, 0)
        epoch, train_loss, train_acc = utils.save_checkpoint(net, trainer, epoch, train_loss, 0)
""",
    )
)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(wechat, tmp_path):
    script = tmp_path / 'regression.py'
    script.write_text(FULL_REGRESSION)
    with Program(tmp_path, '3600', env=wechat.env(), script=str(script)):
        wechat.ready()
        wechat.ask('ti 1 bs 10 lr 0.03')
        wechat.ask('开始')
        wechat.wait_text('训练完成')
        wechat.ask('取消')
        [checkpoint] = tmp_path.glob('runs/*/last.zip')
        before = parameters(str(checkpoint))
        wechat.ask('ti 5 lr 50')  # every step makes the error some fifty times larger
        wechat.ask('继续')
        told = wechat.wait_text('训练停下了')
        assert re.search(
            r'训练停下了：损失成了 (inf|nan)\n第 2 轮第 \d+/100 批，lr = 50\n可以试试 lr 5，再发“继续”\n',
            told,
        )
        after = parameters(str(checkpoint))
        assert all(np.array_equal(before[name], after[name]) for name in before)
        wechat.ask('lr 0.03')
        since = len(wechat.heard())
        assert '完成 1/5 轮' in wechat.ask('继续')
        assert '完成 5/5 轮' in wechat.wait_text('训练完成', since=since)


NOT_FINITE = """
import utils, itchat
from mxnet import gluon, nd

def nn_train(wechat_name, params):
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd')
    utils.chat_inf(wechat_name, 1, 0.5, 0.5, [0], 0.5)
    utils.save_checkpoint(net, trainer, 1, 0.5, 0.5)
    net.weight.set_data(nd.array([[float('nan')]]))
    utils.save_checkpoint(net, trainer, 2, 0.5, 0.5)

utils.parse_args(['--console'])
utils.chat_supervisor(nn_train)
itchat.auto_login()
itchat.run()
"""


def test_parameters_that_are_not_numbers_are_not_kept(tmp_path):
    script = tmp_path / 'not_finite.py'
    script.write_text(NOT_FINITE)
    with Program(tmp_path, script=str(script)) as program:
        status, output = program.types('开始\n')
    assert status == 1 and re.search('训练停下了：网络的 .*weight 里有 NaN', output)
    [checkpoint] = tmp_path.glob('runs/*/last.zip')
    assert utils.read_checkpoint(str(checkpoint))['epoch'] == 2
    assert all(np.isfinite(array).all() for array in parameters(str(checkpoint)).values())


def test_then_can_be_called_off(wechat, tmp_path):
    script = tmp_path / 'regression.py'
    script.write_text(LINEAR_REGRESSION)
    with Program(tmp_path, '3600', env=wechat.env(), script=str(script)):
        wechat.ready()
        assert wechat.ask('取消') == '没有要取消的。'
        wechat.ask('ti 100000')
        wechat.ask('开始')
        wechat.ask('停止')
        wechat.wait_text('训练已停止')
        assert '没有要取消的' in wechat.ask('取消')  # not after 停止
        wechat.ask('ti 1')
        wechat.ask('开始')
        assert '3600 秒后执行：echo done' in wechat.wait_text('不要执行就发“取消”')
        assert wechat.ask('取消') == '好，不执行了。'
        since = len(wechat.heard())
        wechat.ask('开始')
        wechat.wait_text('秒后执行', since=since)
        assert '（“echo done > then.txt”已取消）' in wechat.ask('开始')  # a new run needs the machine
        wechat.wait_text('秒后执行', since=since + 4)
        wechat.ask('取消')
    assert not (tmp_path / 'then.txt').exists()


# ------------------------------------------------------------------------------- the tutorial's script

TUTORIAL = os.path.join(HERE, '..', 'shared', 'reference', 'tutorial.py')  # as published, if it is there
TUTORIALS_SHAPE = """
import utils
from mxnet.gluon import nn
import itchat
from mxnet import autograd
from mxnet import gluon
from mxnet import nd

def nn_train(wechat_name,params):
    learning_rate, training_iters, batch_size = params
    train_data, test_data = utils.load_data_fashion_mnist(batch_size)
    softmax_cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    net = nn.Sequential()
    net.add(nn.Conv2D(8, 5, activation='relu'), nn.MaxPool2D(2, 2), nn.Flatten(), nn.Dense(10))
    ctx = utils.try_gpu()
    net.initialize(ctx=ctx)
    trainer = gluon.Trainer(net.collect_params(),'sgd',{'learning_rate':learning_rate})
    epoch = 1
    while utils.lock_start() and epoch < training_iters:
        train_loss = 0
        train_acc = 0
        for data,label in train_data:
            label = label.as_in_context(ctx)
            with autograd.record():
                output = net(data.as_in_context(ctx))
                loss = softmax_cross_entropy(output,label)
            loss.backward()
            trainer.step(batch_size)
            train_acc += utils.accuracy(output,label)
            train_loss += nd.mean(loss).asscalar()
        test_acc = utils.evaluate_accuracy(test_data, net, ctx)
        print("Epoch %d. Loss: %f" % (epoch, train_loss/len(train_data)))
        utils.chat_inf(wechat_name,epoch,train_loss,train_acc,train_data,test_acc)
        epoch += 1
    utils.lock_end(wechat_name)

if __name__ == '__main__':
    utils.chat_supervisor(nn_train)
    itchat.auto_login(hotReload=True)
    itchat.run()
"""


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_the_tutorials_own_script(server, images, tmp_path):
    """Login, a value, epochs and their reports, a session lost and found, 停止 in the middle of an epoch."""
    for kind, array in zip(('images-idx3', 'labels-idx1'), utils.draw_garments(1536, 0)):  # it is slow
        write_idx(os.path.join(images, f'train-{kind}-ubyte.gz'), array)
    text = TUTORIALS_SHAPE
    if os.path.exists(TUTORIAL):
        with open(TUTORIAL, encoding='utf-8') as f:
            text = f.read()
    text = text.replace('import utils\n', f'import utils\nutils.data_dir = {images!r}\n', 1)
    script = tmp_path / 'tutorial.py'
    script.write_text(text)
    phone, who = server(str(tmp_path)), 'B' if server is WeChat else 'filehelper'
    options = ['--filehelper'] if server is FileHelper else []
    with Program(tmp_path, *options, env=phone.env(), script=str(script)) as program:
        phone.ready()
        assert 'lr = 0.1' in phone.ask('lr 0.1')
        phone.ask('ti 3')
        assert phone.ask('开始').startswith('开始训练')
        closing = phone.wait_text('训练完成', who)
        assert '完成 2/3 轮' in closing  # the tutorial's loop ends one epoch early
        reports = [t for t in phone.heard(who) if isinstance(t, str) and re.match(r'第 \d/3 轮', t)]
        assert len(reports) == 2

        phone.ask('ti 100000')
        since = len(phone.heard(who))
        phone.ask('开始')
        phone.wait_text('第 1/100000 轮', who, since)
        with phone.changed:
            phone.logged_out = True
            phone.changed.notify_all()
        program.wait_output('请用微信扫码重新登录')
        phone.wait(lambda: phone.receiving == 2)
        since = len(phone.heard(who))
        phone.wait_text(r'第 \d+/100000 轮', who, since)
        while not re.search(r'训练中：.*批', phone.ask('状态')):
            pass
        so_far = len(phone.heard(who))
        assert phone.ask('停止') == '好，这一批算完就停。'
        closing = phone.wait_text('训练已停止', who, so_far)
        done = int(re.search(r'完成 (\d+)/', closing)[1])
        told = [
            int(k)
            for t in phone.heard(who, since)
            if isinstance(t, str)
            for k in re.findall(r'第 (\d+)/100000 轮', t)
        ]
        assert max(told) == done  # nothing is reported of the epoch that was cut short
        assert '空闲' in phone.ask('状态')
        assert 'Traceback' not in program.output()
    phone.shutdown()
    assert phone.faults == []


# ------------------------------------------------------------------------- a script of one's own


def own_script(folder, nn_train, main=MAIN, head=''):
    """Write a script with this nn_train; return its path."""
    path = folder / 'own.py'
    path.write_text(
        f'import utils, itchat, os, sys, threading, time\n{head}\n'
        f'def nn_train(wechat_name, params):\n{textwrap.indent(textwrap.dedent(nn_train), "    ")}\n{main}'
    )
    return str(path)


WITH_OPTIONS = MAIN.replace("__main__':\n", "__main__':\n    utils.parse_args()\n")


OWN_LOOP = """
    import random
    import numpy as np
    from mxnet import autograd, gluon, nd
    features, labels = np.random.RandomState(5).rand(90, 4), np.arange(90) % 3
    train_data, test_data = DATA(features, labels), DATA(features, labels)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(8, activation='tanh'), gluon.nn.Dense(3))
    loss_fn = gluon.loss.SoftmaxCrossEntropyLoss()
    utils.speed_up(net, loss_fn)
    net.initialize(ctx=[mx.cpu()])
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': params[0]}, utils.store())
    epoch, train_loss, train_acc = utils.load_checkpoint(net, trainer)
    while utils.lock_start() and epoch <= utils.params()[1]:
        weight = random.uniform(0.5, 1) + np.random.rand()  # of this epoch
        np.random.rand(0 if LOOKED else 9)  # at something, once in a process
        LOOKED.append(epoch)
        for i, batch in enumerate(utils.progress(train_data)):
            x, y = UNPACK(batch)
            x, y = x.as_in_context(mx.cpu()), y.as_in_context(mx.cpu())
            with autograd.record():
                output = net(x)
                loss = loss_fn(output, y) * weight
            loss.backward()
            trainer.step(utils.total(x.shape[0]))
            train_acc += utils.accuracy(output, y)
            train_loss += utils.batch_loss(loss)
            if [epoch, i] == STOP:
                itchat.instance.receive('停止')
        test_acc = utils.evaluate_accuracy(TESTED(test_data), net, ctx=[mx.cpu()])
        utils.chat_inf(wechat_name, epoch, train_loss, train_acc, train_data, test_acc)
        epoch, train_loss, train_acc = utils.save_checkpoint(net, trainer, epoch, train_loss, train_acc)
    utils.lock_end(wechat_name)
"""

LOADER = """
import mxnet as mx, random, numpy as np
from mxnet import gluon, nd
STOP, LOOKED = %r, []

class Data(gluon.data.Dataset):
    "Each example is changed a little by every generator there is."
    def __init__(self, x, y):
        self.x, self.y = x.astype('float32'), y.astype('float32')
    def __len__(self):
        return len(self.y)
    def __getitem__(self, i):
        noise = [random.random(), np.random.rand(), float(nd.random.uniform().asscalar())]
        return self.x[i] + np.float32(sum(noise) if ALONE else 0), self.y[i : i + 1]

DATA = lambda x, y: gluon.data.DataLoader(Data(x, y), 10, shuffle=True, num_workers=0 if ALONE else 2)
UNPACK, TESTED = (lambda batch: batch), (lambda data: data)
"""

GENERATOR = """
import mxnet as mx, random
from mxnet import nd
STOP, LOOKED = %r, []

class Shuffled:
    "As in the first chapters of d2l; len() is said to be unknown."
    def __init__(self, x, y):
        self.x, self.y = x.astype('float32'), y.astype('int64')
    def __len__(self):
        raise TypeError('unknown')
    def __iter__(self):
        order = list(range(90))
        random.shuffle(order)
        for i in range(0, 90, 10):
            chosen = order[i : i + 10]
            yield {'features': [nd.array(self.x[chosen])], 'label': nd.array(self.y[chosen])}

DATA, UNPACK = Shuffled, lambda batch: (batch['features'][0], batch['label'])
TESTED = lambda data: map(UNPACK, data)
"""

ITERATOR = """
import mxnet as mx
STOP, LOOKED = %r, []
DATA = lambda x, y: mx.io.NDArrayIter(x, y, 25)  # 100 with the padding
UNPACK, TESTED = (lambda batch: (batch.data[0], batch.label[0])), (lambda data: data)
"""


@pytest.mark.parametrize(
    'head',
    [f'ALONE = True\n{LOADER}', f'ALONE = False\n{LOADER}', GENERATOR, ITERATOR],
    ids=['a loader', 'its processes', 'a generator of dicts', 'NDArrayIter'],
)
def test_a_resumed_run_on_ones_own_data_is_the_unbroken_run(tmp_path, head):
    """Every example once in an epoch, in an order of its own, the same whenever the seed is."""
    results = []
    for name, stops in (('unbroken', [None]), ('broken', [[2, 2], None])):
        folder = tmp_path / name
        folder.mkdir()
        for stop, typed in zip(stops, ('ti 3 lr 0.05\n开始\n', '继续\n')):
            output = in_terminal(folder, OWN_LOOP, typed, head=head % (stop,))
            assert ('第 2 轮到第 3/' in output) == (name == 'broken')
        [path] = folder.glob('runs/*/last.zip')
        results.append((parameters(str(path)), utils.read_checkpoint(str(path))))
    (whole, whole_state), (broken, broken_state) = results
    assert len(whole) == 4 and all(np.array_equal(whole[name], broken[name]) for name in whole)
    assert whole_state['losses'].points == broken_state['losses'].points
    assert len(whole_state['losses'].points) == 12 if head is ITERATOR else 27
    assert [row[:4] for row in whole_state['history']] == [row[:4] for row in broken_state['history']]
    assert all(0 <= row[2] <= 1 and 0.2 < row[1] < 2.5 for row in whole_state['history'])


DRAWN_AT_RANDOM = """
    import numpy, random
    from mxnet import gluon, nd
    loader = gluon.data.DataLoader(gluon.data.ArrayDataset(list(range(20))), 20, shuffle=True)
    utils.lock_start()
    orders = [batch.asnumpy().astype(int).tolist() for _ in range(2) for batch in loader]
    print('DRAWN', numpy.random.rand(), random.random(), nd.random.uniform().asscalar(), *orders, flush=True)
    utils.lock_end(wechat_name)
"""


def test_the_same_seed_draws_the_same_without_progress(tmp_path):
    drawn = []
    for seed in ('0', '0', '1'):
        output = in_terminal(tmp_path, DRAWN_AT_RANDOM, '开始\n', '--seed', seed)
        drawn += re.findall('DRAWN (.*)', output)
    assert drawn[0] == drawn[1] and len(set(drawn)) == 2
    first, second = re.findall(r'\[.*?\]', drawn[0])
    assert first != second and sorted(json.loads(first)) == list(range(20))


def test_each_epoch_has_an_order_of_its_own():
    def draw(*numbers):
        utils.seed_epoch(*numbers)
        return np.random.rand(), random.random(), float(nd.random.uniform().asscalar())

    drawn = [draw(seed, epoch) for seed in (0, 1, -1, 2**40) for epoch in (0, 1, 2)]
    assert drawn == [draw(seed, epoch) for seed in (0, 1, -1, 2**40) for epoch in (0, 1, 2)]
    assert all(len(set(column)) == len(drawn) for column in zip(*drawn))


def test_a_length_that_nobody_knows_is_asked_for(tmp_path):
    output = in_terminal(
        tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, iter([]), 1)', '开始\n', status=1
    )
    assert 'TypeError: 不知道这一轮有几批：train_data 没有 len()' in output


SWITCHED = """
    import mxnet as mx
    print('SWITCHES', mx.util.is_np_array(), mx.util.is_np_shape(), mx.autograd.is_training(),
          mx.current_context(), threading.current_thread() is threading.main_thread(), flush=True)
    train_data, test_data = utils.load_data_fashion_mnist(params[2])
    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Flatten(), mx.gluon.nn.Dense(10))
    utils.speed_up(net)
    net.initialize()
    trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1}, utils.store())
    loss_fn = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    epoch, train_loss, train_acc = utils.load_checkpoint(net, trainer)
    utils.lock_start()
    for data, label in train_data:
        data, label = (array.as_in_context(mx.current_context()) for array in (data, label))
        with mx.autograd.record():
            output = net(data)
            loss = loss_fn(output, label)
        loss.backward()
        trainer.step(utils.total(data.shape[0]))
        train_acc += utils.accuracy(output, label)
        train_loss += utils.batch_loss(loss)
    test_acc = utils.evaluate_accuracy(test_data, net, [mx.current_context()])
    utils.chat_inf(wechat_name, 1, train_loss, train_acc, train_data, test_acc)
    utils.save_checkpoint(net, trainer, 1, train_loss, train_acc)
    utils.lock_end(wechat_name)
"""


@pytest.mark.parametrize('how', ['as a script', 'by two processes', 'in another thread'])
def test_the_switches_of_a_script_are_its_nn_trains(tmp_path, how):
    """npx.set_np(), the device, training mode: MXNet keeps them for each thread."""
    head = 'import mxnet as mx\nmx.npx.set_np(); mx.cpu(1).__enter__(); mx.autograd.set_training(True)'
    main = WITH_OPTIONS.replace('itchat.run()', 'itchat.run(blockThread=False); threading.Event().wait()')
    main = main if how == 'in another thread' else WITH_OPTIONS
    options = ('--workers', '2') if how == 'by two processes' else ()
    script = own_script(tmp_path, SWITCHED, main, head)
    with Program(tmp_path, '--demo', *options, script=script) as program:
        status, output = program.types('bs 500\n开始\n')
    assert status == 0, output
    assert f'SWITCHES True True True cpu(1) {how != "in another thread"}' in output
    assert '第 1/2 轮' in output and output.count('speed_up：') <= 2


# ------------------------------------------------------------------------------------------- faults


def without_fault(name):
    return None


@pytest.mark.parametrize('fault', ['drop', 500, 'hang'])
def test_training_outlives_the_network(wechat, images, tmp_path, fault):
    """The server is gone until the program has noticed: training goes on, nothing is lost, no scan."""
    with Program(tmp_path, '--data', images, env=wechat.env(), before=SHORT_TIMEOUTS) as program:
        wechat.ready()
        wechat.ask('ti 100000 bs 100')
        wechat.ask('开始')
        wechat.wait_text('第 1/100000 轮')
        wechat.breaking = lambda name: fault
        wechat.says('B', 'lr 0.123')
        program.wait_output('还没有发给' if fault == 'hang' else '微信断开了')
        [log] = tmp_path.glob('runs/*/log.csv')
        rows = len(log.read_text().splitlines())
        program_rows = lambda: len(log.read_text().splitlines())  # noqa: E731
        deadline = time.monotonic() + DEADLINE
        while program_rows() < rows + 2:  # training goes on
            assert time.monotonic() < deadline
            time.sleep(0.05)
        wechat.breaking = without_fault
        wechat.healed.set()
        wechat.wait_text('lr = 0.123')  # said while nobody listened
        since = len(wechat.heard())
        assert wechat.ask('停止') == '好，这一批算完就停。'
        closing = wechat.wait_text('训练已停止', since=since)
        texts = [text for text in wechat.heard() if isinstance(text, str)]
        told = {k for text in texts for k in re.findall(r'第 (\d+)/100000 轮', text)}
        left_out = sum(int(n) for text in texts for n in re.findall(r'略去 (\d+) 份报告', text))
        assert len(told) + left_out == int(re.search(r'完成 (\d+)/', closing)[1])  # none is lost
        assert fault == 'hang' or any(text.count('/100000 轮') > 1 for text in texts)
        assert wechat.logins == 1 and 'Traceback' not in program.output()


def test_a_logout_on_the_phone_is_followed_by_a_new_qr_code(wechat, images, tmp_path):
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 100000 bs 100')
        wechat.ask('开始')
        before = wechat.address('B')
        wechat.phone = 'waits'
        with wechat.changed:
            wechat.logged_out = True
            wechat.changed.notify_all()
        program.wait_output('请用微信扫码重新登录')
        since = len(wechat.heard())
        with wechat.changed:
            wechat.uuid = None  # the QR code has run out: another one
        wechat.wait(lambda: wechat.uuid)
        wechat.phone = 'scans'
        wechat.wait(lambda: wechat.receiving == 2)
        wechat.wait_text(r'第 \d+/100000 轮', since=since)
        assert wechat.address('B') != before and wechat.ask('停止') == '好，这一批算完就停。'
        wechat.wait_text('训练已停止')
        assert wechat.ask('lr 0.3', 'C').startswith('抱歉')  # B is still the only one


@pytest.mark.parametrize('code', [1205, -1, 1])
def test_a_refused_message_is_sent_again(wechat, tmp_path, code):
    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        refusals = [code] * 2
        wechat.breaking = lambda name: refusals.pop() if name == 'webwxsendmsg' and refusals else None
        wechat.says('B', 'lr 0.1')
        wechat.says('B', 'lr 0.2')
        wechat.wait_text('lr = 0.2')
        assert not refusals
        text = ''.join(t for t in wechat.heard() if isinstance(t, str))
        assert text.index('lr = 0.1') < text.index('lr = 0.2') and text.count('lr = 0.1') == 1
        assert 'Ret %d' % code in program.output()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_in_order(wechat, images, tmp_path, number):
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 100000 bs 4')
        wechat.ask('开始')
        wait_batches(wechat)
        program.process.send_signal(number)
        assert program.process.wait(DEADLINE) == 128 + number
        assert '训练已停止' in wechat.wait_text('训练已停止')
        [checkpoint] = tmp_path.glob('runs/*/last.zip')
        assert utils.read_checkpoint(str(checkpoint))['batch'] > 0
        assert 'Traceback' not in program.output()


def test_what_could_not_be_delivered_is_delivered_by_the_next_program(wechat, tmp_path):
    script = tmp_path / 'regression.py'
    script.write_text(LINEAR_REGRESSION)
    with Program(tmp_path, '3600', env=wechat.env(), script=str(script)) as program:
        wechat.ready()
        wechat.ask('ti 100000')
        since = len(wechat.heard())
        wechat.ask('开始')
        wechat.wait_text('第 1/100000 轮')
        wechat.breaking = lambda name: 1205 if name == 'webwxsendmsg' else None  # from now on, too frequent
        program.wait_output('Ret 1205')
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143
        assert '没有发出去，下次启动时接着发' in program.output()
    wechat.breaking = without_fault
    with Program(tmp_path, '3600', env=wechat.env(), script=str(script)):
        closing = wechat.wait_text('训练已停止', since=since)
        texts = [text for text in wechat.heard(since=since) if isinstance(text, str)]
        told = [int(k) for text in texts for k in re.findall(r'第 (\d+)/100000 轮', text)]
        left_out = sum(int(n) for text in texts for n in re.findall(r'略去 (\d+) 份报告', text))
        done = int(re.search(r'训练已停止\n完成 (\d+)/', closing)[1])
        assert told == sorted(set(told)) and len(told) + left_out == done and wechat.logins == 1
        assert not list(tmp_path.glob('runs/*/undelivered.txt'))


NEVER_ENDING = LINEAR_REGRESSION.replace(
    '    utils.lock_end', '    threading.Event().wait()\n    utils.lock_end'
).replace('import utils,', 'import threading, utils,')


def test_a_second_signal_ends_at_once(wechat, tmp_path):
    script = tmp_path / 'never_ending.py'
    script.write_text(NEVER_ENDING)
    with Program(tmp_path, '1', env=wechat.env(), script=str(script)) as program:
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('第 2/2 轮')
        program.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            program.process.wait(2)
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(DEADLINE) == 130


def test_ctrl_c_while_the_qr_code_waits(wechat, tmp_path):
    wechat.phone = 'waits'
    with Program(tmp_path, env=wechat.env()) as program:
        program.wait_output('请用微信扫码登录')
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(DEADLINE) == 130
        assert 'Traceback' not in program.output()


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    script = tmp_path / 'regression.py'
    script.write_text(
        FULL_REGRESSION.replace('\nutils.options', "\nutils.parse_args(['--console'])\nutils.options", 1)
    )
    done = 0
    for i, delay in enumerate((0, 0.003, 0.01, 0.02, 0.05)):
        with Program(tmp_path, '1', script=str(script)) as program:
            program.process.stdin.write('lr 0.001 ti 100000 bs 500\n%s\n' % ('继续' if i else '开始'))
            program.process.stdin.flush()
            program.wait_output('第 %d/100000 轮' % (done + 3))
            time.sleep(delay)  # the moment is the point: any one will do
            program.kill()
            assert ('完成 %d/100000 轮' % done in program.output()) == bool(i)
        [checkpoint] = tmp_path.glob('runs/*/last.zip')
        state = utils.read_checkpoint(str(checkpoint))
        assert len(state['history']) >= done + 2
        done = len(state['history'])


@pytest.mark.parametrize(
    'page',
    [
        '<error><ret>1203</ret><message>为了你的帐号安全，此微信号不能登录网页微信。</message></error>',
        '<!DOCTYPE html><html><body>503</body></html>',
        '',
        '<error><ret>0</ret><skey>s</skey><wxsid>1</wxsid><wxuin>1</wxuin></error>',
    ],
)
def test_a_refused_account_is_told_in_one_line(wechat, tmp_path, page):
    wechat.on_webwxnewloginpage = lambda query: (200, {}, page)  # and no cookies
    with Program(tmp_path, env=wechat.env()) as program:
        assert program.process.wait(DEADLINE) == 1
        last = program.output().splitlines()[-1]
        assert (
            '微信没有让这个账号登录' in last
            and '--filehelper' in last
            and 'Traceback' not in program.output()
        )
        assert not (tmp_path / 'itchat.pkl').exists()


def test_a_server_that_is_down_does_not_cost_the_stored_session(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env(), before=QUICK):
        wechat.ready()
        wechat.wait(lambda: os.path.exists(tmp_path / 'itchat.pkl'))
    wechat.breaking = lambda name: 500 if name == 'webwxsync' else None
    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        assert program.process.wait(DEADLINE) == 1
        assert '连不上微信（login.weixin.qq.com）' in program.output() and '扫码' not in program.output()
    wechat.breaking = without_fault
    wechat.receiving = 0
    with Program(tmp_path, env=wechat.env(), before=QUICK):
        wechat.ready()
    assert wechat.logins == 1


def test_the_stored_session_is_private_and_only_a_private_one_is_read(wechat, tmp_path):
    session, aside = tmp_path / 'itchat.pkl', tmp_path / 'itchat.pkl.bad'

    def log_in(scans):
        with Program(tmp_path, env=wechat.env()) as program:
            wechat.wait(lambda: wechat.receiving == scans)
            program.wait_output('已登录')
            wechat.ready()
            deadline = time.monotonic() + DEADLINE
            while not session.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            return program.output()

    planted = tmp_path / 'planted'
    log_in(1)
    assert stat.S_IMODE(session.stat().st_mode) == 0o600
    assert 'itchat.pkl' not in log_in(1)  # taken
    session.chmod(0o644)
    assert '改名为 itchat.pkl.bad' in log_in(2) and aside.exists()
    session.write_bytes(b'\x80\x04damaged')
    assert '已损坏' in log_in(3)
    os.replace(session, tmp_path / 'other')
    session.symlink_to(tmp_path / 'other')
    assert '改名为 itchat.pkl.bad' in log_in(4)
    session.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(planted).encode())
    session.chmod(0o666)
    log_in(5)
    assert not planted.exists()
    session.unlink()
    (tmp_path / 'itchat.pkl.new').mkdir(exist_ok=True)  # of a program that was killed as it wrote
    log_in(6)


DISK_FULL = """
import resource, runpy, sys, utils
save = utils.save_checkpoint

def save_checkpoint(*args):  # after the first: writing more than this fails as on a full disk
    kept = save(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
    return kept
utils.save_checkpoint = save_checkpoint
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_full_disk_does_not_end_the_run(images, tmp_path):
    with Program(tmp_path, '--console', '--data', images, before=DISK_FULL) as program:
        status, output = program.types('ti 4 bs 100 lr 0.1\n开始\n')
    assert status == 0 and '完成 4/4 轮' in output and 'Traceback' not in output
    assert len(re.findall('没有写成：.*\n训练继续，以前写的还在', output)) in (
        1,
        2,
    )  # told, but not at every epoch
    [checkpoint] = tmp_path.glob('runs/*/last.zip')
    assert len(utils.read_checkpoint(str(checkpoint))['history']) == 1
    assert not list(tmp_path.glob('runs/*/*.new')) and not list(tmp_path.glob('runs/*/tmp*'))


# ------------------------------------------------------------------ two processes: deaths, and the memory

MORTAL = (
    """
import utils, itchat, os, signal, sys, time
from mxnet import gluon

WHEN, HOW, TIMES = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.makedirs('deaths', exist_ok=True)

def die(when):
    if when == WHEN and len(os.listdir('deaths')) < TIMES:
        os.mkdir(f'deaths/{len(os.listdir("deaths"))}')
        if HOW == 'exit':
            os._exit(3)
        os.kill(os.getppid() if HOW == 'talker' else os.getpid(), getattr(signal, HOW, signal.SIGKILL))

def save_half(path, net, trainer, state, *others, write=utils.write_checkpoint):
    if state['epochs'] == 3:
        with open(path, 'w') as f:
            f.write('half a checkpoint')
        die('saving')
    write(path, net, trainer, state, *others)

def dying(when, function):
    def wrapped(*args):
        answer = function(*args)
        die(when)
        return answer
    return wrapped

utils.write_checkpoint = save_half
utils.Commands.set_values = dying('answering', utils.Commands.set_values)
utils.Commands.stop = dying('stop', utils.Commands.stop)

def nn_train(wechat_name, params):
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': params[0]})
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    print('BEGINS', epoch, os.path.exists('released'), flush=True)
    die('compiling')
    while utils.lock_start() and epoch <= utils.params()[1]:
        for batch in utils.progress(range(5)):
            if (epoch, batch) == (3, 2):
                die('training')
                while 'stop' in WHEN and utils.lock_start() and not os.path.exists('released'):
                    time.sleep(0.01)
                die('stopped')
        if epoch == 3:
            die('testing')
        utils.chat_inf(wechat_name, epoch, 5, 1, range(5), 0.5)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, 0, 0)
    utils.lock_end(wechat_name)
"""
    + MAIN
)


def mortal(folder, when, how='SIGKILL', times=1, **how_run):
    """Return a program whose training process dies, so many times, at a moment."""
    (folder / 'mortal.py').write_text(MORTAL)
    return Program(folder, when, how, str(times), script=str(folder / 'mortal.py'), **how_run)


@pytest.mark.parametrize(
    'how, words',
    [('SIGKILL', 'SIGKILL'), ('SIGSEGV', 'SIGSEGV'), ('SIGABRT', 'SIGABRT'), ('exit', '退出状态 3')],
)
@pytest.mark.parametrize('when', ['training', 'testing', 'saving'])
def test_a_run_goes_on_by_itself_after_a_death(wechat, tmp_path, when, how, words):
    with mortal(tmp_path, when, how, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 5')
        since = len(wechat.heard())
        wechat.ask('开始')
        told = wechat.wait_text('训练的进程没有了', since=since)
        assert words in told and '（完成 2/5 轮）' in told and '自己从检查点接着训练' in told
        places = {'training': '第 3 轮到第 2/5 批', 'testing': '第 3 轮到第 5/5 批', 'saving': '完成 3/5 轮'}
        assert places[when] in told
        assert '完成 5/5 轮' in wechat.wait_text('训练完成', since=since)
        texts = [t for t in wechat.heard(since=since) if isinstance(t, str)]
        epochs = [int(k) for text in texts for k in re.findall(r'^第 (\d)/5 轮', text)]
        assert epochs == ([1, 2, 3, 3, 4, 5] if when == 'saving' else [1, 2, 3, 4, 5])
        assert sum('没有了' in text for text in texts) == 1 and wechat.logins == 1
        [folder] = tmp_path.glob('runs/*')
        state = utils.read_checkpoint(str(folder / 'last.zip'))
        assert [row[0] for row in state['history']] == [1, 2, 3, 4, 5]
        assert state['marks'] == [[2, 'restarted']] and not list(folder.glob('*.new'))
        assert re.findall('BEGINS (.*) ', program.output()) == ['1', '3']


def test_a_death_without_a_checkpoint_or_at_rest_is_told(wechat, tmp_path):
    with mortal(tmp_path, 'compiling', 'SIGSEGV', env=wechat.env()) as program:
        wechat.ready()
        os.kill(trainer_of(program), signal.SIGKILL)
        told = wechat.wait_text('训练的进程没有了')
        assert 'SIGKILL' in told and '发“开始”就从头训练' in told and '检查点' not in told
        assert 'ti = 2' in wechat.ask('参数')  # waits for the new process
        since = len(wechat.heard())
        wechat.ask('开始')
        told = wechat.wait_text('训练的进程没有了', since=since)
        assert 'SIGSEGV' in told and '发“开始”就从头训练' in told
        assert '没有可以继续的训练' in wechat.ask('继续')
        wechat.ask('开始')
        assert '完成 2/2 轮' in wechat.wait_text('训练完成', since=since)


@pytest.mark.parametrize('times, lr', [(1, 0.25), (2, 0.5)])
def test_a_command_is_obeyed_once_though_its_answer_was_interrupted(wechat, tmp_path, times, lr):
    """One that interrupts it twice is told and given up."""
    with mortal(tmp_path, 'answering', times=times, env=wechat.env()):
        wechat.ready()
        since = len(wechat.heard())
        wechat.says('B', 'lr x0.5')
        wechat.wait_text('没有执行' if times == 2 else 'lr：0.5 → 0.25', since=since)
        assert f'lr = {lr}\n' in wechat.ask('参数')
        texts = wechat.heard(since=since)
        assert sum('没有了：' in text for text in texts) == times and len(texts) == times + 2


@pytest.mark.parametrize('when', ['stop', 'stopped'])
def test_a_stop_holds_over_a_death(wechat, tmp_path, when):
    """Whether it comes between the command and its answer, or after that, before the run has ended."""
    with mortal(tmp_path, when, env=wechat.env()):
        wechat.ready()
        wechat.ask('ti 5')
        wechat.ask('开始')
        wait_place(wechat, '第 3 轮到第 2/5 批')
        since = len(wechat.heard())
        wechat.says('B', '停止')
        told = wechat.wait_text('训练的进程没有了', since=since)
        if when == 'stop':
            assert '自己从检查点接着训练' in told
            closing = wechat.wait_text('训练已停止', since=since)
            assert '完成 2/5 轮' in closing
        else:
            assert '发“继续”接着训练' in told and '自己从检查点' not in told
        assert sum(text.startswith('好，这一批') for text in wechat.heard(since=since)) == 1
        wechat.ask('参数')  # waits for the new process
        assert '空闲' in wechat.ask('状态')
        (tmp_path / 'released').touch()
        assert '继续训练\n完成 2/5 轮' in wechat.ask('继续')
        assert '完成 5/5 轮' in wechat.wait_text('训练完成', since=since)


def test_a_death_while_the_network_is_down_is_told_when_it_is_back(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        wechat.breaking = lambda name: 'drop'
        program.wait_output('微信断开了')
        os.kill(trainer_of(program), signal.SIGABRT)
        program.wait_output('SIGABRT')
        wechat.breaking = without_fault
        assert 'SIGABRT' in wechat.wait_text('训练的进程没有了')
        assert 'lr = 0.1' in wechat.ask('lr 0.1')


def test_after_three_deaths_it_is_started_when_somebody_says_so(wechat, tmp_path):
    with mortal(tmp_path, 'compiling', times=4, env=wechat.env()) as program:
        wechat.ready()
        for death in (1, 2, 3, 4):
            since = len(wechat.heard())
            wechat.says('B', '开始')
            told = wechat.wait_text('没有了：', since=since)
            assert ('不再自己启动' in told) == (death >= 3)
            if death == 3:
                assert not others_of(program)
                assert '没有在运行' in wechat.ask('状态') and 'ti = 2' in wechat.ask('参数')
                assert not others_of(program)
        since = len(wechat.heard())
        wechat.ask('lr 0.1')
        wechat.says('B', '开始')
        assert '完成 2/2 轮' in wechat.wait_text('训练完成', since=since)


def test_a_script_that_no_longer_starts_leaves_the_chat(wechat, tmp_path):
    with mortal(tmp_path, 'training', env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 5')
        (tmp_path / 'mortal.py').write_text(MORTAL + 'this is no Python\n')
        wechat.ask('开始')
        told = wechat.wait_text('训练的程序启动不了')
        assert 'SyntaxError' in told and '改好以后' in told and '发“继续”' in told
        assert '没有在运行' in wechat.ask('状态') and '完成 2/5 轮' in wechat.ask('状态')
        since = len(wechat.heard())
        wechat.says('B', '继续')
        assert '“继续”没有执行' in wechat.wait_text('没有执行', since=since)
        (tmp_path / 'mortal.py').write_text(MORTAL)
        assert '完成 2/5 轮' in wechat.ask('继续')
        assert '完成 5/5 轮' in wechat.wait_text('训练完成', since=since)
        assert program.process.poll() is None and wechat.logins == 1


def test_a_process_that_hangs_is_told_and_restarted(wechat, tmp_path):
    with mortal(tmp_path, 'stop', times=0, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 5')
        wechat.ask('开始')
        wait_place(wechat, '第 3 轮到第 2/5 批')
        os.kill(trainer_of(program), signal.SIGSTOP)
        since = len(wechat.heard())
        wechat.says('B', 'lr 0.1')
        assert '重启' in wechat.wait_text('没有回答', since=since)
        assert '重新启动' in wechat.ask('重启')
        told = wechat.wait_text('训练的进程没有了', since=since)
        assert '强行结束了' in told and '第 3 轮到第 2/5 批' in told and '自己从检查点接着训练' in told
        assert 'lr = 0.1' in wechat.wait_text('lr = 0.1', since=since)
        wait_place(wechat, '第 3 轮到第 2/5 批')
        so_far = len(wechat.heard())
        told = wechat.ask('restart') and wechat.wait_text('照“重启”结束了', since=so_far)
        assert '（完成 2/5 轮，第 3 轮到第 3/5 批）' in told  # it had the time to save
        (tmp_path / 'released').touch()
        assert '完成 5/5 轮' in wechat.wait_text('训练完成', since=so_far)


@pytest.mark.parametrize('when', ['at rest', 'stop', 'testing'])
def test_nothing_goes_on_when_nobody_talks_any_more(wechat, images, tmp_path, when):
    """The training process saves a checkpoint and ends; a start by hand tells those who heard of the run."""
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 100000 bs 10')
        if when != 'at rest':
            wechat.ask('开始')
            wechat.wait_text('第 1/100000 轮')
            if when == 'stop':
                wechat.says('B', '停止')
        others = others_of(program)
        assert len(others) == 1
        program.process.kill()
        program.process.wait()
        wait_gone(others)
    wechat.receiving, since = 0, len(wechat.heard())
    with Program(tmp_path, '--data', images, env=wechat.env()):
        wechat.wait(lambda: wechat.receiving)
        if when == 'testing':
            told = wechat.wait_text('程序又启动了', since=since)
            assert re.search(r'从 \d\d:\d\d 到 \d\d:\d\d 它不在', told)
            [checkpoint] = tmp_path.glob('runs/*/last.zip')
            state = utils.read_checkpoint(str(checkpoint))
            assert state['epochs'] >= 1 and f'完成 {state["epochs"]}/100000 轮' in told
        wechat.says('B', '参数')
        wechat.wait_text('ti = 100000', since=since)
        assert wechat.logins == 1
        assert wechat.ask('参数', 'C').startswith('抱歉')  # nobody takes over
        assert when == 'stop' or sum('又启动了' in t for t in wechat.heard()) == (when == 'testing')


@pytest.mark.parametrize('when', ['compiling', 'training', 'testing', 'saving', 'answering', 'stop'])
def test_the_talking_process_may_be_killed_at_any_moment(wechat, tmp_path, when):
    """What was answered is known to the next one, what was not is carried out once; the run can go on."""
    with mortal(tmp_path, when, 'talker', env=wechat.env()) as program:
        wechat.ready()
        others = others_of(program)
        wechat.says('B', 'ti 5')
        if when != 'answering':
            wechat.wait_text('ti = 5')
            wechat.says('B', '开始')
        if when == 'stop':
            wechat.wait_text('第 2/5 轮')
            wechat.says('B', '停止')
        program.process.wait(DEADLINE)
        wait_gone(others)
    wechat.receiving, since = 0, len(wechat.heard())
    with mortal(tmp_path, 'never', env=wechat.env()):
        wechat.wait(lambda: wechat.receiving)
        if when == 'stop':  # it is carried out now
            wechat.wait_text('现在没有训练', since=since)
        told = wechat.wait_text('ti = 5', since=since) if when == 'answering' else wechat.ask('参数')
        assert 'ti = 5' in told
        assert wechat.logins == 1 and wechat.ask('参数', 'C').startswith('抱歉')
        if when != 'answering':
            assert '程序又启动了' in ''.join(map(str, wechat.heard())) or when == 'stop'
            since = len(wechat.heard())
            wechat.ask('开始' if when == 'compiling' else '继续')
            assert '完成 5/5 轮' in wechat.wait_text('训练完成', since=since)


def test_both_killed_and_started_by_hand(wechat, tmp_path):
    """Who may command, the values, the settings are as before; then --supervisor, then --logout."""
    with mortal(tmp_path, 'stop', times=0, env=wechat.env()) as program:
        wechat.ready()
        assert wechat.ask('参数', 'C').startswith('抱歉')
        wechat.ask('lr 0.3 ti 5')
        wechat.ask('报告 2')
        wechat.ask('开始')
        wait_place(wechat, '第 3 轮到第 2/5 批')
        wechat.ask('lr x0.5')
        program.kill()
    wechat.receiving, since = 0, len(wechat.heard())
    with mortal(tmp_path, 'stop', times=0, env=wechat.env()):
        told = wechat.wait_text('程序又启动了', since=since)
        assert '有没训练完的：完成 2/5 轮，发“继续”接着训练' in told
        assert wechat.ask('参数') == '学习率 lr = 0.15\n轮数 ti = 5\n批量 bs = 256\n报告 2'
        assert wechat.ask('状态').endswith('\n报告 2')
        so_far = len(wechat.heard('C'))
        wechat.says('C', '停止')
        assert '完成 2/5 轮' in wechat.ask('继续')
        (tmp_path / 'released').touch()
        wechat.wait_text('训练完成', since=since)
        texts = wechat.heard(since=since)
        assert [k for text in texts if isinstance(text, str) for k in re.findall(r'^第 (\d)/5', text)] == [
            '4'
        ]
        assert len(wechat.heard('C')) == so_far  # refused before


def test_another_supervisor_and_the_end_of_a_login(wechat, tmp_path):
    for options, may, may_not in ((), 'B', 'C'), (('--supervisor', 'C'), 'C', 'B'), ((), 'C', 'B'):
        wechat.receiving = 0
        with Program(tmp_path, *options, env=wechat.env()):
            wechat.wait(lambda: wechat.receiving)
            assert 'lr = 0.5' in wechat.ask('参数', may)
            so_far = len(wechat.heard(may_not))
            wechat.says(may_not, 'lr 0.9')
            assert 'lr = 0.5' in wechat.ask('参数', may)
            assert not any('lr' in text for text in wechat.heard(may_not, so_far))
    with Program(tmp_path, '--logout', env=wechat.env()) as program:
        assert program.process.wait(DEADLINE) == 0
    wechat.receiving = 0
    with Program(tmp_path, env=wechat.env()):
        wechat.wait(lambda: wechat.receiving)
        assert 'lr = 0.5' in wechat.ask('参数', 'B') and wechat.ask('参数', 'C').startswith('抱歉')


SENDING = """
    utils.lock_start()
    for i in range(2000):
        utils.chat_send(f'letter {i}.')
    print('ALL', flush=True)
    time.sleep(3600)
"""


def test_two_thousand_letters_outlive_both_processes(wechat, tmp_path):
    script = own_script(tmp_path, SENDING, head='utils.options.retry = 0.1')
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('letter 0')
        wechat.breaking = lambda name: 1205 if name == 'webwxsendmsg' else None
        program.wait_output('ALL')
        passing = [None] * 5
        wechat.breaking = lambda name: (
            1205 if name == 'webwxsendmsg' and not passing else name == 'webwxsendmsg' and passing.pop()
        )
        wechat.wait_text('letter [1-9]')
        program.kill()
        wechat.breaking = without_fault
    so_far = ''.join(text for text in wechat.heard())
    assert so_far.count('letter ') < 2000
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.wait_text('letter 1999')
    told = [int(n) for text in wechat.heard() for n in re.findall(r'letter (\d+)\.', text)]
    twice = [b for a, b in zip(told, told[1:]) if b <= a]
    assert sorted(set(told)) == list(range(2000)) and len(twice) <= 1  # what was on its way at the kill


@pytest.mark.parametrize('who', ['trains', 'both'])
def test_five_hundred_commands_and_a_death(wechat, tmp_path, who):
    """Each is obeyed once: every one multiplies lr, in a way that shows how often."""
    lr, times = 1.0, 0
    with mortal(tmp_path, 'never', env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('lr 1')
        for i in range(500):
            factor = (1.003, 1.004)[i % 2]  # the same words twice in an outage are one command
            wechat.says('B', f'lr x{factor}')
            lr = float(f'{lr * factor:.6g}')
            if i in (100, 337) and who == 'trains':
                wechat.wait(lambda i=i: wechat.seen > i - 50)
                with contextlib.suppress(ProcessLookupError):  # it has just been killed
                    os.kill(trainer_of(program), signal.SIGKILL)
        if who == 'both':
            wechat.wait_text('lr：1.1')
            program.kill()
        else:
            wechat.says('B', '早停 7')
            wechat.wait_text('早停 0')
            assert f'lr = {lr:g}\n' in wechat.ask('参数')
            times = sum(text.count('lr：') for text in wechat.heard())
            assert times == 500
    if who == 'both':
        wechat.receiving = 0
        with mortal(tmp_path, 'never', env=wechat.env()):
            wechat.says('B', '早停 7')
            wechat.wait_text('早停 0')
            assert f'lr = {lr:g}\n' in wechat.ask('参数')
            assert wechat.logins == 1


def test_a_copy_of_the_memory_at_any_moment_can_be_started_from(wechat, tmp_path):
    copies = []
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        for i in range(1, 40):
            wechat.says('B', f'ti {i}')
            with contextlib.suppress(FileNotFoundError):
                copies.append((tmp_path / '.wechat_train.db').read_bytes())
        wechat.wait_text('ti = 39')
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143
        copies.append((tmp_path / '.wechat_train.db').read_bytes())
        assert not list(tmp_path.glob('.wechat_train.db-*'))
    assert stat.S_IMODE((tmp_path / '.wechat_train.db').stat().st_mode) == 0o600
    for number, content in enumerate([*copies[::19], copies[-1], copies[-1][:-3000], b'damaged' * 1000]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / '.wechat_train.db').write_bytes(content)
        (folder / '.wechat_train.db').chmod(0o600)
        with Program(folder, '--console') as program:
            status, output = program.types('参数\n')
        assert status == 0 and re.search(r'ti = \d', output) and 'Traceback' not in output
        assert ('.wechat_train.db 已损坏' in output) == (folder / '.wechat_train.db.bad').exists()
        if content == copies[-1]:
            assert 'ti = 39' in output
    assert (folder / '.wechat_train.db.bad').exists()


@pytest.mark.parametrize('how', ['others write', 'link'])
def test_a_memory_that_is_not_ones_own_is_set_aside(tmp_path, how):
    with Program(tmp_path, '--console') as program:
        assert 'ti = 7' in program.types('ti 7\n')[1]
    path = tmp_path / '.wechat_train.db'
    if how == 'link':
        path.rename(tmp_path / 'other')
        path.symlink_to(tmp_path / 'other')
    else:
        path.chmod(0o666)
    with Program(tmp_path, '--console') as program:
        status, output = program.types('参数\n')
    assert status == 0 and '.wechat_train.db 不是只有你能读写的文件' in output and 'ti = 2' in output


def test_the_lock_is_no_way_to_empty_a_file(tmp_path):
    (tmp_path / 'precious').write_text('precious')
    (tmp_path / '.wechat_train.lock').symlink_to(tmp_path / 'precious')
    with Program(tmp_path, '--console') as program:
        assert program.types('参数\n')[0] == 0
    assert (tmp_path / 'precious').read_text() == 'precious'


FORKING = """
    child = os.fork()
    if not child:
        time.sleep(3600)
    print('CHILD', child, os.getcwd(), threading.current_thread() is threading.main_thread(), flush=True)
    woken, wake = os.pipe()
    other = os.fork()
    if not other:  # a signal comes to another thread, as it may in a DataLoader's worker
        threading.Thread(target=time.sleep, args=(3600,)).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.write(wake, b'!')
        time.sleep(3600)
    os.read(woken, 1)
    os.kill(other, signal.SIGTERM)
    print('ENDED', os.waitpid(other, 0)[1], flush=True)
    os.chdir('/')
    data = gluon.data.ArrayDataset(list(range(20)))
    loader = gluon.data.DataLoader(data, 5, num_workers=1)
    utils.lock_start()
    print('SUM', sum(float(batch.sum().asscalar()) for batch in loader), flush=True)
    utils.chat_inf(wechat_name, 1, 1, 1, [0], 0.5)
    while utils.lock_start():
        time.sleep(0.01)
"""


def test_what_works_in_a_script_works_in_nn_train(wechat, tmp_path):
    """The main thread, workers, another folder; nothing that it has started outlives it."""
    script = own_script(
        tmp_path, FORKING, head='import signal\nfrom mxnet import gluon\nprint("HEAD", flush=True)'
    )
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('第 1/2 轮')
        assert program.output().count('HEAD') == 1 and 'SUM 190.0' in program.output()
        assert f'ENDED {signal.SIGTERM:d}' in program.output()
        child = int(re.search(f'CHILD (\\d+) {tmp_path} True', program.output())[1])
        wechat.wait(lambda: list(tmp_path.glob('runs/*/log.csv')))
        assert (tmp_path / 'itchat.pkl').exists()
        os.kill(trainer_of(program), signal.SIGKILL)
        wechat.wait_text('没有了')
        wait_gone([child])
        program.kill()
    with Program(tmp_path, env=wechat.env(), script=script):  # nobody holds a lock
        assert 'lr = 0.1' in wechat.ask('lr 0.1')


def test_the_process_that_talks_is_small(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        for pid, trains in ((program.process.pid, False), (trainer_of(program), True)):
            with open(f'/proc/{pid}/maps') as f:
                libraries = f.read()
            assert ('libmxnet' in libraries) == ('numpy' in libraries) == trains
        with open(f'/proc/{program.process.pid}/status') as f:
            assert int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) < 60 * 1024


ITCHATS = """
@itchat.msg_register(['Picture', 'Text'])
def see(msg):
    if msg['Type'] == 'Picture':
        return f'saw {len(msg.text())} bytes of {msg.user.nickName}'
    friend = itchat.search_friends(name='C')[0]
    friend.send('from B: ' + msg.text)
    answer = itchat.send('own', 'filehelper')
    print('ALSO', answer['BaseResponse']['Ret'], len(itchat.get_friends()), flush=True)
"""


def test_the_scripts_own_handlers_and_calls(wechat, tmp_path):
    wechat.on_webwxgetmsgimg = lambda request: b'12345'
    usual = wechat.respond
    wechat.respond = lambda host, path, *rest: (
        (200, {}, b'12345') if path.endswith('webwxgetmsgimg') else usual(host, path, *rest)
    )
    script = own_script(tmp_path, 'utils.lock_start()', head=ITCHATS)
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        wechat.says('B', '', MsgType=3)
        wechat.wait_text('saw 5 bytes of B')
        wechat.says('B', 'hello')
        wechat.wait_text('from B: hello', 'C')
        wechat.wait_text('own', 'filehelper')
        program.wait_output(f'ALSO 0 {len(wechat.friends) + 1}')
        assert 'lr = 0.1' in wechat.ask('lr 0.1')  # a command is still a command
        assert len(wechat.heard('C')) == 1


def test_a_terminal_that_nobody_reads_holds_up_nothing(wechat, images, tmp_path):
    """Training, chat, SIGTERM; and SIGHUP twice at once is one."""
    script = own_script(
        tmp_path,
        """
        while utils.lock_start():
            print('x' * 1000)
            utils.chat_inf(wechat_name, utils.run.epochs + 1, 1, 1, [0], 0.5)
        """,
    )
    master, slave = os.openpty()
    env = {**os.environ, **wechat.env(), 'PYTHONPATH': HERE, 'TERM': 'xterm'}
    process = subprocess.Popen(
        [sys.executable, script], cwd=tmp_path, env=env, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    try:
        wechat.ready()
        wechat.ask('ti 100000')
        wechat.ask('安静')
        wechat.ask('开始')
        [log] = wechat.wait(lambda: list(tmp_path.glob('runs/*/log.csv')))
        deadline = time.monotonic() + DEADLINE
        while len(log.read_text().splitlines()) < 300:  # far more than a terminal holds
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.wait(DEADLINE) == 129
        assert wechat.wait_text('训练已停止')
        lines = os.read(master, 10**6).decode(errors='replace')
        assert 'x' * 50 in lines
    finally:
        process.kill()
        os.close(master)


def test_ctrl_c_while_it_is_being_imported_is_no_traceback(tmp_path):
    """From the moment at which it has started the process that trains; before that it is Python's own."""
    for delay in (0, 0.1, 0.3):
        with Program(tmp_path, '--console') as program:
            trainer_of(program)
            time.sleep(delay)  # the moment is the point: any one will do
            program.process.send_signal(signal.SIGINT)
            assert program.process.wait(DEADLINE) == 130
            assert 'Traceback' not in program.output()


def test_a_program_that_trains_first_has_a_talking_child(wechat, tmp_path):
    """`python -c`, a debugger, another module: its death is told, too, and its signals end all in order."""
    script = own_script(tmp_path, 'utils.lock_start()\nwhile utils.lock_start(): time.sleep(0.01)')
    code = 'import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    with Program(tmp_path, env=wechat.env(), python=('-c', code), script=script) as program:
        wechat.ready()
        wechat.ask('开始')
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(DEADLINE) == 130
        assert wechat.wait_text('训练已停止') and '█' in program.output()
    wechat.receiving = 0
    with Program(tmp_path, env=wechat.env(), python=('-c', code), script=script) as program:
        wechat.ready()
        wechat.ask('开始')
        others = others_of(program)
        program.process.kill()
        told = wechat.wait_text('训练的进程没有了')
        assert '程序结束' in told
        wait_gone(others)


def test_a_carrier_that_lacks_something_says_so():
    class Pigeon(utils.Client):
        pass

    for name in ('auto_login', 'run', 'send_msg', 'send_image', 'revoke', 'create_chatroom'):
        with pytest.raises(NotImplementedError):
            getattr(Pigeon(), name)()
    assert Pigeon().search_friends(name='x') == []


ONE_DEATH = """
    from mxnet import gluon
    def die(when):
        if os.path.exists(when):
            os.remove(when)
            os.kill(os.getpid(), 9)
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd')
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    die('before')
    while utils.lock_start() and epoch <= params[1]:
        for batch in utils.progress(range(5)):
            itchat.get_friends()
            while os.path.exists('calls') and epoch == 2:
                itchat.send_msg('called', 'filehelper')
                if not utils.running:
                    break
        utils.chat_inf(wechat_name, epoch, 5, 1, range(5), 0.5)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, 0, 0)
    die('after')
    utils.lock_end(wechat_name)
"""


def test_a_run_goes_on_from_its_own_checkpoint_alone(wechat, tmp_path):
    script = own_script(tmp_path, ONE_DEATH)
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        (tmp_path / 'after').touch()
        wechat.ask('开始')
        assert '自己从检查点接着训练' in wechat.wait_text('没有了')
        assert '完成 2/2 轮' in wechat.wait_text('训练完成')  # nothing was left to train
        (tmp_path / 'before').touch()
        wechat.ask('ti 4')
        since = len(wechat.heard())
        wechat.ask('开始')
        told = wechat.wait_text('没有了', since=since)
        assert '那时完成 0/4 轮' in told and '自己从检查点' not in told
        assert '空闲' in (wechat.ask('参数') and wechat.ask('状态'))
        assert not any('第 3/4 轮' in str(text) for text in wechat.heard(since=since))


def test_what_calls_itchat_when_nobody_talks_saves_its_checkpoint(wechat, tmp_path):
    script = own_script(tmp_path, ONE_DEATH)
    (tmp_path / 'calls').touch()
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('called', 'filehelper')
        others = others_of(program)
        program.process.kill()
        program.process.wait()
        wait_gone(others)
    [checkpoint] = tmp_path.glob('runs/*/last.zip')
    state = utils.read_checkpoint(str(checkpoint))
    assert (state['epochs'], state['batch']) == (1, 1)


def test_a_talker_that_is_killed_at_once_leaves_nothing(wechat, tmp_path):
    for _ in range(3):
        with Program(tmp_path, env=wechat.env()) as program:
            deadline = time.monotonic() + DEADLINE
            while not (others := others_of(program)):
                assert time.monotonic() < deadline
            program.process.kill()
            wait_gone(others)
    names = ('wechat_train.py', str(tmp_path))
    assert not [row for row in process_table() if str(tmp_path) in row[3] and names[0] in row[3]]
    assert wechat.logins == 0


def test_to_end_or_to_restart_what_is_just_starting(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        assert wechat.ask('重启') == '好，重新启动训练的进程。'
        wechat.wait_text('照“重启”结束了')
        wechat.says('B', '重启')
        assert 'lr = 0.1' in wechat.ask('参数') or wechat.ask('lr 0.1')
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        os.kill(trainer_of(program), signal.SIGKILL)
        wechat.wait_text('SIGKILL')
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(DEADLINE) == 130
        assert not any('启动不了' in text for text in wechat.heard())


def test_the_end_does_not_wait_for_a_handler(wechat, tmp_path):
    head = (
        "@itchat.msg_register('Text')\ndef see(msg):\n    print('SEEN', flush=True)\n    time.sleep(1000)\n"
    )
    script = own_script(tmp_path, 'utils.lock_start()', head=head)
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        for _ in range(50):
            wechat.says('C', '你好')
        program.wait_output('SEEN')
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143


def test_odd_names_and_paths(wechat, tmp_path):
    wechat.nicknames['B'] = 'B\ud83d'
    head = "@itchat.msg_register('Text')\ndef see(msg):\n    itchat.send_msg('own.py', 'filehelper')\n"
    head += "    os.chdir('/')\n    itchat.send('@img@' + msg.text, msg['FromUserName'])\n"
    script = own_script(tmp_path, 'utils.lock_start()', head=head)
    Image.new('L', (8, 8)).save(tmp_path / 'x.png')
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        wechat.says('B', f'{tmp_path}/x.png')
        assert wechat.wait_text('own.py', 'filehelper') == 'own.py'
        assert wechat.wait_picture().shape == (8, 8)


@pytest.mark.parametrize(
    'foreign',
    [
        'CREATE TABLE setting (x)',
        "CREATE TABLE setting (name, value); INSERT INTO setting VALUES ('alive', 'no JSON')",
    ],
)
def test_a_memory_of_another_program_is_set_aside(tmp_path, foreign):
    path = tmp_path / '.wechat_train.db'
    path.touch(0o600)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(foreign)
    with Program(tmp_path, '--console') as program:
        status, output = program.types('参数\n')
    assert status == 0 and '改名为 .wechat_train.db.bad' in output and 'ti = 2' in output


def test_a_memory_that_is_removed_is_written_anew(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        for path in tmp_path.glob('.wechat_train.db*'):
            path.unlink()
        wechat.ask('lr 0.3')
        deadline = time.monotonic() + DEADLINE
        while not (tmp_path / '.wechat_train.db').exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143
    wechat.receiving = 0
    with Program(tmp_path, env=wechat.env()):
        assert wechat.ask('参数', 'C').startswith('抱歉')
        assert 'lr = 0.3' in wechat.ask('参数')


def test_a_full_disk_does_not_cost_the_memory(wechat, tmp_path):
    folder = tmp_path / 'small'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=400k', 'none', str(folder)]
    if os.getuid() or shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('nothing can be mounted here')
    try:
        for times in range(2):
            wechat.receiving = 0
            with Program(folder, env=wechat.env(), log='../output.txt') as program:
                wechat.wait(lambda: wechat.receiving)
                assert 'lr' in wechat.ask('参数' if times else 'lr 0.3')
                if times:
                    assert 'lr = 0.3' in wechat.ask('参数') and '已损坏' not in program.output()
                    assert wechat.ask('参数', 'C').startswith('抱歉')
                program.process.send_signal(signal.SIGTERM)
                assert program.process.wait(DEADLINE) == 143
            with contextlib.suppress(OSError), open(folder / 'full', 'wb', 0) as f:
                while f.write(b'x' * 100):
                    pass
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


# --------------------------------------------------- the machine, what was printed, the last run

TAKING_MEMORY = """
    import numpy as np
    from mxnet import gluon
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd')
    utils.load_checkpoint(net, trainer)
    utils.lock_start()
    utils.chat_inf(wechat_name, 1, 1, 1, [0], 0.5)
    utils.save_checkpoint(net, trainer, 1, 0, 0, {'large': np.zeros(2**17)})
    held = b''
    while utils.lock_start():
        wanted = int(open('hold').read()) if os.path.exists('hold') else 0
        if wanted != len(held):
            held = b''
            held = b'x' * wanted
        time.sleep(0.01)
"""
NVML = """
import json, pynvml
from types import SimpleNamespace

def read(gpu):
    assert gpu == 3
    with open('gpu.json') as f:
        return SimpleNamespace(**json.load(f))

pynvml.nvmlInit = lambda: None
pynvml.nvmlDeviceGetHandleByIndex = lambda number: number
pynvml.nvmlDeviceGetUtilizationRates = pynvml.nvmlDeviceGetMemoryInfo = read
pynvml.nvmlDeviceGetTemperature = lambda gpu, kind: read(gpu).heat
""" + QUICK.replace('sys.argv =', "utils.gpu_number = lambda: '3'\nsys.argv =")


def put(path, content):
    """Write a file that somebody reads meanwhile."""
    path.with_suffix('.new').write_text(content)
    os.replace(path.with_suffix('.new'), path)


def amounts(text):
    """Return the amounts in a text, in bytes."""
    return [
        float(number) * {'MB': 2**20, 'GB': 2**30}[unit]
        for number, unit in re.findall(r'([\d.]+) ([MG]B)', text)
    ]


def until_told(wechat, pattern, true):
    """Ask 状态 until true(what the pattern finds in the answer), as it is a second old; return the answer."""
    deadline = time.monotonic() + DEADLINE
    while True:
        status = wechat.ask('状态')
        found = re.search(pattern, status)
        if found and true(*found.groups()):
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


def file_number(path, pattern):
    with open(path) as f:
        return int(re.search(pattern, f.read(), re.M)[1])


def test_the_state_of_the_machine(wechat, tmp_path):
    """Its numbers are the system's own; a GPU that is too hot is told once, and again after it was not."""
    gpu = {'gpu': 7, 'used': 8 << 20, 'total': 9 << 20}
    put(tmp_path / 'gpu.json', json.dumps({**gpu, 'heat': 61}))
    script = own_script(tmp_path, TAKING_MEMORY)
    with Program(tmp_path, env=wechat.env(), script=script, before=NVML) as program:
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('第 1/')
        trainer = f'/proc/{trainer_of(program)}/status'

        def near(memory, disk, load):
            used, left, total = amounts(memory)
            kilobytes = file_number('/proc/meminfo', r'^MemAvailable: +(\d+)')
            room = os.statvfs(tmp_path)
            return (
                used == pytest.approx(file_number(trainer, r'VmRSS:\s+(\d+)') * 1024, rel=0.05)
                and (left == pytest.approx(kilobytes * 1024, rel=0.05) or total < os.sysconf('SC_PHYS_PAGES'))
                and amounts(disk)[0] == pytest.approx(room.f_bavail * room.f_frsize, rel=0.05)
                and float(load) == pytest.approx(os.getloadavg()[0], abs=0.3)
            )

        lines = (
            r'内存：训练的进程 (.*)\n磁盘还剩 (.*)，负载 ([\d.]+)/\d+ 核\nGPU 使用率 7%，显存 8/9 MB，61 °C'
        )
        assert len(until_told(wechat, lines, near).split('\n')) < 20
        for heat, times in ((91, 1), (99, 1), (89, 1), (91, 1), (60, 1), (95, 2)):
            put(tmp_path / 'gpu.json', json.dumps({**gpu, 'heat': heat}))
            until_told(wechat, rf'，({heat}) °C', lambda _: True)
            if heat > 90:
                wechat.wait(lambda n=times: sum('GPU 太热了' in text for text in wechat.heard()) >= n)
            assert sum('GPU 太热了' in text for text in wechat.heard()) == times
        assert any('GPU 太热了：95 °C（主机 ' in text for text in wechat.heard())
        assert file_number(f'/proc/{program.process.pid}/status', r'VmHWM:\s+(\d+)') < 60 * 1024
        with open(f'/proc/{program.process.pid}/maps') as f:
            assert 'numpy' not in f.read()


@pytest.fixture
def small_group():
    """A control group whose processes have 900 MB together: its folder, the name of its file of use."""
    version_1 = os.path.isdir('/sys/fs/cgroup/memory')
    folder = f'/sys/fs/cgroup{"/memory" * version_1}/test-{os.getpid()}'
    limit, used = ('limit_in_bytes', 'usage_in_bytes') if version_1 else ('max', 'current')
    try:
        os.mkdir(folder)
        with open(f'{folder}/memory.{limit}', 'r+') as f:
            f.write(f'{900 << 20}')
    except OSError:
        pytest.skip('no control group can be made here')
    yield folder, f'memory.{used}'
    deadline = time.monotonic() + DEADLINE
    while os.path.exists(folder):
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):  # somebody is still in it
            os.rmdir(folder)
        time.sleep(0.05)


def test_warnings_come_before_the_death(wechat, tmp_path, small_group):
    """Of memory that runs out in a control group, of a disk: once, and again after it was good."""
    group, used = small_group
    (tmp_path / 'runs').mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=9m', 'none', str(tmp_path / 'runs')]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('nothing can be mounted here')

    def join():
        with open(f'{group}/cgroup.procs', 'w') as f:
            f.write(str(os.getpid()))

    def left():
        files = max(map(int, re.findall(r'inactive_file (\d+)', open(f'{group}/memory.stat').read())))
        return (900 << 20) - int(open(f'{group}/{used}').read()) + files

    def told(words):
        return [text for text in wechat.heard() if words in text]

    try:
        script = own_script(tmp_path, TAKING_MEMORY)
        with Program(tmp_path, env=wechat.env(), script=script, preexec_fn=join):
            wechat.ready()
            wechat.ask('开始')
            wechat.wait_text('第 1/')
            memory = r'内存：.*还剩 (.*)/900 MB'
            until_told(wechat, memory, lambda text: amounts(text) == [pytest.approx(left(), abs=20 << 20)])
            held = left() - (60 << 20)
            put(tmp_path / 'hold', str(held - (110 << 20)))
            until_told(wechat, memory, lambda text: 90 << 20 < amounts(text)[0] < 230 << 20)
            assert not told('内存快用完了')  # a tenth of it is left
            for times in (1, 2):
                put(tmp_path / 'hold', str(held))
                wechat.wait(lambda n=times: len(told('内存快用完了')) >= n)
                put(tmp_path / 'hold', str(held + (20 << 20)))  # it goes on, and is not told again
                until_told(wechat, memory, lambda text: amounts(text)[0] < 52 << 20)
                put(tmp_path / 'hold', '0')
                until_told(wechat, memory, lambda text: amounts(text)[0] > 200 << 20)
                assert len(told('内存快用完了')) == times
            [(mine, rest, whole)] = [amounts(text) for text in told('内存快用完了')[:1]]
            assert whole == 900 << 20 and rest < 90 << 20 and held < mine < 900 << 20
            [checkpoint] = tmp_path.glob('runs/*/last.zip')
            for times in (1, 2):
                room = os.statvfs(tmp_path / 'runs')
                fill = room.f_bavail * room.f_frsize - 2 * checkpoint.stat().st_size
                (tmp_path / 'runs' / 'fill').write_bytes(bytes(fill))
                wechat.wait(lambda n=times: len(told('磁盘快满了')) >= n)
                assert amounts(told('磁盘快满了')[-1])[0] == pytest.approx(
                    2 * checkpoint.stat().st_size, rel=0.5
                )
                (tmp_path / 'runs' / 'fill').unlink()
                until_told(wechat, '磁盘还剩 (.*)，', lambda text: amounts(text)[0] > 5 << 20)
                assert len(told('磁盘快满了')) == times
            assert not told('没有了')
    finally:
        subprocess.run(['umount', '-l', str(tmp_path / 'runs')], check=True)


PRINTING_MUCH = """
    lines = [f'{"é" * (n % 90)} line {n}' for n in range(150)]
    for line in lines:
        print(line)
    print('a bar 1%\\ra bar 50%\\r\\x1b[31ma bar 100%\\x1b[0m')
    print('colu\\tmn', 'see https://me:password@host/path?skey=1&sid=2')
    utils.lock_start()
    if MODE == 'dies':
        print('last words, no end of line', end='', flush=True)
        os.kill(os.getpid(), 9)
    utils.chat_inf(wechat_name, 1, 1, 1, [0], 0.5)
    if MODE == 'fails':
        def even(n):
            odd(n - 1) if n else [].remove('the first')
        def odd(n):
            even(n - 1)
        try:
            even(30)
        except ValueError:
            utils.accuracy(nd.zeros((2, 3)), nd.zeros(5))
    utils.lock_end(wechat_name)
"""


def test_the_last_lines_that_were_printed(wechat, tmp_path):
    """In memory and on the disk, after an error all of it, after each kind of death; and nothing secret."""
    head = "from mxnet import nd\nMODE = open('mode').read()"
    script, mode = own_script(tmp_path, PRINTING_MUCH, head=head), tmp_path / 'mode'
    mode.write_text('fails')
    printed = [f'{"é" * (n % 90)} line {n}' for n in range(150)]
    printed += ['a bar 100%', 'colu    mn see https://...@host/path?...']

    def run(pattern):
        so_far = len(wechat.heard())
        wechat.ask('开始')
        return wechat.wait_text(pattern, since=so_far)

    def whole(text):
        """Ask for lines; return them, put together again."""
        so_far = len(wechat.heard())
        first = wechat.ask(text)
        parts = int((re.match(r'（1/(\d+)）', first) or [0, 1])[1])
        wechat.wait(lambda: len(wechat.heard()) >= so_far + parts)
        return '\n'.join(re.sub(r'\A（\d+/\d+）\n', '', part) for part in wechat.heard()[so_far:]).split('\n')

    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        assert wechat.ask('日志') == '还没有打印过什么。'
        told = run('训练出错')
        assert re.search(r'ValueError: 精度.*\nown\.py 第 \d+ 行：utils\.accuracy\(nd.*\n完成', told)
        lines = whole('log 3')  # all of both tracebacks
        assert lines[0] == 'Traceback (most recent call last):' and len(lines) > 60
        assert lines[-1].startswith('ValueError: 精度') and 'During handling' in '\n'.join(lines)
        [log] = tmp_path.glob('runs/*/output.log')
        assert (
            log.read_text().split('\n')[:-1] == [*printed, *lines]
            and stat.S_IMODE(log.stat().st_mode) == 0o600
        )
        assert 'skey' in program.output() and '已发送给' in program.output()
        mode.write_text('')
        wechat.ask('重启')
        wechat.wait_text('照“重启”结束了')
        run('训练完成')
        assert whole('日志') == printed[-20:] and whole('日誌 2') == printed[-2:]
        assert whole('log 101') == ['（最多 100 行）', *printed[-100:]]
        assert whole('日志 3\n参数')[:3] == printed[-3:]
        mode.write_text('dies')
        wechat.ask('重启')
        wechat.wait(lambda: sum('照“重启”结束了' in text for text in wechat.heard()) == 2)
        run('SIGKILL')
        assert whole('日志 2')[-1] == 'last words, no end of line'
        logs = sorted(tmp_path.glob('runs/*/output.log'))
        assert [log.read_text().count('last words') for log in logs] == [0, 0, 1]
        program.kill()
    wechat.receiving = 0
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        assert whole('日志 1') == ['last words, no end of line']


def test_after_a_restart_it_is_the_last_run_that_is_spoken_of(wechat, images, tmp_path):
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 2 lr 0.1 bs 100')
        wechat.ask('开始')
        end = wechat.wait_text('训练完成')
        wechat.wait_picture()
        pictures = []
        for text in ('曲线', '错图'):
            so_far = len(wechat.heard())
            wechat.says('B', text)
            pictures.append(wechat.wait_picture(since=so_far))
        program.kill()
    [folder] = tmp_path.glob('runs/*')
    for name in ('curve.png', 'mistakes.png'):
        (folder / name).unlink()
    wechat.receiving = 0
    with Program(tmp_path, '--data', images, env=wechat.env()) as program:
        wechat.ready()
        for text, before in zip(('曲线', '错图'), pictures):
            so_far = len(wechat.heard())
            wechat.says('B', text)
            assert np.array_equal(wechat.wait_picture(since=so_far), before)
        status = wechat.ask('状态').split('\n')
        assert status[0] == '空闲' and re.fullmatch(
            r'上次，\d\d-\d\d \d\d:\d\d：完成 2/2 轮，完成', status[1]
        )
        assert status[2] == re.search('最好的.*', end)[0]
        os.kill(trainer_of(program), signal.SIGSTOP)  # 状态 of a process that cannot answer
        wechat.ask('重启')
        so_far = len(wechat.heard())
        wechat.says('B', '状态')
        wechat.wait_text('完成 2/2 轮', since=so_far)


# ------------------------------------------------------------------------------ the terminal is a chat

PRINTING = """
    while utils.lock_start() and not os.path.exists('enough'):
        for i in utils.progress(range(20)):
            print('LINE', i)
            time.sleep(0.01)
        utils.chat_inf(wechat_name, utils.run.epochs + 1, 1, 1, [0], 0.5)
    print('HALF', end='', flush=True)
    while not os.path.exists('whole'):
        time.sleep(0.01)
    print(' WHOLE')
    utils.lock_end(wechat_name)
"""


def test_the_prompt_stays_while_much_is_printed(tmp_path):
    """What is typed, pasted, completed, said before; a half line, the bar, the memory, the modes."""
    with AtTerminal(tmp_path, '--console', script=own_script(tmp_path, PRINTING)) as program:
        program.sees('^>$')
        assert not program.echoes()
        program.press('ti 99999\r', '^> ti 99999.*ti = 99999.*^>$')
        since = program.press('开始\r', '^> 开始.*LINE 3.*^>\n第 1 轮:')
        program.press('lr 0.0', r'^> lr 0\.0\n第 \d+ 轮:')
        program.press('', r'(LINE 19.*){3}^> lr 0\.0\n第 \d+ 轮: .*/20.*\Z')  # the bar is below it
        program.press('25\r', r'^> lr 0\.025\n.*lr = 0\.025')
        (tmp_path / 'enough').touch()
        program.sees('^>\nHALF', since)
        (tmp_path / 'whole').touch()
        program.sees('^HALF WHOLE\n.*训练完成.*^>$', since)
        lines = [line for line in program.output(since).split('\n') if 'LINE' in line]
        assert lines == [f'LINE {i % 20}' for i in range(len(lines))]  # none lost, none glued to another
        program.press('stat\t\r', '^> status\n空闲.*^>$')
        program.press('\x1b[A\r', '^> status\n空闲.*^>$')
        since = program.press('\x1b[200~ti 7\nlr 0.5\n状态\x1b[201~', '^> ti 7\nlr 0.5\n状态$')
        program.press('\r', 'ti = 7.*空闲.*ti = 7.*^>$')
        program.press('什么\r', '^> 什么\n没有这个命令')
        with open(f'/proc/{program.process.pid}/status') as f:
            assert int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) < 60 * 1024
        program.press('\x04')
        assert program.process.wait(DEADLINE) == 0 and program.echoes()
    with AtTerminal(tmp_path, '--console', script=own_script(tmp_path, PRINTING)) as program:
        program.sees('^>$')
        program.press('\x1b[A', '^> ti 7\nlr 0.5')  # what was said in the program before
        program.press('\x03')
        assert program.process.wait(DEADLINE) == 130 and program.echoes()
        assert not re.search('^>', program.output(), re.M)


@pytest.mark.parametrize('term', ['xterm', 'dumb'])
def test_what_is_typed_beside_a_chat_is_the_owners(wechat, tmp_path, term):
    """It is answered in the terminal, also without a network; the reports go to the owner's phone."""
    script = own_script(tmp_path, WAITING)
    with AtTerminal(tmp_path, env=wechat.env(), script=script, term=term, before=QUICK) as program:
        wechat.wait(lambda: wechat.receiving)
        program.sees('^>$' if term == 'xterm' else '已登录')
        if term == 'xterm':
            program.press('\x04')  # Ctrl-D ends nothing
        program.press('ti 7\n', 'ti = 7')
        program.press('lr 0.3\n', 'lr = 0.3')
        program.press('你好\n', '没有这个命令')
        assert wechat.sent == []
        wechat.breaking = lambda name: 'drop'
        program.sees('微信断开了')
        program.press('开始\n', '开始训练\n.*lr = 0.3')
        wechat.breaking = lambda name: None
        program.press('状态\n', '训练中')
        program.press('停止\n', '这一批算完就停')
        assert wechat.wait_text('', 'filehelper').startswith('训练已停止')
        wechat.says('B', 'lr 0.2')  # the owner has commanded: others need the owner's word
        wechat.wait_text('想下命令', 'filehelper')
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(DEADLINE) == 130 and program.echoes()


def test_a_shells_jobs(wechat, tmp_path):
    """In the background it goes on; after Ctrl-Z and fg, what stood at the prompt is there again."""
    shell = "import os; os.execlp('sh', 'sh', '-im')"
    env = {**wechat.env(), 'PS1': 'SHELL$ ', 'ENV': '/dev/null', 'PYTHONPATH': HERE}
    with AtTerminal(tmp_path, env=env, python=('-c', shell), script='') as program:
        program.sees('SHELL')
        program.press(f'{sys.executable} {HERE}/wechat_train.py &\n')
        wechat.ready()
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        program.press('jobs\n', 'Running')
        program.press('fg\n', '^>$')
        program.press('lr 0.0', r'^> lr 0\.0')
        for _ in range(2):
            program.press('\x1a', 'Stopped')
            program.press('fg\n', r'^> lr 0\.0')
        modes = termios.tcgetattr(program.master)
        modes[3] |= termios.ECHO | termios.ICANON  # as a shell does after kill -STOP
        termios.tcsetattr(program.master, termios.TCSANOW, modes)
        deadline = time.monotonic() + DEADLINE
        while program.echoes():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.press('25\r', r'lr = 0\.025')
        program.press('\x03', 'SHELL')
        program.press('echo STATUS $?\n', 'STATUS 130')


@pytest.mark.parametrize('signals', [1, 2])
def test_a_prompt_that_nobody_reads_holds_up_nothing(wechat, images, tmp_path, signals):
    """Ctrl-S; then Ctrl-C. The terminal has its modes back, though it does not read."""
    script = own_script(
        tmp_path,
        """
        while utils.lock_start():
            print('x' * 1000)
            utils.chat_inf(wechat_name, utils.run.epochs + 1, 1, 1, [0], 0.5)
        """,
    )
    with AtTerminal(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        program.sees('^>$')
        wechat.ask('ti 100000')
        wechat.ask('安静')
        program.press('\x13')
        wechat.ask('开始')
        [log] = wechat.wait(lambda: list(tmp_path.glob('runs/*/log.csv')))
        deadline = time.monotonic() + DEADLINE
        while len(log.read_text().splitlines()) < 300:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        assert not program.echoes()
        program.process.send_signal(signal.SIGTERM)
        if signals == 2:
            os.kill(trainer_of(program), signal.SIGSTOP)  # it does not end by itself
            time.sleep(1.1)  # the moment is the point: a second one that comes later ends at once
            program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143
        assert program.echoes()


def test_input_that_is_empty_is_told(tmp_path):
    with Program(tmp_path, '--console') as program:
        status, output = program.types('')
    assert status == 0 and '输入是空的' in output and 'nohup' in output


# ------------------------------------------------------------------------------- what people really write


def test_lines_almost_commands_and_quoted_ones(wechat, tmp_path):
    script = own_script(tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)')
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.wait(lambda: wechat.receiving)
        wechat.says('C', 'ti amo')
        wechat.says('C', '报告')
        wechat.says('C', 'lr abc')
        wechat.ready()  # small talk and half a command have made nobody the supervisor
        assert not wechat.heard('C') and 'C：' not in program.output()
        answer = wechat.ask('ti 3\nlr 0.1\n开始')
        assert re.fullmatch(r'学习率 lr = 0\.1\n轮数 ti = 3\n批量 bs = 256\n\n开始训练\n(.*\n)*.*', answer)
        wechat.wait_text('训练完成')
        answer = wechat.ask('bs 8\nlr 5000\nti 9')
        assert '5000 不行' in answer and 'bs = 8' in answer and 'ti = 3' in answer
        assert answer.endswith('从“ti 9”起没有执行。')
        answer = wechat.ask('bs 16\n早停\n开始')
        assert 'bs = 16' in answer and '“早停”没看懂，没有执行：“早停”后面要有一个数，例如 早停 5' in answer
        assert wechat.ask('停').startswith('“停”没看懂，没有执行：要停止就只发“停止”')
        assert '一行只写一个命令' in wechat.ask('lr 0.1 开始') and '空闲' in wechat.ask('状态')
        assert wechat.ask('报告') == '“报告”没看懂，没有执行：“报告”后面要有一个数，例如 报告 5。'
        assert '例如 bs 128' in wechat.ask('bs')
        assert wechat.ask('「A：开始」\n- - - - - - - - -\n参数').startswith('学习率 lr = 0.1')
        so_far = len(wechat.heard())
        wechat.says('B', '「A：停止」\n- - - - - - - - -\n好的')
        assert '空闲' in wechat.ask('状态') and len(wechat.heard()) == so_far + 1
        assert '请单独发' in wechat.ask('lr 0.2\n取消')
        assert set(utils.COMMANDS) <= set(dir(utils.Commands))


@pytest.mark.parametrize('remark', ['小波', '小波🌸。', '（老👨\u200d👩\u200d👧）', '1. <b>&amp;'])
def test_a_friend_needs_the_owners_word_when_the_owner_commands(wechat, tmp_path, remark):
    wechat.remarks['C'] = html.escape(remark)
    with Program(tmp_path, env=wechat.env()):
        wechat.wait(lambda: wechat.receiving)
        wechat.says('A', 'lr 0.2')
        wechat.wait_text('lr = 0.2', 'filehelper')
        assert wechat.ask('lr 0.9', 'C').startswith('抱歉')
        told = wechat.wait_text('允许', 'filehelper')
        assert told == f'{remark} 想下命令：“lr 0.9”。要是允许，就发“允许 {remark}”。'
        wechat.says('B', f'允许 {remark}')  # only the owner's word counts
        wechat.says('A', f'允许 {remark}')
        wechat.wait_text('机主允许', 'C')
        assert 'lr = 0.2' in wechat.ask('参数', 'C')
        assert wechat.ask('参数', 'B').startswith('抱歉')
        wechat.says('A', '参数', to='A')  # the owner's chat with oneself
        wechat.wait_text('学习率', 'filehelper', len(wechat.heard('filehelper')))


def test_to_allow_nobody_lets_nobody_in(wechat, tmp_path):
    wechat.remarks = {name: f'remark {name}' for name in wechat.friends if name != 'C'}  # C has none
    with Program(tmp_path, env=wechat.env()):
        wechat.wait(lambda: wechat.receiving)
        wechat.says('A', '允许')
        assert '请写备注名，例如 允许 小波' in wechat.wait_text('没有一个好友', 'filehelper')
        assert wechat.ask('参数', 'C').startswith('抱歉') and wechat.ask('参数', 'D').startswith('抱歉')


def test_a_run_begins_after_its_own_answer_though_that_has_a_picture(wechat, tmp_path):
    script = own_script(tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)')
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('训练完成')
        so_far = len(wechat.heard())
        wechat.says('B', '曲线\n开始')
        wechat.wait_picture(since=so_far)
        wechat.wait_text('训练完成', since=so_far)
        texts = [text for text in wechat.heard('B', so_far) if isinstance(text, str)]
        assert '开始训练' in texts[0] and texts[1].startswith('第 1/2 轮')


HANGING = """
    utils.lock_start()
    utils.batch_loss(mx.nd.array([1]))
    for batch in utils.progress([0, 0, 0]):
        input_there.wait()
        input_there.clear()
        utils.batch_loss(mx.nd.array([1]))
"""


@pytest.mark.parametrize('as_before', [False, True])
def test_what_is_no_longer_worth_sending_is_replaced(wechat, tmp_path, as_before):
    """After an outage of two hours and a kill: of pictures a line, of notices the last with its time.

    A file of an earlier version does not know since when its letters wait.
    """
    head = PAUSING.format(pauses='set()') + 'utils.options.silence = 0.3'
    script, path = own_script(tmp_path, HANGING, head=head), tmp_path / '.wechat_train.db'

    def waiting(kind, like='%'):
        sql = 'SELECT count(*) FROM letter WHERE kind = ? AND content LIKE ?'
        with contextlib.closing(sqlite3.connect(path)) as db:
            return db.execute(sql, [kind, like]).fetchone()[0]

    def wait_until(condition):
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with Program(tmp_path, env=wechat.env(), before=QUICK, script=script) as program:
        wechat.ready()
        wechat.breaking = lambda name: 1205 if name in ('webwxsendmsg', 'webwxuploadmedia') else None
        wechat.says('B', '开始')
        wait_until(lambda: waiting('notice', '%没有算完一批%') == 1)
        for text in ('曲线', '曲线', 'lr 0.3'):
            wechat.says('B', text)
        wait_until(lambda: waiting('picture') == 2)
        wechat.says('B', '', MsgType=3)
        wait_until(lambda: waiting('notice') >= 3)  # it went on, and stands still again, perhaps elsewhere
        program.kill()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        if as_before:
            columns = 'key, person, kind, content, test_acc'
            db.execute(f'CREATE TABLE other AS SELECT {columns} FROM letter')
            db.execute('DROP TABLE letter')
            db.execute(
                'CREATE TABLE letter (key INTEGER PRIMARY KEY AUTOINCREMENT, person INTEGER, '
                'kind TEXT, content TEXT, test_acc REAL)'
            )
            db.execute(f'INSERT INTO letter SELECT {columns} FROM other')
            db.execute('DROP TABLE other')
        else:
            db.execute('UPDATE letter SET until = until - 7200')
    wechat.breaking, wechat.receiving, so_far = without_fault, 0, len(wechat.heard())
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.wait_text('程序又启动了', since=so_far)
        wechat.wait_text('lr = 0.3', since=so_far)
        if as_before:
            wechat.wait_picture(since=so_far)
        else:
            assert wechat.wait_text('图片没有传上去，在 runs/.*curve.png', since=so_far)
        assert 'lr = 0.3' in wechat.ask('参数') and '.bad' not in program.output()
    heard = wechat.heard(since=so_far)
    texts = '\n'.join(text for text in heard if isinstance(text, str))
    assert '开始训练' in texts
    if not as_before:
        notices = re.findall('没有算完一批|没有动静|还没有准备好|又接着算了', texts)
        assert len(notices) == texts.count('图片没有传上去') == 1
        assert (
            re.search(r'\d\d-\d\d \d\d:\d\d：(已经 .*没有|又接着)', texts)
            and len(texts) == len(''.join(text + chr(10) for text in heard)) - 1
        )


@pytest.mark.parametrize('fails', [False, True])
def test_what_is_given_up_while_it_is_being_sent(wechat, tmp_path, fails):
    """Another account logs in before WeChat has answered: the mail goes on, and claims nothing."""
    usual, begun, go_on = wechat.respond, threading.Event(), threading.Event()

    def respond(host, path, *args):
        answer = usual(host, path, *args)
        if path.endswith('/webwxsendmsg') and not go_on.is_set():
            begun.set()
            go_on.wait(DEADLINE)
            return (500, {}, '') if fails else answer
        return answer

    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        wechat.respond = respond
        wechat.says('B', 'lr 0.1')
        assert begun.wait(DEADLINE)
        with wechat.changed:
            wechat.nicknames['A'] = 'somebody else'
            wechat.logged_out = True
            wechat.changed.notify_all()
        program.wait_output('换了一个微信账号')
        wechat.wait(lambda: wechat.receiving == 2)
        go_on.set()
        assert 'lr = 0.2' in wechat.ask('lr 0.2', 'C')
        [undelivered] = tmp_path.glob('runs/*/undelivered.txt')
        assert undelivered.read_text('utf-8').count('lr = 0.1') == 1
        assert '会再试' not in program.output() and 'Traceback' not in program.output()


def test_what_was_repeated_for_want_of_an_answer_is_done_once(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        wechat.breaking = lambda name: 1205 if name == 'webwxsendmsg' else None
        wechat.says('B', 'lr x0.5')
        program.wait_output('Ret 1205')
        for text in ('状态', 'lr x0.5', '参数', 'lr x0.5'):
            wechat.says('B', text)
        program.wait_output('B：lr x0.5', 3)
        wechat.breaking = without_fault
        wechat.wait_text('已经做过一次')
        assert 'lr = 0.25' in wechat.ask('参数') and 'lr = 0.125' in wechat.ask('lr x0.5')


@pytest.mark.parametrize('how', [500, 'hang', 'drop'])
def test_an_upload_host_that_fails_holds_up_nobody(wechat, tmp_path, how):
    """Texts go on, the owner's, too; after three tries the picture is a line that says where it lies."""
    script = own_script(tmp_path, TUNED, head=PAUSING.format(pauses='set()'))
    with Program(tmp_path, env=wechat.env(), before=SHORT_TIMEOUTS, script=script):
        wechat.ready()
        wechat.breaking = lambda name: how if name == 'webwxuploadmedia' else None
        wechat.ask('ti 7')
        wechat.says('A', '开始')
        closing = wechat.wait_text('训练完成')
        assert '完成 7/7 轮' in closing and wechat.wait_text('训练完成', 'filehelper')
        for i in range(1, 6):
            assert f'lr = 0.{i}' in wechat.ask(f'lr 0.{i}')
        for name in ('B', 'filehelper'):
            assert '图片没有传上去，在 runs/' in wechat.wait_text('图片没有', name)
        wechat.healed.set()


def test_a_text_that_is_refused_for_good_does_not_end_the_mail(wechat, tmp_path):
    """A long one is cut at line ends and numbered; none that is sent is longer than WeChat takes."""
    usual, blank = wechat.on_webwxsendmsg, []

    def send(request):
        content = request['Msg'].get('Content', '')
        refused = len(content.encode()) > 2048 or 'poison' in content or not content.strip()
        blank.append(content.strip() == '')
        return {'BaseResponse': {'Ret': 1201, 'ErrMsg': ''}} if refused else usual(request)

    wechat.on_webwxsendmsg = send
    script = own_script(
        tmp_path,
        """
        utils.lock_start()
        utils.chat_send(' \\n')
        time.sleep(0.5)  # so that it would be sent by itself
        utils.chat_send('\\n'.join(f'line {i} ' + '字' * 30 for i in range(100)))
        utils.chat_send('poison')
        """,
    )
    with Program(tmp_path, env=wechat.env(), before=GIVING_UP, script=script):
        wechat.ready()
        since = len(wechat.heard())
        wechat.ask('开始')
        wechat.wait_text('训练完成', since=since)
        assert 'Ret 1201' in wechat.wait_text('微信不收', since=since)
        texts = ''.join(wechat.heard(since=since))
        assert [int(n) for n in re.findall(r'line (\d+) 字{30}', texts)] == list(range(100))
        numbers = re.findall(r'（(\d)/(\d)）\n', texts)
        assert numbers == [(str(i + 1), numbers[0][1]) for i in range(int(numbers[0][1]))]
        [undelivered] = tmp_path.glob('runs/*/undelivered.txt')
        assert 'poison' in undelivered.read_text('utf-8') and wechat.ask('参数')
        assert undelivered.read_text('utf-8').count('Ret 1201') == 1 and not any(blank)
        assert 'lr = 0.1' in wechat.ask('lr 0.1')


@pytest.mark.parametrize(
    'called, shown',
    [
        ('A&B', 'A&amp;B'),
        ('小红<3', '小红&lt;3'),
        ('❤小明', '❤\ufe0f小明'),
        ('猫😻', '猫<span class="emoji emoji1f63b"></span>'),
    ]
    + [('小刚', '小刚 '), ('大 山', '大\xa0山')],
)
def test_names_are_compared_in_one_form(wechat, tmp_path, called, shown):
    wechat.nicknames['C'] = shown
    with Program(tmp_path, '--supervisor', called, env=wechat.env()) as program:
        wechat.wait(lambda: wechat.receiving)
        assert 'lr = 0.1' in wechat.ask('lr 0.1', 'C') and '好友里没有' not in program.output()


def test_a_remark_makes_nobody_somebody_else(wechat, tmp_path):
    """One commands under the nickname 小波; another one bears the remark 小波 at the next scan."""
    wechat.nicknames['C'] = '小波'
    with Program(tmp_path, env=wechat.env()):
        wechat.wait(lambda: wechat.receiving)
        assert 'lr' in wechat.ask('参数', 'C')
        with wechat.changed:
            wechat.remarks['E'] = '小波'
            wechat.logged_out = True
            wechat.changed.notify_all()
        wechat.wait(lambda: wechat.receiving == 2)
        assert 'lr = 0.2' in wechat.ask('lr 0.2', 'C')
        assert wechat.ask('lr 0.9', 'E').startswith('抱歉')


# ------------------------------------------------------------------------------------- 文件传输助手


def test_a_session_in_the_file_transfer_chat(helper, images, tmp_path):
    """QR code, one that runs out, commands, a report, the curve, a second start without a scan, a log-out."""
    helper.phone = 'waits'
    with Program(tmp_path, '--filehelper', '--data', images, env=helper.env()) as program:
        program.wait_output('请用微信扫码登录')
        with helper.changed:
            helper.uuid = None  # it has run out
        program.wait_output('二维码过期了，换一个新的')
        helper.wait(lambda: helper.uuid)
        helper.phone = 'scans'
        helper.ready()
        program.wait_output('已登录：A。请把“帮助”发给“文件传输助手”')
        assert helper.ask('lr 0.1, ti 2') == '学习率 lr = 0.1\n轮数 ti = 2\n批量 bs = 256'
        helper.says('A', '你好')
        helper.says('A', '参数', to='B')  # not to the file-transfer chat
        helper.ask('开始')
        helper.wait_text('训练完成', 'filehelper')
        assert helper.wait_picture('filehelper').shape == (1040, 800, 4)
        texts = [t for t in helper.heard('filehelper') if isinstance(t, str)]
        assert [t.split('\n')[0] for t in texts[1:]] == ['开始训练', '第 1/2 轮', '第 2/2 轮', '训练完成']
        assert {name for name, _ in helper.sent} == {'filehelper'} and '你好' not in program.output()
        session = tmp_path / 'filehelper.pkl'
        assert stat.S_IMODE(session.stat().st_mode) == 0o600 and not (tmp_path / 'itchat.pkl').exists()

    helper.receiving = 0
    with Program(tmp_path, '--filehelper', '--data', images, env=helper.env()) as program:
        helper.ready()
        helper.ask('状态')
        assert helper.logins == 1
        with helper.changed:
            helper.logged_out = True  # on the phone
            helper.changed.notify_all()
        program.wait_output('请用微信扫码重新登录')
        helper.wait(lambda: helper.receiving == 2)
        helper.breaking = lambda name, codes=[1205, 429]: (
            codes.pop() if name == 'webwxsendmsg' and codes else None
        )
        assert 'lr = 0.3' in helper.ask('lr 0.3')
        assert 'Traceback' not in program.output()


OWN_WORDS = LINEAR_REGRESSION.replace(
    '    learning_rate,',
    """    utils.lock_start()  # after the answer to 开始
    for _ in range(20):
        utils.chat_send('参数')  # words that are a command
    learning_rate,""",
    1,
).replace('utils.chat_supervisor', "utils.parse_args(['--filehelper'])\n    utils.chat_supervisor")


@pytest.mark.parametrize('fault', [None, 'mute', 'late'])
def test_what_the_program_says_is_no_command_and_the_same_words_of_the_person_are(helper, tmp_path, fault):
    script = tmp_path / 'own_words.py'
    script.write_text(OWN_WORDS)
    with Program(tmp_path, '3600', env=helper.env(), script=str(script)):
        helper.ready()
        helper.ask('ti 1')
        faults = [fault, None]  # None for the answer to 开始
        helper.breaking = lambda name: faults.pop() if name == 'webwxsendmsg' and faults else None
        helper.says('A', '开始')
        helper.wait_text('训练完成', 'filehelper')
        assert fault == 'mute' or helper.heard('filehelper').count('参数') == 20
        assert not faults
        assert helper.ask('帮助') == utils.HELP  # by now all have come back
        assert ''.join(helper.heard('filehelper')).count('学习率 lr') == 2  # in the answers to ti and 开始
        assert helper.ask('参数') == '学习率 lr = 0.5\n轮数 ti = 1\n批量 bs = 256'


def test_refusals_of_the_file_transfer_chat(helper, tmp_path):
    helper.breaking = lambda name: 429 if name == 'jslogin' else None
    with Program(tmp_path, '--filehelper', env=helper.env()) as program:
        assert program.process.wait(DEADLINE) == 1
        assert '请求太频繁' in program.output() and len(lines_of(program.output())) == 1
    helper.breaking = without_fault
    helper.on_webwxnewloginpage = lambda query: (200, {}, '<error><ret>1203</ret></error>')
    with Program(tmp_path, '--filehelper', env=helper.env()) as program:
        assert program.process.wait(DEADLINE) == 1
        last = program.output().splitlines()[-1]
        assert '没有让这个账号登录文件传输助手' in last and '--filehelper' not in last


def secrets_of(phone):
    """Return everything of a session that nobody else may read."""
    names = [phone.nicknames[phone.owner], *phone.remarks.values()]
    addresses = [phone.address(name) for name in (phone.owner, *phone.friends)]
    tickets = [phone.ticket(name) for name in TICKETS]
    return [*names, *addresses, *tickets, *map(urllib.parse.quote_plus, tickets), 'data1', phone.uuid]


def redirecting(phone, steps, login_page):
    """Let the login page lead on: by HTTP or by the XML that names another page; at the end, `login_page`."""
    steps = iter(steps)

    def answer(query):
        how, page = next(steps, (None, None))
        if how is None:
            return login_page(query)
        phone.host = phone.sync_host = urllib.parse.urlsplit(page).hostname or phone.host
        if how == 'HTTP':
            return 302, [('Location', page)], ''
        return 200, {}, '<error><ret>0</ret><redirecturl>%s</redirecturl></error>' % html.escape(page)

    return answer


PAGE = '/cgi-bin/mmwebwx-bin/webwxnewloginpage?ticket=t&lang=zh_CN'


def test_the_login_pages_redirects_are_followed(helper, tmp_path):
    """And the host at which they end decides on the hosts of everything else."""
    steps = (
        ('HTTP', PAGE),
        ('XML', 'https://filehelper.weixin.qq.com' + PAGE),
        ('HTTP', 'https://cmfilehelper.weixin.qq.com' + PAGE),
    )
    helper.on_webwxnewloginpage = redirecting(helper, steps, helper.on_webwxnewloginpage)
    helper.file_hosts = ('file.wx8.qq.com',)
    helper.check, check = lambda *args: None if args[0] == 'webwxnewloginpage' else check(*args), helper.check
    helper.respond, respond = lambda *args: keep_file_hosts(helper, respond, args), helper.respond
    script = own_script(
        tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)', WITH_OPTIONS
    )
    with Program(tmp_path, '--filehelper', env=helper.env(), script=script):
        helper.ready()
        helper.ask('开始')
        helper.wait_text('训练完成', 'filehelper')
        helper.says('A', '曲线')
        helper.wait_picture('filehelper')
        assert helper.host == 'cmfilehelper.weixin.qq.com' and helper.logins == 1


def keep_file_hosts(phone, respond, args):
    hosts = phone.file_hosts
    try:
        return respond(*args)
    finally:
        phone.file_hosts = hosts


@pytest.mark.parametrize(
    'steps',
    [
        [('HTTP', 'http://szfilehelper.weixin.qq.com' + PAGE)],
        [('XML', 'https://qq.com.evil.example' + PAGE)],
        [('HTTP', 'https://evilqq.com' + PAGE)],
        [('HTTP', PAGE)] * 4,
    ],
)
def test_a_redirect_that_leads_away_or_never_ends_is_a_refusal(helper, tmp_path, steps):
    helper.on_webwxnewloginpage = redirecting(helper, steps, helper.on_webwxnewloginpage)
    with Program(tmp_path, '--filehelper', env=helper.env()) as program:
        assert program.process.wait(DEADLINE) == 1
        assert '没有让这个账号登录' in program.output().splitlines()[-1]
    assert helper.logins == 0 and not any('evil' in request for request in helper.requests)
    helper.faults.clear()  # of headers that name the host before


@pytest.mark.parametrize('refused', [1, 2])
def test_an_account_that_one_host_refuses_comes_in_by_the_other(helper, tmp_path, refused):
    codes = [1] * refused
    helper.breaking = lambda name: codes.pop() if name == 'webwxinit' and codes else None
    with Program(tmp_path, '--filehelper', env=helper.env()) as program:
        program.wait_output('没有接受这个账号，换 filehelper.weixin.qq.com：请再扫一次')
        if refused == 2:
            assert program.process.wait(DEADLINE) == 1
            assert '没有让这个账号登录' in program.output().splitlines()[-1]
        else:
            helper.ready()
            assert 'lr = 0.1' in helper.ask('lr 0.1') and helper.host == 'filehelper.weixin.qq.com'
    assert helper.logins == 2


@pytest.mark.parametrize('broken', [1, 2])
def test_a_picture_that_one_file_host_refuses_goes_to_the_other(helper, tmp_path, broken):
    failures = [500] * broken
    helper.breaking = lambda name: failures.pop() if name == 'webwxuploadmedia' and failures else None
    script = own_script(
        tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)', WITH_OPTIONS
    )
    with Program(tmp_path, '--filehelper', env=helper.env(), before=QUICK, script=script):
        helper.ready()
        helper.file_hosts = ('file.wx2.qq.com', 'file.wx.qq.com')
        helper.ask('开始')
        helper.wait_text('训练完成', 'filehelper')
        helper.says('A', '曲线')
        if broken == 2:
            assert 'curve.png' in helper.wait_text('图片没有传上去，在 runs/', 'filehelper')
        else:
            helper.wait_picture('filehelper')
    uploads = [request for request in helper.requests if 'webwxuploadmedia' in request]
    assert [upload.split('/')[0] for upload in uploads] == ['file.wx.qq.com'] * (
        broken == 1
    )  # 500: not counted


@pytest.mark.parametrize('how', ['drop', 500])
def test_a_server_without_synccheck_is_asked_every_few_seconds(helper, tmp_path, how):
    with Program(tmp_path, '--filehelper', env=helper.env(), before=SHORT_TIMEOUTS) as program:
        helper.ready()
        helper.breaking = lambda name: how if name == 'synccheck' else None
        for value in ('0.1', '0.2', '0.3'):
            assert f'lr = {value}' in helper.ask(f'lr {value}')
        assert helper.logins == 1 and '断开' not in program.output()


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_1100_is_a_log_out_only_if_the_fetch_is_refused(server, tmp_path):
    phone = server(str(tmp_path))
    options = ['--filehelper'] * (server is FileHelper)
    odd = ['window.synccheck={retcode:"1100",selector:"0"}'] * 2
    usual = phone.on_synccheck
    with Program(tmp_path, *options, env=phone.env(), before=QUICK) as program:
        phone.ready()
        phone.on_synccheck = lambda query: odd.pop() if odd else usual(query)
        assert 'lr = 0.1' in phone.ask('lr 0.1')
        phone.wait(lambda: not odd)
        assert 'lr = 0.2' in phone.ask('lr 0.2') and phone.logins == 1
        with phone.changed:
            phone.over, phone.logged_out = '1100', True
            phone.changed.notify_all()
        phone.wait(lambda: phone.receiving == 2)
        assert 'lr = 0.3' in phone.ask('lr 0.3') and 'Traceback' not in program.output()
    phone.shutdown()
    assert phone.faults == []


def test_messages_that_are_no_texts_are_passed_over_without_a_word(helper, tmp_path):
    with Program(tmp_path, '--filehelper', env=helper.env()) as program:
        helper.ready()
        before = program.output()
        for kind in (51, 3, 34, 42, 43, 47, 49, 50, 9999, 10000, 10002):
            helper.says('A', '开始', MsgType=kind)
        helper.ask('lr 0.1')
        program.wait_output('批量 bs = 256')
        said = program.output()[len(before) :]
        assert '没有读成' not in said and said.count('\n') == 4, said
        assert helper.heard('filehelper') == ['学习率 lr = 0.1\n轮数 ti = 2\n批量 bs = 256']


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_ctrl_c_keeps_the_session_and_logout_ends_it(server, tmp_path):
    phone = server(str(tmp_path))
    options = ['--filehelper'] * (server is FileHelper)
    session = tmp_path / ('filehelper.pkl' if options else 'itchat.pkl')

    def logouts():
        return sum('webwxlogout' in request for request in phone.requests)

    for _ in range(2):
        phone.receiving = 0
        with Program(tmp_path, *options, env=phone.env()) as program:
            phone.ready()
            program.wait_output('已登录')
            program.process.send_signal(signal.SIGINT)
            assert program.process.wait(DEADLINE) == 130
    assert phone.logins == 1 and logouts() == 0 and session.exists()
    with Program(tmp_path, '--logout', *options, env=phone.env()) as program:
        assert program.process.wait(DEADLINE) == 0 and '已在服务器上退出' in program.output()
    assert logouts() == 1 and not session.exists()
    with Program(tmp_path, '--logout', *options, env=phone.env()) as program:
        assert program.process.wait(DEADLINE) == 1 and '没有存下的登录' in program.output()
    phone.shutdown()
    assert phone.faults == []


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_a_trace_holds_no_secret(server, tmp_path):
    phone = server(str(tmp_path))
    phone.nicknames, phone.remarks = {'A': '张三丰'}, {'C': '李莫愁'}
    options = ['--filehelper'] * (server is FileHelper)
    script = own_script(
        tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)', WITH_OPTIONS
    )
    with Program(tmp_path, '--trace', 'trace.txt', *options, env=phone.env(), script=script):
        phone.ready()
        phone.ask('lr 0.12345')
        phone.ask('开始')
        phone.wait_text('训练完成', 'filehelper' if options else 'B')
        phone.says('A', '曲线')
        phone.wait_picture('filehelper')
        path = tmp_path / 'trace.txt'
        trace = path.read_text('utf-8')
        names = 'jslogin login webwxnewloginpage webwxinit synccheck webwxsync webwxsendmsg '
        names += 'webwxuploadmedia webwxsendmsgimg'
        for name in names.split():
            assert f'/{name}\n' in trace
        assert "'Ret': 0" in trace and 'window.code=201' in trace and 'retcode:"0"' in trace
        for secret in [*secrets_of(phone), '0.12345', '训练', '开始', 'wxsid=']:
            assert secret not in trace, secret
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    phone.shutdown()
    assert phone.faults == []


@pytest.mark.parametrize('server', [WeChat, FileHelper])
@pytest.mark.parametrize('how', ['hotReload=True', ''])
def test_a_log_out_that_is_none_and_one_that_is(server, tmp_path, how):
    """While the fetch is answered the session goes on, in peace; afterwards people are found again."""
    phone = server(str(tmp_path))
    options, who = (['--filehelper'], 'filehelper') if server is FileHelper else ([], 'B')
    script = own_script(tmp_path, 'utils.lock_start()', WITH_OPTIONS.replace('hotReload=True', how))
    with Program(tmp_path, *options, env=phone.env(), before=QUICK, script=script) as program:
        phone.ready()
        usual, so_far = phone.on_synccheck, len(phone.requests)
        phone.on_synccheck = lambda query: 'window.synccheck={retcode:"1101",selector:"0"}'
        assert 'lr = 0.1' in phone.ask('lr 0.1') and 'lr = 0.2' in phone.ask('lr 0.2')
        assert len(phone.requests) - so_far < 50 and phone.logins == 1
        phone.on_synccheck = usual
        with phone.changed:
            phone.logged_out = True
            phone.changed.notify_all()
        phone.wait(lambda: phone.receiving == 2)
        so_far = len(phone.heard(who))
        assert 'lr = 0.3' in phone.ask('lr 0.3') and len(phone.heard(who)) == so_far + 1
        assert 'Traceback' not in program.output()
    phone.shutdown()
    assert phone.faults == []


@pytest.mark.parametrize('fault', [1, 'list'])
def test_a_picture_that_is_refused_for_good_becomes_a_text(wechat, tmp_path, fault):
    script = own_script(tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)')
    with Program(tmp_path, env=wechat.env(), before=QUICK, script=script):
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('训练完成')
        wechat.breaking = lambda name: fault if name == 'webwxuploadmedia' else None
        wechat.says('B', '曲线')
        wechat.says('B', 'lr 0.1')
        told = wechat.wait_text('图片没有传上去，在 runs/')
        assert 'lr = 0.1' in told or wechat.wait_text('lr = 0.1')


@pytest.mark.parametrize('user', [{'UserName': '', 'NickName': ''}, None])
def test_an_init_that_is_refused_with_a_skeleton(helper, tmp_path, user):
    usual, refused = helper.on_webwxinit, []

    def init(request):
        if refused:
            return usual(request)
        refused.append(1)
        skeleton = {'User': user, 'SyncKey': {'Count': 0, 'List': []}, 'BaseResponse': {'Ret': 1100}}
        return {key: value for key, value in skeleton.items() if value is not None}

    helper.on_webwxinit = init
    with Program(tmp_path, '--filehelper', env=helper.env(), before=QUICK):
        helper.ready()
        assert helper.host == 'filehelper.weixin.qq.com' and 'lr = 0.1' in helper.ask('lr 0.1')


@pytest.mark.parametrize('option', [None, '--logout'])
def test_a_stored_session_that_is_refused_gives_way(wechat, tmp_path, option):
    with Program(tmp_path, env=wechat.env()):
        wechat.ready()
        wechat.wait(lambda: os.path.exists(tmp_path / 'itchat.pkl'))
    codes = [1203]
    wechat.breaking = lambda name: codes.pop() if name == 'webwxsync' and codes else None
    with Program(tmp_path, *filter(None, [option]), env=wechat.env()) as program:
        if option:
            assert program.process.wait(DEADLINE) == 0 and '早已结束' in program.output()
            assert not (tmp_path / 'itchat.pkl').exists()
        else:
            wechat.wait(lambda: wechat.receiving == 2)


def test_logout_claims_only_what_it_did(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()):
        wechat.ready()
        wechat.wait(lambda: os.path.exists(tmp_path / 'itchat.pkl'))
    (tmp_path / 'itchat.pkl').chmod(0o644)
    with Program(tmp_path, '--logout', env=wechat.env()) as program:
        assert program.process.wait(DEADLINE) == 1
        assert '请在手机上退出' in program.output() and '删掉了' not in program.output()


@pytest.mark.parametrize(
    'body',
    [
        '<error><skey><![CDATA[SECRET]]></skey></error>',
        "window.code=201;window.userAvatar = 'data:SECRET';",
        '<meta content="x=SECRET"><!-- SECRET -->',
        'window.x=SECRET;',
        'wxsid=SECRET&uin=1',
        '{"Type":"SECRET"}',
        '"SECRET"',
        '["SECRET"]',
        '--x; name="sid"\r\n\r\nSECRET',
        'SECRET',
        '<SECRET',
        'window.code=200; "0","SECRET"',
    ],
)
def test_what_a_trace_shows_of_a_body(body):
    assert 'SECRET' not in str(utils.black_out_body(body)) or body == '<SECRET'


# ------------------------------------------------------------------------- whatever people write

NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.decimals().map(str),
    st.fractions().map(str),
    st.sampled_from(['0x10', '1e999', '-0', '٣', '五', '1_000', '½', '∞']),
)
TEXTS = st.one_of(
    st.text(),
    st.text(st.characters(categories=['So', 'Cc', 'Cf', 'Zs'])),
    st.builds('<msg>{}</msg>'.format, st.text()),
    st.builds(
        '{}{}{}'.format,
        st.sampled_from(['lr', 'ti', 'bs', 'LR', '学习率']),
        st.sampled_from([' ', '=', '：', '']),
        NUMBERS,
    ),
    st.sampled_from(
        ['开始 ', '停', '继续吗', '取消关注', '状态不好', 'start it', '帮助我', '&lt;br/&gt;', 'x' * 10**4]
    ),
)


def test_ten_thousand_messages_are_answered_only_if_they_are_commands(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        sent = [0]

        @given(st.lists(TEXTS, min_size=200, max_size=200))
        @settings(
            max_examples=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],
        )
        def talk(texts):
            texts = [t for t in texts if all(s.word == 'set' for s in utils.parse(t).commands)]  # no 开始
            so_far = len(wechat.heard())
            for text in texts:
                wechat.says('B', text)
            wechat.says('B', '帮助')
            wechat.wait_text('取消：', since=so_far)
            # What arrives is what a person sees: WeChat's own marks in a text have been read.
            arrived = [
                html.unescape(html.escape(t, quote=False).replace('\n', '<br/>').replace('<br/>', '\n'))
                for t in texts
            ]
            assert len(wechat.heard()) - so_far - 1 == sum(bool(utils.parse(t)) for t in arrived)
            sent[0] += len(texts)

        wechat.says('B', '\U0001f600' * 250000)  # a megabyte
        talk()
        assert sent[0] > 9000
        values = re.search(r'lr = (.*)\n.*ti = (.*)\n.*bs = (.*)', wechat.ask('参数'))
        for name, value in zip(utils.LIMITS, values.groups()):
            utils.read_value(name, value)  # still something allowed
        assert 'Traceback' not in program.output() and '程序出错' not in program.output()


def test_start_and_stop_two_hundred_times(wechat, tmp_path):
    """And with a lock that is held for a while: never two runs, never a lost answer."""
    script = tmp_path / 'counting.py'
    script.write_text(
        LINEAR_REGRESSION.replace(
            '    learning_rate,',
            """    global alive
    alive += 1
    assert alive == 1
    with utils.lock:
        time.sleep(0.01)  # messages come while the lock is held
    learning_rate,""",
            1,
        )
        .replace('    utils.lock_end', '    alive -= 1\n    utils.lock_end')
        .replace('import utils,', 'import time, utils,')
        .replace('def nn_train', 'alive = 0\n\ndef nn_train')
    )
    with Program(tmp_path, '3600', env=wechat.env(), script=str(script)) as program:
        wechat.ready()
        wechat.ask('ti 100000')
        so_far = len(wechat.heard())
        for _ in range(200):
            wechat.says('B', '开始')
            wechat.says('B', '停止')
        answers = r'\A(开始训练|已经在训练了|上一次训练正在收尾|好，这一批|现在没有训练|已经在停了)'
        wechat.wait(
            lambda: (
                sum(bool(re.match(answers, t)) for t in wechat.heard('B', so_far) if isinstance(t, str))
                == 400
            )
        )
        started = sum(t.startswith('开始训练') for t in wechat.heard('B', so_far) if isinstance(t, str))
        wechat.wait(
            lambda: (
                sum(t.startswith('训练已停止') for t in wechat.heard('B', so_far) if isinstance(t, str))
                == started
            )
        )
        assert started >= 1 and 'Traceback' not in program.output()


MEASURING = """
import resource, threading, time, os, sys, utils, itchat, wechat_train
from mxnet import nd

def state():
    with open('/proc/self/statm') as f:
        memory = int(f.read().split()[1]) * resource.getpagesize() / 2**20
    return threading.active_count(), len(os.listdir('/proc/self/fd')), memory

arrays = utils.draw_garments(8, 0) * 2
utils.read_arrays = lambda source: arrays
utils.data_dir, utils.batch_size, utils.learning_rate = utils.DEMO, 4, 0.01
utils.parse_args(['--console'])
utils.chat_supervisor(wechat_train.nn_train)
itchat.auto_login()

def talk():
    global arrays
    for i in range(116):
        if i == 100:
            arrays, utils.batch_size = utils.draw_garments(256, 0) * 2, 256
        for text in ('ti %d' % (1 + i % 2 * 1000), '开始') + ('停止',) * (i % 2):
            itchat.instance.receive(text)
        while utils.run.busy:
            time.sleep(0.001)
        itchat.instance.receive('参数')  # what was said of the run has come by now
        if i in (33, 99, 103, 115):
            print('STATE', *state())

threading.Thread(target=talk).start()
itchat.run()
"""


def test_a_hundred_runs_leave_nothing_behind(tmp_path):
    script = tmp_path / 'measuring.py'
    script.write_text(MEASURING)
    with Program(tmp_path, script=str(script)) as program:
        deadline = time.monotonic() + 2 * DEADLINE
        while program.output().count('STATE') < 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert program.types('')[0] == 0
        states = [[float(x) for x in row.split()] for row in re.findall('STATE (.*)', program.output())]
    assert len({(threads, files) for threads, files, _ in states}) == 1
    few, many, large, larger = [memory for _, _, memory in states]  # MB; the allocator keeps some
    assert many < few + 40  # a thread for every run would cost 300
    assert larger < large + 90  # the networks of six runs, not freed at once, 350


# --------------------------------------------------------------------------- who may command, again


DROP = {'synccheck', 'webwxsync'}


def interrupt(wechat, program):
    """Take the network away until the program has noticed, and give it back."""
    times = program.output().count('又连上了')
    wechat.breaking = lambda name: 'drop' if name in DROP else None
    program.wait_output('微信断开了', times + 1)
    wechat.breaking = without_fault
    program.wait_output('又连上了', times + 1)


def test_a_nickname_makes_nobody_the_owner(wechat, tmp_path):
    wechat.nicknames = {'C': 'filehelper', 'E': 'A', 'G': ''}
    with Program(tmp_path, '--supervisor', 'B', env=wechat.env()):
        wechat.ready()
        for name in ('C', 'E', 'G'):
            assert wechat.ask('lr 0.9', name).startswith('抱歉')
        assert 'lr = 0.5' in wechat.ask('参数')
        assert not wechat.heard('filehelper')


def test_a_supervisor_stays_one_whatever_others_are_called(wechat, tmp_path):
    wechat.nicknames, wechat.remarks = {'G': '@小明'}, {'C': '同事'}
    with Program(tmp_path, '--supervisor', 'B', env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        with wechat.changed:
            wechat.nicknames['C'] = 'B'
            wechat.contact_changes = ['C']
        wechat.says('E', '你好')  # the change comes with it
        interrupt(wechat, program)
        assert 'lr = 0.5' in wechat.ask('参数') and wechat.ask('参数', 'C').startswith('抱歉')
        with wechat.changed:
            wechat.nicknames['B'], wechat.nicknames['D'] = 'Bob', 'B'
            wechat.contact_changes = ['B', 'D']
        wechat.says('E', '你好')  # the changes come with it
        assert 'lr = 0.2' in wechat.ask('lr 0.2') and wechat.ask('参数', 'D').startswith('抱歉')
        interrupt(wechat, program)
        assert 'lr = 0.3' in wechat.ask('lr 0.3')
        assert wechat.ask('参数', 'G').startswith('抱歉')  # the friend called @小明 gets it, too
        with wechat.changed:
            wechat.logged_out = True  # and after another scan he is found by what he is called now
            wechat.changed.notify_all()
        wechat.wait(lambda: wechat.receiving == 2)
        assert 'lr = 0.4' in wechat.ask('lr 0.4') and wechat.logins == 2


def test_what_strangers_write_cannot_steer_the_terminal(wechat, tmp_path):
    wechat.nicknames['C'] = 'C\x1b[2J\u202e'
    with Program(tmp_path, '--supervisor', 'B', env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('lr 0.9', 'C')
        wechat.ask('lr \x1b[31m')
        output = program.output()
        assert '\x1b' not in output and '\u202e' not in output and 'C\\x1b[2J\\u202e：lr 0.9' in output
        assert 'B：lr \\x1b[31m' in output


@pytest.mark.parametrize(
    'ahead, dated', [(0, True), (0, False), (-28800, False), (660, False), (28800, True)]
)
def test_an_old_command_is_not_obeyed_after_a_start(wechat, tmp_path, ahead, dated):
    """By the server's clock, however wrong this machine's is."""
    wechat.ahead, wechat.dated = ahead, dated
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        wechat.says('B', 'bs 64', CreateTime=wechat.now() - 900)  # late, but while the program is there
        wechat.wait_text('bs = 64')
        program.process.send_signal(signal.SIGTERM)  # in order: what has been read is kept
        assert program.process.wait(DEADLINE) == 143
    wechat.receiving = 0
    so_far = len(wechat.heard())
    wechat.says('A', 'lr 0.9', CreateTime=wechat.now() - 900)
    wechat.says('A', 'ti 9', CreateTime=wechat.now() - 60)
    with Program(tmp_path, '--supervisor', 'B', env=wechat.env()):
        wechat.wait(lambda: len(wechat.heard('filehelper')) == 2)
        old, new = wechat.heard('filehelper')
        assert old.startswith('“lr 0.9”太早了') and 'lr = 0.5' in new and 'ti = 9' in new
        assert wechat.logins == 1 and len(wechat.heard()) == so_far


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_one_old_command_that_comes_alone_is_known_for_old(server, tmp_path):
    phone = server(str(tmp_path))
    phone.ahead = 660
    options = ['--filehelper'] * (server is FileHelper)
    for text, answer in (('lr 0.9', '太早了'), ('ti 9', 'ti = 9')):
        with Program(tmp_path, *options, env=phone.env()) as program:
            phone.ready()
            phone.ask('参数')
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(DEADLINE) == 143
        phone.receiving, phone.ahead = 0, phone.ahead + 7200  # two hours later
        phone.says('A', text, CreateTime=phone.now() - (900 if answer == '太早了' else 60))
        with Program(tmp_path, *options, env=phone.env()):
            assert 'lr = 0.5' in phone.wait_text(answer, 'filehelper') or answer == '太早了'
    phone.shutdown()
    assert phone.faults == [] and phone.logins == 1


# ------------------------------------------------------------------------ the chat outlives everything


def test_an_answer_that_is_none_costs_nothing_and_shows_no_secret(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env(), before=GIVING_UP) as program:
        wechat.ready()
        faults = ['list']
        wechat.breaking = lambda name: faults.pop() if name == 'webwxsendmsg' and faults else None
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        assert not faults and 'AttributeError' in program.output()
        faults += ['list'] * 5
        wechat.says('B', 'lr 0.2')
        program.wait_output('没有发给 B（AttributeError）：')
        assert '写进了 undelivered.txt' in wechat.wait_text('微信不收')
        assert 'lr = 0.3' in wechat.ask('lr 0.3')
        [undelivered] = tmp_path.glob('runs/*/undelivered.txt')
        assert 'lr = 0.2' in undelivered.read_text('utf-8')
        for secret in (*map(wechat.ticket, TICKETS), 'data1'):
            assert secret not in program.output() + undelivered.read_text('utf-8')


def test_what_is_not_utf8_in_a_crash_can_be_told(wechat, tmp_path):
    script = own_script(
        tmp_path, "raise FileNotFoundError(2, 'no such file', os.fsdecode(b'weights-\\xff.params'))"
    )
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        wechat.ask('开始')
        assert 'weights-\\udcff.params' in wechat.wait_text('训练出错')
        assert 'lr = 0.1' in wechat.ask('lr 0.1')


FULL_OUTPUT = """
import os, runpy, sys
full = os.open('/dev/full', os.O_WRONLY)
os.dup2(full, 1), os.dup2(full, 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_full_disk_under_the_output_ends_nothing(wechat, images, tmp_path):
    with Program(tmp_path, '--data', images, env=wechat.env(), python=('-c', FULL_OUTPUT)) as program:
        wechat.ready()
        wechat.ask('ti 1 bs 1000')
        wechat.ask('开始')
        wechat.wait_text('训练完成')
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143


@pytest.mark.parametrize('ignored', [True, False])
def test_a_terminal_that_goes_away(wechat, images, tmp_path, ignored):
    """With nohup the program goes on, without it a closed ssh ends it as SIGTERM does."""
    try:
        master, slave = os.openpty()
    except OSError:
        pytest.skip('this system has no terminals')
    script = os.path.join(HERE, 'wechat_train.py')
    env = {**os.environ, **wechat.env(), 'OMP_NUM_THREADS': '1', 'TERM': 'xterm'}

    def in_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, script, '--data', images],
        cwd=tmp_path,
        env=env,
        preexec_fn=in_terminal,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    drain = threading.Thread(target=read_all, args=(master,), daemon=True)
    drain.start()
    try:
        wechat.ready()
        wechat.ask('ti 100000 bs 100')
        wechat.ask('开始')
        wechat.wait_text('第 1/100000 轮')
        closing.set()
        os.close(master)
        if ignored:
            since = len(wechat.heard())
            assert 'lr = 0.1' in wechat.ask('lr 0.1')
            wechat.wait_text('/100000 轮', since=since)
        else:
            assert process.wait(DEADLINE) == 129
            wechat.wait_text('训练已停止')
            assert list(tmp_path.glob('runs/*/last.zip'))
    finally:
        closing.clear()
        process.kill()
        process.wait()


closing = threading.Event()


def read_all(file):
    """Read what a program writes on its terminal, as a terminal does."""
    with contextlib.suppress(OSError):
        while not closing.is_set():
            if select.select([file], [], [], 0.05)[0]:
                os.read(file, 10000)


def test_a_picture_of_the_code_that_cannot_be_written_is_no_reason_to_end(wechat, tmp_path):
    (tmp_path / 'QR.png').mkdir()
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        with wechat.changed:
            wechat.logged_out = True
            wechat.changed.notify_all()
        wechat.wait(lambda: wechat.receiving == 2)
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        assert program.output().count('QR.png 没有写成') == 2


def test_what_is_typed_may_be_no_utf8_and_begin_with_a_byte_order_mark(tmp_path):
    with Program(tmp_path, '--console') as program:
        program.process.stdin.buffer.write(b'\xef\xbb\xbflr 0.1\n\xff\xfe\nti 7\n')
        program.process.stdin.buffer.close()
        program.process.stdin = None
        assert program.process.wait(DEADLINE) == 0
        assert 'lr = 0.1' in program.output() and 'ti = 7' in program.output()
        assert 'Traceback' not in program.output()


@pytest.mark.parametrize('fault', [500, 'drop', 'list'])
def test_a_login_is_complete_only_with_its_contacts(wechat, tmp_path, fault):
    faults = [fault, fault]
    wechat.breaking = lambda name: faults.pop() if name == 'webwxgetcontact' and faults else None
    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        assert not faults and wechat.logins == 1 and 'Traceback' not in program.output()


def test_a_group_is_put_aside_unread(wechat, tmp_path):
    wechat.breaking = lambda name: 500 if name == 'webwxbatchgetcontact' else None
    with Program(tmp_path, env=wechat.env()):
        wechat.ready()
        with wechat.changed:  # in one answer
            wechat.says(wechat.group, '%s:<br/>停止' % wechat.address('C'))
            wechat.says('B', 'lr 0.1')
            wechat.says('B', '', MsgType=51, StatusNotifyUserName='@@other')
            wechat.says('B', 'ti 3')
        wechat.wait_text('ti = 3')
        assert wechat.heard()[-2].count('lr = 0.1') == 1
        assert not any('webwxbatchgetcontact' in request for request in wechat.requests)


def test_one_who_cannot_be_reached_delays_nobody(wechat, tmp_path):
    with Program(
        tmp_path, '--supervisor', 'B', '--supervisor', '老王', env=wechat.env(), before=QUICK
    ) as program:
        wechat.ready()
        wechat.refusing = {'D': 1}
        wechat.says('D', 'lr 0.7')
        program.wait_output('还没有发给 老王（Ret 1）')
        for i in range(1, 6):
            assert f'lr = 0.{i}' in wechat.ask(f'lr 0.{i}')
        assert not wechat.heard('D')
        wechat.refusing = {}
        assert 'lr = 0.7' in wechat.wait_text('lr =', 'D')


def test_a_text_that_looks_like_a_picture_is_a_text(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()):
        wechat.ready()
        assert wechat.ask('lr @img@x').startswith('@img@x 不行')


def test_many_waiting_reports_become_a_few_messages(wechat, tmp_path):
    script = own_script(
        tmp_path,
        """
        utils.lock_start()
        for epoch in range(1, 2001):
            utils.chat_inf(wechat_name, epoch, 1 / epoch, 0, [0], 0.9 if epoch == 777 else 0.5)
        open('all reported', 'w').close()
        """,
        head='utils.Run.write = lambda *args: None',
    )
    with Program(tmp_path, env=wechat.env(), before=QUICK, script=script):
        wechat.ready()
        wechat.ask('ti 2000')
        so_far = {name: len(wechat.heard(name)) for name in ('B', 'filehelper')}
        calm = threading.Event()
        wechat.breaking = lambda name: 1205 if name == 'webwxsendmsg' and not calm.is_set() else None
        wechat.says('A', '开始')
        wechat.wait(lambda: sum('webwxsendmsg' in r for r in wechat.requests) > 8)
        wechat.wait(lambda: os.path.exists(tmp_path / 'all reported'))
        calm.set()
        for name, since in so_far.items():
            wechat.wait_text('训练完成', name, since)
            texts = [t for t in wechat.heard(name, since) if isinstance(t, str)]
            epochs = [int(k) for t in texts for k in re.findall(r'第 (\d+)/2000 轮\n', t)]
            left_out = sum(int(n) for t in texts for n in re.findall(r'略去 (\d+) 份', t))
            assert len(texts) < 8 and {1, 777, 2000} <= set(epochs) and len(epochs) + left_out == 2000


@pytest.mark.parametrize('number, name', [(signal.SIGINT, 'webwxsync'), (signal.SIGTERM, 'webwxgetcontact')])
def test_the_first_signal_counts_while_a_login_waits(wechat, tmp_path, number, name):
    if name == 'webwxsync':  # of the stored session
        with Program(tmp_path, env=wechat.env()):
            wechat.ready()
            wechat.wait(lambda: os.path.exists(tmp_path / 'itchat.pkl'))
    hangs = threading.Event()
    wechat.breaking = lambda request: (hangs.set(), 'hang')[1] if request == name else None
    with Program(tmp_path, env=wechat.env()) as program:
        assert hangs.wait(DEADLINE)
        program.process.send_signal(number)
        assert program.process.wait(DEADLINE / 4) == 128 + number
        # Python 3.14 tells of an answer that urllib3 had not begun to read.
        assert 'Traceback' not in program.output() or 'Exception ignored' in program.output()
    wechat.healed.set()


# ------------------------------------------------------------------------ runs, and what is told of them


def in_terminal(folder, nn_train, typed, *options, head='', status=0):
    """Run a script with this nn_train in the terminal; return what it prints."""
    script = own_script(folder, nn_train, WITH_OPTIONS, head)
    with Program(folder, '--console', *options, script=script) as program:
        got, output = program.types(typed)
        assert got == status, output
    return output


@pytest.mark.parametrize('code', ['None', '0', '3'])
def test_leaving_with_sys_exit_is_a_crash(tmp_path, code):
    output = in_terminal(
        tmp_path, f'utils.lock_start(); sys.exit({code})', '开始\n', '--then', 'echo x > then.txt', status=1
    )
    assert '训练出错' in output and 'SystemExit' in output and '训练完成' not in output
    assert not (tmp_path / 'then.txt').exists()


def test_an_exception_after_the_end_is_told(tmp_path):
    output = in_terminal(
        tmp_path, "utils.lock_end(wechat_name); raise ValueError('too late')", '开始\n', status=1
    )
    assert '训练出错，已结束' in output and 'ValueError: too late' in output


def test_then_waits_for_its_announcement_and_can_be_called_off_meanwhile(wechat, tmp_path):
    script = own_script(
        tmp_path, 'utils.lock_start()', head='utils.options.then_delay = 0.2', main=WITH_OPTIONS
    )
    with Program(
        tmp_path, '--then', 'echo x >> then.txt', env=wechat.env(), before=QUICK, script=script
    ) as program:
        wechat.ready()
        wechat.breaking = lambda name: 1205 if name == 'webwxsendmsg' else None
        wechat.says('B', '开始')
        program.wait_output('Ret 1205', 3)
        assert not (tmp_path / 'then.txt').exists()
        wechat.says('B', '取消')
        program.wait_output('B：取消')
        wechat.breaking = without_fault
        wechat.wait_text('好，不执行了')
        so_far = len(wechat.heard())
        assert '没有要取消的' in wechat.ask('取消')
        wechat.says('B', '开始')
        wechat.wait_text('已执行', since=so_far)
        assert (tmp_path / 'then.txt').read_text() == 'x\n'
        texts = ''.join(wechat.heard('B', so_far))
        assert texts.index('秒后执行') < texts.index('已执行')


@pytest.mark.parametrize(
    'library, package',
    [
        ('libgomp.so.1', 'apt-get install -y libgomp1'),
        ('libquadmath.so.0', 'libquadmath0'),
        ('libcudart.so.11.0', 'CUDA'),
    ],
)
def test_a_missing_library_is_named_with_its_package(tmp_path, library, package):
    fake = tmp_path / 'fake' / 'mxnet'
    fake.mkdir(parents=True)
    error = f'{library}: cannot open shared object file: No such file or directory'
    (fake / '__init__.py').write_text(f'raise OSError({error!r})')
    paths = os.pathsep.join([str(tmp_path / 'fake'), HERE])
    with Program(
        tmp_path,
        '--demo',
        python=(
            '-c',
            f'import sys; sys.path[:0] = {paths.split(os.pathsep)!r}; exec(open(sys.argv[1]).read())',
        ),
    ) as program:
        status, output = program.types('')
    assert status == 1 and len(lines_of(output)) == 1 and library in output and package in output


COUNTING = """
    train_data, test_data = list(range(10)), list(range(10, 15))
    for epoch in range(1, 5):
        seen = []
        for batch in utils.progress(train_data):
            seen.append(batch)
            for other in utils.progress(test_data):
                pass
        print('SEEN', len(seen), len(list(utils.progress(test_data))))
        if epoch % 2 == 0:
            utils.chat_inf(wechat_name, epoch, 1, 1, train_data, 1)
    utils.lock_end(wechat_name)
"""


def test_progress_counts_the_training_data_alone_and_passes_without_a_report(tmp_path):
    output = in_terminal(tmp_path, COUNTING, 'ti 4\n开始\n')
    assert output.count('SEEN 10 5') == 4
    assert '第 2/4 轮\n' in output and '第 4/4 轮\n' in output and '完成 4/4 轮' in output


RESUMABLE = """
    from mxnet import gluon, nd
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': params[0]})
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    print('TRAINS', *params, trainer.learning_rate, flush=True)
    while utils.lock_start() and epoch <= params[1]:
        for batch in utils.progress(range(params[2])):
            if (epoch, batch) == STOP:
                itchat.instance.receive('停止')
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, 0, 0)
    utils.lock_end(wechat_name)
"""


def test_resume_with_other_values(tmp_path):
    """A value that was set counts; another batch size not within an epoch; a refusal sets none."""
    where = '完成 1/4 轮，第 2 轮到第 5/20 批'
    output = in_terminal(tmp_path, RESUMABLE, 'lr 0.3 ti 4 bs 20\n开始\n', head='STOP = 2, 4')
    assert where in output
    output = in_terminal(tmp_path, RESUMABLE, 'ti 1 bs 7\n继续\n参数\n', head='STOP = None')
    assert (
        '上次的 1 轮都训练完了' in output
        and 'lr = 0.3\n轮数 ti = 1\n批量 bs = 7' in output.split('都训练完了')[1]  # remembered
    )
    output = in_terminal(tmp_path, RESUMABLE, 'lr 0.1 bs 7 ti 4\n继续\n状态\n', head='STOP = 3, 1')
    assert where in output and 'TRAINS 0.1 4 20 0.1' in output  # lr counts without params(), too
    assert 'bs 7：下次开始时生效' in output and '批量 bs = 20' in output.split('继续训练')[1]
    assert '完成 2/4 轮，第 3 轮到第 2/20 批' in output
    output = in_terminal(
        tmp_path, RESUMABLE.replace('range(params[2])', 'range(9)'), '继续\n', head='STOP = None'
    )
    assert '完成 4/4 轮' in output


def remembered_runs(folder):
    """Return what the memory of a program in this folder knows of its runs."""
    with contextlib.closing(sqlite3.connect(folder / '.wechat_train.db')) as db:
        return [json.loads(facts) for [facts] in db.execute('SELECT facts FROM run ORDER BY number')]


def test_the_number_of_a_run_decides_which_is_the_last(tmp_path):
    """Not a clock that was set back, nor a memory that is lost; a time bears its zone."""
    script = own_script(tmp_path, RESUMABLE, WITH_OPTIONS, 'STOP = 2, 3')
    for lr in (0.1, 0.2):
        with Program(tmp_path, '--console', script=script) as program:
            assert program.types(f'lr {lr} ti 4 bs 5\n开始\n')[0] == 0
    folders = sorted(tmp_path.glob('runs/*'))
    for days, folder in enumerate(folders):  # the second one was the last, and looks years older
        for path in (folder / 'last.zip', folder):
            os.utime(path, (10**9 - days * 86400,) * 2)
    folders[1].rename(tmp_path / 'runs' / '20010101-000000')
    (tmp_path / '.wechat_train.db').unlink()
    with Program(tmp_path, '--console', script=script, env={'TZ': 'JST-9'}) as program:
        status, output = program.types('记录\n继续\n开始\n')
    first, second = re.findall(r'^\d\. .*', output, re.M)
    assert 'lr 0.2' in first and 'lr 0.1' in second and '（UTC+09:00）' in first
    assert 'lr = 0.2' in output.split('继续训练')[1].split('批量')[0]
    assert [run['number'] for run in remembered_runs(tmp_path)] in ([1, 2], [1, 2, 3])


def test_resume_is_refused_by_what_cannot_resume(tmp_path):
    in_terminal(tmp_path, RESUMABLE, 'ti 4 bs 20\n开始\n', head='STOP = 2, 4')
    [checkpoint] = tmp_path.glob('runs/*/last.zip')
    before = checkpoint.read_bytes()
    output = in_terminal(
        tmp_path,
        """
        for epoch in range(1, 5):
            utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
        utils.lock_end(wechat_name)
        """,
        '继续\n',
        status=1,
    )
    assert '没有调用 utils.load_checkpoint' in output and '第 1/4 轮\n' not in output
    assert checkpoint.read_bytes() == before


def test_a_run_that_is_done_is_done_whatever_is_set_later(tmp_path):
    lower = RESUMABLE.replace("'停止'", "'ti 1'").replace('params[1]', 'utils.params()[1]')
    output = in_terminal(tmp_path, lower, 'ti 4 bs 5\n开始\n', head='STOP = 3, 1')
    assert '完成 3/3 轮' in output
    output = in_terminal(tmp_path, lower, '状态\nti 2 bs 5\n开始\n', head='STOP = None')
    assert '没训练完的' not in output
    script = own_script(tmp_path, lower, WITH_OPTIONS, 'STOP = None')
    with Program(tmp_path, '--console', script=script) as program:
        program.process.stdin.write('ti 2\n开始\n')
        program.process.stdin.flush()
        program.wait_output('训练完成')
        assert '完成 2/2 轮（上次）' in program.types('ti 10\n状态\n')[1]


SLOW_START = """
    time.sleep(3)
    loop_began = time.monotonic()
    utils.lock_start()
    for epoch in range(1, 5):
        time.sleep(0.3)
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
        if epoch == 2:
            for _ in range(3):
                itchat.instance.receive('状态')
                time.sleep(0.3)
    print('SECONDS', time.monotonic() - loop_began)
    utils.lock_end(wechat_name)
"""


def seconds_left(text):
    return [float(s) for s in re.findall(r'还需约 (\d+\.?\d*) 秒', text)]


def test_the_time_left_does_not_count_the_start_nor_grow_within_an_epoch(tmp_path):
    output = in_terminal(tmp_path, SLOW_START, 'ti 4\n开始\n')
    total = float(re.search('SECONDS (.*)', output)[1])
    first = seconds_left(re.search('第 1/4 轮(.|\n)*?还需约.*', output)[0])[0]
    assert first < 3 * total / 2  # it would be at least nine seconds with the start
    statuses = [seconds_left(text)[0] for text in re.findall(r'训练中(?:.|\n)*?还需约 .*', output)]
    assert len(statuses) == 3 and statuses == sorted(statuses, reverse=True)


@pytest.mark.parametrize('where', ['in the epoch', 'after it'])
def test_the_report_of_a_nan_names_a_batch_that_exists_and_the_runs_lr(tmp_path, where):
    nan = 'utils.check_finite(float("nan"))' if where == 'in the epoch' else 'pass'
    output = in_terminal(
        tmp_path,
        f"""
        for batch in utils.progress(range(100)):
            if batch == 99:
                itchat.instance.receive('lr 0.001')
                {nan}
        utils.chat_inf(wechat_name, 1, float('nan'), 0, [0], 0)
        """,
        'lr 4\n开始\n',
        status=1,
    )
    assert ('第 1 轮第 100/100 批，lr = 4\n' if where == 'in the epoch' else '第 1 轮，lr = 4\n') in output
    assert '可以试试 lr 0.4' in output


def test_what_is_announced_for_a_value_holds(tmp_path):
    """An nn_train that asks for new values has them from the first batch on, others at the next start."""
    for asks, answer, lr in (
        ('utils.params()[0]', 'lr：从下一批起生效', 0.2),
        ('params[0]', 'lr：下次开始时生效', 0.5),
    ):
        folder = tmp_path / str(lr)
        folder.mkdir()
        output = in_terminal(
            folder,
            f"""
            itchat.instance.receive('lr 0.2')
            print('LR', {asks})
            """,
            '开始\n',
        )
        assert answer in output and f'LR {lr}' in output


def test_the_speed_is_told_of_what_was_trained(tmp_path):
    in_terminal(tmp_path, RESUMABLE, 'ti 4 bs 20\n开始\n', head='STOP = 2, 10')
    output = in_terminal(
        tmp_path,
        "itchat.instance.receive('状态')\n" + textwrap.dedent(RESUMABLE),
        '继续\n',
        head='STOP = None',
    )
    status = output.split('继续训练')[1].split('主机')[0]
    assert (
        '训练中：完成 1/4 轮，第 2 轮到第 11/20 批' in status
        and '速度' not in status
        and '还需' not in status
    )


def test_losses_stay_few_and_keep_their_shape():
    losses = utils.Losses()
    for i in range(35000):
        losses.add(i / 100, math.sin(i / 5000))
    assert 5000 <= len(losses.points) <= utils.Losses.POINTS and losses.last == math.sin(34999 / 5000)
    assert all(abs(loss - math.sin(epochs * 100 / 5000)) < 0.01 for epochs, loss in losses.points)
    again = utils.Losses(losses.points, losses.size, losses.rest, losses.last)
    for i in range(35000, 36001):
        losses.add(i / 100, 1), again.add(i / 100, 1)
    assert losses.points == again.points and losses.rest == again.rest


# ------------------------------------------------------------- what is told of a run, and a simple model

BEST = """
    from mxnet import gluon, nd
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': params[0]})
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    print('WEIGHT', net.weight.data().asscalar(), flush=True)
    while utils.lock_start() and epoch <= utils.params()[1]:
        for batch in utils.progress([0], train=True):
            net.weight.set_data(nd.array([[float(epoch)]]))
        if epoch % 2 == 0:
            utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1 - epoch / 10)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, 0, 0)
    utils.lock_end(wechat_name)
"""


def test_the_best_network_is_that_of_the_best_epoch(tmp_path):
    """With a report after every second epoch and a checkpoint after each; 回退 loses nothing."""
    output = in_terminal(tmp_path, BEST, 'ti 5\n开始\n')
    assert '完成 5/5 轮' in output
    [folder] = tmp_path.glob('runs/*')
    assert parameters(str(folder / 'best.zip'))['weight'].tolist() == [[2]]
    assert nd.load(str(folder / 'best.params'))['weight'].asscalar() == 2
    last, log = (folder / 'last.zip').read_bytes(), (folder / 'log.csv').read_bytes()
    output = in_terminal(tmp_path, BEST, '回退\nti 3\n继续\n记录\n')
    assert '回到了第 2 轮（测试精度 0.800）' in output and '继续训练\n完成 2/3 轮' in output
    assert 'WEIGHT [[2.]]' in output and '完成 3/3 轮' in output
    assert (folder / 'last-1.zip').read_bytes() == last and (folder / 'log-1.csv').read_bytes() == log
    assert utils.read_checkpoint(str(folder / 'best.zip'))['row'] == 1


def test_a_damaged_checkpoint_leads_back_to_no_other_runs_best(tmp_path):
    for ti in (2, 3):
        in_terminal(tmp_path, BEST, f'ti {ti}\n开始\n')
    first, second = sorted(tmp_path.glob('runs/*'))
    for name in ('last.zip', 'best.zip'):
        content = bytearray((second / name).read_bytes())
        content[len(content) // 2] ^= 1
        (second / name).write_bytes(content)
        before = (first / 'last.zip').read_bytes()
        output = in_terminal(tmp_path, BEST, '回退\n')
        assert '回到了第 2 轮' in output if name == 'last.zip' else '回不去：' in output
        assert (first / 'last.zip').read_bytes() == before


def test_a_copy_of_a_run_is_no_run(tmp_path):
    """继续 takes the run that is remembered, not the newest files; a run can be brought along."""
    in_terminal(tmp_path, RESUMABLE, 'ti 4 bs 20\n开始\n', head='STOP = 2, 4')
    [folder] = tmp_path.glob('runs/*')
    copied = shutil.copytree(folder, tmp_path / 'runs' / 'copy')
    before = (copied / 'last.zip').read_bytes()
    output = in_terminal(tmp_path, RESUMABLE, '继续\n记录\n', head='STOP = None')
    assert '完成 4/4 轮' in output and '\n2. ' not in output and (copied / 'last.zip').read_bytes() == before
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    in_terminal(elsewhere, RESUMABLE, 'ti 1 bs 20\n开始\n', head='STOP = None')
    os.utime(copied / 'last.zip', (0, 0))
    shutil.copytree(copied, elsewhere / 'runs' / folder.name)
    output = in_terminal(elsewhere, RESUMABLE, '记录\nti 4\n继续\n', head='STOP = None')
    assert output.count(' 轮，1.000，') == 2 and '继续训练\n完成 1/4 轮，第 2 轮到第 5/20 批' in output
    shutil.rmtree(copied)
    folder.rename(tmp_path / 'runs' / 'another name')
    output = in_terminal(tmp_path, RESUMABLE, '记录\n曲线 1\nti 5\n继续\n', head='STOP = None')
    assert '\n2. ' not in output and '图片：runs/another name/' in output and '完成 5/5 轮' in output


def test_a_copy_of_everything_leaves_the_original_alone_and_goes_on(tmp_path):
    """Also one with the memory of an earlier version, which knew less of a run."""
    first, second = tmp_path / 'first', tmp_path / 'second'
    first.mkdir()
    in_terminal(first, RESUMABLE, 'ti 2 bs 20\n开始\n', head='STOP = 2, 4')
    with contextlib.closing(sqlite3.connect(first / '.wechat_train.db')) as db:
        [[facts]] = db.execute('SELECT facts FROM run')
        kept = {name: json.loads(facts)[name] for name in ('folder', 'checkpoint', 'kept', 'how_far')}
        db.execute('UPDATE run SET begun = begun + 0.25, facts = ?', (json.dumps(kept),))
        db.commit()
    shutil.copytree(first, second)
    [before] = [path.read_bytes() for path in first.glob('runs/*/last.zip')]
    output = in_terminal(second, RESUMABLE, '继续\n记录\n曲线 1\n', head='STOP = None')
    assert '完成 2/2 轮' in output and '\n2. ' not in output and '图片：runs/' in output
    assert [path.read_bytes() for path in first.glob('runs/*/last.zip')] == [before]


def test_a_run_that_was_killed_after_an_earlier_end_is_no_complete_one(wechat, tmp_path):
    """And a folder's age says nothing about when a run was."""
    script = own_script(tmp_path, RESUMABLE, WITH_OPTIONS, 'STOP = None')
    with Program(tmp_path, '--console', script=script) as program:
        assert program.types('ti 2 bs 5\n开始\n')[0] == 0
    waiting = RESUMABLE.replace(
        "itchat.instance.receive('停止')", "print('HERE', flush=True), time.sleep(600)"
    )
    script = own_script(tmp_path, waiting, WITH_OPTIONS, 'STOP = 4, 2')
    with Program(tmp_path, '--console', script=script) as program:
        program.process.stdin.write('ti 400\n继续\n')
        program.process.stdin.flush()
        program.wait_output('HERE')
    [folder] = tmp_path.glob('runs/*')
    with contextlib.closing(sqlite3.connect(tmp_path / '.wechat_train.db')) as db:  # forty days ago
        db.execute('UPDATE run SET begun = begun - 40 * 86400')
        db.commit()
        [[begun]] = db.execute('SELECT begun FROM run')
    output = in_terminal(tmp_path, RESUMABLE, '曲线 1\n记录\n', head='STOP = None')
    when = time.strftime('%m-%d', time.gmtime(begun + 8 * 3600))
    assert re.search(rf'1\. {when} .*，3 轮，1\.000，中断', output), output


def test_the_list_of_runs_marks_the_best_of_each_kind_of_data(images, tmp_path):
    for i, (data, accuracy) in enumerate([('demo', 0.99), (images, 0.5), (images, 0.7)]):
        options = ['--demo'] if data == 'demo' else ['--console', '--data', data]
        told = f"""
        utils.lock_start()
        utils.chat_inf(wechat_name, 1, 1, 1, [0], {accuracy})
        utils.lock_end(wechat_name)
        """
        in_terminal(tmp_path, told, f'lr 0.{i + 1}\n开始\n', *options)
    lines = re.findall(r'^\d\. .*', in_terminal(tmp_path, told, '记录\n'), re.M)
    assert [line[-1] == '★' for line in lines] == [True, False, True]
    assert '演示数据' in lines[2] and '演示数据' not in lines[0] + lines[1]


ODD = """
    class Odd(mx.optimizer.SGD):
        def __reduce__(self):
            raise LookupError('an optimizer that cannot be pickled')

    mx.optimizer.Optimizer.register(Odd)
    net = mx.gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = mx.gluon.Trainer(net.collect_params(), Odd(learning_rate=params[0]))
    for epoch in (1, 2):
        utils.lock_start()
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 0.5, **{'\\udc80': 1})
        utils.save_checkpoint(net, trainer, epoch, 0, 0)
    utils.lock_end(wechat_name)
"""


def test_what_cannot_be_kept_is_told_once_and_ends_nothing(tmp_path):
    output = in_terminal(tmp_path, ODD, 'ti 2\n开始\n', head='import mxnet as mx')
    assert output.count('检查点没有写成：LookupError') == 1 and '完成 2/2 轮' in output


def test_a_folder_that_cannot_be_written_costs_the_picture_alone(images, tmp_path):
    (tmp_path / 'runs').write_text('no folder')
    with Program(tmp_path, '--console', '--data', images) as program:
        program.process.stdin.write('ti 1 lr 0.1 bs 600\n开始\n')
        program.process.stdin.flush()
        program.wait_output('训练完成')
        output = program.types('错图\n曲线\n')[1]
    assert '错图没有画成' in output and '曲线图没有画成' in output and '图片：' not in output
    assert '检查点没有写成' in output and '以前写的还在' not in output


WEIGHTED = """
    time.sleep(1)
    itchat.instance.receive('状态')
    train_acc = train_loss = 0
    for n in utils.progress([30] * 3 + [1], train=True):
        train_acc += utils.accuracy(nd.array([[0, 1]] * n), nd.array([n > 1] * n))
        train_loss += utils.batch_loss(nd.array([2 if n > 1 else 0] * n))
    itchat.instance.receive('lr 0.25')
    list(utils.progress(range(9), train=False))
    itchat.instance.receive('状态')
    utils.chat_inf(wechat_name, 1, train_loss, train_acc, None, 0.5)
    utils.lock_end(wechat_name)
"""


def test_numbers_are_those_of_what_was_trained(tmp_path):
    """A last batch of one image weighs as one; a rate set in the test is not the epoch's; loading counts."""
    head = 'from mxnet import nd\nutils.training_iters = 1'
    output = in_terminal(tmp_path, WEIGHTED, '开始\n', head=head)
    assert float(re.search('载入数据、准备网络\n已用 (.*) 秒', output)[1]) >= 1
    assert '完成 0/1 轮，第 1 轮到第 4/4 批\n现在：测试' in output
    assert f'损失 {180 / 91:.4g}\n训练精度 {90 / 91:.3f}\n' in output
    [log] = tmp_path.glob('runs/*/log.csv')
    assert [row['learning_rate'] for row in csv.DictReader(log.read_text().split('\n'))] == ['0.5']
    assert float(re.search('训练完成(?:.|\n)*用时 (.*) 秒', output)[1]) >= 1


COUNTED = """
    trained = itertools.count()
    for _ in utils.progress(([nd.zeros((5, 1))],) * 40, train=True):
        time.sleep(0.01)
        if next(trained) == 38:
            itchat.instance.receive('状态')
    utils.lock_end(wechat_name)
"""


def test_the_speed_counts_the_images_that_come(tmp_path):
    """Whatever bs says: 5 in at least 10 ms."""
    output = in_terminal(tmp_path, COUNTED, 'bs 256\n开始\n', head='import itertools\nfrom mxnet import nd')
    assert 0 < int(re.search(r'速度 (\d+) 张/秒', output)[1]) <= 500


LATE = """
    from mxnet import gluon
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd')
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    while utils.lock_start() and epoch <= params[1]:
        for batch in utils.progress(range(100), train=True):
            time.sleep(0.02)
            if (utils.run.batch, STOP) in ((90, True), (97, False)):
                itchat.instance.receive('停止' if STOP else '状态')
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, 0, 0)
    utils.lock_end(wechat_name)
"""


def test_a_resumed_epochs_time_has_its_first_part_and_what_is_left_is_measured(tmp_path):
    in_terminal(tmp_path, LATE, 'ti 1\n开始\n', head='STOP = True')
    output = in_terminal(tmp_path, LATE, '继续\n', head='STOP = False')
    left = re.search('第 97/100 批(?:.|\n)*?还需约 (.*) 秒', output)[1]
    took = re.search(r'第 1/1 轮(?:.|\n)*?用时 (\d+\.\d)', output)[1]
    assert float(took) >= 2 and float(left) < float(took) / 5  # by the whole time so far, it would be 0.6


def test_a_lowered_end_is_the_end(tmp_path):
    """Not «到第 1 轮为止» and then 2/2: an epoch that is to be trained counts from when that is decided."""
    script = """
    epoch = 1
    while utils.lock_start() and epoch <= utils.params()[1]:
        if epoch == 2:
            itchat.instance.receive('ti 1')
        for batch in utils.progress([0], train=True):
            pass
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
        epoch += 1
    utils.lock_end(wechat_name)
    """
    output = in_terminal(tmp_path, script, 'ti 4\n开始\n')
    assert 'ti：这次训练到第 2 轮为止' in output and '完成 2/2 轮' in output


def test_the_gpu_is_the_one_that_trains(monkeypatch):
    """CUDA_VISIBLE_DEVICES renames them for MXNet, not for NVML; without a GPU nothing is said of one."""
    assert utils.gpu_number() == '' and (shutil.which('nvidia-smi') or utils.gpu_now('0') == ([], None))
    monkeypatch.setattr(mx.context, 'num_gpus', lambda: 1)
    for visible, number in (('2', '2'), ('GPU-f0, 3', 'GPU-f0'), (None, '0')):
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        if visible:
            monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
        assert utils.gpu_number() == number


@pytest.mark.parametrize(
    'where, words',
    [
        ('loading', '还没有准备好数据和网络'),
        ('testing', '没有动静，停在测试'),
        ('no progress()', '没有算完一批，停在第 2 轮第 1 批'),
    ],
)
def test_silence_is_told_wherever_it_is(wechat, tmp_path, where, words):
    script = f"""
    released.wait() if {where!r} == 'loading' else None
    for epoch in (1, 2):
        utils.lock_start()
        released.wait() if {where!r} == 'no progress()' and epoch == 2 else None
        utils.evaluate_accuracy(waiting(), lambda data: nd.ones((1, 2))) if {where!r} == 'testing' else None
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
    utils.lock_end(wechat_name)
    """
    head = """
from mxnet import nd
utils.options.silence = 0.5
released = threading.Event()

def waiting():
    released.wait()
    yield nd.ones((1, 1)), nd.zeros(1)

@itchat.msg_register('Picture')
def go_on(msg):
    released.set()
"""
    with Program(tmp_path, env=wechat.env(), script=own_script(tmp_path, script, head=head)):
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text(words)  # on a busy machine, that it takes long to load comes first
        wechat.says('B', '', MsgType=3)
        wechat.wait_text('训练完成')


def test_a_stop_after_the_patience_has_ended_counts(wechat, tmp_path):
    """It is not «已经在停了», and the command of --then does not run."""
    script = """
    epoch = 1
    while utils.lock_start():
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1 / epoch)
        epoch += 1
    print('EARLY', flush=True)
    input_there.wait()
    utils.lock_end(wechat_name)
    """
    script = own_script(tmp_path, script, WITH_OPTIONS, PAUSING.format(pauses='set()'))
    with Program(tmp_path, '--then', 'echo x > then.txt', env=wechat.env(), script=script) as program:
        wechat.ready()
        wechat.ask('ti 9')
        wechat.ask('早停 2')
        wechat.ask('开始')
        program.wait_output('EARLY')
        assert wechat.ask('停止') == '好，这一批算完就停。'
        wechat.says('B', '', MsgType=3)
        assert wechat.wait_text('训练已停止')
        wechat.wait_picture()
    assert not any('秒后执行' in text for text in wechat.heard() if isinstance(text, str))


def test_to_go_back_is_promised_only_where_it_can_be_done(wechat, tmp_path):
    """In the first epoch nothing stops; while a run is ending it is done."""
    script = own_script(tmp_path, BACK, head=RELEASING.format(hang=1, nan=None))
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        wechat.ask('ti 2')
        wechat.ask('开始')
        assert wechat.ask('回退') == '没有可以回去的检查点：有过一轮、量过好坏以后才有。训练接着做。'
        assert '训练中' in wechat.ask('状态')
        wechat.says('B', '', MsgType=3)
        assert '完成 2/2 轮' in wechat.wait_text('训练完成')
    ending = BACK.replace(
        '    utils.lock_end', "    print('ENDING', flush=True)\n    released.wait()\n    utils.lock_end"
    )
    script = own_script(tmp_path, ending, head=RELEASING.format(hang=None, nan=None))
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        wechat.ask('ti 4')
        wechat.ask('继续')
        program.wait_output('ENDING')
        since = len(wechat.heard())
        wechat.says('B', '回退')
        wechat.wait_text('停下以后回到最好的一轮', since=since)
        wechat.says('B', '', MsgType=3)
        assert '回到了第 2 轮' in wechat.wait_text('回到了', since=since)


def test_ninety_thousand_epochs_do_not_make_the_end_of_one_long(tmp_path):
    """The log is appended to: what is there already is not written again."""
    script = """
    for epoch in range(1, 4):
        utils.lock_start()
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
        path = utils.run.folder + '/log.csv'
        print('INODE', os.stat(path).st_ino, len(open(path).readlines()))
    utils.chat_inf(wechat_name, 4, 1, 1, [0], 1, f1=0.5)
    utils.lock_end(wechat_name)
    """
    output = in_terminal(tmp_path, script, '开始\n')
    inodes, lines = zip(*re.findall(r'INODE (\d+) (\d+)', output))
    assert len(set(inodes)) == 1 and lines == ('2', '3', '4')
    [log] = tmp_path.glob('runs/*/log.csv')
    with open(log) as f:
        assert [(row['epoch'], row['f1']) for row in csv.DictReader(f)] == [
            *[(str(epoch), '') for epoch in (1, 2, 3)],
            ('4', '0.5'),
        ]


def test_what_others_keep_in_runs_and_a_lost_memory_keep_nobody_out(tmp_path):
    """And NaN is never the best: neither as it comes nor as the files tell it."""
    script = """
    for epoch, accuracy in enumerate((math.nan, 0.25, 0.5), 1):
        utils.lock_start()
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], accuracy)
    utils.lock_end(wechat_name)
    """
    in_terminal(tmp_path, script, '开始\n', head='import math')
    for name in ('log.csv', 'last.zip'):
        (tmp_path / 'runs' / name[:3]).mkdir()
    (tmp_path / 'runs' / 'log' / 'log.csv').write_text('step,loss\n1,2\n')
    with zipfile.ZipFile(tmp_path / 'runs' / 'las' / 'last.zip', 'w') as z:
        z.writestr('run.json', '{"epoch": 1}')
    for path in tmp_path.glob('.wechat_train.db*'):
        path.unlink()
    assert '，3 轮，0.500，中断 ★\n“曲线 1”' in in_terminal(tmp_path, script, '记录\n', head='import math')


STEPPING = """
    from mxnet import autograd, gluon, lr_scheduler, nd
    utils.best_by('rmse', lower=True)
    net = gluon.nn.Dense(1, in_units=1, use_bias=False)
    net.initialize()
    halves = lr_scheduler.FactorScheduler(step=3, factor=0.5, base_lr=1)
    how = {'learning_rate': 1, 'lr_scheduler': halves}
    trainer = gluon.Trainer(net.collect_params(), 'sgd', how)
    for epoch in (1, 2):
        utils.lock_start()
        for batch in utils.progress(range(4)):
            before = net.weight.data().asnumpy()
            with autograd.record():
                output = net(nd.ones((1, 1)))
            output.backward()
            trainer.step(1)
            used = (before - net.weight.data().asnumpy()).round(3).item()
        print('USED', used, flush=True)
        utils.chat_inf(wechat_name, epoch, 1, None, [0], rmse=epoch * 2e-5)
        if epoch == 2:
            itchat.instance.receive('记录')
    utils.lock_end(wechat_name)
"""


def test_the_rate_that_is_told_is_the_one_a_scheduler_gave_the_step(tmp_path):
    output = in_terminal(tmp_path, STEPPING, '开始\n')
    used = re.findall('USED (.*)', output)
    assert used == ['0.5', '0.25'] == re.findall(r'学习率 (\d.*)', output)
    [log] = tmp_path.glob('runs/*/log.csv')
    assert [row['learning_rate'] for row in csv.DictReader(log.read_text().split('\n'))] == used
    # not with the 0.5 of 参数, which this Trainer never had
    assert 'lr 1→0.25 bs 256，2 轮，rmse 2e-05，训练中 ★' in output


def test_what_is_said_of_the_rate_where_a_scheduler_decides(tmp_path):
    """After a NaN and at 继续."""
    script = STEPPING.replace(
        '    for epoch in (1, 2)',
        '    first = utils.load_checkpoint(net, trainer)[0]\n    for epoch in range(first, 3)',
    ).replace(
        '    utils.lock_end',
        """        utils.save_checkpoint(net, trainer, epoch, 0, 0)
        utils.batch_loss(nd.array([math.nan]))
    utils.lock_end""",
    )
    output = in_terminal(tmp_path, script, 'lr 0.3\n开始\n', head='import math', status=1)
    assert '可以试试“继续”，再发 lr x0.1' in output
    output = in_terminal(tmp_path, script, '继续\n', head='import math', status=1)
    assert '继续训练\n完成 1/2 轮\n设备 CPU\n学习率 lr = 0.5\n' in output and 'USED 0.25' in output


KEEPING = """
    from mxnet import autograd, gluon, nd
    import mxnet as mx
    net = gluon.nn.Sequential()
    net.add(gluon.nn.Dense(1, in_units=1), *[gluon.nn.Dense(1)] * (WHAT == 'unused'))
    places = [mx.cpu(0), mx.cpu(1)]
    net.initialize(ctx=places)
    trainer = gluon.Trainer(net[0].collect_params(), 'sgd', {'learning_rate': 0.001})
    extra = {'state': random.Random(5).getstate(), 'deep': [{'average': mx.np.ones(2)}, nd.ones(2)]}
    extra['own'] = {'array': 1, 'of': [np.float32(0.5), None, np.array([{}])][:3 if WHAT == 'objects' else 2]}
    if WHAT == 'resumed':
        extra = {}
    epoch, loss, acc = utils.load_checkpoint(net, trainer, extra)
    random.setstate(extra['state'])
    print('EXTRA', random.random(), extra['deep'], extra['own'], flush=True)
    while utils.lock_start() and epoch <= utils.params()[1]:
        for batch in utils.progress(range(2)):
            with autograd.record():
                losses = [net[0](nd.ones((1, 1), ctx=place)) for place in places]
            autograd.backward(losses)
            trainer.step(2)
        numbers = {} if epoch == 3 else {'count': epoch}
        utils.chat_inf(wechat_name, epoch, 1, None, [0], seconds=1000, number=77, loss=3, **numbers)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, loss, acc, extra)
    utils.lock_end(wechat_name)
"""


def test_a_checkpoint_keeps_what_it_is_given_or_says_so(tmp_path):
    """On two devices; parameters that were never computed; tuples, numpy's numbers, names that are taken."""
    for what, why in (
        ('unused', 'DeferredInitializationError'),
        ('objects', 'TypeError: extra：ndarray 存不了'),
    ):
        head = f'import random\nimport numpy as np\nWHAT = {what!r}\nutils.best_by("count")'
        output = in_terminal(tmp_path, KEEPING, '开始\n', head=head)
        assert '完成 2/2 轮' in output and f'检查点没有写成：{why}' in output
    whole = head.replace('objects', 'whole')
    output = in_terminal(tmp_path, KEEPING, '开始\n', head=whole)
    resumed = in_terminal(tmp_path, KEEPING, 'ti 3\n继续\n', head=whole.replace('whole', 'resumed'))
    assert '完成 3/3 轮\n最好的count 2（第 2 轮）' in resumed
    kept = r'EXTRA (?:.|\n)*?(?=\n第 )'
    assert re.search(kept, output)[0] == re.search(kept, resumed)[0]
    *_, log = sorted(tmp_path.glob('runs/*/log.csv'))
    rows = list(csv.DictReader(log.read_text().split('\n')))
    assert [(row['number'], row['loss'], row['loss_'], row['number_']) for row in rows] == [
        (str(i), '1.0', '3.0', '77.0') for i in (1, 2, 3)
    ]
    assert all(float(row['seconds']) < 1000 for row in rows)


LEFT = """
    from mxnet import gluon, nd
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': params[0]})
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    while utils.lock_start() and epoch <= utils.params()[1]:
        batches = utils.progress(range(4))
        for batch in batches:
            trainer.step(1, ignore_stale_grad=True)
            loss += 1
            if (epoch, batch) == (STOP, 2):
                itchat.instance.receive('停止')
            if batch == 2:
                break
        utils.chat_inf(wechat_name, epoch, loss, None)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, loss, 0)
    utils.lock_end(wechat_name)
"""


def test_a_pass_that_is_left_has_ended_though_a_variable_keeps_it(tmp_path):
    output = in_terminal(tmp_path, LEFT, '早停 3\nti 2\n开始\n', head="STOP = 2\nutils.best_by('rmse', True)")
    assert '第 1/2 轮\n损失 1\n' in output and '好，rmse 3 轮没有更好' in output
    assert '训练已停止\n完成 1/2 轮，第 2 轮到第 3/4 批' in output
    output = in_terminal(tmp_path, LEFT.replace('batch == 2:', 'False:'), '继续\n', head='STOP = None')
    assert '第 2/2 轮\n损失 1\n' in output and '训练完成\n完成 2/2 轮\n' in output


PLANNED = """
    import json, math, signal
    import mxnet as mx
    from mxnet import autograd, gluon, nd
    with open('plan.json') as f:
        plan = json.load(f)

    def act(epoch, where):
        if (what := plan['acts'].pop(f'{epoch} {where}', None)) is None:
            return
        with open('plan.json', 'w') as f:  # nothing is done twice, not even after a death
            json.dump(plan, f)
        if what == 'raise':
            raise ValueError('as planned')
        if what == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        itchat.instance.receive(what)

    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': params[0]})
    epoch, train_loss, train_acc = utils.load_checkpoint(net, trainer)
    while utils.lock_start() and epoch <= utils.params()[1]:
        spec = plan['epochs'][epoch]
        if spec['before']:
            list(utils.progress(range(7), **spec['word']))
        for i, n, loss, right in utils.progress(spec['batches']):
            trainer.set_learning_rate(utils.params()[0])
            with autograd.record():
                output = net(nd.ones((n, 1))).sum()
            output.backward()
            trainer.step(n)
            train_loss += utils.batch_loss(nd.array([loss] * n))
            label = nd.array([1] * right + [0] * (n - right))
            train_acc += utils.accuracy(nd.array([[0, 1]] * n), label)
            act(epoch, i)
            if i == spec['break']:
                break
        if spec['after']:
            list(utils.progress(range(5), **spec['word']))
        act(epoch, 'test')
        if spec['report']:
            numbers = {} if spec['f1'] is None else {'f1': spec['f1']}
            test_acc = math.nan if spec['test'] == 'nan' else spec['test']
            utils.chat_inf(wechat_name, epoch, train_loss, train_acc, None, test_acc, **numbers)
        if spec['save']:
            epoch, train_loss, train_acc = utils.save_checkpoint(net, trainer, epoch, train_loss, train_acc)
        else:
            epoch, train_loss, train_acc = epoch + 1, 0, 0
        act(epoch - 1, 'saved')
    utils.lock_end(wechat_name)
"""


def draw_plan(rng, mortal):
    """Return what a run does, epoch by epoch, and what a person says meanwhile."""
    epochs, acts = [None], {}
    for _ in range(9):
        sizes = [rng.randint(1, 6) for _ in range(rng.randint(1, 4))]
        batches = [[i, n, rng.choice([0.25, 0.5, 1, 2, 3]), rng.randint(0, n)] for i, n in enumerate(sizes)]
        epochs.append(
            {
                'batches': batches,
                'break': rng.randrange(len(batches)) if rng.random() < 0.15 else None,
                'before': rng.random() < 0.15,
                'after': rng.random() < 0.3,
                'word': rng.choice([{}, {'train': False}]),
                'test': rng.choice([0.125, 0.25, 0.5, 0.75, 0.875, None, 'nan']),
                'f1': rng.choice([None, 0.5, 0.625]),
                'report': rng.random() < 0.9,
                'save': rng.random() < 0.85,
            }
        )
    says = [
        '停止',
        '停止',
        '状态',
        '状态',
        '状态',
        '回退',
        'raise',
        'lr 0.25',
        'lr 0.125',
        'ti 1',
        'ti 4',
        '早停 1',
    ]
    for _ in range(rng.randint(0, 5)):
        epoch = rng.randint(1, 4)
        where = rng.choice(['test', 'saved', *range(len(epochs[epoch]['batches']))])
        acts[f'{epoch} {where}'] = rng.choice(says)
    if mortal:
        acts[f'{rng.randint(1, 3)} 0'] = 'kill'
    return {'epochs': epochs, 'acts': acts}


class Model:
    """What a person is to be told, computed as simply as can be: the training function read line by line."""

    def __init__(self):
        self.lr, self.ti, self.patience = 0.5, 2, 0  # for the next run
        self.chosen = set()
        self.checkpoints = []  # (run, what its last.zip holds): the last run's last
        self.told = []
        self.runs = 0
        self.ends = {}  # number of a run -> how it ended, the best epoch and its number, how many epochs

    def tell(self, text):
        self.told.append(text)

    def length(self):
        return max(self.run['ti'], self.run['epochs'] + (self.run['batch'] > 0), self.run['promised'])

    def how_far(self):
        run = self.run
        text = f'完成 {run["epochs"]}/{self.length()} 轮'
        if run['batch']:
            text += f'，第 {run["epochs"] + 1} 轮到第 {run["batch"]}/{run["batches"]} 批'
        return text

    def best(self):
        rows = [row for row in self.run['rows'] if row['test'] not in (None, 'nan')]
        return max(rows, key=lambda row: row['test'], default=None)  # the first of them

    def best_lines(self):
        best = self.best()
        return [f'最好的测试精度 {best["test"]:.3f}（第 {best["epoch"]} 轮）'] if best else []

    def start(self, plan, resume=False):
        """开始 or 继续, and what comes of it."""
        if resume and not self.checkpoints:
            return self.tell('没有可以继续的训练，发“开始”从头训练。')
        if resume:
            number, kept = max(self.checkpoints, key=lambda pair: pair[0])
            ti = self.ti if 'ti' in self.chosen else kept['ti']
            if kept['epochs'] >= ti:
                return self.tell(f'上次的 {kept["epochs"]} 轮都训练完了。')
            self.lr, self.ti = self.lr if 'lr' in self.chosen else kept['lr'], ti
            self.run = {
                **copy.deepcopy(kept),
                'lr': self.lr,
                'ti': ti,
                'number': number,
                'resumed': kept['epochs'],
            }
            self.tell(f'继续训练\n{self.how_far()}\n')
        else:
            self.runs += 1
            self.run = {
                'lr': self.lr,
                'ti': self.ti,
                'epochs': 0,
                'batch': 0,
                'batches': 0,
                'rows': [],
                'sums': [],
            }
            self.run.update(number=self.runs, best_zip=None, resumed=0, rate=None, promised=0)
            self.tell('开始训练\n')
        self.train(plan)

    def train(self, plan):
        run = self.run
        run.update(reason=None, cut=False, rolling=False, phase='载入', saved=False, promised=0)
        try:
            self.loop(plan)
            run['reason'] = run['reason'] or '完成'
        except ValueError:
            run['reason'] = '出错'
        except InterruptedError:
            return self.die(plan)
        self.close()

    def loop(self, plan):
        run, epoch = self.run, self.run['epochs'] + 1
        first, sums = (run['batch'], run['sums']) if run['batch'] else (0, [])
        while not run['reason']:
            run['promised'] = min(run['epochs'] + 1, run['ti'])
            if epoch > run['ti']:
                break
            spec = plan['epochs'][epoch]
            if run['batch'] and not first:  # the one before was not reported
                run['epochs'] += 1
            run['batches'], run['batch'] = len(spec['batches']), first
            for i, n, loss, right in spec['batches'][first:]:
                run['phase'], run['rate'] = None, run['lr']
                sums.append((n, loss, right))
                if not self.act(plan, epoch, i):
                    run['batch'] = i + 1
                    raise ValueError
                run['batch'] = i + 1
                if run['reason']:
                    run['cut'] = True
                    break
                if i == spec['break']:
                    break
            first, run['phase'] = 0, '测试'
            self.act(plan, epoch, 'test') or self.fail()
            if spec['report'] and not run['cut']:
                self.report(epoch, spec, sums)
            if spec['save']:
                self.save(epoch, sums)
            if not (spec['save'] and run['cut']):
                epoch, sums = epoch + 1, []
            self.act(plan, epoch - 1, 'saved') or self.fail()

    def fail(self):
        raise ValueError

    def report(self, epoch, spec, sums):
        run, images = self.run, sum(n for n, _, _ in sums)
        loss, acc = sum(n * x for n, x, _ in sums) / images, sum(right for _, _, right in sums) / images
        run['rows'].append(
            {
                'epoch': epoch,
                'loss': loss,
                'acc': acc,
                'lr': run['lr'] if run['rate'] is None else run['rate'],
                **spec,
            }
        )
        run.update(epochs=epoch, batch=0, phase=None, rate=None)
        lines = [f'第 {epoch}/{self.length()} 轮', f'损失 {loss:.4g}', f'训练精度 {acc:.3f}']
        lines += [] if spec['test'] is None else [f'测试精度 {float(spec["test"]):.3f}']
        lines += [] if spec['f1'] is None else [f'f1 {spec["f1"]:.4g}']
        self.tell('\n'.join([*lines, '用时 ']))
        best = self.best()
        if best and not run['reason'] and 0 < self.patience <= epoch - max(best['epoch'], run['resumed']):
            if epoch < self.length():
                run['reason'], run['patience'] = '早停', self.patience

    def save(self, epoch, sums):
        run = self.run
        whole = not run['cut']
        if whole:
            run.update(epochs=epoch, batch=0)
        kept = {
            'epochs': epoch - (not whole),
            'batch': 0 if whole else run['batch'],
            'sums': list(sums) * (not whole),
        }
        kept.update({name: copy.deepcopy(run[name]) for name in ('lr', 'ti', 'rows', 'batches', 'best_zip')})
        kept.update(rate=run['rate'] if run['cut'] else None, promised=0)
        if whole and run['rows'] and run['rows'][-1]['epoch'] == epoch and self.best() is run['rows'][-1]:
            run['best_zip'] = kept['best_zip'] = {**copy.deepcopy(kept)}
            kept['best_zip']['best_zip'] = run['best_zip']
        self.checkpoints = [pair for pair in self.checkpoints if pair[0] != run['number']] + [
            (run['number'], kept)
        ]
        run['saved'] = True

    def act(self, plan, epoch, where):
        """Do what is planned here; return False when that raises."""
        run, what = self.run, plan['acts'].pop(f'{epoch} {where}', None)
        if what == 'raise':
            return False
        if what == 'kill':
            raise InterruptedError
        if what in ('停止', '回退'):
            if what == '回退' and not run['best_zip']:
                self.tell('没有可以回去的检查点：有过一轮、量过好坏以后才有。训练接着做。')
                return True
            again = run['reason'] and run['reason'] != '早停'
            run['rolling'] |= what == '回退'
            run['reason'] = run['reason'] if again else '停止'
            self.tell('已经在停了' if again else '好，这一批算完就停。')
        elif what == '状态':
            lines = ['正在停止：' if run['reason'] else '训练中：']
            lines[0] += self.how_far()
            lines += ['现在：测试'] * (run['phase'] == '测试' and not run['reason'])
            self.tell('\n'.join(lines) + '\n')
            if run['rows']:
                row = run['rows'][-1]
                self.tell('\n'.join([f'第 {row["epoch"]} 轮：损失 {row["loss"]:.4g}']))
                for line in self.best_lines():
                    self.tell(line + '\n')
            self.tell(f'学习率 lr = {run["lr"]:g}\n轮数 ti = {run["ti"]}\n')
        elif what:
            self.set(what)
        return True

    def set(self, what):
        """A value is set, or the patience."""
        name, value = what.split()
        if name == '早停':
            self.patience = int(value)
            return
        setattr(self, name, float(value) if name == 'lr' else int(value))
        self.chosen.add(name)
        if not self.run['reason']:
            self.run[name] = getattr(self, name)
            self.tell('lr：从下一批起生效' if name == 'lr' else f'ti：这次训练到第 {self.length()} 轮为止')

    def close(self):
        run = self.run
        lines = {
            '停止': ['训练已停止', self.how_far()],
            '完成': ['训练完成', self.how_far()],
            '早停': [f'训练完成：{run.get("patience")} 轮没有更好，早停了', self.how_far()],
            '出错': ['ValueError: as planned'],
        }[run['reason']]
        self.tell('\n'.join([*lines, *self.best_lines()]) if run['reason'] != '出错' else lines[0])
        if run['rolling']:
            best = run['best_zip']
            self.checkpoints = [pair for pair in self.checkpoints if pair[0] != run['number']]
            self.checkpoints.append((run['number'], {**copy.deepcopy(best), 'best_zip': best}))
            self.tell(f'回到了第 {best["epochs"]} 轮（测试精度 {best["rows"][-1]["test"]:.3f}）')
        self.ended()

    def die(self, plan):
        """The process was killed: the run goes on by itself from what it has saved since it started."""
        run = self.run
        self.tell('训练的进程没有了：被信号 SIGKILL 结束了')
        if run['saved'] and not run['reason']:
            self.tell('起来以后自己从检查点接着训练')
            number, kept = max(self.checkpoints, key=lambda pair: pair[0])
            lr = self.lr if 'lr' in self.chosen else kept['lr']
            self.lr, self.ti = lr, self.ti if 'ti' in self.chosen else kept['ti']
            self.run = {
                **copy.deepcopy(kept),
                'lr': self.lr,
                'ti': self.ti,
                'number': number,
                'resumed': kept['epochs'],
            }
            self.train(plan)
        else:
            run['reason'] = '中断'
            self.ended()

    def ended(self):
        run, best = self.run, self.best()
        log = (run['best_zip'] if run['rolling'] else run)['rows']
        rows = [(row['epoch'], row['loss'], row['lr']) for row in log]
        self.ends[run['number']] = (
            run['reason'],
            best and [best['epoch'], best['test']],
            len(run['rows']),
            rows,
        )


def ends_of(folder):
    """Return of each run that is remembered how it ended, its best epoch, how many it had, and its log."""
    runs = remembered_runs(folder)
    return {run['number']: (run['ending'], run['best'], run['epochs'], logged(run)) for run in runs}


def logged(run):
    """Return epoch, loss and learning rate of the rows in a run's log."""
    if not run['epochs']:
        return []
    with open(os.path.join(run['folder'], 'log.csv')) as f:
        return [(int(r['epoch']), float(r['loss']), float(r['learning_rate'])) for r in csv.DictReader(f)]


@pytest.mark.parametrize('part', range(3))
def test_what_is_told_of_any_run_is_what_a_simple_model_says(part, tmp_path):
    """Random commands, breaks, exceptions, tests, checkpoints and deaths: a hundred runs in each part."""
    script = own_script(
        tmp_path,
        PLANNED,
        WITH_OPTIONS,
        # three hundred pictures take minutes
        "utils.draw_curve = lambda path, **drawn: open(path, 'wb').close()",
    )
    rng, model = random.Random(part), Model()
    with Program(tmp_path, '--console', script=script) as program:

        def types(text):
            program.process.stdin.write(text + '\n')
            program.process.stdin.flush()

        seen = 0
        for number in range(100):
            plan = draw_plan(rng, mortal=number % 50 == 20)
            (tmp_path / 'plan.json').write_text(json.dumps(plan))
            ti, patience, word = (
                rng.randint(1, 4),
                rng.choice([0, 0, 0, 2]),
                rng.choice(['开始', '开始', '继续']),
            )
            model.told, model.run = [], {'reason': 'none'}
            for each in (f'ti {ti}', f'早停 {patience}'):
                types(each)
                model.set(each)
            types(word)
            model.start(copy.deepcopy(plan), resume=word == '继续')
            deadline = time.monotonic() + DEADLINE
            while True:
                output = program.output()[seen:]
                at, missing = 0, None
                for text in model.told:
                    at = output.find(text, at)
                    if at < 0:
                        missing = text
                        break
                    at += len(text)
                if missing is None:
                    break
                assert time.monotonic() < deadline, (number, missing, model.told, plan, output)
                time.sleep(0.01)
            seen += at
            while (found := ends_of(tmp_path)) != model.ends:
                assert time.monotonic() < deadline, (
                    number,
                    set(map(str, found.items())) ^ set(map(str, model.ends.items())),
                )
                time.sleep(0.01)


# ------------------------------------------------------------- scripts of other people, as they write them

HOLDING = """
held = 0

def holding(function):  # the second run waits in its middle for 停止
    def wrapped(*args):
        global held
        held += 1
        if held == HOLD:
            print('HELD', flush=True)
            while utils.running:
                time.sleep(0.01)
        return function(*args)
    return wrapped

utils.batch_loss = holding(utils.batch_loss)
"""

REGRESSION = """
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

def nn_train(wechat_name, params):
    learning_rate, training_iters, batch_size = params
    features = nd.random.normal(shape=(64, 2))
    labels = nd.dot(features, nd.array([[2], [-3.4]])) + 4.2
    dataset = gluon.data.ArrayDataset(features, labels)
    train_data = gluon.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=1)
    net = nn.Dense(1)
    net.initialize(init.Normal(0.01))
    square_loss = gluon.loss.L2Loss()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': learning_rate})
    utils.best_by('rmse', lower=True)
    epoch, train_loss, _ = utils.load_checkpoint(net, trainer)
    while utils.lock_start() and epoch <= utils.params()[1]:
        for data, label in utils.progress(train_data):
            trainer.set_learning_rate(utils.params()[0])
            with autograd.record():
                loss = square_loss(net(data), label)
            loss.backward()
            trainer.step(data.shape[0])
            train_loss += utils.batch_loss(loss)
        rmse = ((net(features) - labels) ** 2).mean().sqrt().asscalar()
        utils.chat_inf(wechat_name, epoch, train_loss, None, train_data, None, rmse=rmse)
        epoch, train_loss, _ = utils.save_checkpoint(net, trainer, epoch, train_loss, 0)
    utils.lock_end(wechat_name)
"""

GAN = """
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

def nn_train(wechat_name, params):
    learning_rate, training_iters, batch_size = params
    X = nd.dot(nd.random.normal(shape=(64, 2)), nd.array([[1, 2], [-0.1, 0.5]])) + nd.array([1, 2])
    train_data = gluon.data.DataLoader(gluon.data.ArrayDataset(X), batch_size, shuffle=True)
    net_G = nn.Sequential()
    net_G.add(nn.Dense(2))
    net_D = nn.Sequential()
    net_D.add(nn.Dense(5, activation='tanh'), nn.Dense(3, activation='tanh'), nn.Dense(1))
    for net in (net_G, net_D):
        net.initialize(init.Normal(0.02), force_reinit=True)
    loss = gluon.loss.SigmoidBCELoss()
    trainer_G = gluon.Trainer(net_G.collect_params(), 'adam', {'learning_rate': learning_rate / 10})
    trainer_D = gluon.Trainer(net_D.collect_params(), 'adam', {'learning_rate': learning_rate})
    average = {'generator': None}
    nets, trainers = [net_G, net_D], [trainer_G, trainer_D]
    epoch, loss_D, _ = utils.load_checkpoint(nets, trainers, average)
    print('AVERAGE', average['generator'], flush=True)
    while utils.lock_start() and epoch <= utils.params()[1]:
        for X in utils.progress(train_data):
            n = X.shape[0]
            Z = nd.random.normal(0, 1, shape=(n, 2))
            with autograd.record():
                fake = net_G(Z)
                l_D = (loss(net_D(X), nd.ones((n,))) + loss(net_D(fake.detach()), nd.zeros((n,)))) / 2
            l_D.backward()
            trainer_D.step(n)
            with autograd.record():
                l_G = loss(net_D(net_G(Z)), nd.ones((n,)))
            l_G.backward()
            trainer_G.step(n)
            loss_D += utils.batch_loss(l_D)
            weight = net_G[0].weight.data()
            before = average['generator']
            average['generator'] = weight if before is None else (before + weight) / 2
        utils.chat_inf(wechat_name, epoch, loss_D, None, train_data)
        epoch, loss_D, _ = utils.save_checkpoint(nets, trainers, epoch, loss_D, 0, average)
    utils.lock_end(wechat_name)
"""

SCHEDULED = """
from mxnet import autograd, gluon, lr_scheduler, nd
from mxnet.gluon import nn

def train_epoch(net, loss, trainer, train_data, sums):
    for data, label in utils.progress(train_data):
        trainer.optimizer.wd = utils.chat_param('wd', 1e-4)
        with autograd.record():
            output = net(data)
            l = loss(output, label)
        l.backward()
        trainer.step(data.shape[0])
        sums[0] += utils.batch_loss(l)
        sums[1] += utils.accuracy(output, label)

def nn_train(wechat_name, params):
    learning_rate, training_iters, batch_size = params
    X = nd.random.normal(shape=(96, 4))
    y = (X.sum(axis=1) > 0).reshape((-1, 1))  # labels of shape (N, 1)
    parts = [gluon.data.ArrayDataset(X[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)]
    train_data = gluon.data.DataLoader(parts[0], batch_size, shuffle=True)
    valid, unseen = (gluon.data.DataLoader(part, 32) for part in parts[1:])
    net = nn.HybridSequential()
    net.add(nn.Dense(8, activation='relu'), nn.Dropout(0.1), nn.Dense(2))
    net.initialize()
    net.hybridize()
    scheduler = lr_scheduler.FactorScheduler(step=5, factor=0.5, base_lr=learning_rate)
    how = {'learning_rate': learning_rate, 'lr_scheduler': scheduler}
    trainer = gluon.Trainer(net.collect_params(), 'adam', how)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    epoch, *sums = utils.load_checkpoint(net, trainer)
    while utils.lock_start() and epoch <= utils.params()[1]:
        train_epoch(net, loss, trainer, train_data, sums)
        test_acc = utils.evaluate_accuracy(valid, net)
        numbers = {'unseen': utils.evaluate_accuracy(unseen, net)}
        utils.chat_inf(wechat_name, epoch, *sums, train_data, test_acc, **numbers)
        epoch, *sums = utils.save_checkpoint(net, trainer, epoch, *sums)
    utils.lock_end(wechat_name)
"""

ESTIMATOR = 'import mxnet as mx\n' + blocks('python')[1]


@pytest.mark.parametrize('name', ['REGRESSION', 'GAN', 'SCHEDULED', 'ESTIMATOR'])
def test_scripts_as_people_write_them(name, wechat, tmp_path):
    """A run; one that is stopped in its middle and gone on with: equal to the bit; 状态, 回退, 曲线."""
    script, batches = tmp_path / 'theirs.py', 4
    draws = name in (
        'GAN',
        'SCHEDULED',
    )  # random numbers in the loop, which come again from epoch to epoch only
    hold = 4 * batches + (0 if draws else 2)
    head = f'import utils, itchat, os, sys, threading, time\nHOLD = {hold}\n{HOLDING}'
    script.write_text(head + globals()[name] + MAIN)
    with Program(tmp_path, env=wechat.env(), script=str(script)) as program:
        wechat.ready()
        wechat.ask({'SCHEDULED': 'ti 3 bs 8', 'GAN': 'ti 3 bs 16 lr 0.05'}.get(name, 'ti 3 bs 16 lr 0.1'))
        for word, end in (('开始', '训练完成'), ('开始', '训练已停止'), ('继续', '训练完成')):
            since = len(wechat.heard())
            assert word in wechat.ask(word)
            if end == '训练已停止':
                program.wait_output('HELD')
                assert f'第 {2 - draws} 轮到第 {1 + 2 * draws}/4 批' in wechat.ask('状态')
                wechat.ask('停止')
            told = wechat.wait_text(end, since=since)
        assert '完成 3/3 轮' in told
        wechat.wait_picture(since=since)
        whole, broken = [read_parts(path / 'last.zip') for path in sorted(tmp_path.glob('runs/*'))]
        assert whole.keys() == broken.keys()
        assert all(np.array_equal(whole[key], broken[key]) for key in whole), program.output()
        SEEN_AT_THE_END[name](wechat, program, told)
        back = '没有可以回去的检查点' if name == 'GAN' else '回到了第'  # which was best, nobody has measured
        assert back in wechat.ask('回退')
        since = len(wechat.heard())
        wechat.says('B', '曲线 2')
        wechat.wait_picture(since=since)
        before, since = wechat.ask('参数'), len(wechat.heard())
        assert 'ti = 5' in wechat.ask('lr x0.5 ti 5') and wechat.ask('参数') != before
        wechat.ask('继续')  # with other values
        wechat.wait_text('第 5/5 轮', since=since)
        assert '完成 5/5 轮' in wechat.wait_text('训练完成', since=since)


def read_parts(path):
    """Return all arrays of all networks in a checkpoint, and those of what else it keeps."""
    found, folder = {}, path.parent / 'unpacked'
    with zipfile.ZipFile(path) as checkpoint:
        checkpoint.extractall(folder)
    for part in sorted(folder.glob('*.params')):
        found.update({(part.name, key): value.asnumpy() for key, value in nd.load(str(part)).items()})
    with np.load(folder / 'extra.npz') as arrays:
        found.update({('extra', key): arrays[key] for key in arrays})
    return found


def see_regression(wechat, program, told):
    report = [text for text in wechat.heard() if str(text).startswith('第 3/3 轮')][0]
    assert re.fullmatch(r'第 3/3 轮\n损失 \S+\nrmse \S+\n用时 .*', report)
    assert re.search(r'最好的rmse \S+（第 3 轮）', told) and '精度' not in told + wechat.ask('状态')


def see_gan(wechat, program, told):
    assert program.output().count('AVERAGE None') == 2 and 'AVERAGE \n[[' in program.output()
    assert '不在检查点里' not in ''.join(filter(lambda text: isinstance(text, str), wechat.heard()))


def see_scheduled(wechat, program, told):
    rates = [re.search('学习率 (.*)', text)[1] for text in wechat.heard() if str(text).startswith('第 ')]
    assert rates == ['0.5', '0.25', '0.125'] * 2  # four batches an epoch, half after five
    assert 'unseen' in wechat.ask('状态') and 'wd = 0.0001' in wechat.ask('参数')
    assert 'wd 0.0001：训练函数自己的值' in wechat.ask('帮助')
    assert 'wd = 0.01' in wechat.ask('wd 0.01') and '不行：wd 要是不小于 0 的数' in wechat.ask('wd -1')


def see_estimator(wechat, program, told):
    report = [text for text in wechat.heard() if str(text).startswith('第 3/3 轮')][0]
    assert re.fullmatch(r'第 3/3 轮\n损失 \S+\n训练精度 \S+\n测试精度 \S+\n用时 .*', report)
    assert 'Logging error' not in program.output()


SEEN_AT_THE_END = {
    'REGRESSION': see_regression,
    'GAN': see_gan,
    'SCHEDULED': see_scheduled,
    'ESTIMATOR': see_estimator,
}


ASKING = """
    while utils.lock_start() and utils.run.epochs < utils.params()[1]:
        print('VALUES', *[utils.chat_param(name, *how) for name, how in ASKED.items()], flush=True)
        utils.chat_inf(wechat_name, utils.run.epochs + 1, 1, None, [0])
    utils.lock_end(wechat_name)
"""


def test_values_by_chat_are_those_the_script_has_now(tmp_path):
    """Another kind or other limits count; what is no longer asked for is forgotten; no digit is lost."""

    def asks(typed, **asked):
        return in_terminal(tmp_path, ASKING, typed, head=f'ASKED = {asked}')

    asks('ti 1\n开始\n', steps=(1,), rate=(0.5,), gone=(3,))
    assert 'steps = 12345678\n' in asks('steps 12345678\nrate 0.25\n', steps=(1,))
    output = asks('开始\n', steps=(1.0, 0, 10), rate=(1,))
    assert 'VALUES 1.0 1\n' in output  # those that were set do not fit any more
    output = asks('帮助\nsteps 0.5\nsteps 11\nrate 0.5\n', steps=(1.0, 0, 10))
    assert 'steps 1.0：' in output and 'steps = 0.5\n' in output and 'gone' not in output
    assert '不行：steps 要是不小于 0、不大于 10 的数' in output and '不行：rate 要是不小于 0 的整数' in output


FITTING = """
    from mxnet.gluon.contrib.estimator import estimator
    class Handler(utils.ChatHandler):
        def train_begin(self, *args, **kwargs):
            super().train_begin(*args, **kwargs)

        def batch_end(self, *args, **kwargs):
            print('BATCH', flush=True)
            return super().batch_end(*args, **kwargs)

    net = gluon.nn.Dense(6)
    net.initialize()
    outputs = gluon.nn.Sequential()
    outputs.add(net, gluon.nn.HybridLambda(lambda F, x: x.reshape((-1, 2, 3))))
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    loss = gluon.loss.SoftmaxCrossEntropyLoss(axis=1)
    est = estimator.Estimator(outputs, loss, Accuracy(axis=1), trainer=trainer)
    est.logger.setLevel('ERROR')
    est.fit(LOADER, LOADER, epochs=2, event_handlers=[Handler(wechat_name)])
"""

LOADING_ONCE = """
import mxnet as mx
from mxnet import gluon, nd
X = nd.random.normal(shape=(60, 4))
LOADER = gluon.data.DataLoader(gluon.data.ArrayDataset(X, X[:, :3] > 0), 16)  # the last batch is smaller
tested = 0

class Accuracy(mx.metric.Accuracy):
    def update(self, *args):
        global tested
        super().update(*args)
        tested += 'validation' in self.name
        if tested == 6 and 'validation' in self.name:
            itchat.instance.receive('状态')
            itchat.instance.receive('停止')
"""


def test_an_estimator_whatever_it_is_given(tmp_path):
    """One loader to train and to test with, used again; its own metric counts; ti by chat."""
    script = own_script(tmp_path, FITTING, WITH_OPTIONS, LOADING_ONCE)
    with Program(tmp_path, '--console', script=script) as program:
        program.process.stdin.write('ti 3\n开始\n')
        program.process.stdin.flush()
        program.wait_output('训练已停止')
        assert '训练中：完成 1/3 轮，第 2 轮到第 4/4 批\n现在：测试\n' in program.output()
        assert '训练已停止\n完成 2/3 轮\n' in program.output() and program.output().count('BATCH') == 8
        program.types('ti 4\n继续\n')
    output = program.output()
    assert '继续训练\n完成 2/4 轮' in output and '训练完成\n完成 4/4 轮' in output
    assert output.count('BATCH') == 16 and re.search(r'第 4/4 轮\n损失 .*\n训练精度 0\.\d+\n测试精度', output)


# ----------------------------------------------------------------------------------------- its files


def test_what_a_killed_program_left_half_written_is_removed(tmp_path):
    folder = tmp_path / 'runs' / '1'
    (folder / 'tmpabc.new').mkdir(parents=True)
    for name in ('last.zip.new', 'tmpabc.new/net.params', 'log.csv'):
        (folder / name).write_text('x')
    (tmp_path / 'checkpoint-abc.new').mkdir()  # of one of the --workers
    with Program(tmp_path, '--console') as program:
        assert program.types('')[0] == 0
    assert [path.name for path in folder.iterdir()] == ['log.csv']
    assert not (tmp_path / 'checkpoint-abc.new').exists()


PICKLE = b"cos\nsystem\n(S'touch planted'\ntR."


@pytest.mark.parametrize('who', ['file', 'folder'])
def test_a_checkpoint_that_others_can_write_is_not_unpickled(tmp_path, who):
    in_terminal(tmp_path, RESUMABLE, 'ti 4 bs 20\n开始\n', head='STOP = 2, 4')
    [checkpoint] = tmp_path.glob('runs/*/last.zip')
    with zipfile.ZipFile(checkpoint) as z:
        content = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(checkpoint, 'w') as z:
        for name, data in content.items():
            z.writestr(name, PICKLE if name == 'trainer.states' else data)
    (checkpoint if who == 'file' else checkpoint.parent).chmod(0o777)
    output = in_terminal(tmp_path, RESUMABLE, '继续\n', head='STOP = None')
    assert '没有可以继续的训练' in output and 'chmod go-w' in output and not (tmp_path / 'planted').exists()
    assert checkpoint.exists()


def damage_zip(content, i):
    return bytes([*content[:i], content[i] ^ 0xFF, *content[i + 1 :]])


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_damaged_in_a_checkpoint_it_is_recognised(data, tmp_path, monkeypatch):
    path = tmp_path / 'runs' / '1' / 'last.zip'
    monkeypatch.setattr(utils, 'folders', {1: str(path.parent)})
    if not (tmp_path / 'whole').exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        net = nn.Dense(1, in_units=1)
        net.initialize()
        trainer = gluon.Trainer(net.collect_params(), 'sgd')
        state, log = utils.Run().state(2, 0, 0), utils.History().csv()
        utils.write_checkpoint(str(path), net, trainer, state, np.zeros((5, 2)), log)
        (tmp_path / 'whole').write_bytes(path.read_bytes())
    whole = (tmp_path / 'whole').read_bytes()
    damaged = data.draw(
        st.one_of(
            st.integers(0, len(whole) - 1).map(lambda i: damage_zip(whole, i)),
            st.integers(0, len(whole) - 1).map(lambda n: whole[:n]),
            st.binary(max_size=200),
        )
    )
    path.write_bytes(damaged)
    found, state = utils.last_checkpoint()  # raises nothing
    assert found is None or state['epoch'] == 2
    assert path.exists() == (found is not None)


def test_a_second_program_in_the_folder_is_told_of_the_first(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()) as first:
        wechat.ready()
        with Program(tmp_path, '--console', log='second.txt') as second:
            status, output = second.types('参数\n')
        assert status == 1 and f'进程 {first.process.pid}' in output and len(lines_of(output)) == 1
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
    with Program(tmp_path, '--console') as third:  # the first was killed
        assert third.types('')[0] == 0


def test_a_folder_called_demo_is_a_folder(images, tmp_path):
    shutil.copytree(images, tmp_path / 'demo')
    with Program(tmp_path, '--console', '--data', 'demo') as program:
        output = program.types('ti 1 bs 1000\n开始\n')[1]
    assert '演示数据' not in output and '训练完成' in output


def test_as_many_images_as_labels(images, tmp_path):
    labels = utils.read_idx(os.path.join(images, 't10k-labels-idx1-ubyte.gz'))
    write_idx(os.path.join(images, 't10k-labels-idx1-ubyte.gz'), labels[:-1])
    with Program(tmp_path, '--console', '--data', images) as program:
        status, output = program.types('开始\n')
    assert status == 1 and '600 张图' in output and '599 个标签' in output


BLUE, ORANGE, PURPLE = (31, 119, 180), (255, 127, 14), (148, 103, 189)


def picture_of(path, draw, *args, **how):
    """Let draw() draw a picture, without any warning; return it as an array (height, width, 3)."""
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # a character that the font lacks is one
        draw(*args, path=path, **how)
    with Image.open(path) as image:
        assert image.width == 800  # a phone shows it on 390
        return np.asarray(image.convert('RGB')).astype(int)


def rows_with(picture, colour):
    """Return the rows of pixels in which a colour is, and how many of them are."""
    near = np.abs(picture - colour).sum(axis=2) < 60
    return np.flatnonzero(near.any(axis=1)), near.sum()


@pytest.mark.parametrize('scale', [1, -1, 1e-6, 1e6])
def test_losses_fit_into_the_curve(tmp_path, scale):
    """Of any size, a wild one among them: the line goes all over its panel, and so do two epochs."""
    path = str(tmp_path / 'curve.png')
    losses = [(i / 100, scale * (3 - i / 100)) for i in range(1, 201)]
    losses[100], losses[120] = (1.01, 1e12 * scale), (1.21, math.nan)
    history = [(1, 2.5 * scale, 0.5, 0.5), (2, 1.5 * scale, 0.6, 0.6)]
    picture = picture_of(path, utils.draw_curve, history=history, losses=losses)
    rows, many = rows_with(picture, BLUE)
    assert many > 500 and np.ptp(rows[rows > 100]) > 150


def test_accuracies_and_ones_own_numbers_fit_into_the_curve(tmp_path):
    """Those that hardly differ, per cents, numbers of different sizes, each alone; no accuracy, no panel."""
    path, heights = str(tmp_path / 'curve.png'), []
    for accuracies in (
        (0.970, 0.980, 0.990),
        (60, 70, 80),
        (1, 1, 1),
        (None, 0.5, math.nan),
        (0, 0, 0),
        (None,) * 3,
    ):
        history = [(i, 1 / i, accuracy, accuracy, 0.1, 1) for i, accuracy in enumerate(accuracies, 1)]
        picture = picture_of(path, utils.draw_curve, history=history, losses=[])
        heights.append(len(picture))
        rows, many = rows_with(picture, ORANGE)
        if accuracies[0] in (0.970, 60):
            assert np.ptp(rows[rows > len(picture) / 2 + 50]) > 200
    assert heights[0] == heights[1] == heights[2] == heights[3] == 1040 and heights[4] == heights[5] < 700
    assert not many
    history = [(i, 1 / i, 0, 0, 0.1, 1) for i in (1, 2, 3)]
    names = ('f1', 1e-3), ('召回率', 1e6), (r'_$\oops$', 1), ('\x07', -5)
    numbers = [{name: i * size for name, size in names} for i in range(3)]
    rows, _ = rows_with(
        picture_of(path, utils.draw_curve, history=history, losses=[], numbers=numbers), PURPLE
    )
    panels = np.split(rows, np.flatnonzero(np.diff(rows) > 20) + 1)
    assert len(panels) == 4 and all(np.ptp(panel) > 100 for panel in panels)


def test_losses_without_progress_are_no_spikes(tmp_path):
    """They all count for the end of their epoch: the picture is that of the same ones with progress()."""
    path, values = str(tmp_path / 'curve.png'), [2 - i / 100 for i in range(100)]
    places = [(i + 1) / 20 for i in range(100)]
    pictures = [
        picture_of(path, utils.draw_curve, history=[], losses=list(zip(x, values)))
        for x in (places, np.ceil(places).tolist())
    ]
    assert (pictures[0] == pictures[1]).all()


@given(
    st.lists(
        st.tuples(
            st.floats(0, 10), st.sampled_from(['restarted', 'back here', 'lr 0.1', 'lr 1e-05', 'lr 0.123456'])
        ),
        max_size=60,
    )
)
@settings(max_examples=100, deadline=None)
def test_the_words_of_marks_never_cover_each_other(marks):
    unit = 10 / 4.1 * 11 / 72 * 0.6  # the width of a letter
    lanes = {}
    for lane, start, text in utils.labels_of(marks, 10):
        lanes.setdefault(lane, []).append((start, start + len(text) * unit))
        assert 0 <= start and start + len(text) * unit <= 10.01
    for places in lanes.values():
        places.sort()
        assert all(end <= start for (_, end), (start, _) in zip(places, places[1:]))
    assert bool(lanes) == bool(marks)


def write_font(path, text):
    """Write a font in which each character of a text, and each of ASCII, is a black square."""
    builder, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyphOrder(['.notdef', 'square'])
    builder.setupCharacterMap({ord(c): 'square' for c in text + ''.join(map(chr, range(32, 127)))})
    builder.setupGlyf(dict.fromkeys(['.notdef', 'square'], pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(['.notdef', 'square'], (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({'familyName': 'Squares', 'styleName': 'Regular'})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)


DRAWING = """
import sys, warnings
warnings.simplefilter('error', UserWarning)
import utils
utils.draw_curve('curve.png', [(1, 2, 3, 4)], [], [(0.5, 'restarted')], [{'召回率': 1}])
print(utils.in_picture('损失', 'loss'), utils.own_titles(['召回率', '精度', '轮', '轮']))
"""


def test_pictures_are_in_chinese_where_there_is_a_font_for_it(tmp_path):
    """In the user's own fonts, say; a character that it lacks is no box and no warning."""
    fonts = tmp_path / 'fonts'
    fonts.mkdir()
    write_font(fonts / 'wqy-microhei.ttf', '损失精度轮测试训练每批，')
    env = {**os.environ, 'PYTHONPATH': HERE, 'MPLCONFIGDIR': matplotlib.get_configdir()}
    for folder, words in ((tmp_path, "损失 ['own number 1', '精度', '轮 3', '轮 4']"), (tmp_path / 'no', '')):
        env.update(XDG_DATA_HOME=str(folder), HOME=str(folder), PATH='/no/where')
        done = subprocess.run(
            [sys.executable, '-c', DRAWING],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0 and done.stderr == '', done.stderr
        if words:
            assert lines_of(done.stdout) == [words]
        black = np.asarray(Image.open(tmp_path / 'curve.png').convert('L')) < 80
        squares = sum(black[y : y + 12, x : x + 12].all() for y in range(0, 60, 4) for x in range(0, 780, 4))
        assert (squares > 20) == bool(words)  # the title


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 9, 16])
def test_no_row_of_the_mistakes_is_empty(tmp_path, n):
    mistakes = [(0.9, np.full((1, 28, 28), 0.2 + i / 100), 3, 4) for i in range(n)]
    mistakes[0][1][0, 0, 0] = 1
    picture = picture_of(str(tmp_path / 'mistakes.png'), utils.draw_mistakes, mistakes=mistakes)
    dark = (picture.max(axis=2) < 250).any(axis=1)
    gaps = np.diff(np.flatnonzero(np.concatenate([[True], dark, [True]])))
    assert gaps.max() < 60  # pixels without anything
    assert (picture.max(axis=2) < 200).mean() > 0.4


def test_help_on_an_ascii_terminal(tmp_path):
    with Program(tmp_path, '--help', env={'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C'}) as program:
        status, output = program.types('')
    assert status == 0 and '--filehelper' in output and 'Traceback' not in output


def test_speed_up_leaves_others_convolutions_alone_and_can_be_switched_off():
    class Doubled(nn.Conv2D):
        def hybrid_forward(self, F, x, weight, bias=None):
            return 2 * super().hybrid_forward(F, x, weight, bias)

    net, plain = nn.HybridSequential(prefix='net_'), nn.Sequential(prefix='net_')
    for each in (net, plain):
        with each.name_scope():
            each.add(Doubled(20, 3, prefix='conv_'), nn.MaxPool2D(), nn.Dense(3))
    utils.speed_up(net)
    net.initialize()
    data = nd.random.uniform(shape=(4, 1, 12, 12))
    fast = net(data).asnumpy()
    plain.initialize()
    for mine, other in zip(plain.collect_params().values(), net.collect_params().values()):
        mine.shape = other.shape
        mine.set_data(other.data())
    assert np.abs(plain(data).asnumpy() - fast).max() < 1e-5
    net.hybridize(False)
    assert np.abs(net(data).asnumpy() - fast).max() < 1e-5


def test_speed_up_leaves_what_a_network_computes_by_itself():
    class Residual(nn.HybridSequential):
        def hybrid_forward(self, F, x):
            return x + super().hybrid_forward(F, x)

    net, data = Residual(), nd.random.uniform(shape=(4, 8, 12, 12))
    net.add(nn.Conv2D(8, 3, padding=1, activation='relu'), nn.MaxPool2D(3, 1, 1))
    net.initialize()
    plain = net(data).asnumpy()
    utils.speed_up(net)
    assert np.abs(net(data).asnumpy() - plain).max() < 1e-5


def test_speed_up_of_a_network_of_numpy_arrays_compiles_it():
    with mx.util.np_shape(True), mx.util.np_array(True):
        net = nn.HybridSequential()
        net.add(nn.Dense(8, activation='relu'))
        utils.speed_up(net)
        net.initialize()
        assert net(mx.np.ones((2, 3))).shape == (2, 8) and net._cached_op is not None


class Within(gluon.HybridBlock):
    """A network that has the tutorial's within."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = cnn(nn.HybridSequential(), NETWORKS['the tutorial']), nn.Dense(3)

    def hybrid_forward(self, F, x):
        return self.outer(self.inner(x))


@pytest.mark.parametrize('compiled_first', [False, True])
def test_speed_up_within_another_network_that_is_compiled(compiled_first, capsys):
    """It leaves it alone and says so once; outputs and gradients are the plain ones."""
    net, data = Within(), nd.random.uniform(shape=(64, 1, 28, 28))
    net.initialize()

    def compute():
        with autograd.record():
            output = net(data)
        output.backward()
        return [output.asnumpy(), *(p.grad().asnumpy() for p in net.collect_params().values())]

    plain = compute()
    utils.speed_up(net.inner)
    if compiled_first:
        net.inner(data)
    net.hybridize()
    for _ in range(2):
        assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(compute(), plain))
    inner = net.inner(data).asnumpy()
    net.inner(mx.sym.var('data'))
    assert capsys.readouterr().out.count('speed_up：') == 1
    net.hybridize(False)
    assert np.abs(net.inner(data).asnumpy() - inner).max() < 1e-5
    utils.speed_up(net)
    assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(compute(), plain))


def test_speed_up_of_a_network_that_was_a_symbol_first(tmp_path):
    """Drawn before its first batch, exported, and imported again as a SymbolBlock."""
    net, data = cnn(nn.HybridSequential(), NETWORKS['the tutorial']), nd.random.uniform(shape=(64, 1, 28, 28))
    utils.speed_up(net)
    net.initialize()
    drawn = net(mx.sym.var('data')).list_arguments()
    output = net(data).asnumpy()
    assert net(mx.sym.var('data')).list_arguments() == drawn
    net.export(str(tmp_path / 'net'))
    paths = str(tmp_path / 'net-symbol.json'), ['data'], str(tmp_path / 'net-0000.params')
    imported = gluon.SymbolBlock.imports(*paths)
    utils.speed_up(imported)
    for images in (data, data[:7]):
        assert np.abs(imported(images).asnumpy() - output[: len(images)]).max() < 1e-5


def test_speed_up_leaves_alone_what_cannot_be_compiled_and_says_so(capsys):
    net, data = nn.Sequential(), nd.random.uniform(shape=(4, 6))
    net.add(nn.Dense(3, activation='relu'))
    net.initialize()
    plain = net(data).asnumpy()
    utils.speed_up(net, lambda output, label: output - label)
    said = capsys.readouterr().out
    assert 'Sequential 不是' in said and 'function 不是' in said and said.count('speed_up') == 2
    assert np.array_equal(net(data).asnumpy(), plain) and not net._forward_pre_hooks


class TwoInputs(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.dense = nn.Dense(3, activation='relu')

    def hybrid_forward(self, F, x, others):
        return self.dense(x) * self.dense(others[0])


class Overriding(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.dense = nn.Dense(3)

    def forward(self, x):
        return self.dense(x).reshape((x.shape[0], -1))


@pytest.mark.parametrize(
    'make, inputs',
    [
        (TwoInputs, (nd.ones((2, 4)), [nd.ones((2, 4))])),
        (Overriding, (nd.ones((2, 4)),)),
        (nn.HybridSequential, (nd.ones((2, 4)),)),
        (lambda: gluon.rnn.LSTM(3), (nd.ones((5, 2, 4)),)),
        (lambda: gluon.model_zoo.vision.resnet18_v1(thumbnail=True), (nd.ones((2, 3, 32, 32)),)),
    ],
    ids=['several inputs, one a list', 'its own forward()', 'no layers', 'an LSTM', 'of the zoo'],
)
def test_speed_up_of_whatever_a_person_may_have(make, inputs):
    net = make()
    net.initialize()
    plain = net(*inputs).asnumpy()
    utils.speed_up(net)
    assert all(np.abs(net(*inputs).asnumpy() - plain).max() < 1e-5 for _ in range(2))


WITH_AMP = """
import utils
import numpy as np
from mxnet import autograd, gluon, nd
from mxnet.contrib import amp
from mxnet.gluon import nn

amp.init('bfloat16')
net, loss = nn.HybridSequential(), gluon.loss.L2Loss()
net.add(nn.Conv2D(20, 5), nn.MaxPool2D(), nn.Conv2D(20, 5), nn.MaxPool2D(), nn.Dense(10))
utils.speed_up(net, loss)
net.initialize()
data, label = nd.random.uniform(shape=(64, 1, 28, 28)), nd.arange(64).reshape((64, 1)) % 10
with autograd.record():
    output = net(data)
    mean = loss(output, output.zeros_like())
mean.backward()
share = utils.accuracy(output, label)
print('BITS', np.dtype(output.dtype).itemsize * 8, 0 <= share <= 1, 0 < utils.batch_loss(mean) < 10)
print('SAME', utils.evaluate_accuracy([(data, label)], net, utils.try_gpu()) == share)
"""


def test_mixed_precision(tmp_path):
    (tmp_path / 'amp.py').write_text(WITH_AMP)
    with Program(tmp_path, python=('-c', 'import runpy; runpy.run_path("amp.py")')) as program:
        status, output = program.types('')
    assert status == 0 and 'BITS 16 True True' in output and 'SAME True' in output, output
    assert output.count('speed_up：') == 1


def test_a_network_keeps_few_compiled_forms(monkeypatch):
    monkeypatch.setattr(utils, 'threads', utils.Threads(9, tries=True))
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3), nn.MaxPool2D(), nn.Dense(3))
    for _ in range(2):
        utils.speed_up(net)
    net.initialize()
    [compiler] = net._forward_pre_hooks.values()
    data, forms = nd.ones((2, 1, 9, 9)), {}
    try:
        for number in (1, 2, 1, 3, 1, 4, 5):
            utils.threads.use(number)
            net(data)
            forms.setdefault(number, net._cached_op)
            assert number == compiler.threads and forms[number] is net._cached_op
        assert list(compiler.kept) == [1, 4]
    finally:
        utils.threads.use(1)


@pytest.mark.parametrize('block', [8, 16])
def test_gradients_add_up_where_they_are_to(block, monkeypatch):
    monkeypatch.setattr(utils, 'BLOCK', block)
    net, data = cnn(nn.HybridSequential(), NETWORKS['the tutorial']), nd.random.uniform(shape=(64, 1, 28, 28))
    utils.speed_up(net)
    net.initialize()
    net.collect_params().setattr('grad_req', 'add')
    sums = []
    for _ in range(2):
        with autograd.record():
            output = net(data)
        output.backward()
        sums.append([p.grad().asnumpy() for p in net.collect_params().values()])
    assert all(np.allclose(twice, 2 * once, rtol=1e-4, atol=1e-3) for once, twice in zip(*sums))


def test_speed_up_computes_other_types_of_numbers():
    net, data = nn.HybridSequential(), nd.random.uniform(shape=(4, 1, 12, 12)).astype('float64')
    net.add(nn.Conv2D(16, 5, activation='relu'), nn.MaxPool2D(), nn.Dense(3))
    net.cast('float64')
    utils.speed_up(net)
    net.initialize()
    fast = net(data).asnumpy()
    net.hybridize(False)
    assert fast.dtype == np.float64 and np.abs(net(data).asnumpy() - fast).max() < 1e-12


# ----------------------------------------------------------------- what else a hostile reader has shown


def test_a_refused_or_empty_answer_in_passing_costs_no_scan_and_no_haste(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        codes = [-1, -1]
        wechat.breaking = lambda name: codes.pop() if name == 'webwxsync' and codes else None
        assert 'lr = 0.1' in wechat.ask('lr 0.1') and not codes
        pages = ['<html>busy</html>', '<html>busy</html>']
        usual = wechat.on_synccheck
        wechat.on_synccheck = lambda query: pages.pop() if pages else usual(query)
        wechat.wait(lambda: not pages)
        assert 'lr = 0.2' in wechat.ask('lr 0.2')
        wechat.on_synccheck = lambda query: (
            'window.synccheck={retcode:"0",selector:"7"}'
        )  # and there is nothing
        so_far = len(wechat.requests)
        assert 'lr = 0.3' in wechat.ask('lr 0.3') and 'lr = 0.4' in wechat.ask('lr 0.4')
        assert len(wechat.requests) - so_far < 100  # a busy loop makes a thousand in a second
        assert wechat.logins == 1 and 'Traceback' not in program.output()


def test_contacts_that_are_refused_or_odd(wechat, tmp_path):
    usual, refusals = wechat.on_webwxgetcontact, [1205]
    span = '<span class="emoji emoji1f468200d1f469"></span>'  # three code points; itchat reads one or two
    odd = {'UserName': '@odd', 'NickName': None}, {'NickName': 'no address'}
    wechat.nicknames = {'C': span, 'D': span.replace('1f468200d1f469', 'ffffffff')}

    def contacts(query):
        answer = json.loads(usual(query))
        for member in answer['MemberList']:
            member.update(VerifyFlag=None, RemarkName=None, Sex=None, MemberList=None, HeadImgUrl=None)
        answer['MemberList'][:0] = odd
        code = refusals.pop() if refusals else 0
        return json.dumps({'BaseResponse': {'Ret': code}} if code else answer)

    wechat.on_webwxgetcontact = contacts
    usual_sync, wechat.odd = wechat.on_webwxsync, list(odd)
    wechat.on_webwxsync = lambda request: {**usual_sync(request), 'ModContactList': wechat.odd}
    with Program(tmp_path, '--supervisor', 'B', env=wechat.env(), before=QUICK):
        wechat.ready()
        assert not refusals and 'lr = 0.1' in wechat.ask('lr 0.1')
        wechat.says('B', '', Content='lr 0.2' + span)
        assert wechat.wait_text('lr = 0.2')
    (tmp_path / 'itchat.pkl').unlink()
    wechat.receiving = 0
    wechat.on_webwxgetcontact = lambda query: '{"BaseResponse": {"Ret": 0}, "MemberList": null}'
    with Program(tmp_path, env=wechat.env()):  # there are no friends
        wechat.wait(lambda: wechat.receiving)
        wechat.says('A', '参数')
        wechat.wait_text('学习率', 'filehelper')


def test_a_taken_over_nickname_commands_nothing(wechat, tmp_path):
    """Neither at the start, nor after another scan, nor when the stored session comes back."""
    with Program(
        tmp_path, '--supervisor', 'D', env=wechat.env(), before=QUICK
    ) as program:  # D is shown as 老王
        wechat.nicknames = {'C': 'D'}
        program.wait_output('“D”：有 2 个好友叫这个名字')
        assert wechat.ask('参数', 'C').startswith('抱歉')
    (tmp_path / 'itchat.pkl').unlink()
    wechat.nicknames, wechat.receiving = {}, 0
    with Program(tmp_path, '--supervisor', 'B', env=wechat.env(), before=QUICK):
        wechat.ready()
        for name, nickname in (('B', 'B2'), ('C', 'B')):
            with wechat.changed:
                wechat.nicknames[name] = nickname
                wechat.contact_changes = [name]
            so_far = len(wechat.messages)
            wechat.says('E', '你好')
            wechat.wait(lambda so_far=so_far: wechat.seen > so_far)
        with wechat.changed:
            wechat.logged_out = True
            wechat.changed.notify_all()
        wechat.wait(lambda: wechat.receiving == 3)
        assert 'lr = 0.2' in wechat.ask('lr 0.2') and wechat.ask('lr 0.9', 'C').startswith('抱歉')


def test_an_old_command_makes_nobody_the_supervisor(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()):
        wechat.wait(lambda: wechat.receiving and os.path.exists(tmp_path / 'itchat.pkl'))
    wechat.says('C', '帮助', CreateTime=wechat.now() - 86400)
    with Program(tmp_path, env=wechat.env()):
        assert '太早了' in wechat.wait_text('帮助', 'C')
        wechat.ready()
        assert wechat.ask('参数', 'C').startswith('抱歉')


# ------------------------------------------------------------------------------- answers that are odd


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_what_is_missing_in_an_answer_is_empty(server, tmp_path):
    phone, usual, changes = server(str(tmp_path)), None, {}
    usual = phone.on_webwxsync
    options = ['--filehelper'] * (server is FileHelper)

    def sync(request):
        answer = {**usual(request), **changes.get('put', {})}
        return {name: value for name, value in answer.items() if name not in changes.get('drop', ())}

    phone.on_webwxsync = sync
    with Program(tmp_path, *options, env=phone.env(), before=QUICK) as program:
        phone.ready()
        for i, names in enumerate(
            (('ModContactList',), ('SyncCheckKey',), ('SyncKey',), ('SyncKey', 'SyncCheckKey'))
        ):
            changes['drop'] = names
            assert f'lr = 0.{i + 1}' in phone.ask(f'lr 0.{i + 1}')
        changes.update(drop=(), put={'AddMsgList': None, 'ModContactList': None, 'SyncCheckKey': None})
        so_far = len(phone.messages)
        phone.says('A', '你好')
        phone.wait(lambda: phone.seen > so_far)
        changes['put'] = {}
        assert 'ti = 3' in phone.ask('ti 3')
        phone.says('A', 'ti 4', CreateTime=str(phone.now()), Url=None)
        assert 'ti = 4' in phone.wait_text('ti = 4', 'filehelper')
        texts = [text for _, text in phone.sent]
        assert all(sum(f'lr = 0.{i}' in text for text in texts) == (3 if i == 4 else 1) for i in range(1, 5))
        assert phone.logins == 1 and '断开' not in program.output() and 'Traceback' not in program.output()
    phone.shutdown()
    assert phone.faults == []


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_bytes_that_are_not_utf8_harm_nothing(server, tmp_path):
    """In every answer that is JSON, and in what waits for the next start."""
    phone = server(str(tmp_path))
    phone.nicknames = {'A': 'A~', 'C': 'C~'}
    usual, options = phone.respond, ['--filehelper'] * (server is FileHelper)

    def respond(*args):
        status, headers, answer = usual(*args)
        return status, headers, answer.encode().replace(b'~', b'\xe4\xff')

    phone.respond = respond
    for start in range(2):
        with Program(tmp_path, *options, env=phone.env()) as program:
            phone.ready()
            so_far = len(phone.messages)
            phone.says('A', '~')
            phone.wait(lambda so_far=so_far: phone.seen > so_far)
            assert f'ti = {start + 3}' in phone.ask(f'ti {start + 3}')
            assert '已登录：A\ufffd' in program.output() and '断开' not in program.output()
        phone.receiving = 0
        phone.says('A', '~')
    phone.shutdown()
    assert phone.faults == [] and phone.logins == 1


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_a_message_that_cannot_be_read_is_told_and_skipped_once(server, tmp_path):
    phone = server(str(tmp_path))
    options = ['--filehelper'] * (server is FileHelper)
    with Program(tmp_path, *options, env=phone.env()) as program:
        phone.ready()
        with phone.changed:  # in one answer
            phone.messages.append('no message')
            phone.says('A', '帮助', FromUserName=None)
            phone.says('A', 'lr 0.1')
        phone.wait_text('lr = 0.1', 'filehelper')
        assert 'lr = 0.2' in phone.ask('lr 0.2') and program.output().count('没有读成') == 2
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143
    phone.receiving = 0
    with Program(tmp_path, *options, env=phone.env()) as program:
        phone.ready()
        assert 'lr = 0.3' in phone.ask('lr 0.3') and '没有读成' not in program.output()
    phone.shutdown()
    assert phone.faults == [] and phone.logins == 1


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_messages_that_come_again_and_again_are_fetched_in_peace(server, tmp_path):
    phone = server(str(tmp_path))
    options = ['--filehelper'] * (server is FileHelper)
    with Program(tmp_path, *options, env=phone.env(), before=QUICK):
        phone.ready()
        phone.keys = lambda: {'Count': 1, 'List': [{'Key': 1, 'Val': 0}]}
        assert 'lr = 0.1' in phone.ask('lr 0.1')
        so_far = len(phone.requests)
        with phone.changed:  # without a pause it is a hundred
            assert not phone.changed.wait_for(lambda: len(phone.requests) - so_far > 50, 4)
        assert 'lr = 0.2' in phone.ask('lr 0.2')
        assert sum('lr = 0.1' in text for _, text in phone.sent) == 1
    phone.shutdown()
    assert phone.faults == []


def test_contacts_without_an_end_come_to_one(wechat, tmp_path):
    usual = wechat.on_webwxgetcontact
    wechat.on_webwxgetcontact = lambda query: json.dumps(
        {**json.loads(usual(query)), 'Seq': next(wechat.numbers)}
    )
    with Program(tmp_path, env=wechat.env()):
        wechat.ready()
        assert sum('webwxgetcontact' in request for request in wechat.requests) == 2
    (tmp_path / 'itchat.pkl').unlink()
    wechat.receiving, so_far, endless = 0, len(wechat.requests), wechat.on_webwxgetcontact

    def ever_new(query):
        answer = json.loads(endless(query))
        new = {**answer['MemberList'][0], 'UserName': f'@new{next(wechat.numbers)}', 'NickName': 'new'}
        return json.dumps({**answer, 'MemberList': [*answer['MemberList'], new]})

    wechat.on_webwxgetcontact = ever_new
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        assert sum('webwxgetcontact' in request for request in wechat.requests[so_far:]) == 200
        assert '好友名单没有完' in program.output()


@pytest.mark.parametrize('fault', ['drip', 'drip headers'])
def test_an_answer_that_drips_holds_up_nobody(wechat, tmp_path, fault):
    with Program(tmp_path, env=wechat.env(), before=SHORT_TIMEOUTS) as program:
        wechat.ready()
        faults = [fault]
        wechat.breaking = lambda name: faults.pop() if name == 'webwxsendmsg' and faults else None
        wechat.says('A', 'lr 0.1')
        wechat.wait(lambda: not faults)
        wechat.says('B', 'lr 0.2')
        wechat.wait_text('lr = 0.2')
        wechat.wait_text('lr = 0.1', 'filehelper')
        assert 'ConnectionError' in program.output()
    wechat.healed.set()


def test_ten_thousand_friends_are_noted_in_linear_time(tmp_path, monkeypatch):
    """And itchat's own functions find them."""
    looks = []
    get = utils.templates.AttributeDict.get
    counting = lambda friend, *args: (looks.append(1), get(friend, *args))[1]  # noqa: E731
    monkeypatch.setattr(utils.templates.AttributeDict, 'get', counting)
    monkeypatch.setattr(utils, 'people', People(), raising=False)
    client = utils.WeChat()
    names = [f'N{i}' for i in range(10000)]
    friends = [{'UserName': '@' + name, 'NickName': name, 'Sex': 0, 'Alias': ''} for name in names]
    client.note_contacts([*friends, {'UserName': '@News', 'NickName': 'News', 'VerifyFlag': 8}])
    client.note_contacts([{'UserName': '@N77', 'NickName': 'N77', 'RemarkName': 'R'}, *friends])
    assert len(looks) < 10 * len(friends)
    assert [friend['NickName'] for friend in client.get_friends()] == names
    assert [mp['NickName'] for mp in client.get_mps()] == ['News']
    assert client.search_friends(name='R')[0]['UserName'] == '@N77'
    assert type(client.search_friends(userName='@N9999')) is utils.templates.User
    message = {'FromUserName': '@N9999', 'ToUserName': '@me', 'MsgType': 1, 'Content': 'x', 'Url': ''}
    [message] = utils.produce_msg(client, [message])
    assert message['User']['NickName'] == 'N9999' and message['User'].core is client


class People:
    def rename(self, friends):
        assert all(friend['NickName'] for friend in friends)


def test_five_thousand_friends_and_the_last_of_them_commands(wechat, tmp_path):
    wechat.friends = (*wechat.friends, *(f'friend {i}' for i in range(5000)))
    with Program(tmp_path, '--supervisor', 'friend 4999', env=wechat.env()):
        wechat.wait(lambda: wechat.receiving)
        assert 'lr = 0.1' in wechat.ask('lr 0.1', 'friend 4999')


def test_a_code_that_is_odd_once_stays_on_the_screen(wechat, tmp_path):
    """It is renewed when the server says again and again that it has run out, or when it is old."""
    codes, usual = ['201', '400', '402', '201', '402', '408'], wechat.on_login
    wechat.on_login = lambda query: f'window.code={codes.pop(0)};' if codes else usual(query)
    with Program(tmp_path, env=wechat.env(), before=QUICK) as program:
        wechat.ready()
        assert wechat.requests.count('login.weixin.qq.com/jslogin') == 1
        assert '过期' not in program.output()
    (tmp_path / 'itchat.pkl').unlink()
    wechat.phone = 'waits'
    with Program(tmp_path, env=wechat.env(), before=QUICK.replace('retry = 0.1', 'renew = 0.2')) as program:
        program.wait_output('二维码过期了，换一个新的', 2)
        wechat.wait(lambda: wechat.requests.count('login.weixin.qq.com/jslogin') == 4)


@pytest.mark.parametrize('name', ['', '\u200b '])
def test_a_blank_supervisor_is_a_mistake(tmp_path, name):
    with Program(tmp_path, '--supervisor', name) as program:
        status, output = program.types('')
    assert status == 2 and '名字是空的' in output


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&-'])
def test_streams_may_be_closed(tmp_path, closed):
    command = f"printf 'ti 1\n开始\n' | {sys.executable} {HERE}/wechat_train.py --demo {closed}"
    done = subprocess.run(
        ['bash', '-c', 'set -o pipefail; ' + command], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        done.returncode in ((0, 141) if closed == '<&-' else (0,))
        and 'Traceback' not in done.stdout + done.stderr
    )
    assert closed == '<&-' or list(tmp_path.glob('runs/*/last.zip'))


def test_a_crash_is_a_crash_though_it_cannot_be_printed(tmp_path):
    bad = """
        class Bad(Exception):
            def __str__(self):
                return self.args[0]

        utils.lock_start()
        raise Bad()
        """
    script = own_script(tmp_path, bad, WITH_OPTIONS)
    with Program(tmp_path, '--console', '--then', 'echo x > then.txt', script=script) as program:
        status, output = program.types('开始\n')
    assert status == 1 and output.count('训练出错，已结束') == 1 and '训练完成' not in output


def test_what_comes_after_the_end_belongs_to_its_run(tmp_path):
    output = in_terminal(
        tmp_path,
        """
        utils.lock_end(wechat_name)
        itchat.instance.receive('开始')
        utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)
        """,
        '开始\n',
    )
    assert '正在收尾' in output and output.index('第 1/2 轮') < output.index('训练完成')


def test_callbacks_that_raise_end_nothing_and_show_no_secret(wechat, tmp_path):
    main = WITH_OPTIONS.replace('hotReload=True', 'hotReload=True, loginCallback=fail, exitCallback=fail')
    head = 'def fail():\n    itchat.get_friends(update=True)'
    script = own_script(tmp_path, 'utils.lock_start()', main, head)
    with Program(tmp_path, env=wechat.env(), before=QUICK, script=script) as program:
        asked = []
        wechat.breaking = lambda name: (
            name == 'webwxgetcontact'
            and asked.append(1)
            or ('drop' if name == 'webwxgetcontact' and len(asked) > 1 else None)
        )
        wechat.wait(lambda: wechat.receiving)
        assert 'lr = 0.1' in wechat.ask('lr 0.1')
        wechat.breaking = lambda name: 'drop' if name in {'webwxgetcontact', *DROP} else None
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143
        output = program.output()
        assert 'Traceback' in output
        assert not [
            s for s in map(wechat.ticket, TICKETS) if s in output or urllib.parse.quote_plus(s) in output
        ]


def test_names_that_were_imported_early_are_those_of_the_client_in_use(tmp_path):
    script = tmp_path / 'early.py'
    script.write_text("""
import utils
from itchat import auto_login, run
utils.parse_args(['--console'])
utils.chat_supervisor(print)
auto_login(hotReload=True)
run()
""")
    with Program(tmp_path, script=str(script)) as program:
        assert 'lr = 0.1' in program.types('lr 0.1\n')[1] and program.process.returncode == 0


POOL = """
    import multiprocessing
    utils.lock_start()
    for _ in range(3):
        with multiprocessing.get_context('fork').Pool(1) as pool:
            print('POOL', pool.apply(abs, (-7,)))
"""


def test_processes_may_be_forked_while_somebody_may_type(tmp_path):
    script = own_script(tmp_path, POOL, WITH_OPTIONS)
    with Program(tmp_path, '--console', script=script) as program:
        program.process.stdin.write('开始\n')
        program.process.stdin.flush()
        program.wait_output('训练完成')
        assert program.types('')[1].count('POOL 7') == 3


def test_a_signal_does_not_wait_for_the_command_of_then(wechat, tmp_path):
    script = own_script(
        tmp_path, 'utils.lock_start()', head='utils.options.then_delay = 0.1', main=WITH_OPTIONS
    )
    with Program(tmp_path, '--then', 'touch began; sleep 300', env=wechat.env(), script=script) as program:
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('秒后执行')
        deadline = time.monotonic() + DEADLINE
        while not (tmp_path / 'began').exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(DEADLINE) == 143


def test_a_session_that_cannot_be_kept_is_not_kept_in_an_old_form(wechat, tmp_path):
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        wechat.wait(lambda: os.path.exists(tmp_path / 'itchat.pkl'))
        wechat.wait(lambda: not os.path.exists(tmp_path / 'itchat.pkl.new'))
        (tmp_path / 'itchat.pkl.new').write_text('in the way')  # nothing can be written, as on a full disk
        wechat.ask('lr 0.1')
        program.wait_output('登录状态没有存下来')
        assert not (tmp_path / 'itchat.pkl').exists()


@pytest.mark.parametrize(
    'inside',
    [
        {},
        [],
        {'loginInfo': 1, 'cookies': 2, 'storage': 3, 'version': '1.5.0.dev'},
        {'loginInfo': {}, 'cookies': {}, 'storage': {}, 'version': '1.5.0.dev'},
    ],
)
def test_a_stored_session_with_a_strange_inside_is_set_aside(wechat, tmp_path, inside):
    session = tmp_path / 'itchat.pkl'
    session.write_bytes(pickle.dumps(inside))
    session.chmod(0o600)
    with Program(tmp_path, env=wechat.env()) as program:
        wechat.ready()
        assert '改名为 itchat.pkl.bad' in program.output()


def test_a_picture_that_cannot_be_drawn_is_told(wechat, tmp_path):
    script = own_script(tmp_path, 'utils.lock_start(); utils.chat_inf(wechat_name, 1, 1, 1, [0], 1)')
    with Program(tmp_path, env={**wechat.env(), 'MPLBACKEND': 'none such'}, script=script):
        wechat.ready()
        wechat.ask('开始')
        wechat.wait_text('训练完成')
        wechat.says('B', '曲线')
        wechat.wait_text('图没有画成')


EVALUATING = """
    train_data, test_data = utils.load_data_fashion_mnist(params[2])
    net = lambda data: data.reshape((0, -1))[:, :10]
    for epoch in (1, 2):
        for data, label in train_data:
            pass
        utils.evaluate_accuracy(train_data, net)
        print('PLACE', utils.run.how_far())
        utils.chat_inf(wechat_name, epoch, 1, 1, train_data, 1)
    utils.lock_end(wechat_name)
"""


def test_an_evaluation_on_the_training_data_is_no_epoch(tmp_path):
    output = in_terminal(tmp_path, EVALUATING, 'bs 1000\n开始\n', '--demo')
    assert re.findall('PLACE (.*)', output) == [
        '完成 0/2 轮，第 1 轮到第 12/12 批',
        '完成 1/2 轮，第 2 轮到第 12/12 批',
    ]


GENERATING = """
    def batches():
        yield from range(20)

    test = [(1, 1)] * 7
    for epoch in (1, 2, 3):
        for n in utils.progress(batches()):
            if n == 9:
                itchat.instance.receive('状态')
        for _ in utils.progress(test):
            pass
        print('PLACE', utils.run.how_far())
        utils.chat_inf(wechat_name, numpy.int64(epoch), 1, 1, [0], 1)
    utils.lock_end(wechat_name)
"""


def test_batches_without_a_length_are_counted(tmp_path):
    output = in_terminal(tmp_path, GENERATING, 'ti 3\n开始\n', head='import numpy')
    assert re.findall('PLACE (.*)', output) == [
        f'完成 {i}/3 轮，第 {i + 1} 轮到第 20/20 批' for i in range(3)
    ]
    assert '第 1 轮到第 9 批' in output and '第 2 轮到第 9/20 批' in output


def test_a_folder_that_is_gone_or_cannot_be_written(tmp_path):
    (tmp_path / '.wechat_train.lock').mkdir()  # as in a read-only folder
    script = own_script(tmp_path, RESUMABLE, WITH_OPTIONS, 'import shutil\nSTOP = None')
    with Program(tmp_path, '--console', script=script) as program:
        program.process.stdin.write('ti 2 bs 5\n开始\n')
        program.process.stdin.flush()
        program.wait_output('训练完成')
        shutil.rmtree(tmp_path / 'runs')
        status, output = program.types('曲线\n')
    assert status == 0 and '这个文件夹不能写' in output and list(tmp_path.glob('runs/*/curve.png'))


def test_a_checkpoint_that_lacks_something_is_damaged(tmp_path):
    in_terminal(tmp_path, RESUMABLE, 'ti 4 bs 20\n开始\n', head='STOP = 2, 4')
    [checkpoint] = tmp_path.glob('runs/*/last.zip')
    with zipfile.ZipFile(checkpoint) as z:
        content = {name: z.read(name) for name in z.namelist()}
    for key in ('seed', 'params', 'data', 'batches'):
        state = json.loads(content['run.json'])
        del state[key]
        with zipfile.ZipFile(checkpoint, 'w') as z:
            for name, data in {**content, 'run.json': json.dumps(state)}.items():
                z.writestr(name, data)
        with Program(tmp_path, '--console') as program:
            status, output = program.types('状态\n')
        assert status == 0 and '已损坏' in output and not checkpoint.exists()


def test_the_readme_counts_the_lines_that_differ_from_the_tutorial():
    if not os.path.exists(TUTORIAL):
        pytest.skip('the tutorial is not there')
    ours, theirs = code_of(os.path.join(HERE, 'wechat_train.py')), code_of(TUTORIAL)
    lines = list(difflib.ndiff(theirs, ours))
    new, gone = (sum(line.startswith(sign) for line in lines) for sign in '+-')
    assert f'{new} 行是教程没有的，教程有 {gone} 行这里没有' in README


def test_the_main_part_is_the_tutorials():
    if not os.path.exists(TUTORIAL):
        pytest.skip('the tutorial is not there')
    parts = []
    for path in (os.path.join(HERE, 'wechat_train.py'), TUTORIAL):
        with open(path, encoding='utf-8') as f:
            parts.append(f.read().rstrip().split("if __name__ == '__main__':\n")[1])
    assert parts[0] == parts[1] and len(parts[0].splitlines()) == 3


def code_of(path):
    """Return the lines of a script as ast writes them: without comments, docstrings, spaces and quotes."""
    with open(path, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    return [line for line in ast.unparse(tree).splitlines() if line.strip()]


# -------------------------------------------------------------------- reminders, a queue, names: the night

NIGHT = """
    from mxnet import gluon, nd
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': params[0]})
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    lr, ti, bs = params
    run = utils.run.number
    print('BEGINS', lr, ti, bs, epoch, flush=True)
    if lr in KILLS:
        os.kill(os.getpid(), 9)
    if lr in FAILS:
        raise OSError('no space left')
    while utils.lock_start() and epoch <= utils.params()[1]:
        for batch in utils.progress(range(3), train=True):
            loss += utils.batch_loss(nd.array([lr + epoch]))
            if (lr, epoch, batch) in HOLDS:
                print('HOLDS', lr, flush=True)
                while not os.path.exists(f'go {lr}') and utils.running:
                    time.sleep(0.01)
            if (lr, epoch, batch) in DIES and not os.path.exists(f'died {lr}'):
                open(f'died {lr}', 'w').close()
                os.kill(os.getpid(), 9)
        utils.chat_inf(wechat_name, epoch, loss, None, None, *SCORE(run, lr, epoch))
        if KEEPS:
            utils.save_checkpoint(net, trainer, epoch, 0, 0)
        epoch, loss = epoch + 1, 0
    utils.lock_end(wechat_name)
"""
DEFAULTS = {'FAILS': [], 'KILLS': [], 'DIES': [], 'HOLDS': [], 'KEEPS': True}


def score(run, lr, epoch):
    """Return what the training function of the night says of an epoch of a run with such a rate."""
    return (math.sin(lr * 1000 + epoch) / 2 + 0.5,)


def night(folder, main=WITH_OPTIONS, **how):
    """Write the script of the night; return its path."""
    head = '\n'.join(f'{name} = {value!r}' for name, value in {**DEFAULTS, **how}.items())
    head += '\nimport math\nSCORE = lambda run, lr, epoch: (math.sin(lr * 1000 + epoch) / 2 + 0.5,)'
    return own_script(folder, NIGHT, main, head)


def table_of(rates, ti, ends=None):
    """Return the table that is told after a queue, computed from what the script says."""
    best = [max(score(0, rate, epoch)[0] for epoch in range(1, ti + 1)) for rate in rates]
    lines = [
        f'{i}. lr {rate:g}：{ti} 轮，{value:.3f}，完成' for i, (rate, value) in enumerate(zip(rates, best), 1)
    ]
    lines[best.index(max(best))] += ' ★'
    return '\n'.join([f'排队的 {len(rates)} 次做完了', *lines])


MORE = [
    ('提醒 test_acc > 0.9', ('remind', ['test_acc', '>', 0.9])),
    ('提醒 loss < 0.3', ('remind', ['loss', '<', 0.3])),
    ('提醒 f1 < 0.5', ('remind', ['f1', '<', 0.5])),
    ('提醒：测试精度＞０．９', ('remind', ['test_acc', '>', 0.9])),
    ('提醒 測試精度 ≥ 0.9！', ('remind', ['test_acc', '>=', 0.9])),
    ('提醒 训练精度 低于 .5', ('remind', ['train_acc', '<', 0.5])),
    ('提醒 損失 小于 1e-3', ('remind', ['loss', '<', 0.001])),
    ('提醒 召回率<=-2', ('remind', ['召回率', '<=', -2])),
    ('remind F1>1', ('remind', ['F1', '>', 1])),
    ('提醒', ('remind', None)),
    ('提醒 清空', ('remind', '清空')),
    ('排队', ('queue', None)),
    ('排隊清空。', ('queue', '清空')),
    ('排队 lr 0.1, 0.05, 0.01', ('queue', [[(LR, '0.1')], [(LR, '0.05')], [(LR, '0.01')]])),
    ('排队 lr 0.1，0。05、.01', ('queue', [[(LR, '0.1')], [(LR, '0.05')], [(LR, '.01')]])),
    ('排队 lr 0.05 bs 64', ('queue', [[(LR, '0.05'), (BS, '64')]])),
    ('排队lr 0.05 bs 64', ('queue', [[(LR, '0.05'), (BS, '64')]])),
    ('提醒test_acc>0.9', ('remind', ['test_acc', '>', 0.9])),
    ('排队：lr0.05，bs=64', ('queue', [[(LR, '0.05'), (BS, '64')]])),
    ('排队 lr 0,1', ('queue', [[(LR, '0')], [(LR, '1')]])),
    ('排队 学习率 0.1 0.2 轮数 3', ('queue', [[(LR, r), (TI, '3')] for r in ('0.1', '0.2')])),
    ('停止 全部', ('stop', '全部')),
    ('停止全部！', ('stop', '全部')),
    ('开始 小学习率', ('start', '小学习率')),
    ('“开始　大LR-2”🚀', ('start', '大LR-2')),
    ('对比', ('compare', None)),
    ('對比。', ('compare', None)),
]


@pytest.mark.parametrize('text, expected', MORE)
def test_what_may_stand_behind_a_word(text, expected):
    [said] = utils.parse(text).commands
    assert (said.word, said.more) == expected and not said.values and said.number is None


TALK_OF_THE_NIGHT = """
提醒我一下 / 提醒我 5 点开会 / 提醒 大家 带伞 / 请提醒他 / 提醒我损失太大了 / 排队买票 / 排队 3 小时
排队 买票 / 在排队 / 排队的人好多 / 对比一下 / 对比度 / 这个对比太强烈 / 停止全部供水 / 停止 全部 供水
开始 吃饭了 / 开始 上课啦 / 开始 下雨了吗 / 开始  小学习率 / 开始小学习率 / 开始，小学习率 / 开始 小 学习率
开始 停止供水 / 开始 继续努力 / 开始 这个名字实在是太长太长了一点 / queue up please / compare it
remind me later / stop all of it / 排队lr是什么
"""


def test_small_talk_of_the_night():
    for text in [text for line in TALK_OF_THE_NIGHT.strip().split('\n') for text in line.split(' / ')]:
        assert utils.parse(text) == TALK, text
    almost = '提醒 abc/提醒 test_acc 0.9/提醒 损失 </提醒 > 0.5/提醒 5/排队 lr/排队 lr abc/排队 ti 5轮/对比 2'
    for text in almost.split('/'):
        assert utils.parse(text).almost == text and '没看懂，没有执行' in utils.explain(text)
    for text in ('开始 小学习率', '开始 小学习率\n停止'):  # of one who may not command yet
        assert not utils.parse(text).complete


@given(
    st.lists(st.decimals('0.001', 100, places=3).map(str), min_size=1, max_size=3),
    st.lists(st.integers(1, 10000).map(str), max_size=3),
    st.sampled_from([', ', ',', '，', ' ', '、']),
)
def test_a_queue_is_every_combination(rates, sizes, comma):
    [said] = utils.parse(f'排队 lr {comma.join(rates)}' + f' bs {comma.join(sizes)}' * bool(sizes)).commands
    counts = collections.Counter(map(tuple, said.more))
    expected = itertools.product(rates, sizes) if sizes else ((rate,) for rate in rates)
    assert counts == collections.Counter(tuple(zip((LR, BS), values)) for values in expected)


def test_reminders_hold_over_resume_and_are_told_once_in_a_run(wechat, tmp_path):
    """The numbers are drawn; the test says by itself in which epoch which rule comes true first."""
    rng = random.Random(os.environ.get('SEED', '32'))
    acc, f1 = ([round(rng.random(), 3) for _ in range(9)] for _ in 'ab')
    script = night(tmp_path, HOLDS=[(0.5, 4, 1)])
    with open(script) as f:
        text = f.read()
    with open(script, 'w') as f:
        f.write(
            text.replace('*SCORE(run, lr, epoch)', f'{acc}[epoch - 1], F1={f1}[epoch - 1], 召回率=-epoch')
        )
    rules = [('test_acc', '>', a) for a in (0.5, sorted(acc)[-2], 1.0)]
    rules += [('f1', '<', a) for a in (0.4, min(f1) + 0.001)] + [('召回率', '<=', -6.0), ('loss', '>', 4.4)]
    signs = {'>': float.__gt__, '<': float.__lt__, '<=': float.__le__}
    values = {
        'test_acc': acc,
        'f1': f1,
        '召回率': [-e for e in range(1, 10)],
        'loss': [0.5 + e for e in range(1, 10)],
    }
    expected = {}
    for name, sign, number in rules:
        first = [e for e in range(1, 10) if signs[sign](float(values[name][e - 1]), number)][:1]
        expected.update({f'{name} {sign} {number:g}': e for e in first})
    assert 4 < len(expected) < 7 and len(set(expected.values())) > 2
    with Program(tmp_path, script=script, env=wechat.env()) as program:
        wechat.ready()
        assert wechat.ask('提醒').startswith('没有提醒')
        for name, sign, number in rules:
            chinese = {'test_acc': '测试精度', 'loss': '损失'}.get(name, name)
            assert f'{name} {sign} {number:g}' in wechat.ask(f'提醒 {chinese} {sign} {number}')
        wechat.ask('ti 9')
        wechat.ask('开始')
        program.wait_output('HOLDS')
        wechat.ask('停止')
        wechat.wait_text('训练已停止')
    with Program(tmp_path, script=script, env=wechat.env()):  # the same rules in the next program
        wechat.ready()
        assert wechat.ask('提醒').count('\n') == len(rules) - 1
        (tmp_path / 'go 0.5').touch()
        so_far = len(wechat.heard())
        wechat.ask('继续')
        wechat.wait_text('训练完成', since=so_far)
        told = [
            re.fullmatch(r'第 (\d) 轮提醒：(.*)，是 (.*)', t) for t in wechat.heard() if '轮提醒' in str(t)
        ]
        assert {found[2]: int(found[1]) for found in told} == expected and len(told) == len(expected)
        for found in told:
            name, epoch = found[2].split()[0], int(found[1])
            assert float(found[3]) == pytest.approx(values[name][epoch - 1], rel=1e-5)
        texts = wechat.heard()
        for found in told:  # at the end of that epoch: right behind its report
            epoch = [i for i, t in enumerate(texts) if str(t).startswith(f'第 {found[1]}/9 轮\n')][0]
            assert 0 < texts.index(found[0]) - epoch <= len(expected)
        listed = wechat.ask('提醒').split('\n')
        assert sorted(line for line in listed if '说过了' in line) == sorted(
            f'{rule}（第 {epoch} 轮说过了）' for rule, epoch in expected.items()
        )
        assert wechat.ask('提醒 清空') == '好，没有提醒了。' and wechat.ask('提醒').startswith('没有提醒')


JUMPS = """
    run = utils.run.number - 1
    utils.lock_start()
    for epoch in (1, 2):
        for loss in utils.progress(LOSSES[run][(epoch - 1) * 200 : epoch * 200], train=True):
            utils.batch_loss(mx.nd.array([loss]))
        utils.chat_inf(wechat_name, epoch, 1, None, [0], 0.5)
        if run != 1:
            utils.save_checkpoint(net, trainer, epoch, 0, 0)
    utils.lock_end(wechat_name)
"""


def test_a_loss_that_has_jumped_is_told_once_with_what_to_go_back_would_do(tmp_path):
    rng = np.random.RandomState(7)
    quiet = [rng.uniform(0.9, 1.1, 400) for _ in range(5)]
    quiet[0][230:] *= 5  # it stays there
    quiet[1][140:190] *= 5  # just long enough, in the first epoch
    quiet[2][250:299] *= 5  # one batch too short
    quiet[3][30:] *= 5  # before there were a hundred
    quiet[4] *= np.where(np.arange(400) > 200, -5, -1)  # nothing jumps below zero
    losses = [[float(np.float32(x)) for x in each] for each in quiet]
    expected = []
    for each in losses:  # by the definition, batch by batch
        high = [i >= 100 and each[i] > 3 * np.median(each[i - 100 : i]) > 0 for i in range(400)]
        expected.append([i for i in range(49, 400) if all(high[i - 49 : i + 1])][:1])
    assert expected == [[279], [189], [], [], []]
    head = (
        f'import mxnet as mx\nLOSSES = {losses!r}\nnet = mx.gluon.nn.Dense(1, in_units=1)\nnet.initialize()\n'
    )
    head += "trainer = mx.gluon.Trainer(net.collect_params(), 'sgd')"
    script = own_script(tmp_path, JUMPS, WITH_OPTIONS, head)
    with Program(tmp_path, '--console', script=script) as program:
        status, output = program.types('排队 lr 1, 2, 3, 4, 5\n')
    assert status == 0 and '排队的 5 次做完了' in output
    first, second = re.findall(r'^(第 . 轮到第 .*损失跳升.*\n.*)', output, re.M)
    median = np.median(losses[0][130:230])
    assert first.startswith(f'第 2 轮到第 80/200 批：损失跳升，50 批都高于平时（{median:.4g}）的 3 倍')
    assert f'现在 {losses[0][279]:.4g}（排队 1/5）\n' in first
    assert '发“回退”会停下，回到最好的第 1 轮（测试精度 0.500）' in first
    assert second.startswith('第 1 轮到第 190/200 批') and '没有地方可回' in second


@pytest.mark.parametrize('keeps', [True, False])
def test_a_queue_of_three_with_a_death_in_the_second(wechat, tmp_path, keeps):
    """With a checkpoint it goes on, without one it begins again; --then waits for the end of all."""
    rates = [0.1, 0.05, 0.01]
    options = '--then', 'touch then'
    script = night(tmp_path, KEEPS=keeps, DIES=[(0.05, 2, 1)], HOLDS=[(0.5, 1, 1)])
    with Program(tmp_path, *options, script=script, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 3 bs 20')
        wechat.ask('开始')
        program.wait_output('HOLDS')
        assert wechat.ask('排队 lr 0.1, 0.05, 0.01').startswith('好，排了 3 次')
        assert wechat.ask('排队') == '\n'.join(f'排着：{i}. lr {rate}' for i, rate in enumerate(rates, 1))
        so_far = len(wechat.heard())
        (tmp_path / 'go 0.5').touch()
        table = wechat.wait_text('做完了', since=so_far)
        assert table == table_of(rates, 3)
        path = tmp_path / 'runs' / 'compare.png'
        wechat.wait(lambda: path.exists() and path.read_bytes() in wechat.heard(since=so_far))
        texts = [t for t in wechat.heard(since=so_far) if isinstance(t, str)]
        wechat.wait_text('秒后执行', since=so_far)
        assert not [t for t in texts[: texts.index(table)] if '秒后执行' in t]
        assert wechat.ask('排队').startswith('没有排着的') and 'lr = 0.5\n' in wechat.ask('参数')
        began = re.findall('BEGINS (.*) 3 20 (.)', program.output())
        again = '2' if keeps else '1'
        assert began == [('0.5', '1'), ('0.1', '1'), ('0.05', '1'), ('0.05', again), ('0.01', '1')]
        reports = [re.findall(r'^第 (\d)/3 轮（排队 (\d)/3）', t) for t in texts]
        reports = [(int(k), int(e)) for found in reports for e, k in found]
        second = [(2, 1), (2, 2), (2, 3)] if keeps else [(2, 1), (2, 1), (2, 2), (2, 3)]
        assert reports == [(1, 1), (1, 2), (1, 3), *second, (3, 1), (3, 2), (3, 3)]
        ends = [t.split('\n')[0] for t in texts if t.startswith('训练完成')]
        assert ends == ['训练完成', *(f'训练完成（排队 {i}/3）' for i in (1, 2, 3))]
        assert all(len(text.split('\n')) < 12 for text in texts)
        drawn = np.asarray(Image.open(path).convert('RGB')).astype(int)
        for colour in (BLUE, ORANGE, (44, 160, 44)):
            assert rows_with(drawn, colour)[1] > 300
        lines = wechat.ask('记录').split('\n')
        assert len(lines) == 5 + (not keeps) and ' lr 0.01 bs 20，3 轮，' in lines[0]


def test_a_queue_outlives_the_program(wechat, tmp_path):
    """Killed in the first, ended by a signal in the second: each is gone on with by the next program."""
    rates = [0.1, 0.05, 0.01]
    script = night(tmp_path, HOLDS=[(0.1, 2, 1), (0.05, 2, 1)])
    with Program(tmp_path, script=script, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('lr 0.3 ti 3')
        wechat.ask('排队 lr 0.1, 0.05, 0.01')
        program.wait_output('HOLDS 0.1')
        program.kill()
    (tmp_path / 'go 0.1').touch()
    with Program(tmp_path, script=script, env=wechat.env()) as program:
        assert wechat.wait_text('程序又启动了').endswith('。\n排队的训练自己接着做。')
        wechat.wait_text('第 1/3 次排队：从检查点接着训练')
        program.wait_output('HOLDS 0.05')
        program.process.send_signal(signal.SIGTERM)
        program.process.wait(DEADLINE)
    (tmp_path / 'go 0.05').touch()
    with Program(tmp_path, script=script, env=wechat.env()):
        wechat.wait_text('第 2/3 次排队：从检查点接着训练')
        assert wechat.wait_text('做完了') == table_of(rates, 3)
        assert 'lr = 0.3\n' in wechat.ask('参数')
        texts = [t for t in wechat.heard() if isinstance(t, str)]
        reports = [tuple(map(int, r)) for t in texts for r in re.findall(r'^第 (\d)/3 轮（排队 (\d)/3）', t)]
        assert reports == [(epoch, number) for number in (1, 2, 3) for epoch in (1, 2, 3)]


def test_stop_asks_about_the_queue(wechat, tmp_path):
    holds = [(rate, 1, 1) for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    script = night(tmp_path, HOLDS=holds, DIES=holds[-1:])
    with Program(tmp_path, script=script, env=wechat.env()) as program:
        wechat.ready()
        assert '不行' in wechat.ask('排队 lr 0.1, 1000') and wechat.ask('排队').startswith('没有排着的')
        wechat.ask('排队 lr 0.1, 0.2, 0.3')
        program.wait_output('HOLDS 0.1')
        answer = wechat.ask('停止')
        assert '只停这一次，还是连排队一起？排着的 2 次会接着做；发“停止 全部”，它们就都不做了' in answer
        program.wait_output('HOLDS 0.2')
        assert wechat.ask('排队') == '正在做：2. lr 0.2\n排着：3. lr 0.3'
        assert wechat.ask('排队 清空') == '好，排着的 1 次不做了。'
        wechat.ask('排队 lr 0.4 bs 7')
        so_far = len(wechat.heard())
        assert wechat.ask('停止 全部').startswith('好，这一批算完就停。\n排队也清空了')
        table = wechat.wait_text('做完了', since=so_far)
        assert table == '排队的 2 次做完了\n1. lr 0.1：0 轮，停止\n2. lr 0.2：0 轮，停止'
        assert wechat.ask('开始').startswith('开始训练\n') and 'HOLDS 0.4' not in program.output()
        program.wait_output('HOLDS 0.5')
        so_far = len(wechat.heard())
        wechat.ask('排队 lr 0.6, 0.7')
        wechat.ask('停止')
        program.wait_output('HOLDS 0.6')
        wechat.ask('停止')  # it dies before it has stopped: all the same it is not begun again
        number = f'{max(score(0, 0.7, epoch)[0] for epoch in (1, 2)):.3f}'
        table = wechat.wait_text('做完了', since=so_far)
        assert table == f'排队的 2 次做完了\n1. lr 0.6：0 轮，中断\n2. lr 0.7：2 轮，{number}，完成 ★'
        assert wechat.ask('停止') == '现在没有训练，发“开始”就开始。'


def test_a_run_that_always_dies_does_not_keep_the_queue_from_the_next(tmp_path):
    script = night(tmp_path, KILLS=[0.1])
    with Program(tmp_path, '--console', script=script) as program:
        _, output = program.types('排队 lr 0.1, 0.05\n')
    assert re.search(r'排队的 2 次做完了\n1. lr 0.1：0 轮，中断\n2. lr 0.05：2 轮，.*，完成 ★', output)


def test_two_errors_within_a_minute_stop_the_queue(wechat, tmp_path):
    script = night(tmp_path, FAILS=[0.1, 0.3, 0.4])
    with Program(tmp_path, script=script, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('ti 1')
        so_far = len(wechat.heard())
        wechat.ask('排队 lr 0.1, 0.2, 0.3, 0.4, 0.5, 0.6')
        table = wechat.wait_text('排队停了', since=so_far).split('\n')
        assert table[0] == '连着两次一分钟内就出错，排队停了，还排着的 2 次不做了'
        number = f'{score(0, 0.2, 1)[0]:.3f}'
        assert table[1:] == [
            *('1. lr 0.1：0 轮，出错', f'2. lr 0.2：1 轮，{number}，完成 ★'),
            *('3. lr 0.3：0 轮，出错', '4. lr 0.4：0 轮，出错'),
        ]
        assert wechat.ask('排队').startswith('没有排着的') and program.output().count('BEGINS') == 4
        closing = [t for t in wechat.heard(since=so_far) if str(t).startswith('训练出错')]
        assert ['（排队 %d/6）' % i in t for i, t in zip((1, 3, 4), closing)] == [True] * 3


def test_a_run_has_a_name(tmp_path):
    """It stands in its reports, in 记录 and on the curve, also after 继续 in another program."""
    fonts = tmp_path / 'fonts'
    fonts.mkdir()
    write_font(fonts / 'wqy-microhei.ttf', '损失精度轮测试训练每批，小学习率')
    env = {'XDG_DATA_HOME': str(tmp_path)}
    script = night(tmp_path, HOLDS=[(0.1, 3, 1)])
    with Program(tmp_path, '--console', script=script, env=env) as program:
        program.process.stdin.write('ti 3 lr 0.2\n开始\n')
        program.process.stdin.flush()
        program.wait_output('训练完成')
        program.process.stdin.write('ti 3 lr 0.1\n开始 小学习率\n')
        program.process.stdin.flush()
        program.wait_output('HOLDS')
        output = program.types('停止\n')[1]
    assert '开始训练（小学习率）\n' in output and '第 2/3 轮（小学习率）\n' in output
    assert '训练已停止（小学习率）\n' in output
    (tmp_path / 'go 0.1').touch()
    with Program(tmp_path, '--console', script=script, env=env) as program:
        program.process.stdin.write('继续\n')
        program.process.stdin.flush()
        program.wait_output('训练完成')
        output = program.types('记录\n曲线 1\n曲线 2\n对比\n')[1]
    assert '第 3/3 轮（小学习率）\n' in output and '训练完成（小学习率）\n' in output
    assert re.search(r'^1\. 小学习率 \d.* lr 0.1 bs 256，3 轮', output, re.M)
    assert re.search(r'^2\. \d', output, re.M)
    first, second = [run['folder'] for run in remembered_runs(tmp_path)]
    unnamed, named = (
        np.asarray(Image.open(os.path.join(f, 'curve.png')).convert('L')) for f in (first, second)
    )
    assert len(named) == len(unnamed) + 40  # a line of its own above
    black = named < 80
    assert any(black[y : y + 20, x : x + 12].all() for y in range(0, 30) for x in range(300, 500))
    both = np.asarray(Image.open(tmp_path / 'runs' / 'compare.png').convert('RGB')).astype(int)
    assert rows_with(both, BLUE)[1] > 300 and rows_with(both, ORANGE)[1] > 300


def test_a_comparison_draws_what_was_measured(tmp_path):
    """Each run's line is where its numbers are; without a test accuracy it is the loss's."""

    def row(epoch, loss, acc):
        return utils.Row(epoch, loss, None, acc, 0.1, 1, epoch)

    for measured in (True, False):
        runs = [
            ('1', [row(e, 10 + e, 0.2 if measured else None) for e in range(1, 9)]),
            ('2', [row(e, 10 - e, 0.8 if measured else None) for e in range(1, 9)]),
        ]
        picture = picture_of(str(tmp_path / 'compare.png'), utils.draw_comparison, runs=runs)
        blue, orange = (rows_with(picture[: len(picture) - 140], colour)[0] for colour in (BLUE, ORANGE))
        if measured:  # two level lines, the higher one above
            assert np.ptp(blue) < 15 and np.ptp(orange) < 15 and orange.max() < blue.min() - 200
        else:
            assert np.ptp(blue) > 100 and np.ptp(orange) > 100 and blue.max() < orange.min() + 60


# ------------------------------------------------------------------------------------------ the README

HALVES = dict(zip(('Chinese', 'English'), README.split('\n---\n\n')))
NETWORKED = {  # what needs the network, by something that does not
    'git': 'test "$1" = clone && mkdir "$3" && cp {here}/*.py {here}/requirements.txt "$3"',
    'python3': """test "$*" = "-m venv .venv" && mkdir -p .venv/bin && cd .venv/bin
echo 'exec {python} "$@"' > python
echo 'test "$*" = "install --no-deps -r requirements.txt" && test -f requirements.txt' > pip
chmod +x python pip""",
}


def in_shell(folder, block, env):
    """Let a shell run a block of the README in this folder; return it, a Program."""
    code = f'import os; os.execlp("bash", "bash", "-ec", {block!r})'
    return Program(folder, code, script='-c', env={**env, 'PYTHONPATH': ''})


def test_the_readmes_blocks_run_as_they_stand(helper, tmp_path):
    (tmp_path / 'bin').mkdir()
    for name, content in NETWORKED.items():
        (tmp_path / 'bin' / name).write_text('#!/bin/sh\n' + content.format(here=HERE, python=sys.executable))
        (tmp_path / 'bin' / name).chmod(0o700)
    env = {**helper.env(), 'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}'}
    demo, by_phone = blocks('bash')
    with in_shell(tmp_path, demo, env) as program:
        status, output = program.types('')
    assert status == 0 and '完成 2/2 轮' in output and 'Traceback' not in output
    shown = re.search(r'^```text\n(.*?)^```$', README, re.M | re.S)[1]
    numberless = [re.sub(r'[\d.]+', '', text) for text in (shown, output)]
    assert numberless[0] in numberless[1]
    with in_shell(tmp_path / 'wechat_train', by_phone, env):
        helper.ready()
        assert helper.ask('帮助') == utils.HELP
    script, estimator = (len(re.findall('^.', block, re.M)) for block in blocks('python'))
    assert script <= 20 and estimator <= 12
    with open(tmp_path / 'wechat_train' / 'mine.py', 'w', encoding='utf-8') as f:
        f.write(blocks('python')[0])
    with in_shell(tmp_path / 'wechat_train', '.venv/bin/python mine.py --demo', env) as program:
        for words, end in (('lr 0.1 ti 1\n开始\n', '完成 1/1 轮'), ('ti 2\n继续\n', '完成 2/2 轮')):
            program.process.stdin.write(words)
            program.process.stdin.flush()
            program.wait_output(end)
        status, output = program.types('lr 0.2\n')
    assert status == 0 and output.count('测试精度 0.') >= 3 and '训练精度' not in output


@pytest.mark.parametrize('half', HALVES)
def test_the_readmes_tables_have_every_command(half):
    rows = dict(re.findall(r'^\| `(\S+?)(?: \S+)?` `([a-z]+)(?: \S+)?` \|', HALVES[half], re.M))
    commands = {command.chinese: word for word, command in utils.COMMANDS.items()}
    for chinese, word in commands.items():
        assert rows.get(chinese) == word, f'README.md, {half}: there is no row | `{chinese}` `{word}` | … |'
    assert rows.keys() == commands.keys(), 'README.md names commands that do not exist'
    values = re.findall(r'^\| `(\S+) [\d.]+` \|', HALVES[half], re.M)
    assert sorted(values) == ['bs', 'lr', 'ti']


def test_the_readme_is_short_and_what_it_names_exists():
    """Also its other pages: links, headings that are linked to, options."""
    visible = re.sub('<details><summary>(.*?)</summary>.*?</details>', r'\1', README, flags=re.S)
    assert len(re.findall('^.', visible, re.M)) <= 145 and len(visible.encode()) <= 11_500
    assert len({half.count('\n## ') for half in HALVES.values()}) == 1
    with open(os.path.join(HERE, '.ci', 'bench.py'), encoding='utf-8') as f:
        links, anchors, known = (
            [],
            {},
            f.read() + utils.make_parser().format_help() + '--no-deps --user --check',
        )
    for path in [os.path.join(HERE, 'README.md'), *glob.glob(os.path.join(HERE, '.github', '*.md'))]:
        with open(path, encoding='utf-8') as f:
            text = f.read()
        assert max(map(len, text.splitlines())) <= 1000
        for option in re.findall(r'(?<![\w-])--[a-z][a-z-]+', text):
            assert re.search(rf'{option}\b', known), f'{path} names {option}, which does not exist'
        headings = [re.sub(r'[^\w -]', '', line).strip() for line in re.findall('^#+(.*)', text, re.M)]
        anchors[path] = [heading.lower().replace(' ', '-') for heading in headings]
        for target, anchor in re.findall(r'(?:\]\(|src=")([^)#"]*)#?([^)"]*)[)"]', text):
            target = os.path.join(os.path.dirname(path), target) if target else path
            assert os.path.exists(target), target
            links += [(target, anchor)] * bool(anchor)
    for target, anchor in links:
        assert anchor in anchors[target], anchor


# ---------------------------------------------------------------------------- tuning a run by phone

TUNED = """
    utils.lock_start()
    for epoch, (acc, f1) in enumerate(zip((0.5, 0.6, 0.55, 0.6, 0.4, 0.5, 0.7), range(7)), 1):
        if not utils.lock_start():
            break
        print('LR', utils.params()[0], flush=True)
        for batch in utils.progress([0]):
            utils.batch_loss(mx.nd.array([1 / epoch]))
        if epoch in PAUSES:
            input_there.wait()
            input_there.clear()
        utils.chat_inf(wechat_name, epoch, 1 / epoch, acc, [0], acc, f1=f1 / 10)
    utils.lock_end(wechat_name)
"""
PAUSING = """
import mxnet as mx
PAUSES, input_there = {pauses}, threading.Event()

@itchat.msg_register('Picture')
def go_on(msg):
    input_there.set()
"""


def test_reports_as_often_as_a_person_wants_them(wechat, tmp_path):
    script = own_script(tmp_path, TUNED, head=PAUSING.format(pauses='{2}'))
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        wechat.ask('ti 7')

        def epochs_of_a_run(middle=''):
            so_far = len(wechat.heard())
            wechat.ask('开始')
            if middle:
                wechat.ask(middle)
            wechat.says('B', '', MsgType=3)
            wechat.wait_text('训练完成', since=so_far)
            wechat.wait_picture(since=so_far)
            return [
                int(k)
                for t in wechat.heard('B', so_far)
                if isinstance(t, str)
                for k in re.findall(r'\A第 (\d)/7 轮', t)
            ]

        assert wechat.ask('报告 3') == '好，每 3 轮报告。'
        assert epochs_of_a_run() == [3, 6]
        assert '报告 1' in wechat.ask('报告 0')
        assert epochs_of_a_run() == [1, 2, 7]  # the better ones
        wechat.ask('report 1')
        assert wechat.ask('安静').startswith('好，只说')
        assert epochs_of_a_run('报告1') == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_without_a_better_epoch_ends_by_itself(wechat, tmp_path):
    script = own_script(tmp_path, TUNED, head=PAUSING.format(pauses='set()'), main=WITH_OPTIONS)
    with Program(tmp_path, '--then', 'echo x > then.txt', env=wechat.env(), script=script):
        wechat.ready()
        wechat.ask('ti 7')
        assert '早停 0' in wechat.ask('早停 3')
        wechat.ask('开始')
        closing = wechat.wait_text('训练完成')
        assert closing.startswith(
            '训练完成：3 轮没有更好，早停了\n完成 5/7 轮\n最好的测试精度 0.600（第 2 轮）'
        )
        wechat.wait_text('秒后执行')  # it has ended by itself
        assert wechat.ask('早停 0') == '好，不早停了。'
        so_far = len(wechat.heard())
        wechat.ask('开始')
        assert '完成 7/7 轮' in wechat.wait_text('训练完成', since=so_far)


def test_a_learning_rate_relative_to_the_one_now(wechat, tmp_path):
    script = own_script(tmp_path, TUNED, head=PAUSING.format(pauses='{2}'))
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        assert wechat.ask('lr x0.5').startswith('lr：0.5 → 0.25\n学习率 lr = 0.25')
        assert wechat.ask('LR × 0.1').startswith('lr：0.25 → 0.025\n')
        assert wechat.ask('lr /2').startswith('lr：0.025 → 0.0125\n')
        assert wechat.ask('lr *8, ti 7').startswith('lr：0.0125 → 0.1\n')
        for bad in ('lr x0', 'lr /0', 'lr *', 'lr x-1', 'lr x1e9'):
            assert '不行' in wechat.ask(bad) and 'lr = 0.1\n' in wechat.ask('参数')
        wechat.ask('开始')
        program.wait_output('LR 0.1', 2)
        assert wechat.ask('lr ÷4').startswith('lr：0.1 → 0.025\nlr：从下一批起生效')
        wechat.says('B', '', MsgType=3)
        picture = wechat.wait_picture()
        assert 'LR 0.025' in program.output() and 'LR 0.1\nLR 0.025' in re.sub(
            '(?m)^(?!LR).*\n', '', program.output()
        )
        gray = (np.abs(picture[..., :3].astype(int) - 128).max(axis=2) < 60).sum(axis=0)
        assert gray[100:700].max() > 300  # the dashed line where it changed


def test_a_persons_own_numbers_stand_everywhere(wechat, tmp_path):
    script = own_script(tmp_path, TUNED, head=PAUSING.format(pauses='set()'))
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        wechat.ask('ti 7')
        wechat.ask('开始')
        assert '测试精度 0.550\nf1 0.2\n用时' in wechat.wait_text('第 3/7 轮')
        wechat.wait_text('训练完成')
        wechat.wait_picture()
        [log] = tmp_path.glob('runs/*/log.csv')
        with open(log) as f:
            assert [row['f1'] for row in csv.DictReader(f)] == [str(i / 10) for i in range(7)]


BACK = """
    from mxnet import gluon, nd
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': params[0]})
    epoch, loss, acc = utils.load_checkpoint(net, trainer)
    print('WEIGHT', net.weight.data().asscalar(), flush=True)
    while utils.lock_start() and epoch <= utils.params()[1]:
        for batch in utils.progress(range(5)):
            net.weight.set_data(nd.array([[float(epoch)]]))
            if epoch == HANG:
                released.wait()
        value = float('nan') if epoch == NAN else 1
        utils.chat_inf(wechat_name, epoch, value, 1, [0], 0.9 if epoch == 2 else 0.5)
        epoch, loss, acc = utils.save_checkpoint(net, trainer, epoch, 0, 0)
    utils.lock_end(wechat_name)
"""
RELEASING = """
HANG, NAN, released = {hang}, {nan}, threading.Event()

@itchat.msg_register('Picture')
def go_on(msg):
    released.set()
"""


@pytest.mark.parametrize('busy', [True, False])
def test_back_to_the_best_epoch(wechat, tmp_path, busy):
    script = own_script(
        tmp_path, BACK, head=RELEASING.format(hang=4 if busy else None, nan=None if busy else 4)
    )
    with Program(tmp_path, env=wechat.env(), script=script) as program:
        wechat.ready()
        assert wechat.ask('回退').startswith('没有可以回去的检查点')
        wechat.ask('ti 6')
        wechat.ask('开始')
        if busy:
            wechat.wait_text('第 3/6 轮')
            so_far = len(wechat.heard())
            wechat.says('B', '回退')
            wechat.wait_text('停下以后回到最好的一轮', since=so_far)
            wechat.says('B', '', MsgType=3)
            told = wechat.wait_text('回到了', since=so_far)
        else:
            assert '也可以先发“回退”，回到存下来的最好的一轮' in wechat.wait_text('训练停下了')
            told = wechat.ask('回退')
        assert told == '回到了第 2 轮（测试精度 0.900），发“继续”从那里接着训练。'
        answer = wechat.ask('继续')
        assert answer.startswith('继续训练\n完成 2/6 轮\n')
        program.wait_output('WEIGHT [[2.]]')
        [folder] = tmp_path.glob('runs/*')
        assert utils.read_checkpoint(str(folder / 'best.zip'))['epochs'] == 2
        if not busy:
            return
        assert '完成 6/6 轮' in wechat.wait_text('训练完成')
        state = utils.read_checkpoint(str(folder / 'last.zip'))
        assert [row[0] for row in state['history']] == [1, 2, 3, 4, 5, 6] and state['marks'] == [
            [2, 'back here']
        ]


def test_the_runs_so_far_in_a_list_and_their_curves(wechat, tmp_path):
    (tmp_path / 'runs' / '20200101-000000').mkdir(parents=True)  # of an earlier version, without a checkpoint
    (tmp_path / 'runs' / '20200101-000000' / 'log.csv').write_text(
        'epoch,loss,train_acc,test_acc,learning_rate,seconds\n1,2.0,0.3,0.4,0.5,1\n2,1.0,0.6,0.95,0.5,1\n'
    )
    (tmp_path / 'runs' / '20200101-000000' / 'last.zip').write_bytes(b'damaged')
    script = own_script(tmp_path, BACK, head=RELEASING.format(hang=None, nan=3))
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        for values, end in (('lr 0.1 ti 1', '训练完成'), ('lr 0.2 ti 3', '训练停下了')):
            wechat.ask(values)
            so_far = len(wechat.heard())
            wechat.ask('开始')
            wechat.wait_text(end, since=so_far)
        wechat.wait_picture(since=so_far)
        lines = wechat.ask('记录').split('\n')
        assert re.fullmatch(r'1\. \d\d-\d\d \d\d:\d\d lr 0\.2 bs 256，2 轮，0\.900，NaN', lines[0])
        assert re.fullmatch(r'2\. .* lr 0\.1 bs 256，1 轮，0\.500，完成', lines[1])
        assert re.fullmatch(r'3\. .* lr 0\.5，2 轮，0\.950，中断 ★', lines[2]) and '曲线 2' in lines[3]
        so_far = len(wechat.heard())
        wechat.says('B', '曲线 3')
        assert wechat.wait_picture(since=so_far).shape[:2] == (1040, 800)
        assert (tmp_path / 'runs' / '20200101-000000' / 'curve.png').exists()
        assert wechat.ask('plot 9') == '记录里只有 3 次训练。'


def test_what_the_network_gets_wrong_is_shown(wechat, images, tmp_path):
    with Program(tmp_path, '--data', images, env=wechat.env()):
        wechat.ready()
        assert '还没有错图' in wechat.ask('错图')
        wechat.ask('ti 1 lr 0.1 bs 100')
        wechat.ask('开始')
        wechat.wait_text('训练完成')
        so_far = len(wechat.heard())
        wechat.says('B', 'mistakes')
        picture = wechat.wait_picture(since=so_far)
        assert picture.shape[:2] == (992, 800)
        assert (picture[..., :3].reshape(-1, 3).max(axis=1) < 100).mean() > 0.2  # sixteen dark images


def test_the_mistakes_are_the_surest_ones():
    rng = np.random.RandomState(0)
    outputs, labels = rng.randn(500, 10).astype(np.float32) * 3, rng.randint(10, size=500)
    order = nd.arange(500)
    data = gluon.data.DataLoader(gluon.data.ArrayDataset(order, nd.array(labels)), 64)
    got = utils.evaluate_accuracy(data, lambda batch: nd.array(outputs[batch.asnumpy().astype(int)]))
    said = outputs.argmax(axis=1)
    assert got == pytest.approx((said == labels).mean())
    sure = np.exp(outputs).max(axis=1) / np.exp(outputs).sum(axis=1)
    wrong = sorted(np.flatnonzero(said != labels), key=lambda i: -sure[i])[:16]
    assert [(int(example), true, word) for _, example, true, word in utils.run.mistakes] == [
        (i, labels[i], said[i]) for i in wrong
    ]
    assert [p for p, *_ in utils.run.mistakes] == pytest.approx(sure[wrong])


def test_silence_is_told_and_its_end(wechat, tmp_path):
    script = own_script(
        tmp_path, BACK, head=RELEASING.format(hang=2, nan=None) + 'utils.options.silence = 0.5'
    )
    with Program(tmp_path, env=wechat.env(), script=script):
        wechat.ready()
        wechat.ask('ti 3')
        wechat.ask('开始')
        assert re.match(
            r'已经 .* 秒没有算完一批，停在第 2 轮第 1/5 批（主机 ', wechat.wait_text('没有算完一批')
        )
        assert '训练中' in wechat.ask('状态')
        wechat.says('B', '', MsgType=3)
        wechat.wait_text('训练完成')
        assert sum('没有算完一批' in t for t in wechat.heard() if isinstance(t, str)) == 1


def test_runs_that_take_much_room_are_told(tmp_path):
    (tmp_path / 'runs').mkdir()
    with open(tmp_path / 'runs' / 'large', 'wb') as f:
        f.truncate(10**9 + 1)  # takes none on the disk
    with Program(tmp_path, '--console') as program:
        assert 'runs/ 有 1.0 GB' in program.types('')[1]


# --------------------------------------------------------------------- several processes, one chat

WATCHED = """
import utils, itchat, os, sys
import numpy as np
import wechat_train

stop_at, nan_at, batches = int(sys.argv[1]), int(sys.argv[2]), 0
utils.parse_args(sys.argv[3:])

def save_checkpoint(net, trainer, epoch, *sums, save=utils.save_checkpoint):
    "Keep the parameters of this process."
    values = [parameter.data().asnumpy().ravel() for parameter in net.collect_params().values()]
    np.save(f'{epoch}-{os.getpid()}.npy', np.concatenate(values))
    return save(net, trainer, epoch, *sums)

def batch_loss(loss, batch_loss=utils.batch_loss):
    global batches
    batches += 1
    if batches == stop_at and utils.team.leads:
        itchat.instance.receive('停止')
    if batches == nan_at and utils.role == 'follows':
        loss[0] = float('nan')
    return batch_loss(loss)

utils.save_checkpoint, utils.batch_loss = save_checkpoint, batch_loss
utils.chat_supervisor(wechat_train.nn_train)
itchat.auto_login(hotReload=True)
itchat.run()
"""


def watched(folder):
    """Write a script that trains the program's network and keeps each process's parameters."""
    path = folder / 'watched.py'
    path.write_text(WATCHED)
    return str(path)


def others_of(program, what=''):
    """Return the numbers of the processes that a program has started, and these in turn, that are `what`."""
    table, family = process_table(), [str(program.process.pid)]
    for parent in family:
        family += [row[0] for row in table if row[1] == parent]
    return [int(row[0]) for row in table if row[0] in family[1:] and what in row[3]]


def trainer_of(program):
    """Return the number of the process that trains."""
    deadline = time.monotonic() + DEADLINE
    while True:
        found = [row for row in process_table() if row[1] == str(program.process.pid)]
        if found:
            return int(found[0][0])
        assert time.monotonic() < deadline
        time.sleep(0.02)


def process_table():
    """Return number, parent, state, command line of every process that has not ended."""
    done = subprocess.run(
        ['ps', '-ww', '-eo', 'pid,ppid,stat,args'], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in done.stdout.splitlines()[1:]]
    return [row for row in rows if row[2][0] != 'Z' and row[3:]]


def wait_gone(pids):
    """Wait until none of these processes is left."""
    deadline = time.monotonic() + DEADLINE
    while {int(row[0]) for row in process_table()} & set(pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def kept_by_each(folder, epoch):
    """Return the parameters after an epoch, of each process that has kept them."""
    return [np.load(path) for path in folder.glob(f'{epoch}-*.npy')]


def wait_batches(wechat):
    """Wait until a run computes."""
    wait_place(wechat, '速度')


def wait_place(wechat, place):
    """Wait until 状态 tells this."""
    deadline = time.monotonic() + DEADLINE
    while place not in wechat.ask('状态'):
        assert time.monotonic() < deadline


def test_two_processes_and_one_chat(wechat, images, tmp_path):
    """lr in flight, 停止, 继续; a worker, the server, the scheduler killed; at the end nothing is left."""
    options = '0', '0', '--data', images, '--workers', '2'
    with Program(tmp_path, *options, script=watched(tmp_path), env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('lr 0.1 ti 100 bs 50')
        assert '设备 CPU，2 个进程一起' in wechat.ask('开始')
        wechat.wait_text('第 1/100 轮')
        assert wechat.ask('lr 0.05').startswith('lr：从下一批起生效\n')
        wechat.wait_text('第 3/100 轮')
        since = len(wechat.heard())
        wechat.ask('停止')
        stopped = wechat.wait_text('训练已停止', since=since)
        for epoch in (1, 2, 3):
            one, other = kept_by_each(tmp_path, epoch)
            assert np.array_equal(one, other)
        [folder] = (tmp_path / 'runs').iterdir()
        deaths = ('watched.py', '第 2 个训练进程'), ('server', '求和进程'), ('scheduler', '一个训练进程')
        assert re.search('完成 3/.*', stopped)[0] in wechat.ask('继续')
        for what, name in deaths:
            since = len(wechat.heard())
            wechat.wait_text(r'第 \d+/100 轮\n', since=since)
            since = len(wechat.heard())
            wechat.wait_text(r'第 \d+/100 轮\n', since=since)  # there is a new checkpoint
            since = len(wechat.heard())
            [pid] = set(others_of(program, what)) - {trainer_of(program)}
            os.kill(pid, signal.SIGKILL)
            told = wechat.wait_text('没有', since=since)
            assert name in told and '不用扫码' in told and '自己从检查点接着训练' in told
        wechat.wait_text(r'第 \d+/100 轮\n', since=len(wechat.heard()))
        assert wechat.logins == 1
        with open(folder / 'log.csv') as f:
            assert {row['learning_rate'] for row in csv.DictReader(f)} == {'0.1', '0.05'}
        pids = others_of(program)
        assert len(pids) == 4
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(DEADLINE) == 130
        wechat.wait_text('训练已停止', since=since)
        wait_gone(pids)


def test_several_processes_compute_what_one_does(images, tmp_path):
    """Ten batches within 1e-3, whichever engine; stopped at batch 22 and resumed, equal to the bit."""
    script = watched(tmp_path)

    def train(name, stop_at, *options, typed='lr 0.1 ti 3 bs 300\n开始\n', **env):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        arguments = str(stop_at), '0', '--console', '--data', images, *options
        with Program(folder, *arguments, script=script, env=env) as program:
            status, output = program.types(typed)
        assert status == 0, output
        return output

    threaded = {'MXNET_ENGINE_TYPE': 'ThreadedEnginePerDevice'}  # as with GPUs
    train('one', 10)
    train('unbroken', 0, '--workers', '2')
    assert '第 3 轮到第 2/10 批' in train('broken', 22, '--workers', '2', **threaded)
    train('broken', 0, '--workers', '2', typed='继续\n', **threaded)
    [one] = kept_by_each(tmp_path / 'one', 1)
    for name in ('unbroken', 'broken'):
        first, second = kept_by_each(tmp_path / name, 1)
        assert np.array_equal(first, second) and np.abs(one - first).max() < 1e-3
    whole, broken = (kept_by_each(tmp_path / name, 3) for name in ('unbroken', 'broken'))
    assert [sum(np.array_equal(whole[0], each) for each in kept) for kept in (whole, broken)] == [2, 2]
    assert len(broken) == 4  # two of them of batch 22
    whole, broken = (
        utils.read_checkpoint(str(next((tmp_path / name).glob('runs/*/last.zip'))))
        for name in ('unbroken', 'broken')
    )
    assert whole['losses'].points == broken['losses'].points
    assert [row[:4] for row in whole['history']] == [row[:4] for row in broken['history']]


def test_a_nan_in_one_process_stops_all_at_the_same_batch(images, tmp_path):
    options = '0', '5', '--console', '--data', images, '--workers', '2'
    with Program(tmp_path, *options, script=watched(tmp_path)) as program:
        for words, answer in (('lr 0.1 ti 1 bs 300\n开始\n', '训练停下'), ('开始\n', '训练完成')):
            program.process.stdin.write(words)
            program.process.stdin.flush()
            program.wait_output(answer)
        status, output = program.types('')
    assert status == 0 and '第 1 轮第 5/10 批' in output and output.count('Traceback') == 1
    one, other = kept_by_each(tmp_path, 1)
    assert np.array_equal(one, other)


def test_processes_of_another_machine(wechat, images, tmp_path):
    """Who is missing is said while 开始 waits; one that freezes is told, and another one takes its place."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        address = '127.0.0.1', str(s.getsockname()[1])
    script, options = watched(tmp_path), ('0', '0', '--data', images, '--workers', '2')
    there = tmp_path / 'there'
    there.mkdir()

    def join(log):
        return Program(there, *options, '--join', ':'.join(address), script=script, log=log)

    host = '--host', address[0], '--port', address[1]
    with Program(tmp_path, *options, *host, script=script, env=wechat.env()) as program:
        wechat.ready()
        wechat.ask('lr 0.1 ti 100 bs 100')
        wechat.ask('开始')
        assert '在等 1 个训练进程加入' in wechat.ask('状态')
        wechat.ask('停止')
        wechat.wait_text('训练已停止')
        with join('first.txt') as first:
            since = len(wechat.heard())
            wechat.ask('开始')
            wechat.wait_text('第 2/100 轮', since=since)  # there is a checkpoint
            assert '加入' not in wechat.ask('状态')
            since = len(wechat.heard())
            os.kill(trainer_of(first), signal.SIGSTOP)
            assert '不用扫码' in wechat.wait_text('一个训练进程没有回应了', since=since)
        with join('second.txt') as second:
            since = len(wechat.heard())
            wechat.wait_text(r'第 \d+/100 轮\n', since=since)  # it goes on by itself
            pids = [*others_of(program), second.process.pid]
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(DEADLINE) == 143
            assert second.process.wait(DEADLINE) == 0
            wait_gone(pids)
        assert not (there / 'runs').exists() and wechat.logins == 1


TUTORIALS_CALLS = """
    epoch = 1
    while utils.lock_start() and epoch <= 2:
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 1)
        epoch += 1
    utils.lock_end(wechat_name)
"""


def test_a_function_for_one_process_is_refused_by_several(tmp_path):
    output = in_terminal(tmp_path, TUTORIALS_CALLS, '开始\n', '--workers', '2', status=1)
    assert 'utils.store、utils.total、utils.accuracy、utils.batch_loss' in output and '第 1/' not in output
    assert '训练完成' in in_terminal(tmp_path, TUTORIALS_CALLS, '开始\n', '--workers', '1')


HIDDEN = """
import functools
from mxnet import autograd, gluon, nd
from utils import store as summing
tool, per_cent = utils, lambda *both: 100 * utils.accuracy(*both)

def logged(function):
    return lambda *args: function(*args)

class Learner:
    "Nothing that is called here can be seen in the code of what chat_supervisor() is given."
    def __init__(self, missing=''):
        self.missing = missing
    @logged
    def __call__(self, n, wechat_name, params):
        self.net = gluon.nn.Dense(2)
        self.net.initialize()
        self.net.collect_params().setattr('grad_req', 'add')
        kvstore = summing() if self.missing != 'store' else 'device'
        self.trainer = gluon.Trainer(self.net.collect_params(), 'sgd', {'learning_rate': 0.1}, kvstore)
        self.data = [{'x': nd.random.normal(shape=(n, 3)), 'y': nd.arange(n) % 2} for _ in range(4)]
        self.epoch, *self.sums = utils.load_checkpoint(self.net, self.trainer)
        while utils.lock_start() and self.epoch <= 2:
            self.train_epoch()
            utils.chat_inf(wechat_name, self.epoch, *self.sums, self.data, 0.5)
            self.epoch, *self.sums = utils.save_checkpoint(self.net, self.trainer, self.epoch, *self.sums)
        utils.lock_end(wechat_name)
    def train_epoch(self):
        for i, batch in enumerate(utils.progress(self.data)):
            print('ROWS', len(batch['x']), len(batch['y']), flush=True)
            with autograd.record():
                output = self.net(batch['x'])
                loss = gluon.loss.SoftmaxCrossEntropyLoss()(output, batch['y'])
            loss.backward()
            self.sums[0] += tool.batch_loss(loss)
            self.sums[1] += per_cent(output, batch['y']) / 100 if self.missing != 'accuracy' else 0.5
            if i % 2 or self.missing:  # the gradients of two batches
                self.step(2 * (tool.total(len(batch['x'])) if self.missing != 'total' else 8))
    def step(self, n):
        self.trainer.step(n)
        self.net.collect_params().zero_grad()
"""


def hidden(folder, train):
    main = WITH_OPTIONS.replace('nn_train)', f'functools.partial({train}, 8))')
    script = own_script(folder, 'pass', main, HIDDEN)
    with Program(folder, '--console', '--workers', '2', script=script) as program:
        return program.types('开始\n')


def test_what_a_function_calls_counts_not_how_it_is_written(tmp_path):
    status, output = hidden(tmp_path, 'Learner()')
    assert status == 0 and '训练完成\n完成 2/2 轮' in output, output
    assert output.count('ROWS 4 4') == 8  # the other process prints nowhere


@pytest.mark.parametrize('missing, batches', [('total', 1), ('accuracy', 4)])
def test_what_is_missing_is_told_after_the_first_batch(tmp_path, missing, batches):
    status, output = hidden(tmp_path, f'Learner({missing!r})')
    assert status == 1 and f'训练函数要调用 utils.{missing}（见 README）' in output, output
    assert output.count('ROWS') == batches and '第 1/2 轮' not in output


OWN_DATA = """
    import mxnet as mx
    from mxnet import autograd, gluon, nd
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.BatchNorm(), gluon.nn.Dense(2))
    net.initialize()
    softmax_cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1}, utils.store())
    train_data = [(nd.random.normal(i, shape=(n, 2)), nd.arange(n) % 2) for i, n in enumerate(SIZES)]
    test_data = [(nd.random.normal(shape=(n, *SHAPE)), nd.arange(n) % 2) for n in (200, 1)]
    utils.evaluate_accuracy(test_data, net)  # BatchNorm has gathered nothing yet
    epoch, train_loss, train_acc = utils.load_checkpoint(net, trainer)
    while utils.lock_start() and epoch <= utils.params()[1]:
        for data, label in utils.progress(train_data):
            with autograd.record():
                output = net(data)
                loss = softmax_cross_entropy(output, label)
            loss.backward()
            assert len(list(utils.progress(test_data))) == 2
            trainer.step(utils.total(data.shape[0]))
            utils.evaluate_accuracy(test_data, net)
            train_acc += utils.accuracy(output, label)
            train_loss += utils.batch_loss(loss)
        test_acc = utils.evaluate_accuracy(test_data, net)
        utils.chat_inf(wechat_name, epoch, train_loss, train_acc, train_data, test_acc)
        right = sum(int((net(x).argmax(axis=1) == y).sum().asscalar()) for x, y in test_data)
        utils.chat_send(f'told {test_acc:.3f}, right {right / 201:.3f}')
        epoch, train_loss, train_acc = utils.save_checkpoint(net, trainer, epoch, train_loss, train_acc)
    utils.lock_end(wechat_name)
"""


def test_ones_own_data_among_several_processes(tmp_path):
    """Test batches that are smaller than --workers; BatchNorm; an evaluation in the middle of a pass."""
    head = 'SIZES, SHAPE = (4, 4, 3), (2,)'
    output = in_terminal(tmp_path, OWN_DATA, 'ti 2\n开始\n', '--workers', '2', head=head)
    told = re.findall(r'told (0\.\d+), right (0\.\d+)', output)
    assert len(told) == 2 and all(said == right for said, right in told)
    accuracies = re.findall('训练精度 (.*)', output)
    assert len(accuracies) == 2 and all(0 <= float(accuracy) <= 1 for accuracy in accuracies)


@pytest.mark.parametrize('head', [GENERATOR, ITERATOR], ids=['dicts', 'NDArrayIter'])
def test_batches_of_any_kind_are_divided_among_processes(tmp_path, head):
    told = []
    for n in ('1', '2'):
        folder = tmp_path / n
        folder.mkdir()
        in_terminal(folder, OWN_LOOP, 'ti 2 lr 0.05\n开始\n', '--workers', n, head=head % (None,))
        with open(next(folder.glob('runs/*/log.csv'))) as f:
            told.append([[float(row[i]) for i in (1, 2, 3)] for row in list(csv.reader(f))[1:]])
    assert np.shape(told) == (2, 2, 3) and np.abs(np.subtract(*told)).max() < 0.02


def test_different_data_are_told(tmp_path):
    head = 'SIZES, SHAPE = (4,) * (2 + (utils.role == "follows")), (2,)'
    output = in_terminal(tmp_path, OWN_DATA, '开始\n', '--workers', '2', head=head, status=1)
    assert '几个进程的训练数据不一样' in output


@pytest.mark.parametrize(
    'options, why',
    [
        ('--workers 0', '大于 0'),
        ('--join 127.0.0.1:1', '大于 1'),
        ('--workers 2 --join here', 'IP:PORT'),
        ('--workers 2 --host 203.0.113.1', '203.0.113.1'),
    ],
)
def test_wrong_options_of_several_processes(tmp_path, options, why):
    with Program(tmp_path, *options.split()) as program:
        status, output = program.types('')
    assert status == 2 and why in output


# -------------------------------------------------------------------------------------- notebooks

CELLS = """
import contextlib, utils, itchat, sys, threading, time
import mxnet as mx
sys.argv = ['ipykernel_launcher.py', '-f', 'kernel.json']
utils.Remote.ORPHANED = 0.5
STUCK, WHO = False, 'first'

def nn_train(wechat_name, params):
    epoch = 1
    print('TRAINS', WHO, mx.util.is_np_array(), threading.current_thread().name, flush=True)
    while utils.lock_start() and epoch <= utils.params()[1]:
        for _ in utils.progress(range(50)):
            time.sleep(3600 if STUCK else 0.01)
        utils.chat_inf(wechat_name, epoch, 1, 1, [0], 0.5)
        epoch += 1
    utils.lock_end(wechat_name)

"""
CELL = 'utils.parse_args(); utils.chat_supervisor(nn_train); itchat.auto_login(hotReload=True); itchat.run()'


class Notebook(Program):
    """An interactive Python: it has no file, and what runs in it does not end it."""

    def __init__(self, folder, **how):
        super().__init__(folder, script='-q', python=('-i',), **how)
        self.cells = 0
        self.run(CELLS)

    def type_cell(self, text):
        """Run a cell; return at once."""
        self.cells += 1
        self.process.stdin.write(f'{text}\nprint("CELL", {self.cells})\n')
        self.process.stdin.flush()

    def run(self, text):
        """Run a cell, wait for its end, return all output so far."""
        self.type_cell(text)
        return self.end_of_cell()

    def end_of_cell(self):
        self.wait_output(f'CELL {self.cells}\n')
        return self.output()

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


def test_a_notebook_outlives_what_is_run_in_it(wechat, tmp_path):
    """The same cell twice; two interrupts; another thread, whose nn_train is changed; a death."""
    with Notebook(tmp_path, env=wechat.env()) as notebook:
        notebook.type_cell(CELL)
        wechat.ready()
        wechat.ask('ti 3')
        wechat.ask('开始')
        wechat.wait_text('第 1/3 轮')
        notebook.interrupt()
        assert '会话结束了；再运行一次，就再登录' in notebook.end_of_cell()
        assert wechat.wait_text('训练已停止')

        wechat.receiving, since = 0, len(wechat.heard())
        notebook.type_cell(f'STUCK = True; {CELL}')
        wechat.ready()
        wechat.ask('开始')
        notebook.wait_output('TRAINS', 2)
        notebook.interrupt()
        time.sleep(1.1)  # a second one within a second is the same
        notebook.interrupt()
        assert 'KeyboardInterrupt' in wechat.wait_text('训练出错', since=since)
        notebook.end_of_cell()

        wechat.receiving = 0
        other = CELL.replace('run()', 'run(blockThread=False)')
        notebook.run(f'STUCK = False; mx.npx.set_np(); {other}')
        wechat.ready()
        for who in ('first', 'second'):
            since = len(wechat.heard())
            wechat.ask('开始')
            wechat.wait_text('训练完成', since=since)
            assert f'TRAINS {who} True training' in notebook.output()
            notebook.run(
                'first, nn_train = nn_train, lambda *args: (globals().update(WHO="second"), first(*args))'
            )
            notebook.run(other)
        assert 'NUMBER 4' in notebook.run('print("NUMBER", utils.run.number)')

        notebook.run('itchat.instance.talker.kill()')
        notebook.wait_output('会话结束了', 3)
        wechat.receiving = 0
        notebook.run(other)
        wechat.ready()
        assert '轮数 ti = 3' in wechat.ask('参数')
        output = notebook.run('print("THREADS", [t.name for t in threading.enumerate()].count("training"))')
        assert 'THREADS 1' in output and 'SystemExit' not in output


def test_what_a_notebook_cannot_do_is_one_line(tmp_path):
    """Several processes; without WeChat, commands come from cells."""
    with Notebook(tmp_path) as notebook:
        assert '--workers：几个进程各自运行同一个脚本，笔记本里不行' in notebook.run(
            'with contextlib.suppress(SystemExit): utils.parse_args(["--workers", "2"])\n'  # as notebooks do
        )
        cell = CELL.replace('run()', 'run(blockThread=False)').replace('()', '(["--console"])', 1)
        notebook.run(f'{cell}; itchat.instance.receive("lr 0.25")')
        notebook.wait_output('lr = 0.25')
        notebook.run('itchat.instance.receive("开始")')
        notebook.wait_output('训练完成')


# ------------------------------------------------------------------------ several programs, one login

LIGHT = """
import argparse, json, os
from multiprocessing.connection import Connection

mark = os.environ.get('WECHAT_TRAIN_ROLE', '').split()
if mark[1:2] == ['trains']:  # in the place of MXNet, which would take 2 s and 400 MB
    line = Connection(int(mark[2]))

    def say(do, **message):
        line.send_bytes(json.dumps({'do': do, **message}).encode())

    parser = argparse.ArgumentParser()
    for option in ('--alone', '--filehelper'):
        parser.add_argument(option, action='store_true')
    for option in ('--name', '--chat'):
        parser.add_argument(option)
    values = {'learning_rate': 1.0, 'training_iters': 2, 'batch_size': 256}
    how = {'hotReload': True, 'statusStorageDir': None, 'callbacks': []}
    say('login', given={**vars(parser.parse_args()), 'retry': 0.1}, how=how)
    do = ''
    while do not in ('end', 'exit'):
        message = json.loads(line.recv_bytes())
        do = message['do']
        if do == 'logged_in':
            values.update(message['settings'].get('values', {}))
            say('run', commands=True, handlers={}, values=values, offer='')
        elif do == 'order':
            letters, reports = [], ()
            for said in message['commands']:
                word, content, kind = said['word'], '执行了：' + said['text'], 'text'
                for name, text in said['values'] if word == 'set' else ():
                    factor = float(text.strip('x'))
                    values[name] = float(f'{values[name] * factor:.6g}') if 'x' in text else factor
                if word in ('set', 'params'):
                    content = f'学习率 lr = {values["learning_rate"]:g}'
                if word == 'plot':
                    content, kind = os.path.abspath('picture.png'), 'picture'
                letters.append({'content': content, 'kind': kind})
                reports = range(1, 21) if word == 'start' else reports
            run = {'number': 1, 'person': message['person'], 'ending': ''} if reports else {}
            say('answered', id=message['id'], letters=letters, settings={'values': values}, run=run)
            for n in reports:
                say('tell', letters=[{'content': f'第 {n} 份', 'kind': 'report', 'test_acc': 1 / n}])
    say('bye', status=0)
    os._exit(0)
import utils
"""


@pytest.fixture
def light(tmp_path):
    """A function that starts a program whose training process is a light one, in a folder of this name."""
    started = []

    def start(name, phone, *args, script='', **env):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / 'light.py').write_text(LIGHT)
        env = {**phone.env(), 'XDG_RUNTIME_DIR': str(tmp_path), **env}
        script = script or str(folder / 'light.py')
        started.append(Program(folder, *args, script=script, env=env))
        return started[-1]

    yield start
    for program in started:
        program.__exit__()


def join(light, phone, *names):
    """Start these programs, the first with the login, and let B be the supervisor; return them by name."""
    programs = {names[0]: light(names[0], phone)}
    phone.ready()
    programs.update((name, light(name, phone)) for name in names[1:])
    for name in names[1:]:
        programs[name].wait_output('合用 ')
    return programs


def test_five_programs_one_login_and_five_hundred_commands(wechat, light):
    """Each is obeyed once, by the right one, though one is killed, and then the one with the login."""
    names = '甲', '乙', '丙', '丁', '戊'
    programs = join(light, wechat, *names)
    factors, answers = {name: [1.003, 1.004] for name in names}, []
    rng, lr, alive = np.random.default_rng(0), dict.fromkeys(names, 1.0), list(names)

    def let_go(name):
        alive.remove(name)
        wechat.wait_text(rf'\[{name}\][^\[]*学习率 lr = {lr[name]:g}(\n|\Z)')

    for i in range(500):
        if i in (130, 330):
            let_go(dying := {130: '丙', 330: '甲'}[i])
        if i in (150, 350):  # others have something on its way
            programs[dying].kill()
        if i == 150:
            assert '丙 没有了' in wechat.wait_text('丙 没有了')
            wechat.says('B', '丙 停止')
            wechat.wait_text('丙 不在了')
            programs['丙'] = light('丙', wechat)
            programs['丙'].wait_output('合用 ')
            alive.append('丙')
        name = alive[rng.integers(len(alive))]
        factors[name].reverse()  # the same words twice in an outage are one command
        factor = factors[name][0]
        wechat.says('B', f'{name} lr x{factor}')
        lr[name] = float(f'{lr[name] * factor:.6g}')
        answers.append((name, f'学习率 lr = {lr[name]:g}'))
    assert '甲 没有了' in wechat.wait_text('甲 没有了')
    programs['甲'] = light('甲', wechat)
    programs['甲'].wait_output('合用 ')
    for name in names:
        wechat.says('B', f'{name} 参数')
        wechat.wait_text(rf'\A\[{name}\][^\[]*学习率 lr = {lr[name]:g}\Z')
    told = [(text[1], line) for text in wechat.heard() for line in re.findall('学习率 lr = .*', text)]
    assert (
        set(answers) <= set(told) and 500 < len(told) < 520
    )  # one may come twice where its receipt was lost
    assert wechat.logins == 1  # from then on by the stored session
    for name in ('乙', '丁', '戊'):
        assert '甲 没有了' in programs[name].output()
    for name in names:
        assert 'Traceback' not in programs[name].output()


def test_words_for_several_programs(wechat, light):
    programs = join(light, wechat, '甲', '我的 run')
    assert wechat.ask('停止').startswith('[甲] “停止”没有执行。要哪一个？甲、我的 run')
    for word in ('状态', '记录', '帮助'):  # of both
        since = len(wechat.heard())
        wechat.says('B', word)
        wechat.wait(lambda s=since: len(wechat.heard(since=s)) == 2)
        assert {text.split(']')[0] for text in wechat.heard(since=since)} == {'[甲', '[我的 run'}
    for text, answer in [
        ('我的 RUN 停止', '[我的 run] 执行了：停止'),
        ('继续', '[我的 run] 执行了：继续'),  # the one spoken to last
        ('“甲：停止”。', '[甲] 执行了：停止'),
        ('@我的 run\u2005早停 3', '[我的 run] 执行了：早停 3'),
        ('@小号 回退', '[我的 run] 执行了：回退'),  # a mention as before
        ('「账号A：[甲] 第 3/10 轮」\n- - - - - -\n停止', '[我的 run] 执行了：停止'),
        ('@甲\nlr x0.5', '[甲] 学习率 lr = 0.5'),
        ('报告', '[甲] “报告”没看懂'),
    ]:
        assert wechat.ask(text).startswith(answer), text
    since = len(wechat.heard())
    wechat.says('B', '我的 run lr 0.1\nlr x0.5\n甲 lr 2')
    wechat.wait(lambda: len(wechat.heard(since=since)) == 3)
    assert '[甲] 学习率 lr = 2' in wechat.heard(since=since)
    for everybody in ('全部 参数', '全部参数'):
        since = len(wechat.heard())
        wechat.says('B', everybody)
        wechat.wait(lambda s=since: len(wechat.heard(since=s)) == 2)
        assert sorted(wechat.heard(since=since)) == ['[我的 run] 学习率 lr = 0.05', '[甲] 学习率 lr = 2']
    listed = wechat.ask('程序').removeprefix('[甲] ').split('\n')
    host = socket.gethostname()
    assert [line.split('：')[0] for line in listed] == [f'甲（主机 {host}）', f'我的 run（主机 {host}）']
    assert all('light.py' in line for line in listed) and wechat.ask('programs').split('\n')[1] == listed[1]
    for talk in ('甲 今天吃什么', '甲', '全部', '甲停止了吗', '[甲] 停止', '甲 乙 停止', '甲 我的 run'):
        wechat.says('B', talk)
    since = len(wechat.heard())
    assert '要哪一个' in wechat.ask('开始')  # after 全部 nobody is the last one
    assert len(wechat.heard(since=since)) == 1
    programs['我的 run'].process.send_signal(signal.SIGINT)
    assert programs['我的 run'].process.wait(DEADLINE) == 130
    assert wechat.wait_text('我的 run 结束了') and wechat.ask('状态') == '执行了：状态'
    assert '我的 run 不在了' in wechat.ask('我的 run 停止') and '我的 run' not in wechat.ask('程序')


def test_who_may_command_is_decided_by_the_one_with_the_login(wechat, light):
    programs = join(light, wechat, '甲', '乙')
    wechat.says('C', '乙 停止')
    assert '由别人监督' in wechat.wait_text('抱歉', 'C')
    wechat.says('C', '全部 停止')
    wechat.says('A', '乙 报告 3')
    wechat.wait_text('乙. 执行了：报告 3', 'filehelper')
    wechat.says('A', '乙 允许 C')
    wechat.wait_text('C 能下命令了', 'filehelper')
    wechat.wait_text('机主允许你', 'C')
    assert wechat.ask('乙 报告 4', 'C') == '[乙] 执行了：报告 4'
    wechat.ask('乙 开始')  # both hear of it
    wechat.wait_text('乙. 第 1 份', 'C')
    assert '停止' not in programs['乙'].output()
    programs['甲'].kill()
    programs['乙'].wait_output('已登录')
    wechat.says('D', '停止')  # those who may are known to the next one
    assert '由别人监督' in wechat.wait_text('抱歉', 'D')
    assert wechat.ask('报告 5', 'C').endswith('执行了：报告 5')


@pytest.mark.parametrize('server', [WeChat, FileHelper])
def test_those_that_begin_at_the_same_moment_have_one_login(tmp_path, light, server):
    phone = server(str(tmp_path))
    phone.phone = 'lies on the table'
    carrier = ['--filehelper'] * (server is FileHelper)
    programs = [light(folder, phone, *carrier, '--name', 'a') for folder in 'abcd']
    codes = phone.login_host + '/jslogin'
    for number in (1, 2):  # when the first is killed, the next one shows a code
        phone.wait(lambda n=number: phone.requests.count(codes) == n)
        for program in programs:
            deadline = time.monotonic() + DEADLINE
            while '请用微信扫码' not in program.output() and '在等另一个程序登录' not in program.output():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        if number == 1:
            [first] = [program for program in programs if '请用微信扫码' in program.output()]
            first.kill()
            programs.remove(first)
    phone.phone = 'scans'
    phone.ready()
    for program in programs:
        if '请用微信扫码' not in program.output():
            program.wait_output('合用 ')
    assert phone.logins == 1
    phone.says('A', '程序')
    listed = phone.wait_text('（主机', 'filehelper').split('\n')
    assert len(listed) == 3 and len({line.split('（')[0] for line in listed}) == 3
    phone.shutdown()
    assert phone.faults == []


def test_names_and_alone(wechat, light, tmp_path):
    programs = join(light, wechat, '实验')
    others = {}
    for folder, options, name in [
        ('x', ['--name', '实验'], '实验2'),
        ('y', ['--name', ' [lr  =0.1]\n😻 '], 'lr 0.1'),
        ('z', ['--name', '停止'], '停止'),
        ('w', ['--name', 'run 1'], 'run 1'),
        ('v', ['--name', 'RUN 1'], 'RUN 1-2'),
    ]:
        others[name] = light(folder, wechat, *options)
        others[name].wait_output(f'在那里叫 {name}。')
    for name in others:
        assert wechat.ask(f'{name} 报告 2') == f'[{name}] 执行了：报告 2'
    path = socket_of(tmp_path, wechat)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    wechat.phone = 'lies on the table'
    alone = light('alone', wechat, '--alone')
    alone.wait_output('请用微信扫码')
    assert '合用' not in alone.output() and 'Traceback' not in programs['实验'].output()


def test_reports_of_all_programs_share_the_limits_of_the_account(wechat, light):
    join(light, wechat, '甲', '乙', '丙', '丁', '戊')
    since, began = len(wechat.heard()), time.monotonic()
    wechat.says('B', '全部 开始')
    wechat.wait(lambda: sum('第 20 份' in text for text in wechat.heard(since=since)) == 5)
    texts = wechat.heard(since=since)
    most = 5 + 5 + (time.monotonic() - began) / utils.Mail.PACE  # answers, first ones, one every two seconds
    assert len(texts) <= most + 1 < 100
    for name in '甲乙丙丁戊':
        told = '\n'.join(text for text in texts if text.startswith(f'[{name}]'))
        assert '第 1 份' in told and '略去 17 份报告' in told and told.count('第 20 份') == 1


class Tunnel:
    """What `ssh -R` makes of a socket: another one, whose connections another process carries on."""

    def __init__(self, path, to):
        self.path, self.to, self.open = str(path), to, []
        self.server = None

    def dig(self):
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path)
        code = textwrap.dedent(f"""
            import contextlib, os, socket, threading
            server = socket.socket(socket.AF_UNIX)
            os.chdir({os.path.dirname(self.path)!r})
            server.bind({os.path.basename(self.path)!r})
            server.listen()
            def pump(a, b):
                with contextlib.suppress(OSError):
                    while content := a.recv(65536):
                        b.sendall(content)
                for end in (a, b):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
            while True:
                near, _ = server.accept()
                far = socket.socket(socket.AF_UNIX)
                os.chdir({os.path.dirname(self.to)!r})
                try:
                    far.connect({os.path.basename(self.to)!r})
                except OSError:  # nobody is there just now
                    near.close()
                    continue
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()
        """)
        self.server = subprocess.Popen([sys.executable, '-c', code])
        deadline = time.monotonic() + DEADLINE
        while not os.path.exists(self.path):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def cut(self):
        self.server.kill()
        self.server.wait()


def socket_of(folder, server):
    """Return where the program meets others that has its login at this server."""
    way = hashlib.sha256(server.env()['HTTPS_PROXY'].encode()).hexdigest()[:8]
    return folder / 'wechat_train' / f'{type(server).__name__.lower()}-{way}.sock'


def test_a_program_of_another_machine(helper, light, tmp_path):
    """Its pictures come as bytes; a tunnel that breaks is told, and what was to be said arrives later."""
    first = light('甲', helper, '--filehelper')
    helper.ready()
    tunnel = Tunnel(tmp_path / 'chat', str(socket_of(tmp_path, helper)))
    tunnel.dig()
    try:
        far = light('乙', helper, '--filehelper', '--chat', '../chat', XDG_RUNTIME_DIR='/nowhere')
        far.wait_output('合用 ')
        picture = os.urandom(10 * 10**6)
        (tmp_path / '乙' / 'picture.png').write_bytes(picture)
        helper.says('A', '乙 曲线')
        helper.wait(lambda: picture in [content for _, content in helper.sent])
        assert helper.heard('filehelper')[-2:] == ['[乙] 图片：', picture]
        (tmp_path / '乙' / 'picture.png').write_bytes(picture * 2)
        assert '[乙] 图片没有传上去，在 picture.png' in helper.ask('乙 曲线')
        helper.says('A', '乙 开始')
        helper.wait_text('乙. 第 1 份', 'filehelper')
        tunnel.cut()
        assert '乙 断开 10 秒了' in helper.wait_text('断开', 'filehelper')
        first.wait_output('乙 断开 10 秒了')
        far.wait_output('断开 10 秒了，训练不受影响')
        tunnel.dig()
        assert '乙（主机' in helper.wait_text('又连上了', 'filehelper')
        late = helper.wait_text('第 20 份', 'filehelper')
        # In order; the first one once more if its receipt was lost.
        assert re.fullmatch(r'\[乙\] 第 [12] 份\n\n（略去 1[78] 份报告，都在 log.csv 里）\n\n第 20 份', late)
        helper.says('A', '乙 状态')
        helper.wait_text('乙. 执行了：状态', 'filehelper')
    finally:
        tunnel.cut()


RUBBISH = [
    b'GET / HTTP/1.1\r\n\r\n' * 9,
    struct.pack('!i', 2**25) + b'x' * 100,
    struct.pack('!i', -7) + b'x' * 100,
    struct.pack('!i', 5) + b'[1,2]',
    struct.pack('!i', 16) + b'{"do": "__init__',
    struct.pack('!i', 14) + b'{"do": "send"}',
    struct.pack('!i', 200000) + b'[' * 200000,
    struct.pack('!i', 13) + b'{"do": "bye"}',
]


def test_a_peer_that_sends_rubbish_is_disconnected(wechat, light, tmp_path):
    [program] = join(light, wechat, '甲').values()
    foreign = [greeting(do=do) for do in ('beat', 'leave', '__init__', 7)]
    foreign += [greeting(name=['x']), greeting(silent='x'), greeting(turn=None), greeting(host=5)]
    for rubbish in [*RUBBISH, *foreign[1:]]:
        with connected(socket_of(tmp_path, wechat)) as peer:
            peer.settimeout(DEADLINE)
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                peer.sendall(rubbish)
                while peer.recv(65536):
                    pass
    assert wechat.ask('参数').endswith('学习率 lr = 1') and 'Traceback' not in program.output()
    assert wechat.ask('程序').count('light.py') == 1


def connected(path):
    """Return a connection to a socket, whose path may be long."""
    peer = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_RDONLY)
    peer.connect(f'/proc/self/fd/{folder}/{path.name}')
    os.close(folder)
    return peer


def greeting(**changed):
    """Return the first message of a program, as it goes over the socket."""
    about = {
        'do': 'beat',
        'id': 'x',
        'turn': 1,
        'name': '聋子',
        'host': 'h',
        'pid': 1,
        'what': 'w',
        'far': 'f',
    }
    content = json.dumps({**about, 'silent': 0, **changed}).encode()
    return struct.pack('!i', len(content)) + content


def test_a_peer_that_never_reads_holds_up_nobody(wechat, light, tmp_path):
    join(light, wechat, '甲', '乙')
    with connected(socket_of(tmp_path, wechat)) as peer:
        peer.sendall(greeting())
        wechat.wait(lambda: '聋子' in wechat.ask('程序'))
        for _ in range(20):
            wechat.says('B', '聋子 停止')
        assert wechat.ask('乙 状态') == '[乙] 执行了：状态'
        with contextlib.suppress(OSError):  # at last it is thrown out, as it does not read the answers
            for _ in range(20000):
                peer.sendall(greeting())
        wechat.wait_text('聋子 断开 10 秒了')
    wechat.wait_text('“停止”：聋子 还没有说收到')
    wechat.says('B', '乙 报告 3')
    wechat.wait_text('乙. 执行了：报告 3')


def test_what_others_could_have_put_there_is_not_used(wechat, light, tmp_path):
    folder = tmp_path / 'wechat_train'
    join(light, wechat, '甲')
    path = socket_of(tmp_path, wechat)
    with connected(path):
        (tmp_path / 'link').symlink_to(path)
        (tmp_path / 'file').write_text('')
        (tmp_path / 'open').mkdir()
        (tmp_path / 'open').chmod(0o777)
        os.link(path, tmp_path / 'open' / 'chat')
    for name, why in [
        ('link', '不是套接字'),
        ('file', '不是套接字'),
        ('open/chat', '别人能动它'),
        ('none', ''),
    ]:
        program = light('乙', wechat, '--chat', str(tmp_path / name))
        assert program.process.wait(DEADLINE) == 1
        assert (
            '--chat' in program.output() and why in program.output() and 'Traceback' not in program.output()
        )
    wechat.phone = 'lies on the table'
    folder.chmod(0o755)
    program = light('乙', wechat)
    program.wait_output('请用微信扫码')
    assert '不和别的程序合用登录' in program.output() and '只有你能读写的文件夹' in program.output()
    if os.getuid():
        return
    folder.chmod(0o755)  # another user that has come this far
    path.chmod(0o777)
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(ConnectionError):
            os.chdir(folder)
            os.setgid(65534)
            os.setuid(65534)
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(path.name)
            status = 2
            peer.sendall(greeting())
            status = 3 if peer.recv(1) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert wechat.ask('程序').count('聋子') == 0


def test_two_programs_that_train_and_the_end_of_the_one_with_the_login(wechat, light, images, tmp_path):
    script = os.path.join(HERE, 'wechat_train.py')
    first = light('甲', wechat, '--data', images, script=script)
    wechat.ready()
    second = light('乙', wechat, '--data', images, script=script)
    second.wait_output('合用 ')
    wechat.says('B', '全部 ti 100000 bs 100')
    wechat.says('B', '乙 报告 0\n开始\n甲 开始')
    for name in '甲乙':
        wechat.wait_text(rf'\A\[{name}\] [^\[]*开始训练')
    wechat.wait_text(r'\A\[甲\][^\[]*第 1/')
    since = len(wechat.heard())
    wechat.says('B', '甲 曲线')
    wechat.wait_picture(since=since)
    assert '[甲] 图片：' in wechat.heard(since=since)
    first.process.send_signal(signal.SIGINT)
    first.wait_output('乙 还用着这个微信：训练停下，登录留着')
    wechat.wait_text(r'\A\[甲\][^\[]*训练已停止')
    wechat.says('B', '甲 开始')
    assert '只替别的程序传话' in wechat.wait_text('只替别的程序')
    wechat.says('B', '程序')
    wechat.wait_text(r'乙（主机 .*）：wechat_train.py，完成 \d+/100000 轮')
    time.sleep(1.1)  # two signals within a second are one
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(DEADLINE) == 130
    second.wait_output('甲 没有了，训练不受影响；自己登录')
    wechat.wait_text('甲 没有了，现在由 乙 登录')
    second.wait_output('已登录')
    wechat.says('B', '状态')
    assert wechat.wait_text(r'(?s)\A[^\[]*设备 CPU') and wechat.logins == 1
    wechat.says('B', '停止')
    wechat.wait_text(r'\A[^\[]*训练已停止')
    assert 'Traceback' not in first.output() + second.output()


def test_a_socket_that_is_removed_a_last_program_and_another_account(wechat, light, tmp_path):
    programs = join(light, wechat, '甲')
    path = socket_of(tmp_path, wechat)
    path.unlink()  # a session's folder goes with the session
    wechat.wait(lambda: wechat.ask('参数') and path.exists())
    programs['乙'] = light('乙', wechat)
    programs['乙'].wait_output('合用 ')
    programs['甲'].process.send_signal(signal.SIGTERM)
    programs['甲'].wait_output('乙 还用着这个微信')
    programs['乙'].process.send_signal(signal.SIGINT)  # the last one that speaks through it
    assert programs['乙'].process.wait(DEADLINE) == 130 and programs['甲'].process.wait(DEADLINE) == 143
    wechat.wait_text('乙 结束了')
    assert not path.exists()
    with contextlib.closing(sqlite3.connect(tmp_path / '乙' / '.wechat_train.db')) as db:
        db.execute("""UPDATE setting SET value = '["Z"]' WHERE name = 'account'""")
        db.commit()
    light('甲', wechat).wait_output('已登录')
    wechat.phone = 'lies on the table'
    other = light('乙', wechat)
    other.wait_output('请用微信扫码')
    assert '这个文件夹以前用的是另一个微信账号' in other.output()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(['停止', 'lr x0.5', '报告 3', 'TI 5'])), min_size=1
    ),
    st.sampled_from(['', '@', '“']),
    st.sampled_from([' ', '\u2005', '：', ', ', '  ']),
)
def test_whatever_a_program_is_called_its_name_is_understood(names, said, before, between):
    names = list(dict.fromkeys(map(utils.tidy, names)))
    lower = [name.casefold() for name in names]
    said = [(names[i % len(names)], command) for i, command in said[:6]]
    prefixes = any(a != b and a.startswith(b) for a in lower for b in lower)
    for name in names:
        assert name and len(name.encode()) <= 40 and utils.tidy(name) == name
    text = '\n'.join(before + name + between + command for name, command in said)
    if prefixes or len(text) > utils.LONGEST or any(utils.parse(f'{name} 停止') for name in names):
        return
    parts = {}
    for name, command in said:
        parts.setdefault(name, []).append(command)
    parsed, found = utils.share_out(text, names)
    assert {name: lines.split('\n') for name, lines in found.items()} == parts
    assert len(parsed.commands) == len(said) and not parsed.almost


def test_one_that_comes_late_to_the_next_login_is_waited_for(wechat, light):
    programs = join(light, wechat, '甲', '乙', '丙')
    os.kill(programs['丙'].process.pid, signal.SIGSTOP)
    programs['甲'].kill()
    wechat.wait_text('甲 没有了，现在由 乙 登录')
    wechat.says('B', '丙 报告 3')
    wechat.says('B', '乙 状态')
    wechat.wait_text('乙. 执行了：状态')
    os.kill(programs['丙'].process.pid, signal.SIGCONT)
    wechat.wait_text('丙. 执行了：报告 3')


def test_what_is_given_twice_is_obeyed_once(wechat, light, tmp_path):
    """The test is the program with the login here, which has not heard that it was taken."""
    (tmp_path / 'wechat_train').mkdir(mode=0o700)
    os.chdir(tmp_path / 'wechat_train')  # the whole path may be too long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(socket_of(tmp_path, wechat).name)
        os.chdir(HERE)
        server.listen()
        program = light('乙', wechat)
        peer, _ = server.accept()
        with peer, peer.makefile('rb') as said:

            def tell(**message):
                content = json.dumps(message).encode()
                peer.sendall(struct.pack('!i', len(content)) + content)

            state = {'name': '乙', 'chat': '甲', 'local': True, 'session': '', 'account': ['A']}
            state.update(programs=[['x', '乙', 'h']], owner=True, online=True)
            tell(do='state', people=[['@b', 'B', '', 'first'], ['@c', 'C', '', 'allowed']], **state)
            order = {'do': 'order', 'text': 'lr x0.5', 'user_name': '@b'}
            for number in ('1', '1', '2', '1'):
                tell(id=number, **order)
            tell(do='state', people=[['@b', 'B', '', 'first']], **state)  # no longer C
            tell(id='3', **{**order, 'text': '开始'})
            answers, taken = [], []
            tell(id='4', **{**order, 'text': '参数'})
            while [text[-4:] for _, text in answers].count('0.25') < 2:
                message = json.loads(said.read(struct.unpack('!i', said.read(4))[0]))
                taken += [message['id']] if message['do'] == 'taken' else []
                if message['do'] == 'send':
                    answers.append((message['to'], message['text']))
                    tell(do='sent', n=message['n'], ret=0, number='')
        lr = [('@b', '学习率 lr = 0.5'), ('@b', '学习率 lr = 0.25')]
        assert answers[:2] == lr and {to for to, _ in answers} == {'@b'}
        assert taken == ['1', '1', '2', '1', '3', '4']
        program.kill()


# ----------------------------------------------------------------------------------- the command line


def test_the_demo_trains_to_the_end_without_wechat(tmp_path):
    with Program(tmp_path, '--demo', env={'HTTPS_PROXY': 'http://127.0.0.1:9'}) as program:
        status, output = program.types('ti 2\n你好\n开始\n')
    assert status == 0 and '你好\n没有这个命令' in output and 'Traceback' not in output
    reports = re.findall(r'第 (\d)/2 轮.*?测试精度 (\S+)', output, re.S)
    assert [number for number, _ in reports] == ['1', '2'] and float(reports[1][1]) > 0.4
    note = '演示数据：程序画的图，不是 Fashion-MNIST\n'
    assert (
        output.count(note) == 2 and note + '开始训练' in output and note + '训练完成\n完成 2/2 轮' in output
    )


def test_the_console_tells_a_crash_and_exits_with_1(images, tmp_path):
    with open(os.path.join(images, 'train-labels-idx1-ubyte.gz'), 'wb') as f:
        f.write(b'damaged')
    with Program(tmp_path, '--console', '--data', images) as program:
        status, output = program.types('开始\n')
    assert status == 1 and 'ValueError' in output and '已损坏' in output


@pytest.mark.parametrize('options', ['', '--workers 2'])
def test_no_network_is_one_line_and_a_failure(tmp_path, options):
    with Program(
        tmp_path, *options.split(), env={'HTTPS_PROXY': 'http://127.0.0.1:9', 'NO_PROXY': ''}
    ) as program:
        status, output = program.types('')
    assert status == 1 and len(lines_of(output)) == 1
    assert '连不上微信' in output and '--console' in output and '--demo' in output


NO_NAMES = """
import socket

def getaddrinfo(*args, **kwargs):
    raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

socket.getaddrinfo = getaddrinfo
"""
SOCKS = {'ALL_PROXY': 'socks5://127.0.0.1:9'}


@pytest.mark.parametrize(
    'env, words',
    [
        ({'HTTPS_PROXY': 'http://me:secret@127.0.0.1:9'}, ['连不上代理 127.0.0.1:9（HTTPS_PROXY）']),
        ({'HTTPS_PROXY': 'refusing'}, ['代理回答 407', '写进 HTTPS_PROXY：http://用户名:密码@']),
        (SOCKS, ['连不上代理 127' if find_spec('socks') else 'pip install pysocks', 'ALL_PROXY']),
        ({'ALL_PROXY': 'socks://127.0.0.1:9'}, ['ALL_PROXY 写得不对', 'socks5h://']),
        ({'HTTPS_PROXY': 'wechat'}, ['证书不被信任', 'REQUESTS_CA_BUNDLE']),
        ({'HTTPS_PROXY': 'wechat', 'REQUESTS_CA_BUNDLE': '/no/where'}, ['REQUESTS_CA_BUNDLE 指的 /no/where']),
        ({}, ['（login.weixin.qq.com）', '解析不了', 'HTTPS_PROXY']),
    ],
)
@pytest.mark.parametrize('stored', [False, True])
def test_what_keeps_from_wechat_is_named_with_the_way_out(wechat, tmp_path, env, words, stored):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(407)

        def log_message(self, *args):
            pass

    if stored:
        with Program(tmp_path, env=wechat.env()):
            wechat.ready()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        proxies = {'refusing': refusing, 'wechat': wechat}
        proxy = proxies.get(env.get('HTTPS_PROXY'))
        other = tmp_path / 'other.pem'
        trustme.CA().cert_pem.write_to_path(str(other))
        proxy = {'HTTPS_PROXY': f'http://me:secret@127.0.0.1:{proxy.server_port}'} if proxy else {}
        usual = {'HTTPS_PROXY': '', 'ALL_PROXY': '', 'NO_PROXY': '', 'REQUESTS_CA_BUNDLE': str(other)}
        with Program(
            tmp_path, env={**usual, **env, **proxy}, before='' if env else NO_NAMES + QUICK
        ) as program:
            status, output = program.types('')
        refusing.shutdown()
    [line] = lines_of(output)
    assert status == 1 and line.startswith('连不上微信') and 'secret' not in line
    assert all(word in line for word in [*words, '--console', '--demo'])
    assert (tmp_path / 'itchat.pkl').exists() == stored


def test_help_and_wrong_options(tmp_path):
    with Program(tmp_path, '--help') as program:
        status, output = program.types('')
    assert status == 0 and all(option in output for option in ('--console', '--data DIR', '--demo', '--seed'))
    with Program(tmp_path, '--console', '--data', str(tmp_path)) as program:
        status, output = program.types('')
    assert status == 2 and 'train-images-idx3-ubyte.gz' in output and 'Traceback' not in output


@pytest.mark.parametrize('options', ['--filehelper --demo', '--console --filehelper', '--demo --data .'])
def test_options_that_contradict_each_other_are_an_error(tmp_path, options):
    with Program(tmp_path, *options.split()) as program:
        status, output = program.types('')
    assert status == 2 and '不能一起写' in output and 'Traceback' not in output


OWN_OPTIONS = """
import argparse, utils, itchat
def nn_train(wechat_name, params):
    pass
parser = argparse.ArgumentParser()
parser.add_argument('--log', type=int)
parser.add_argument('--seed')
print('OWN', parser.parse_known_args()[0])
%s
utils.chat_supervisor(nn_train)
print('SEED', utils.options.seed)
itchat.auto_login()
itchat.run()
"""


def test_options_count_without_a_line_of_the_scripts(tmp_path):
    """What is not ours is the script's, though it begins like ours; parse_args() still refuses it."""
    script = tmp_path / 'own.py'
    script.write_text(OWN_OPTIONS % '')
    with Program(tmp_path, '--log', '3', '--seed', '5', '--console', script=str(script)) as program:
        status, output = program.types('参数\n')
    assert status == 0 and "log=3, seed='5'" in output and 'SEED 5' in output
    assert '--log 不是这里的选项' in output and 'bs = 256' in output
    script.write_text(OWN_OPTIONS % 'utils.parse_args()')
    with Program(tmp_path, '--log', '3', '--console', script=str(script)) as program:
        status, output = program.types('')
    assert status == 2 and '--log 3' in output.splitlines()[-1]
    script.write_text(OWN_OPTIONS % 'utils.parse_args([]); utils.options.console = True')
    with Program(tmp_path, '--log', '3', '--seed', 'five', script=str(script)) as program:
        status, output = program.types('参数\n')
    assert status == 0 and "seed='five'" in output and 'SEED 0' in output


def test_packages_that_are_missing_are_one_line(tmp_path):
    with Program(tmp_path, '--demo', python=('-S',)) as program:
        status, output = program.types('')
    assert status == 1 and len(output.splitlines()) == 1 and '-m pip install --no-deps -r' in output


PRETEND = """
import sys

class Version(tuple):  # others look at it, too, and are told the truth
    major, minor, micro = sys.version_info[:3]

    def __lt__(self, other):
        return other == %r or tuple(self) < other

    def __ge__(self, other):
        return other == %r or tuple(self) >= other

sys.version_info = Version(sys.version_info)
sys.argv = sys.argv[1:]
exec(open(sys.argv[0]).read())
"""


def test_another_python_is_told_in_one_line(tmp_path):
    with Program(tmp_path, '--help', python=('-c', PRETEND % ((3, 9), ''))) as program:
        status, output = program.types('')
    assert status == 1 and len(output.splitlines()) == 1 and '需要 Python 3.9 或更新的版本' in output
    with Program(tmp_path, '--help', python=('-c', PRETEND % ('', (3, 15)))) as program:
        status, output = program.types('')
    assert status == 0 and '没有试过' in output.splitlines()[0] and '--filehelper' in output


def test_it_starts_without_what_linux_alone_has(tmp_path):
    without = 'import os, runpy, sys; del os.sched_getaffinity; sys.argv = sys.argv[1:]; '
    code = without + "runpy.run_path(sys.argv[0], run_name='__main__')"
    with Program(tmp_path, '--console', python=('-c', code)) as program:
        status, output = program.types('参数\n')
    assert status == 0 and '批量 bs = 256' in output


def test_the_requirements_are_complete():
    """What the installed packages ask for is installed, in a version that they ask for, and pinned."""
    with open(os.path.join(HERE, 'requirements.txt'), encoding='utf-8') as f:
        lines = [requirements.Requirement(line.split('#')[0]) for line in f if line.split('#')[0].strip()]
    pinned = {canonical(line.name): line for line in lines if not line.marker or line.marker.evaluate()}
    assert all(re.fullmatch(r'==[\w.]+', str(line.specifier)) for line in lines)
    missing = []
    for name, line in pinned.items():
        assert line.specifier.contains(metadata.version(name), prereleases=True), name
        for text in metadata.requires(name) or ():
            needs = requirements.Requirement(text)
            if needs.marker and not needs.marker.evaluate({'extra': ''}):
                continue
            there = canonical(needs.name) in pinned and metadata.version(needs.name)
            if not there or not needs.specifier.contains(there, prereleases=True):
                missing.append((name, needs.name))
    assert missing == ([] if sys.version_info < (3, 13) else [('mxnet', 'numpy')])


def canonical(name):
    """Return the name of a package as the registry compares it."""
    return re.sub(r'[-_.]+', '-', name).lower()


# ------------------------------------------------------- whatever the output, the encoding, the room

WAITING = """
    print('IN NN_TRAIN')
    while utils.lock_start():
        time.sleep(0.01)
"""


@pytest.mark.parametrize('piped', [False, True])
def test_every_line_can_be_read_at_once(wechat, tmp_path, piped):
    """With nohup, or with `| tee`: the QR code, what is said, what the script and nn_train print."""
    wechat.phone = 'lies on the table'
    script = own_script(tmp_path, WAITING, head="print('IN THE SCRIPT')")
    tee = subprocess.Popen(['tee', tmp_path / 'piped.txt'], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def preexec():
        for number in (1, 2) if piped else ():
            os.dup2(tee.stdin.fileno(), number)

    with tee, Program(tmp_path, env=wechat.env(), script=script, preexec_fn=preexec) as program:
        program.log = tmp_path / 'piped.txt' if piped else program.log
        program.wait_output('IN THE SCRIPT')
        program.wait_output('请用微信扫码登录')
        code = program.output().split('IN THE SCRIPT')[1].split('请用微信扫码登录')[0]
        assert len([line for line in code.splitlines() if '█' in line]) > 10
        wechat.phone = 'scans'
        program.wait_output('已登录')
        wechat.ready()
        wechat.ask('开始')
        program.wait_output('IN NN_TRAIN')


LOGGING = """
import logging
logging.basicConfig(level=logging.DEBUG, filename='own.log')
for name in ('urllib3', 'urllib3.connectionpool', 'itchat'):
    logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger(name).addHandler(logging.FileHandler('own.log'))
"""
RUNNING = 'import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'


@pytest.mark.parametrize('where', ['script', '-c', 'environment'])
def test_no_library_logs_a_secret(wechat, tmp_path, where):
    """Whatever the script, or what Python reads at its start, has set up; its own lines are in the log."""
    script = own_script(tmp_path, "    logging.debug('OWN')" + WAITING, head='import logging')
    place = tmp_path / ('sitecustomize.py' if where == 'environment' else 'own.py')
    place.write_text(LOGGING + (place.read_text() if place.exists() else ''))
    env = {**wechat.env(), 'PYTHONPATH': f'{tmp_path}{os.pathsep}{HERE}'}
    python = ('-c', RUNNING) if where == '-c' else ()
    with Program(tmp_path, env=env, script=script, python=python) as program:
        wechat.ready()
        wechat.ask('开始')
        program.wait_output('IN NN_TRAIN')
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(DEADLINE) == 130
    logged = (tmp_path / 'own.log').read_text() + program.output()
    assert 'OWN' in logged and 'GET /' not in logged
    for ticket in map(wechat.ticket, TICKETS):
        forms = ticket, urllib.parse.unquote(ticket), urllib.parse.quote(ticket, safe='')
        assert not any(form in logged for form in forms)


ASCII = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': 'gbk'}
RECALL = r"""
    print('nn_train：召回率')
    os.write(1, b'\xff\xfe no GBK\n')
    utils.lock_start()
    utils.chat_inf(wechat_name, 1, 1, 1, [0], 0.5, **{'召回率': 0.25, 'no UTF-8: \udcff': 1})
    net = gluon.nn.Dense(1, in_units=1)
    net.initialize()
    utils.save_checkpoint(net, gluon.Trainer(net.collect_params(), 'sgd', {}), 1, 0, 0)
    raise ValueError('错在这里 \udcff')
"""


def test_files_are_utf8_and_the_terminal_is_what_it_is(wechat, tmp_path):
    script = own_script(tmp_path, RECALL, head='from mxnet import gluon')
    with Program(tmp_path, env={**wechat.env(), **ASCII}, script=script) as program:
        wechat.ready()
        wechat.ask('开始')
        assert '召回率 0.25' in wechat.wait_text('第 1/2 轮')
        assert '错在这里' in wechat.wait_text('训练出错')
        assert '，1 轮，0.500，' in wechat.ask('记录')
        with open(script, 'w', encoding='gbk') as f:
            f.write("# coding: gbk\nraise SystemExit('这里写错了')")
        os.kill(trainer_of(program), signal.SIGKILL)
        assert '这里写错了' in wechat.wait_text('启动不了')
        with open(program.log, 'rb') as f:
            printed = f.read()
    for text in ('已登录', 'nn_train：召回率\n'):
        assert text.encode('gbk') in printed
    assert b'\xff\xfe no GBK\n' in printed
    [folder] = (tmp_path / 'runs').iterdir()
    assert ',no UTF-8: \\udcff,召回率\n' in (folder / 'log.csv').read_text(encoding='utf-8')
    assert [(run['number'], run['ending']) for run in remembered_runs(tmp_path)] == [(1, '出错')]
    assert utils.read_checkpoint(str(folder / 'last.zip'))['history'][0].numbers['召回率'] == 0.25


@pytest.mark.parametrize('encoding, terminal', [('gbk', True), ('iso-8859-1', False), ('utf-8', True)])
def test_the_code_can_be_scanned_whatever_the_encoding(wechat, tmp_path, encoding, terminal):
    """White on black where there are colours, else as characters that every encoding has."""
    wechat.phone = 'lies on the table'
    own, other = os.openpty()
    output, reader = [], None

    def read():
        with contextlib.suppress(OSError):
            while content := os.read(own, 65536):
                output.append(content)

    def preexec():
        for number in (1, 2) if terminal else ():
            os.dup2(other, number)

    env = {**wechat.env(), **ASCII, 'PYTHONIOENCODING': encoding}
    with Program(tmp_path, env=env, preexec_fn=preexec) as program:
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        words = '请用微信扫码'.encode(encoding, 'replace')

        def printed():
            with open(program.log, 'rb') as f:
                return b''.join(output) if terminal else f.read()

        wechat.wait(lambda: wechat.requests.count('login.weixin.qq.com/cgi-bin/mmwebwx-bin/login') > 1)
        deadline = time.monotonic() + DEADLINE
        while words not in printed():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        text = printed().split(words)[0].decode(encoding).replace('\r', '')
    os.close(other)
    code = segno.make('https://login.weixin.qq.com/l/' + wechat.uuid, error='l')
    wanted = [[bool(dark) for dark in row] for row in code.matrix_iter(border=4)]
    lines = [line for line in text.split('\n') if re.search('##|█|▀|\x1b\\[', line)]
    if encoding == 'utf-8':
        lines = [re.sub('\x1b\\[[0-9;]*m', '', line) for line in lines]
        halves = {'█': (0, 0), '▀': (0, 1), '▄': (1, 0), ' ': (1, 1)}
        seen = [[bool(halves[c][half]) for c in line] for line in lines for half in (0, 1)]
        seen = seen[: len(wanted)]
    elif terminal:
        seen = [[c == '40' for c in re.findall('\x1b\\[(40|47)m  \x1b\\[0m', line)] for line in lines]
    else:
        seen = [[line[i : i + 2] == '  ' for i in range(0, len(line), 2)] for line in lines]
    assert [row[: len(wanted)] for row in seen[-len(wanted) :]] == wanted


def test_what_is_said_is_printed_in_the_encoding_of_the_process_that_trains_first(wechat, tmp_path):
    script = own_script(tmp_path, WAITING, head="sys.stdout.reconfigure(encoding='utf-8')")
    with Program(tmp_path, env={**wechat.env(), **ASCII}, script=script, python=('-c', RUNNING)) as program:
        wechat.ready()
        program.wait_output('已登录')


NO_TMPDIR = "import tempfile\ntempfile.tempdir = '/no/where'  # as if it had no room\n"


@pytest.mark.skipif(not hasattr(os, 'memfd_create'), reason='two processes share a file')
@pytest.mark.parametrize('options', ['', '--workers 2'])
def test_nothing_needs_the_folder_for_temporary_files(images, tmp_path, options):
    for stop_at, typed, words in (
        ('15', 'bs 300\n开始\n', '第 2 轮到第 5/10 批'),
        ('0', '继续\n', '训练完成'),
    ):
        arguments = stop_at, '0', '--console', '--data', images, *options.split()
        with Program(tmp_path, *arguments, script=watched(tmp_path), before=NO_TMPDIR + QUICK) as program:
            status, output = program.types(typed)
        assert status == 0 and words in output
    assert not list(tmp_path.glob('**/*.new'))
