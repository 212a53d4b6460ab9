"""Matrix products with a weight. Nothing else in the models multiplies one, so faster kernels have one way in.

On a CPU, what limits decoding is how fast weights stream from memory, and PyTorch's ways differ by two to three times
there (`benchmarks/primitives.py` prints them). A layer that is only used for inference keeps its weight in a layout
made once at load: that of our own kernels for bf16 where the processor has the instructions, else oneDNN's. The plain
weight is given up for it, so it costs no memory (`packed`). Weights that stay plain are read in the way that suits
their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.kernels.linear import PackedWeight, fits, unpacked
from unspool.models.layers.packed import Packable, PackedForm, WritableForm, exchange

__all__ = ["Added", "Linear", "added", "multiply", "pack", "packed_form"]

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


class Added(Protocol):
    """What a step adds to the products of its linear layers."""

    def add(self, layer: Linear, x: Tensor, out: Tensor) -> Tensor:
        """What `layer` gives for `x` `[rows, inputs]`, whose product is `out` `[rows, outputs]`; it may be written."""
        ...


# Set for the length of one step, by and for the thread that runs it: so no kind of decoder can forget to hand it on.
added: ContextVar[Added | None] = ContextVar("added", default=None)


class Linear(Packable):
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

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[rows, inputs]` to `[rows, sum(parts)]`, with what the step adds to it."""
        out, more = self._product(x), added.get()
        return out if more is None else more.add(self, x, out)

    def _product(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            trained = torch.is_grad_enabled() and self.weight.requires_grad
            if not trained and not (torch.is_grad_enabled() and x.requires_grad):
                return self._packed.product(x, self.bias)
            if not trained and not self._packed.lossless:
                return F.linear(x, self._packed.plain(), self.bias)
            self.unpack()
        return multiply(x, self.weight, self.bias)

    @property
    def invariant(self) -> bool:
        """Whether a row's product is the same bits alone and in company."""
        return self._packed is not None and self._packed.invariant

    def pack(self) -> None:
        """Exchange the plain weight for a faster layout, where there is one for this device and dtype."""
        pack([self])

    def extra_repr(self) -> str:
        """Widths, for `print(model)`."""
        return f"{self.weight.shape[1]} -> {' + '.join(map(str, self.parts))}, bias={self.bias is not None}"


def pack(modules: Sequence[Packable]) -> None:
    """Exchange the one plain weight of `modules`, for inference only, for a layout which all of them can use.

    It stays where there is none for its device and dtype, and where it is packed already.
    """
    weight = modules[0].weight
    packed: PackedForm
    if weight.device.type != "cpu":
        return
    if fits(weight):
        packed = PackedWeight(weight)
    elif _OneDNN.fits(weight) and all(isinstance(module, Linear) for module in modules):
        packed = _OneDNN(weight)
    else:
        return
    exchange(modules, packed)


def packed_form(modules: Sequence[Packable]) -> WritableForm | None:
    """A packed form, to be filled on the CPU, for the one weight of `modules`, which is still on the `meta` device.

    `None` where there is no layout that can be filled row by row.
    """
    if any(isinstance(module, Linear) for module in modules) and fits(modules[0].weight):
        return PackedWeight(modules[0].weight)
    return None


_onednn_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class _OneDNN:
    """A weight in oneDNN's blocked layout: near the memory's speed at a few rows, and faster than plain at many."""

    lossless = True
    invariant = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneDNN:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return unpacked, (self.plain(),)

    def __init__(self, weight: Tensor) -> None:
        self._dtype = weight.dtype
        with torch.inference_mode(False), torch.no_grad():
            self._memory: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether oneDNN has a layout of its own for this weight."""
        if not torch._C._has_mkldnn or _onednn_product is None:
            return False
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight.dtype == torch.float32

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[rows, in]`."""
        alone = x.shape[0] == 1 and self._dtype == torch.bfloat16
        rows = x.expand(_PACKED_ROWS, -1).contiguous() if alone else x
        out: Tensor = _onednn_product(rows, self._memory, bias, "none", [], "")
        return out[: x.shape[0]]

    def plain(self) -> Tensor:
        """The weight in the usual layout."""
        with torch.inference_mode(False), torch.no_grad():
            dense: Tensor = self._memory.to_dense().to(self._dtype)
        return dense
