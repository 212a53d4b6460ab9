"""compressed-tensors checkpoints with weights of four or eight bits (`pack-quantized`, `int-quantized`,
`float-quantized`, `naive-quantized`), as llm-compressor writes them. What they say of activations is left out.

A module has `weight_packed` `[out, in * bits / 32]` with four or eight codes in a word, or `weight` `[out, in]` of int8
or e4m3, and `weight_scale` for each tensor, output, group of inputs or block; unsymmetric ones also
`weight_zero_point`, packed along the outputs where the weight is packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unspool.errors import Unsupported
from unspool.models.layers.quantised import INT8, Codes
from unspool.weights.quant.stored import Files, Stored, column_words, expect, int4_code, scaled, shifted, tensor

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
            kind, order = (weights.get("type", "int"), weights.get("num_bits")), weights.get("actorder")
            if kind not in (("int", 4), ("int", 8), ("float", 8)) or order not in (None, False, "weight", "static"):
                raise Unsupported(
                    f"compressed-tensors weights of type {kind[0]!r} with {kind[1]} bits and actorder {order!r} cannot "
                    "be read here, only 'int' with 4 or 8, 'float' with 8, and none"
                )
        found = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
        blocks = [entry["block_structure"] for entry in found if entry.get("strategy") == "block"]
        self._block = (int(blocks[0][0]), int(blocks[0][1])) if blocks else None

    def stored(self, module: str, shape: tuple[int, int]) -> Stored | None:
        """What the checkpoint holds for a module whose weight has `shape` `[out, in]`, if it is quantised."""
        scale, packed, zero = (f"{module}.weight_{part}" for part in ("scale", "packed", "zero_point"))
        if scale not in self._files:
            return None
        parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        there = tuple(name for name in (f"{module}.{part}" for part in parts) if name in self._files)
        found, shifts = self._files[scale].entries[scale].shape, zero in self._files
        outputs, inputs = shape
        count = found[-1] if len(found) == 2 and found[0] == outputs else 1
        group = -(-inputs // count)
        bits = 8
        if packed in self._files:
            width = self._files[packed].entries[packed].shape[-1]
            bits = width * 32 // inputs
            if bits not in (4, 8) or bits * inputs != width * 32:
                raise Unsupported(f"{module!r} packs {inputs} inputs in {width} words; only 4 and 8 bits are read here")
        if bits == 4:
            return Stored(int4_code(group, shifts), there, lambda: self._nibbles(module, shape))
        if self._is_integer(module) and count == 1 and not shifts and (len(found) < 2 or found[0] in (1, outputs)):
            return Stored(INT8, there, lambda: self._bytes(module, shape))
        block = self._block or ((1, group) if math.prod(found) >= outputs else shape)
        return Stored(None, there, lambda: self._plain(module, shape, block))

    def _is_integer(self, module: str) -> bool:
        weight = f"{module}.weight"
        return weight not in self._files or not self._files[weight].entries[weight].dtype.is_floating_point

    def _values(self, module: str, shape: tuple[int, int]) -> Tensor:
        """The numbers `[out, in]` that scales are for, int8 or in floating point."""
        packed = f"{module}.weight_packed"
        if packed not in self._files:
            return expect(f"{module}.weight", tensor(self._files, f"{module}.weight"), shape)
        words = expect(packed, tensor(self._files, packed), (shape[0], shape[1] // 4))
        return (words.view(torch.uint8) ^ 128).view(torch.int8)

    def _bytes(self, module: str, shape: tuple[int, int]) -> Codes:
        codes = self._values(module, shape)
        scales = tensor(self._files, f"{module}.weight_scale").float().reshape(-1, 1)
        return Codes((codes.to(torch.int16) + 128).to(torch.uint8), scales.expand(shape[0], 1).contiguous())

    def _plain(self, module: str, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
        name = f"{module}.weight_zero_point"
        zeros = tensor(self._files, name) if name in self._files else None
        if zeros is not None and f"{module}.weight_packed" in self._files:
            zeros = (zeros.t().contiguous().view(torch.uint8).t()[: shape[0]].to(torch.int16)) - 128
        return scaled(self._values(module, shape), tensor(self._files, f"{module}.weight_scale"), block, zeros)

    def _nibbles(self, module: str, shape: tuple[int, int]) -> Codes:
        codes = column_words(tensor(self._files, f"{module}.weight_packed"))
        expect(f"{module}.weight_packed", codes, shape)
        scales = tensor(self._files, f"{module}.weight_scale")
        scales = scales if scales.dim() == 2 and len(scales) == shape[0] else scales.reshape(-1, 1).expand(shape[0], 1)
        name, zeros = f"{module}.weight_zero_point", None
        if name in self._files:
            words = tensor(self._files, name)
            zeros = column_words(words.t().contiguous())[:, : shape[0]].t() if words.dtype == torch.int32 else words + 8
        return shifted(codes, scales, zeros)
