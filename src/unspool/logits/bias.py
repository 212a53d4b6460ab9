"""Biases on token sequences, and bans as biases of -inf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor, token_tensor

TokenSequence = tuple[int, ...]
Biases = dict[TokenSequence, float]


@dataclass(frozen=True, slots=True)
class _Endings:
    """Biased sequences of one length, ready for a vocabulary and a device.

    Attributes:
        prefix: all tokens but the last, `[sequences, length - 1]`.
        slot: index of the last token in `_Table.tokens`, `[sequences]`.
        bias: `[sequences]`.
    """

    prefix: Tensor
    slot: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class _Table:
    """The biases, ready for scores of one width, device and type.

    Attributes:
        key: width, device and type it was made for.
        single: bias of each token whatever came before, `[vocab]`.
        tokens: the last tokens of longer sequences, each once, `[tokens]`.
        base: their own `single` biases, `[1, tokens]`.
        endings: the longer sequences, grouped by length.
    """

    key: tuple[int, torch.device, torch.dtype]
    single: Tensor
    tokens: Tensor
    base: Tensor
    endings: tuple[_Endings, ...]


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Add a bias to the last token of a sequence whenever the row ends with the tokens before it.

    Args:
        sequence_bias: `{(token, ...): bias}`, or `[[[token, ...], bias], ...]`, the form JSON files can hold.

    Raises:
        ValueError: it is empty or of another form, or (when called) a token is outside the vocabulary.
    """

    row_independent = True

    def __init__(self, sequence_bias: Mapping[TokenSequence, float] | list[list[Any]]) -> None:
        self.sequence_bias = _checked_biases(sequence_bias)
        self._table: _Table | None = None

    @property
    def reads_history(self) -> bool:  # type: ignore[override]
        """False when every sequence is a single token."""
        return any(len(sequence) > 1 for sequence in self.sequence_bias)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores plus the biases that apply."""
        table = self._table
        if table is None or table.key != (scores.shape[-1], scores.device, scores.dtype):
            table = self._table = _build_table(self.sequence_bias, scores)
        processed = scores + table.single
        if not table.endings:
            return processed
        bias = table.base.repeat(scores.shape[0], 1)
        for group in table.endings:
            length = group.prefix.shape[1]
            if length <= input_ids.shape[1]:
                bias.index_add_(1, group.slot, torch.where(_ends_with(input_ids, group.prefix), group.bias, 0.0))
        # Summed before it meets the score, so that rounding does not depend on how many sequences share a token.
        return processed.index_copy_(1, table.tokens, scores.index_select(1, table.tokens) + bias)


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Ban token sequences: the last token of each is at -inf when the row ends with the ones before it.

    Args:
        bad_words_ids: `[[token, ...], ...]`.
        eos_token_id: ids that stay allowed, even where a single-token word of the list names them.

    Raises:
        ValueError: the list is empty or holds anything but lists of non-negative integers, or (when called) a token
            is outside the vocabulary.
    """

    def __init__(
        self, bad_words_ids: list[list[int]], eos_token_id: int | Iterable[int] | Tensor | None = None
    ) -> None:
        if not isinstance(bad_words_ids, list) or not bad_words_ids:
            raise ValueError(f"`bad_words_ids` has to be a non-empty list, but is {bad_words_ids!r}.")
        for word in bad_words_ids:
            if not isinstance(word, list) or not word or not _are_tokens(word):
                raise ValueError(
                    f"`bad_words_ids` has to be a list of non-empty lists of non-negative integers, but holds {word!r}."
                )
        self.bad_word_ids = bad_words_ids
        kept = [] if eos_token_id is None else token_tensor("eos_token_id", eos_token_id).tolist()
        words = [word for word in bad_words_ids if not (len(word) == 1 and word[0] in kept)]
        self.sequence_bias = {tuple(int(token) for token in word): float("-inf") for word in words}
        self._table = None


def _are_tokens(ids: Sequence[object]) -> bool:
    return all(isinstance(token, Integral) and int(token) >= 0 for token in ids)


def _checked_biases(given: object) -> Biases:
    if not isinstance(given, (dict, list)) or not given:
        raise ValueError(f"`sequence_bias` has to be a non-empty dict or list, but is {given!r}.")
    pairs: list[Any] = list(given.items()) if isinstance(given, dict) else given
    container = tuple if isinstance(given, dict) else list
    biases: Biases = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(
                f"Each element of `sequence_bias` has to be a pair [[token, ...], bias], but one is {pair!r}."
            )
        ids, bias = pair
        if not isinstance(ids, container) or not ids or not _are_tokens(ids):
            raise ValueError(
                f"Each sequence of `sequence_bias` has to be a non-empty {container.__name__} of non-negative "
                f"integers, but one is {ids!r}."
            )
        if not isinstance(bias, float) or isnan(bias):
            raise ValueError(f"Each bias of `sequence_bias` has to be a float, but that of {ids!r} is {bias!r}.")
        biases[tuple(int(token) for token in ids)] = bias
    return biases


def _build_table(biases: Biases, scores: Tensor) -> _Table:
    vocab, device, dtype = scores.shape[-1], scores.device, scores.dtype
    outside = [token for sequence in biases for token in sequence if token >= vocab]
    if outside:
        raise ValueError(f"The vocabulary has {vocab} tokens, but these token ids are biased or banned: {outside}.")
    single = torch.zeros(vocab, dtype=torch.float, device="cpu")
    by_length: dict[int, list[TokenSequence]] = {}
    for sequence, bias in biases.items():
        if len(sequence) == 1:
            single[sequence[0]] = bias
        elif sequence:
            by_length.setdefault(len(sequence), []).append(sequence)
    tokens = sorted({sequence[-1] for group in by_length.values() for sequence in group})
    slots = {token: slot for slot, token in enumerate(tokens)}
    endings = tuple(
        _Endings(
            prefix=torch.tensor([sequence[:-1] for sequence in group], device=device),
            slot=torch.tensor([slots[sequence[-1]] for sequence in group], device=device),
            bias=torch.tensor([biases[sequence] for sequence in group], dtype=dtype, device=device),
        )
        for group in by_length.values()
    )
    single = single.to(device=device, dtype=dtype)
    return _Table(
        key=(vocab, device, dtype),
        single=single,
        base=single[tokens].unsqueeze(0),
        tokens=torch.tensor(tokens, dtype=torch.long, device=device),
        endings=endings,
    )


def _ends_with(ids: Tensor, prefixes: Tensor) -> Tensor:
    """Whether rows of `ids` `[rows, width]` end with each of `prefixes` `[sequences, n]`; `[rows, sequences]`."""
    match = ids[:, -1:] == prefixes[:, -1]
    for back in range(2, prefixes.shape[1] + 1):
        match &= ids[:, -back : 1 - back] == prefixes[:, -back]
    return match
