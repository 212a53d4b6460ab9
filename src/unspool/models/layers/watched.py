"""Modules that tell when they change, so that what was made of them can be made anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch_module
from torch.utils.hooks import RemovableHandle

__all__ = ["Watched", "changes", "hooked"]

_changes = 0


def changes() -> int:
    """How often an attribute has been set, or a hook registered, on any watched module of the process."""
    return _changes


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether someone listens to one of `modules`, or to all that there are."""
    everywhere = _torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks
    return bool(everywhere) or any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _changed() -> None:
    global _changes
    _changes += 1


class Watched(nn.Module):
    """A module of which every attribute that is set, a weight, a module or a number, is counted in `changes`."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        _changed()

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """See `torch.nn.Module`."""
        _changed()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """See `torch.nn.Module`."""
        _changed()
        return super().register_forward_pre_hook(*args, **kwargs)
