"""A small network of depthwise-separable convolutions, and its plain and grouped counterparts.

Source: Howard et al. 2017, "MobileNets", https://arxiv.org/abs/1704.04861, for the separable convolution; for the
layout the student of a course's Food-11 distillation study, whose printed count of 265,227 parameters it gives.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from micronet.models.resnet import he_init, require_choice, require_positive


def _conv_bn_relu6(in_channels: int, out_channels: int, *, groups: int = 1) -> list[tuple[str, nn.Module]]:
    """A 3x3 convolution with bias, BatchNorm, ReLU6, by name."""
    return [
        ("conv", nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups)),
        ("bn", nn.BatchNorm2d(out_channels)),
        ("relu", nn.ReLU6()),
    ]


def _scaled_widths(widths: Sequence[int], multiplier: float, groups: int | None) -> list[int]:
    """The channels of each layer: `widths` times `multiplier`, as multiples of `groups` where given."""
    if not widths:
        raise ValueError(f"widths must name at least one layer, got {widths!r}")
    for index, width in enumerate(widths):
        require_positive(**{f"widths[{index}]": width})
    if not multiplier > 0:
        raise ValueError(f"width_multiplier must be a number above 0, got {multiplier!r}")
    unit = groups or 1
    if any(width % unit for width in widths):
        raise ValueError(f"groups must divide every one of widths {tuple(widths)}, got {groups}")
    scaled = [max(unit, round(width * multiplier / unit) * unit) for width in widths]
    if groups is not None and groups in scaled[:-1]:
        raise ValueError(
            "groups must be smaller than every layer's input channels (equal would be a depthwise convolution), "
            f"which are {tuple(scaled[:-1])} at width_multiplier {multiplier}, got {groups}"
        )
    return scaled


def separable_net(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64, 128, 256, 256, 256, 256),
    width_multiplier: float = 1.0,
    conv: str = "separable",
    groups: int | None = None,
    pool: int = 2,
) -> nn.Module:
    """Eight-layer network of separable convolutions: 265,227 parameters at 11 classes.

    Takes float images `(N, in_channels, H, W)`, gives logits `(N, num_classes)`; H and W are at least 16.

    Layer 1 is a plain 3x3 convolution, BatchNorm, ReLU6. Each of layers 2 to 8 is a depthwise 3x3 convolution (same
    channels), BatchNorm, ReLU6, pointwise 1x1 convolution; neither BatchNorm nor activation follows the pointwise
    one. Every convolution has a bias, stride 1 and keeps the size. A 2x2 max pool closes each of the first four
    layers. Then adaptive average pooling to `pool` x `pool`, and one linear layer on the `pool * pool * widths[-1]`
    features. Pooled to 1x1 it has 256,779 parameters at 11 classes.

    Args:
        num_classes: how many classes; at least 1.
        in_channels: channels of the images: 3 for RGB, 1 for grey.
        widths: output channels of each layer, first to last; their number is the number of layers.
        width_multiplier: sets the size: factor on all of `widths`, above 0; each product is rounded to the nearest
            multiple of `groups` (of 1 without `groups`), at least one of it.
        conv: what layers 2 to 8 are. `"separable"`: as above. `"plain"`: a 3x3 convolution, BatchNorm, ReLU6, in place
            of all four. `"grouped"`: as plain, in `groups` groups of channels.
        groups: for `conv="grouped"` only: at least 2, a divisor of every one of `widths`, below every layer's input
            channels (1 would be plain, as many as channels depthwise). Layer 1 is never grouped.
        pool: rows and columns that are left for the linear layer; at least 1.

    Raises:
        ValueError: an argument is outside its range, or `groups` does not fit `conv` or the widths.

    Source: the Food-11 study named above, for the layout. Weights start as in `he_init`.
    """
    require_positive(num_classes=num_classes, in_channels=in_channels, pool=pool)
    require_choice("conv", conv, ("separable", "plain", "grouped"))
    if conv != "grouped" and groups is not None:
        raise ValueError(f'groups must be left out unless conv is "grouped", got {groups!r} with conv={conv!r}')
    if conv == "grouped" and (not isinstance(groups, int) or groups < 2):
        raise ValueError(f'groups must be a whole number of at least 2 with conv="grouped", got {groups!r}')
    channels = _scaled_widths(widths, width_multiplier, groups)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, out_channels in enumerate(channels):
        before = channels[index - 1]
        if index == 0:
            parts = _conv_bn_relu6(in_channels, out_channels)
        elif conv == "separable":
            parts = _conv_bn_relu6(before, before, groups=before)
            parts.append(("pointwise", nn.Conv2d(before, out_channels, 1)))
        else:
            parts = _conv_bn_relu6(before, out_channels, groups=groups or 1)
        if index < 4:
            parts.append(("maxpool", nn.MaxPool2d(2)))
        layers[f"layer{index + 1}"] = nn.Sequential(OrderedDict(parts))
    layers["avgpool"] = nn.AdaptiveAvgPool2d(pool)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels[-1] * pool * pool, num_classes)
    return he_init(nn.Sequential(layers))
