"""The fastai entry's score for the MicroNet Challenge (2019), and the torchstat formulas that it was counted with."""

from collections.abc import Sequence

from callbacks.ledger import Line

# The MicroNet Challenge's normalisers for CIFAR-100: what WideResNet-28-10 has at 32 bits.
# Source: https://micronet-challenge.github.io/scoring_and_submission.html
CIFAR100_PARAMS, CIFAR100_OPS = 36.5e6, 10.49e9
# The fastai entry halved multiplications, as the challenge's 16-bit "freebie" allows, and left additions at 32 bits.
SEED_MULT_WEIGHT, SEED_ADD_WEIGHT = 0.5, 1.0


def seed_cost(line: Line) -> tuple[int, int]:
    """Count the multiplications and additions of one line as the fastai entry to the MicroNet Challenge did.

    Its counter was torchstat's, changed to give the two apart. Convolutions, linear layers and global average pools
    count, nothing else; what is folded into a convolution does not, its own bias does, a linear layer's bias does not.
    A global average pool of `(C, H, W)` is C multiplications and H*W*C additions, one more per channel than there are.
    """
    if line.op == "global_avg_pool":
        return line.outputs, line.taps * line.outputs
    if line.op in ("conv2d", "conv_transpose2d", "linear"):
        return torchstat_cost(line)
    return 0, 0


def torchstat_cost(line: Line) -> tuple[int, int]:
    """Count one line by torchstat's formulas, multiplications and additions apart.

    Source: torchstat 0.0.7, compute_madd.py, written anew.
    """
    n = line.outputs
    if line.op in ("conv2d", "conv_transpose2d"):
        # Both by positions: a transposed one's are its inputs', where its bias does not belong.
        positions = line.macs // line.taps
        return line.macs, (line.taps - 1 + line.own_bias) * positions
    if line.op in ("linear", "bilinear"):
        return line.taps * n, (line.taps - 1) * n  # without the bias
    if line.op == "batch_norm":
        return 2 * n, 2 * n  # subtract the mean, divide by the deviation, scale, shift
    if line.op in ("relu", "relu6"):
        return n, 0
    if line.op == "softmax":
        return 2 * n, n - 1  # one sum over all elements, however many rows there are
    if line.op == "max_pool":
        return line.comparisons, 0
    if line.op in ("avg_pool", "global_avg_pool"):
        return n, (line.taps - 1) * n
    return 0, 0


def seed_score(params: int, lines: Sequence[Line]) -> float:
    """Score a network as the fastai entry did: `params / 36.5e6 + (mults / 2 + adds) / 10.49e9`.

    Args:
        params: Count of all parameters.
        lines: What `count_ops` gives.
    """
    mults, adds = (sum(counts) for counts in zip((0, 0), *map(seed_cost, lines), strict=True))
    return params / CIFAR100_PARAMS + (SEED_MULT_WEIGHT * mults + SEED_ADD_WEIGHT * adds) / CIFAR100_OPS
