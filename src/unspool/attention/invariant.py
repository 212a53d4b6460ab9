"""Attention that answers every query by itself, with PyTorch's operations: its bits depend on its own row alone.

Slower than `reference` where a step has many queries, so it is used only where that is promised and the kernels, which
promise it too, do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.attention.context import Span
from unspool.cache.paged import PagedStore

__all__ = ["InvariantAttention"]


class InvariantAttention:
    """One step's attention over a `PagedStore`; called by every layer in turn (see `models.base.Attend`).

    Args:
        store: where keys and values live.
        rows: the rows of the step; row `i` gets `feeds[i]` new tokens, which the store has made room for.
    """

    def __init__(self, store: PagedStore, rows: Sequence[Span], feeds: Sequence[int]) -> None:
        self.store = store
        self._spans = [(row.computed, row.computed + feed) for row, feed in zip(rows, feeds, strict=True)]
        size, device = store.block_size, store.device
        # by layer group and row: the slots of all its tokens up to the newest, of which dropped ones are not read
        self._slots: list[list[Tensor]] = []
        for index, _ in enumerate(store.groups):
            tables = [torch.tensor(row.blocks[index], device=device) for row in rows]
            places = [torch.arange(end, device=device) for _, end in self._spans]
            self._slots.append([table[at // size] * size + at % size for table, at in zip(tables, places, strict=True)])

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Store `k` and `v`, answer `q`; shapes as in `models.base.Attend`."""
        index = self.store.group_of[layer]
        group, keys, values = self.store.groups[index], self.store.keys[layer], self.store.values[layer]
        new = torch.cat([slots[begin:] for slots, (begin, _) in zip(self._slots[index], self._spans, strict=True)])
        keys.index_copy_(0, new, k)
        values.index_copy_(0, new, v)
        heads, dim = q.shape[1:]
        out = q.new_empty(q.shape[0], heads * dim)
        place = 0
        for slots, (begin, end) in zip(self._slots[index], self._spans, strict=True):
            for position in range(begin, end):
                # Gathered anew, so that they lie in memory in the same way whatever else is computed with them.
                seen = slots[group.first_seen(position) : position + 1]
                out[place] = _answer(q[place], keys.index_select(0, seen), values.index_select(0, seen), scale, softcap)
                place += 1
        return out


def _answer(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None) -> Tensor:
    """One query `[heads, dim]` over `keys` and `values` `[length, kv_heads, dim]`: `[heads * dim]`."""
    heads, dim = q.shape
    kv_heads = keys.shape[1]
    query = q.reshape(1, kv_heads, heads // kv_heads, dim)
    key, value = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale).reshape(-1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, value).reshape(-1)
