"""Prompt lookup: what followed the row's last words, where they stood earlier in the row (Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items

import numpy as np
from numpy.typing import NDArray

from unspool.decode.sequence import Sequence

Allowed = Callable[[Sequence, list[int]], int]
"""`(row, draft) -> how many of the draft's tokens the logits processors do not forbid`."""


class Lookup:
    """Drafts by n-gram lookup in each row's own tokens.

    The longest n-gram that stood before decides, and of its places the first with a continuation. A draft stops short
    of end tokens, so that nothing is taken beyond one.

    Args:
        tokens: most tokens of a draft.
        ngram: longest n-gram.
        room: `row -> most tokens a draft may have`.
        eos: end tokens.
        allowed: see there; places whose first token is forbidden are passed over. `None` asks nothing.
    """

    def __init__(
        self,
        tokens: int,
        ngram: int,
        room: Callable[[Sequence], int],
        eos: frozenset[int],
        allowed: Allowed | None = None,
    ) -> None:
        self._tokens = tokens
        self._ngram = ngram
        self._room = room
        self._eos = eos
        self._allowed = allowed

    def draft(self, rows: Items[Sequence]) -> None:
        """See `Drafter`."""
        for row in rows:
            room = self._room(row)
            row.draft = self._continuation(row)[:room] if room > 0 else []

    def _continuation(self, row: Sequence) -> list[int]:
        for ends in _ends(np.asarray(row.tokens), self._ngram):
            for end in ends.tolist():
                found = row.tokens[end : end + self._tokens]
                if self._allowed is not None:
                    found = found[: self._allowed(row, found)]
                if found:
                    return found[: next((i for i, token in enumerate(found) if token in self._eos), len(found))]
        return []


def _ends(tokens: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """Where n-grams end that the tokens end with and that stood earlier, by length from at most `most` down to 1."""
    ends = np.flatnonzero(tokens[:-1] == tokens[-1:]) + 1
    found = [ends]
    for size in range(2, min(most, len(tokens) - 1) + 1):
        ends = ends[ends >= size]
        ends = ends[tokens[ends - size] == tokens[-size]]
        if not len(ends):
            break
        found.append(ends)
    return found[::-1]
