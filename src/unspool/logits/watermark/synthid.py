"""The SynthID-Text watermark: a tournament between tokens, whose rounds a hash of the last tokens decides.

Random bits ("g-values", one for each layer of the tournament) are looked up by a hash of an n-gram and the layer's key;
tokens with ones gain probability from those with zeros. Whoever knows the keys finds more ones than chance would give.
Everything follows from a row's own tokens: nothing is kept from step to step, so rows may come, go and be reordered.

Source: Dathathri et al., https://doi.org/10.1038/s41586-024-08025-4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.logits.base import LogitsProcessor, check_count

_MULTIPLIER = 6364136223846793005
_INCREMENT = 1


class SynthIDTextWatermarkLogitsProcessor(LogitsProcessor):
    """Mark text by tournament sampling, and compute what detectors need of a text.

    Args:
        ngram_len: tokens in a hashed n-gram, the candidate included.
        keys: one integer for each layer of the tournament.
        sampling_table_size: entries of the table of random bits.
        sampling_table_seed: seed of that table.
        context_history_size: contexts of a row remembered; a token after one of them is not marked.
        device: where the scores are; the table differs between kinds of devices.
        skip_first_ngram_calls: leave the first `ngram_len - 1` new tokens unmarked.
        debug_mode: mark a uniform distribution instead of the scores.
        prompt_length: columns of the prompt, which is no part of any context. Without it, it is the width of
            `input_ids` in the first call, and again whenever the width is not one more than in the call before.

    Raises:
        ValueError: a setting is out of its range.
    """

    row_independent = True

    def __init__(
        self,
        ngram_len: int,
        keys: Sequence[int],
        sampling_table_size: int,
        sampling_table_seed: int,
        context_history_size: int,
        device: str | torch.device,
        skip_first_ngram_calls: bool = False,
        debug_mode: bool = False,
        prompt_length: int | None = None,
    ) -> None:
        check_count("ngram_len", ngram_len, 2)
        check_count("sampling_table_size", sampling_table_size, 1)
        check_count("context_history_size", context_history_size, 1)
        self.ngram_len = ngram_len
        self.keys = torch.tensor(keys, device=device)
        if not self.keys.numel() or self.keys.is_floating_point():
            raise ValueError(f"`keys` has to be a list of at least one integer, but is {keys!r}.")
        self.device = torch.device(device)
        self.context_history_size = context_history_size
        self.skip_first_ngram_calls = skip_first_ngram_calls
        self.debug_mode = debug_mode
        generator = torch.Generator(device=device).manual_seed(sampling_table_seed)
        self.sampling_table = torch.randint(0, 2, (sampling_table_size,), generator=generator, device=device)
        self._bits = self.sampling_table.float()
        # A layer's hash of a token is `hash * multiplier` plus this.
        self._offsets = [_wrap(int(key) * _MULTIPLIER + _INCREMENT) for key in keys]
        self._prompt_length = prompt_length
        self._first = self._last = -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log probabilities of the marked distribution; a row in a repeated context keeps its scores."""
        _check_ids(input_ids)
        begin, n = self._begin(input_ids.shape[1]), self.ngram_len
        step = input_ids.shape[1] - begin
        if self.debug_mode:
            scores = torch.ones_like(scores)
        if self.skip_first_ngram_calls and step < n - 1:
            return scores
        oldest = max(step - self.context_history_size, n - 1 if self.skip_first_ngram_calls else 0)
        known = F.pad(input_ids[:, begin:], (n - 1, 0))  # the first contexts are filled up with zeros
        contexts = _hash(known[:, oldest:].unfold(1, n - 1, 1))
        now = contexts[:, -1:]
        marked = _play(scores, self._layers_of_next(now, scores))
        repeated = (contexts[:, :-1] == now).any(dim=1, keepdim=True)
        return torch.where(repeated, scores, marked)

    def update_scores(self, scores: Tensor, g_values: Tensor) -> Tensor:
        """Play the tournament: log probabilities `[rows, vocab]` of `scores` `[rows, vocab]` after every layer.

        Args:
            scores: what the distribution is the softmax of.
            g_values: 0 or 1, `[rows, vocab, layers]`.
        """
        return _play(scores, g_values.to(scores.dtype).unbind(dim=2))

    def compute_ngram_keys(self, ngrams: Tensor) -> Tensor:
        """Hashes `[rows, n-grams, layers]` of `ngrams` `[rows, n-grams, ngram_len]`.

        Raises:
            ValueError: the shape is another.
        """
        if ngrams.dim() != 3 or ngrams.shape[2] != self.ngram_len:
            raise ValueError(f"`ngrams` has to be [rows, n-grams, {self.ngram_len}], but is {list(ngrams.shape)}.")
        return (_hash(ngrams)[..., None] + self.keys) * _MULTIPLIER + _INCREMENT

    def sample_g_values(self, ngram_keys: Tensor) -> Tensor:
        """The random bits `[rows, n-grams, layers]` that the hashes `ngram_keys` stand for."""
        return self.sampling_table[ngram_keys % len(self.sampling_table)]

    def compute_g_values(self, input_ids: Tensor) -> Tensor:
        """The random bits `[rows, width - ngram_len + 1, layers]` of every n-gram of `input_ids` `[rows, width]`."""
        _check_ids(input_ids)
        return self.sample_g_values(self.compute_ngram_keys(input_ids.unfold(1, self.ngram_len, 1)))

    def compute_context_repetition_mask(self, input_ids: Tensor) -> Tensor:
        """False for n-grams whose context is one of the `context_history_size` before; `[rows, n-grams]` bool."""
        _check_ids(input_ids)
        contexts = _hash(input_ids[:, :-1].unfold(1, self.ngram_len - 1, 1))
        ordered, places = contexts.sort(dim=1, stable=True)
        near = (ordered[:, 1:] == ordered[:, :-1]) & (places.diff(dim=1) <= self.context_history_size)
        return torch.ones_like(contexts, dtype=torch.bool).scatter_(1, places, ~F.pad(near, (1, 0)))

    def compute_eos_token_mask(self, input_ids: Tensor, eos_token_id: int | list[int]) -> Tensor:
        """True before a row's first end token, `[rows, width]` bool."""
        _check_ids(input_ids)
        ends = torch.isin(input_ids, torch.tensor(eos_token_id, device=input_ids.device))
        return ends.cumsum(dim=1) == 0

    def expected_mean_g_value(self, vocab_size: int, coinflip_prob: float = 0.5) -> float:
        """Mean of the bits of marked text with one layer, where the model's distribution is uniform."""
        return coinflip_prob + coinflip_prob * (1 - coinflip_prob) * (1 - 1 / vocab_size)

    def _begin(self, width: int) -> int:
        """Columns of the prompt."""
        if self._prompt_length is not None:
            return self._prompt_length
        if width != self._last + 1 or self._first < 0:
            self._first = width
        self._last = width
        return self._first

    def _layers_of_next(self, contexts: Tensor, scores: Tensor) -> Iterator[Tensor]:
        """Layer by layer, the bits `[rows, vocab]` of every token after contexts with the hashes `[rows, 1]`."""
        tokens = torch.arange(scores.shape[1], device=contexts.device)
        base = ((contexts + tokens) * _MULTIPLIER + _INCREMENT) * _MULTIPLIER
        bits = self._bits.to(scores.dtype)
        last = len(bits) - 1
        binary = len(bits) & last == 0
        if binary:  # the low bits decide: half the memory, and no division
            base = (base & last).int()
        for offset in self._offsets:
            place = (base + (offset & last)).bitwise_and_(last) if binary else (base + offset) % len(bits)
            yield bits.index_select(0, place.view(-1)).view_as(scores)


def _play(scores: Tensor, layers: Iterable[Tensor]) -> Tensor:
    """The tournament: log probabilities of `scores` `[rows, vocab]` after each of `layers` of bits, as floats."""
    probs = scores.softmax(dim=1)
    for ones in layers:
        mass = (ones * probs).sum(dim=1, keepdim=True)
        probs.mul_((ones + 1).sub_(mass))
    logs = probs.log_()
    return torch.where(logs.isfinite(), logs, torch.finfo(logs.dtype).min)


def _hash(ngrams: Tensor) -> Tensor:
    """Hash the last dimension, by a linear congruential generator in wrapping 64-bit arithmetic."""
    found = torch.ones_like(ngrams[..., 0])
    for tokens in ngrams.unbind(-1):
        found = (found + tokens) * _MULTIPLIER + _INCREMENT
    return found


def _wrap(value: int) -> int:
    """`value` as the signed 64-bit number that it wraps to."""
    return (value + 2**63) % 2**64 - 2**63


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"`input_ids` has to be [rows, width], but is {list(input_ids.shape)}.")
