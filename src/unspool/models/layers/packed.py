"""Weights that give up their plain layout for one that is faster to use, and get it back when somebody needs it.

A packed weight's parameter keeps its shape and dtype and has no memory (it is on the `meta` device). Training, casts,
moves to other devices, `state_dict()` and pickles see the plain weight as before; whoever only copies a model, or moves
it to where it is, leaves the packed one alone. Modules that share a weight share its packed form. A quantised weight is
such a form too, which stays as it is when the model is moved, copied or trained around it, and is brought back for
`state_dict()` and where its own gradient is wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from unspool.models.layers.watched import Watched

__all__ = ["Packable", "PackedForm", "TableForm", "WritableForm", "exchange", "regroup"]


class PackedForm(Protocol):
    """A weight `[out, in]` in another layout, which nobody changes, so that copies of a model share it.

    Attributes:
        lossless: it gives back the very weight it was made of, and is pickled as that, a tensor. What does not, a
            quantised weight, is kept while it is trained around, moved and pickled.
    """

    lossless: bool

    @property
    def invariant(self) -> bool:
        """Whether a row's product is the same bits alone and in company."""
        ...

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[rows, in]`, without gradients."""
        ...

    def plain(self) -> Tensor:
        """The weight in the usual layout."""
        ...


class TableForm(PackedForm, Protocol):
    """A packed weight whose rows can be had one by one."""

    def rows(self, indexes: Tensor) -> Tensor:
        """Rows `[n, in]` of the weight at `indexes` `[n]`."""
        ...


class MovableForm(PackedForm, Protocol):
    """A quantised weight.

    Attributes:
        device: where it is.
    """

    device: torch.device

    def to(self, device: torch.device, dtype: torch.dtype) -> PackedForm:
        """The same weight elsewhere, or for another dtype of activations."""
        ...


class WritableForm(PackedForm, Protocol):
    """A packed weight that is filled while it is read."""

    def write(self, first: int, rows: Tensor, threads: int | None = None) -> None:
        """Set rows `[n, in]` of the weight from `first` on. Nothing is right until all rows are written.

        Several threads may write at once, each its own rows; `threads` are what each call uses, by default all.
        """
        ...


class Packable(Watched):
    """A module with a `weight` that can be packed.

    Attributes:
        weight: `[out, in]`; while packed, only its shape.
    """

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._packed: PackedForm | None = None
        self._holders: WeakSet[Packable] | None = None

    @property
    def plain(self) -> Tensor:
        """The weight in the usual layout; a copy while it is packed."""
        return self.weight.detach() if self._packed is None else self._packed.plain()

    def unpack(self) -> None:
        """Bring the plain weight back, for all modules that share it; does nothing where it is already."""
        if self._packed is None:
            return
        with torch.inference_mode(False):
            weight = nn.Parameter(self._packed.plain(), requires_grad=self.weight.requires_grad)
        for module in list(self._holders or [self]):
            module.weight, module._packed, module._holders = weight, None, None

    def train(self, mode: bool = True) -> Packable:
        """Set training mode, for which a weight that is not quantised must be plain."""
        if mode and self._packed is not None and self._packed.lossless:
            self.unpack()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling see; who shares the weight is told by `regroup`."""
        return {**self.__dict__, "_holders": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        packed: object = self._packed
        if isinstance(packed, Tensor):  # a pickle's
            self.weight, self._packed = nn.Parameter(packed, requires_grad=self.weight.requires_grad), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packable:
        if self._packed is None or not self._moved(fn, self._packed):
            self.unpack()
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        weight, self._parameters["weight"] = self.weight, None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        return self

    def _moved(self, fn: Callable[[Tensor], Tensor], form: PackedForm) -> bool:
        """Do to the packed weight what `fn` does to tensors; `False` where the plain one is needed for it."""
        # The function does not fit what is only a shape; what it does to a tensor like it says where to go.
        device = torch.device("cpu") if form.lossless else cast(MovableForm, form).device
        probe = torch.empty(0, dtype=self.weight.dtype, device=device)
        like = fn(probe)
        if form.lossless:
            shared = like.is_shared()  # type: ignore[no-untyped-call]
            return (like.device, like.dtype) == (probe.device, probe.dtype) and not shared
        moved = cast(MovableForm, form).to(like.device, like.dtype)
        if moved is not form:
            holders = list(self._holders or [self])
            shape = nn.Parameter(self.weight.detach().to(like.dtype), requires_grad=self.weight.requires_grad)
            for module in holders:
                module.weight = shape
            exchange(holders, moved)
        return True

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


def regroup(modules: Iterable[Packable]) -> None:
    """Let `modules`, which were copied, know again with which others they share a packed weight."""
    sharing: defaultdict[int, list[Packable]] = defaultdict(list)
    for module in modules:
        if module._packed is not None:
            sharing[id(module._packed)].append(module)
    for some in sharing.values():
        holders = WeakSet(some)
        for module in some:
            module._holders = holders
