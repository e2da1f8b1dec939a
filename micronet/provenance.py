"""What a file says of where its network came from; nothing here imports torch."""

from typing import Any

from micronet.names import current

# What the data sets' functions take where a recipe says nothing.
_CUT = {"valid": 0.1, "split_seed": 0}


def data_call(provenance: Any) -> dict[str, Any]:
    """The call of a data set in the recipe that a network was trained by.

    Args:
        provenance: a bundle's, or what `recipe.describe` gives under the same keys.

    Returns:
        `call`, the function as `module:name`, and its arguments; `call` is None where nothing is said.
    """
    used = provenance
    for part in ("resolved", "recipe", "data"):
        used = used.get(part) if isinstance(used, dict) else None
    used = used if isinstance(used, dict) else {"call": used}  # a source without arguments is its name alone
    call = used.get("call")
    return {**used, "call": current(call) if isinstance(call, str) else call}


def cut_otherwise(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two calls name one data set and cut valid from train in two ways."""
    if one.get("call") is None or one.get("call") != other.get("call"):
        return False
    return any(one.get(name, default) != other.get(name, default) for name, default in _CUT.items())
