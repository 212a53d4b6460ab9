"""Attention over the paged store by the compiled kernels, where they are there and fit: one call a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unspool.attention.context import Span
from unspool.cache.paged import PagedStore
from unspool.kernels.attention import Plan, Pools, fits
from unspool.kernels.program import Past

__all__ = ["NativeAttention", "serves"]

# Blocks of each row that a plan for single tokens has room for, before it is made anew.
_AHEAD = 4


@dataclass(slots=True)
class _View:
    """What the kernels know of a store: whether they can read it, and its pools as they were laid out last."""

    readable: bool
    pools: Pools | None = None
    layout: int = 0


_views: WeakKeyDictionary[PagedStore, _View] = WeakKeyDictionary()


def _view(store: PagedStore) -> _View:
    found = _views.get(store)
    if found is None:
        keys = next(iter(store.keys.values()))  # int8 in a quantised store, which they do not read
        readable = all(fits(keys.dtype, keys.device, group.head_dim, store.block_size) for group in store.groups)
        found = _views[store] = _View(readable)
    return found


def serves(store: PagedStore) -> bool:
    """Whether the kernels can read `store`; they keep no gradients."""
    return not torch.is_grad_enabled() and _view(store).readable


class NativeAttention:
    """One step's attention over a `PagedStore` that the kernels serve; called by every layer in turn.

    Args:
        store: where keys and values live.
        rows: the rows of the step; row `i` gets `feeds[i]` new tokens, which the store has made room for.
    """

    def __init__(self, store: PagedStore, rows: Sequence[Span], feeds: Sequence[int]) -> None:
        self.store = store
        lengths = [row.computed + feed for row, feed in zip(rows, feeds, strict=True)]
        ahead = _AHEAD if max(feeds) == 1 else 0
        self.plans = [
            Plan(lengths, feeds, [row.blocks[index] for row in rows], store.block_size, group.window, ahead=ahead)
            for index, group in enumerate(store.groups)
        ]

    def advance(self, lengths: Sequence[int], changed: Sequence[tuple[int, Span]]) -> bool:
        """Make it the attention of the next step, in which the same rows have one new token each.

        Args:
            lengths: `[rows]`, the new tokens included.
            changed: place of each row whose blocks are others, and the row.

        Returns:
            Whether it could be; if not, it is of no use any more.
        """
        return all(
            plan.advance(lengths, [(place, row.blocks[index]) for place, row in changed])
            for index, plan in enumerate(self.plans)
        )

    @property
    def past(self) -> Past:
        """The plans and pools of all layers, for a program."""
        store, view = self.store, _view(self.store)
        if view.pools is None or view.layout != store.layouts:
            layers = range(len(store.keys))
            pools = [pool for layer in layers for pool in (store.keys[layer], store.values[layer])]
            view.pools, view.layout = Pools(pools, [store.group_of[layer] for layer in layers]), store.layouts
        return Past(self.plans, view.pools)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Store `k` and `v`, answer `q`; shapes as in `models.base.Attend`."""
        store = self.store
        plan = self.plans[store.group_of[layer]]
        return plan.attend(q, k, v, store.keys[layer], store.values[layer], scale, softcap)
