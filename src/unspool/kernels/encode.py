"""Quantising rows of a weight on a CPU, by `encode.h`; one thread a call, so that several can work side by side."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unspool.kernels import native

__all__ = ["encode", "usable"]


def usable(rows: Tensor) -> bool:
    """Whether `encode` takes these rows here."""
    return rows.is_cpu and rows.dtype in (torch.bfloat16, torch.float32) and native.active()


@cache
def _function() -> Any:
    word, number = ctypes.c_void_p, ctypes.c_int
    return native.function("unspool_encode", None, word, number, word, word, word, number, *[word] * 4)


def encode(rows: Tensor, group: int, bits: int, bounds: Tensor | None, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes `[n, in]` uint8 and scales `[n, groups]` fp32 of `rows` `[n, in]`, which are `usable`.

    Args:
        rows: the weights.
        group: inputs that share a scale.
        bits: of a code; 8 and 4 are evenly spaced, but for four with a table.
        bounds, order: `[15]` fp32 and `[16]` uint8: the code of a number above `i` bounds is `order[i]`.

    Raises:
        ValueError: rows that are not `usable`, no group, or a table of another size.
    """
    count, inputs = rows.shape
    table = bounds is None or order is None or (bounds.shape, order.shape) == ((15,), (16,))
    if not usable(rows) or group < 1 or bits not in (4, 8) or not table:
        raise ValueError(f"{rows.dtype} rows of {inputs} cannot be quantised to {bits} bits in groups of {group} here")
    rows = rows.contiguous()
    codes = torch.empty(count, inputs, dtype=torch.uint8, device="cpu")
    scales = torch.empty(count, -(-inputs // group), dtype=torch.float32, device="cpu")
    kind = 0 if bits == 8 else 1 if bounds is None or order is None else 2
    bounds = None if bounds is None else bounds.float().cpu().contiguous()
    order = None if order is None else order.to("cpu", torch.uint8).contiguous()
    between = None if bounds is None else bounds.data_ptr()
    placed = None if order is None else order.data_ptr()
    wide = rows.dtype == torch.float32
    _function()(rows.data_ptr(), wide, count, inputs, group, kind, between, placed, codes.data_ptr(), scales.data_ptr())
    return codes, scales
