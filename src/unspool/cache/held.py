"""How much memory pasts take that a module keeps in its own way: caches, what an encoder made, states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["bytes_held"]

_LEAVES = (str, bytes, int, float, bool, type(None), nn.Module)


def bytes_held(values: Iterable[Any]) -> int:
    """Bytes behind all tensors in nested containers, caches and outputs; memory that several share counts once."""
    ahead, seen, sizes = list(values), set[int](), dict[Any, int]()
    while ahead:
        one = ahead.pop()
        if isinstance(one, _LEAVES) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            memory = one.untyped_storage()
            sizes[one.device, memory.data_ptr()] = memory.nbytes()
        elif isinstance(one, Mapping):
            ahead += one.values()
        elif isinstance(one, list | tuple | set):
            ahead += one
        else:
            ahead += getattr(one, "__dict__", {}).values()
    return sum(sizes.values())
