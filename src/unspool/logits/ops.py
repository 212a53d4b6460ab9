"""Score transforms as pure functions on `[rows, vocab]` floats.

Every strength parameter is a number for all rows, or a column `[rows]` with one value for each row, which is how rows
of different requests share a step. A float64 column gives bit for bit what the same number gives. These column values
switch a row off (its scores pass unchanged):

| temperature | top_k | top_p, typical_p, top_h | min_p, epsilon, eta | repetition penalty | n-gram size |
|---|---|---|---|---|---|
| 1 | 0 | above 1 | 0 | 1 | 0 |

No function changes its inputs, and none reads a value back from an accelerator.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.kernels import elementwise
from unspool.kernels.best import keep_best

Parameter = float | Tensor

NEG_INF = float("-inf")


def greatest(scores: Tensor) -> Tensor:
    """`[rows]` int64: the place of each row's greatest score, the first of equal ones.

    -1 where there is nothing to choose: a row that holds NaN, or -inf alone.
    """
    if scores.device.type != "cpu":
        value, places = scores.max(dim=-1)
        return places.where(value > NEG_INF, -1)
    if (found := elementwise.greatest(scores)) is not None:
        return found[0]
    # numpy finds it several times as fast as PyTorch, which compares one by one
    table = (scores.float() if scores.itemsize < 4 else scores).numpy()
    places = table.argmax(axis=-1)
    places[~(table[np.arange(len(table)), places] > NEG_INF)] = -1
    return torch.from_numpy(places)


def sureness(scores: Tensor, tokens: Tensor) -> list[float]:
    """How probable each row's token is, by the softmax of `scores` `[rows, vocab]`; `tokens` `[rows]` are the greatest.

    Negative tokens, where there was nothing to choose, may get any number.
    """
    if (found := elementwise.greatest(scores, shares=True)) is not None and found[1] is not None:
        return found[1].tolist()
    return scores.softmax(dim=-1).gather(1, tokens.clamp_min(0)[:, None])[:, 0].tolist()


def temperature(scores: Tensor, value: Parameter) -> Tensor:
    """`scores / value`: above 1 flattens the distribution, below 1 sharpens it."""
    return scores / _column(value, scores)


def top_k(scores: Tensor, k: int | Tensor, *, filter_value: float = NEG_INF, largest: int | None = None) -> Tensor:
    """Keep the `k` best tokens of each row, and all ties of the k-th.

    Args:
        k: a number of at least 1, or a column of integers where 0 keeps all.
        filter_value: score of a removed token.
        largest: for a column, a bound on its values; without it the whole vocabulary is ranked.
    """
    vocab = scores.shape[-1]
    if isinstance(k, Tensor):
        bound = vocab if largest is None else max(1, min(largest, vocab))
        best = torch.topk(scores, bound)[0]
        kth = best.gather(-1, (k.clamp(1, bound) - 1).long().unsqueeze(-1))
        kth = kth.masked_fill((k == 0).unsqueeze(-1), NEG_INF)
    else:
        kept = keep_best(scores, min(k, vocab), filter_value)
        if kept is not None:
            return kept
        kth = torch.topk(scores, min(k, vocab))[0][..., -1:]
    return torch.where(scores < kth, filter_value, scores)


def top_p(scores: Tensor, p: Parameter, *, filter_value: float = NEG_INF, min_keep: int = 1) -> Tensor:
    """Nucleus filter: keep the smallest set of best tokens whose probability exceeds `p`.

    The `min_keep` best tokens always stay. Source: Holtzman et al., https://arxiv.org/abs/1904.09751.
    """
    ordered, order = torch.sort(scores)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
    remove = cumulative <= _column(1 - p, scores)
    remove[..., -min_keep:] = False
    return torch.where(torch.empty_like(remove).scatter_(-1, order, remove), filter_value, scores)


def min_p(scores: Tensor, p: Parameter, *, filter_value: float = NEG_INF, min_keep: int = 1) -> Tensor:
    """Remove tokens less probable than `p` times the best one. Source: https://arxiv.org/abs/2407.01082."""
    probs = scores.softmax(dim=-1)
    remove = probs < _column(p, scores) * probs.amax(dim=-1, keepdim=True)
    if min_keep > 1:  # the best token is never below its own share
        remove.scatter_(-1, torch.topk(probs, min(min_keep, probs.shape[-1]))[1], False)
    return torch.where(remove, filter_value, scores)


def top_h(scores: Tensor, h: Parameter, *, filter_value: float = NEG_INF, top_n: int = 100) -> Tensor:
    """Keep best tokens while their summed entropy stays within `h` times the entropy of the `top_n` best.

    Source: https://arxiv.org/abs/2509.02510.
    """
    best, index = torch.topk(scores, min(top_n, scores.shape[-1]))
    entropy, probs = _entropy(best)
    budget = entropy.unsqueeze(-1) * _column(h, entropy)
    keep = torch.cumsum(-probs * torch.log(probs), dim=-1) <= budget
    keep[:, 0] = True
    kept = torch.full_like(scores, filter_value).scatter_(-1, index, torch.where(keep, best, filter_value))
    return torch.where((h > 1).unsqueeze(-1), scores, kept) if isinstance(h, Tensor) else kept


def typical_p(scores: Tensor, mass: Parameter, *, filter_value: float = NEG_INF, min_keep: int = 1) -> Tensor:
    """Keep the tokens whose surprise is nearest the entropy, up to probability `mass`.

    Source: Meister et al., https://arxiv.org/abs/2202.00666.
    """
    log_probs = scores.log_softmax(dim=-1)
    entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)
    distance = (-log_probs - entropy).abs()
    ordered, order = torch.sort(distance)
    cumulative = scores.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (cumulative < _column(mass, scores)).sum(dim=-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    remove = distance > ordered.gather(-1, last)
    if min_keep > 1:  # the first in order is never farther than the last one kept
        remove.scatter_(-1, order[..., :min_keep], False)
    return torch.where(remove, filter_value, scores)


def epsilon_cutoff(scores: Tensor, epsilon: Parameter, *, filter_value: float = NEG_INF, min_keep: int = 1) -> Tensor:
    """Remove tokens of probability below `epsilon`, never the `min_keep` best.

    Source: Hewitt et al., https://arxiv.org/abs/2210.15191.
    """
    remove = scores.softmax(dim=-1) < _column(epsilon, scores)
    return torch.where(remove & _below_best(scores, min_keep), filter_value, scores)


def eta_cutoff(scores: Tensor, epsilon: Parameter, *, filter_value: float = NEG_INF, min_keep: int = 1) -> Tensor:
    """Remove tokens of probability below `min(epsilon, sqrt(epsilon) * exp(-entropy))`, never the `min_keep` best.

    Source: Hewitt et al., https://arxiv.org/abs/2210.15191.
    """
    floor = (
        epsilon if isinstance(epsilon, Tensor) else torch.full((), epsilon, dtype=torch.float32, device=scores.device)
    )
    floor = floor.to(torch.float32)
    entropy, _ = _entropy(scores)
    cutoff = torch.min(floor, torch.sqrt(floor) * torch.exp(-entropy)).unsqueeze(-1)
    remove = scores.softmax(dim=-1) < cutoff
    return torch.where(remove & _below_best(scores, min_keep), filter_value, scores)


def hamming_diversity(scores: Tensor, before: Tensor, penalty: float) -> Tensor:
    """Take `penalty` off a token's score once for each time it stands in `before`.

    Args:
        scores: `[prompts * rows, vocab]`, rows of one prompt side by side.
        before: `[prompts, tokens]` what was chosen for each prompt.
    """
    counts = torch.zeros(before.shape[0], scores.shape[-1], dtype=torch.int64, device=scores.device)
    counts.scatter_add_(1, before, torch.ones_like(before))
    return scores - (penalty * counts).repeat_interleave(scores.shape[0] // before.shape[0], dim=0)


def repetition_penalty(
    scores: Tensor, ids: Tensor, penalty: Parameter, *, ignore: int | Tensor | None = None
) -> Tensor:
    """Divide positive scores of tokens in `ids` by `penalty`, multiply negative ones by it.

    Args:
        ids: tokens so far `[rows, width]`; ids of `vocab` or more are skipped.
        ignore: leading columns that do not count, one number or a column `[rows]`.

    Source: Keskar et al., https://arxiv.org/abs/1909.05858.
    """
    vocab = scores.shape[-1]
    if isinstance(ignore, Tensor):
        positions = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.masked_fill(positions < ignore.unsqueeze(-1), vocab)
    elif ignore:
        ids = ids[:, ignore:]
    ids = ids.clamp(max=vocab)
    factor = _column(penalty, scores)
    out = F.pad(scores, (0, 1))  # the spare column takes the skipped ids
    seen = out.gather(1, ids)
    out.scatter_(1, ids, torch.where(seen < 0, seen * factor, seen / factor))
    return out[:, :vocab]


def no_repeat_ngram(scores: Tensor, ids: Tensor, size: int | Tensor, *, longest: int | None = None) -> Tensor:
    """Ban every token that would complete an n-gram already in `ids`.

    Args:
        ids: tokens so far `[rows, width]`; ids of `vocab` or more are never banned.
        size: n, at least 1, or a column of integers where 0 bans nothing.
        longest: for a column, its greatest value (required with a column).
    """
    width = ids.shape[1]
    if isinstance(size, Tensor):
        assert longest is not None, "a column of n-gram sizes comes with `longest`"
        return _ban(scores, ids, _repeats_by_row(ids, size, longest))
    if width < size:
        return scores
    return _ban(scores, ids[:, size - 1 :], ngram_matches(ids, ids, size))


def encoder_no_repeat_ngram(scores: Tensor, ids: Tensor, source: Tensor, size: int) -> Tensor:
    """Ban every token that would complete an n-gram of the encoder's input.

    Args:
        ids: tokens so far `[rows, width]`.
        source: encoder tokens `[inputs, length]`; rows come in equal groups, one group for each input.
        size: n, at least 1.
    """
    if source.shape[1] < size or ids.shape[1] < size - 1:
        return scores
    inputs = source.shape[0]
    tails = source[:, None, size - 1 :].expand(-1, scores.shape[0] // inputs, -1)
    match = ngram_matches(source[:, None], ids.reshape(inputs, -1, ids.shape[1]), size)
    if match is not None:
        match = match.flatten(0, 1)
    return _ban(scores, tails.flatten(0, 1), match)


def ngram_matches(source: Tensor, ids: Tensor, size: int) -> Tensor | None:
    """Where the `size - 1` tokens before a token of `source` equal the last ones of `ids`.

    Returns `[..., length - size + 1]` for the tokens of `source` from the first full n-gram on, or None (all match)
    for single tokens. Leading dimensions broadcast.
    """
    length, width = source.shape[-1], ids.shape[-1]
    match: Tensor | None = None
    for back in range(1, size):
        same = source[..., size - 1 - back : length - back] == ids[..., width - back : width - back + 1]
        match = same if match is None else match & same
    return match


def _repeats_by_row(ids: Tensor, size: Tensor, longest: int) -> Tensor:
    """`ngram_matches` of `ids` with itself for one size for each row; `[rows, width]`, aligned with `ids`."""
    rows, width = ids.shape
    sizes = size.unsqueeze(-1)
    match = ((sizes > 0) & (sizes <= width)).expand(rows, width)
    for back in range(1, min(longest, width + 1)):
        same = F.pad(ids[:, : width - back] == ids[:, width - back : width - back + 1], (back, 0))
        match = match & (same | (sizes <= back))
    return match


def _ban(scores: Tensor, tokens: Tensor, where: Tensor | None) -> Tensor:
    """-inf for `tokens` `[rows, n]` (where true); ids of `vocab` or more fall into a spare column."""
    vocab = scores.shape[-1]
    if where is not None and scores.device.type == "cpu":  # mostly there are few, or none
        rows, columns = where.numpy().nonzero()
        banned = tokens.numpy()[rows, columns]
        there = banned < vocab
        if not there.any():
            return scores
        scores = scores.clone()
        scores[torch.from_numpy(rows[there]), torch.from_numpy(banned[there])] = NEG_INF
        return scores
    if where is not None:
        tokens = torch.where(where, tokens, vocab)
    return F.pad(scores, (0, 1)).scatter_(1, tokens.clamp(max=vocab), NEG_INF)[:, :vocab]


def _column(value: Parameter, like: Tensor) -> Parameter:
    """A number as it is; a column `[rows]` as `[rows, 1]` in the type of `like`."""
    return value.to(like.dtype).unsqueeze(-1) if isinstance(value, Tensor) else value


def _entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy `[rows]` in nats and the probabilities, in the order of operations of `torch.distributions`."""
    log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)
    probs = log_probs.softmax(dim=-1)
    return -(log_probs.clamp(min=torch.finfo(logits.dtype).min) * probs).sum(-1), probs


def _below_best(scores: Tensor, count: int) -> Tensor:
    """Which scores are lower than the `count`-th best of their row."""
    if count == 1:
        return scores < scores.amax(dim=-1, keepdim=True)
    return scores < torch.topk(scores, min(count, scores.shape[-1]))[0][..., -1:]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Log probabilities `[rows, vocab]` moved from the unconditional ones by `scale` times the difference."""
    return scale * (conditional - unconditional) + unconditional
