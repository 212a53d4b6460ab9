"""From what the caller passed to rows of true tokens: prompts, masks, and the rectangle that processors see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unspool.cache.paged import refuse_if_too_large
from unspool.config.notice import warn_once
from unspool.models.adapters import Adapter
from unspool.models.base import ModelSpec


@dataclass(slots=True)
class Prompts:
    """The call's prompts.

    Attributes:
        rectangle: `[rows, columns]` int64, as passed, padding included; on the model's device.
        mask: `[rows, columns]`, True where a true token stands.
        tokens: each row's true tokens, in order; zeros where only embeddings are known.
        embeds: each row's embeddings `[tokens, hidden]`, when they were given; `None` otherwise.
        adapters: each row's adapter, or `None` when no row has one.
    """

    rectangle: Tensor
    mask: Tensor
    tokens: list[list[int]]
    embeds: list[Tensor] | None = None
    adapters: list[Adapter | None] | None = None

    def expand(self, times: int) -> Prompts:
        """Every row `times` times, copies side by side.

        Raises:
            OutOfMemory: not even the ids would fit.
        """
        size = times * self.rectangle.numel() * (self.rectangle.element_size() + self.mask.element_size())
        refuse_if_too_large(size, self.rectangle.device, "the prompts' copies")
        return Prompts(
            self.rectangle.repeat_interleave(times, dim=0),
            self.mask.repeat_interleave(times, dim=0),
            [row for row in self.tokens for _ in range(times)],
            None if self.embeds is None else [row for row in self.embeds for _ in range(times)],
            None if self.adapters is None else [row for row in self.adapters for _ in range(times)],
        )

    def padding(self) -> Tensor | None:
        """Columns before each row's first true token, `[rows]`; `None` when no row has any."""
        if not self.mask.shape[1] or bool(self.mask[:, 0].all()):
            return None
        return self.mask.int().argmax(dim=1)


def read_prompts(
    inputs: Any, attention_mask: Any, *, spec: ModelSpec, device: torch.device, bos: int | None, pad: int | None,
    eos: Items[int],
) -> Prompts:  # fmt: skip
    """Check and take apart `inputs` and `attention_mask`.

    Without a mask, leading and trailing pad tokens of a row are taken for padding where that is unambiguous: the pad
    token is set and is not an end token. A mask may have zeros anywhere; tokens under them are left out.

    Raises:
        TypeError: not integer ids.
        ValueError: wrong shape, an empty prompt, a mask of another shape or with other values than 0 and 1, or a token
            id outside the vocabulary.
    """
    ids = _rectangle(inputs, bos, pad, device)
    if attention_mask is None and isinstance(inputs, list):
        attention_mask = _lengths_mask(inputs, ids)
    mask = _read_mask(attention_mask, ids) if attention_mask is not None else _infer_mask(ids, pad, eos)
    tokens = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    _check_tokens(tokens, spec)
    return Prompts(ids, mask, tokens)


def read_embeds(embeds: Any, attention_mask: Any, ids: Prompts | None, *, hidden: int, device: torch.device) -> Prompts:
    """Prompts given as `inputs_embeds` `[rows, columns, hidden]`, with or without the `ids` they stand for.

    Raises:
        TypeError: not a tensor of floating point numbers.
        ValueError: wrong shape, a mask of another shape, or an empty prompt.
    """
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise TypeError("inputs_embeds must be a floating point tensor [rows, columns, hidden]")
    if embeds.ndim != 3 or embeds.shape[2] != hidden or not embeds.shape[0] * embeds.shape[1]:
        raise ValueError(f"inputs_embeds must be [rows, columns, {hidden}] with at least one of each, not "
                         f"{list(embeds.shape)}")  # fmt: skip
    if ids is not None and ids.rectangle.shape != embeds.shape[:2]:
        raise ValueError(
            f"inputs_embeds is {list(embeds.shape)} and input_ids {list(ids.rectangle.shape)}; they must agree in rows "
            "and columns"
        )
    embeds = embeds.to(device)
    if ids is not None:
        mask = ids.mask
    elif attention_mask is not None:
        mask = _read_mask(attention_mask, embeds[:, :, 0])
    else:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=device)
    values = [row[keep] for row, keep in zip(embeds, mask, strict=True)]
    if not all(map(len, values)):
        raise ValueError("inputs_embeds has a row without a column that attention_mask keeps")
    if ids is not None:
        return Prompts(ids.rectangle, ids.mask, ids.tokens, values)
    none = torch.empty(embeds.shape[0], 0, dtype=torch.int64, device=device)
    return Prompts(none, none.bool(), [[0] * len(row) for row in values], values)


def _rectangle(inputs: Any, bos: int | None, pad: int | None, device: torch.device) -> Tensor:
    """`[rows, columns]` int64 ids on `device`; the beginning-of-text token where there is no prompt."""
    if inputs is None or (isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.shape[1] == 0):
        if bos is None:
            raise ValueError("input_ids is empty and the model has no bos_token_id to start from; pass a prompt")
        return torch.full((1 if inputs is None else inputs.shape[0], 1), bos, device=device)
    if isinstance(inputs, list):
        if not inputs or not all(isinstance(row, list) and row for row in inputs):
            raise ValueError(
                "input_ids as a list must hold one non-empty list of token ids per row, as [[5, 6, 7], [8]]; "
                "texts are encoded by the tokenizer first"
            )
        columns = max(map(len, inputs))
        filler = 0 if pad is None else pad
        inputs = torch.tensor([[filler] * (columns - len(row)) + row for row in inputs])
    if not isinstance(inputs, Tensor):
        way = (
            "pass what the tokenizer gave as generate(**inputs)"
            if isinstance(inputs, Mapping)
            else 'pass tokenizer(text, return_tensors="pt").input_ids'
        )
        raise TypeError(f"input_ids must be a tensor [rows, columns] of token ids, not {type(inputs).__name__}; {way}")
    if inputs.ndim != 2 or inputs.shape[0] == 0:
        hint = "; add a row dimension with input_ids[None]" if inputs.ndim == 1 else ""
        raise ValueError(f"input_ids must be [rows, columns] with at least one row, not {list(inputs.shape)}{hint}")
    if inputs.is_floating_point() or inputs.dtype == torch.bool:
        raise TypeError(f"input_ids must hold integer token ids, not {inputs.dtype}")
    return inputs.to(device=device, dtype=torch.int64)


def _lengths_mask(rows: list[list[int]], ids: Tensor) -> Tensor:
    """The mask of prompts given as lists, padded on the left."""
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - lengths[:, None]


def _read_mask(attention_mask: Any, ids: Tensor) -> Tensor:
    """The mask as booleans, checked against the ids."""
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor like input_ids, not {type(attention_mask).__name__}")
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} and input_ids is {list(ids.shape)}; they must be alike"
        )
    mask = attention_mask.to(ids.device)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 (padding) and 1 (token)")
    return mask.bool()


def _infer_mask(ids: Tensor, pad: int | None, eos: Items[int]) -> Tensor:
    """False at leading and trailing pads of each row, where they can only be padding."""
    if pad is None or pad in eos:
        if pad is not None and len(ids) > 1:
            _mention_pads(ids == pad)
        return torch.ones_like(ids, dtype=torch.bool)
    token = ids != pad
    seen_before = token.cumsum(1) > 0
    seen_after = token.flip(1).cumsum(1).flip(1) > 0
    return seen_before & seen_after


def _mention_pads(pads: Tensor) -> None:
    """Remark on what looks like padding and is taken for text: some rows, and not all, begin or end with it."""
    for edge in (pads[:, 0], pads[:, -1]):
        if 0 < int(edge.sum()) < len(edge):
            warn_once(
                "input_ids seems to be padded with pad_token_id, which is an end token too, so it is taken for text; "
                "pass attention_mask"
            )


def _check_tokens(tokens: list[list[int]], spec: ModelSpec) -> None:
    for number, row in enumerate(tokens):
        if not row:
            raise ValueError(f"input_ids row {number} is empty: it has no token that attention_mask keeps")
        spec.check_tokens(f"input_ids row {number}", row)
