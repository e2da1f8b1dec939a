"""Wide residual networks: few layers, many channels; the network of fastai's MicroNet Challenge entry.

Source: Zagoruyko and Komodakis 2016, "Wide Residual Networks", https://arxiv.org/abs/1605.07146.
"""

from collections import OrderedDict

import torch
from torch import nn

from micronet.models.resnet import conv2d, require_positive


class _Block(nn.Module):
    """BatchNorm and ReLU first, then two 3x3 convolutions; the shortcut starts behind that first ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv2d(in_channels, out_channels, 1, stride)
        self.conv1 = conv2d(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = conv2d(out_channels, out_channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.relu1(self.bn1(x))
        shortcut = self.shortcut(activated)
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        # Multiplying by 1.0 would still be an operation of the exported graph, and be counted.
        if self.residual_scale != 1.0:
            residual = residual * self.residual_scale
        return residual + shortcut


def wide_resnet(
    *, num_classes: int, in_channels: int = 3, depth: int = 22, width: int = 6, residual_scale: float = 0.2
) -> nn.Module:
    """Wide ResNet as fastai has it: WRN-22-6 by default, 9,693,108 parameters at 100 classes.

    Takes float images `(N, in_channels, H, W)`, gives logits `(N, num_classes)`; made for H = W = 32, any size of at
    least 1 works. `depth=28, width=10, residual_scale=1.0` is the size of the challenge's baseline: 36,536,884
    parameters at 100 classes.

    A 3x3 convolution to 16 channels; three groups of `(depth - 4) / 6` blocks with 16, 32 and 64 times `width`
    channels, the second and third starting with stride 2; BatchNorm, ReLU, global average pool, linear layer. A block
    is BatchNorm, ReLU, 3x3 convolution, BatchNorm, ReLU, 3x3 convolution, times `residual_scale`. As in fastai, every
    shortcut carries the activated input: a 1x1 convolution of it where the shape changes, else itself. (The paper's
    identity shortcut carries the block's raw input; counts and cost are the same.)

    Args:
        num_classes: how many classes; at least 1.
        in_channels: channels of the images: 3 for RGB, 1 for grey.
        depth: number of convolutions, shortcuts left out, plus three; 6n + 4 with n of at least 1: 10, 16, 22, 28...
        width: factor on the channels; at least 1.
        residual_scale: factor on the residual branch, above 0; exactly 1.0 adds no multiplication to the graph.

    Raises:
        ValueError: an argument is outside its range.

    Source: fastai 1.0.58, fastai/vision/models/wrn.py, with `num_groups=3, N=3, k=6`: the layout, the factor 0.2 and
    the weights' start (normal, variance 2 / fan_in). He et al. 2015, eq. 10, https://arxiv.org/abs/1502.01852.
    """
    require_positive(num_classes=num_classes, in_channels=in_channels, depth=depth, width=width)
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6n + 4 with n of at least 1 (10, 16, 22, 28, ...), got {depth}")
    if not residual_scale > 0:
        raise ValueError(f"residual_scale must be a number above 0, got {residual_scale!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=conv2d(in_channels, 16, 3))
    channels = 16
    for group in range(3):
        out_channels = 16 * 2**group * width
        blocks = [_Block(channels, out_channels, 1 if group == 0 else 2, residual_scale)]
        blocks += [_Block(out_channels, out_channels, 1, residual_scale) for _ in range((depth - 4) // 6 - 1)]
        layers[f"group{group + 1}"] = nn.Sequential(*blocks)
        channels = out_channels
    layers["bn"] = nn.BatchNorm2d(channels)
    layers["relu"] = nn.ReLU()
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network
