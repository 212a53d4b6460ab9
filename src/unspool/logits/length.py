"""Processors that act on the eos score by the length so far."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor, TokenIds, check_count, token_tensor
from unspool.logits.ops import NEG_INF


class MinLengthLogitsProcessor(LogitsProcessor):
    """Ban eos until the row, prompt and padding included, is `min_length` columns wide.

    Args:
        min_length: columns of `input_ids` before eos is allowed.
        eos_token_id: one id, several or a 1-d tensor.
        device: where ids given as numbers are put.

    Raises:
        ValueError: `min_length` is not a non-negative integer, or the ids are not integers.
    """

    reads_history = False
    row_independent = True

    def __init__(
        self, min_length: int, eos_token_id: int | Iterable[int] | Tensor, device: str | torch.device = "cpu"
    ) -> None:
        check_count("min_length", min_length, 0)
        self.min_length = min_length
        self.eos_token_id = token_tensor("eos_token_id", eos_token_id, device)
        self._eos = TokenIds(self.eos_token_id.tolist())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, with eos at -inf while the row is too short."""
        if input_ids.shape[-1] >= self.min_length:
            return scores
        return scores.index_fill(1, self._eos.index(scores), NEG_INF)


class MinNewTokensLengthLogitsProcessor(LogitsProcessor):
    """Ban eos until `min_new_tokens` tokens were made.

    Args:
        prompt_length_to_skip: columns of `input_ids` that the prompt takes, padding included.
        min_new_tokens: tokens made before eos is allowed.
        eos_token_id: one id, several or a 1-d tensor.
        device: where ids given as numbers are put.

    Raises:
        ValueError: a length is not a non-negative integer, or the ids are not integers.
    """

    reads_history = False
    row_independent = True

    def __init__(
        self,
        prompt_length_to_skip: int,
        min_new_tokens: int,
        eos_token_id: int | Iterable[int] | Tensor,
        device: str | torch.device = "cpu",
    ) -> None:
        check_count("prompt_length_to_skip", prompt_length_to_skip, 0)
        check_count("min_new_tokens", min_new_tokens, 0)
        self.prompt_length_to_skip = prompt_length_to_skip
        self.min_new_tokens = min_new_tokens
        self.eos_token_id = token_tensor("eos_token_id", eos_token_id, device)
        self._eos = TokenIds(self.eos_token_id.tolist())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, with eos at -inf while too few tokens were made."""
        if input_ids.shape[-1] - self.prompt_length_to_skip >= self.min_new_tokens:
            return scores
        return scores.index_fill(1, self._eos.index(scores), NEG_INF)


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raise the eos score exponentially once the output is past a length.

    Past the start, `|score| * (factor ** excess - 1)` is added to a finite eos score, which makes long outputs end.

    Args:
        exponential_decay_length_penalty: `(start, factor)`, with `start` counted in new tokens.
        eos_token_id: one id, several or a 1-d tensor.
        input_ids_seq_length: columns of the prompt.

    Raises:
        ValueError: the pair is not a pair, or the ids are not non-negative integers.
    """

    reads_history = False
    row_independent = True

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: int | Iterable[int] | Tensor,
        input_ids_seq_length: int,
    ) -> None:
        pair = exponential_decay_length_penalty
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                "`exponential_decay_length_penalty` has to be a pair (start, factor), but is "
                f"{exponential_decay_length_penalty!r}."
            )
        start, self.regulation_factor = exponential_decay_length_penalty
        self.regulation_start = start + input_ids_seq_length
        self.eos_token_id = token_tensor("eos_token_id", eos_token_id)
        ids = self.eos_token_id.tolist()
        if any(token < 0 for token in ids):
            raise ValueError(f"`eos_token_id` has to be a list of non-negative integers, but is {ids}.")
        self._eos = TokenIds(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with eos raised once the row is long enough."""
        excess = input_ids.shape[-1] - self.regulation_start
        if excess <= 0:
            return scores
        eos = self._eos.index(scores)
        picked = scores.index_select(1, eos)
        top = torch.finfo(scores.dtype).max
        # Capped where the power leaves the range of floats, so that a long row ends instead of failing.
        penalty = (picked.abs() * self._growth(excess, top)).clamp(max=top)
        raised = (picked + penalty).masked_fill(penalty >= top, top)
        return scores.index_copy(1, eos, raised.where(picked.isfinite(), picked))

    def _growth(self, excess: int, top: float) -> float:
        try:
            return min(self.regulation_factor**excess - 1, top)
        except OverflowError:
            return top
