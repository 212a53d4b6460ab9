"""Guided choice: each row has another half, with another prompt, that gets the same tokens."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import torch
from torch import Tensor

from unspool.decode.sequence import Choice, Chooser, Group, Sequence, Sink, Want, Watch, Work
from unspool.errors import Unsupported
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
        """See `Chooser`."""
        half = len(rows) // 2
        self._guidance.unconditional = logits[half:]
        choice = self._inner.choose(logits[:half], rows[:half])
        parents = None if choice.parents is None else torch.cat([choice.parents, choice.parents + half])
        return replace(choice, tokens=torch.cat([choice.tokens, choice.tokens]), parents=parents)


class GuidedSink:
    """Gives the first half's tokens to a sink, and makes the second half follow."""

    def __init__(self, inner: Sink) -> None:
        self._inner = inner

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """See `Sink`."""
        half = len(rows) // 2
        known = [len(row.tokens) for row in rows[:half]]
        self._inner.commit(rows[:half], tokens[:half], choice)
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
        self._watch(
            kept,
            [[part for keep, part in zip(half, layer, strict=True) if keep] for layer in weights],
            [layer[fed.to(layer.device)] if layer.shape[0] else layer for layer in hidden],
        )


def guided_group(
    group: Group, guidance: GuidanceLogitsProcessor, prompts: Items[list[int]], *, steps: int, positions: int | float
) -> Group:
    """The same decoding with another half of rows beside the rows of `group`, which begin with negative prompts.

    Args:
        group: whose processors begin with `guidance`.
        prompts: true tokens of the negative prompt of each row.
        steps: most new tokens of a row.
        positions: most tokens of a row.

    Raises:
        Unsupported: the rows are drafted.
        ValueError: a negative prompt is empty or too long.
    """
    if group.drafter is not None:
        raise Unsupported("guidance_scale and drafts cannot be combined; leave out one of them")
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
        watch=None if group.watch is None else _FirstHalf(group.watch),
    )
