"""A depthwise and a pointwise convolution, started from the weights of the k x k convolution that they replace.

What: `separable_layers` makes them, `split_by_channel` gives their weights: for each input channel one spatial kernel,
and what each output takes of it.
When: on a trained network, followed by a training; saves most of a k x k convolution's weights, and its accuracy falls
more than by `low_rank.py`'s factors. `micronet.edits.separable` does it.
Cost: a small decomposition for each input channel.
Interactions: masks of the layer are gone: sparsify afterwards. A BatchNorm behind the layer stays behind the pointwise
convolution.
Source: Howard et al. 2017, "MobileNets", https://arxiv.org/abs/1704.04861, for the layers; the best rank-one
approximation of each channel's `(K, k k)` matrix is the first term of its decomposition (Eckart and Young 1936).
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


def separable_layers(layer: nn.Conv2d) -> nn.Sequential:
    """Make the two layers, their weights not set: stride, padding and dilation are the first's, the bias the second's.

    Args:
        layer: a convolution, of which only shapes and arguments are read.
    """
    own = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    depthwise = skip_init(
        nn.Conv2d, layer.in_channels, layer.in_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
        dilation=layer.dilation, groups=layer.in_channels, padding_mode=layer.padding_mode, bias=False, **own,
    )  # fmt: skip
    pointwise = skip_init(nn.Conv2d, layer.in_channels, layer.out_channels, 1, bias=layer.bias is not None, **own)
    for parameter in (*depthwise.parameters(), *pointwise.parameters()):
        parameter.requires_grad_(layer.weight.requires_grad)
    return nn.Sequential(depthwise, pointwise).train(layer.training)


def split_by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the two layers.

    Args:
        weight: **shape** `(K, C, kh, kw)`.

    Returns:
        `(C, 1, kh, kw)` and `(K, C, 1, 1)`, in float64, on the CPU.
    """
    k, c, kh, kw = weight.shape
    matrices = weight.detach().double().cpu().permute(1, 0, 2, 3).reshape(c, k, kh * kw)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :1].sqrt()  # half of the scale to each
    return (v[:, 0] * root).reshape(c, 1, kh, kw), (u[:, :, 0] * root).T.reshape(k, c, 1, 1)
