"""Reading tensors of `.safetensors` files straight into memory that is already there.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, a JSON header that gives
every tensor's dtype, shape and place, then the bytes. Plain reads instead of a memory map: a map's pages would count as
the process's memory beside the copies that fused weights need, and could not be huge pages.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unspool.errors import CheckpointError

__all__ = ["Entry", "SafetensorsFile"]

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_LONGEST_HEADER = 100_000_000
# What is read at once, where it is not read straight into place: little enough for the processor's caches.
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies in a file: `start` in bytes from its beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def _row_bytes(entry: Entry) -> int:
    return max(1, entry.bytes // entry.shape[0]) if entry.shape and entry.shape[0] else 1


class SafetensorsFile:
    """One open file, which several threads may read from.

    Args:
        path: the file.

    Attributes:
        entries: what the header lists, by name.
        metadata: texts that the header has besides, by name.

    Raises:
        CheckpointError: the file is cut short, or its header is not one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb", buffering=0)
        try:
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._one_at_a_time = threading.Lock()
        self._own = threading.local()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read_into(self, name: str, target: Tensor, transposed: bool = False) -> None:
        """Read tensor `name` into `target`, of the same shape (or the reversed one if `transposed`), casting as needed.

        Beside the target, no more than one chunk of 4 MiB (or one row of the tensor) is held in memory.
        """
        entry = self.entries[name]
        direct = target.device.type == "cpu" and target.dtype == entry.dtype and target.is_contiguous()
        if direct and not transposed:
            self._fill(entry.start, target)
            return
        at = 0
        for rows in self.rows(name):
            place = target[:, at : at + len(rows)].t() if transposed else target[at : at + len(rows)]
            place.copy_(rows)
            at += len(rows)

    def equal(self, name: str, other: SafetensorsFile, other_name: str) -> bool:
        """Whether two tensors hold the same values, compared chunk by chunk."""
        one, two = self.entries[name], other.entries[other_name]
        if one.shape != two.shape:
            return False
        return all(torch.equal(a, b) for a, b in zip(self.rows(name), other.rows(other_name, own=True), strict=True))

    def rows(self, name: str, own: bool = False) -> Iterator[Tensor]:
        """The tensor's rows in order, some at a time, in memory that the next ones overwrite unless `own`."""
        return (self.part(name, first, count, own) for first, count in self.spans(name))

    def spans(self, name: str) -> Iterator[tuple[int, int]]:
        """Cuts the tensor's rows into parts of a few MiB: the first row of each, and how many."""
        entry = self.entries[name]
        step = max(1, _CHUNK // _row_bytes(entry))
        return ((first, min(step, entry.shape[0] - first)) for first in range(0, entry.shape[0], step))

    def part(self, name: str, first: int, count: int, own: bool = False) -> Tensor:
        """Some rows of the tensor, in memory that the calling thread's next part overwrites unless `own`."""
        entry = self.entries[name]
        row = _row_bytes(entry)
        size = count * row
        if own:
            memory = torch.empty(size, dtype=torch.uint8)
        else:
            scratch: Tensor | None = getattr(self._own, "scratch", None)
            if scratch is None or scratch.numel() < size:
                self._own.scratch = scratch = torch.empty(max(size, _CHUNK), dtype=torch.uint8)
            memory = scratch[:size]
        self._fill(entry.start + first * row, memory)
        return memory.view(entry.dtype).view(count, *entry.shape[1:])

    def _fill(self, start: int, target: Tensor) -> None:
        """Read the bytes from `start` on into the whole of the contiguous CPU tensor `target`."""
        view = target.detach().view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            # Linux reads at most 2 GiB at once
            count = self._read_at(start + done, view[done : done + 2**30])
            if not count:
                raise CheckpointError(f"{self.path} ended early: {len(view) - done} bytes are missing")
            done += count

    def _read_at(self, start: int, view: memoryview) -> int:
        """Read some bytes from `start` on, side by side with other threads where the system can; how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._one_at_a_time:
            self._file.seek(start)
            return self._file.readinto(view)  # type: ignore[attr-defined, no-any-return]

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{self.path} is not a whole safetensors file: it has {size} bytes, and its header alone would need "
                f"{8 + length}; download it again"
            )
        try:
            header: dict[str, Any] = json.loads(self._file.read(length))
            metadata = {str(name): str(text) for name, text in (header.pop("__metadata__", None) or {}).items()}
            found = {name: self._entry(value, 8 + length) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} has no readable safetensors header ({error}); download it again"
            ) from error
        promised = max((entry.start + entry.bytes for entry in found.values()), default=8 + length)
        if promised > size:
            raise CheckpointError(
                f"{self.path} is truncated: its header promises {promised} bytes and the file has {size}; download it "
                f"again"
            )
        return found, metadata

    def _entry(self, value: dict[str, Any], base: int) -> Entry:
        start, end = (int(offset) for offset in value["data_offsets"])
        if value["dtype"] not in _DTYPES:
            raise CheckpointError(f"{self.path} holds a tensor of type {value['dtype']!r}, which cannot be read here")
        entry = Entry(_DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"]), base + start)
        if start < 0 or min(entry.shape, default=0) < 0 or end - start != entry.bytes:
            raise ValueError(f"a tensor of shape {list(entry.shape)} takes {entry.bytes} bytes, not {start} to {end}")
        return entry
