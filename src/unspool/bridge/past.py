"""What our store holds of a call's rows, as the module's own kind of cache: a rectangle of padded columns."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from unspool.bridge.module import Foreign
from unspool.bridge.ragged import Layer
from unspool.cache.blocks import GONE
from unspool.cache.paged import PagedStore
from unspool.decode.sequence import Sequence

__all__ = ["is_own_cache", "own_cache"]


def own_cache(
    foreign: Foreign, layers: tuple[Layer, ...], store: PagedStore, rows: Items[Sequence], mask: Tensor
) -> Any:
    """The cache that the module itself would have filled; zeros stand in columns that are no token of a row.

    Args:
        foreign: the module.
        layers: its calls of attention.
        store: has the rows' keys and values.
        rows: after their last step.
        mask: `[rows, columns]` where the prompts' true tokens are.
    """
    stored = [min(row.computed, len(row.tokens) - 1) for row in rows]
    columns = _columns(mask.tolist(), stored)
    width = max(own[-1] + 1 for own in columns if own)
    slots = [_slots(store, index, rows, columns, width) for index in range(len(store.groups))]
    cache = foreign.empty_cache()
    for number, layer in enumerate(layers):
        where = slots[store.group_of[number]]
        empty = (where < 0)[:, None, :, None]
        keys, values = (
            pool[number][where.clamp_min(0)].transpose(1, 2).masked_fill(empty, 0)
            for pool in (store.keys, store.values)
        )
        cache.update(keys, values[..., : layer.value_dim], number)
    return cache


def is_own_cache(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether a cache made of what is stored is the module's own, up to rounding and what stands for padding."""
    ours, theirs = getattr(found, "layers", None), getattr(expected, "layers", None)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        for name in ("keys", "values"):
            a, b = getattr(one, name, None), getattr(other, name, None)
            if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                return False
            if not float((a - b.where(a != 0, 0)).norm()) <= tolerance * float(b.norm()):
                return False
        if one.get_seq_length() != other.get_seq_length():
            return False
    return True


def _columns(mask: list[list[bool]], stored: list[int]) -> list[list[int]]:
    """For each row the columns of its stored tokens: the prompt's, and then one after another."""
    found = []
    for row, count in zip(mask, stored, strict=True):
        prompt = [column for column, true in enumerate(row) if true]
        found.append([*prompt[:count], *range(len(row), len(row) + count - len(prompt))])
    return found


def _slots(store: PagedStore, index: int, rows: Items[Sequence], columns: list[list[int]], width: int) -> Tensor:
    """`[rows, width]` places in the pools of a group's layers; -1 where nothing is stored."""
    size = store.block_size
    out = torch.full((len(rows), width), -1, dtype=torch.int64)
    for row, own in zip(rows, columns, strict=True):
        table = torch.tensor(row.blocks[index][: store.blocks_for(len(own))], dtype=torch.int64)
        slots = (table[:, None] * size + torch.arange(size)).masked_fill((table == GONE)[:, None], -1)
        out[row.row, torch.tensor(own, dtype=torch.int64)] = slots.flatten()[: len(own)]
    return out.to(store.device)
