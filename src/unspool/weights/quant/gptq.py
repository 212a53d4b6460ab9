"""GPTQ checkpoints of four bits (Frantar et al., 2022), as AutoGPTQ and GPTQModel write them.

A module has `qweight` `[in / 8, out]`, `qzeros` `[groups, out / 8]`, `scales` `[groups, out]` and `g_idx` `[in]`, the
group of each input; words hold eight codes, the lowest first. The older form keeps zero points less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unspool.errors import Unsupported
from unspool.models.layers.quantised import Codes
from unspool.weights.quant.stored import Files, Stored, column_words, expect, int4_code, shifted, tensor

__all__ = ["Reader"]


class Reader:
    """Reads the modules of such a checkpoint.

    Args:
        settings: `quantization_config` of its `config.json`.
        files: its files.

    Raises:
        Unsupported: another number of bits.
    """

    def __init__(self, settings: Mapping[str, Any], files: Files) -> None:
        if int(settings.get("bits", 4)) != 4:
            raise Unsupported(f"GPTQ with {settings['bits']} bits cannot be read here, only with 4")
        self._files = files
        self._symmetric = bool(settings.get("sym", True))
        self._group = int(settings.get("group_size", 128))
        self._ordered = bool(settings.get("desc_act"))
        self._less = 0 if settings.get("checkpoint_format", "gptq") == "gptq_v2" else 1

    def stored(self, module: str, shape: tuple[int, int]) -> Stored | None:
        """What the checkpoint holds for a module whose weight has `shape` `[out, in]`, if it is quantised."""
        if f"{module}.qweight" not in self._files:
            return None
        names = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
        group = self._group if self._group > 0 else shape[1]
        there = tuple(name for name in names if name in self._files)
        if self._ordered and self._order(module, shape[1], group) is not None:
            return Stored(None, there, lambda: self._plain(module, shape, group))
        return Stored(int4_code(group, not self._symmetric), there, lambda: self._read(module, shape, group))

    def _order(self, module: str, inputs: int, group: int) -> Tensor | None:
        """The group of each input, where groups are not inputs side by side."""
        name = f"{module}.g_idx"
        if name not in self._files:
            return None
        found = expect(name, tensor(self._files, name), (inputs,)).long()
        return None if torch.equal(found, torch.arange(inputs) // group) else found

    def _plain(self, module: str, shape: tuple[int, int], group: int) -> Tensor:
        """Rows whose inputs have scales here and there (desc_act)."""
        order = self._order(module, shape[1], group)
        codes, scales, zeros = self._parts(module, shape, group)
        return (codes.float() - zeros.float()[:, order]) * scales.float()[:, order]

    def _read(self, module: str, shape: tuple[int, int], group: int) -> Codes:
        if self._order(module, shape[1], group) is not None:
            raise Unsupported(
                f"{module!r} has its inputs in another order, but its configuration does not say `desc_act`"
            )
        codes, scales, zeros = self._parts(module, shape, group)
        if self._symmetric and bool((zeros == 8).all()):
            return shifted(codes, scales, None)
        if self._symmetric:
            raise Unsupported(f"{module!r} has zero points although its configuration says `sym`; set `sym` to false")
        return shifted(codes, scales, zeros)

    def _parts(self, module: str, shape: tuple[int, int], group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[out, in]`, scales and the codes that stand for 0 `[out, groups]`."""
        outputs, inputs = shape
        groups = -(-inputs // group)
        name = f"{module}.qweight"
        words = expect(name, tensor(self._files, name), (inputs // 8, outputs))
        codes = column_words(words.t().contiguous())
        scales = expect(f"{module}.scales", tensor(self._files, f"{module}.scales"), (groups, outputs)).t()
        zeros = column_words(tensor(self._files, f"{module}.qzeros"))[:, :outputs].t() + self._less
        return codes, scales, zeros
