"""compressed-tensors checkpoints with weights of four or eight bits (`pack-quantized`, `int-quantized`,
`naive-quantized`), as llm-compressor writes them. What they say of quantising activations is left out.

A module has `weight_packed` `[out, in / 8]` with eight codes in a word, or `weight` `[out, in]` int8, and
`weight_scale` `[out, groups]`; unsymmetric ones also `weight_zero_point`, packed along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unspool.errors import Unsupported
from unspool.models.layers.quantised import INT8, Codes
from unspool.weights.quant.stored import Files, Stored, column_words, expect, int4_code, shifted, tensor

__all__ = ["Reader"]


class Reader:
    """Reads the modules of such a checkpoint.

    Args:
        settings: `quantization_config` of its `config.json`.
        files: its files.

    Raises:
        Unsupported: another kind of weights.
    """

    def __init__(self, settings: Mapping[str, Any], files: Files) -> None:
        self._files = files
        for group in settings.get("config_groups", {}).values():
            weights = group.get("weights") or {}
            kind = (weights.get("type", "int"), weights.get("num_bits"))
            if kind not in (("int", 4), ("int", 8)) or weights.get("actorder") not in (None, False, "weight", "static"):
                raise Unsupported(
                    f"compressed-tensors weights of type {kind[0]!r} with {kind[1]} bits and actorder "
                    f"{weights.get('actorder')!r} cannot be read here, only 'int' with 4 or 8 and none"
                )

    def stored(self, module: str, shape: tuple[int, ...]) -> Stored | None:
        """What the checkpoint holds for a module whose weight has `shape` `[out, in]`, if it is quantised."""
        scale, packed, zero = (f"{module}.weight_{part}" for part in ("scale", "packed", "zero_point"))
        if scale not in self._files:
            return None
        parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        there = tuple(name for name in (f"{module}.{part}" for part in parts) if name in self._files)
        if packed not in self._files:
            return Stored(INT8, there, lambda: self._bytes(module, shape))
        width = self._files[packed].entries[packed].shape[-1]
        if width * 8 != shape[1]:
            raise Unsupported(f"{module!r} packs {shape[1]} inputs in {width} words; only 4 bits are read packed here")
        group = -(-shape[1] // self._files[scale].entries[scale].shape[-1])
        return Stored(int4_code(group, zero in self._files), there, lambda: self._nibbles(module, shape))

    def _bytes(self, module: str, shape: tuple[int, ...]) -> Codes:
        codes = expect(f"{module}.weight", tensor(self._files, f"{module}.weight"), shape)
        scales = tensor(self._files, f"{module}.weight_scale").float().reshape(-1, 1)
        if scales.shape[0] not in (1, shape[0]) or f"{module}.weight_zero_point" in self._files:
            raise Unsupported(f"{module!r} has 8 bits with groups or zero points; only a scale per output is read here")
        return Codes((codes.to(torch.int16) + 128).to(torch.uint8), scales.expand(shape[0], 1).contiguous())

    def _nibbles(self, module: str, shape: tuple[int, ...]) -> Codes:
        codes = column_words(tensor(self._files, f"{module}.weight_packed"))
        expect(f"{module}.weight_packed", codes, shape)
        scales = tensor(self._files, f"{module}.weight_scale")
        name, zeros = f"{module}.weight_zero_point", None
        if name in self._files:
            words = tensor(self._files, name)
            zeros = column_words(words.t().contiguous())[:, : shape[0]].t() if words.dtype == torch.int32 else words + 8
        return shifted(codes, scales, zeros)
