"""Checkpoints of weights in eight-bit floating point, as DeepSeek publishes them and transformers saves them (`fp8`).

A module has `weight` `[out, in]` in e4m3 and `weight_scale_inv`, by which its blocks (of 128 by 128, where nothing else
is said) are multiplied. There are no products with such numbers here, so they become plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unspool.weights.quant.stored import Files, Stored, expect, scaled, tensor

__all__ = ["Reader"]


class Reader:
    """Reads the modules of such a checkpoint.

    Args:
        settings: `quantization_config` of its `config.json`.
        files: its files.
    """

    def __init__(self, settings: Mapping[str, Any], files: Files) -> None:
        self._files = files
        rows, columns = settings.get("weight_block_size") or (128, 128)
        self._block = int(rows), int(columns)

    def stored(self, module: str, shape: tuple[int, int]) -> Stored | None:
        """What the checkpoint holds for a module whose weight has `shape` `[out, in]`, if it is quantised."""
        weight, scale = f"{module}.weight", f"{module}.weight_scale_inv"
        if scale not in self._files:
            return None
        names = tuple(name for name in (weight, scale, f"{module}.activation_scale") if name in self._files)
        return Stored(None, names, lambda: self._read(weight, scale, shape))

    def _read(self, weight: str, scale: str, shape: tuple[int, int]) -> Tensor:
        scales, values = tensor(self._files, scale), expect(weight, tensor(self._files, weight), shape)
        if scales.numel() == 1:
            return scaled(values, scales, shape)
        counts = tuple(-(-size // length) for size, length in zip(shape, self._block, strict=True))
        return scaled(values, expect(scale, scales, counts), self._block)
