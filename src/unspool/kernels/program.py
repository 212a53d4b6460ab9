"""A decoder's step as a list of operations, by `program.cpp`: one call runs all layers.

At a few rows, calling every operation from Python would cost as much as its numbers. The operations are those of
`linear`, `quantised`, `attention`, `elementwise` and `lowrank`; called one by one, they give the same bits.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool.kernels import native
from unspool.kernels.attention import Plan, Pools
from unspool.kernels.linear import PackedWeight
from unspool.kernels.lowrank import RowsOfPairs
from unspool.kernels.quantised import PackedCodes
from unspool.kernels.structs import Continuation, Operation, Step

__all__ = ["INPUT", "Adapted", "Chosen", "Past", "Program", "Stops"]

INPUT = -1
"""The buffer of a step's input."""

_NO_MEMORY = "attention found no memory for its partial results"
_BYTES = {torch.bfloat16: 2, torch.float32: 4}
# Numbers; so that buffers of a token begin on lines of the cache, whatever the number of tokens.
_UNIT = 32
_NORM, _ADD_NORM, _NORM_PARTS, _TURN, _ATTEND, _PRODUCT, _QUANTISED, _GATE, _ADD = range(9)


class Past(NamedTuple):
    """Where the rows of a step have their keys and values: plans of each group of layers, and the layers' pools."""

    plans: Sequence[Plan]
    pools: Pools


class Adapted(NamedTuple):
    """What low-rank adapters add to the products of a step.

    Attributes:
        pairs: addresses of each product's handles, by its number, or 0 (`lowrank.Pairs.address`).
        rows: which pair each row has.
    """

    pairs: array[int]
    rows: RowsOfPairs


class Stops(NamedTuple):
    """When rows that go on by themselves end; see `Program.go_on`.

    Attributes:
        limits: tokens that each row may choose.
        ends: tokens that end a row.
        confidence: a row ends with the first token of less probability than that; 0 never does.
    """

    limits: Sequence[int]
    ends: Collection[int] = ()
    confidence: float = 0.0


class Chosen(NamedTuple):
    """What a row chose in `Program.go_on`.

    Attributes:
        tokens: one after the other, also past the row's end; -1 where there was nothing to choose.
        shares: how probable each was; 1.0 where nobody asked for confidence.
    """

    tokens: list[int]
    shares: list[float]


class Buffer(NamedTuple):
    """Numbers of every token of a step: where they lie, and how many they are."""

    place: int
    width: int


@cache
def _function() -> Any:
    return native.function("unspool_run", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


@cache
def _continue() -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return native.function("unspool_continue", number, pointer, number, pointer, pointer)


def _checked(tensor: Tensor | None, width: int, dtype: torch.dtype) -> int | None:
    """The address of `[width]` numbers."""
    if tensor is None:
        return None
    if tensor.shape != (width,) or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"a weight of {tensor.dtype} {list(tensor.shape)} is none of {dtype} [{width}] on the CPU")
    return tensor.data_ptr()


class Program:
    """Operations over buffers; `fits` says whether a step can be one at all.

    Args:
        width: of the input.
        dtype: of all numbers.

    Every method that writes an operation raises ValueError where weights or buffers do not fit it.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        if dtype not in _BYTES or not native.active():
            raise ValueError(f"there are no programs for {dtype} here: {native.describe()}")
        self.dtype = dtype
        self.input = Buffer(INPUT, width)
        self._operations: list[Operation] = []
        self._kept: list[object] = []
        self._top = self._size = 0
        self._heads: tuple[int, int] | None = None  # key heads and width of one, in all layers
        self._groups: list[int] = []  # of the layers
        self._turned: int | None = None
        self.products = 0
        self._code: ctypes.Array[Operation] | None = None
        self._checked_table: tuple[tuple[Tensor, Tensor], tuple[int, int, int]] | None = None

    def buffer(self, width: int) -> Buffer:
        """A new one."""
        made = Buffer(self._top, width)
        self._top += -(-width // _UNIT) * _UNIT
        self._size = max(self._size, self._top)
        return made

    def release(self, first: Buffer) -> None:
        """Let new buffers take the place of `first` and all that were made after it."""
        self._top = first.place

    def norm(self, x: Buffer, weight: Tensor, eps: float, out: Buffer) -> None:
        """`out = rms_norm(x)`."""
        self._same(x, out)
        address = _checked(weight, x.width, self.dtype)
        self._write(_NORM, x, out, weight=address, width=x.width, first=eps)
        self._kept.append(weight)

    def add_norm(self, x: Buffer, branch: Buffer, weight: Tensor, eps: float, out: Buffer) -> None:
        """`branch += x`, and `out = rms_norm(branch)`."""
        self._same(x, branch, out)
        address = _checked(weight, x.width, self.dtype)
        self._write(_ADD_NORM, x, out, other=branch.place, weight=address, width=x.width, first=eps)
        self._kept.append(weight)

    def norm_parts(self, x: Buffer, first: int, parts: int, weight: Tensor, eps: float) -> None:
        """Norm `parts` parts of `x`, each as wide as the weight, from number `first` on; in place."""
        width = weight.shape[0]
        if first < 0 or first + parts * width > x.width:
            raise ValueError(f"{parts} parts of {width} numbers from {first} on are not in {x.width}")
        address = _checked(weight, width, self.dtype)
        self._write(
            _NORM_PARTS, x, x, weight=address, width=width, parts=parts, stride=x.width, number=first, first=eps
        )
        self._kept.append(weight)

    def turn(self, x: Buffer, heads: int, dim: int, turned: int) -> None:
        """Turn the first `turned` numbers of each of the first `heads` heads of `x`, in place."""
        if heads * dim > x.width or turned > dim or turned % 2 or self._turned not in (None, turned):
            raise ValueError(f"{turned} numbers of {heads} heads of {dim} cannot be turned in {x.width}")
        self._turned = turned
        self._write(_TURN, x, x, width=dim, parts=heads, stride=x.width)

    def attend(
        self,
        qkv: Buffer,
        heads: int,
        kv_heads: int,
        dim: int,
        out: Buffer,
        *,
        group: int,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        """Store the next layer's keys and values, which lie behind the queries in `qkv`, and answer the queries."""
        if (heads + 2 * kv_heads) * dim != qkv.width or heads * dim != out.width or heads % kv_heads:
            raise ValueError(f"{heads} and {kv_heads} heads of {dim} are not {qkv.width} and {out.width} numbers")
        if self._heads not in (None, (kv_heads, dim)):
            raise ValueError(f"layers have {self._heads} and {(kv_heads, dim)} key heads")
        self._heads, layer = (kv_heads, dim), len(self._groups)
        self._groups.append(group)
        self._write(
            _ATTEND,
            qkv,
            out,
            other=group,
            width=dim,
            parts=heads,
            stride=kv_heads,
            number=layer,
            first=scale,
            second=softcap or 0.0,
        )

    def product(self, x: Buffer, weight: PackedWeight | PackedCodes, bias: Tensor | None, out: Buffer) -> None:
        """`out = x @ weight.T + bias`, and what the step's adapters add to it."""
        if weight.inputs != x.width or weight.outputs != out.width:
            raise ValueError(f"a weight [{weight.outputs}, {weight.inputs}] gives no {out.width} of {x.width} numbers")
        bytes_only = isinstance(weight, PackedCodes) and weight.table is None
        if self.dtype != torch.bfloat16 and not bytes_only:
            raise ValueError(f"this weight takes no {self.dtype}")
        kind = _QUANTISED if isinstance(weight, PackedCodes) else _PRODUCT
        address = _checked(bias, weight.outputs, self.dtype)
        self._write(kind, x, out, weight=weight.handle, bias=address, width=x.width, number=self.products)
        self._kept += [weight, bias]
        self.products += 1

    def gate(self, x: Buffer, out: Buffer) -> None:
        """`out = silu(gate) * up` of `x`, a gate and then `up`."""
        if x.width != 2 * out.width:
            raise ValueError(f"{x.width} numbers are not twice {out.width}")
        self._write(_GATE, x, out, width=out.width)

    def add(self, x: Buffer | None, branch: Buffer, factor: float = 1.0) -> None:
        """`branch = branch * factor + x`; where there is no `x`, none is added."""
        if x is not None:
            self._same(x, branch)
        self._write(
            _ADD, branch if x is None else x, branch, width=branch.width, parts=int(x is not None), first=factor
        )

    def run(
        self, x: Tensor, out: Buffer, past: Past, turn: tuple[Tensor, Tensor] | None, adapted: Adapted | None = None
    ) -> Tensor:
        """Run a step; gives `[tokens, out.width]`.

        Args:
            x: `[tokens, width]`, the input.
            out: the buffer that is the result.
            past: of the rows, whose new tokens these are.
            turn: cosines and sines `[tokens, 1, turned]`, the first half of the sines negated.
            adapted: what adapters add.

        Raises:
            ValueError: something does not fit the program.
            MemoryError: attention found no memory.
        """
        tokens, width = x.shape
        fine = (width, x.dtype, x.is_cpu, x.is_contiguous()) == (self.input.width, self.dtype, True, True)
        if not fine:
            raise ValueError(f"the input must be {self.dtype} [tokens, {self.input.width}] on the CPU")
        cos = sin = None
        if self._turned is not None:
            shape = (tokens, 1, self._turned)
            if turn is None or any(
                t.shape != shape or t.dtype != self.dtype or not t.is_cpu or not t.is_contiguous() for t in turn
            ):
                raise ValueError(f"cosines and sines must be {self.dtype} {list(shape)} on the CPU")
            cos, sin = turn[0].data_ptr(), turn[1].data_ptr()
        plans = self._plans(past, tokens)
        buffers = torch.empty(tokens * self._size, dtype=self.dtype, device="cpu")
        step = self._step(tokens, x.data_ptr(), buffers, (cos, sin), plans, past.pools)
        if adapted is not None:
            rows = adapted.rows
            if rows.rows != tokens or len(adapted.pairs) != self.products or self.dtype != torch.bfloat16:
                raise ValueError(f"adapters of {rows.rows} rows and {len(adapted.pairs)} products do not fit")
            step.pairs, step.pair_count = adapted.pairs.buffer_info()[0], rows.count
            step.starts, step.places = rows.starts, rows.places
        if _function()(*self._coded(), ctypes.addressof(step)):
            raise MemoryError(_NO_MEMORY)
        first = out.place * tokens
        return buffers[first : first + tokens * out.width].view(tokens, out.width)

    def go_on(
        self,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[int],
        out: Buffer,
        past: Past,
        table: tuple[Tensor, Tensor] | None,
        embedding: PackedWeight | PackedCodes | Tensor,
        stops: Stops,
    ) -> tuple[list[Chosen], int]:
        """Steps in which every row feeds one token: first its given ones, then the likeliest after the one before.

        They are as many as the limits ask for, or fewer when more than half of the rows have ended; rows that ended go
        along. The plans are of no use afterwards.

        Args:
            tokens: of each row, to be fed first, one or more.
            positions: of the first of them.
            out: the buffer of the logits.
            past: of the rows; their plans are those of the first step, with room for all.
            table: cosines and sines `[positions, 1, turned]` of all positions from 0 on.
            embedding: gives the tokens' inputs.
            stops: when rows end.

        Returns:
            What each row chose after its given tokens, and how many steps there were.

        Raises:
            ValueError: something does not fit the program, or there is no room.
            MemoryError: attention found no memory.
        """
        rows, width = len(tokens), self.input.width
        if not 0 < rows == len(positions) == len(stops.limits) or min(stops.limits) < 1 or not all(tokens):
            raise ValueError(f"{rows} rows, {len(positions)} positions and limits {list(stops.limits)} do not fit")
        ahead = [len(some) - 1 for some in tokens]
        takes = [more + limit for more, limit in zip(ahead, stops.limits, strict=True)]
        steps = max(takes)
        form, address = self._embedding(embedding, out.width)
        if min(map(min, tokens)) < 0 or max(map(max, tokens)) >= out.width:
            raise ValueError(f"tokens {list(tokens)} are not of {out.width}")
        last = max(positions) + steps
        cos, sin, known = self._table(table)
        if cos is not None and (min(positions) < 0 or last > known):
            raise ValueError(f"{last} positions are not in a table of {known}")
        if any(plan.room < steps - 1 for plan in past.plans):
            raise ValueError(f"the plans have no room for {steps} steps")
        plans = self._plans(past, rows)
        _, inputs, cosines, sines, step = self._fed(rows, past, plans)
        fed = [some[step] if step < len(some) else -1 for step in range(steps) for some in tokens]
        chosen, shares = array("q", [-1] * len(fed)), array("f", [1.0] * len(fed))
        lists = [array("q", some) for some in (positions, takes, stops.ends, plans[::2], fed)]
        place, limits, ends, heads, given = (some.buffer_info()[0] for some in lists)
        continuation = Continuation(
            address,
            form,
            width,
            out.place,
            out.width,
            cos,
            sin,
            known,
            rows,
            steps,
            given,
            chosen.buffer_info()[0],
            place,
            heads,
            len(past.plans),
            limits,
            ends,
            len(stops.ends),
            stops.confidence,
            shares.buffer_info()[0],
            inputs,
            cosines,
            sines,
        )
        done = _continue()(*self._coded(), ctypes.addressof(step), ctypes.addressof(continuation))
        if done < 0:
            raise MemoryError(_NO_MEMORY)
        places = (slice(rows * more + row, rows * done, rows) for row, more in enumerate(ahead))
        return [Chosen(chosen[place].tolist(), shares[place].tolist()) for place in places], done

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        out: Buffer,
        past: Past,
        table: tuple[Tensor, Tensor] | None,
        embedding: PackedWeight | PackedCodes | Tensor,
    ) -> Tensor | None:
        """One step from the tokens on; gives the logits `[rows, out.width]`.

        Args:
            tokens: `[rows]`, int64, of each row one.
            positions: `[rows]`, int64, theirs.
            out, past, table, embedding: as in `go_on`.

        Returns:
            `None` where a token is none of the embedding's, or a position none of the table's.

        Raises:
            ValueError: something does not fit the program.
            MemoryError: attention found no memory.
        """
        rows = tokens.shape[0]
        if any(
            some.shape != (rows,) or some.dtype != torch.int64 or not some.is_cpu or not some.is_contiguous()
            for some in (tokens, positions)
        ):
            raise ValueError("tokens and positions must be int64 [rows] on the CPU")
        form, address = self._embedding(embedding, out.width)
        cos, sin, known = self._table(table)
        plans = self._plans(past, rows)
        numbers, inputs, cosines, sines, step = self._fed(rows, past, plans)
        continuation = Continuation(
            address, form, self.input.width, out.place, out.width, cos, sin, known, rows, 1, tokens.data_ptr()
        )
        continuation.positions = positions.data_ptr()
        continuation.input, continuation.turned_cos, continuation.turned_sin = inputs, cosines, sines
        done = _continue()(*self._coded(), ctypes.addressof(step), ctypes.addressof(continuation))
        if done == -1:
            raise MemoryError(_NO_MEMORY)
        first = out.place * rows
        return None if done < 0 else numbers[first : first + rows * out.width].view(rows, out.width)

    def _fed(self, rows: int, past: Past, plans: array[int]) -> tuple[Tensor, int, int, int, Step]:
        """Memory of a step that feeds itself; in it, the addresses of its inputs, cosines and sines; and the step."""
        width, turned = self.input.width, self._turned or 0
        numbers = torch.empty(rows * (self._size + width + 2 * turned), dtype=self.dtype, device="cpu")
        size = _BYTES[self.dtype]
        inputs = numbers.data_ptr() + size * rows * self._size
        cosines = inputs + size * rows * width
        sines = cosines + size * rows * turned
        return numbers, inputs, cosines, sines, self._step(rows, inputs, numbers, (cosines, sines), plans, past.pools)

    def _table(self, table: tuple[Tensor, Tensor] | None) -> tuple[int | None, int | None, int]:
        """Addresses of cosines and sines, and of how many positions they are."""
        if self._turned is None:
            return None, None, 0
        if table is None:
            raise ValueError("this program turns, and needs a table")
        if self._checked_table is not None and self._checked_table[0] is table:
            return self._checked_table[1]
        cos, sin = table
        shape = (cos.shape[0], 1, self._turned)
        if any(t.shape != shape or t.dtype != self.dtype or not t.is_cpu or not t.is_contiguous() for t in table):
            raise ValueError(f"cosines and sines must be {self.dtype} [positions, 1, {self._turned}] on the CPU")
        addresses = cos.data_ptr(), sin.data_ptr(), shape[0]
        self._checked_table = table, addresses
        return addresses

    def _embedding(self, embedding: PackedWeight | PackedCodes | Tensor, tokens: int) -> tuple[int, int]:
        """Form and address of a table of inputs for so many tokens."""
        if isinstance(embedding, Tensor):
            outputs, inputs = embedding.shape
            fine = embedding.dtype == self.dtype and embedding.is_cpu and embedding.is_contiguous()
            form, address = 2, embedding.data_ptr()
        else:
            outputs, inputs = embedding.outputs, embedding.inputs
            fine = isinstance(embedding, PackedCodes) or self.dtype == torch.bfloat16
            form, address = int(isinstance(embedding, PackedCodes)), embedding.handle
        if not fine or inputs != self.input.width or outputs < tokens:
            raise ValueError(f"an embedding [{outputs}, {inputs}] gives no {self.dtype} inputs for {tokens} tokens")
        return form, address

    def _step(
        self,
        tokens: int,
        inputs: int,
        buffers: Tensor,
        turn: tuple[int | None, int | None],
        plans: array[int],
        pools: Pools,
    ) -> Step:
        step = Step(
            tokens,
            _BYTES[self.dtype],
            inputs,
            buffers.data_ptr(),
            *turn,
            self._turned or 0,
            plans.buffer_info()[0],
            pools.address,
        )
        step.threads = torch.get_num_threads()
        return step

    def _coded(self) -> tuple[int, int]:
        """Address and number of the operations."""
        if self._code is None:
            self._code = (Operation * len(self._operations))(*self._operations)
        return ctypes.addressof(self._code), len(self._code)

    def _plans(self, past: Past, tokens: int) -> array[int]:
        """Addresses of the plans, of which each fits its pools."""
        plans, pools = past
        if pools.dtype != self.dtype or pools.groups[: len(self._groups)] != self._groups or pools.heads != self._heads:
            raise ValueError(
                f"pools of {len(pools.groups)} layers with heads of {pools.heads} {pools.dtype} do not fit"
            )
        addresses = array("q")
        for plan, slots in zip(plans, pools.slots, strict=True):
            if plan.tokens != tokens or plan.slots > slots:
                raise ValueError(
                    f"a plan for {plan.tokens} tokens and {plan.slots} slots is not for {tokens} in {slots}"
                )
            addresses.extend(plan.addresses)
        return addresses

    def _same(self, *buffers: Buffer) -> None:
        if len({buffer.width for buffer in buffers}) != 1:
            raise ValueError(f"buffers of {[buffer.width for buffer in buffers]} numbers differ")

    def _write(
        self,
        kind: int,
        source: Buffer,
        target: Buffer,
        *,
        other: int = 0,
        weight: int | None = None,
        bias: int | None = None,
        width: int = 0,
        parts: int = 0,
        stride: int = 0,
        number: int = 0,
        first: float = 0.0,
        second: float = 0.0,
    ) -> None:
        if target.place == INPUT:
            raise ValueError("the input cannot be written")
        self._operations.append(
            Operation(
                kind, source.place, target.place, other, weight, bias, width, parts, stride, number, first, second
            )
        )
