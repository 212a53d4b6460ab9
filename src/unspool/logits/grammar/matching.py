"""Rows followed through a grammar: which tokens may come next, whatever became of the rows since the last step."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from unspool.logits.grammar.compiling import reason
from unspool.logits.grammar.vocabulary import Grammar

logger = logging.getLogger(__name__)

_SPARE = 16
"""Branches remembered that no row of the last step continues: rows of other lengths, whose turn comes in another call,
and texts that drafts left."""

_PARALLEL = 1 << 18
"""Tokens to decide on, of all rows together, from which on several threads are worth waking."""


class Exhausted(Exception):
    """The grammar became too complex to follow.

    Args:
        place: which of the rows followed.
        why: llguidance's words.
    """

    def __init__(self, place: int, why: str) -> None:
        super().__init__(why)
        self.place, self.why = place, why


@dataclass(slots=True, eq=False)
class Branch:
    """One text on its way through the grammar.

    Attributes:
        matcher: llguidance's state.
        tokens: the whole text.
        taken: how many of the tokens the matcher has seen: all, unless the branch is over.
        over: an end token came, or a token that the grammar does not allow, or the grammar cannot go on.
        fault: why the grammar cannot be followed further, where it became too complex.
    """

    matcher: Any
    tokens: list[int]
    taken: int = 0
    over: bool = False
    fault: str = ""

    def push(self, tokens: list[int], eos: frozenset[int]) -> None:
        """Go on with `tokens`."""
        self.tokens += tokens
        if self.over or not tokens:
            return
        text = list(takewhile(lambda token: token not in eos and token >= 0, tokens))
        seen = self.matcher.try_consume_tokens(text)
        self.taken += seen
        self.over = seen < len(tokens)
        if seen < len(text) and self.matcher.is_error():
            self.fault = reason(self.matcher)

    def cut(self, length: int, grammar: Grammar) -> Branch:
        """A branch of its own that has the first `length` tokens of this one."""
        kept = min(self.taken, length)
        if length > self.taken and self.over:  # the end, or what was wrong, is among the tokens kept
            return Branch(self.matcher.deep_copy(), self.tokens[:length], kept, True, self.fault)
        if self.matcher.is_error():  # there is no way back from an error
            fresh = grammar.matcher()
            fresh.try_consume_tokens(self.tokens[:kept])
        else:
            fresh = self.matcher.deep_copy()
            fresh.rollback(self.taken - kept)
        return Branch(fresh, self.tokens[:length], kept)


class Matching:
    """Rows that follow one grammar.

    A row is found again by its tokens: it continues the branch that has most of them, so rows may leave, change places,
    become forks of each other and take tokens back. A row that only grew costs what its new tokens cost.

    Args:
        grammar: what all rows follow.
        pinned: keep the masks in page-locked memory, for copies to a GPU.
    """

    def __init__(self, grammar: Grammar, pinned: bool = False) -> None:
        self.grammar = grammar
        self.branches: list[Branch] = []
        self._spare: list[Branch] = []
        self._bits = torch.empty(0, -(-grammar.table.size // 32), dtype=torch.int32, pin_memory=pinned)
        self._pinned = pinned

    def grow(self, news: list[list[int]]) -> None:
        """Every row, in the order of the last step, got these tokens."""
        for branch, tokens in zip(self.branches, news, strict=True):
            branch.push(tokens, self.grammar.table.eos)

    def follow(self, texts: list[list[int]]) -> None:
        """From now on the rows are these."""
        before, owned = self.branches + self._spare, set[int]()
        longest = max((len(branch.tokens) for branch in before), default=0)
        places = {tuple(branch.tokens): place for place, branch in enumerate(before)}
        self.branches = []
        for text in texts:
            exact = places.get(tuple(text[:longest]))
            place, common = _nearest(before, text) if exact is None else (exact, longest)
            if place < 0:
                self.branches.append(Branch(self.grammar.matcher(), []))
            elif place not in owned and common == len(before[place].tokens):
                owned.add(place)
                self.branches.append(before[place])
            else:
                self.branches.append(before[place].cut(common, self.grammar))
        self._spare = [branch for place, branch in enumerate(before) if place not in owned][:_SPARE]
        self.grow([text[len(branch.tokens) :] for text, branch in zip(texts, self.branches, strict=True)])

    def masks(self) -> Tensor:
        """`[rows, words]` int32, a bit for each token that may come next; none for rows that are over.

        Valid until the next call.

        Raises:
            Exhausted: a row's grammar became too complex.
        """
        rows, words = len(self.branches), self._bits.shape[1]
        if self._bits.shape[0] < rows:
            self._bits = torch.empty(rows, words, dtype=torch.int32, pin_memory=self._pinned)
        bits = self._bits[:rows]
        live = [(branch.matcher, place) for place, branch in enumerate(self.branches) if not branch.over]
        if len(live) < rows:
            bits.zero_()
        if len(live) > 1 and len(live) * self.grammar.table.size >= _PARALLEL:
            _executor().unsafe_compute_mask_ptr(live, bits.data_ptr(), 4 * words, rows)
        else:
            for matcher, place in live:
                matcher.unsafe_compute_mask_ptr(bits.data_ptr() + 4 * words * place, 4 * words)
        for matcher, place in live:
            if matcher.is_error():
                self._stop(self.branches[place], bits[place])
        for place, branch in enumerate(self.branches):
            if branch.fault:
                raise Exhausted(place, branch.fault)
        if self.grammar.table.plain_eos:
            self._allow_ends(bits)
        return bits

    def _stop(self, branch: Branch, bits: Tensor) -> None:
        """Note that a branch's matcher failed to give a mask."""
        branch.over, branch.fault = True, reason(branch.matcher)
        bits.zero_()
        if not branch.fault:
            logger.warning("The grammar cannot go on after %d tokens with this tokenizer; the row ends.", branch.taken)

    def _allow_ends(self, bits: Tensor) -> None:
        """End tokens that are text too end a row just the same, so they may not come before the text is complete."""
        octets = bits.view(torch.uint8)
        for place, branch in enumerate(self.branches):
            if not branch.over and not branch.matcher.is_accepting():
                for token in self.grammar.table.plain_eos:
                    octets[place, token // 8] &= 255 ^ (1 << token % 8)


def _nearest(branches: list[Branch], text: list[int]) -> tuple[int, int]:
    """The place of the branch that begins most like `text`, and how many tokens they share; -1 where none does."""
    best, common = -1, 0
    for place, branch in enumerate(branches):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(branch.tokens, text, strict=False)))
        if same > common:
            best, common = place, same
    return best, common


@cache
def _executor() -> Any:
    """llguidance's threads, shared by all calls."""
    return import_module("llguidance").LLExecutor(max(1, min(8, (os.cpu_count() or 1))))
