"""Pre-activation ResNet-18, in the two layouts that go by that name.

Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027.
"""

from collections import OrderedDict

import torch
from torch import nn

from micronet.models.resnet import conv2d, he_init, require_choice, require_positive


class _PreActBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, beside a shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, conv_bias: bool, project_activated: bool
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv2d(in_channels, out_channels, 3, stride, bias=conv_bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv2d(out_channels, out_channels, 3, bias=conv_bias)
        projects = stride != 1 or in_channels != out_channels
        self.shortcut: nn.Module = nn.Identity()
        if projects:
            self.shortcut = conv2d(in_channels, out_channels, 1, stride, bias=conv_bias)
        # An identity shortcut carries the raw input in both layouts.
        self.shortcut_takes_activated = projects and project_activated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return residual + self.shortcut(activated if self.shortcut_takes_activated else x)


def preact_resnet18(*, num_classes: int, in_channels: int = 3, layout: str = "kuangliu") -> nn.Module:
    """Pre-activation ResNet-18 for small pictures: 11,171,146 parameters at 10 classes.

    Takes float images `(N, in_channels, H, W)`, gives logits `(N, num_classes)`; made for H = W = 32, any size of at
    least 1 works. A 3x3 convolution; four groups of two blocks with 64, 128, 256 and 512 channels; global average
    pool; linear layer. Neither layout has the paper's BatchNorm and ReLU before the pool.

    Args:
        num_classes: how many classes; at least 1.
        in_channels: channels of the images: 3 for RGB, 1 for grey.
        layout: whose network. `"kuangliu"`: convolutions without bias, a bare first convolution, and 1x1 shortcuts
            that take the activated input. `"weiaicunzai"`: convolutions with bias, BatchNorm and ReLU after the first
            one, and 1x1 shortcuts that take the raw input; 11,222,244 parameters at 100 classes.

    Raises:
        ValueError: `layout` is another word, or a number is not a whole number of at least 1.

    Source: https://github.com/kuangliu/pytorch-cifar and https://github.com/weiaicunzai/pytorch-cifar100, the
    layouts only. Weights start as in `he_init`.
    """
    require_positive(num_classes=num_classes, in_channels=in_channels)
    require_choice("layout", layout, ("kuangliu", "weiaicunzai"))
    kuangliu = layout == "kuangliu"
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=conv2d(in_channels, 64, 3, bias=not kuangliu))
    if not kuangliu:
        layers["bn1"] = nn.BatchNorm2d(64)
        layers["relu1"] = nn.ReLU()
    channels = 64
    for group in range(4):
        out_channels = 64 * 2**group
        layers[f"layer{group + 1}"] = nn.Sequential(
            _PreActBlock(
                channels,
                out_channels,
                1 if group == 0 else 2,
                conv_bias=not kuangliu,
                project_activated=kuangliu,
            ),
            _PreActBlock(out_channels, out_channels, 1, conv_bias=not kuangliu, project_activated=kuangliu),
        )
        channels = out_channels
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    return he_init(nn.Sequential(layers))
