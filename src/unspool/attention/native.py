"""Attention over the paged store by the compiled kernels, where they are there and fit.

Rows with one query take one compiled call a layer, which also stores their keys and values. Rows with several queries
are answered with PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from unspool.attention.context import Span
from unspool.attention.reference import PagedAttention
from unspool.cache.paged import PagedStore
from unspool.kernels.attention import Plan, fits

__all__ = ["NativeAttention", "serves"]


def serves(store: PagedStore) -> bool:
    """Whether the kernels can read `store`; they keep no gradients."""
    keys = next(iter(store.keys.values()))
    return not torch.is_grad_enabled() and all(
        fits(keys.dtype, keys.device, group.head_dim, store.block_size) for group in store.groups
    )


class NativeAttention:
    """One step's attention over a `PagedStore` that the kernels serve; called by every layer in turn.

    Args:
        store: where keys and values live.
        rows: the rows of the step; row `i` gets `feeds[i]` new tokens, which the store has made room for.
    """

    def __init__(self, store: PagedStore, rows: Sequence[Span], feeds: Sequence[int]) -> None:
        self.store = store
        single = [i for i, feed in enumerate(feeds) if feed == 1]
        several = [i for i, feed in enumerate(feeds) if feed > 1]
        self.plans = [
            Plan(
                [rows[i].computed + 1 for i in single],
                [rows[i].blocks[index] for i in single],
                store.block_size,
                group.window,
            )
            for index, group in enumerate(store.groups)
            if single
        ]
        self.rest = PagedAttention(store, [rows[i] for i in several], [feeds[i] for i in several]) if several else None
        self.places: tuple[Tensor, Tensor] | None = None  # of the tokens of either kind, where there are both
        if single and several:
            ends = list(accumulate(feeds))
            rest = [place for i in several for place in range(ends[i] - feeds[i], ends[i])]
            self.places = torch.tensor([ends[i] - 1 for i in single]), torch.tensor(rest)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Store `k` and `v`, answer `q`; shapes as in `models.base.Attend`."""
        if self.rest is None:
            return self._singles(layer, q, k, v, scale, softcap)
        if self.places is None:
            return self.rest(layer, q, k, v, scale, softcap)
        single, several = self.places
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        out[single] = self._singles(layer, q[single], k[single], v[single], scale, softcap)
        out[several] = self.rest(layer, q[several], k[several], v[several], scale, softcap)
        return out

    def _singles(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        store = self.store
        plan = self.plans[store.group_of[layer]]
        return plan.attend(q, k, v, store.keys[layer], store.values[layer], scale, softcap)
