"""Inference mode for modules that are not ours, with no trace of it left on them.

PyTorch's inference mode spares a tenth of a small model's step. Its price is that a tensor made in it can take no part
in training later, so none may come into other hands: a module on which anybody looks (hooks, a replaced `forward`)
computes without gradients alone, and what a module keeps for itself (angles of longer rows, a state) is exchanged for
an ordinary copy after the call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unspool.bridge.probe import looks_on

__all__ = ["unseen"]

_PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, nn.Parameter))
_BOXES = frozenset((dict, list, tuple, set, frozenset))
_OTHERS = (nn.Module, ModuleType, type, set, frozenset)
_PYTORCHS = frozenset(vars(nn.Module())) - {"_buffers"}  # entries of every module that hold none
_DEPTH = 4  # of an attribute's entries that may hold tensors
_MANY = 1024  # entries; more are a table of something else


@contextmanager
def unseen(module: nn.Module) -> Iterator[None]:
    """Within, a module computes for a caller who sees none of its tensors, at the least cost that is safe."""
    if not _is_closed(module):
        with torch.no_grad():
            yield
        return
    try:
        with torch.inference_mode():
            yield
    finally:
        _mend(module)


def _is_closed(module: nn.Module) -> bool:
    """Whether what a module computes stays in it: only attributes of its parts may keep tensors."""
    theirs = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if theirs is None or nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return False
    known = False  # a module of one's own may keep tensors anywhere
    for part in module.modules():
        own = part.__dict__
        if part._forward_pre_hooks or any(map(looks_on, part._forward_hooks.values())) or "forward" in own:
            return False
        if own.get("_compiled_call_impl") is not None or "_orig_mod" in part._modules:
            return False
        if any(type(one) not in _PLAIN and is_traceable_wrapper_subclass(one) for one in part._parameters.values()):
            return False
        known = known or isinstance(part, theirs)
    return known


def _mend(module: nn.Module) -> None:
    """Exchange what a module has kept of inference mode for ordinary tensors."""
    done: dict[int, Any] = {}
    for part in module.modules():
        own = part.__dict__
        _mend_entries(own, own.keys() - _PYTORCHS, 0, done)


def _mend_entries(entries: dict[Any, Any], names: Iterable[Any], depth: int, done: dict[int, Any]) -> None:
    for name in names:
        value = entries.get(name)
        kind = type(value)
        if kind not in _PLAIN and (kind not in _BOXES or value):
            mended = _mended(value, depth, done)
            if mended is not value:
                entries[name] = mended


def _mended(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """What stands for `value` outside of inference mode: mostly itself, with its own entries mended."""
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value
    if isinstance(value, Tensor):
        if value.is_inference():
            done[id(value)] = value.clone()
    elif depth == _DEPTH or isinstance(value, _OTHERS):
        pass
    elif isinstance(value, dict):
        if len(value) <= _MANY:
            _mend_entries(value, tuple(value), depth + 1, done)
    elif isinstance(value, list | tuple):
        if len(value) <= _MANY:
            mended = [_mended(one, depth + 1, done) for one in value]
            if any(one is not other for one, other in zip(mended, value, strict=True)):
                done[id(value)] = mended if isinstance(value, list) else tuple(mended)
    elif isinstance(own := getattr(value, "__dict__", None), dict):
        _mend_entries(own, tuple(own), depth + 1, done)
    return done[id(value)]
