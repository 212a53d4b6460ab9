"""Processors that force or forbid tokens by id."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor, TokenIds, token_tensor
from unspool.logits.ops import NEG_INF


class _ById(LogitsProcessor):
    """A processor that looks at the width of `input_ids` only."""

    reads_history = False
    row_independent = True


class ForcedBOSTokenLogitsProcessor(_ById):
    """Make `bos_token_id` the only choice for the second token of a row."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores; after one token, 0 for the forced one and -inf elsewhere."""
        if input_ids.shape[-1] != 1:
            return scores
        forced = torch.full_like(scores, NEG_INF)
        forced[:, self.bos_token_id] = 0
        return forced


class ForcedEOSTokenLogitsProcessor(_ById):
    """Make the eos ids the only choice for the last token before `max_length`.

    Args:
        max_length: greatest width of a row, prompt and padding included.
        eos_token_id: one id, several or a 1-d tensor.
        device: where ids given as numbers are put.

    Raises:
        ValueError: the ids are not non-negative integers.
    """

    def __init__(
        self, max_length: int, eos_token_id: int | Iterable[int] | Tensor, device: str | torch.device = "cpu"
    ) -> None:
        self.max_length = max_length
        self.eos_token_id = token_tensor("eos_token_id", eos_token_id, device)
        if any(token < 0 for token in self.eos_token_id.tolist()):
            raise ValueError(f"`eos_token_id` has to be a list of non-negative integers, but is {eos_token_id}.")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores; at the last place, 0 for the forced ids and -inf elsewhere."""
        if input_ids.shape[-1] != self.max_length - 1:
            return scores
        return torch.full_like(scores, NEG_INF).index_fill_(1, self.eos_token_id.to(scores.device), 0.0)


class SuppressTokensLogitsProcessor(_ById):
    """Never choose `suppress_tokens`; ids outside the vocabulary are of no consequence.

    Raises:
        ValueError: the ids are not integers.
    """

    def __init__(self, suppress_tokens: Iterable[int] | Tensor, device: str | torch.device = "cpu") -> None:
        self.suppress_tokens = token_tensor("suppress_tokens", suppress_tokens, device)
        self._tokens = TokenIds(self.suppress_tokens.tolist())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with the suppressed tokens at -inf."""
        return scores.index_fill(1, self._tokens.index(scores), NEG_INF)


class SuppressTokensAtBeginLogitsProcessor(_ById):
    """Do not choose `begin_suppress_tokens` as the first new token.

    Args:
        begin_suppress_tokens: ids; those outside the vocabulary are of no consequence.
        begin_index: width of `input_ids` at that step.
        device: where the ids are put.

    Raises:
        ValueError: the ids are not integers.
    """

    def __init__(
        self,
        begin_suppress_tokens: Iterable[int] | Tensor,
        begin_index: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.begin_suppress_tokens = token_tensor("begin_suppress_tokens", begin_suppress_tokens, device)
        self.begin_index = begin_index
        self._tokens = TokenIds(self.begin_suppress_tokens.tolist())

    def set_begin_index(self, begin_index: int) -> None:
        """Move the step at which the tokens are suppressed."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, with the suppressed tokens at -inf at the first step."""
        if input_ids.shape[-1] != self.begin_index:
            return scores
        return scores.index_fill(1, self._tokens.index(scores), NEG_INF)
