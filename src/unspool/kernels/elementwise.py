"""What stands between a decoder's products, by `elementwise.h`: norms, rotary turns, the feed-forward's gate.

Every function computes the same with PyTorch's operations where the kernels are missing or do not fit: when gradients
are wanted, on other devices, in other dtypes. At one row a call of PyTorch costs as much as its numbers, so these calls
are kept short.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.kernels import native

__all__ = ["add_rms_norm", "greatest", "norm_heads", "rms_norm", "silu_gate", "turn"]

_BYTES = {torch.bfloat16: 2, torch.float32: 4} if native.active() else {}
# Counts are declared as pointers too, which is the cheaper conversion; both have 64 bits.
_WORD, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
if _BYTES:
    _rms_norm = native.function("unspool_rms_norm", None, _INT, *(_WORD,) * 5, _FLOAT, _WORD, _INT)
    _norm_parts = native.function("unspool_norm_parts", None, _INT, *(_WORD,) * 6, _FLOAT, _INT)
    _greatest = native.function("unspool_greatest", None, _INT, *(_WORD,) * 5, _INT)
    _silu_gate = native.function("unspool_silu_gate", None, _INT, *(_WORD,) * 4, _INT)
    _turn = native.function("unspool_turn", None, _INT, *(_WORD,) * 8, _INT)


def _bytes(x: Tensor) -> int:
    """Size of a number of `x` for the kernels; 0 where they cannot be used for it."""
    return _BYTES.get(x.dtype, 0) if x.is_cpu and not torch.is_grad_enabled() else 0


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    width = weight.shape[0]
    if x.numel() != width or x.dtype == torch.float32 or torch.is_grad_enabled() or not x.is_cpu:
        return F.rms_norm(x, (width,), weight, eps)
    # One row: the calls cost more than the numbers, and the layer norm of (x, -x), whose mean is 0, needs fewer.
    mirrored = F.layer_norm(torch.cat((x, x.neg()), dim=-1), (2 * width,), None, None, eps)
    return mirrored[..., :width] * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis of `x` `[..., width]`, accumulated in fp32."""
    size = _bytes(x)
    width = x.shape[-1]
    if not (size and weight.dtype == x.dtype and weight.is_cpu and weight.shape == (width,) and weight.is_contiguous()):
        return _rms_norm_torch(x, weight, eps)
    x = x.contiguous()  # PyTorch would round a part of many rows otherwise than of one, which is contiguous
    out = torch.empty_like(x)
    rows = x.numel() // width
    _rms_norm(size, x.data_ptr(), None, weight.data_ptr(), rows, width, eps, out.data_ptr(), torch.get_num_threads())
    return out


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + branch`, and its `rms_norm`. Without gradients, the sum is written over `branch`; `x` stays as it is."""
    size = _bytes(x)
    shape = x.shape
    if not (
        size
        and x.dtype == branch.dtype == weight.dtype
        and branch.shape == shape
        and weight.shape == shape[-1:]
        and x.is_contiguous()
        and branch.is_contiguous()
        and weight.is_contiguous()
        and branch.is_cpu
        and weight.is_cpu
    ):
        total = x + branch if torch.is_grad_enabled() else branch.add_(x)
        return total, _rms_norm_torch(total, weight, eps)
    out = torch.empty_like(x)
    width = shape[-1]
    _rms_norm(
        size,
        x.data_ptr(),
        branch.data_ptr(),
        weight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return branch, out


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> bool:
    """`rms_norm` in place of each head of `x` `[tokens, heads, dim]`; whether the kernels could do it."""
    size = _bytes(x)
    tokens, heads, dim = x.shape
    if not (
        size
        and x.stride()[1:] == (dim, 1)
        and weight.dtype == x.dtype
        and weight.is_cpu
        and weight.shape == (dim,)
        and weight.is_contiguous()
    ):
        return False
    threads = torch.get_num_threads()
    _norm_parts(size, x.data_ptr(), tokens, x.stride(0), heads, dim, weight.data_ptr(), eps, threads)
    return True


def greatest(x: Tensor, shares: bool = False) -> tuple[Tensor, Tensor | None] | None:
    """The place `[rows]` of the greatest number of each row of `x` `[rows, width]`, the first of equal ones.

    -1 where a row holds NaN, or -inf alone. With `shares`, also what the softmax of the row is there, in fp32.
    `None` where the kernels cannot do it.
    """
    size = _bytes(x)
    if not (size and x.dim() == 2 and x.is_contiguous() and x.numel()):
        return None
    rows, width = x.shape
    places = torch.empty(rows, dtype=torch.int64, device="cpu")
    share = torch.empty(rows, dtype=torch.float32, device="cpu") if shares else None
    address = None if share is None else share.data_ptr()
    _greatest(size, x.data_ptr(), rows, width, places.data_ptr(), address, torch.get_num_threads())
    return places, share


def silu_gate(x: Tensor) -> Tensor:
    """`silu(gate) * up` `[rows, width]` of `x` `[rows, 2 * width]`, each row of which is a gate and then `up`."""
    size = _bytes(x)
    if not (size and x.is_contiguous() and x.shape[-1] % 2 == 0):
        gate, up = x.chunk(2, dim=-1)
        gate = F.silu(gate)
        return gate * up if torch.is_grad_enabled() else gate.mul_(up)
    rows, double = x.shape
    width = double // 2
    out = x.new_empty((rows, width))
    _silu_gate(size, x.data_ptr(), rows, width, out.data_ptr(), torch.get_num_threads())
    return out


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary turn of `x` `[tokens, heads, dim]`; without gradients, it may be done in place.

    Number `i` of the first half of a head pairs with number `i` of the second.

    Args:
        x: heads of the step's tokens.
        cos, sin: `[tokens, 1, width]`; the first half of the sines is negated. Numbers of a head past `width` stay.
    """
    size = _bytes(x)
    tokens, heads, dim = x.shape
    width = cos.shape[-1]
    if (
        size
        and x.dtype == cos.dtype == sin.dtype
        and x.stride()[1:] == (dim, 1)
        and width <= dim
        and cos.shape == sin.shape == (tokens, 1, width)
        and width % 2 == 0
        and cos.is_contiguous()
        and sin.is_contiguous()
        and cos.is_cpu
        and sin.is_cpu
    ):
        _turn(
            size,
            x.data_ptr(),
            tokens,
            x.stride(0),
            heads,
            dim,
            cos.data_ptr(),
            sin.data_ptr(),
            width,
            torch.get_num_threads(),
        )
        return x
    if width < dim:
        return torch.cat((turn(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    swapped = x.roll(width // 2, -1)
    if torch.is_grad_enabled():
        return x * cos + swapped * sin
    return swapped.mul_(sin).addcmul_(x, cos)
