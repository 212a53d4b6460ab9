"""Attention over paged pools on a CPU, by `attention.h`.

One call a layer stores the new keys and values of a step and answers its queries, whether a row has one query or many.

A token's results are the same bits alone and in company, on any number of threads, and whether its prompt came whole or
in chunks.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from operator import gt, lt

import numpy as np
import torch
from torch import Tensor

from unspool.kernels import native

__all__ = ["Plan", "Pools", "fits"]

_DTYPES = {torch.bfloat16: 2, torch.float32: 4}
_MOST_DIM = 256
_HEAD, _ROW = 3, 4  # numbers of a plan before its rows, and of a row; see `attention.h`
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
# Strides are declared as pointers too, which is the cheaper conversion; both have 64 bits.
_ARGUMENTS = (_POINTER,) * 2 + (_INT,) * 4 + (_POINTER,) * 9 + (_FLOAT,) * 2 + (_INT,)


def fits(dtype: torch.dtype, device: torch.device, dim: int, block_size: int) -> bool:
    """Whether pools with `dim` numbers in a head and `block_size` tokens in a block can be read."""
    return (
        device.type == "cpu"
        and dtype in _DTYPES
        and dim % 16 == 0
        and 0 < dim <= _MOST_DIM
        and block_size % 16 == 0
        and native.active()
    )


class Plan:
    """Where the rows of a step have their past, for all layers in which they have the same blocks.

    Args:
        lengths: tokens of each row, the new ones included.
        feeds: how many of them are new.
        tables: block numbers of each row, for at least as many tokens; those that no token sees may be any number.
        block_size: tokens in a block.
        window: how many tokens a query sees, itself included; `None` sees all before it.
        ahead: room for so many more blocks of each row, that `advance` may bring.

    Raises:
        ValueError: a row has no new tokens or more than it is long, its table is too short or holds a negative number,
            blocks are of no whole sixteens, or a window sees nothing.
    """

    __slots__ = (
        "_address",
        "_block",
        "_caps",
        "_ends",
        "_lengths",
        "_memory",
        "_slots",
        "_tables",
        "_window",
        "tokens",
    )

    def __init__(
        self,
        lengths: Sequence[int],
        feeds: Sequence[int],
        tables: Sequence[list[int]],
        block_size: int,
        window: int | None = None,
        *,
        ahead: int = 0,
    ) -> None:
        if block_size % 16 or block_size < 1 or (window is not None and window < 1):
            raise ValueError(
                f"blocks of {block_size} tokens and a window of {window} cannot be; they are 16 n and 1 or more"
            )
        plan = [len(lengths), block_size, window or 0]
        unused, ends, caps = [0] * ahead, [], []
        blocks: list[int] = []
        tokens = 0
        for length, feed, table in zip(lengths, feeds, tables, strict=True):
            need = -(-length // block_size)
            if not 0 < feed <= length:
                raise ValueError(f"a row of {length} tokens cannot have {feed} new ones")
            if need > len(table):
                raise ValueError(f"a row of {length} tokens does not fit {len(table)} blocks of {block_size}")
            seen = _seen(length, feed, window, block_size)
            plan += (length, feed, tokens, len(blocks) - seen)  # no block before that is looked up
            end = len(table) if ahead else need
            blocks += table[seen:end]
            blocks += unused
            caps.append(end * block_size)
            ends.append(len(blocks))
            tokens += feed
        self.tokens = tokens
        # An array of Python's own is made from a list of numbers much faster than numpy's.
        self._memory = array("q", plan + blocks)
        self._address, _ = self._memory.buffer_info()
        used = np.frombuffer(self._memory, dtype=np.uint64)[len(plan) :]
        self._tables = self._address + 8 * len(plan)
        self._block, self._window = block_size, window
        self._ends, self._caps, self._lengths = ends, caps, list(lengths)
        most = int(used.max())  # of which a negative number is the greatest
        if most >= 1 << 63:
            raise ValueError(f"a row has the block {most - (1 << 64)}; blocks are counted from 0")
        self._slots = (most + 1) * block_size

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the plan and its tables, as the kernels read them."""
        return self._address, self._tables

    @property
    def slots(self) -> int:
        """How many slots a pool must have."""
        return self._slots

    @property
    def room(self) -> int:
        """How many more tokens every row's blocks can take."""
        return min(cap - length for cap, length in zip(self._caps, self._lengths, strict=True))

    def advance(self, lengths: Sequence[int], changed: Sequence[tuple[int, list[int]]]) -> bool:
        """Make it the plan of a later step, in which the same rows have one new token each.

        Args:
            lengths: `[rows]`, the new tokens included; not less than before.
            changed: place and table of each row whose table is another one.

        Returns:
            Whether it could be; if not, make a new plan.
        """
        memory, rows = self._memory, len(self._lengths)
        first = _HEAD + _ROW * rows
        for place, table in changed:
            begin = memory[_HEAD + _ROW * place + 3]
            seen = _seen(lengths[place], 1, self._window, self._block)
            blocks = table[seen:]
            if begin + len(table) > self._ends[place] or min(blocks, default=-1) < 0:
                return False
            memory[first + begin + seen : first + begin + len(table)] = array("q", blocks)
            self._caps[place] = len(table) * self._block
            self._slots = max(self._slots, (max(blocks) + 1) * self._block)
        if any(map(gt, lengths, self._caps)) or any(map(lt, lengths, self._lengths)):
            return False
        self._lengths = list(lengths)
        memory[_HEAD:first:_ROW] = array("q", lengths)
        return True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Store the new `k` and `v`, and answer `q`; gives `[tokens, heads * dim]`.

        Args:
            q: `[tokens, heads, dim]`, row by row.
            k, v: `[tokens, kv_heads, dim]`.
            keys, values: pools `[slots, kv_heads, dim]`.
            scale: multiplies the scores.
            softcap: bounds them, by `softcap * tanh(score / softcap)`.

        Raises:
            ValueError: shapes, layouts or dtypes do not fit each other or the plan.
        """
        tokens, heads, dim = q.shape
        slots, kv_heads, _ = shape = keys.shape
        new = (tokens, kv_heads, dim)
        dtype = q.dtype
        if (
            tokens != self.tokens
            or slots < self._slots
            or shape[2] != dim
            or heads % kv_heads
            or values.shape != shape
            or k.shape != new
            or v.shape != new
            or dtype not in _DTYPES
            or dim % 16
            or dim > _MOST_DIM
            or not dtype == k.dtype == v.dtype == keys.dtype == values.dtype
            or not (q.is_cpu and k.is_cpu and v.is_cpu and keys.is_cpu and values.is_cpu)
            or not (keys.is_contiguous() and values.is_contiguous())
        ):
            raise ValueError(
                f"attention over {tuple(shape)} keys and {tuple(values.shape)} values of {keys.dtype}, with "
                f"{self._slots} slots in use, cannot take {self.tokens} tokens as {tuple(q.shape)} queries, "
                f"{tuple(k.shape)} keys and {tuple(v.shape)} values of {dtype}"
            )
        q, k, v = _plain(q), _plain(k), _plain(v)
        out = q.new_empty(tokens, heads * dim)
        failed = _function()(
            self._address,
            self._tables,
            _DTYPES[dtype],
            heads,
            kv_heads,
            dim,
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            scale,
            softcap or 0.0,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("attention found no memory for its partial results")
        return out


class Pools:
    """Keys and values of all layers, as a program's attention reads them.

    Args:
        pools: keys and values of each layer in turn, `[slots, kv_heads, dim]`.
        groups: the group of each layer.

    Attributes:
        groups: the same.
        heads: `(kv_heads, dim)` of all layers.
        dtype: of the numbers.
        slots: that each group's layers have.
        address: of the pools' addresses, side by side.

    Raises:
        ValueError: layers differ in their heads or dtype, or a pool cannot be read.
    """

    __slots__ = ("_addresses", "_kept", "address", "dtype", "groups", "heads", "slots")

    def __init__(self, pools: Sequence[Tensor], groups: Sequence[int]) -> None:
        first = pools[0]
        _, kv_heads, dim = first.shape
        self.dtype, self.heads, self.groups = first.dtype, (kv_heads, dim), list(groups)
        self.slots = [0] * (max(groups) + 1)
        for pool, group in zip(pools, (group for group in groups for _ in "kv"), strict=True):
            slots, *heads = pool.shape
            if pool.dtype != self.dtype or heads != [kv_heads, dim] or not pool.is_cpu or not pool.is_contiguous():
                raise ValueError(
                    f"a pool {list(pool.shape)} of {pool.dtype} is none of {kv_heads} x {dim} {self.dtype}"
                )
            if self.slots[group] not in (0, slots):
                raise ValueError(f"layers of one group have pools of {self.slots[group]} and {slots} slots")
            self.slots[group] = slots
        self._kept = list(pools)
        self._addresses = array("q", [pool.data_ptr() for pool in pools])
        self.address, _ = self._addresses.buffer_info()


def _seen(length: int, feed: int, window: int | None, block_size: int) -> int:
    """The first block that any of a row's new tokens sees."""
    return 0 if window is None else max(0, length - feed + 1 - window) // block_size


@cache
def _function() -> ctypes._NamedFuncPointer:
    return native.function("unspool_attend", ctypes.c_int, *_ARGUMENTS)


def _plain(x: Tensor) -> Tensor:
    """`x` `[tokens, heads, dim]` with the numbers of a token side by side."""
    _, stride, step = x.stride()
    return x if step == 1 and stride == x.shape[2] else x.contiguous()
