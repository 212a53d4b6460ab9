"""Checkpoints that transformers saved of models quantised by bitsandbytes: NF4 and FP4, with or without double
quantisation, and LLM.int8 (https://huggingface.co/docs/bitsandbytes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unspool.errors import CheckpointError, Unsupported
from unspool.models.layers.quantised import FP4, INT8, NF4, Codes
from unspool.weights.quant.stored import Files, Stored, expect, tensor

__all__ = ["Reader"]

_STATE = "quant_state.bitsandbytes__"
_KINDS = {"nf4": NF4, "fp4": FP4}


class Reader:
    """Reads the modules of such a checkpoint.

    Args:
        settings: `quantization_config` of its `config.json`.
        files: its files.
    """

    def __init__(self, settings: Mapping[str, Any], files: Files) -> None:
        self._files = files

    def stored(self, module: str, shape: tuple[int, int]) -> Stored | None:
        """What the checkpoint holds for a module whose weight has `shape` `[out, in]`, if it is quantised."""
        weight = f"{module}.weight"
        if f"{module}.SCB" in self._files:
            return Stored(
                INT8, self._there(module, "weight", "SCB", "weight_format"), lambda: self._bytes(module, shape)
            )
        kind = next((kind for kind in _KINDS if f"{weight}.{_STATE}{kind}" in self._files), None)
        if kind is None:
            return None
        facts = json.loads(bytes(tensor(self._files, f"{weight}.{_STATE}{kind}").tolist()))
        group = _group(module, int(facts["blocksize"]), shape)
        names = (
            weight,
            *self._there(weight, _STATE + kind, "absmax", "quant_map", "nested_absmax", "nested_quant_map"),
        )
        return Stored(replace(_KINDS[kind], group=group), names, lambda: self._nibbles(weight, facts, shape, group))

    def _there(self, base: str, *parts: str) -> tuple[str, ...]:
        return tuple(name for name in (f"{base}.{part}" for part in parts) if name in self._files)

    def _bytes(self, module: str, shape: tuple[int, int]) -> Codes:
        name = f"{module}.weight_format"
        if name in self._files and int(tensor(self._files, name)):
            raise Unsupported(f"{module!r} holds its weight in a layout for one GPU; save it again with transformers")
        codes = expect(f"{module}.weight", tensor(self._files, f"{module}.weight"), shape)
        scales = expect(f"{module}.SCB", tensor(self._files, f"{module}.SCB"), shape[:1])
        return Codes((codes.to(torch.int16) + 128).to(torch.uint8), scales.float()[:, None] / 127)

    def _nibbles(self, weight: str, facts: dict[str, Any], shape: tuple[int, ...], group: int) -> Codes:
        count = shape[0] * shape[1]
        both = tensor(self._files, weight).view(-1).view(torch.uint8)
        if both.numel() != count // 2 or tuple(facts["shape"]) != shape:
            raise CheckpointError(f"the tensor {weight!r} has {both.numel()} bytes; a weight {list(shape)} needs half")
        codes = torch.stack((both >> 4, both & 15), dim=-1).view(shape)
        scales = self._scales(weight, facts)
        expect(f"{weight}.absmax", scales, (-(-count // int(facts["blocksize"])),))
        # a block may be several rows, which then share its scale
        scales = scales.repeat_interleave(int(facts["blocksize"]) // group)
        return Codes(codes, scales[: count // group].view(shape[0], -1))

    def _scales(self, weight: str, facts: dict[str, Any]) -> Tensor:
        absmax = tensor(self._files, f"{weight}.absmax")
        if "nested_offset" not in facts:
            return absmax.float()
        table = tensor(self._files, f"{weight}.nested_quant_map")
        outer = tensor(self._files, f"{weight}.nested_absmax").repeat_interleave(int(facts["nested_blocksize"]))
        return table[absmax.int()] * outer[: absmax.numel()] + float(facts["nested_offset"])


def _group(module: str, block: int, shape: tuple[int, int]) -> int:
    """Inputs of one output that share a scale, where blocks run on from one output to the next."""
    inputs = shape[1]
    if inputs % block == 0:
        return block
    if block % inputs == 0 and inputs % 32 == 0:
        return inputs
    raise Unsupported(f"{module!r} has {inputs} inputs, which blocks of {block} do not divide; it cannot be read here")
