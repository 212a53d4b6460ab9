"""What a row says in the tokens of a draft model, and back: the same tokens, the same text, or the tokens both have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as Items
from dataclasses import dataclass
from difflib import Match, SequenceMatcher
from typing import Protocol

import torch
from torch import Tensor

from unspool.decode.sequence import Choice, Chooser, Sequence

Decode = Callable[[list[int]], str]
"""`tokens -> text`, special tokens left out."""

Encode = Callable[[str, bool], list[int]]
"""`(text, whole) -> tokens`; a whole text gets the special tokens that belong around it."""


class Words(Protocol):
    """How a row's tokens and a draft model's are translated."""

    def known(self, row: Sequence) -> list[int]:
        """What a row says, in the draft model's tokens; none where it has no words for it."""
        ...

    def take(self, row: int, token: int) -> int:
        """What the draft model is fed for a token that was just drafted for a row."""
        ...

    def draft(self, row: Sequence, known: list[int], drafted: list[int]) -> list[int]:
        """What was drafted after `known`, in the row's tokens."""
        ...


class SameWords:
    """One vocabulary."""

    def known(self, row: Sequence) -> list[int]:
        """See `Words`."""
        return list(row.tokens)

    def take(self, row: int, token: int) -> int:
        """See `Words`."""
        return token

    def draft(self, row: Sequence, known: list[int], drafted: list[int]) -> list[int]:
        """See `Words`."""
        return drafted


@dataclass(frozen=True, slots=True)
class Tongue:
    """A model's tokenizer, as far as text goes.

    Attributes:
        encode: see `Encode`.
        decode: see `Decode`.
    """

    encode: Encode
    decode: Decode


class SameText:
    """Texts tokenized anew, from one vocabulary to the other and back.

    After the first round only a window of the row is, and what was known before is kept up to where both agree.

    Args:
        rows: how many.
        ours: the rows' tokenizer.
        theirs: the draft model's.
        behind: tokens of a row, before those that are new, that are tokenized again with them.
        draft_behind: tokens of the draft model, before those drafted, that are tokenized again with them.

    Source: `AssistedCandidateGeneratorDifferentTokenizers` of transformers, whose windows these are.
    """

    def __init__(self, rows: int, ours: Tongue, theirs: Tongue, behind: int, draft_behind: int) -> None:
        self._ours, self._theirs = ours, theirs
        self._behind, self._draft_behind = behind, draft_behind
        self._known: list[tuple[int, list[int]]] = [(0, []) for _ in range(rows)]

    def known(self, row: Sequence) -> list[int]:
        """See `Words`."""
        count, known = self._known[row.row]
        found = None
        if count > self._behind:
            text = self._ours.decode(row.tokens[count - self._behind :])
            found = _joined(known, self._theirs.encode(text, False))
        if found is None:
            found = self._theirs.encode(self._ours.decode(row.tokens), True)
        self._known[row.row] = (len(row.tokens), found)
        return list(found)

    def take(self, row: int, token: int) -> int:
        """See `Words`."""
        return token

    def draft(self, row: Sequence, known: list[int], drafted: list[int]) -> list[int]:
        """See `Words`."""
        behind = known[max(0, len(known) - self._draft_behind) :]
        before, text = self._theirs.decode(behind), self._theirs.decode(behind + drafted)
        text = text.rstrip("\ufffd")  # a character that is not complete yet
        if not text.startswith(before) or len(text) == len(before):
            return []
        tokens = self._ours.encode(text, False)
        match = _longest(row.tokens[-len(tokens) :], tokens)
        if match.size and match.a + match.size == min(len(row.tokens), len(tokens)):
            return tokens[match.b + match.size :]
        return self._ours.encode(text[len(before) :], False)  # the row ends within a token of the text


class SharedWords:
    """Tokens that both vocabularies have: the draft model's choices, in the rows' vocabulary, among them alone.

    As `Chooser` of the draft model's rows it hands their logits on in the rows' vocabulary, and gives the choice in
    it too; so processors and seeded noise are those of the rows, and a draft comes with its true distribution.

    Args:
        chooser: decides in the rows' vocabulary.
        shadows: for each row one with its number, which `chooser` sees in its place.
        shared: the draft model's token for each of the rows' tokens that it has.
        vocab: how many tokens the rows' model has.
        ours, theirs: tokenizers, for prompts and for tokens that are not shared.
        device: where logits are.

    Source: token-level intersection, arXiv 2502.05202.
    """

    def __init__(
        self,
        chooser: Chooser,
        shadows: Items[Sequence],
        shared: Mapping[int, int],
        vocab: int,
        ours: Tongue,
        theirs: Tongue,
        device: torch.device,
    ) -> None:
        self._chooser = chooser
        self._shadows = shadows
        self._shared = shared
        self._vocab = vocab
        self._ours, self._theirs = ours, theirs
        self._places = torch.tensor(list(shared.keys()), device=device)
        self._from = torch.tensor(list(shared.values()), device=device)
        self._known: list[tuple[int, list[int]]] = [(0, []) for _ in shadows]

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """See `Chooser`."""
        wide = torch.full((logits.shape[0], self._vocab), float("-inf"), dtype=torch.float32, device=logits.device)
        wide[:, self._places] = logits[:, self._from].float()
        return self._chooser.choose(wide, [self._shadows[row.row] for row in rows])

    def known(self, row: Sequence) -> list[int]:
        """See `Words`."""
        count, known = self._known[row.row]
        if not known:
            known = self._theirs.encode(self._ours.decode(row.tokens), True)
        else:
            for token in row.tokens[count:]:
                same = self._shared.get(token)
                known += self._theirs.encode(self._ours.decode([token]), False) if same is None else [same]
        self._known[row.row] = (len(row.tokens), known)
        self._shadows[row.row].tokens = list(row.tokens)
        return list(known)

    def take(self, row: int, token: int) -> int:
        """See `Words`."""
        self._shadows[row].tokens.append(token)
        return self._shared[token]

    def draft(self, row: Sequence, known: list[int], drafted: list[int]) -> list[int]:
        """See `Words`."""
        return drafted


def _joined(known: list[int], window: list[int]) -> list[int] | None:
    """`known` with the end that `window` gives it; `None` where they have nothing in common."""
    match = _longest(known[-len(window) :], window)
    if not match.size:
        return None
    begin = max(0, len(known) - len(window))
    return known[: begin + match.a + match.size] + window[match.b + match.size :]


def _longest(first: list[int], second: list[int]) -> Match:
    """The longest run that two lists have in common."""
    return SequenceMatcher(None, first, second, autojunk=False).find_longest_match()
