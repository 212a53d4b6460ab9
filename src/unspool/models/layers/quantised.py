"""Weights of four or eight bits: how they are written, and how they are multiplied.

A weight is `table[code] * scale + offset`; a scale (and an offset, where there are any) belongs to a group of inputs of
one output. Where the compiled kernels are in use, codes are kept in their layout; elsewhere, and on other devices, rows
are brought back some at a time and multiplied by PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.kernels.quantised import PackedCodes, usable

__all__ = ["FP4", "FP4_TABLE", "INT4", "INT8", "NF4", "NF4_TABLE", "Code", "Codes", "QuantisedForm", "dequantise"]

# Weights that are brought back at a time where PyTorch multiplies.
_AT_ONCE = 16 * 2**20

NF4_TABLE = (  # quantiles of the normal distribution (Dettmers et al., 2023, appendix E)
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)  # a sign, two bits of exponent, one of mantissa
FP4_TABLE = (*_FP4, *(-value for value in _FP4))


@dataclass(frozen=True, slots=True)
class Code:
    """How weights are written.

    Attributes:
        name: of the format.
        table: what the codes 0 to 15 stand for, in bf16's precision; `None`: codes of eight bits, of which 128 is 0.
        group: inputs that share a scale; 0 for all inputs of an output.
        offsets: whether groups have offsets besides.
    """

    name: str
    table: tuple[float, ...] | None
    group: int = 0
    offsets: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.table is None else 4

    def groups(self, inputs: int) -> int:
        """Scales that a row of so many inputs has."""
        return -(-inputs // self.group) if self.group else 1

    def nbytes(self, outputs: int, inputs: int) -> int:
        """About how much memory a weight takes."""
        scales = self.groups(inputs) * 2 * (1 + self.offsets) if self.bits == 4 else 0
        return outputs * (inputs * self.bits // 8 + scales + 4)


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float32).bfloat16().tolist())


INT8 = Code("int8", None)
INT4 = Code("int4", tuple(float(value) for value in range(-8, 8)), 64)
NF4 = Code("nf4", _rounded(NF4_TABLE), 64)
FP4 = Code("fp4", _rounded(FP4_TABLE), 64)


class Codes(NamedTuple):
    """Rows of a quantised weight.

    Attributes:
        codes: `[n, in]` uint8.
        scales: `[n, groups]` fp32.
        offsets: `[n, groups]` fp32, where the code has them.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None


def dequantise(code: Code, rows: Codes) -> Tensor:
    """The weights `[n, in]` in fp32."""
    count, inputs = rows.codes.shape
    if code.table is None:
        values = rows.codes.float().sub_(128)
    else:
        table = torch.tensor(code.table, dtype=torch.float32, device=rows.codes.device)
        values = table.index_select(0, rows.codes.reshape(-1).int()).view(count, inputs)
    group = code.group or inputs
    if inputs % group:
        values = F.pad(values, (0, -inputs % group))
    grouped = values.view(count, -1, group)
    grouped.mul_(rows.scales[:, :, None])
    if rows.offsets is not None:
        grouped.add_(rows.offsets[:, :, None])
    return values[:, :inputs]


class _PlainCodes:
    """Codes on any device, row by row, two of four bits in a byte; for PyTorch's own operations."""

    def __init__(self, outputs: int, inputs: int, code: Code, device: torch.device) -> None:
        self._code, self._inputs = code, inputs
        half = code.bits == 4
        with torch.inference_mode(False):
            width = (inputs + 1) // 2 if half else inputs
            self._bytes = torch.zeros(outputs, width, dtype=torch.uint8, device=device)
            self._scales = torch.zeros(outputs, code.groups(inputs), dtype=torch.float32, device=device)
            self._offsets = torch.zeros_like(self._scales) if code.offsets else None

    @property
    def nbytes(self) -> int:
        kept = (self._bytes, self._scales, self._offsets)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def write(self, first: int, rows: Codes) -> None:
        codes, place = rows.codes, slice(first, first + rows.codes.shape[0])
        if self._code.bits == 4:
            codes = F.pad(codes, (0, self._inputs % 2))
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        self._bytes[place] = codes.to(self._bytes.device)
        self._scales[place] = rows.scales
        if self._offsets is not None and rows.offsets is not None:
            self._offsets[place] = rows.offsets

    def read(self, rows: Tensor | slice) -> Codes:
        codes = self._bytes[rows]
        if self._code.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, : self._inputs]
        return Codes(codes, self._scales[rows], None if self._offsets is None else self._offsets[rows])


class QuantisedForm:
    """A quantised weight `[out, in]`; once filled, it does not change.

    Args:
        outputs, inputs: its shape.
        code: how it is written.
        dtype: of the weight when it is brought back, and of the table's rows.
        device: where it is kept.
    """

    lossless = False

    def __init__(
        self, outputs: int, inputs: int, code: Code, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.outputs, self.inputs, self.code, self.dtype = outputs, inputs, code, dtype
        self.device = torch.device(device)
        self._packed: PackedCodes | None = None
        self._plain: _PlainCodes | None = None
        if self.device.type == "cpu" and usable() and code.group % 32 == 0:
            table = None if code.table is None else torch.tensor(code.table, dtype=torch.float32)
            self._packed = PackedCodes(outputs, inputs, table, code.group or inputs, code.offsets)
        else:
            self._plain = _PlainCodes(outputs, inputs, code, self.device)

    @property
    def invariant(self) -> bool:
        """See `packed.PackedForm`: the kernels compute it."""
        return self._packed is not None and self.dtype in (torch.bfloat16, torch.float32)

    @property
    def compiled(self) -> PackedCodes | None:
        """The weight as the compiled kernels have it, where they do."""
        return self._packed

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        kept = self._packed or self._plain
        assert kept is not None
        return kept.nbytes

    def write(self, first: int, rows: Codes, threads: int | None = None) -> None:
        """Set rows from `first` on. Nothing is right until all rows are written, each once."""
        if self._packed is not None:
            self._packed.write(first, rows.codes, rows.scales, rows.offsets, threads)
        elif self._plain is not None:
            self._plain.write(first, rows)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[rows, in]`, without gradients."""
        if self._packed is not None and x.dtype in (torch.bfloat16, torch.float32):
            return self._packed.product(x, bias)
        parts = [F.linear(x, dequantise(self.code, part).to(x.dtype)) for part in self._parts()]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if bias is None else out.add_(bias)

    def rows(self, indexes: Tensor) -> Tensor:
        """Rows `[n, in]` of the weight at `indexes` `[n]`.

        Raises:
            IndexError: an index lies outside the weight.
        """
        if self._packed is not None and self.dtype in (torch.bfloat16, torch.float32):
            return self._packed.rows(indexes, self.dtype)
        return dequantise(self.code, self._read(indexes)).to(self.dtype)

    def plain(self) -> Tensor:
        """The weight `[out, in]` that the codes stand for."""
        with torch.inference_mode(False):
            whole = torch.empty(self.outputs, self.inputs, dtype=self.dtype, device=self.device)
            at = 0
            for part in self._parts():
                rows = dequantise(self.code, part)
                whole[at : at + len(rows)] = rows
                at += len(rows)
        return whole

    def to(self, device: torch.device, dtype: torch.dtype) -> QuantisedForm:
        """The same weight elsewhere, or for another dtype of activations."""
        if (device, dtype) == (self.device, self.dtype):
            return self
        other = QuantisedForm(self.outputs, self.inputs, self.code, dtype, device)
        at = 0
        for part in self._parts():
            offsets = None if part.offsets is None else part.offsets.to(device)
            other.write(at, Codes(part.codes.to(device), part.scales.to(device), offsets))
            at += len(part.codes)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedForm:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        whole = self._read(slice(0, self.outputs))
        return _restore, (self.outputs, self.inputs, self.code, self.dtype, self.device, tuple(whole))

    def _read(self, rows: Tensor | slice) -> Codes:
        if self._packed is not None:
            return Codes(*self._packed.read(rows))
        assert self._plain is not None
        return self._plain.read(rows)

    def _parts(self) -> Iterator[Codes]:
        step = max(1, _AT_ONCE // self.inputs)
        return (self._read(slice(at, min(at + step, self.outputs))) for at in range(0, self.outputs, step))


def _restore(
    outputs: int, inputs: int, code: Code, dtype: torch.dtype, device: torch.device, rows: tuple[Any, ...]
) -> QuantisedForm:
    form = QuantisedForm(outputs, inputs, code, dtype, device)
    form.write(0, Codes(*rows))
    return form
