"""Guided choice: each row has another half, with another prompt, that gets the same tokens."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import torch
from torch import Tensor

from unspool.decode.sequence import Choice, Chooser, Sequence, Sink
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
