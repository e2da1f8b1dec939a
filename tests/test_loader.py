"""The loader is a fastai DataLoader: validate, get_preds, show_batch and lr_find work on it."""

import fastai.callback.schedule  # noqa: F401 - gives Learner its lr_find
import matplotlib as mpl
import pytest
import torch
from fastai.learner import Learner
from torch import nn

from micronet.data import Augment, Data, cifar10, digits, loaders, plain_loader
from micronet.optim import CrossEntropy, metrics, sgd

mpl.use("Agg")


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(batch_size=32, augment=Augment(crop=2, flip=0.5))


def learner(data: Data, tmp_path) -> Learner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))
    return Learner(
        loaders(data), net, CrossEntropy(), sgd(), lr=0.05, metrics=metrics(), path=tmp_path, wd_bn_bias=True
    )


def test_batches_are_normalised_channels_last_float(data):
    xb, yb = loaders(data).train.one_batch()
    assert xb.shape == (32, 3, 32, 32)
    assert xb.dtype == torch.float32
    assert xb.is_contiguous(memory_format=torch.channels_last)
    assert yb.dtype == torch.int64
    whole = torch.cat([xb for xb, _ in plain_loader(data.train, data)])
    assert whole.mean().abs() < 0.05
    assert whole.std() == pytest.approx(1, abs=0.05)


def test_plain_batches_are_the_images_themselves(data):
    images = torch.cat([xb for xb, _ in plain_loader(data.valid, data)])
    mean, std = torch.tensor(data.mean).view(1, 3, 1, 1), torch.tensor(data.std).view(1, 3, 1, 1)
    torch.testing.assert_close(images, (data.valid.images.float() / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_every_image_comes_once_a_pass_and_the_order_changes(data):
    loader = loaders(data).train.new(shuffle=True, drop_last=False)
    first, second = (torch.cat([yb for _, yb in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    for labels in (first, second):
        assert torch.equal(labels.sort().values, data.train.labels.sort().values)


def test_a_pass_depends_on_seed_and_epoch_alone(data):
    one, two = loaders(data, seed=1).train, loaders(data, seed=1).train
    passes = [list(one) for _ in range(3)]
    two.epoch = 2
    for (xa, ya), (xb, yb) in zip(passes[2], two, strict=True):
        assert torch.equal(xa, xb)
        assert torch.equal(ya, yb)
    assert not torch.equal(passes[0][0][0], loaders(data, seed=2).train.one_batch()[0])


def test_seeds_give_orders_of_their_own(data):
    orders = {tuple(loaders(data, seed=seed).train.get_idxs()) for seed in [*range(32), *range(0, 64_000, 1000)]}
    assert len(orders) == 32 + 63


def test_zero_padding_shows_black_at_a_shifted_border():
    shown = digits(batch_size=64, augment=Augment(crop=4, pad="zeros"))
    bright = Data(**{**vars(shown), "train": type(shown.train)(shown.train.images | 255, shown.train.labels)})
    xb, _ = loaders(bright).train.one_batch()
    black = (0 - shown.mean[0]) / shown.std[0]
    borders = (xb[:, 0, :, 0] - black).abs().amax(1) < 1e-4
    assert 0.2 < borders.float().mean() < 0.7  # 4 of 9 shifts bring padding to the left border


def test_fastai_validates_and_predicts_through_it(data, tmp_path):
    learn = learner(data, tmp_path)
    with learn.no_logging(), learn.no_mbar():
        learn.fit(2)
        loss, top1, top5 = learn.validate()
        probabilities, labels = learn.get_preds()
        trained, train_labels = learn.get_preds(ds_idx=0)
    assert torch.equal(labels, data.valid.labels)
    assert top1 == pytest.approx((probabilities.argmax(1) == labels).float().mean().item())
    assert top5 >= top1
    assert loss == pytest.approx(nn.functional.nll_loss(probabilities.log(), labels).item(), rel=1e-4)
    assert len(trained) == len(data.train)
    # Without augmentation, in the set's own order: the network's answers on the images themselves.
    plain = torch.cat([learn.model(xb).softmax(1) for xb, _ in plain_loader(data.train, data)]).detach()
    torch.testing.assert_close(trained, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(train_labels, data.train.labels)


def test_lr_find_suggests_and_leaves_the_network_alone(data, tmp_path):
    learn = learner(data, tmp_path)
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with learn.no_mbar():
        found = learn.lr_find(num_it=40, show_plot=False)
    assert 1e-7 < found.valley < 10
    assert all(torch.equal(before[name], value) for name, value in learn.model.state_dict().items())


def test_show_batch_draws_as_many_images_as_asked(data):
    figure = loaders(data).train.show_batch(max_n=6, show=False)
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 6
    assert all(ax.get_title() in data.classes for ax in drawn)
    assert drawn[0].images[0].get_array().shape == (32, 32, 3)


def test_the_set_is_moved_to_the_device_once(data):
    loader = loaders(
        data, device="cpu:0"
    ).train  # a tensor that goes there says "cpu", as one sent to "cuda" says "cuda:0"
    loader.one_batch()
    store = loader._pixels()
    loader.one_batch()
    assert loader._pixels() is store


def test_new_switches_augmentation_off_and_keeps_statistics(data):
    plain = loaders(data).train.new(shuffle=False)
    assert plain.augment is None
    assert (plain.mean, plain.std, plain.classes) == (data.mean, data.std, data.classes)


def test_reflection_wider_than_the_image_is_refused():
    data = digits(augment=Augment(crop=32))
    with pytest.raises(ValueError, match="crop must be smaller"):
        loaders(data)


def test_real_cifar_batches(real):
    data = real(cifar10, batch_size=64, augment=Augment(crop=4, flip=0.5))
    xb, yb = loaders(data).train.one_batch()
    assert xb.shape == (64, 3, 32, 32)
    assert len(yb.unique()) > 5
