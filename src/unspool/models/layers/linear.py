"""Matrix products with a weight. Nothing else in the models multiplies one, so faster kernels have one way in.

On a CPU, what limits decoding is how fast weights stream from memory, and PyTorch's ways differ by two to three times
there (`benchmarks/primitives.py` prints them). A layer that is only used for inference keeps its weight in oneDNN's own
blocked layout, made once at load: near the memory's speed at a few rows, and faster than the plain layout at many. The
plain weight is given up for it, so it costs no memory; it comes back when somebody wants to train, move or save it.
Weights that must stay plain, such as a head that shares the embedding's, are read in the way that suits their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Linear", "multiply"]

# oneDNN reads a packed bf16 weight faster for four rows than for one.
_PACKED_ROWS = 4
# fp32, plain: up to so many rows the weight is the left factor.
_FEW_ROWS = 32


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for `x` `[rows, in]`, `weight` `[out, in]`, `bias` `[out]`; gives `[rows, out]`."""
    if x.shape[0] > _FEW_ROWS or torch.is_grad_enabled() or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    if weight.dtype == torch.float32:
        rows = x if x.shape[0] > 1 else x.repeat(2, 1)
        out = torch.mm(weight, rows.t()).t()[: x.shape[0]].contiguous()
    elif x.shape[0] == 1:
        out = _one_row(x, weight)
    else:
        return F.linear(x, weight, bias)
    return out if bias is None else out.add_(bias)


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` for `x` `[1, in]`, in bf16 or fp16, by PyTorch's own kernel instead of oneDNN's."""
    if not torch._C._get_mkldnn_enabled():
        return torch.mv(weight, x.view(-1)).unsqueeze(0)
    # The switch is one for all threads. Whoever turns it off turns it on again, so it never stays off; a thread that
    # finds it off meanwhile computes the same product another way.
    torch._C._set_mkldnn_enabled(False)
    try:
        return torch.mv(weight, x.view(-1)).unsqueeze(0)
    finally:
        torch._C._set_mkldnn_enabled(True)


class Linear(nn.Module):
    """An affine map whose output may be several projections of the same input, one after the other.

    Args:
        inputs: width of the input.
        parts: widths of the projections; `weight` is `[sum(parts), inputs]`.
        bias: whether a bias is added.
    """

    def __init__(self, inputs: int, *parts: int, bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts), inputs))
        self.bias = nn.Parameter(torch.empty(sum(parts))) if bias else None
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[rows, inputs]` to `[rows, sum(parts)]`."""
        if self._packed is not None:
            if not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
                alone = x.shape[0] == 1 and self._packed.dtype == torch.bfloat16
                rows = x.expand(_PACKED_ROWS, -1).contiguous() if alone else x
                out: Tensor = _packed_product(rows, self._packed, self.bias, "none", [], "")
                return out[: x.shape[0]]
            self.unpack()
        return multiply(x, self.weight, self.bias)

    def pack(self) -> None:
        """Exchange the plain weight for oneDNN's layout, where it has one for this device and dtype.

        `weight` then has its shape and dtype and no memory (it is on the `meta` device). Training, `to()` and
        `state_dict()` see the plain weight as before.
        """
        weight = self.weight
        if self._packed is not None or weight.device.type != "cpu" or not _can_pack(weight.dtype):
            return
        with torch.inference_mode(False), torch.no_grad():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
            self.weight = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)

    def unpack(self) -> None:
        """Bring the plain weight back; does nothing where it is already."""
        if self._packed is not None:
            with torch.inference_mode(False):
                self.weight = nn.Parameter(self._plain(), requires_grad=self.weight.requires_grad)
            self._packed = None

    def train(self, mode: bool = True) -> Linear:
        """Set training mode, for which the weight must be plain."""
        if mode:
            self.unpack()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Widths, for `print(model)`."""
        return f"{self.weight.shape[1]} -> {' + '.join(map(str, self.parts))}, bias={self.bias is not None}"

    def _plain(self) -> Tensor:
        assert self._packed is not None
        with torch.no_grad():
            dense: Tensor = self._packed.to_dense().to(self.weight.dtype)
        return dense

    def __getstate__(self) -> dict[str, Any]:
        """What copying and pickling see: the plain weight."""
        self.unpack()
        return self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[prefix + "weight"] = self._plain()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)


_packed_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn or _packed_product is None:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
