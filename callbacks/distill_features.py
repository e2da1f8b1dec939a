"""What `Distill` compares inside of two networks: attention maps and hints, between named layers.

What: `AttentionTransfer` has the student look where the teacher looks; `Hints` has a layer of the student tell, through
a learned 1x1 convolution, what a layer of the teacher tells. `Distill(features=(...))` takes any number of them.
When: where the student's answers alone learn too slowly, or the two networks have stages that correspond.
Cost: `AttentionTransfer` next to nothing; `Hints` a 1x1 convolution a pair and step, which no file keeps.
Interactions: layers are named as `model.named_modules()` names them and may differ in width and in height and width of
their maps: the larger map is averaged down to the smaller one. Of a layer that runs several times, the last run counts.
Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention"; Romero et al. 2015, "FitNets: Hints for Thin
Deep Nets".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from callbacks.widths import for_each_weight, kept_of, take

MAKERS = (_ConvNd, nn.Linear, _NormBase, nn.GroupNorm)  # whose outputs are the rows of their tensors
Key = tuple[str, str, int]  # the student's layer, the teacher's, the teacher's number
Pairs = Mapping[str, str] | Sequence[tuple[str, str]]


def attention_map(features: Tensor) -> Tensor:
    """Where a layer is active: the mean square over the channels, `(N, C, H, W)` to `(N, H, W)`.

    Source: Zagoruyko and Komodakis 2017, section 3.1, F_sum^2 (a mean instead of the sum: lengths are divided out).
    """
    return features.square().mean(1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two attention maps, each divided by its length over all places.

    Args:
        student: `(N, C, H, W)`.
        teacher: `(N, C', H', W')`; the larger of the two maps is averaged down to the smaller one.

    Source: Zagoruyko and Komodakis 2017, equation 2 with p = 2, over the number of images and places.
    """
    maps = _same_size(attention_map(student)[:, None], attention_map(teacher)[:, None])
    ours, theirs = (F.normalize(m.flatten(1), dim=1) for m in maps)
    return (ours - theirs).square().mean()


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two layers' outputs.

    Args:
        student: `(N, C, H, W)`, after the adapter.
        teacher: `(N, C, H', W')`; the larger of the two maps is averaged down to the smaller one.

    Source: Romero et al. 2015, equation 3, over the number of elements.
    """
    return F.mse_loss(*_same_size(student, teacher))


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    size = tuple(min(sides) for sides in zip(a.shape[2:], b.shape[2:], strict=True))
    return tuple(m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in (a, b))


@dataclass(frozen=True)
class Feature:
    """A loss between layers of the student and of the teacher.

    Args:
        pairs: which layers: `{student's: teacher's}`, or (student's, teacher's) several times.
        weight: factor of the loss, above 0; the pairs' losses are added up.

    Raises:
        ValueError: there is no pair, or the weight is not above 0.
    """

    pairs: Pairs
    weight: float = 1.0
    adapted: ClassVar[bool] = False  # whether a learned convolution gives the student's layer the teacher's width

    def __post_init__(self) -> None:
        pairs = self.named
        if not pairs or not all(len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in pairs):
            raise ValueError(f"pairs must name layers, {{student's: teacher's}}, got {self.pairs!r}")
        if not self.weight > 0:
            raise ValueError(f"weight must be above 0, got {self.weight}")

    @property
    def named(self) -> tuple[tuple[str, str], ...]:
        """The pairs: (student's layer, teacher's layer)."""
        return tuple(self.pairs.items() if isinstance(self.pairs, Mapping) else map(tuple, self.pairs))

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair, from outputs `(N, C, H, W)` in float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionTransfer(Feature):
    """The student's attention maps are drawn to the teacher's.

    Args:
        pairs: which layers, with more than one place each; they need no equal width.
        weight: factor of `attention_loss`.

    Source: Zagoruyko and Komodakis 2017, section 4.1: beta = 10^3 over the number of images and places.
    """

    weight: float = 1000.0

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`attention_loss`."""
        for features in (student, teacher):
            if features[0, 0].numel() == 1:
                raise ValueError("AttentionTransfer: a map of one place, 1 x 1, says nothing; choose an earlier layer")
        return attention_loss(student, teacher)


@dataclass(frozen=True)
class Hints(Feature):
    """A layer of the student is drawn to one of the teacher's, through a learned 1x1 convolution.

    Args:
        pairs: which layers.
        weight: factor of `hint_loss`, which is as large as the squares of the teacher's outputs: with a factor of 100,
            which later comparisons use behind normalised adapters, a fit can diverge.

    Source: Romero et al. 2015; there a stage of its own before the distillation, here a part of the same loss.
    """

    adapted: ClassVar[bool] = True

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`hint_loss`."""
        return hint_loss(student, teacher)


class Adapters:
    """Learned 1x1 convolutions from the widths of the student's layers to the teacher's.

    They are in the optimizer's last group for the time of a step only: whoever reads or writes the optimizer at any
    other time (a checkpoint, the learning rate finder) finds the network's parameters and nothing else.

    Args:
        student: the network whose layers they read.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        self._made: dict[Key, nn.Conv2d] = {}
        self._state: dict[nn.Parameter, dict[str, Any]] = {}  # what the optimizer keeps of each
        self._source: dict[Key, tuple[str, int] | None] = {}
        self._opt: Any = None  # the optimizer that they are in

    def __call__(self, key: Key, student: Tensor, teacher: Tensor) -> Tensor:
        """A student's layer in the teacher's width.

        Args:
            key: which pair, of which teacher.
            student: `(N, C, H, W)`.
            teacher: `(N, C', H', W')`.

        Raises:
            ValueError: the layer has other channels than before, and it could not be followed which ones.
        """
        if key not in self._made:
            self._add(key, nn.Conv2d(student.shape[1], teacher.shape[1], 1).to(student.device))
        if self._made[key].in_channels != student.shape[1]:
            raise ValueError(
                f"Hints: which of its {self._made[key].in_channels} channels the student's layer {key[0]!r} lost can't "
                "be told: remove channels in a fit without it, or name another layer"
            )
        return self._made[key](student)

    def _add(self, key: Key, adapter: nn.Conv2d) -> None:
        self._made[key] = adapter
        adapter.weight.free_norm = True  # no normalisation follows: an optimizer that keeps norms has to leave it
        self._state |= {p: {} for p in adapter.parameters()}
        self._source[key] = self._output_of(key[0], adapter.in_channels)

    def _output_of(self, layer: str, width: int) -> tuple[str, int] | None:
        """The tensor that says which channels a layer gives, and its numbers a channel; None where it can't be told.

        A block's own forward may add, join or reorder what its layers give: only a layer that makes its channels itself
        is sure, and a `Sequential` that ends with one.
        """
        module, path = self._student.get_submodule(layer), layer
        while isinstance(module, nn.Sequential):
            named = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
            if not named:
                return None
            path, module = f"{path}.{named[-1][0]}" if path else named[-1][0], named[-1][1]
        if not isinstance(module, MAKERS):
            return None
        own = [(f"{path}.{name}", p) for name, p in module.named_parameters() if p.shape[:1] == (width,)]
        return (own[-1][0], own[-1][1].numel() // width) if own else None

    def narrow(self, kept: Mapping[str, Tensor]) -> None:
        """Take the inputs away whose channels a layer of the student lost.

        Args:
            kept: `widths.narrow`'s.
        """
        self.leave()  # new parameters take the old ones' place
        for key, adapter in list(self._made.items()):
            name, each = self._source[key] or ("", 1)
            if name not in kept:
                continue
            channels = kept[name].reshape(len(kept[name]), -1)[:, 0] // each
            old = adapter.weight
            places = torch.arange(old.numel(), device=channels.device).reshape(old.shape)[:, channels]
            optimizer = [
                {
                    k: take(v, places) if p is old and for_each_weight(v, old) else v
                    for k, v in self._state.pop(p).items()
                }
                for p in adapter.parameters()
            ]
            self._put(key, adapter.state_dict() | {"weight": take(old.detach(), places)}, optimizer)

    def enter(self, opt: Any) -> None:
        """Join the last group of an optimizer, for one step."""
        for parameter, state in self._state.items():
            opt.param_lists[-1].append(parameter)
            kept_of(opt)[parameter] = state
        self._opt = opt

    def leave(self) -> None:
        """Leave the optimizer, if in one."""
        if self._opt is None:
            return
        for parameter in self._state:
            self._opt.param_lists[-1].pop()
            self._state[parameter] = kept_of(self._opt).pop(parameter)
        self._opt = None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._state:
            parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The adapters with what the optimizer keeps of them."""
        return [
            {"key": key, "state": dict(a.state_dict()), "optimizer": [self._state[p] for p in a.parameters()]}
            for key, a in self._made.items()
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Put them back, on the student's device."""
        device = next(self._student.parameters()).device
        for entry in state:
            # torch's optimizers keep their count of steps on the CPU; what they keep for each weight goes with it.
            values, optimizer = list(entry["state"].values()), entry["optimizer"]
            moved = [
                {k: v.to(device) if for_each_weight(v, value) else v for k, v in kept.items()}
                for value, kept in zip(values, optimizer, strict=True)
            ]
            self._put(tuple(entry["key"]), {k: v.to(device) for k, v in entry["state"].items()}, moved)

    def _put(self, key: Key, values: Mapping[str, Tensor], optimizer: list[dict[str, Any]]) -> None:
        """Make an adapter of given weights, new parameters as fresh as its width."""
        outputs, inputs = values["weight"].shape[:2]
        adapter = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 1, device=values["weight"].device)
        adapter.load_state_dict(values)
        self._add(key, adapter)
        self._state.update(zip(adapter.parameters(), optimizer, strict=True))
