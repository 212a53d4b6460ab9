"""Guided choice: each row has another half, with another prompt, that gets the same tokens."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import torch
from torch import Tensor

from unspool.decode.sequence import Choice, Chooser, Drafter, Group, Sequence, Sink, Want, Watch, Work
from unspool.logits.guidance import GuidanceLogitsProcessor


class GuidedChooser:
    """Lets a chooser decide the first half of the rows, and gives the second half the same.

    Args:
        inner: decides; its processors begin with `guidance`.
        guidance: gets the second half's logits.
    """

    def __init__(self, inner: Chooser, guidance: GuidanceLogitsProcessor) -> None:
        self._inner = inner
        self._guidance = guidance

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """See `Chooser`; both halves have the same drafts."""
        half, positions = len(rows) // 2, logits.shape[0] // 2
        self._guidance.unconditional = logits[positions:]
        choice = self._inner.choose(logits[:positions], rows[:half])
        return replace(
            choice,
            tokens=torch.cat([choice.tokens, choice.tokens]),
            parents=None if choice.parents is None else torch.cat([choice.parents, choice.parents + half]),
            counts=None if choice.counts is None else choice.counts * 2,
        )


class GuidedSink:
    """Gives the first half's tokens to a sink, and makes the second half follow."""

    def __init__(self, inner: Sink) -> None:
        self._inner = inner

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """See `Sink`."""
        half, count = len(rows) // 2, len(tokens) // 2
        known = [len(row.tokens) for row in rows[:half]]
        first = replace(
            choice,
            tokens=choice.tokens[:count],
            parents=None if choice.parents is None else choice.parents[:half],
            counts=None if choice.counts is None else choice.counts[:half],
        )
        self._inner.commit(rows[:half], tokens[:count], first)
        for row, other, begin in zip(rows[:half], rows[half:], known, strict=True):
            other.tokens += row.tokens[begin:]
            other.finish = row.finish


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
        if not kept:
            return
        self._watch(
            kept,
            [[part for keep, part in zip(half, layer, strict=True) if keep] for layer in weights],
            [layer[fed.to(layer.device)] if layer.shape[0] else layer for layer in hidden],
        )


class GuidedDrafter:
    """Has the first half's drafts made, and gives the second half the same.

    Args:
        inner: drafts.
        recompute_past: see `ModelSpec`; no draft reaches across it, in the longer of two halves.
    """

    def __init__(self, inner: Drafter, recompute_past: int | None) -> None:
        self._inner = inner
        self._recompute_past = recompute_past

    def draft(self, rows: Items[Sequence]) -> None:
        """See `Drafter`."""
        half, limit = len(rows) // 2, self._recompute_past
        self._inner.draft(rows[:half])
        for row, other in zip(rows[:half], rows[half:], strict=True):
            if limit is not None:
                left = [limit - one.known for one in (row, other) if one.known <= limit]
                row.draft = row.draft[: min(left, default=len(row.draft))]
            other.draft = list(row.draft)


def guided_group(
    group: Group,
    guidance: GuidanceLogitsProcessor,
    prompts: Items[list[int]],
    *,
    steps: int,
    positions: int | float,
    recompute_past: int | None = None,
) -> Group:
    """The same decoding with another half of rows beside the rows of `group`, which begin with negative prompts.

    Args:
        group: whose processors begin with `guidance`.
        prompts: true tokens of the negative prompt of each row.
        steps: most new tokens of a row.
        positions: most tokens of a row.
        recompute_past: see `ModelSpec`.

    Raises:
        ValueError: a negative prompt is empty or too long.
    """
    if not all(prompts):
        raise ValueError("negative_prompt_ids has a row without a token that negative_prompt_attention_mask keeps")
    longest = max(map(len, prompts)) + steps
    if longest > positions:
        raise ValueError(
            f"negative_prompt_ids and the output need {longest} positions and the model has {positions}; "
            "shorten the negative prompt or lower max_new_tokens"
        )
    rows = group.rows
    parts = enumerate(zip(rows, prompts, strict=True))
    others = [Sequence(len(rows) + i, list(prompt), adapter=row.adapter) for i, (row, prompt) in parts]
    return Group(
        [*rows, *others],
        GuidedChooser(group.chooser, guidance),
        GuidedSink(group.sink),
        drafter=None if group.drafter is None else GuidedDrafter(group.drafter, recompute_past),
        watch=None if group.watch is None else _FirstHalf(group.watch),
    )
