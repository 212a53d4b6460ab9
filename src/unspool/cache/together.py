"""Pasts of several calls in one: rows of any of them, side by side and aligned at their newest tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.cache.arrange import AnyLayer
from unspool.cache.encoder_decoder import EncoderDecoderCache
from unspool.cache.kinds import Cache
from unspool.cache.layers import DynamicLayer, Layer, SlidingLayer
from unspool.cache.recurrent import EmptyLayer, HybridLayer, RecurrentLayer
from unspool.errors import Unsupported

__all__ = ["put_together"]


def put_together(pasts: Items[Any], places: Items[Tensor], columns: int, source: int = 0) -> Any:
    """A new past with rows of others. Shorter rows get columns of zeros before their first one, longer ones lose such.

    Args:
        pasts: caches of one module, or tensors `[rows, heads, columns, dim]` in lists, tuples and dicts nested alike,
            or `None` where a module has none.
        places: of each past, the rows to take `[rows]`; a place may occur any number of times.
        columns: width of what is made: the longest of these rows, in tokens.
        source: the same of what an encoder read.

    Raises:
        Unsupported: a past is of another kind.
    """
    first = pasts[0]
    if first is None:
        return None
    if isinstance(first, EncoderDecoderCache):
        own = put_together([one.self_attention_cache for one in pasts], places, columns)
        return EncoderDecoderCache(own, put_together([one.cross_attention_cache for one in pasts], places, source))
    if isinstance(first, Cache):
        if first.offloading:
            raise Unsupported("rows of an offloaded cache are not put together")
        made = copy.copy(first)
        made.layers = [_layer(layers, places, columns) for layers in zip(*(one.layers for one in pasts), strict=True)]
        return made
    if isinstance(first, Tensor) and first.ndim == 4:
        return _rows(pasts, places, columns)
    if isinstance(first, dict):
        return {name: put_together([one[name] for one in pasts], places, columns) for name in first}
    if type(first) in (list, tuple):
        return type(first)(put_together(parts, places, columns) for parts in zip(*pasts, strict=True))
    raise Unsupported(f"rows of a {type(first).__name__} are not put together")


def _rows(parts: Items[Tensor], places: Items[Tensor], columns: int | None) -> Tensor:
    """Rows of tensors, the newest `columns` of each where they have columns."""
    found = []
    for part, index in zip(parts, places, strict=True):
        if columns is not None:
            part = part[..., max(0, part.shape[-2] - columns) :, :]
        part = part.index_select(0, index.to(part.device))
        missing = 0 if columns is None else columns - part.shape[-2]
        found.append(F.pad(part, (0, 0, missing, 0)) if missing else part)
    return found[0] if len(found) == 1 else torch.cat(found)


def _layer(layers: Items[AnyLayer], places: Items[Tensor], columns: int) -> AnyLayer:
    """One layer of a cache."""
    first = layers[0]
    if isinstance(first, RecurrentLayer):
        made = copy.copy(first)
        made.conv_states = _states([one.conv_states for one in layers], places)  # type: ignore[union-attr]
        made.recurrent_states = _states([one.recurrent_states for one in layers], places)  # type: ignore[union-attr]
        made.has_previous_state = dict(first.has_previous_state)
        if isinstance(first, HybridLayer) and isinstance(made, HybridLayer):
            made.attention = _attention([one.attention for one in layers], places, columns)  # type: ignore[union-attr]
        return made
    return _attention(layers, places, columns)  # type: ignore[arg-type]


def _states(parts: Items[dict[int, Tensor | None]], places: Items[Tensor]) -> dict[int, Tensor | None]:
    made: dict[int, Tensor | None] = {}
    for number, state in parts[0].items():
        found = [one for part in parts if (one := part[number]) is not None]
        made[number] = None if state is None else _rows(found, places, None)
    return made


def _attention(layers: Items[Layer], places: Items[Tensor], columns: int) -> Layer:
    """Keys and values of one layer."""
    first = layers[0]
    made: Layer
    if type(first) is EmptyLayer:
        return EmptyLayer()
    if type(first) is SlidingLayer and not first.record_past:
        made = sliding = SlidingLayer(first.sliding_window)
        sliding.cumulative_length = columns
        columns = min(columns, first.sliding_window - 1)
    elif type(first) is DynamicLayer:
        made = DynamicLayer()
    else:
        raise Unsupported(f"rows of a {type(first).__name__} are not put together")
    if first.keys is None or first.values is None:
        return made
    made.lazy_initialization(first.keys, first.values)
    made.keys = _rows([one.keys for one in layers if one.keys is not None], places, columns)
    made.values = _rows([one.values for one in layers if one.values is not None], places, columns)
    return made
