"""The past of an encoder-decoder model: the decoder's own, and what it reads of the encoder's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from unspool.cache.kinds import Cache, DynamicCache

__all__ = ["EncoderDecoderCache"]


class EncoderDecoderCache(Cache):
    """The decoder's own past, and keys and values of the encoder's output.

    Args:
        caches: the cache of self-attention and the one of cross-attention; or one iterable of both's keys and values
            for each layer.

    Attributes:
        is_updated: for each layer, whether its keys and values of the encoder's output are there.
    """

    def __init__(self, *caches: Any) -> None:
        if len(caches) == 1:
            every = [tuple(one) for one in caches[0]]
            half = len(every[0]) // 2 if every else 0
            caches = (DynamicCache([one[:half] for one in every]), DynamicCache([one[half:] for one in every]))
        if len(caches) != 2 or not all(hasattr(one, "update") for one in caches):
            raise TypeError("EncoderDecoderCache takes two caches: of self-attention and of cross-attention")
        self.self_attention_cache: Any = caches[0]
        self.cross_attention_cache: Any = caches[1]
        self.is_updated = {i: caches[1].get_seq_length(i) > 0 for i in range(len(caches[1]))}

    def __repr__(self) -> str:
        return f"EncoderDecoderCache({self.self_attention_cache!r}, {self.cross_attention_cache!r})"

    def __len__(self) -> int:
        return len(self.self_attention_cache)

    def __iter__(self) -> Iterator[Any]:
        for own, cross in zip(self.self_attention_cache, self.cross_attention_cache, strict=True):
            yield own + cross

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens of the decoder."""
        found: tuple[Tensor, Tensor] = self.self_attention_cache.update(key_states, value_states, layer_idx)
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the decoder seen so far."""
        return int(self.self_attention_cache.get_seq_length(layer_idx))

    def get_mask_sizes(self, queries: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """As the cache of self-attention gives it."""
        sizes: tuple[int, int] = self.self_attention_cache.get_mask_sizes(queries, layer_idx)
        return sizes

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """As the cache of self-attention gives it."""
        return int(self.self_attention_cache.get_max_length(layer_idx))

    def crop(self, max_length: int) -> None:
        """Drop tokens of the decoder; the encoder's output stays."""
        self.self_attention_cache.crop(max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See `Cache`."""
        self._each("reorder_cache", beam_idx)

    def reorder_after(self, beam_idx: Tensor, column: int) -> None:
        """See `Cache`; such rows read the same output of the encoder."""
        if isinstance(self.self_attention_cache, Cache):
            self.self_attention_cache.reorder_after(beam_idx, column)
        else:
            self.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `Cache`."""
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `Cache`."""
        self._each("batch_select_indices", indices)

    def reset(self) -> None:
        """See `Cache`."""
        self._each("reset")
        self.is_updated = dict.fromkeys(self.is_updated, False)

    def _each(self, method: str, *args: Any) -> None:
        for one in (self.self_attention_cache, self.cross_attention_cache):
            getattr(one, method)(*args)

    def activate_past_recording(self) -> None:
        """See `Cache`."""
        self.self_attention_cache.activate_past_recording()

    def to_legacy_cache(self) -> tuple[tuple[Tensor, ...], ...]:  # type: ignore[override]
        """Keys and values of the decoder's tokens and of the encoder's output, for each layer."""
        own, cross = self.self_attention_cache.to_legacy_cache(), self.cross_attention_cache.to_legacy_cache()
        return tuple(one + other for one, other in zip(own, cross, strict=True))

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[tuple[Tensor, ...]]) -> EncoderDecoderCache:
        """A cache of four tensors for each layer, as versions before 5 passed them."""
        return cls(past_key_values)

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """Those of self-attention."""
        found: list[Any] = self.self_attention_cache.layers
        return found

    @property
    def batch_size(self) -> int:
        """Rows stored; -1 when nothing is."""
        return int(self.self_attention_cache.batch_size)

    @property
    def is_compileable(self) -> bool:
        """Whether shapes never change."""
        return bool(self.self_attention_cache.is_compileable)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back any number of tokens."""
        return bool(self.self_attention_cache.is_croppable)

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether only the newest tokens are kept."""
        found: list[bool] = self.self_attention_cache.is_sliding
        return found
