"""Attention over the paged store with PyTorch's own operations: the backend that runs everywhere.

The query heads that share a key/value head are folded into the query axis, so keys and values are never repeated;
a row's past is read in place as a strided view where its blocks are one run, and gathered where they are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.attention.context import GroupContext, Multi, Single, Span, build_context
from unspool.cache.compact import decode, encode
from unspool.cache.paged import PagedStore


class PagedAttention:
    """One step's attention over a `PagedStore`; called by every layer in turn (see `models.base.Attend`).

    Args:
        store: where keys and values live.
        rows: the rows of the step; row `i` gets `feeds[i]` new tokens, which the store has made room for.
        weights: where given, attention weights are appended per layer, as a list over rows of
            `[heads, queries, keys]`.
    """

    def __init__(
        self, store: PagedStore, rows: Sequence[Span], feeds: Sequence[int], weights: list[list[Tensor]] | None = None
    ) -> None:
        self.store = store
        self.weights = weights
        like = torch.empty(0, dtype=store.dtype, device=store.device)
        self.contexts: list[GroupContext] = [
            build_context(group, index, rows, feeds, store.block_size, like) for index, group in enumerate(store.groups)
        ]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Store `k` and `v`, answer `q`; shapes as in `models.base.Attend`."""
        context = self.contexts[self.store.group_of[layer]]
        keys, values = self.store.keys[layer], self.store.values[layer]
        if self.store.quantized:
            k, v = encode(k), encode(v)
        if context.run >= 0:
            keys[context.run : context.run + k.shape[0]] = k
            values[context.run : context.run + v.shape[0]] = v
        else:
            keys.index_copy_(0, context.slots, k)
            values.index_copy_(0, context.slots, v)
        if self.weights is not None:
            self.weights.append([])
        outputs = [self._part(part, q, keys, values, scale, softcap) for part in context.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _part(
        self, part: Single | Multi, q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Answer one part: `[part.count, heads * dim]`."""
        heads, dim = q.shape[1:]
        kv_heads = keys.shape[1]
        fold = heads // kv_heads
        queries = q[part.first : part.first + part.count]
        past_keys, past_values = _read(part, keys), _read(part, values)
        if self.store.quantized:
            past_keys, past_values = decode(past_keys, q.dtype), decode(past_values, q.dtype)
        if isinstance(part, Single):
            queries = queries.view(part.count, kv_heads, fold, dim)
            mask = None if part.mask is None else part.mask[:, None, None, :]
        else:
            queries = queries.view(1, part.count, kv_heads, fold, dim).permute(0, 2, 3, 1, 4)
            mask = part.mask
        if softcap is not None or self.weights is not None:
            return self._explicit(part, queries, past_keys, past_values, mask, scale, softcap)
        if isinstance(part, Single):
            out = F.scaled_dot_product_attention(queries, past_keys, past_values, attn_mask=mask, scale=scale)
            return out.reshape(part.count, heads * dim)
        out = F.scaled_dot_product_attention(
            queries.reshape(1, heads, part.count, dim),
            past_keys,
            past_values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=fold > 1,
        )
        return out[0].transpose(0, 1).reshape(part.count, heads * dim)

    def _explicit(
        self,
        part: Single | Multi,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """The same in separate operations, for soft-capped scores and for callers that want the weights."""
        if isinstance(part, Multi):
            keys, values = keys[:, :, None], values[:, :, None]
        scores = torch.matmul(queries, keys.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None and isinstance(part, Multi):
            mask = scores.new_full((part.count, part.length), float("-inf")).triu(1)
        if mask is not None:
            scores = scores + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        out = torch.matmul(weights, values)
        if isinstance(part, Single):
            by_row = weights.flatten(1, 2).unsqueeze(2)
            self._record(row[..., first:end] for row, (first, end) in zip(by_row, part.seen, strict=True))
            return out.reshape(part.count, -1)
        self._record([weights.flatten(1, 2)[0]])
        return out.permute(0, 3, 1, 2, 4).reshape(part.count, -1)

    def _record(self, rows: Iterable[Tensor]) -> None:
        if self.weights is not None:
            self.weights[-1].extend(rows)


def _read(part: Single | Multi, pool: Tensor) -> Tensor:
    """Stored vectors a part looks at, `[rows, kv_heads, length, dim]`: a view where they lie in strides."""
    kv_heads, dim = pool.shape[1:]
    rows = part.count if isinstance(part, Single) else 1
    if part.slots is not None:
        return pool.index_select(0, part.slots).view(rows, part.length, kv_heads, dim).transpose(1, 2)
    if rows == 1:
        return pool[part.start : part.start + part.length].transpose(0, 1).unsqueeze(0)
    assert isinstance(part, Single)
    token = kv_heads * dim
    return pool.as_strided(
        (rows, kv_heads, part.length, dim),
        (part.stride * token, dim, token, 1),
        pool.storage_offset() + part.start * token,
    )
