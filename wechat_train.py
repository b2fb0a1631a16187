"""Train the Gluon CNN on Fashion-MNIST, watched and steered from WeChat."""

import utils  # before MXNet and itchat: see its first sections and its last
from mxnet.gluon import nn
import itchat
from mxnet import autograd
from mxnet import gluon


def nn_train(wechat_name, params):
    """Train the network; params: learning_rate, training_iters, batch_size; wechat_name started it."""
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
    utils.speed_up(net, softmax_cross_entropy)
    ctx = utils.try_gpu()
    net.initialize(ctx=ctx)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': learning_rate}, utils.store())
    epoch, train_loss, train_acc = utils.load_checkpoint(net, trainer)  # 1, 0, 0 unless this is 继续
    while utils.lock_start() and epoch <= utils.params()[1]:  # `ti 8` moves the end
        for data, label in train_data:  # with a bar on the terminal; ends at 停止
            trainer.set_learning_rate(utils.params()[0])  # `lr 0.05` counts from the next batch on
            label = label.as_in_context(ctx)
            with autograd.record():
                output = net(data.as_in_context(ctx))
                loss = softmax_cross_entropy(output, label)
            loss.backward()
            trainer.step(utils.total(data.shape[0]))  # of all --workers
            train_acc += utils.accuracy(output, label)
            train_loss += utils.batch_loss(loss)
        test_acc = utils.evaluate_accuracy(test_data, net, ctx)
        utils.chat_inf(wechat_name, epoch, train_loss, train_acc, train_data, test_acc)
        epoch, train_loss, train_acc = utils.save_checkpoint(net, trainer, epoch, train_loss, train_acc)
    utils.lock_end(wechat_name)


if __name__ == '__main__':
    utils.chat_supervisor(nn_train)
    itchat.auto_login(hotReload=True)
    itchat.run()
