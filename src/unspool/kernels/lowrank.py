"""Products with low-rank pairs of bf16 matrices on a CPU, by `lowrank.cpp`: each row has its pair, or none.

A row's results are the same bits alone and in company, and on any number of threads. They need AVX-512 BF16; PyTorch
multiplies elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from unspool.kernels import native
from unspool.kernels.linear import PackedWeight, fits as packs
from unspool.kernels.memory import reserve

__all__ = ["LowRankPair", "Pairs", "RowsOfPairs", "fits"]

_LEVELS = ("avx512-bf16", "amx")
_WORD, _THREADS = ctypes.c_void_p, ctypes.c_int
_LANES, _LINE = 16, 32


class _Struct(ctypes.Structure):
    """`LowRank` of `lowrank.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("down", "up", "spans")),
        *((name, ctypes.c_int64) for name in ("rank", "inputs", "outputs")),
    )


@cache
def _function() -> Any:
    """The kernel; `None` where it is missing."""
    if native.level() not in _LEVELS:
        return None
    return native.function("unspool_lowrank", None, *[_WORD] * 7, _THREADS)


def fits(down: Tensor, up: Tensor) -> bool:
    """Whether `down` `[rank, in]` and `up` `[rank, out]` can be packed here: bf16 on a CPU, of an even width."""
    return packs(down) and down.is_cpu and up.is_cpu and up.dtype == torch.bfloat16 and _function() is not None


class LowRankPair:
    """Two bf16 matrices in the kernel's layout, for `y += (x @ down.T) @ up`.

    Args:
        down: `[rank, in]`.
        up: `[rank, out]`; where a block of outputs has zeros only, nothing is kept.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        (rank, self.inputs), (rows, self.outputs) = down.shape, up.shape
        if not fits(down, up) or rows != rank or self.outputs < 1:
            raise ValueError(f"{down.dtype} matrices {list(down.shape)} and {list(up.shape)} are no low-rank pair here")
        with torch.inference_mode(False), torch.no_grad():
            self._down = PackedWeight(down)
            pairs, blocks = -(-rank // 2), -(-self.outputs // _LANES)
            padded = torch.zeros(_LANES * blocks, 2 * pairs, dtype=torch.bfloat16, device="cpu")
            padded[: self.outputs, :rank] = up.detach().t()
            lines = padded.view(blocks, _LANES, pairs, 2).transpose(1, 2).reshape(blocks, pairs, _LINE)
            used, number = (lines != 0).any(2), torch.arange(pairs, device="cpu")
            first = torch.where(used, number, pairs).amin(1)
            end = torch.where(used, number + 1, 0).amax(1)
            first = torch.minimum(first, end)
            kept = (number >= first[:, None]) & (number < end[:, None])
            used_lines = lines[kept]
            self._up = reserve(used_lines.nbytes).view(torch.bfloat16).view_as(used_lines).copy_(used_lines)
            sizes = end - first
            self._spans = torch.stack([sizes.cumsum(0) - sizes, first, end], 1).contiguous()
        self._struct = _Struct(
            self._down.address, self._up.data_ptr(), self._spans.data_ptr(), rank, self.inputs, self.outputs
        )
        self.handle = ctypes.addressof(self._struct)


class RowsOfPairs:
    """Which pair each row of a step has, as the kernel reads it.

    Args:
        numbers: for each row the number of its pair; one outside `range(count)` stands for none.
        count: how many pairs there are.
    """

    def __init__(self, numbers: Sequence[int], count: int) -> None:
        self.rows, self.count = len(numbers), count
        places: list[list[int]] = [[] for _ in range(count)]
        for row, number in enumerate(numbers):
            if 0 <= number < count:
                places[number].append(row)
        flat = [row for some in places for row in some]
        self._places = (ctypes.c_int64 * len(flat))(*flat)
        self._starts = (ctypes.c_int64 * (count + 1))(0, *accumulate(map(len, places)))
        self.places, self.starts = ctypes.addressof(self._places), ctypes.addressof(self._starts)


class Pairs:
    """The pairs of one layer, by number; all of one shape. `None` changes nothing.

    Attributes:
        address: of their handles.
    """

    def __init__(self, pairs: Sequence[LowRankPair | None]) -> None:
        there = [pair for pair in pairs if pair is not None]
        shapes = {(pair.inputs, pair.outputs) for pair in there}
        if len(shapes) != 1:
            raise ValueError(f"pairs of one layer have one shape; got {sorted(shapes)}")
        ((self.inputs, self.outputs),) = shapes
        self._kept = there
        handles = [None if pair is None else pair.handle for pair in pairs]
        self._handles = (ctypes.c_void_p * len(handles))(*handles)
        self.address, self._count, self._function = ctypes.addressof(self._handles), len(handles), _function()

    def add(self, x: Tensor, out: Tensor, rows: RowsOfPairs) -> Tensor:
        """Add to `out` `[rows, out]` what the rows' pairs make of bf16 `x` `[rows, in]`; gives `out`, written over.

        Raises:
            ValueError: shape, dtype or device do not fit the pairs, or `out` is not contiguous.
        """
        for name, tensor, width in (("x", x, self.inputs), ("out", out, self.outputs)):
            if tensor.shape != (rows.rows, width) or tensor.dtype != torch.bfloat16 or not tensor.is_cpu:
                raise ValueError(
                    f"`{name}` must be bfloat16 [{rows.rows}, {width}] on the CPU; got {tensor.dtype} "
                    f"{list(tensor.shape)} on {tensor.device}"
                )
        if rows.count != self._count or not out.is_contiguous():
            raise ValueError(f"rows of {rows.count} pairs, or an `out` with gaps, do not fit {self._count} pairs")
        stride, step = x.stride()
        if step != 1:
            x = x.contiguous()
            stride = x.shape[1]
        threads = torch.get_num_threads()
        self._function(
            self.address, self._count, rows.starts, rows.places, x.data_ptr(), stride, out.data_ptr(), threads
        )
        return out
