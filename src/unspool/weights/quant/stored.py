"""What a quantised checkpoint holds for one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unspool.errors import CheckpointError
from unspool.models.layers.quantised import INT4, Code, Codes, dequantise
from unspool.weights.safetensors import SafetensorsFile

__all__ = ["Files", "Stored", "column_words", "expect", "int4_code", "scaled", "shifted", "tensor"]

Files = Mapping[str, SafetensorsFile]
"""The file that holds a tensor, by the tensor's name."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantised weight `[out, in]` on disk.

    Attributes:
        code: how it is written; `None` for a way that is not computed with, so that it becomes a plain weight.
        names: of the tensors that make it.
        read: brings the whole of it, as codes, or as rows where there is no code.
    """

    code: Code | None
    names: tuple[str, ...]
    read: Callable[[], Codes | Tensor]

    def codes(self) -> Codes:
        """The codes, where there is a code."""
        found = self.read()
        assert not isinstance(found, Tensor)
        return found

    def rows(self) -> Tensor:
        """The weight itself, in a floating dtype."""
        found = self.read()
        if isinstance(found, Tensor):
            return found
        assert self.code is not None
        return dequantise(self.code, found)


def tensor(files: Files, name: str) -> Tensor:
    """A whole tensor of a file, in memory of its own.

    Raises:
        CheckpointError: no file holds it.
    """
    if name not in files:
        raise CheckpointError(f"the checkpoint lacks the tensor {name!r} that a quantised module needs")
    entry = files[name].entries[name]
    memory = torch.empty(entry.shape, dtype=entry.dtype)
    if entry.shape:
        files[name].read_into(name, memory)
    else:
        files[name].read_into(name, memory.view(1))
    return memory


def int4_code(group: int, offsets: bool) -> Code:
    """Evenly spaced codes of four bits with groups of another length, with or without offsets."""
    return replace(INT4, group=group, offsets=offsets)


def column_words(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Codes `[n, 8 * m]` of 32-bit words `[n, m]`: `order` says at which place of eight a word's nibbles stand."""
    nibbles = words[:, :, None] >> (4 * torch.arange(8, dtype=torch.int32)) & 15
    placed = torch.empty_like(nibbles, dtype=torch.uint8)
    placed[:, :, torch.tensor(order)] = nibbles.to(torch.uint8)
    return placed.flatten(1)


def shifted(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Codes:
    """Codes of which `zeros` `[n, groups]` are the ones that stand for 0, as codes of which 8 is."""
    scales = scales.float()
    return Codes(codes, scales, None if zeros is None else (8 - zeros.float()) * scales)


def scaled(values: Tensor, scales: Tensor, block: tuple[int, int], zeros: Tensor | None = None) -> Tensor:
    """Plain rows `[out, in]` in fp32 of which every block has a scale, and perhaps a number that stands for 0.

    Args:
        values: `[out, in]`, of any dtype.
        scales, zeros: a number for each block, row by row.
        block: outputs and inputs of a block.
    """
    counts = [-(-size // length) for size, length in zip(values.shape, block, strict=True)]

    def spread(each: Tensor) -> Tensor:
        each = each.float().reshape(counts)
        for dim, length in enumerate(block):
            each = each.repeat_interleave(length, dim=dim).narrow(dim, 0, values.shape[dim])
        return each

    rows = values.float()
    return (rows if zeros is None else rows.sub_(spread(zeros))).mul_(spread(scales))


def expect(name: str, found: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, if it has the shape that the configuration makes it.

    Raises:
        CheckpointError: it has another.
    """
    if tuple(found.shape) != shape:
        raise CheckpointError(f"the tensor {name!r} has shape {list(found.shape)}; it must be {list(shape)}")
    return found
