"""Low-rank adapters (Hu et al., 2021) beside a model's weights, chosen for every row of a step.

The weights stay as they are, packed and shared by all rows; a layer adds `B (A x)` to what it gives for the tokens of
rows that have an adapter. Which rows these are is part of the step's input (`Batch.adapters`), never a state of the
layers, so calls in different threads do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.kernels.linear import PackedWeight, fits
from unspool.models.layers.linear import Linear, added, multiply

__all__ = ["BASE", "Adapter", "Adapters", "Delta", "Mixer", "Selection"]

BASE = "__base__"
"""The name that stands for no adapter; PEFT's."""

# Up to so many tokens, the products of all adapters for all tokens cost less than going from adapter to adapter.
_FEW_TOKENS = 64


@dataclass(slots=True, eq=False)
class Delta:
    """What an adapter changes of a linear layer: `out * gain + shift + (x @ down.T) @ up`.

    Attributes:
        down: `[rank, inputs]`; ranks of a fused layer's parts one below the other.
        up: `[rank, outputs]`, scaled; zero where a rank is not of the part that an output belongs to.
        gain, shift: `[outputs]` of DoRA (Liu et al., 2024), `None` without.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    _packed: tuple[PackedWeight, PackedWeight] | None = field(init=False)

    def __post_init__(self) -> None:
        self._packed = self._pack()

    def __reduce__(self) -> tuple[type[Delta], tuple[Tensor | None, ...]]:
        return Delta, (self.down, self.up, self.gain, self.shift)  # packed forms are made anew

    def _pack(self) -> tuple[PackedWeight, PackedWeight] | None:
        """Both matrices for our own kernels, which take a few tokens several times as fast as PyTorch's products."""
        up = self.up.t()
        return (PackedWeight(self.down), PackedWeight(up.contiguous())) if fits(self.down) and fits(up) else None

    def add_product(self, x: Tensor, out: Tensor, mask: Tensor | None = None) -> Tensor:
        """`out + (x @ down.T) @ up`, written over `out` where no gradient needs it; `mask` `[tokens, rank]` leaves out.

        What is left out is set to 0, not multiplied: one adapter's overflow must not reach another's rows.
        """
        if torch.is_grad_enabled():
            inner = multiply(x, self.down)
            return torch.addmm(out, inner if mask is None else inner.masked_fill(mask, 0), self.up)
        inner = multiply(x, self.down) if self._packed is None else self._packed[0].product(x)
        if mask is not None:
            inner.masked_fill_(mask, 0)
        return out.addmm_(inner, self.up) if self._packed is None else out.add_(self._packed[1].product(inner))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output `out` `[tokens, outputs]` for `x` `[tokens, inputs]`, changed; `out` may be written."""
        if self.gain is not None and self.shift is not None:
            out = torch.addcmul(self.shift, out, self.gain)
        return self.add_product(x, out)

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` (a cast, a move) to every tensor."""
        self.down, self.up = fn(self.down), fn(self.up)
        if self.gain is not None and self.shift is not None:
            self.gain, self.shift = fn(self.gain), fn(self.shift)
        self._packed = self._pack()


@dataclass(slots=True, eq=False)
class Adapter:
    """One loaded adapter. What is stored of its rows' keys and values is told apart by the object, not by its name.

    Attributes:
        name: what calls choose it by.
        kind: `"LoRA"`, `"rsLoRA"` or `"DoRA"`.
        deltas: by layer; layers that are not there stay as they are.
    """

    name: str
    kind: str
    deltas: dict[Linear, Delta]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        tensors = (t for d in self.deltas.values() for t in (d.down, d.up, d.gain, d.shift) if t is not None)
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(slots=True, eq=False)
class Adapters:
    """The adapters of one model.

    Attributes:
        loaded: by name.
        active: name of the one that calls use which name none; `None` for the bare model.
    """

    loaded: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None

    def named(self, name: str | None) -> Adapter | None:
        """The adapter of that name; `None` and `"__base__"` are the bare model.

        Raises:
            ValueError: no adapter has that name.
        """
        if name is None or name == BASE:
            return None
        found = self.loaded.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(map(repr, self.loaded)) or "none; call load_adapter() first"
            raise ValueError(f"no adapter is called {name!r}; loaded: {known}")
        return found

    def current(self) -> Adapter | None:
        """The one for calls that name none, in this thread, now."""
        if self.active is None or any(self is other for other in _disabled.get()):
            return None
        return self.loaded[self.active]

    def choose(self, names: Sequence[str | None] | None, rows: int) -> list[Adapter | None]:
        """The adapter of each of `rows` prompts: the named ones, or the current one for all.

        Raises:
            TypeError: `names` is no list.
            ValueError: another number of names than rows, or an unknown one.
        """
        if names is None:
            return [self.current()] * rows
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"adapter_names must be a list with a name for each prompt, not {names!r}")
        if len(names) != rows:
            raise ValueError(f"adapter_names has {len(names)} names for {rows} prompts; pass one for each")
        return [self.named(name) for name in names]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, calls of this thread (or task) that name no adapter use the bare model."""
        token = _disabled.set((*_disabled.get(), self))
        try:
            yield
        finally:
            _disabled.reset(token)


_disabled: ContextVar[tuple[Adapters, ...]] = ContextVar("disabled", default=())


class Selection:
    """Which adapter each token of a step goes through.

    Args:
        tokens: how many there are.
        whole: the adapter of all of them, or
        parts: adapters and the places `[n]` of their tokens, or
        stack: several adapters side by side, and
        numbers: `[tokens]` which of the stack each token has; as many as it holds for none.
    """

    def __init__(
        self,
        tokens: int,
        *,
        whole: Adapter | None = None,
        parts: Sequence[tuple[Adapter, Tensor]] = (),
        stack: Stack | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        self._tokens = tokens
        self._whole = whole
        self._parts = parts
        self._stack = stack
        self._numbers = numbers
        self._masks: dict[tuple[int, ...], Tensor] = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the linear layers of this thread's step add what the adapters say."""
        token = added.set(self)
        try:
            yield
        finally:
            added.reset(token)

    def add(self, layer: Linear, x: Tensor, out: Tensor) -> Tensor:
        """The output of `layer` for `x`, each token's changed by its adapter; see `models.layers.linear.Added`."""
        if self._whole is not None:
            delta = self._whole.deltas.get(layer)
            return out if delta is None else delta.add(self._checked(x), out)
        if self._stack is not None:
            return self._add_stacked(self._stack, layer, x, out)
        for adapter, places in self._parts:
            delta = adapter.deltas.get(layer)
            if delta is not None:
                some = delta.add(self._checked(x).index_select(0, places), out.index_select(0, places))
                out = out.index_copy(0, places, some) if torch.is_grad_enabled() else out.index_copy_(0, places, some)
        return out

    def _add_stacked(self, stack: Stack, layer: Linear, x: Tensor, out: Tensor) -> Tensor:
        found = stack.delta(layer)
        if found is None:
            return out
        delta, ranks = found
        assert self._numbers is not None
        if delta.gain is not None and delta.shift is not None:
            out = torch.addcmul(delta.shift[self._numbers], out, delta.gain[self._numbers])
        return delta.add_product(self._checked(x), out, self._mask(ranks))

    def _mask(self, ranks: tuple[int, ...]) -> Tensor:
        """`[tokens, sum(ranks)]` true where a rank is not of the token's adapter."""
        mask = self._masks.get(ranks)
        if mask is None:
            assert self._numbers is not None
            owners = torch.repeat_interleave(torch.tensor(ranks)).to(self._numbers.device)
            mask = self._masks[ranks] = self._numbers[:, None] != owners
        return mask

    def _checked(self, x: Tensor) -> Tensor:
        assert x.shape[0] == self._tokens, "a layer with an adapter sees all tokens of a step"
        return x


class Stack:
    """Several adapters side by side, so that one product serves the tokens of all."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        self.numbers = {adapter: number for number, adapter in enumerate(adapters)}
        self._deltas: dict[Linear, tuple[Delta, tuple[int, ...]] | None] = {}

    def delta(self, layer: Linear) -> tuple[Delta, tuple[int, ...]] | None:
        """The adapters' change of `layer` and the rank of each; gain and shift have a row for each, and one for none.

        `None` where none changes it.
        """
        if layer not in self._deltas:
            self._deltas[layer] = self._join([adapter.deltas.get(layer) for adapter in self.adapters])
        return self._deltas[layer]

    def _join(self, deltas: list[Delta | None]) -> tuple[Delta, tuple[int, ...]] | None:
        there = [delta for delta in deltas if delta is not None]
        if not there:
            return None
        ranks = tuple(0 if delta is None else delta.down.shape[0] for delta in deltas)
        down, up = there[0].down, there[0].up
        if len(there) > 1:
            down, up = torch.cat([delta.down for delta in there]), torch.cat([delta.up for delta in there])
        if all(delta.gain is None for delta in there):
            return Delta(down, up), ranks
        one = torch.ones(up.shape[1], dtype=up.dtype, device=up.device)
        zero = torch.zeros_like(one)
        pairs = [(one, zero) if d is None or d.gain is None else (d.gain, d.shift) for d in (*deltas, None)]
        gain = torch.stack([gain for gain, _ in pairs])
        shift = torch.stack([zero if shift is None else shift for _, shift in pairs])
        return Delta(down, up, gain, shift), ranks


class Mixer:
    """Makes the selection of each step, and keeps adapters that are used together side by side between steps."""

    def __init__(self) -> None:
        self._stack: Stack | None = None

    def select(
        self, adapters: Sequence[Adapter | None], feeds: Sequence[int], device: torch.device
    ) -> Selection | None:
        """The selection for rows with `adapters` that feed so many tokens each; `None` where no row has one."""
        used = [adapter for adapter in dict.fromkeys(adapters) if adapter is not None]
        if not used:
            return None
        tokens = sum(feeds)
        if len(used) == 1 and None not in adapters:
            return Selection(tokens, whole=used[0])
        if tokens <= _FEW_TOKENS:
            stack = self._stacked(used)
            none = len(stack.adapters)
            each = [none if adapter is None else stack.numbers[adapter] for adapter in adapters]
            numbers = [number for number, feed in zip(each, feeds, strict=True) for _ in range(feed)]
            return Selection(tokens, stack=stack, numbers=torch.tensor(numbers, device=device))
        places: dict[Adapter, list[int]] = {adapter: [] for adapter in used}
        first = 0
        for adapter, feed in zip(adapters, feeds, strict=True):
            if adapter is not None:
                places[adapter] += range(first, first + feed)
            first += feed
        parts = [(adapter, torch.tensor(at, device=device)) for adapter, at in places.items()]
        return Selection(tokens, parts=parts)

    def _stacked(self, used: list[Adapter]) -> Stack:
        """A stack that has all of `used`; the last one, unless most of it would be computed in vain."""
        stack = self._stack
        fits = stack is not None and all(adapter in stack.numbers for adapter in used)
        if stack is None or not fits or len(stack.adapters) > 2 * len(used):
            stack = self._stack = Stack(used)
        return stack
