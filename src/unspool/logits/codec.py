"""Processors of models that speak in the codes of audio codecs: MusicGen, Bark and Dia."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor, check_count, token_tensor
from unspool.logits.ops import NEG_INF


class ClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Move conditional scores away from unconditional ones: `u + (c - u) * guidance_scale`.

    Args:
        guidance_scale: above 1.

    Raises:
        ValueError: `guidance_scale` is not above 1, or (when called) the scores do not have twice as many rows as
            `input_ids`.

    Source: Copet et al., https://arxiv.org/abs/2306.05284.
    """

    reads_history = False

    def __init__(self, guidance_scale: float) -> None:
        _check_scale(guidance_scale)
        self.guidance_scale = guidance_scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `[rows, vocab]` for `scores` `[2 * rows, vocab]`, conditional rows first."""
        conditional, free = _halves(input_ids, scores)
        return free + (conditional - free) * self.guidance_scale


class AlternatingCodebooksLogitsProcessor(LogitsProcessor):
    """Let Bark choose from its two codebooks in turn.

    Args:
        input_start_len: columns of the prompt.
        semantic_vocab_size: ids before the first codebook.
        codebook_size: ids of the first codebook; those after it are the second.

    Raises:
        ValueError: `input_start_len` is not a non-negative integer.
    """

    reads_history = False
    row_independent = True

    def __init__(self, input_start_len: int, semantic_vocab_size: int, codebook_size: int) -> None:
        check_count("input_start_len", input_start_len, 0)
        self.input_start_len = input_start_len
        self.semantic_vocab_size = semantic_vocab_size
        self.codebook_size = codebook_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with all but the codebook whose turn it is at -inf."""
        middle = self.semantic_vocab_size + self.codebook_size
        first = (input_ids.shape[-1] - self.input_start_len) % 2 == 0
        processed = torch.full_like(scores, NEG_INF)
        turn = slice(self.semantic_vocab_size, middle) if first else slice(middle, None)
        processed[:, turn] = scores[:, turn]
        return processed


class BarkEosPrioritizerLogitsProcessor(LogitsProcessor):
    """Make an end token the only choice once it is likelier than `min_eos_p`.

    Args:
        eos_token_id: one id, several or a 1-d tensor.
        min_eos_p: probability above 0; None changes nothing.
        device: where ids given as numbers are put.

    Raises:
        ValueError: a value is out of its range.
    """

    reads_history = False
    row_independent = True

    def __init__(
        self,
        eos_token_id: int | Iterable[int] | Tensor,
        min_eos_p: float | None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.eos_token_id = token_tensor("eos_token_id", eos_token_id, device)
        if any(token < 0 for token in self.eos_token_id.tolist()):
            raise ValueError(f"`eos_token_id` has to be a list of non-negative integers, but is {eos_token_id}.")
        if min_eos_p is not None and min_eos_p <= 0:
            raise ValueError(f"`min_eos_p` has to be a positive number, but is {min_eos_p}.")
        self.min_eos_p = min_eos_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, with all but the end tokens at -inf in rows that are likely to end."""
        if self.min_eos_p is None:
            return scores
        eos = self.eos_token_id.to(scores.device)
        likely = (scores.float().softmax(dim=-1)[:, eos] > self.min_eos_p).any(dim=1, keepdim=True)
        only = torch.full_like(scores, NEG_INF).index_copy_(1, eos, scores[:, eos])
        return torch.where(likely, only, scores)


class DiaClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Guidance as Dia has it: `c + (c - u) * guidance_scale`, or the conditional scores of its best tokens.

    Args:
        guidance_scale: above 1.
        guidance_top_k: keep the conditional scores of this many tokens, those with the best guided ones.

    Raises:
        ValueError: a value is out of its range, or (when called) the scores do not have twice as many rows as
            `input_ids`.
    """

    reads_history = False

    def __init__(self, guidance_scale: float, guidance_top_k: int | None = None) -> None:
        _check_scale(guidance_scale)
        if guidance_top_k is not None:
            check_count("guidance_top_k", guidance_top_k, 1)
        self.guidance_scale = guidance_scale
        self.guidance_top_k = guidance_top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `[rows, vocab]` for `scores` `[2 * rows, vocab]`, conditional rows first."""
        conditional, free = _halves(input_ids, scores)
        guided = conditional + (conditional - free) * self.guidance_scale
        if self.guidance_top_k is None:
            return guided
        best = guided.topk(self.guidance_top_k, dim=-1)[1]
        return torch.full_like(guided, NEG_INF).scatter_(1, best, conditional.gather(1, best))


class DiaEOSChannelFilterLogitsProcessor(LogitsProcessor):
    """Let the first channel alone end, and only when its end token is the best; then nothing else is left.

    Ids after the end token are special and never chosen.

    Args:
        num_channels: channels of each text, side by side in the rows.
        eos_token_id: the end token, above 0.

    Raises:
        ValueError: a value is out of its range.
    """

    reads_history = False

    def __init__(self, num_channels: int, eos_token_id: int) -> None:
        check_count("num_channels", num_channels, 1)
        check_count("eos_token_id", eos_token_id, 1)
        self.num_channels = num_channels
        self.eos_id = eos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `[texts * channels, vocab]` for `scores` of as many elements."""
        eos, channels = self.eos_id, self.num_channels
        by_channel = scores.reshape(-1, channels, scores.shape[-1]).clone()
        by_channel[:, 1:, eos:] = NEG_INF
        by_channel[:, 0, eos + 1 :] = NEG_INF
        flat = by_channel.flatten(0, 1)
        ends = (flat.argmax(dim=-1) == eos).unsqueeze(-1)
        flat[:, :eos].masked_fill_(ends, NEG_INF)
        flat[:, eos : eos + 1].masked_fill_(~ends, NEG_INF)
        return flat


class DiaEOSDelayPatternLogitsProcessor(LogitsProcessor):
    """Once the first channel ends, end every other one its delay later.

    The count of steps since then is kept from call to call, as the scores alone tell it: one object serves one call of
    `generate()`.

    Args:
        delay_pattern: steps that each channel comes after the first.
        eos_token_id: the end token.
        max_generation_len: greatest width; the first channel ends in time for the others.
        device: where the scores are.

    Raises:
        ValueError: the pattern is empty.
    """

    reads_history = False

    def __init__(
        self,
        delay_pattern: Sequence[int],
        eos_token_id: int,
        max_generation_len: int,
        device: str | torch.device = "cpu",
    ) -> None:
        if not delay_pattern:
            raise ValueError("`delay_pattern` has to hold the delay of at least one channel, but is empty.")
        self.num_channels = len(delay_pattern)
        self.delay_pattern = torch.tensor([list(delay_pattern)], device=device, dtype=torch.int)
        self.eos_token_id = eos_token_id
        self.max_generation_len = max_generation_len - max(delay_pattern) - 1
        self.active_batches: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `[texts * channels, vocab]`, with 0 for a forced end token and -inf elsewhere in its row."""
        by_channel = scores.reshape(-1, self.num_channels, scores.shape[-1])
        if self.active_batches is None:
            self.delay_pattern = self.delay_pattern.repeat(by_channel.shape[0], 1)
            self.active_batches = torch.zeros(by_channel.shape[0], device=self.delay_pattern.device, dtype=torch.bool)
        ending = by_channel[:, 0].argmax(dim=-1) == self.eos_token_id
        self.active_batches = self.active_batches | ending | (input_ids.shape[1] == self.max_generation_len)
        forced = (self.active_batches[:, None] & (self.delay_pattern == 0))[..., None]
        end = torch.arange(scores.shape[-1], device=scores.device) == self.eos_token_id
        self.delay_pattern = self.delay_pattern - self.active_batches[:, None].int()
        processed = by_channel.masked_fill(forced & ~end, NEG_INF).masked_fill(forced & end, 0.0)
        return processed.flatten(0, 1)


def _check_scale(scale: float) -> None:
    if not scale > 1:
        raise ValueError(f"`guidance_scale` has to be above 1 to guide, but is {scale}.")


def _halves(input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional rows."""
    rows = input_ids.shape[0]
    if scores.shape[0] != 2 * rows:
        raise ValueError(
            f"Guidance takes conditional scores and, after them, as many unconditional ones: {2 * rows} rows for "
            f"{rows} of `input_ids`, but there are {scores.shape[0]}."
        )
    return scores[:rows], scores[rows:]
