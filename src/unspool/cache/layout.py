"""Which layers share a block table, and how large one token's keys and values are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that store keys and values of the same shape for the same tokens, and so share one block table.

    Attributes:
        layers: model layer numbers, ascending.
        kv_heads: key/value heads of each layer.
        head_dim: elements of one key or value vector.
        window: how many tokens a query sees, itself included; `None` sees all before it.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int | None = None

    def bytes_per_token(self, element_size: int) -> int:
        """Bytes that one token's keys and values take in all layers of the group."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * element_size

    def first_seen(self, position: int) -> int:
        """The oldest position that the token at `position` sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)
