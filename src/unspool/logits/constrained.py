"""Generation constrained by a function of the tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor
from unspool.logits.ops import NEG_INF

PrefixAllowedTokens = Callable[[int, Tensor], Sequence[int]]


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allow only the tokens that a function names for each row.

    When no row of a batch entry has a choice left (all allowed tokens are at -inf already), the allowed tokens become
    equally likely instead.

    Args:
        prefix_allowed_tokens_fn: called with the batch entry's number and the row's tokens `[width]`; returns the
            ids allowed next.
        num_beams: rows of each batch entry.

    Raises:
        ValueError: (when called) the function allows nothing.

    Source: De Cao et al., https://arxiv.org/abs/2010.00904.
    """

    def __init__(self, prefix_allowed_tokens_fn: PrefixAllowedTokens, num_beams: int) -> None:
        self._prefix_allowed_tokens_fn = prefix_allowed_tokens_fn
        self._num_beams = num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with all but the allowed tokens at -inf."""
        mask = torch.full_like(scores, NEG_INF)
        for row, tokens in enumerate(input_ids):
            entry = row // self._num_beams
            allowed = self._prefix_allowed_tokens_fn(entry, tokens)
            if not hasattr(allowed, "__len__"):
                raise TypeError(
                    f"`prefix_allowed_tokens_fn` returned {allowed!r} for batch entry {entry}; it has to return a list "
                    "of token ids."
                )
            if len(allowed) == 0:
                raise ValueError(
                    f"`prefix_allowed_tokens_fn` allowed no token for batch entry {entry}; it has to name at least "
                    "one, e.g. the eos id when the constraint is fulfilled."
                )
            try:
                mask[row, allowed] = 0
            except IndexError:
                raise ValueError(
                    f"`prefix_allowed_tokens_fn` allowed {list(allowed)} for batch entry {entry}, of which some are "
                    f"none of the {scores.shape[1]} tokens that there are."
                ) from None
        processed = scores + mask
        stuck = processed.amax(dim=-1).isneginf().view(-1, self._num_beams).all(dim=-1)
        return torch.where(stuck.repeat_interleave(self._num_beams).unsqueeze(-1), mask, processed)
