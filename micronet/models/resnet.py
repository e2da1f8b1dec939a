"""Residual networks: ResNet-20 to 110 in their CIFAR form, ResNet-18 and 34 with a small or an ImageNet stem.

The parts that the other families share live here too: `conv2d`, `he_init` and the checks of arguments.

Each parameter has torchvision's name for it, so the state dict of torchvision's ResNet-18 or 34 loads into
``resnet18`` or ``resnet34(stem="imagenet")`` as it is.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn


def require_positive(**arguments: int) -> None:
    """Stop unless each keyword argument is a whole number of at least 1.

    Args:
        **arguments: the values to check, by the names that the message shall use.

    Raises:
        ValueError: naming the first argument that is not such a number.
    """
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def require_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Stop unless `value` is one of the allowed words.

    Args:
        name: the argument's name, for the message.
        value: what came.
        allowed: the words that are allowed.

    Raises:
        ValueError: naming the argument, the allowed words and what came.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def conv2d(in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """Make a convolution that keeps the picture's size at stride 1.

    Args:
        in_channels: channels of the input `(N, C, H, W)`.
        out_channels: channels of the output.
        kernel: height and width of the filter in pixels; odd.
        stride: step in pixels; the output has `ceil(H / stride)` rows.
        bias: add a bias; off where a BatchNorm follows.
    """
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)


def he_init(network: nn.Module) -> nn.Module:
    """Draw new weights for every convolution of a network, and hand the network back.

    Convolution weights are normal with variance 2 / fan_out and their biases 0. BatchNorm (scale 1, shift 0) and
    linear layers keep torch's own start.

    Args:
        network: changed in place.

    Source: He et al. 2015, "Delving Deep into Rectifiers", eq. 15, https://arxiv.org/abs/1502.01852; fan_out, as
    torchvision's ResNet and MobileNetV2 use it.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv2d(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv2d(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv2d(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.downsample(x))


def _resnet(
    blocks: Sequence[int], width: int, *, num_classes: int, in_channels: int, stem: str = "cifar"
) -> nn.Sequential:
    """Stem, one group of blocks per entry of `blocks` (each doubles the channels), pool, linear layer."""
    require_positive(width=width, num_classes=num_classes, in_channels=in_channels)
    require_choice("stem", stem, ("cifar", "imagenet"))
    imagenet = stem == "imagenet"
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = conv2d(in_channels, width, 7, 2) if imagenet else conv2d(in_channels, width, 3)
    layers["bn1"] = nn.BatchNorm2d(width)
    layers["relu"] = nn.ReLU()
    if imagenet:
        layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
    channels = width
    for group, count in enumerate(blocks):
        out_channels = width * 2**group
        first = _BasicBlock(channels, out_channels, stride=1 if group == 0 else 2)
        rest = [_BasicBlock(out_channels, out_channels, stride=1) for _ in range(count - 1)]
        layers[f"layer{group + 1}"] = nn.Sequential(first, *rest)
        channels = out_channels
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    network = nn.Sequential(layers)
    he_init(network)
    return network


def _cifar_resnet(depth: int, *, num_classes: int, in_channels: int) -> nn.Sequential:
    """The paper's section 4.2: 6n + 2 layers, three groups of 16, 32 and 64 channels."""
    return _resnet(((depth - 2) // 6,) * 3, 16, num_classes=num_classes, in_channels=in_channels)


def resnet20(*, num_classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-20 for small pictures: 272,474 parameters at 10 classes, 3 blocks in each of 3 groups.

    Takes float images `(N, in_channels, H, W)`, gives logits `(N, num_classes)`; made for H = W = 32, any size of at
    least 1 works. Where the shape changes, the shortcut is a 1x1 convolution with BatchNorm (the paper's option B;
    its CIFAR nets used option A, zero padding, which has 2,752 parameters fewer).

    Args:
        num_classes: how many classes; at least 1.
        in_channels: channels of the images: 3 for RGB, 1 for grey.

    Raises:
        ValueError: `num_classes` or `in_channels` is not a whole number of at least 1.

    Source: He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385.
    """
    return _cifar_resnet(20, num_classes=num_classes, in_channels=in_channels)


def resnet32(*, num_classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-32 for small pictures: `resnet20` with 5 blocks a group; 466,906 parameters at 10 classes."""
    return _cifar_resnet(32, num_classes=num_classes, in_channels=in_channels)


def resnet44(*, num_classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-44 for small pictures: `resnet20` with 7 blocks a group; 661,338 parameters at 10 classes."""
    return _cifar_resnet(44, num_classes=num_classes, in_channels=in_channels)


def resnet56(*, num_classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-56 for small pictures: `resnet20` with 9 blocks a group; 855,770 parameters at 10 classes."""
    return _cifar_resnet(56, num_classes=num_classes, in_channels=in_channels)


def resnet110(*, num_classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-110 for small pictures: `resnet20` with 18 blocks a group; 1,730,714 parameters at 10 classes."""
    return _cifar_resnet(110, num_classes=num_classes, in_channels=in_channels)


def resnet18(*, num_classes: int, in_channels: int = 3, width: int = 64, stem: str = "cifar") -> nn.Module:
    """ResNet-18, for small pictures by default: 11,173,962 parameters at 10 classes, 2 blocks in each of 4 groups.

    Takes float images `(N, in_channels, H, W)`, gives logits `(N, num_classes)`; any H and W of at least 1 work.

    Args:
        num_classes: how many classes; at least 1.
        in_channels: channels of the images: 3 for RGB, 1 for grey.
        width: channels of the first group; the groups have `width` times 1, 2, 4 and 8. Halving it leaves about a
            quarter of the parameters. At least 1.
        stem: `"cifar"`, a 3x3 convolution, for pictures of about 32 pixels; `"imagenet"`, a 7x7 convolution and a max
            pool that halve the picture twice, for about 224.

    Raises:
        ValueError: a number is not a whole number of at least 1, or `stem` is another word.

    Source: He et al. 2015, table 1, https://arxiv.org/abs/1512.03385; the small stem is that of
    https://github.com/kuangliu/pytorch-cifar.
    """
    return _resnet((2, 2, 2, 2), width, num_classes=num_classes, in_channels=in_channels, stem=stem)


def resnet34(*, num_classes: int, in_channels: int = 3, width: int = 64, stem: str = "cifar") -> nn.Module:
    """ResNet-34: `resnet18` with groups of 3, 4, 6 and 3 blocks; 21,282,122 parameters at 10 classes.

    With `stem="imagenet"` it is torchvision's ResNet-34, of 21,289,802 parameters at 10 classes.

    Args:
        num_classes: as for `resnet18`.
        in_channels: as for `resnet18`.
        width: as for `resnet18`.
        stem: as for `resnet18`.

    Raises:
        ValueError: as for `resnet18`.

    Source: He et al. 2015, table 1, https://arxiv.org/abs/1512.03385.
    """
    return _resnet((3, 4, 6, 3), width, num_classes=num_classes, in_channels=in_channels, stem=stem)
