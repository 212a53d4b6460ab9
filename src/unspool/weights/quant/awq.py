"""AWQ checkpoints of four bits (Lin et al., 2023), as AutoAWQ writes them (`version: gemm`).

A module has `qweight` `[in, out / 8]`, `qzeros` `[groups, out / 8]` and `scales` `[groups, out]`; the eight codes of a
word stand for outputs in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unspool.errors import Unsupported
from unspool.models.layers.quantised import Codes
from unspool.weights.quant.stored import Files, Stored, column_words, expect, int4_code, shifted, tensor

__all__ = ["Reader"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Reader:
    """Reads the modules of such a checkpoint.

    Args:
        settings: `quantization_config` of its `config.json`.
        files: its files.

    Raises:
        Unsupported: another number of bits or another layout.
    """

    def __init__(self, settings: Mapping[str, Any], files: Files) -> None:
        bits, version = settings.get("bits", settings.get("w_bit", 4)), str(settings.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise Unsupported(f"AWQ with {bits} bits in the layout {version!r} cannot be read here, only 4 in 'gemm'")
        self._files = files
        self._group = int(settings.get("group_size", settings.get("q_group_size", 128)))
        self._zeros = bool(settings.get("zero_point", True))

    def stored(self, module: str, shape: tuple[int, int]) -> Stored | None:
        """What the checkpoint holds for a module whose weight has `shape` `[out, in]`, if it is quantised."""
        if f"{module}.qweight" not in self._files:
            return None
        names = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        group = self._group if self._group > 0 else shape[1]
        there = tuple(name for name in names if name in self._files)
        return Stored(int4_code(group, self._zeros), there, lambda: self._read(module, shape, group))

    def _read(self, module: str, shape: tuple[int, ...], group: int) -> Codes:
        outputs, inputs = shape
        groups = -(-inputs // group)
        name = f"{module}.qweight"
        codes = column_words(expect(name, tensor(self._files, name), (inputs, outputs // 8)), _ORDER)
        scales = expect(f"{module}.scales", tensor(self._files, f"{module}.scales"), (groups, outputs)).t()
        zeros = column_words(tensor(self._files, f"{module}.qzeros"), _ORDER).t() if self._zeros else None
        return shifted(codes.t().contiguous(), scales, zeros)
