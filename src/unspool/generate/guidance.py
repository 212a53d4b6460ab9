"""Guidance in a static call: every row gets another half, which follows the negative prompt, in the same batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unspool.decode.choose.guided import GuidedChooser, GuidedSink
from unspool.decode.sequence import Group, Sequence, Want, Watch, Work
from unspool.errors import Unsupported
from unspool.generate.call import Call, Setup
from unspool.generate.inputs import Prompts
from unspool.logits.guidance import GuidanceLogitsProcessor


def read_negative(ids: Any, mask: Any, prompts: Prompts, copies: int) -> tuple[Tensor, Tensor]:
    """The negative prompts of all rows and their mask, `[rows, columns]`; by default each prompt's last token.

    Raises:
        ValueError: another number of rows than the prompts have (or one), or a mask of another shape.
    """
    rows = prompts.rectangle.shape[0]
    if ids is None:
        ids, mask = prompts.rectangle[:, -1:], None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError("negative_prompt_ids must be a tensor [rows, columns] of token ids, with at least one column")
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
    group = setup.group
    if group.drafter is not None:
        raise Unsupported("guidance_scale and drafts cannot be combined; leave out one of them")
    rows = group.rows
    tokens = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
    longest = max(map(len, tokens)) + call.steps
    if not all(tokens):
        raise ValueError("negative_prompt_ids has a row without a token that negative_prompt_attention_mask keeps")
    if longest > call.backend.positions:
        raise ValueError(
            f"negative_prompt_ids and the output need {longest} positions and the model has {call.backend.positions}; "
            "shorten the negative prompt or lower max_new_tokens"
        )
    times = setup.candidates
    others = [Sequence(len(rows) + i, list(tokens[i // times]), adapter=row.adapter) for i, row in enumerate(rows)]
    both = Group(
        [*rows, *others],
        GuidedChooser(group.chooser, guidance),
        GuidedSink(group.sink),
        twins=None if group.twins is None else [*group.twins, *(call.twins(others, times) or [])],
        watch=None if group.watch is None else _FirstHalf(group.watch),
    )
    return replace(setup, group=both)


class _FirstHalf:
    """Shows a watch the rows without their other halves."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @property
    def want(self) -> Want:
        """See `Watch`."""
        return self._watch.want

    def __call__(self, work: list[Work], weights: list[list[Tensor]], hidden: list[Tensor]) -> None:
        """See `Watch`."""
        half = [item.seq.row < len(item.group.rows) // 2 for item in work]
        fed = torch.tensor([keep for keep, item in zip(half, work, strict=True) for _ in range(item.feed)])
        kept = [item for keep, item in zip(half, work, strict=True) if keep]
        self._watch(
            kept,
            [[part for keep, part in zip(half, layer, strict=True) if keep] for layer in weights],
            [layer[fed.to(layer.device)] if layer.shape[0] else layer for layer in hidden],
        )
