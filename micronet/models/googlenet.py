"""GoogLeNet with BatchNorm for small pictures: nine modules of four parallel branches.

Source: Szegedy et al. 2014, "Going Deeper with Convolutions", https://arxiv.org/abs/1409.4842.
"""

from collections import OrderedDict

import torch
from torch import nn

from micronet.models.resnet import conv2d, he_init, require_positive

# The paper's table 1, one module a row: channels of the 1x1 branch; of the 3x3 branch, reduced and out; of the 5x5
# branch, reduced and out; of the pool branch.
_MODULES = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int, *, bias: bool) -> list[nn.Module]:
    """A convolution, its BatchNorm and its ReLU."""
    return [conv2d(in_channels, out_channels, kernel, bias=bias), nn.BatchNorm2d(out_channels), nn.ReLU()]


class _Inception(nn.Module):
    """Four branches over the same input, their channels stacked."""

    def __init__(
        self, in_channels: int, n1: int, n3_reduced: int, n3: int, n5_reduced: int, n5: int, n_pool: int
    ) -> None:
        super().__init__()
        self.branch1 = nn.Sequential(*_conv_bn_relu(in_channels, n1, 1, bias=True))
        self.branch3 = nn.Sequential(
            *_conv_bn_relu(in_channels, n3_reduced, 1, bias=True), *_conv_bn_relu(n3_reduced, n3, 3, bias=True)
        )
        # Two 3x3 filters see the 5x5 pixels of the paper's one.
        self.branch5 = nn.Sequential(
            *_conv_bn_relu(in_channels, n5_reduced, 1, bias=True),
            *_conv_bn_relu(n5_reduced, n5, 3, bias=True),
            *_conv_bn_relu(n5, n5, 3, bias=True),
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), *_conv_bn_relu(in_channels, n_pool, 1, bias=True)
        )
        self.out_channels = n1 + n3 + n5 + n_pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], dim=1)


def googlenet(*, num_classes: int, in_channels: int = 3, dropout: float = 0.4) -> nn.Module:
    """GoogLeNet with BatchNorm for small pictures: 6,402,564 parameters at 100 classes.

    Takes float images `(N, in_channels, H, W)`, gives logits `(N, num_classes)`; made for H = W = 32, any size of at
    least 1 works. Three 3x3 convolutions without bias (64, 64, 192 channels); nine inception modules, whose
    convolutions have a bias though a BatchNorm follows (as in the source, for its count); a 3x3 max pool of stride 2
    before modules 3a, 4a and 5a; global average pool, dropout, linear layer. There are no auxiliary classifiers.

    The source gives one BatchNorm of each module (the one between the two 3x3 filters of the third branch) an epsilon
    of 32 to 128: a slip, the channel count was passed twice. Not so here: every epsilon is torch's 1e-5.

    Args:
        num_classes: how many classes; at least 1.
        in_channels: channels of the images: 3 for RGB, 1 for grey.
        dropout: share of the 1,024 pooled features that training sets to zero; a fraction in [0, 1).

    Raises:
        ValueError: an argument is outside its range.

    Source: https://github.com/weiaicunzai/pytorch-cifar100, models/googlenet.py, the layout only. Weights start as in
    `he_init`.
    """
    require_positive(num_classes=num_classes, in_channels=in_channels)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a fraction in [0, 1), got {dropout!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(
            *_conv_bn_relu(in_channels, 64, 3, bias=False),
            *_conv_bn_relu(64, 64, 3, bias=False),
            *_conv_bn_relu(64, 192, 3, bias=False),
        )
    )
    channels = 192
    for name, sizes in _MODULES.items():
        if name.endswith("a"):
            layers[f"maxpool{name[-2]}"] = nn.MaxPool2d(3, stride=2, padding=1)
        module = _Inception(channels, *sizes)
        layers[name] = module
        channels = module.out_channels
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["dropout"] = nn.Dropout(dropout)
    layers["fc"] = nn.Linear(channels, num_classes)
    return he_init(nn.Sequential(layers))
