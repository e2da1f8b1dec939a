"""Networks made for counting; and networks computed number by number, each multiplication and addition counted."""

import itertools
import math

from torch import nn


class Run(nn.Module):
    """A module whose forward is a function of it and its inputs; its layers, parameters and other parts by name."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *xs):
        return self.run(self, *xs)


class Counted:
    """A number that counts the multiplications and additions it takes part in."""

    mults = adds = 0

    def __init__(self, value):
        self.value = float(value)

    def __mul__(self, other):
        Counted.mults += 1
        return Counted(self.value * other.value)

    def __add__(self, other):
        Counted.adds += 1
        return Counted(self.value + other.value)


def total(products, bias=None):
    result = next(products)
    for product in itertools.chain(products, [] if bias is None else [bias]):
        result = result + product
    return result


def convolved(x, conv):
    """Convolve nested lists of numbers by the definition, zeros around them taken for numbers."""
    (s, _), (p, _), (d, _), (k, _) = conv.stride, conv.padding, conv.dilation, conv.kernel_size
    per_group, out_per_group = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    size = (len(x[0]) + 2 * p - d * (k - 1) - 1) // s + 1
    weight = conv.weight.detach().tolist()

    def pixel(c, i, j):
        inside = 0 <= i < len(x[0]) and 0 <= j < len(x[0])
        return x[c][i][j] if inside else Counted(0)

    def at(o, i, j):
        first = o // out_per_group * per_group
        taps = itertools.product(range(per_group), range(k), range(k))
        products = (
            pixel(first + c, i * s + a * d - p, j * s + b * d - p) * Counted(weight[o][c][a][b]) for c, a, b in taps
        )
        return total(products, None if conv.bias is None else Counted(conv.bias.detach()[o]))

    return [[[at(o, i, j) for j in range(size)] for i in range(size)] for o in range(conv.out_channels)]


def function(mults, adds, apply):
    """A function of one number that costs so much."""

    def called(number):
        Counted.mults += mults
        Counted.adds += adds
        return Counted(apply(number.value))

    return called


relu = function(1, 0, lambda v: max(v, 0.0))
sigmoid = function(2, 1, lambda v: 1 / (1 + math.exp(-v)))


def pixels(x, function):
    """Apply a function to every number of nested lists (C, H, W)."""
    return [[[function(v) for v in row] for row in channel] for channel in x]


def paired(x, y, function):
    """Combine two nested lists (C, H, W) number by number."""
    return [
        [[function(a, b) for a, b in zip(r, s, strict=True)] for r, s in zip(c, d, strict=True)]
        for c, d in zip(x, y, strict=True)
    ]


def averaged(x, kernel, stride):
    """Average pooling of nested lists (C, H, W) without padding."""
    size = (len(x[0]) - kernel) // stride + 1

    def at(channel, i, j):
        window = (channel[i * stride + a][j * stride + b] for a in range(kernel) for b in range(kernel))
        summed = total(window)
        Counted.mults += 1
        return Counted(summed.value / kernel**2)

    return [[[at(channel, i, j) for j in range(size)] for i in range(size)] for channel in x]


def transformed(features, linear):
    """A linear layer on a list of numbers."""
    weight = linear.weight.detach().tolist()
    biases = [None] * len(weight) if linear.bias is None else [Counted(b) for b in linear.bias.tolist()]
    return [
        total((v * Counted(w) for v, w in zip(features, row, strict=True)), bias)
        for row, bias in zip(weight, biases, strict=True)
    ]
