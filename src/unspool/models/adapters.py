"""Low-rank adapters (Hu et al., 2021) beside a model's weights, chosen for every row of a step.

The weights stay as they are, packed and shared by all rows; a layer adds `B (A x)` to what it gives for the tokens of
rows that have an adapter. Which rows these are is part of the step's input (`Batch.adapters`), never a state of the
layers, so calls in different threads do not disturb each other.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from unspool.kernels.lowrank import LowRankPair, Pairs, RowsOfPairs, fits
from unspool.kernels.program import Adapted
from unspool.models.layers.linear import Linear, added, multiply

__all__ = ["BASE", "Adapter", "Adapters", "Delta", "Mixer", "Selection"]

BASE = "__base__"
"""The name that stands for no adapter; PEFT's."""

# Without the compiled kernel: up to so many tokens, the products of all adapters for all tokens cost less than going
# from adapter to adapter.
_FEW_TOKENS = 64


@dataclass(slots=True, eq=False)
class Delta:
    """What an adapter changes of a linear layer: `out * gain + shift + (x @ down.T) @ up`.

    Attributes:
        down: `[rank, inputs]`; ranks of a fused layer's parts one below the other.
        up: `[rank, outputs]`, scaled; zero where a rank is not of the part that an output belongs to.
        gain, shift: `[outputs]` of DoRA (Liu et al., 2024), `None` without.
        packed: both matrices for the compiled kernel, where it takes them.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    packed: LowRankPair | None = field(init=False)

    def __post_init__(self) -> None:
        self._pack()

    def __reduce__(self) -> tuple[type[Delta], tuple[Tensor | None, ...]]:
        return Delta, (self.down, self.up, self.gain, self.shift)  # the packed form is made anew

    def _pack(self) -> None:
        self.packed = LowRankPair(self.down, self.up) if fits(self.down, self.up) else None

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """`out + (x @ down.T) @ up` by PyTorch, for `x` `[tokens, inputs]`; `out` is written unless gradients flow."""
        return _add_product(x, out, self.down, self.up)

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` (a cast, a move) to every tensor."""
        self.down, self.up = fn(self.down), fn(self.up)
        if self.gain is not None and self.shift is not None:
            self.gain, self.shift = fn(self.gain), fn(self.shift)
        self._pack()


def _add_product(x: Tensor, out: Tensor, down: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """`out + (x @ down.T) @ up`; `mask` `[tokens, rank]` leaves out.

    What is left out is set to 0, not multiplied: one adapter's overflow must not reach another's rows.
    """
    inner = multiply(x, down)
    if torch.is_grad_enabled():
        return torch.addmm(out, inner if mask is None else inner.masked_fill(mask, 0), up)
    if mask is not None:
        inner.masked_fill_(mask, 0)
    return out.addmm_(inner, up)


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

    @property
    def invariant(self) -> bool:
        """Whether the compiled kernel computes it, so that a row gets the same bits alone and in company."""
        return all(delta.packed is not None for delta in self.deltas.values())


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
        stack: the adapters of the step, and perhaps more.
        numbers: for each token the number of its adapter in the stack; as many as it holds for none.
        device: where the tokens are.
    """

    def __init__(self, stack: Stack, numbers: list[int], device: torch.device) -> None:
        self._stack = stack
        self._tokens = len(numbers)
        self._numbers = numbers
        self._device = device
        self._only = numbers[0] if numbers.count(numbers[0]) == len(numbers) else None

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
        change = self._stack.change(layer)
        if change is None:
            return out
        assert x.shape[0] == self._tokens, "a layer with an adapter sees all tokens of a step"
        if change.gain is not None and change.shift is not None:
            # a row for all tokens, or one for each
            each = self._places if self._only is None else slice(self._only, self._only + 1)
            out = torch.addcmul(change.shift[each], out, change.gain[each])
        if change.pairs is not None and not torch.is_grad_enabled():
            return change.pairs.add(x, out, self._rows)
        if self._only is None and self._tokens <= _FEW_TOKENS:
            down, up = change.together
            return _add_product(x, out, down, up, self._masks(change.ranks))
        for number, places in self._parts:
            delta = change.deltas[number]
            if delta is None:
                continue
            if self._only is not None:
                return delta.add(x, out)
            some = delta.add(x.index_select(0, places), out.index_select(0, places))
            out = out.index_copy(0, places, some) if torch.is_grad_enabled() else out.index_copy_(0, places, some)
        return out

    def adapted(self, layers: Sequence[Linear]) -> Adapted | None:
        """What the adapters add to the products of `layers`, for a program; `None` where its kernel cannot do it."""
        pairs = self._stack.addresses(layers)
        return None if pairs is None else Adapted(pairs, self._rows)

    @cached_property
    def _rows(self) -> RowsOfPairs:
        return RowsOfPairs(self._numbers, len(self._stack.adapters))

    @cached_property
    def _places(self) -> Tensor:
        """`[tokens]`, the numbers."""
        return torch.tensor(self._numbers, device=self._device)

    @cached_property
    def _parts(self) -> list[tuple[int, Tensor]]:
        """The numbers of the adapters that are used, and the places of their tokens."""
        used = sorted(set(self._numbers) - {len(self._stack.adapters)})
        return [(number, (self._places == number).nonzero()[:, 0]) for number in used]

    @cached_property
    def _masks(self) -> Callable[[tuple[int, ...]], Tensor]:
        """Gives `[tokens, sum(ranks)]`, true where a rank is not of the token's adapter."""

        @cache
        def mask(ranks: tuple[int, ...]) -> Tensor:
            owners = torch.repeat_interleave(torch.tensor(ranks)).to(self._device)
            return self._places[:, None] != owners

        return mask


class Change:
    """What several adapters change of a layer.

    Args:
        deltas: by the adapter's number, `None` for one that leaves the layer as it is; not all.

    Attributes:
        ranks: of each.
        gain, shift: `[adapters + 1, outputs]`, the last row for none of them; `None` where none has them.
        pairs: for the compiled kernel, where it takes all of them.
    """

    def __init__(self, deltas: list[Delta | None]) -> None:
        self.deltas = deltas
        self.ranks = tuple(0 if delta is None else delta.down.shape[0] for delta in deltas)
        self._there = [delta for delta in deltas if delta is not None]
        packed = [None if delta is None else delta.packed for delta in deltas]
        self.pairs = Pairs(packed) if all(delta.packed is not None for delta in self._there) else None
        self.gain: Tensor | None = None
        self.shift: Tensor | None = None
        if any(delta.gain is not None for delta in self._there):
            up = self._there[0].up
            one = torch.ones(up.shape[1], dtype=up.dtype, device=up.device)
            zero = torch.zeros_like(one)
            pairs = [(one, zero) if d is None or d.gain is None else (d.gain, d.shift) for d in (*deltas, None)]
            self.gain = torch.stack([gain for gain, _ in pairs])
            self.shift = torch.stack([zero if shift is None else shift for _, shift in pairs])

    @cached_property
    def together(self) -> tuple[Tensor, Tensor]:
        """`down` and `up` of all, one below the other, so that one product serves the tokens of all."""
        if len(self._there) == 1:
            return self._there[0].down, self._there[0].up
        return torch.cat([delta.down for delta in self._there]), torch.cat([delta.up for delta in self._there])


class Stack:
    """Several adapters, numbered, and what they change of each layer."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        self.numbers = {adapter: number for number, adapter in enumerate(adapters)}
        self._changes: dict[Linear, Change | None] = {}
        self._addresses: tuple[Sequence[Linear], array[int] | None] | None = None

    def change(self, layer: Linear) -> Change | None:
        """What the adapters change of `layer`; `None` where none does."""
        if layer not in self._changes:
            deltas = [adapter.deltas.get(layer) for adapter in self.adapters]
            self._changes[layer] = Change(deltas) if any(delta is not None for delta in deltas) else None
        return self._changes[layer]

    def addresses(self, layers: Sequence[Linear]) -> array[int] | None:
        """Where the pairs of each layer are, 0 where nothing is changed; `None` unless the kernel computes all."""
        if self._addresses is None or self._addresses[0] is not layers:
            changes = [self.change(layer) for layer in layers]
            plain = all(c is None or (c.pairs is not None and c.gain is None) for c in changes)
            places = (0 if c is None or c.pairs is None else c.pairs.address for c in changes)
            self._addresses = layers, array("q", places) if plain else None
        return self._addresses[1]


class Mixer:
    """Makes the selection of each step, and keeps what adapters that are used together change between steps."""

    def __init__(self) -> None:
        self._stack: Stack | None = None

    def select(
        self, adapters: Sequence[Adapter | None], feeds: Sequence[int], device: torch.device
    ) -> Selection | None:
        """The selection for rows with `adapters` that feed so many tokens each; `None` where no row has one."""
        used = [adapter for adapter in dict.fromkeys(adapters) if adapter is not None]
        if not used or not sum(feeds):
            return None
        stack = self._stacked(used, alone=len(used) == 1 and None not in adapters)
        none = len(stack.adapters)
        each = [none if adapter is None else stack.numbers[adapter] for adapter in adapters]
        numbers = [number for number, feed in zip(each, feeds, strict=True) for _ in range(feed)]
        return Selection(stack, numbers, device)

    def _stacked(self, used: list[Adapter], alone: bool) -> Stack:
        """A stack that has all of `used`; the last one, unless most of it would be computed in vain.

        Of one adapter alone, for all tokens, nothing else is computed.
        """
        stack = self._stack
        fits = stack is not None and all(adapter in stack.numbers for adapter in used)
        if stack is None or not fits or (len(stack.adapters) > 2 * len(used) and not alone):
            stack = self._stack = Stack(used)
        return stack
