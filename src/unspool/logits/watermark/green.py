"""The green-list watermark: a bias on tokens that a hash of the last ones picks, and the test for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.logits.base import LogitsProcessor, check_count

logger = logging.getLogger(__name__)

_TABLE_SIZE = 1_000_003
_CANDIDATES = 40
"""How many of a row's best tokens `selfhash` tries, as the paper's code does."""


def green_mask(seed: int, vocab: int, size: int, device: torch.device) -> Tensor:
    """Which tokens are green for a seed, `[vocab]` bool: the first `size` of a permutation drawn from it."""
    generator = torch.Generator(device=device).manual_seed(seed % (2**64 - 1))
    order = torch.randperm(vocab, generator=generator, device=device)
    return torch.zeros(vocab, dtype=torch.bool, device=device).index_fill_(0, order[:size], True)


class WatermarkLogitsProcessor(LogitsProcessor):
    """Add `bias` to the scores of a pseudo-random "green" part of the vocabulary, which the last tokens pick.

    `WatermarkDetector` finds the mark with the same settings, vocabulary and kind of device.

    Args:
        vocab_size: tokens that may be green; the first of the scores.
        device: where the scores are; the lists differ between kinds of devices.
        greenlist_ratio: share of the vocabulary that is green, between 0 and 1.
        bias: added to the scores of green tokens.
        hashing_key: key of the hash; whoever knows it can find the mark.
        seeding_scheme: `"lefthash"`: the last token picks; `"selfhash"`: the last `context_width` tokens with the
            candidate among them, tried for each row's 40 best tokens.
        context_width: tokens in the hash.
        lists_kept: lists of green tokens kept for the next time that the same one is needed, `vocab_size` bytes each.

    Raises:
        ValueError: a setting is out of its range, or (when called) the scores are narrower than `vocab_size`.

    Source: Kirchenbauer et al., https://arxiv.org/abs/2301.10226 and https://arxiv.org/abs/2306.04634.
    """

    row_independent = True

    def __init__(
        self,
        vocab_size: int,
        device: str | torch.device,
        greenlist_ratio: float = 0.25,
        bias: float = 2.0,
        hashing_key: int = 15485863,
        seeding_scheme: str = "lefthash",
        context_width: int = 1,
        *,
        lists_kept: int = 128,
    ) -> None:
        check_count("vocab_size", vocab_size, 1)
        check_count("context_width", context_width, 1)
        if seeding_scheme not in ("selfhash", "lefthash"):
            raise ValueError(f"`seeding_scheme` has to be 'lefthash' or 'selfhash', but is {seeding_scheme!r}.")
        if not 0.0 < greenlist_ratio < 1.0:
            raise ValueError(f"`greenlist_ratio` has to lie between 0 and 1, but is {greenlist_ratio}.")
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.greenlist_size = int(vocab_size * greenlist_ratio)
        self.bias = bias
        self.hash_key = hashing_key
        self.seeding_scheme = seeding_scheme
        self.context_width = context_width
        draw = partial(green_mask, vocab=vocab_size, size=self.greenlist_size, device=self.device)
        self._green: Callable[[int], Tensor] = lru_cache(lists_kept)(draw)
        self._table: Tensor | None = None

    def seeds(self, windows: Tensor) -> list[int]:
        """The seed for what follows each of `windows` `[windows, context_width]`, the candidate last in `selfhash`."""
        if self.seeding_scheme == "lefthash":
            return [self.hash_key * int(token) for token in windows[:, -1].tolist()]
        if self._table is None:
            generator = torch.Generator(device=self.device).manual_seed(self.hash_key)
            self._table = torch.randperm(_TABLE_SIZE, generator=generator, device=self.device)
        factors = self._table[windows.to(self.device) % _TABLE_SIZE] + 1
        found: list[int] = (self.hash_key * factors * factors[:, -1:]).amin(dim=1).tolist()
        return found

    def green(self, seeds: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Whether each of `tokens` is in the list of the seed beside it; each list is drawn once."""
        by_seed: dict[int, list[int]] = {}
        for place, seed in enumerate(seeds):
            by_seed.setdefault(seed, []).append(place)
        found = [False] * len(seeds)
        for seed, places in by_seed.items():
            inside = [place for place in places if 0 <= tokens[place] < self.vocab_size]
            hits = self._green(seed)[[tokens[place] for place in inside]].tolist()
            for place, hit in zip(inside, hits, strict=True):
                found[place] = hit
        return found

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with green tokens raised; unchanged where there are not yet `context_width` tokens."""
        if input_ids.shape[-1] < self.context_width:
            logger.warning(
                "The watermark needs %d tokens of context and there are %d; this token is not marked.",
                self.context_width,
                input_ids.shape[-1],
            )
            return scores
        if scores.shape[-1] < self.vocab_size:
            raise ValueError(
                f"The watermark was made for {self.vocab_size} tokens, but the scores have {scores.shape[-1]}; pass "
                "the model's `vocab_size`."
            )
        if self.seeding_scheme == "selfhash":
            return self._raise_candidates(input_ids, scores)
        seeds = self.seeds(input_ids[:, -1:])
        green = torch.stack([self._green(seed) for seed in seeds])
        beyond = scores.shape[-1] - self.vocab_size
        return torch.add(scores, F.pad(green, (0, beyond)) if beyond else green, alpha=self.bias)

    def _raise_candidates(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Raise those of each row's best tokens that are green in a list of their own making."""
        tokens = _best(scores, min(_CANDIDATES, scores.shape[-1]))
        before = input_ids[:, input_ids.shape[1] - self.context_width + 1 :]
        windows = torch.cat([before[:, None].expand(-1, tokens.shape[1], -1), tokens[..., None]], dim=-1)
        seeds = self.seeds(windows.flatten(0, 1))
        green = torch.tensor(self.green(seeds, tokens.flatten().tolist()), device=scores.device).view_as(tokens)
        value = scores.gather(1, tokens)
        return scores.scatter(1, tokens, torch.where(green, value + self.bias, value))


def _best(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` best tokens of each row; of equal ones at the edge, those that a full sort puts first."""
    if count < scores.shape[-1]:
        values, order = scores.topk(count + 1, dim=-1)
        edge = values[:, count - 1]
        if not bool(((edge == values[:, count]) & edge.isfinite()).any()):  # a raised -inf stays -inf
            return order[:, :count]
    return scores.sort(dim=-1, descending=True)[1][:, :count]
