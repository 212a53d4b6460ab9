"""Layers whose past is a state of fixed size (Mamba and other linear attention), alone or beside keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.cache.layers import DynamicLayer, Layer, SlidingLayer, StaticLayer, StaticSlidingLayer

__all__ = ["EmptyLayer", "HybridLayer", "RecurrentLayer"]


class RecurrentLayer:
    """The last inputs of causal convolutions `[rows, channels, kernel]` and recurrent states `[rows, ...]`.

    Args:
        number_of_states: of each, where a layer mixes more than one stream.

    Attributes:
        conv_states, recurrent_states: by number, `None` before the first update.
        has_previous_state: by number, whether anything was fed.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = False
    supports_early_init = False

    def __init__(self, number_of_states: int = 1) -> None:
        self.number_of_states = number_of_states
        self.conv_states: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))
        self.recurrent_states: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))
        self.has_previous_state = dict.fromkeys(range(number_of_states), False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.number_of_states} states)"

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Take new inputs `[rows, channels, tokens]`: gives them behind the stored ones, keeps the last `kernel`."""
        past = self.conv_states[state_idx]
        kernel = past.shape[-1] if past is not None else conv_kernel_size or conv_states.shape[-1]
        if past is None or not self.has_previous_state[state_idx]:
            whole = F.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        else:
            whole = torch.cat([past, conv_states], dim=-1)
        self.conv_states[state_idx] = whole[..., whole.shape[-1] - kernel :].clone()
        self.has_previous_state[state_idx] = True
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Replace a state."""
        self.recurrent_states[state_idx] = recurrent_states.clone()
        return recurrent_states

    def select(self, rows: Tensor) -> None:
        """See `Layer.select`."""
        for states in (self.conv_states, self.recurrent_states):
            for number, state in states.items():
                if state is not None:
                    states[number] = state.index_select(0, rows.to(state.device))

    def select_after(self, rows: Tensor, column: int) -> None:
        """See `Layer.select_after`; a state has all columns in it."""
        self.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`select`, as beam search calls it."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """`select`; a mask `[rows]` will do too."""
        self.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.batch_size > 0:
            self.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Rows stored; -1 when nothing is."""
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        return next((state.shape[0] for state in states if state is not None), -1)

    def get_max_length(self) -> int:
        """-1: a state has no length."""
        return -1

    def activate_past_recording(self) -> None:
        """Nothing: a state does not remember."""

    def crop(self, length: int) -> None:
        """Only nothing can be taken back.

        Raises:
            ValueError: a recurrent state cannot go back to earlier tokens.
        """
        if length != 0:
            raise ValueError(f"crop({length}): a recurrent state cannot go back; decode without drafts")

    def reset(self) -> None:
        """Forget everything."""
        self.conv_states = dict.fromkeys(self.conv_states)
        self.recurrent_states = dict.fromkeys(self.recurrent_states)
        self.has_previous_state = dict.fromkeys(self.has_previous_state, False)

    def offload(self) -> None:
        """Nothing: a state is small."""

    def prefetch(self) -> None:
        """Nothing: a state stays where it is."""


class HybridLayer(RecurrentLayer):
    """A state and keys and values in one layer.

    Args:
        attention: the layer that holds the keys and values.
        number_of_states: see `RecurrentLayer`.
    """

    def __init__(
        self, attention: DynamicLayer | SlidingLayer | StaticLayer | StaticSlidingLayer, number_of_states: int = 1
    ) -> None:
        super().__init__(number_of_states)
        self.attention: Layer = attention
        self.is_sliding = attention.is_sliding
        self.is_compileable = attention.is_compileable

    def __getattr__(self, name: str) -> Any:
        if name == "attention":  # not there yet while the object is made or copied
            raise AttributeError(name)
        return getattr(self.attention, name)

    def select(self, rows: Tensor) -> None:
        """See `Layer.select`."""
        super().select(rows)
        self.attention.select(rows)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.attention.reset()

    def get_max_length(self) -> int:
        """Most tokens of the keys and values."""
        return self.attention.get_max_length()

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.attention.offload()

    def prefetch(self) -> None:
        """Move them back."""
        self.attention.prefetch()


class EmptyLayer(Layer):
    """A layer that stores nothing: it reads another's keys and values, or has no attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Gives back what it got."""
        return key_states, value_states

    def crop(self, length: int) -> None:
        """Nothing to drop."""
