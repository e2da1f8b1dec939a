"""Looking into networks without changing them: the outputs of named layers, and a teacher's answers."""

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.errors import first_line


class _Keep:
    """A forward hook that keeps the last output, as float32; an object, not a closure: a copied network keeps none."""

    def __init__(self) -> None:
        self.output: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        # A copy: an activation or a sum that follows may work in place.
        self.output = output.to(torch.float32, copy=True) if isinstance(output, Tensor) else output

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    """What a copied network's hook does."""


class Taps:
    """The outputs of named layers, kept while they are open.

    Args:
        model: the network.
        names: of layers, as in `named_modules()`.
        whose: "student" or "teacher", for messages.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], whose: str) -> None:
        modules, self._whose = dict(model.named_modules()), whose
        self._taps: dict[str, tuple[nn.Module, _Keep]] = {}
        self._handles: list[Any] = []
        for name in names:
            if not name or name not in modules:
                parts = ", ".join(list(dict(model.named_children()))[:12])
                raise ValueError(f"the {whose} has no layer {name!r}; its parts are {parts}, and what is in them")
            self._taps[name] = modules[name], _Keep()

    def open(self) -> None:
        """Begin to keep."""
        self._handles += [module.register_forward_hook(keep) for module, keep in self._taps.values()]

    def close(self) -> None:
        """Leave the network without hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forget(self) -> None:
        """Let go of what was kept."""
        for _, keep in self._taps.values():
            keep.output = None

    def __getitem__(self, name: str) -> Tensor:
        """A layer's output, float32 `(N, C, H, W)`; one of a linear layer has height and width 1."""
        output = self._taps[name][1].output
        if isinstance(output, Tensor) and output.dim() == 2:
            output = output[:, :, None, None]
        if not isinstance(output, Tensor) or output.dim() != 4:
            what = "did not run" if output is None else "does not give one tensor (N, C, H, W) or (N, C)"
            raise ValueError(f"layer {name!r} of the {self._whose} {what}: name another one")
        return output


class Teacher:
    """A module that answers in eval mode and without gradients, and is otherwise left as it is.

    Args:
        module: the teacher; it is copied where its weights lie on another device.
        layers: names of the layers that are compared.
        device: the student's.
        bf16: whether to run under bf16 autocast.
        compiled: whether to compile it.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], device: torch.device, bf16: bool, compiled: bool):
        here = all(tensor.device == device for tensor in [*module.parameters(), *module.buffers()])
        self._module = module if here else copy.deepcopy(module).to(device)
        self._modules = list(self._module.modules())
        self._run = torch.compile(self._module) if compiled else self._module
        self._autocast = bf16 and device.type
        self.taps = Taps(self._module, layers, "teacher")

    @torch.no_grad()
    def __call__(self, xb: Sequence[Tensor]) -> Tensor:
        """Logits float32 `(N, C)`."""
        # By the flag, and for the time of the call: train() may be a method of the module's own that does more, and
        # after an exception anywhere else nothing has to be put back.
        training = [module for module in self._modules if module.training]
        context = torch.autocast(self._autocast, torch.bfloat16) if self._autocast else nullcontext()
        try:
            for module in training:
                module.training = False
            self.taps.open()
            with context:
                logits = self._run(*xb)
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(x.shape)) for x in xb)
            raise ValueError(
                f"the teacher can't take the student's batch {shapes}: {first_line(error)[:160]}"
            ) from error
        finally:
            self.taps.close()
            for module in training:
                module.training = True
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError("the teacher must answer with one tensor of logits (N, C)")
        return logits.float()
