"""Stop strings, matched on the text of the newest tokens.

A row ends in the step whose token completes a stop string: the string appears in the text and ends in what that token
added. Most tokens cannot end any of the strings, which their own text tells once and for all; only for the others is a
short window of tokens turned into text. A step costs the same however long the row is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from unspool.stopping.base import Scores, StoppingCriteria

_CONTEXT = 8
"""Tokens before the longest possible match. Text at the start of a window is unreliable: a character may be cut in
two, and some decoders drop a leading space."""

_LONGEST_CHARACTER = 4
"""Bytes of a character, at most."""


class Decoder(Protocol):
    """What is asked of a tokenizer."""

    def batch_decode(
        self, sequences: Any, *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> Any:
        """The text of each sequence of ids."""
        ...


class StopStringCriteria(StoppingCriteria):
    """End a row when its newest token completes one of some strings.

    The string may begin anywhere, in the prompt too, and the token may run past its end; text that was complete before
    the newest token does not count. Special tokens count as the text they are written as, and bytes that are no text,
    or not yet, as the U+FFFD that a tokenizer shows for them.

    Args:
        tokenizer: turns ids into text (`batch_decode`).
        stop_strings: one string or several.

    Attributes:
        matched: for each row of the last call, the stop string that ended it, else None. It stays while the row goes
            on as filler; with several at once it is the one that ends first.

    Raises:
        ValueError: no string is given, or one is empty or not a string.
    """

    row_independent = True

    def __init__(self, tokenizer: Decoder, stop_strings: str | Iterable[str]) -> None:
        self.stop_strings: tuple[str, ...] = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not self.stop_strings or not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise ValueError(f"`stop_strings` has to be one or more non-empty strings, but is {stop_strings!r}.")
        self.matched: list[str | None] = []
        self._tokenizer = tokenizer
        # A token adds at least a byte, so no match reaches farther back than this.
        self._reach = max(len(stop.encode("utf-8", "surrogatepass")) for stop in self.stop_strings) + _CONTEXT
        self._may_end: dict[int, bool] = {}
        self._tails: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Scores, new_token_length: int = 1, **kwargs: Any) -> Tensor:
        """Return the rows in which a stop string ends within the last `new_token_length` tokens."""
        windows: list[list[int]] = input_ids[:, -(self._reach + new_token_length) :].tolist()
        older = [window[:-new_token_length] for window in windows]
        self._learn({token for window in windows for token in window[-new_token_length:]})
        found: list[str | None] = [None] * len(windows)
        rows = [i for i, ids in enumerate(windows) if any(self._may_end[t] for t in ids[-new_token_length:])]
        if rows:
            texts = self._decode([older[i] for i in rows] + [windows[i] for i in rows])
            for i, before, after in zip(rows, texts, texts[len(rows) :], strict=False):
                known = [before, *self._before_a_part(older[i], before)]
                found[i] = self._first_completed(max(_common_prefix(text, after) for text in known), after)
        self._report(found, older, [window[-self._reach :] for window in windows])
        return torch.tensor([hit is not None for hit in found], device=input_ids.device)

    def _learn(self, tokens: set[int]) -> None:
        """Find out which tokens not met before may end a stop string.

        What a token adds is seen after itself: alone, it may lose a leading space or keep a continuation mark.
        """
        fresh = [token for token in tokens if token not in self._may_end]
        if not fresh:
            return
        texts = self._decode([[token] for token in fresh] + [[token, token] for token in fresh])
        for token, once, twice in zip(fresh, texts, texts[len(fresh) :], strict=False):
            added = twice[len(once) :] if twice.startswith(once) else ""
            part_of_a_character = not added or "\ufffd" in added
            self._may_end[token] = part_of_a_character or any(
                _ends_within(stop, text) for stop in self.stop_strings for text in (added, added.lstrip(" "))
            )

    def _before_a_part(self, ids: list[int], text: str) -> list[str]:
        """Texts of `ids` without the last few, where its `text` ends in a part of a character.

        Some decoders show all the bytes before such a part as unknown too, as long as the character is not whole.
        """
        if not text.endswith("\ufffd"):
            return []
        return self._decode([ids[:-less] for less in range(1, min(_LONGEST_CHARACTER, len(ids)))])

    def _first_completed(self, fixed: int, after: str) -> str | None:
        """The stop string that ends first in `after`, past its `fixed` first characters, which were there before."""
        ends = []
        for order, stop in enumerate(self.stop_strings):
            at = after.find(stop, max(0, fixed - len(stop) + 1))
            if at >= 0:
                ends.append((at + len(stop), order))
        return self.stop_strings[min(ends)[1]] if ends else None

    def _report(self, found: list[str | None], older: list[list[int]], tails: list[list[int]]) -> None:
        """Set `matched`; a row that goes on in its place from the last call keeps what ended it."""
        kept: list[str | None] = [None] * len(found)
        if len(self._tails) == len(found):
            going_on = zip(self.matched, self._tails, older, strict=True)
            kept = [hit if tail == ids else None for hit, tail, ids in going_on]
        self.matched = [old or new for old, new in zip(kept, found, strict=True)]
        self._tails = tails

    def _decode(self, windows: list[list[int]]) -> list[str]:
        # Negative ids are filler of rows without an end token; no tokenizer knows them.
        ids = [[token for token in window if token >= 0] for window in windows]
        texts: list[str] = self._tokenizer.batch_decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return texts


def _ends_within(stop: str, text: str) -> bool:
    """Whether `stop` can end inside `text`, given the right text before it."""
    return stop in text or any(stop.endswith(text[:size]) for size in range(1, min(len(stop), len(text)) + 1))


def _common_prefix(first: str, second: str) -> int:
    """Characters that both begin with."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
