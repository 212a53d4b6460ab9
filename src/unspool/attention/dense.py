"""Attention of plain calls: a rectangle of whole texts, nothing stored, gradients kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.cache.layout import LayerGroup

__all__ = ["DenseAttention"]


class DenseAttention:
    """Causal attention within each row of a `[rows, length]` rectangle (see `models.base.Attend`).

    A padding token sees itself, so that its row holds numbers; nobody else sees it.

    Args:
        groups: the model's layer groups, which name the windows.
        rows, length: the rectangle.
        mask: `[rows, length]`, nonzero for true tokens; `None` when all are.
        positions: `[rows, length]` where texts may be packed one after another in a row: a position that does not
            follow the one before it starts a text of its own. `None` when each row is one text.
        weights: keep every layer's attention weights in `self.weights`, `[rows, heads, length, length]` each.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        rows: int,
        length: int,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        weights: bool = False,
    ) -> None:
        self.rows, self.length = rows, length
        self.weights: list[Tensor] | None = [] if weights else None
        own = None if mask is None or bool(mask.all()) else mask.to(torch.bool)[:, None, None, :]
        texts = None if positions is None else _texts(positions)
        if texts is not None:
            same = texts[:, None, :, None] == texts[:, None, None, :]
            own = same if own is None else own & same
        self._windows = {layer: group.window for group in groups for layer in group.layers}
        self._visible = {
            window: _visible(length, window, own, positions if positions is not None else mask)
            for window in set(self._windows.values())
        }

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Answer `q` `[rows * length, heads, dim]`; other shapes as in `models.base.Attend`."""
        q, k, v = (x.view(self.rows, self.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        visible = self._visible[self._windows[layer]]
        if softcap is not None or self.weights is not None:
            out = self._explicit(q, k, v, visible, scale, softcap)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if visible is None else visible.to(q.device),
                is_causal=visible is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out.transpose(1, 2).reshape(self.rows * self.length, -1)

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """The same in separate operations, for soft-capped scores and for callers that want the weights."""
        fold = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(fold, dim=1), v.repeat_interleave(fold, dim=1)
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if visible is None:
            visible = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).tril()
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1, dtype=torch.float32).to(v.dtype)
        if self.weights is not None:
            self.weights.append(weights)
        return torch.matmul(weights, v)


def _texts(positions: Tensor) -> Tensor | None:
    """Number of the text each token belongs to, `[rows, length]`; `None` when every row is one text."""
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=1)
    texts = (steps != 1).cumsum(dim=1)
    return texts if bool(texts[:, -1].any()) else None


def _visible(length: int, window: int | None, own: Tensor | None, like: Tensor | None) -> Tensor | None:
    """`[..., length, length]`, true where a query (row) sees a key (column); `None` when that is plain causal."""
    if own is None and (window is None or window >= length):
        return None
    places = torch.arange(length, device=None if like is None else like.device)
    behind = places[:, None] - places
    visible = behind >= 0
    if window is not None:
        visible &= behind < window
    return visible if own is None else (visible & own) | (behind == 0)
