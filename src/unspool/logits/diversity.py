"""The penalty that keeps the groups of a diverse beam search apart."""

from __future__ import annotations

from torch import Tensor

from unspool.logits import ops
from unspool.logits.base import LogitsProcessor, check_count, check_positive


class HammingDiversityLogitsProcessor(LogitsProcessor):
    """Lower the scores of tokens that earlier groups of the same prompt chose in the same step.

    For diverse beam search only, which calls it for one group after the other.

    Args:
        diversity_penalty: taken off a token's score once for every beam of an earlier group that chose it.
        num_beams: beams of each prompt.
        num_beam_groups: groups among which they are divided evenly.

    Raises:
        ValueError: `diversity_penalty` is not above zero, `num_beams` or `num_beam_groups` is below 2, or the groups do
            not divide the beams.

    Source: Vijayakumar et al., https://arxiv.org/abs/1610.02424.
    """

    reads_history = False
    row_independent = True

    def __init__(self, diversity_penalty: float, num_beams: int, num_beam_groups: int) -> None:
        self._diversity_penalty = check_positive("diversity_penalty", diversity_penalty)
        check_count("num_beams", num_beams, 1)
        check_count("num_beam_groups", num_beam_groups, 1)
        if num_beam_groups < 2 or num_beams % num_beam_groups:
            raise ValueError(
                f"`num_beam_groups` (={num_beam_groups}) has to be at least 2 and to divide `num_beams` (={num_beams})."
            )
        self._num_beams = num_beams
        self._size = num_beams // num_beam_groups

    def __call__(  # type: ignore[override]
        self, input_ids: Tensor, scores: Tensor, current_tokens: Tensor, beam_group_idx: int
    ) -> Tensor:
        """Return the scores of one group with those of tokens chosen by earlier groups lowered.

        Args:
            input_ids: `[prompts * group size, width]`; not looked at.
            scores: `[prompts * group size, vocab]`.
            current_tokens: `[prompts * num_beams]` tokens chosen in this step so far, by earlier groups.
            beam_group_idx: number of the group.
        """
        if beam_group_idx == 0:
            return scores
        before = current_tokens.view(-1, self._num_beams)[:, : beam_group_idx * self._size]
        return ops.hamming_diversity(scores, before, self._diversity_penalty)
