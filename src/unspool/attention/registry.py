"""Which backend answers a step's attention over the store: the compiled kernels where they fit, else PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unspool.attention.context import Span
from unspool.attention.native import NativeAttention, serves
from unspool.attention.reference import PagedAttention
from unspool.cache.paged import PagedStore

__all__ = ["paged_attention", "reads_any_order"]


def paged_attention(
    store: PagedStore, rows: Sequence[Span], feeds: Sequence[int], weights: list[list[Tensor]] | None = None
) -> NativeAttention | PagedAttention:
    """One step's attention (see `models.base.Attend`).

    Args:
        store: where keys and values live.
        rows: the rows of the step; row `i` gets `feeds[i]` new tokens, which the store has made room for.
        weights: a list that collects attention weights, which only PyTorch's backend keeps.
    """
    if weights is None and serves(store):
        return NativeAttention(store, rows, feeds)
    return PagedAttention(store, rows, feeds, weights)


def reads_any_order(store: PagedStore) -> bool:
    """Whether rows may lie anywhere in `store` at no cost; else they are read fastest side by side, by place."""
    return serves(store)
