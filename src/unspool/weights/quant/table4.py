"""Four bits that stand for 16 numbers of a table, NF4 or FP4, times the largest weight of their block.

(Dettmers et al., 2023, "QLoRA"; as bitsandbytes writes them, but that blocks do not go on from one output to the next.)
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.models.layers.quantised import FP4_TABLE, NF4_TABLE, Code, Codes

__all__ = ["bounds", "encode"]

_TABLES = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}


@cache
def _bounds(name: str) -> tuple[Tensor, Tensor]:
    values, order = torch.tensor(_TABLES[name], dtype=torch.float32).sort(stable=True)
    return (values[1:] + values[:-1]) / 2, order.to(torch.uint8)


def bounds(code: Code) -> tuple[Tensor, Tensor]:
    """`[15]` ascending numbers and `[16]` codes: what lies above `i` of the numbers has the `i`-th code."""
    return _bounds(code.name)


def encode(rows: Tensor, code: Code) -> Codes:
    """Quantise `rows` `[n, in]` to the nearest numbers of `code`'s table."""
    count, inputs = rows.shape
    between, order = bounds(code)
    grouped = F.pad(rows.float(), (0, -inputs % code.group)).view(count, -1, code.group)
    scales = grouped.abs().amax(dim=2, keepdim=True)
    places = torch.bucketize(grouped / torch.where(scales > 0, scales, 1.0), between)
    return Codes(order[places].view(count, -1)[:, :inputs], scales[:, :, 0])
