"""Bans on n-grams that were already said."""

from __future__ import annotations

from torch import Tensor

from unspool.logits import ops
from unspool.logits.base import LogitsProcessor, check_count


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Ban every token that would repeat an n-gram of its row.

    Raises:
        ValueError: `ngram_size` is not a strictly positive integer.
    """

    row_independent = True

    def __init__(self, ngram_size: int) -> None:
        check_count("ngram_size", ngram_size, 1)
        self.ngram_size = ngram_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with repeating tokens at -inf."""
        return ops.no_repeat_ngram(scores, input_ids, self.ngram_size)


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Ban every token that would repeat an n-gram of the encoder's input (or of the prompt).

    Args:
        encoder_ngram_size: n.
        encoder_input_ids: `[inputs, length]` or `[length]`; rows come in equal groups, one group for each input.

    Raises:
        ValueError: `encoder_ngram_size` is not a strictly positive integer, or (when called) the rows do not divide
            among the inputs.
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Tensor) -> None:
        check_count("encoder_ngram_size", encoder_ngram_size, 1)
        self.ngram_size = encoder_ngram_size
        self.encoder_input_ids = encoder_input_ids.unsqueeze(0) if encoder_input_ids.dim() == 1 else encoder_input_ids
        self.batch_size = self.encoder_input_ids.shape[0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with repeating tokens at -inf."""
        if scores.shape[0] % self.batch_size:
            raise ValueError(
                f"`encoder_input_ids` has {self.batch_size} rows, which do not divide the {scores.shape[0]} rows of "
                "`scores`; give each input the same number of rows."
            )
        source = self.encoder_input_ids = self.encoder_input_ids.to(input_ids.device)
        return ops.encoder_no_repeat_ngram(scores, input_ids, source, self.ngram_size)
