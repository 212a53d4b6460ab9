"""Weights that give up their plain layout for one that is faster to use, and get it back when somebody needs it.

A packed weight's parameter keeps its shape and dtype and has no memory (it is on the `meta` device). Training, `to()`,
`state_dict()`, copying and pickling see the plain weight as before. Modules that share a weight share its packed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

__all__ = ["Packable", "PackedForm", "WritableForm", "exchange"]


class PackedForm(Protocol):
    """A weight `[out, in]` in another layout."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[rows, in]`, without gradients."""
        ...

    def plain(self) -> Tensor:
        """The weight in the usual layout, bit for bit."""
        ...


class WritableForm(PackedForm, Protocol):
    """A packed weight that is filled while it is read."""

    def write(self, first: int, rows: Tensor, threads: int | None = None) -> None:
        """Set rows `[n, in]` of the weight from `first` on. Nothing is right until all rows are written.

        Several threads may write at once, each its own rows; `threads` are what each call uses, by default all.
        """
        ...


class Packable(nn.Module):
    """A module with a `weight` that can be packed.

    Attributes:
        weight: `[out, in]`; while packed, only its shape.
    """

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._packed: PackedForm | None = None
        self._holders: WeakSet[Packable] | None = None

    def unpack(self) -> None:
        """Bring the plain weight back, for all modules that share it; does nothing where it is already."""
        if self._packed is None:
            return
        assert self._holders is not None
        with torch.inference_mode(False):
            weight = nn.Parameter(self._packed.plain(), requires_grad=self.weight.requires_grad)
        for module in list(self._holders):
            module.weight, module._packed, module._holders = weight, None, None

    def train(self, mode: bool = True) -> Packable:
        """Set training mode, for which the weight must be plain."""
        if mode:
            self.unpack()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling see: the plain weight."""
        self.unpack()
        return self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packable:
        self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[prefix + "weight"] = self._packed.plain()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)


def exchange(modules: Sequence[Packable], packed: PackedForm) -> None:
    """Let `modules`, which share one plain weight, use its `packed` form instead."""
    weight = modules[0].weight
    with torch.inference_mode(False):
        shape = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
    holders = WeakSet(modules)
    for module in modules:
        module.weight, module._packed, module._holders = shape, packed, holders
