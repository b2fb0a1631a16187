# -*- coding: utf-8 -*-
"""Train the Gluon CNN on Fashion-MNIST, watched and steered from WeChat."""
import argparse
import sys

if not (3, 9) <= sys.version_info[:2] <= (3, 12):
    sys.exit('需要 Python 3.9 到 3.12（MXNet 1.9.1 只支持这些版本），现在是 %d.%d。' % sys.version_info[:2])

import utils
from utils import itchat


def nn_train(wechat_name, params):
    """Train the network with params = (learning_rate, training_iters, batch_size), reporting to wechat_name."""
    from mxnet import autograd, gluon  # here, because it takes longer than showing the QR code
    from mxnet.gluon import nn
    learning_rate, training_iters, batch_size = params
    train_data, test_data = utils.load_data_fashion_mnist(batch_size)
    softmax_cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    net = nn.HybridSequential()
    with net.name_scope():
        net.add(nn.Conv2D(channels=20, kernel_size=5, activation='relu'))
        net.add(nn.MaxPool2D(pool_size=2, strides=2))
        net.add(nn.Conv2D(channels=50, kernel_size=3, activation='relu'))
        net.add(nn.MaxPool2D(pool_size=2, strides=2))
        net.add(nn.Flatten())
        net.add(nn.Dense(128, activation='relu'))
        net.add(nn.Dense(10))
    utils.speed_up(net)
    ctx = utils.try_gpu()
    net.initialize(ctx=ctx)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': learning_rate})
    epoch, train_loss, train_acc = utils.load_checkpoint(net, trainer)  # 1, 0, 0 unless this is 继续
    while utils.lock_start() and epoch <= training_iters:
        for data, label in utils.progress(train_data, epoch):  # a bar on the terminal; ends at 停止
            trainer.set_learning_rate(utils.params()[0])       # `lr 0.05` counts from the next batch on
            label = label.as_in_context(ctx)
            with autograd.record():
                output = net(data.as_in_context(ctx))
                loss = softmax_cross_entropy(output, label)
            loss.backward()
            trainer.step(data.shape[0])
            train_acc += utils.accuracy(output, label)
            train_loss += utils.batch_loss(loss)
        if utils.lock_start():  # not in the middle of the epoch
            test_acc = utils.evaluate_accuracy(test_data, net, ctx)
            utils.chat_inf(wechat_name, epoch, train_loss, train_acc, train_data, test_acc)
            epoch, train_loss, train_acc = epoch + 1, 0, 0
        utils.save_checkpoint(net, trainer, epoch, train_loss, train_acc)
        training_iters = utils.params()[1]                     # `ti 8` moves the end
    utils.lock_end(wechat_name)


def parse_args():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description='训练 Fashion-MNIST 上的卷积网络，在微信里查看和控制：扫码登录后，好友发“帮助”就能看到全部命令。')
    parser.add_argument('--console', action='store_true', help='不用微信，在终端里输入同样的命令')
    parser.add_argument('--data', metavar='DIR', help='Fashion-MNIST 的四个 IDX 文件所在的文件夹（默认自动下载）')
    parser.add_argument('--demo', action='store_true', help='--console，并用程序自己画的小图：不需要微信，也不需要网络')
    parser.add_argument('--filehelper', action='store_true',
                        help='从文件传输助手登录：什么账号都可以，在自己手机的“文件传输助手”里发命令')
    parser.add_argument('--seed', type=int, default=0, help='随机种子：种子相同，训练的结果就相同（默认 0）')
    parser.add_argument('--supervisor', metavar='NAME', action='append', default=[],
                        help='谁可以下命令：好友的备注名或昵称，可以写多次（默认是第一个发来命令的好友）；机主总可以')
    parser.add_argument('--then', metavar='CMD', help='训练自己结束后（不是被停止，也没出错）过一分钟执行的命令，如 shutdown')
    args = parser.parse_args()
    if args.data:
        try:
            utils.find_files(args.data)
        except OSError as error:
            parser.error('--data：%s' % error)
    return args


if __name__ == '__main__':
    args = parse_args()
    utils.seed, utils.supervisors, utils.then_command = args.seed, args.supervisor, args.then
    utils.filehelper, utils.data_dir = args.filehelper, utils.DEMO if args.demo else args.data
    if args.console or args.demo:
        itchat = utils.chat = utils.Console()
    utils.chat_supervisor(nn_train)
    while utils.chat_goes_on():  # a session may end; the program does not
        with utils.session():
            itchat.auto_login(hotReload=True, **utils.LOGIN)
            itchat.run()
    sys.exit(utils.chat_end())
