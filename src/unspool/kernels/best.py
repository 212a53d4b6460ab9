"""The best of many scores, by `best.h`: several times faster than `torch.topk`, which ranks a whole vocabulary."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from unspool.kernels import native

__all__ = ["best", "keep_best"]

# As `kRoom` in best.h, of which half; below the second, PyTorch is as fast.
_MOST, _LEAST_WIDTH = 2048, 1024
_WORD, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


def keep_best(scores: Tensor, count: int, filler: float) -> Tensor | None:
    """`scores` `[rows, width]` with `filler` for those below the `count`-th best of their row; ties of it stay.

    `None` where this is not for the kernel: other dtypes, devices or shapes than wide rows of fp32, NaN or infinities
    of both signs in a row, or too many that stay.
    """
    if not _usable(scores, count):
        return None
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    rows, width = scores.shape
    threads = torch.get_num_threads()
    return None if _functions()[0](scores.data_ptr(), rows, width, count, filler, out.data_ptr(), threads) else out


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The `count` best of each row of `scores` `[rows, width]` and their places, best first and of equals the first.

    `None` where this is not for the kernel, as with `keep_best`.
    """
    if not _usable(scores, count):
        return None
    rows, width = scores.shape
    scores = scores.contiguous()
    values, places = scores.new_empty(rows, count), scores.new_empty(rows, count, dtype=torch.int64)
    failed = _functions()[1](
        scores.data_ptr(), rows, width, count, values.data_ptr(), places.data_ptr(), torch.get_num_threads()
    )
    return None if failed else (values, places)


def _usable(scores: Tensor, count: int) -> bool:
    return (
        scores.is_cpu
        and scores.dtype is torch.float32
        and scores.ndim == 2
        and _LEAST_WIDTH <= scores.shape[1] < 2**32
        and scores.shape[0] > 0
        and 0 < count <= min(_MOST, scores.shape[1])
        and not (scores.requires_grad and torch.is_grad_enabled())
        and native.active()
    )


@cache
def _functions() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    return (
        native.function("unspool_keep_best", _INT, *(_WORD,) * 4, _FLOAT, _WORD, _INT),
        native.function("unspool_best", _INT, *(_WORD,) * 6, _INT),
    )
