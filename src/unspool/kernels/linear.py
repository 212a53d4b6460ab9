"""Products with bf16 weights on a CPU, by `linear.cpp`: one packed copy of a weight serves any number of rows.

A packed weight also gives back its rows and its plain form, so an embedding can share it with a head. A row's results
are the same bits alone and in company, and on any number of threads.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool.kernels import native
from unspool.kernels.memory import reserve

__all__ = ["PackedWeight", "fits", "unpacked"]

# Numbers are declared as pointers too, which is the cheaper conversion; both have 64 bits.
_WORD, _THREADS = ctypes.c_void_p, ctypes.c_int


class _Struct(ctypes.Structure):
    """`PackedWeight` of `linear.cpp`."""

    _fields_ = (("lines", ctypes.c_void_p), ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64))


class _Functions(NamedTuple):
    """The entry points of `linear.cpp`."""

    size: Any
    pack: Any
    unpack: Any
    rows: Any
    multiply: Any


@cache
def _functions() -> _Functions | None:
    """The kernels; `None` where they are missing."""
    if not native.active():
        return None
    return _Functions(
        size=native.function("unspool_linear_bf16_size", ctypes.c_int64, _WORD, _WORD),
        pack=native.function("unspool_linear_bf16_pack", None, *[_WORD] * 6, _THREADS),
        unpack=native.function("unspool_linear_bf16_unpack", None, *[_WORD] * 2, _THREADS),
        rows=native.function("unspool_linear_bf16_rows", ctypes.c_int64, *[_WORD] * 4, _THREADS),
        multiply=native.function("unspool_linear_bf16", None, *[_WORD] * 6, _THREADS),
    )


def fits(weight: Tensor) -> bool:
    """Whether `weight` can be packed here: a bf16 matrix of an even width on a CPU that has the instructions.

    A weight on the `meta` device stands for one that will be read, row by row.
    """
    return (
        weight.device.type in ("cpu", "meta")
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.shape[1] % 2 == 0
        and weight.numel() > 0
        and _functions() is not None
    )


class PackedWeight:
    """A bf16 weight `[out, in]` in the kernels' layout; once filled, it does not change.

    Args:
        weight: the plain weight, which `fits`. Where it is on the `meta` device, `write` brings the rows.

    Attributes:
        address: where the packed numbers begin.
        handle: of the weight, for the kernels.
    """

    lossless = True
    invariant = True

    def __init__(self, weight: Tensor) -> None:
        functions = _functions()
        if functions is None or not fits(weight):
            raise ValueError(f"a {weight.dtype} weight of shape {list(weight.shape)} cannot be packed here")
        self.outputs, self.inputs = weight.shape
        self._multiply, self._rows, self._unpack = functions.multiply, functions.rows, functions.unpack
        self._pack = functions.pack
        size = functions.size(self.outputs, self.inputs)
        with torch.inference_mode(False):
            self._memory = reserve(2 * size).view(torch.bfloat16)
        self._struct = _Struct(self._memory.data_ptr(), self.outputs, self.inputs)
        self.handle = ctypes.addressof(self._struct)
        self.address: int = self._memory.data_ptr()
        self._plain: weakref.ref[Tensor] | None = None
        if not weight.is_meta:
            self.write(0, weight)

    def write(self, first: int, rows: Tensor, threads: int | None = None) -> None:
        """Set rows `[n, in]` of the weight from `first` on. Nothing is right until all rows are written.

        Several threads may write at once, each its own rows.

        Raises:
            ValueError: shape, dtype or device do not fit the weight.
        """
        count = rows.shape[0]
        if rows.shape != (count, self.inputs) or not 0 <= first <= self.outputs - count:
            raise ValueError(
                f"rows {first} to {first + count} of shape {list(rows.shape)} are not of a weight "
                f"[{self.outputs}, {self.inputs}]"
            )
        if rows.dtype != torch.bfloat16 or not rows.is_cpu:
            raise ValueError(f"`rows` must be bfloat16 on the CPU; got {rows.dtype} on {rows.device}")
        rows = rows.detach().contiguous()
        threads = threads or torch.get_num_threads()
        memory = self._memory.data_ptr()
        self._pack(rows.data_ptr(), memory, first, count, self.outputs, self.inputs, threads)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for bf16 `x` `[rows, in]` and `bias` `[out]`; gives `[rows, out]`, without gradients.

        Raises:
            ValueError: shape, dtype or device do not fit the weight.
        """
        rows, width = x.shape
        if width != self.inputs or x.dtype != torch.bfloat16 or not x.is_cpu:
            raise ValueError(
                f"`x` must be bfloat16 [rows, {self.inputs}] on the CPU; got {x.dtype} {list(x.shape)} on {x.device}"
            )
        stride, step = x.stride()
        if step != 1:
            x = x.contiguous()
            stride = width
        out = x.new_empty((rows, self.outputs))
        if bias is not None:
            bias = self._checked(bias)
        added = None if bias is None else bias.data_ptr()
        threads = torch.get_num_threads()
        self._multiply(self.handle, x.data_ptr(), stride, added, out.data_ptr(), rows, threads)
        return out

    def rows(self, indexes: Tensor) -> Tensor:
        """Rows `[n, in]` of the weight at `indexes` `[n]`.

        Raises:
            IndexError: an index lies outside the weight.
            ValueError: `indexes` has another shape or is not on the CPU.
        """
        if not indexes.is_cpu or indexes.dim() != 1:
            raise ValueError(f"`indexes` must be [n] on the CPU; got {list(indexes.shape)} on {indexes.device}")
        indexes = indexes.to(torch.int64).contiguous()
        count = indexes.shape[0]
        out = torch.empty(count, self.inputs, dtype=torch.bfloat16, device="cpu")
        wrong = self._rows(self.handle, indexes.data_ptr(), count, out.data_ptr(), torch.get_num_threads())
        if wrong >= 0:
            raise IndexError(f"`indexes` holds {int(indexes[wrong])}; rows of this weight lie in [0, {self.outputs})")
        return out

    def plain(self) -> Tensor:
        """The weight `[out, in]` as it was given; who asks while an earlier answer is alive gets the same tensor."""
        plain = None if self._plain is None else self._plain()
        if plain is None:
            with torch.inference_mode(False):
                plain = torch.empty(self.outputs, self.inputs, dtype=torch.bfloat16, device="cpu")
            self._unpack(self.handle, plain.data_ptr(), torch.get_num_threads())
            self._plain = weakref.ref(plain)
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return unpacked, (self.plain(),)

    def _checked(self, bias: Tensor) -> Tensor:
        if bias.dtype != torch.bfloat16 or bias.shape != (self.outputs,) or not bias.is_cpu:
            shape = list(bias.shape)
            raise ValueError(f"`bias` must be bfloat16 [{self.outputs}] on the CPU; got {bias.dtype} {shape}")
        return bias.contiguous()


def unpacked(weight: Tensor) -> Tensor:
    """What a pickled packed weight comes back as: the plain one, which the reader's machine may pack in its own way."""
    return weight
