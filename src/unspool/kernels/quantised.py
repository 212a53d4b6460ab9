"""Products with quantised weights on a CPU, by `quantised.cpp`: one packed copy of a weight serves any number of rows.

A row's results are the same bits alone and in company, and on any number of threads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool.kernels import native
from unspool.kernels.memory import reserve

__all__ = ["PackedCodes", "usable"]

_WORD, _INT = ctypes.c_void_p, ctypes.c_int
_LANES = 16
# Activations of a row that share a scale where weights are bytes.
_BYTE_GROUP = 64


class _Struct(ctypes.Structure):
    """`QuantisedWeight` of `quantised.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lines", "units", "scales", "offsets", "table")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "group", "nibbles")),
    )


class _Functions(NamedTuple):
    """The entry points of `quantised.cpp`."""

    blocks: Any
    pack: Any
    codes: Any
    rows: Any
    multiply: Any


@cache
def _functions() -> _Functions | None:
    if not native.active():
        return None
    return _Functions(
        blocks=native.function("unspool_quantised_blocks", ctypes.c_int64, _WORD),
        pack=native.function("unspool_quantised_pack", None, *[_WORD] * 4, _INT),
        codes=native.function("unspool_quantised_codes", ctypes.c_int64, *[_WORD] * 4, _INT),
        rows=native.function("unspool_quantised_rows", ctypes.c_int64, *[_WORD] * 4, *[_INT] * 2),
        multiply=native.function("unspool_quantised", None, *[_WORD] * 6, *[_INT] * 3),
    )


def usable() -> bool:
    """Whether the kernels are in use."""
    return _functions() is not None


class PackedCodes:
    """A quantised weight `[out, in]` in the kernels' layout; once filled, it does not change.

    Args:
        outputs, inputs: shape of the weight.
        table: `[16]` numbers that codes of four bits stand for, exact in bf16; `None` for codes of eight bits, which
            stand for -128 to 127.
        group: inputs that share a scale, a multiple of 32; with eight bits, `inputs`.
        offsets: whether a group also has an offset (four bits only).

    Attributes:
        handle: of the weight, for the kernels.

    A weight is `table[code] * scale (+ offset)`. Scales of groups are kept in fp16, relative to a power of two of their
    row.
    """

    def __init__(self, outputs: int, inputs: int, table: Tensor | None, group: int, offsets: bool = False) -> None:
        functions = _functions()
        if functions is None:
            raise ValueError(f"quantised weights cannot be packed here: {native.describe()}")
        nibbles = table is not None
        if table is not None and table.shape != (16,):
            raise ValueError(f"`table` must be [16], for codes of four bits; got {list(table.shape)}")
        if min(outputs, inputs) < 1 or (group % 32 or group < 1 if nibbles else group != inputs or offsets):
            raise ValueError(f"a weight [{outputs}, {inputs}] in groups of {group} has no packed layout")
        self.outputs, self.inputs, self.table, self.group = outputs, inputs, table, group
        self._functions = functions
        padded = int(functions.blocks(outputs)) * _LANES
        step = group if nibbles else _BYTE_GROUP
        self.groups = -(-inputs // step)
        width = self.groups * step
        with torch.inference_mode(False):
            self._lines = reserve(padded * width // (2 if nibbles else 1))
            self._units = torch.zeros(padded, dtype=torch.float32, device="cpu")
            shape = (padded // _LANES, self.groups, _LANES)
            self._scales = torch.zeros(shape, dtype=torch.float16, device="cpu") if nibbles else None
            self._offsets = torch.zeros(shape, dtype=torch.float16, device="cpu") if offsets else None
            self._table = None if table is None else table.to(torch.bfloat16).repeat(2)
        memory = (self._lines, self._units, self._scales, self._offsets, self._table)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in memory]
        self._struct = _Struct(*pointers, outputs, inputs, step, int(nibbles))
        self.handle = ctypes.addressof(self._struct)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        kept = (self._lines, self._units, self._scales, self._offsets)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def write(
        self, first: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None, threads: int | None = None
    ) -> None:
        """Set rows from `first` on. Nothing is right until all rows are written, each once.

        Args:
            first: place of the first row.
            codes: `[n, in]` uint8; codes of eight bits are stored plus 128.
            scales: `[n, groups]` fp32; with eight bits, `[n, 1]`.
            offsets: `[n, groups]` fp32, where the weight has them.
            threads: how many to use; by default torch's number.

        Raises:
            ValueError: a shape or dtype does not fit the weight.
        """
        count = codes.shape[0]
        groups = self.groups if self._scales is not None else 1
        if codes.shape != (count, self.inputs) or not 0 <= first <= self.outputs - count:
            raise ValueError(
                f"codes {list(codes.shape)} for rows {first} to {first + count} are not of a weight "
                f"[{self.outputs}, {self.inputs}]"
            )
        if scales.shape != (count, groups) or (offsets is not None) != (self._offsets is not None):
            raise ValueError(f"`scales` {list(scales.shape)} do not fit: this weight has {groups} groups in a row")
        if offsets is not None and offsets.shape != scales.shape:
            raise ValueError(f"`offsets` {list(offsets.shape)} must have the shape of `scales` {list(scales.shape)}")
        if codes.dtype != torch.uint8 or not codes.is_cpu:
            raise ValueError(f"`codes` must be uint8 on the CPU; got {codes.dtype} on {codes.device}")
        codes, scales = codes.contiguous(), scales.detach().float()
        self._functions.pack(
            self.handle, codes.data_ptr(), first, count, torch.get_num_threads() if threads is None else threads
        )
        if self._scales is None:
            self._units[first : first + count] = scales[:, 0]
            return
        rows = torch.arange(first, first + count, device="cpu")
        largest = scales.abs().amax(dim=1)
        units = torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))))
        self._units[first : first + count] = units
        self._scales[rows // _LANES, :, rows % _LANES] = (scales / units[:, None]).half()
        if self._offsets is not None and offsets is not None:
            self._offsets[rows // _LANES, :, rows % _LANES] = (offsets.detach().float() / units[:, None]).half()

    def read(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes `[n, in]`, scales and offsets `[n, groups]` of the rows at indexes `[n]`, or of a slice of them.

        Raises:
            IndexError: an index lies outside the weight.
            ValueError: indexes have another shape or are not on the CPU.
        """
        if isinstance(rows, slice):
            first, end, _ = rows.indices(self.outputs)
            rows = torch.arange(first, end, device="cpu")
        rows = _indexes(rows)
        count = rows.shape[0]
        codes = torch.empty(count, self.inputs, dtype=torch.uint8, device="cpu")
        threads = torch.get_num_threads()
        self._check(rows, self._functions.codes(self.handle, rows.data_ptr(), count, codes.data_ptr(), threads))
        units = self._units[rows, None]
        if self._scales is None:
            return codes, units, None
        block, lane = rows // _LANES, rows % _LANES
        scales = self._scales[block, :, lane].float().mul_(units)
        return codes, scales, None if self._offsets is None else self._offsets[block, :, lane].float().mul_(units)

    def rows(self, indexes: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights `[n, in]` of the rows at `indexes` `[n]`, in bf16 or fp32.

        Raises:
            IndexError: an index lies outside the weight.
            ValueError: `indexes` has another shape or is not on the CPU, or the dtype is another one.
        """
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"rows are given in bfloat16 or float32, not in {dtype}")
        indexes = _indexes(indexes)
        count = indexes.shape[0]
        out = torch.empty(count, self.inputs, dtype=dtype, device="cpu")
        wide, threads = int(dtype == torch.float32), torch.get_num_threads()
        address = indexes.data_ptr()
        self._check(indexes, self._functions.rows(self.handle, address, count, out.data_ptr(), wide, threads))
        return out

    def _check(self, indexes: Tensor, wrong: int) -> None:
        if wrong >= 0:
            raise IndexError(f"`indexes` holds {int(indexes[wrong])}; rows of this weight lie in [0, {self.outputs})")

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for bf16 or fp32 `x` `[rows, in]` and `bias` `[out]` of its dtype; gives `[rows, out]`.

        Raises:
            ValueError: shape, dtype or device do not fit the weight.
        """
        rows, width = x.shape
        wide = x.dtype == torch.float32
        if width != self.inputs or not (wide or x.dtype == torch.bfloat16) or not x.is_cpu:
            raise ValueError(
                f"`x` must be bfloat16 or float32 [rows, {self.inputs}] on the CPU; got {x.dtype} {list(x.shape)} on "
                f"{x.device}"
            )
        if bias is not None:
            if bias.dtype != x.dtype or bias.shape != (self.outputs,) or not bias.is_cpu:
                shape = list(bias.shape)
                raise ValueError(f"`bias` must be {x.dtype} [{self.outputs}] on the CPU; got {bias.dtype} {shape}")
            bias = bias.contiguous()
        if wide and self._scales is not None:
            # Exact products need bf16: an fp32 number is the sum of two, but for its last eight bits.
            upper = x.bfloat16()
            both = self._multiply(torch.cat((upper, (x - upper.float()).bfloat16())), None, True)
            out = both[:rows].add_(both[rows:])
            return out if bias is None else out.add_(bias)
        return self._multiply(x, bias, wide)

    def _multiply(self, x: Tensor, bias: Tensor | None, wide: bool) -> Tensor:
        stride, step = x.stride()
        if step != 1:
            x = x.contiguous()
            stride = x.shape[1]
        rows = x.shape[0]
        out = torch.empty((rows, self.outputs), dtype=torch.float32 if wide else torch.bfloat16, device="cpu")
        added = None if bias is None else bias.data_ptr()
        wide_x = x.dtype == torch.float32
        threads = torch.get_num_threads()
        self._functions.multiply(self.handle, x.data_ptr(), stride, added, out.data_ptr(), rows, wide_x, wide, threads)
        return out


def _indexes(rows: Tensor) -> Tensor:
    if not rows.is_cpu or rows.dim() != 1:
        raise ValueError(f"`indexes` must be [n] on the CPU; got {list(rows.shape)} on {rows.device}")
    return rows.to(torch.int64).contiguous()
