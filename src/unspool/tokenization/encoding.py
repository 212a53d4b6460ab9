"""What a tokenizer returns: token ids and masks by name, padded and as tensors on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

__all__ = ["BatchEncoding", "PadSide", "TensorKind", "pad_rows", "to_lists"]

PadSide = Literal["left", "right"]
TensorKind = Literal["pt", "np"]


class BatchEncoding(dict[str, Any]):
    """A dictionary of model inputs (`input_ids`, `attention_mask`) whose entries are attributes too.

    It can be passed to a model as `model.generate(**encoding)`. Entries are lists of ints for one text, lists of lists
    for several, or int64 tensors `[rows, len]`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this BatchEncoding has no {name!r}, only {sorted(self)}") from None

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Move the tensors to a device, in place; what is not a torch tensor stays as it is.

        Args:
            device: Where to.
            non_blocking: Do not wait for a copy from pinned memory.

        Returns:
            This encoding.
        """
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: TensorKind | None) -> BatchEncoding:
        """Turn the lists into tensors, in place; a single text gets a row axis of 1.

        Args:
            tensor_type: `"pt"` for torch, `"np"` for NumPy, `None` to leave the lists.

        Raises:
            ValueError: The rows differ in length, or `tensor_type` is unknown.
        """
        if tensor_type not in ("pt", "np", None):
            raise ValueError(f"return_tensors is {tensor_type!r}; it can be 'pt', 'np' or None")
        for name, value in self.items():
            if tensor_type is not None and isinstance(value, list):
                self[name] = _as_tensor(name, value, tensor_type)
        return self


def _as_tensor(name: str, value: list[Any], kind: TensorKind) -> torch.Tensor | np.ndarray[Any, Any]:
    rows = value if value and isinstance(value[0], list) else [value]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"{name} has rows of {lengths[0]} to {lengths[-1]} tokens, which make no tensor; pass padding=True "
            "(and truncation=True with max_length to shorten them)"
        )
    if kind == "np":
        return np.array(rows, dtype=np.int64).reshape(len(rows), -1)
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), lengths[0])


def to_lists(value: Any) -> Any:
    """Plain Python numbers and lists from a tensor, an array, or a sequence of them."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [item if type(item) is int else to_lists(item) for item in value]
    return value


def pad_rows(
    columns: Mapping[str, list[list[int]]],
    filler: Mapping[str, int],
    *,
    length: int | None = None,
    multiple_of: int | None = None,
    side: PadSide,
) -> dict[str, list[list[int]]]:
    """Pad rows to one length.

    Args:
        columns: entries `[rows][len]`; all have the row lengths of the first.
        filler: the number to pad each entry with.
        length: the length to pad to; the longest row when `None`. Longer rows stay as they are.
        multiple_of: raise the length to a multiple of this.
        side: where the padding goes.
    """
    first = next(iter(columns.values()))
    target = max(map(len, first), default=0) if length is None else length
    if multiple_of:
        target = -(-target // multiple_of) * multiple_of
    padded = {}
    for name, rows in columns.items():
        fill = filler[name]
        if side == "left":
            padded[name] = [[fill] * (target - len(row)) + row for row in rows]
        else:
            padded[name] = [row + [fill] * (target - len(row)) for row in rows]
    return padded
