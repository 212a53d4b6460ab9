"""Which layers a cache needs for a model, read from its configuration."""

from __future__ import annotations

from typing import Any, TypeAlias

from unspool.cache.layers import DynamicLayer, Layer, SlidingLayer, StaticLayer, StaticSlidingLayer
from unspool.cache.recurrent import EmptyLayer, HybridLayer, RecurrentLayer
from unspool.errors import Unsupported

__all__ = ["AnyLayer", "dynamic_layer", "layer_kinds", "static_layer"]

AnyLayer: TypeAlias = Layer | RecurrentLayer
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")
_STATES = ("conv", "linear_attention", "hybrid", "hybrid_sliding", "mamba")


def layer_kinds(config: Any) -> list[tuple[str, int | None, int]]:
    """For each layer of a model's decoder its kind, its window and its number of convolution states.

    The kinds are those of transformers' `layer_types`; where the configuration has none, a window or its absence tells.
    What this function gave is taken for a configuration too, since to read one again may cost a copy of it.
    """
    if isinstance(config, list):
        return config
    read = _reader(config)
    text = read("get_text_config")
    if callable(text):
        read = _reader(text(decoder=True))
    each = [_reader(one) for one in read("per_layer_config") or [] if not isinstance(one, str)]
    number = len(read("layer_types") or each) or read("num_hidden_layers") or read("n_layer") or read("num_layers")
    if not number:
        raise ValueError("config names neither layer_types nor num_hidden_layers")
    each = each if len(each) == number else [read] * number
    kinds = read("layer_types") or [_kind(one) for one in each]
    modes = read("kv_sharing_modes") or [None] * number
    return [
        (
            "dummy" if mode == "reuse" or kind in ("moe", "mlp") else kind,
            _window(kind, one),
            int(one("number_of_conv_states") or 1),
        )
        for kind, one, mode in zip(kinds, each, modes, strict=True)
    ]


def _reader(config: Any) -> Any:
    """Entries of a configuration by name, `None` where there is none."""
    if isinstance(config, dict):
        return config.get
    return lambda name: getattr(config, name, None)


def _kind(read: Any) -> str:
    if read("sliding_window") is not None:
        return "sliding_attention"
    return "full_attention" if read("attention_chunk_size") is None else "chunked_attention"


def _window(kind: str, read: Any) -> int | None:
    if kind not in _WINDOWED:
        return None
    return int(read("attention_chunk_size" if kind == "chunked_attention" else "sliding_window"))


def dynamic_layer(kind: str, window: int | None, states: int) -> AnyLayer:
    """The layer of a cache that grows."""
    if kind in ("full_attention", *_WINDOWED) and kind not in _STATES:
        return DynamicLayer() if window is None else SlidingLayer(window)
    if kind in ("hybrid", "hybrid_sliding"):
        return HybridLayer(DynamicLayer() if window is None else SlidingLayer(window), states)
    return _stateless(kind, states)


def static_layer(length: int, kind: str, window: int | None, states: int) -> AnyLayer:
    """The layer of a cache with room for `length` tokens."""
    if kind in ("full_attention", *_WINDOWED) and kind not in _STATES:
        return StaticLayer(length) if window is None else StaticSlidingLayer(length, window)
    if kind in ("hybrid", "hybrid_sliding"):
        return HybridLayer(StaticLayer(length) if window is None else StaticSlidingLayer(length, window), states)
    return _stateless(kind, states)


def _stateless(kind: str, states: int) -> AnyLayer:
    """Layers that are the same in every kind of cache."""
    if kind in _STATES:
        return RecurrentLayer(states)
    if kind == "dummy":
        return EmptyLayer()
    raise Unsupported(f"config has a layer of kind {kind!r}, for which there is no cache; leave past_key_values out")
