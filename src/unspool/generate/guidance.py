"""Guidance in a static call: the negative prompts, and the rows that follow them in the same batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unspool.decode.choose.guided import guided_group
from unspool.generate.call import Call, Setup
from unspool.generate.inputs import Prompts
from unspool.logits.guidance import GuidanceLogitsProcessor


def read_negative(
    ids: Any, mask: Any, prompts: Prompts, copies: int, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The negative prompts of all rows and their mask, `[rows, columns]`; by default each prompt's last token.

    Raises:
        ValueError: another number of rows than the prompts have (or one), a mask of another shape, or a token outside
            the vocabulary of `vocab_size`.
    """
    rows = prompts.rectangle.shape[0]
    if ids is None and mask is not None:
        raise ValueError("negative_prompt_attention_mask belongs to negative_prompt_ids, which are missing; pass both")
    if ids is None:
        ids, mask = prompts.rectangle[:, -1:], None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError("negative_prompt_ids must be a tensor [rows, columns] of token ids, with at least one column")
    if vocab_size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"negative_prompt_ids holds token ids outside the model's vocabulary of {vocab_size}; use the tokenizer "
            "that belongs to the model"
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"negative_prompt_attention_mask is {list(mask.shape)} and negative_prompt_ids {list(ids.shape)}; they "
            "must be alike"
        )
    given = ids.shape[0]
    if given not in (1, rows // copies, rows):
        raise ValueError(
            f"negative_prompt_ids has {given} rows for {rows // copies} prompts; pass one for each, or one"
        )
    times = rows // given
    return tuple(part.to(prompts.rectangle.device).repeat_interleave(times, dim=0) for part in (ids, mask))  # type: ignore[return-value]


def guided(setup: Setup, call: Call, guidance: GuidanceLogitsProcessor, ids: Tensor, mask: Tensor) -> Setup:
    """The same decoding with rows for the negative prompts `ids` `[rows, columns]` beside the rows."""
    group, times = setup.group, setup.candidates
    tokens = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
    prompts = [tokens[i // times] for i in range(len(group.rows))]
    backend = call.backend
    both = guided_group(
        group,
        guidance,
        prompts,
        steps=call.steps,
        positions=backend.positions,
        recompute_past=backend.recompute_past,
    )
    if group.twins is not None:
        both.twins = [*group.twins, *(call.twins(both.rows[len(group.rows) :], times) or [])]
    return replace(setup, group=both)
