"""Products of a few rows with bf16 weights that stay as PyTorch keeps them, by `plain.cpp`.

For modules whose weights are not ours to pack: PyTorch streams such a weight at about half the speed of memory. They
need AVX-512 BF16; PyTorch multiplies elsewhere.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from unspool.kernels import native

__all__ = ["product", "usable"]

_LEVELS = ("avx512-bf16", "amx")
# Up to so many rows; PyTorch is as fast at more.
_MOST_ROWS = 12
# Counts are declared as pointers too, which is the cheaper conversion; both have 64 bits.
_WORD, _INT = ctypes.c_void_p, ctypes.c_int
_multiply: Any = None
if native.level() in _LEVELS:
    _multiply = native.function("unspool_plain_bf16", None, *(_WORD,) * 8, _INT)


def usable() -> bool:
    """Whether there are such products here."""
    return _multiply is not None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`x @ weight.T + bias` for bf16 `x` `[..., in]`, `weight` `[out, in]`, `bias` `[out]`, without gradients.

    `None` where this is not for these kernels: other processors, dtypes, devices, layouts or kinds of tensors, or too
    many rows.
    """
    # a weight of another type only looks like bf16 (torchao's quantised ones do)
    if type(weight) is not nn.Parameter or weight.dtype != torch.bfloat16 or x.dtype != torch.bfloat16:
        return None
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if (
        not 0 < rows <= _MOST_ROWS
        or x.shape[-1] != inputs
        or not (x.is_contiguous() and weight.is_contiguous())
        or not (x.is_cpu and weight.is_cpu)
        or not (bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous() and bias.is_cpu))
        or type(x) is not Tensor
        or _multiply is None
        or torch.is_grad_enabled()
    ):
        return None
    out = x.new_empty(*x.shape[:-1], outputs)
    added = None if bias is None else bias.data_ptr()
    threads = torch.get_num_threads()
    _multiply(weight.data_ptr(), outputs, inputs, x.data_ptr(), inputs, added, out.data_ptr(), rows, threads)
    return out
