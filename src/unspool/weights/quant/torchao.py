"""torchao: checkpoints of its weight-only formats as transformers saves them, and its configurations.

A module has `_weight_qdata` and `_weight_scale`, mostly also `_weight_zero_point`; the file's metadata say under
`<module>.weight` which of torchao's tensors they make. What torchao does to activations is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unspool.errors import CheckpointError, Unsupported
from unspool.models.layers.quantised import INT4, INT8, Code, Codes
from unspool.weights.quant.stored import Files, Stored, expect, int4_code, scaled, shifted, tensor

__all__ = ["Reader", "wanted"]

_PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_READ = (*_INTEGERS, "Int4Tensor", "Float8Tensor")


class Reader:
    """Reads the modules of such a checkpoint.

    Args:
        settings: `quantization_config` of its `config.json`.
        files: its files.

    Raises:
        Unsupported: it is in pickled files.
    """

    def __init__(self, settings: Mapping[str, Any], files: Files) -> None:
        self._files = files

    def stored(self, module: str, shape: tuple[int, int]) -> Stored | None:
        """What the checkpoint holds for a module whose weight has `shape` `[out, in]`, if it is quantised."""
        first = f"{module}._weight_qdata"
        if first not in self._files:
            return None
        there = tuple(name for name in (f"{module}.{part}" for part in _PARTS) if name in self._files)
        kind, facts = self._facts(module, first)
        if f"{module}._weight_act_pre_scale" in self._files:
            raise Unsupported(f"{module!r} scales its inputs too (act_pre_scale), which cannot be read here")
        rows, columns = ([int(size) for size in facts.get("block_size", ())] or [*shape])[-2:]
        block = min(rows, shape[0]), min(columns, shape[1])
        by_row = block[0] == 1
        if kind == "Int4Tensor":
            return Stored(int4_code(block[1], True), there, lambda: self._packed(module, shape, block[1]))
        if kind in _INTEGERS and by_row and _bits(facts) <= 4:
            shifts = self._has_zeros(module)
            return Stored(int4_code(block[1], shifts), there, lambda: self._nibbles(module, shape, shifts))
        if kind in _INTEGERS and block == (1, shape[1]) and not self._has_zeros(module):
            return Stored(INT8, there, lambda: self._bytes(module, shape))
        return Stored(None, there, lambda: self._plain(module, shape, block))

    def _facts(self, module: str, name: str) -> tuple[str, dict[str, Any]]:
        try:
            found = json.loads(self._files[name].metadata[f"{module}.weight"])
            kind, facts = found["_type"], found["_data"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self._files[name].path} does not say in its metadata what {module!r} is made of; save it again with "
                "transformers and torchao 0.15 or newer"
            ) from error
        if kind not in _READ:
            raise Unsupported(
                f"{module!r} is a {kind} of torchao, which cannot be read here, only {', '.join(_READ)}; load it with "
                "transformers (pip install 'unspool[torchao,transformers]') and wrap it with unspool.wrap()"
            )
        return kind, facts

    def _part(self, module: str, part: str) -> Tensor:
        return tensor(self._files, f"{module}._weight_{part}")

    def _zeros(self, module: str) -> Tensor | None:
        return self._part(module, "zero_point") if f"{module}._weight_zero_point" in self._files else None

    def _has_zeros(self, module: str) -> bool:
        zeros = self._zeros(module)
        return zeros is not None and bool(zeros.any())

    def _bytes(self, module: str, shape: tuple[int, int]) -> Codes:
        codes = expect(f"{module}._weight_qdata", self._part(module, "qdata"), shape)
        scales = self._part(module, "scale").float().reshape(shape[0], 1)
        return Codes((codes.to(torch.int16) + 128).to(torch.uint8), scales)

    def _nibbles(self, module: str, shape: tuple[int, int], shifts: bool) -> Codes:
        codes = expect(f"{module}._weight_qdata", self._part(module, "qdata"), shape)
        scales = self._part(module, "scale").float().reshape(shape[0], -1)
        zeros = self._part(module, "zero_point").float().reshape(scales.shape) + 8 if shifts else None
        return shifted((codes + 8).to(torch.uint8), scales, zeros)

    def _packed(self, module: str, shape: tuple[int, int], group: int) -> Codes:
        name, (outputs, inputs) = f"{module}._weight_qdata", shape
        both = expect(name, self._part(module, "qdata"), (outputs, inputs // 2)).view(torch.uint8)
        # signed numbers of four bits, the even input's in the lower half
        codes = torch.stack((both & 15, both >> 4), dim=-1).view(shape) ^ 8
        counts = (-(-inputs // group), outputs)
        scales, offsets = (
            expect(f"{module}._weight_{part}", self._part(module, part), counts).t().float()
            for part in ("scale", "zero_point")
        )
        return Codes(codes, scales, offsets)

    def _plain(self, module: str, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
        values = expect(f"{module}._weight_qdata", self._part(module, "qdata"), shape)
        return scaled(values, self._part(module, "scale"), block, self._zeros(module))


def _bits(facts: Mapping[str, Any]) -> int:
    """Bits of an integer that a module's tensor keeps in a byte each."""
    name = str((facts.get("target_dtype") or {}).get("_data", "int8"))
    return int(name.removeprefix("int"))


def wanted(config: object) -> tuple[Code, tuple[str, ...]]:
    """How transformers' `TorchAoConfig` (or its entries in a `config.json`) wants layers quantised while loading.

    Returns:
        The code, and the names of modules to leave as they are.

    Raises:
        Unsupported: a way that there are no products for here.
    """
    entries = config if isinstance(config, Mapping) else vars(config)
    kind, facts = _named(entries.get("quant_type"))
    if kind == "dict" and "default" in facts:
        kind, facts = _named(facts["default"])
    grain, size = _named(facts.get("granularity"))
    group = size.get("group_size") if grain == "PerGroup" else facts.get("group_size")
    width = str(_named(facts.get("weight_dtype"))[0]).removeprefix("torch.")
    code = None
    if kind == "Int8WeightOnlyConfig" or (kind == "IntxWeightOnlyConfig" and width == "int8"):
        code = INT8 if group is None else None
    elif kind == "Int4WeightOnlyConfig" or (kind == "IntxWeightOnlyConfig" and width == "int4"):
        code = replace(INT4, group=int(group)) if group and int(group) % 32 == 0 else None
    if code is None or entries.get("include_input_output_embeddings"):
        raise Unsupported(
            f"quantization_config asks for torchao's {kind} ({_told(facts)}), which is not quantised natively; use "
            "Int8WeightOnlyConfig or Int4WeightOnlyConfig with groups of 32, 64, …, or load through transformers: "
            "unspool.wrap(transformers.AutoModelForCausalLM.from_pretrained(...))"
        )
    return code, tuple(entries.get("modules_to_not_convert") or ())


def _named(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and fields of one of torchao's settings, an object or what a `config.json` says of it."""
    if isinstance(value, Mapping):
        if "_type" not in value:
            return "dict", dict(value)
        inner = value.get("_data")
        return (str(value["_type"]), dict(inner)) if isinstance(inner, Mapping) else (str(inner), {})
    if value is None or isinstance(value, torch.dtype) or not hasattr(value, "__dict__"):
        return str(value), {}
    return type(value).__name__, dict(vars(value))


def _told(facts: Mapping[str, Any]) -> str:
    texts = {name: str(value) if isinstance(value, int) else _named(value)[0] for name, value in facts.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())
