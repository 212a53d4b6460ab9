"""Keys and values in 8, 4 or 2 bits, with the newest tokens in full precision.

Keys are quantised along tokens for each channel, values along channels for each token, in groups with a scale and an
offset of their own (KIVI, Liu et al., 2024). A token is quantised once, when it leaves the window of recent ones, and
its codes never change afterwards: reordering, selecting and cropping rows loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unspool.cache.layers import Layer

__all__ = ["QuantizedLayer"]


@dataclass(slots=True)
class _Packed:
    """Quantised vectors: groups along the last dimension of `[rows, heads, tokens or channels, ...]`.

    Attributes:
        codes: uint8, `8 // bits` codes in a byte along the last dimension.
        scale, offset: `[..., groups, 1]`; a number is `code * scale + offset`.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def map(self, change: Any) -> _Packed:
        """The same with `change` applied to each tensor."""
        return _Packed(change(self.codes), change(self.scale), change(self.offset))


def _grouped(numbers: Tensor, size: int) -> Tensor:
    """`[..., n]` as `[..., n / size, size]`."""
    return numbers.reshape(*numbers.shape[:-1], -1, size)


def _pack(numbers: Tensor, bits: int, group: int) -> _Packed:
    """Quantise `numbers` `[..., n]` in groups of `group` along the last dimension, which must divide it."""
    grouped = _grouped(numbers, group).float()
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((grouped - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    share = 8 // bits
    parts = _grouped(codes, share)
    packed = parts[..., 0].clone()
    for i in range(1, share):
        packed |= parts[..., i] << (bits * i)
    return _Packed(packed, scale, low)


def _unpack(packed: _Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers `[..., n]` again."""
    share = 8 // bits
    codes = packed.codes
    if share > 1:
        codes = torch.stack([(codes >> (bits * i)) & (2**bits - 1) for i in range(share)], dim=-1).flatten(-2)
    grouped = _grouped(codes, codes.shape[-1] // packed.scale.shape[-2]).float()
    return (grouped * packed.scale + packed.offset).flatten(-2).to(dtype)


class QuantizedLayer(Layer):
    """Every token, old ones quantised; see the module's text.

    Args:
        nbits: 8, 4 or 2.
        q_group_size: numbers that share a scale. Tokens are quantised that many at a time; a head's channels are cut
            into groups of the largest size that divides both.
        residual_length: recent tokens kept in full precision, at least.

    Attributes:
        keys, values: the recent tokens alone.
    """

    def __init__(self, nbits: int = 4, q_group_size: int = 64, residual_length: int = 128) -> None:
        super().__init__()
        if nbits not in (8, 4, 2):
            raise ValueError(f"nbits={nbits} is not supported; take 8, 4 or 2")
        if q_group_size < 8 or q_group_size % 8:
            raise ValueError(f"q_group_size={q_group_size} must be a multiple of 8")
        if residual_length < 0:
            raise ValueError(f"residual_length={residual_length} must not be negative")
        self.nbits, self.q_group_size, self.residual_length = nbits, q_group_size, residual_length
        self._old_keys: list[_Packed] = []  # [rows, heads, dim, tokens], so that groups run along tokens
        self._old_values: list[_Packed] = []  # [rows, heads, tokens, dim]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Layer`: old tokens restored from their codes, recent and new ones as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states if self.keys is None else torch.cat([self.keys, key_states], dim=-2)
        values = value_states if self.values is None else torch.cat([self.values, value_states], dim=-2)
        seen = self._restored(keys, values)
        self.keys, self.values = keys, values
        self._age()
        return seen

    def _restored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self._old_keys:
            return keys, values
        old_keys = [_unpack(part, self.nbits, keys.dtype).transpose(-1, -2) for part in self._old_keys]
        old_values = [_unpack(part, self.nbits, values.dtype) for part in self._old_values]
        return torch.cat([*old_keys, keys], dim=-2), torch.cat([*old_values, values], dim=-2)

    def _age(self) -> None:
        """Quantise whole groups of tokens that are no longer recent."""
        assert self.keys is not None and self.values is not None
        size = self.q_group_size
        groups = (self.keys.shape[-2] - self.residual_length) // size
        if groups <= 0:
            return
        old = groups * size
        self._old_keys.append(_pack(self.keys[..., :old, :].transpose(-1, -2), self.nbits, size))
        dim = self.values.shape[-1]
        self._old_values.append(_pack(self.values[..., :old, :], self.nbits, _divisor(dim, size)))
        self.keys, self.values = self.keys[..., old:, :].clone(), self.values[..., old:, :].clone()
        if len(self._old_keys) > 1:
            self._old_keys = [_joined(self._old_keys, 3, -2)]
            self._old_values = [_joined(self._old_values, 2, 2)]

    def get_seq_length(self) -> int:
        """See `Layer`."""
        recent = 0 if self.keys is None else self.keys.shape[-2]
        return recent + sum(part.codes.shape[2] for part in self._old_values)

    def crop(self, length: int) -> None:
        """See `Layer`; a group that is cut into comes back to the recent tokens, as its codes say."""
        if self.keys is None or self.values is None:
            return
        total, recent = self.get_seq_length(), self.keys.shape[-2]
        drop = -length if length <= 0 else max(0, total - length)
        if drop <= recent:
            self.keys, self.values = self.keys[..., : recent - drop, :], self.values[..., : recent - drop, :]
            return
        keep = max(0, total - drop)
        keys, values = self._restored(self.keys, self.values)
        groups = keep // self.q_group_size
        old = groups * self.q_group_size
        self.keys, self.values = keys[..., old:keep, :].clone(), values[..., old:keep, :].clone()
        share = 8 // self.nbits
        self._old_keys = [
            _Packed(part.codes[..., : old // share], part.scale[..., :groups, :], part.offset[..., :groups, :])
            for part in self._old_keys
            if groups
        ]
        self._old_values = [part.map(lambda x: x[:, :, :old]) for part in self._old_values if groups]

    def select(self, rows: Tensor) -> None:
        """See `Layer`: codes move as they are."""
        if self.keys is None or self.values is None:
            return
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self._old_keys = [part.map(lambda x: x.index_select(0, rows)) for part in self._old_keys]
        self._old_values = [part.map(lambda x: x.index_select(0, rows)) for part in self._old_values]

    def reset(self) -> None:
        """See `Layer`."""
        super().reset()
        self._old_keys, self._old_values = [], []

    @property
    def stored_bytes(self) -> int:
        """Memory of what is stored."""
        parts = [t for part in (*self._old_keys, *self._old_values) for t in (part.codes, part.scale, part.offset)]
        return sum(t.numel() * t.element_size() for t in (*parts, self.keys, self.values) if t is not None)


def _joined(parts: list[_Packed], codes: int, groups: int) -> _Packed:
    """Packed parts behind each other: codes along dimension `codes`, scales along `groups`."""
    return _Packed(
        torch.cat([part.codes for part in parts], codes),
        torch.cat([part.scale for part in parts], groups),
        torch.cat([part.offset for part in parts], groups),
    )


def _divisor(number: int, limit: int) -> int:
    """Largest divisor of `number` up to `limit`."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
