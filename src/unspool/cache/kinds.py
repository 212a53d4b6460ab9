"""Caches with transformers' names and protocol, for modules that take `past_key_values`.

Native models keep theirs in a `PagedStore`; these are for everybody else's. transformers' own models accept them:
`isinstance` against transformers' class of the same name holds wherever transformers is loaded, though nothing here
imports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unspool.cache.arrange import AnyLayer, dynamic_layer, layer_kinds, static_layer
from unspool.cache.layers import DynamicLayer, Layer, SlidingLayer
from unspool.cache.quantized import QuantizedLayer
from unspool.cache.recurrent import EmptyLayer, HybridLayer, RecurrentLayer
from unspool.errors import Unsupported
from unspool.twins import seen_as

__all__ = [
    "Cache",
    "DynamicCache",
    "OffloadedCache",
    "OffloadedStaticCache",
    "QuantizedCache",
    "StaticCache",
]


class Cache:
    """A list of layers, each with the past of one layer of the model.

    Args:
        layers: one for each layer of the model; `None` makes `DynamicLayer`s as they are asked for.
        offloading: keep the layers' memory on the CPU but for the one at work and the next.
        offload_only_non_sliding: leave layers with a window where they are.
    """

    def __init__(
        self,
        layers: Sequence[AnyLayer] | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:
        self.layers: list[AnyLayer] = list(layers or ())
        self.offloading = offloading
        self.only_non_sliding = offload_only_non_sliding
        self._grows = layers is None
        self._stream: torch.cuda.Stream | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` is told: this class, and transformers' of the same name where that is loaded."""
        return seen_as(type(self), Cache, "transformers.cache_utils")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={self.layers})"

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and the window (`None` where there is none) of each layer."""
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                None if window is None else torch.tensor(window),
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values `[rows, heads, tokens, dim]` of new tokens in a layer; gives all to attend to."""
        while self._grows and len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer = self.layers[layer_idx]
        if not self.offloading:
            return self._attention(layer_idx).update(key_states, value_states, *args, **kwargs)
        self._fetch(layer_idx, key_states.device)
        found = self._attention(layer_idx).update(key_states, value_states, *args, **kwargs)
        if self._moves(layer):
            layer.offload()
        return found

    def _fetch(self, layer_idx: int, device: torch.device) -> None:
        """Wait for a layer to be back on its device, and start bringing the next one."""
        if device.type != "cuda":
            self.layers[layer_idx].prefetch()
            return
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(device)
        current.wait_stream(self._stream)
        self.layers[layer_idx].prefetch()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            following = self.layers[(layer_idx + 1) % len(self.layers)]
            if following is not self.layers[layer_idx]:
                following.prefetch()

    def _moves(self, layer: AnyLayer) -> bool:
        return not (layer.is_sliding and self.only_non_sliding)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a layer's convolution; `None` when nothing was fed."""
        layer = self._recurrent(layer_idx)
        return layer.conv_states[state_idx] if layer.has_previous_state[state_idx] else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A layer's recurrent state; `None` when nothing was fed."""
        layer = self._recurrent(layer_idx)
        return layer.recurrent_states[state_idx] if layer.has_previous_state[state_idx] else None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """See `RecurrentLayer.update_conv_state`."""
        return self._recurrent(layer_idx).update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """See `RecurrentLayer.update_recurrent_state`."""
        return self._recurrent(layer_idx).update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was fed to a recurrent layer (default: the last)."""
        if layer_idx is None:
            layer_idx = next((i for i in reversed(range(len(self.layers))) if self._has_state(i)), -1)
        elif layer_idx >= len(self.layers):
            return False
        states = self._recurrent(layer_idx).has_previous_state
        return all(states.values()) if state_idx is None else states[state_idx]

    def _has_state(self, layer_idx: int) -> bool:
        return isinstance(self.layers[layer_idx], RecurrentLayer)

    def _recurrent(self, layer_idx: int) -> RecurrentLayer:
        layer = self.layers[layer_idx] if 0 <= layer_idx < len(self.layers) else None
        if not isinstance(layer, RecurrentLayer):
            raise ValueError(f"layer {layer_idx} has no recurrent state: it is {layer!r}")
        return layer

    def _attention(self, layer_idx: int) -> Layer:
        """The keys and values of a layer; layer 0 stands for the first that has any."""
        found = self.layers[layer_idx]
        if layer_idx == 0 and isinstance(found, RecurrentLayer) and not isinstance(found, HybridLayer):
            found = next((one for one in self.layers if isinstance(one, Layer | HybridLayer)), found)
        if isinstance(found, HybridLayer):
            return found.attention
        if not isinstance(found, Layer):
            raise ValueError(f"layer {layer_idx} stores no keys and values: it is {found!r}")
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self._attention(layer_idx).get_seq_length() if layer_idx < len(self.layers) else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token: `get_seq_length`."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, queries: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Length of what a layer gives for so many new tokens, and the position of its first token."""
        if layer_idx >= len(self.layers):
            return DynamicLayer().get_mask_sizes(queries)
        return self._attention(layer_idx).get_mask_sizes(queries)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most tokens that a layer (default: any) can hold; -1 without a limit."""
        if layer_idx is not None:
            return self.layers[layer_idx].get_max_length() if layer_idx < len(self.layers) else -1
        return max((layer.get_max_length() for layer in self.layers), default=-1)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length` under the name of transformers 5.2."""
        return self.get_max_length(layer_idx)

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Take the layers' memory ahead of the first `update`."""
        heads = [num_heads] * len(self) if isinstance(num_heads, int) else list(num_heads)
        dims = [head_dim] * len(self) if isinstance(head_dim, int) else list(head_dim)
        if len(heads) != len(self) or len(dims) != len(self):
            raise ValueError(f"num_heads and head_dim need {len(self)} entries, one for each layer")
        for layer, count, dim in zip(self.layers, heads, dims, strict=True):
            if isinstance(layer, Layer) and not layer.is_initialized:
                nothing = torch.zeros(batch_size, count, 0, dim, dtype=dtype, device=device)
                layer.lazy_initialization(nothing, nothing)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative number drops that many from the end."""
        for layer in self.layers:
            layer.crop(max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make the rows those at places `beam_idx` `[new rows]`."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def reorder_after(self, beam_idx: Tensor, column: int) -> None:
        """`reorder_cache`, of rows that agree with those they become in all columns before `column`: copies less."""
        for layer in self.layers:
            layer.select_after(beam_idx, column)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at places `indices`, in that order."""
        for layer in self.layers:
            layer.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Keep what a later `crop` may need to bring back, in layers that would forget it."""
        for layer in self.layers:
            layer.activate_past_recording()

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether a layer keeps what a `crop` may need."""
        return bool(getattr(self.layers[layer_idx], "record_past", False))

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values of each layer, as versions before 5 passed them."""
        found = []
        for index in range(len(self.layers)):
            layer = self._attention(index)
            if isinstance(layer, QuantizedLayer):
                raise ValueError("a QuantizedCache has no plain form; call reset() and feed the tokens again")
            if layer.keys is None or layer.values is None:
                raise ValueError(f"layer {index} has stored nothing yet")
            found.append((layer.keys, layer.values))
        return tuple(found)

    @property
    def batch_size(self) -> int:
        """Rows stored; -1 when nothing is."""
        return max((layer.batch_size for layer in self.layers), default=-1)

    @property
    def is_initialized(self) -> bool:
        """Whether every layer with keys and values has some."""
        layers = [layer for layer in self.layers if isinstance(layer, Layer) and not isinstance(layer, EmptyLayer)]
        return bool(layers) and all(layer.is_initialized for layer in layers)

    @property
    def is_compileable(self) -> bool:
        """Whether shapes never change."""
        return bool(self.layers) and all(layer.is_compileable for layer in self.layers)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back any number of tokens."""
        return all(layer.is_croppable or getattr(layer, "record_past", False) for layer in self.layers)

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether only the newest tokens are kept."""
        return [layer.is_sliding for layer in self.layers]

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, whether it has a state and no keys and values."""
        return [isinstance(one, RecurrentLayer) and not isinstance(one, HybridLayer) for one in self.layers]

    @property
    def is_dummy(self) -> list[bool]:
        """For each layer, whether it stores nothing."""
        return [isinstance(layer, EmptyLayer) for layer in self.layers]


class DynamicCache(Cache):
    """Grows with every token.

    Args:
        ddp_cache_data: keys and values of each layer to begin with.
        config: the model's configuration (an object or a dict). With it, layers with a window keep only what the window
            sees, and recurrent layers keep their states. Without, every layer keeps every token.
        offloading, offload_only_non_sliding: see `Cache`.

    Raises:
        Unsupported: the configuration names a kind of layer that is not known.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[Sequence[Tensor | None]] | None = None,
        config: Any = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        layers: list[AnyLayer] | None = None if config is None else [dynamic_layer(*one) for one in layer_kinds(config)]
        super().__init__(layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        for index, (keys, values, *window) in enumerate(ddp_cache_data or ()):
            if config is None:
                size = next((one for one in window if one is not None), None)
                self.layers.append(DynamicLayer() if size is None else SlidingLayer(int(size)))
            if keys is not None and values is not None:
                self.update(keys, values, index)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[tuple[Tensor, Tensor]] | None) -> DynamicCache:
        """A cache of keys and values of each layer, as versions before 5 passed them."""
        return cls(past_key_values)


class StaticCache(Cache):
    """Memory for a fixed number of tokens, taken at the first.

    Args:
        config: the model's configuration, an object or a dict.
        max_cache_len: tokens.
        offloading, offload_only_non_sliding: see `Cache`.
        kwargs: arguments of older versions (batch size, device, dtype), which the first tokens tell anyway.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        **kwargs: Any,
    ) -> None:
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len} must be at least 1")
        layers = [static_layer(max_cache_len, *one) for one in layer_kinds(config)]
        super().__init__(layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)


class QuantizedCache(Cache):
    """Old tokens in few bits, recent ones in full precision; see `unspool.cache.quantized`.

    Args:
        backend: accepted for transformers' sake (`"quanto"`, `"hqq"`); the arithmetic is PyTorch's own.
        config: the model's configuration, an object or a dict.
        nbits: 8, 4 or 2.
        axis_key, axis_value: accepted; keys are grouped along tokens and values along channels, whatever they say.
        q_group_size: numbers that share a scale.
        residual_length: recent tokens in full precision, at least.

    Raises:
        Unsupported: a layer has a window or a recurrent state.
    """

    def __init__(
        self,
        backend: str = "torch",
        config: Any = None,
        nbits: int = 4,
        axis_key: int = 0,
        axis_value: int = 0,
        q_group_size: int = 64,
        residual_length: int = 128,
    ) -> None:
        if backend not in ("torch", "quanto", "hqq"):
            raise ValueError(f"backend={backend!r} is not known; leave it out")
        if config is None:
            raise ValueError("QuantizedCache needs config=, the model's configuration")
        kinds = layer_kinds(config)
        if odd := {kind for kind, _, _ in kinds} - {"full_attention"}:
            raise Unsupported(f"QuantizedCache is for full attention; this model has {', '.join(sorted(odd))} layers")
        super().__init__([QuantizedLayer(nbits, q_group_size, residual_length) for _ in kinds])


class OffloadedCache(DynamicCache):
    """A `DynamicCache` whose memory is on the CPU but for the layer at work and the next."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config, offloading=True)


class OffloadedStaticCache(StaticCache):
    """A `StaticCache` whose memory is on the CPU but for the layer at work and the next."""

    def __init__(self, config: Any, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(config, max_cache_len, offloading=True, **kwargs)
