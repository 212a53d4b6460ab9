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
        tokens = np.asarray(row.tokens)
        for size in range(min(self._ngram, len(tokens) - 1), 0, -1):
            for place in _places(tokens, size):
                found: list[int] = tokens[place + size : place + size + self._tokens].tolist()
                if self._allowed is not None:
                    found = found[: self._allowed(row, found)]
                if found:
                    return found[: next((i for i, token in enumerate(found) if token in self._eos), len(found))]
        return []


def _places(tokens: NDArray[np.int64], size: int) -> list[int]:
    """Where the last `size` tokens stand earlier, with something after them."""
    last = len(tokens) - size
    same = np.ones(last, dtype=bool)
    for i in range(size):
        same &= tokens[i : last + i] == tokens[last + i]
    places: list[int] = np.flatnonzero(same).tolist()
    return places
