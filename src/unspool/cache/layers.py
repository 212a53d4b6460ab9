"""One layer's keys and values as rectangles, for modules that keep their past in a `Cache` object (see `kinds`).

Keys and values are `[rows, heads, tokens, dim]`. The layers grow in place with room to spare, so that a step copies its
own tokens and not the past; `keys` and `values` are views of what is filled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DynamicLayer", "Layer", "SlidingLayer", "StaticLayer", "StaticSlidingLayer", "number_of"]

# Tokens of room that a growing layer takes at least, beyond what it must hold.
_SPARE = 128

# Bytes of keys or values that are sooner copied than kept in a room of their own.
_SMALL = 2**15


def number_of(queries: int | Tensor) -> int:
    """How many tokens are about to be fed: a number, or (transformers 5.2) their positions `[tokens]`."""
    return queries.shape[0] if isinstance(queries, Tensor) else int(queries)


class Layer:
    """Base of the layers.

    Attributes:
        keys, values: `[rows, heads, tokens, dim]`, or `None` before the first `update`.
        is_initialized: whether there has been one.
        is_sliding: only the newest tokens are kept.
        is_compileable: shapes never change, so that a compiled forward serves every step.
        is_croppable: `crop` can take back any number of tokens.
        supports_early_init: `lazy_initialization` may be called ahead of the first `update`.
        device: where the layer computes; `keys` may be elsewhere while they are offloaded.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True
    record_past = False

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_seq_length()} tokens)"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens' keys and values; gives what attention is to read, in the order of `get_mask_sizes`."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.keys is None or not self.keys.numel() else self.keys.shape[-2]

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """Tokens that `update` will give for so many new ones, and the position of the first of them."""
        return self.get_seq_length() + number_of(queries), 0

    def get_max_length(self) -> int:
        """Most tokens the layer can hold; -1 when there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under the name of transformers 5.2."""
        return self.get_max_length()

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; a negative number drops that many from the end."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> None:
        """Make the layer's rows those at places `rows` `[new rows]`; a place may occur any number of times."""
        if self.keys is not None and self.values is not None and self.get_seq_length():
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def select_after(self, rows: Tensor, column: int) -> None:
        """`select`, of rows that agree with those they become in all columns before `column`."""
        self.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`select`, as beam search calls it."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """`select`; a mask `[rows]` will do too."""
        self.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        rows = self.batch_size
        if rows > 0:
            self.select(torch.arange(rows, device=self.device).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Rows stored; -1 when nothing is."""
        return -1 if self.keys is None else self.keys.shape[0]

    def activate_past_recording(self) -> None:
        """Keep what `crop` may need to bring back; only layers that forget must know."""

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False

    def offload(self) -> None:
        """Move what is stored to the CPU."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.to("cpu", non_blocking=True)
            self.values = self.values.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move it back."""
        if self.keys is not None and self.values is not None and self.device is not None:
            self.keys = self.keys.to(self.device, non_blocking=True)
            self.values = self.values.to(self.device, non_blocking=True)


class _Room:
    """Memory that a growing tensor `[rows, heads, tokens, dim]` is a view of, with space after its last token.

    One of a few kilobytes is copied in each step instead, which costs less than to look after it.
    """

    def __init__(self) -> None:
        self._whole: Tensor | None = None

    def append(self, past: Tensor | None, new: Tensor) -> Tensor:
        """`past` with `new` behind it; `past` is copied only when it is not in this room or the room is full."""
        if past is None or not past.numel():
            self._whole = None
            return new.contiguous()
        small = past.nbytes < _SMALL
        if small or (torch.is_grad_enabled() and (past.requires_grad or new.requires_grad)):
            self._whole = None
            return torch.cat([past, new], dim=-2)
        begin, length = self._begin(past), past.shape[-2]
        total = length + new.shape[-2]
        if begin is None or self._whole is None or begin + total > self._whole.shape[-2]:
            room = total + max(_SPARE, total // 4)
            self._whole = past.new_empty(*past.shape[:-2], room, past.shape[-1])
            self._whole[..., :length, :] = past
            begin = 0
        self._whole.narrow(-2, begin + length, new.shape[-2]).copy_(new)
        return self._whole.narrow(-2, begin, total)

    def _begin(self, past: Tensor) -> int | None:
        """Place of `past` in this room; `None` when it lies elsewhere, or may not be written to."""
        whole = self._whole
        if whole is None or whole.shape[:-2] != past.shape[:-2] or past.device != whole.device:
            return None
        if whole.is_inference() and not torch.is_inference_mode_enabled():
            return None
        offset = past.data_ptr() - whole.data_ptr()
        step = whole.shape[-1] * whole.element_size()
        inside = 0 <= offset < whole.shape[-2] * step and past.stride() == whole.stride()
        return offset // step if inside else None


class DynamicLayer(Layer):
    """Every token, without a limit."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms = (_Room(), _Room())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Layer`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._rooms
        self.keys = keys.append(self.keys, key_states)
        self.values = values.append(self.values, value_states)
        return self.keys, self.values

    def select_after(self, rows: Tensor, column: int) -> None:
        """See `Layer`: only what may differ is copied, in place."""
        if self.keys is None or self.values is None:
            return
        fixed = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if fixed or self.keys.requires_grad or len(rows) != self.keys.shape[0]:
            self.select(rows)
            return
        first = max(0, column - (self.get_seq_length() - self.keys.shape[-2]))
        for stored in (self.keys, self.values):
            part = stored[..., first:, :]
            part.copy_(part.index_select(0, rows.to(part.device)))

    def crop(self, length: int) -> None:
        """See `Layer`; more than is stored is kept as it is."""
        if self.keys is None or self.values is None:
            return
        keep = length if length > 0 else max(0, self.get_seq_length() + length)
        self.keys, self.values = self.keys[..., :keep, :], self.values[..., :keep, :]


class SlidingLayer(DynamicLayer):
    """The newest `window - 1` tokens, which is all that the next token may see besides itself.

    Args:
        sliding_window: tokens that a query sees, itself included.

    Attributes:
        cumulative_length: tokens seen so far, those that were dropped too.
        record_past: older tokens stay until the next `crop`, so that it can bring them back.
    """

    is_sliding = True
    is_croppable = False

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """See `Layer`."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Layer`: what is stored and the new tokens."""
        queries = key_states.shape[-2]
        keys, values = super().update(key_states, value_states)
        self.cumulative_length += queries
        seen = min(keys.shape[-2], self.sliding_window - 1 + queries)
        if not self.record_past:
            self._narrow(self.sliding_window - 1)
        return keys[..., keys.shape[-2] - seen :, :], values[..., values.shape[-2] - seen :, :]

    def _narrow(self, tokens: int) -> None:
        """Keep the newest `tokens` tokens."""
        assert self.keys is not None and self.values is not None
        first = max(0, self.keys.shape[-2] - tokens)
        self.keys, self.values = self.keys[..., first:, :], self.values[..., first:, :]

    def get_seq_length(self) -> int:
        """See `Layer`."""
        return self.cumulative_length

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """See `Layer`."""
        stored = min(self.cumulative_length, self.sliding_window - 1)
        return stored + number_of(queries), self.cumulative_length - stored

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def crop(self, length: int) -> None:
        """See `Layer`.

        Raises:
            ValueError: tokens would have to come back that were dropped; `activate_past_recording` keeps them.
        """
        if self.keys is None or self.values is None:
            return
        drop = -length if length <= 0 else max(0, self.cumulative_length - length)
        drop = min(drop, self.cumulative_length)
        stored, left = self.keys.shape[-2], self.cumulative_length - drop
        if drop and stored - drop < min(left, self.sliding_window - 1):
            raise ValueError(
                f"crop({length}): the window of {self.sliding_window} tokens has moved past what is needed again; call "
                "activate_past_recording() before the tokens are fed"
            )
        self.keys, self.values = self.keys[..., : stored - drop, :], self.values[..., : stored - drop, :]
        self.cumulative_length = left
        self._narrow(self.sliding_window - 1)

    def reset(self) -> None:
        """See `Layer`."""
        super().reset()
        self.cumulative_length = 0


class StaticLayer(Layer):
    """Memory for a fixed number of tokens, taken once; attention reads all of it under a mask.

    Args:
        max_cache_len: tokens.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory."""
        super().lazy_initialization(key_states, value_states)
        rows, heads = key_states.shape[:2]
        self.keys = key_states.new_zeros(rows, heads, self.max_cache_len, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, heads, self.max_cache_len, value_states.shape[-1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Layer`.

        Raises:
            ValueError: the tokens do not fit.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.cumulative_length + key_states.shape[-2]
        if end > self.max_cache_len:
            raise ValueError(f"the cache holds max_cache_len={self.max_cache_len} tokens and is asked to take {end}")
        self.keys[:, :, self.cumulative_length : end] = key_states
        self.values[:, :, self.cumulative_length : end] = value_states
        self.cumulative_length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """See `Layer`."""
        return self.cumulative_length

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """See `Layer`."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """`max_cache_len`."""
        return self.max_cache_len

    def crop(self, length: int) -> None:
        """See `Layer`; what lies behind is overwritten by the next tokens."""
        keep = length if length > 0 else self.cumulative_length + length
        self.cumulative_length = max(0, min(keep, self.cumulative_length))

    def reset(self) -> None:
        """Forget everything and keep the memory."""
        if self.keys is not None and self.values is not None:
            self.keys.zero_()
            self.values.zero_()
        self.cumulative_length = 0


class StaticSlidingLayer(StaticLayer):
    """Memory for the newest `sliding_window` tokens, taken once.

    Args:
        max_cache_len: most tokens that will be fed; less than the window takes less memory.
        sliding_window: tokens that a query sees, itself included.
    """

    is_sliding = True
    is_croppable = False

    def __init__(self, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(min(max_cache_len, sliding_window))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Layer`: the memory itself while tokens fit or come one by one, else the past with the new tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        room, before, new = self.max_cache_len, self.cumulative_length, key_states.shape[-2]
        if before + new <= room:
            return super().update(key_states, value_states)
        self.cumulative_length += new
        kept = min(before, room)
        oldest = int(kept == room)  # the oldest token of a full window is out of sight of every new one
        keys = torch.cat([self.keys[:, :, oldest:kept], key_states], dim=2)
        values = torch.cat([self.values[:, :, oldest:kept], value_states], dim=2)
        self.keys.copy_(keys[:, :, -room:])
        self.values.copy_(values[:, :, -room:])
        return (self.keys, self.values) if keys.shape[2] == room else (keys, values)

    def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
        """See `Layer`."""
        room, before, new = self.max_cache_len, self.cumulative_length, number_of(queries)
        if before + new <= room:
            return room, 0
        kept = min(before, room - 1) if before >= room else before
        return kept + new, before - kept

    def crop(self, length: int) -> None:
        """See `Layer`.

        Raises:
            ValueError: the window has moved, so what was dropped cannot come back.
        """
        if self.cumulative_length > self.max_cache_len:
            raise ValueError(
                f"crop({length}): the window of {self.max_cache_len} tokens has moved; older ones are gone"
            )
        super().crop(length)
