"""Penalties on tokens that were already said, and rewards for tokens of the encoder's input."""

from __future__ import annotations

from torch import Tensor

from unspool.logits import ops
from unspool.logits.base import LogitsProcessor, check_count, check_positive


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Lower the scores of tokens seen before: positive ones are divided by `penalty`, negative ones multiplied.

    Args:
        penalty: above 1 discourages repetition, below 1 encourages it.
        prompt_ignore_length: leading columns of `input_ids` that do not count, one number or a 1-d tensor with one
            number for each row. None counts every column, padding included.

    Raises:
        ValueError: `penalty` is not above zero, `prompt_ignore_length` is negative or not 1-d, or (when called) it
            has another number of rows than `input_ids`.

    Source: Keskar et al., https://arxiv.org/abs/1909.05858.
    """

    row_independent = True

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None) -> None:
        self.penalty = check_positive("penalty", penalty)
        if isinstance(prompt_ignore_length, Tensor):
            if prompt_ignore_length.dim() != 1:
                raise ValueError(
                    "`prompt_ignore_length` has to be a number or a 1-d tensor [rows], but its shape is "
                    f"{tuple(prompt_ignore_length.shape)}."
                )
        elif prompt_ignore_length is not None:
            check_count("prompt_ignore_length", prompt_ignore_length, 0)
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with those of the tokens in `input_ids` penalised."""
        return self._penalise(input_ids, scores, self.prompt_ignore_length)

    def on_rows(self, input_ids: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        """The same for some of the batch's rows, those numbered `rows`, once others have left it."""
        ignore = self.prompt_ignore_length
        return self._penalise(input_ids, scores, ignore.to(rows.device)[rows] if isinstance(ignore, Tensor) else ignore)

    def _penalise(self, input_ids: Tensor, scores: Tensor, ignore: int | Tensor | None) -> Tensor:
        if input_ids.dim() == 1:
            input_ids = input_ids.unsqueeze(1)
        if isinstance(ignore, Tensor):
            ignore = ignore.to(input_ids.device)
            if ignore.shape[0] != input_ids.shape[0]:
                raise ValueError(
                    f"`prompt_ignore_length` has {ignore.shape[0]} values but `input_ids` has {input_ids.shape[0]} "
                    "rows; give one value for each row."
                )
        return ops.repetition_penalty(scores, input_ids, self.penalty, ignore=ignore)


class EncoderRepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Raise the scores of tokens of the encoder's input (or of the prompt): an inverse repetition penalty.

    Args:
        penalty: above 1 favours tokens of the input.
        encoder_input_ids: `[inputs, length]`; rows come in equal groups, one group for each input.

    Raises:
        ValueError: `penalty` is not above zero.
    """

    reads_history = False

    def __init__(self, penalty: float, encoder_input_ids: Tensor) -> None:
        self.penalty = 1 / check_positive("penalty", penalty)
        self.encoder_input_ids = encoder_input_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with those of the input's tokens raised."""
        source = self.encoder_input_ids
        if scores.shape[0] > source.shape[0]:
            source = source.repeat_interleave(scores.shape[0] // source.shape[0], dim=0)
        return ops.repetition_penalty(scores, source, self.penalty)
