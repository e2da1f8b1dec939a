"""DenseNet-121: each layer reads what all layers before it in its block wrote.

Each parameter has torchvision's name for it, so torchvision's DenseNet-121 state dict loads into
``densenet121(stem="imagenet")`` as it is.

Source: Huang et al. 2016, "Densely Connected Convolutional Networks", https://arxiv.org/abs/1608.06993.
"""

from collections import OrderedDict

import torch
from torch import nn

from micronet.models.resnet import conv2d, he_init, require_choice, require_positive

_LAYERS = (6, 12, 24, 16)  # of each dense block: the paper's table 1, DenseNet-121


class _DenseLayer(nn.Module):
    """A 1x1 convolution to `4 * growth` channels and a 3x3 one to `growth`, stacked behind the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv2d(in_channels, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = conv2d(4 * growth, growth, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat([x, new], dim=1)


def _dense_block(in_channels: int, growth: int, count: int) -> nn.Sequential:
    """`count` dense layers; the output has `in_channels + count * growth` channels."""
    return nn.Sequential(
        OrderedDict((f"denselayer{i + 1}", _DenseLayer(in_channels + i * growth, growth)) for i in range(count))
    )


def _transition(in_channels: int) -> nn.Sequential:
    """Half the channels (the paper's compression of 0.5), half the height and width."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(),
            conv=conv2d(in_channels, in_channels // 2, 1),
            pool=nn.AvgPool2d(2, stride=2),
        )
    )


def densenet121(*, num_classes: int, in_channels: int = 3, growth: int = 32, stem: str = "cifar") -> nn.Module:
    """DenseNet-121, for small pictures by default: 6,956,298 parameters at 10 classes.

    Takes float images `(N, in_channels, H, W)`, gives logits `(N, num_classes)`. H and W are at least 8, with the
    ImageNet stem at least 29.

    Args:
        num_classes: how many classes; at least 1.
        in_channels: channels of the images: 3 for RGB, 1 for grey.
        growth: channels that each layer adds; the stem makes twice as many. At least 1.
        stem: `"cifar"`, a bare 3x3 convolution, for pictures of about 32 pixels; `"imagenet"`, torchvision's 7x7
            convolution, BatchNorm, ReLU and max pool that halve the picture twice, for about 224: 6,964,106
            parameters at 10 classes.

    Raises:
        ValueError: a number is not a whole number of at least 1, or `stem` is another word.

    Source: Huang et al. 2016, table 1 (DenseNet-BC), https://arxiv.org/abs/1608.06993; the small stem is that of
    https://github.com/kuangliu/pytorch-cifar. Weights start as in `he_init`.
    """
    require_positive(num_classes=num_classes, in_channels=in_channels, growth=growth)
    require_choice("stem", stem, ("cifar", "imagenet"))
    channels = 2 * growth
    features: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        features["conv0"] = conv2d(in_channels, channels, 7, 2)
        features["norm0"] = nn.BatchNorm2d(channels)
        features["relu0"] = nn.ReLU()
        features["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
    else:
        features["conv0"] = conv2d(in_channels, channels, 3)
    for index, count in enumerate(_LAYERS, start=1):
        features[f"denseblock{index}"] = _dense_block(channels, growth, count)
        channels += count * growth
        if index < len(_LAYERS):
            features[f"transition{index}"] = _transition(channels)
            channels //= 2
    features["norm5"] = nn.BatchNorm2d(channels)
    network = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(features),
            relu=nn.ReLU(),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, num_classes),
        )
    )
    return he_init(network)
