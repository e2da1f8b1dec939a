"""Networks that `torch.nn.utils.prune` masked, as plain weights and masks.

torch keeps a masked `weight` as two tensors, `weight_orig` and `weight_mask`, and multiplies them in a hook before each
forward pass. Everything here keeps one tensor that has zeros, and the masks beside the network.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import prune

from callbacks.copies import copied


def take_masks(model: nn.Module) -> dict[str, Tensor]:
    """Turn the masks of `torch.nn.utils.prune` into plain masked weights.

    Args:
        model: changed in place: its `weight_orig` and `weight_mask` become one parameter `weight` again, the object
            that `weight_orig` was.

    Returns:
        The mask of each parameter, by its name in the state dict afterwards.
    """
    found = {}
    for path, module in model.named_modules():
        for key in _masked(module):
            mask, original = module._buffers.pop(f"{key}_mask").bool(), module._parameters.pop(f"{key}_orig")
            found[f"{path}.{key}" if path else key] = mask
            # Not torch's own prune.remove: it needs the hooks, which a copy of a network may lack, and leaves -0.0.
            for place, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == key:
                    del module._forward_pre_hooks[place]
            vars(module).pop(key, None)  # the product that the hook made
            original.data = original.data.masked_fill(~mask, 0)
            module.register_parameter(key, original)
    return found


def unmasked(model: nn.Module, masks: Mapping[str, Tensor] | None) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
    """A network as plain weights, and all of its masks.

    Args:
        model: the network, which stays as it is.
        masks: further masks that it has; None where nothing else declares which zeros are meant.

    Returns:
        The network itself where `torch.nn.utils.prune` masked nothing, else a copy that shares the memory of weights
        that are not masked; the masks, None where there are none and None was given.
    """
    if not any(_masked(module) for module in model.modules()):
        return model, masks
    plain = copied(model, lambda tensor: tensor)
    return plain, take_masks(plain) | dict(masks or {})


def _masked(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that are masked."""
    originals = {name for name, _ in module.named_parameters(recurse=False)}
    keys = [name.removesuffix("_mask") for name, _ in module.named_buffers(recurse=False) if name.endswith("_mask")]
    return [key for key in keys if f"{key}_orig" in originals]


def take_masks_of_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Do the same to a state dict.

    Args:
        state: tensors by name; it stays as it is.

    Returns:
        The state dict with `weight` in the place of `weight_orig` and `weight_mask`; the mask of each such parameter.
    """
    plain, masks = dict(state), {}
    for name in [name.removesuffix("_mask") for name in state if name.endswith("_mask")]:
        if f"{name}_orig" in state:
            masks[name] = plain.pop(f"{name}_mask").bool()
            plain[name] = plain.pop(f"{name}_orig").masked_fill(~masks[name], 0)
    return plain, masks
