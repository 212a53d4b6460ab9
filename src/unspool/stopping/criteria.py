"""Criteria on the width, the clock, the last token and the confidence."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from unspool.stopping.base import Scores, StoppingCriteria

logger = logging.getLogger(__name__)


class MaxLengthCriteria(StoppingCriteria):
    """End every row at a width, prompt and padding included.

    Args:
        max_length: columns of `input_ids` at which rows end.
        max_position_embeddings: positions the model was made for; going past them is logged once.
    """

    row_independent = True

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings
        self._told = False

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        """Return all rows or none."""
        rows, width = input_ids.shape
        done = width >= self.max_length
        limit = self.max_position_embeddings
        if limit is not None and width > limit and not done and not self._told:
            self._told = True
            logger.warning(
                "The text is longer than the %d positions the model was made for; quality may drop from here on.", limit
            )
        return torch.full((rows,), done, dtype=torch.bool, device=input_ids.device)


class MaxTimeCriteria(StoppingCriteria):
    """End every row once a time has passed.

    Args:
        max_time: seconds.
        initial_timestamp: start of the time, as `time.time()` tells it; default is now.
    """

    row_independent = True

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        """Return all rows or none."""
        done = time.time() - self.initial_timestamp > self.max_time
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


class EosTokenCriteria(StoppingCriteria):
    """End a row when it makes an end-of-sequence token.

    Args:
        eos_token_id: one id, several or a 1-d tensor.

    Raises:
        ValueError: the ids are not integers.
    """

    row_independent = True

    def __init__(self, eos_token_id: int | Iterable[int] | Tensor) -> None:
        if not isinstance(eos_token_id, Tensor):
            eos_token_id = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
        if eos_token_id.is_floating_point():
            raise ValueError(f"`eos_token_id` has to be a token id or a list of ids, but is {eos_token_id.tolist()}.")
        self.eos_token_id = eos_token_id.reshape(-1)

    def __call__(self, input_ids: Tensor, scores: Scores, new_token_length: int = 1, **kwargs: Any) -> Tensor:
        """Return the rows with an eos among their last `new_token_length` tokens."""
        if self.eos_token_id.device != input_ids.device:
            self.eos_token_id = self.eos_token_id.to(input_ids.device)
        newest = input_ids[:, -new_token_length:]
        return (newest.unsqueeze(-1) == self.eos_token_id).flatten(1).any(dim=-1)


class ConfidenceCriteria(StoppingCriteria):
    """End a row when the probability of its newest token is below a threshold; used while drafting.

    Args:
        assistant_confidence_threshold: probability in [0, 1].
    """

    row_independent = True

    def __init__(self, assistant_confidence_threshold: float) -> None:
        self.assistant_confidence_threshold = assistant_confidence_threshold

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        """Return the rows in doubt.

        Raises:
            ValueError: the scores were not kept.
        """
        if not scores:
            raise ValueError(
                "ConfidenceCriteria needs the scores; set `output_scores=True` and `return_dict_in_generate=True`."
            )
        chosen = scores[-1].softmax(dim=-1).gather(-1, input_ids[:, -1:]).squeeze(-1)
        return chosen < self.assistant_confidence_threshold
