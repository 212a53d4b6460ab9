"""Ops: a column of parameters is the number applied row by row; top-k with top-p is the two in sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from unspool.logits import TopKLogitsWarper, TopPLogitsWarper, fused, ops
from unspool.logits.warpers import TopKTopPLogitsWarper

INF = float("inf")


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def make_scores(rows: int, vocab: int, seed: int, kind: str) -> Tensor:
    """Scores `[rows, vocab]`: distinct, with ties, mostly -inf, all equal, peaked, or not finite."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab, generator=random) * 3
    if kind == "bf16":
        return scores.bfloat16().float()
    if kind == "ties":
        return scores.round()
    if kind == "banned":
        return scores.masked_fill(torch.rand(rows, vocab, generator=random) < 0.97, -INF)
    if kind == "equal":
        return torch.full_like(scores, 1.5)
    if kind == "peaked":
        return scores * 20
    if kind == "broken":
        scores[0, seed % vocab] = [float("nan"), INF, -INF][seed % 3]
        scores[-1] = -INF
    return scores


KINDS = ["plain", "bf16", "ties", "banned", "equal", "peaked", "broken"]


@settings(max_examples=250, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1000, 3000),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 60),
    p=st.floats(0, 0.999),
    keep=st.integers(1, 4),
    heat=st.sampled_from([1.0, 0.3, 0.7, 2.5]),
)
@example(rows=3, vocab=1024, seed=1, kind="bf16", k=50, p=0.9, keep=1, heat=1.0)
@example(rows=1, vocab=2047, seed=1, kind="plain", k=50, p=0.95, keep=1, heat=0.7)
def test_top_k_top_p_is_the_sequence(
    rows: int, vocab: int, seed: int, kind: str, k: int, p: float, keep: int, heat: float
) -> None:
    scores = make_scores(rows, vocab, seed, kind) / heat
    before = scores.clone()
    one_by_one = TopPLogitsWarper(p, min_tokens_to_keep=keep)(
        scores, TopKLogitsWarper(k, min_tokens_to_keep=keep)(scores, scores)
    )
    same(TopKTopPLogitsWarper(k, p, min_tokens_to_keep=keep)(scores, scores), one_by_one)
    same(scores, before)


@pytest.mark.parametrize("vocab", [32000, 49152, 50257, 128256])
def test_top_k_top_p_at_real_vocabularies_rarely_sorts(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found, sorted_rows = [], [], []
    for seed in range(4):
        scores = make_scores(1, vocab, seed, "plain")
        wanted.append(ops.top_p(ops.top_k(scores, 50), 0.9))
    monkeypatch.setattr(fused, "top_p", lambda scores, *_, **__: sorted_rows.append(scores) or scores)
    for seed in range(4):
        found.append(fused.top_k_top_p(make_scores(1, vocab, seed, "plain"), 50, 0.9))
    same(torch.cat(found), torch.cat(wanted))
    assert not sorted_rows


def test_top_k_top_p_takes_a_column() -> None:
    scores = make_scores(4, 2000, 3, "bf16")
    p = [0.1, 0.5, 0.9, 0.99]
    column = fused.top_k_top_p(scores, 40, torch.tensor(p, dtype=torch.float64))
    same(column, torch.cat([fused.top_k_top_p(scores[i : i + 1], 40, value) for i, value in enumerate(p)]))


Op = Callable[..., Tensor]

# op, values that filter, the value that switches a row off
COLUMNS: list[tuple[str, Op, st.SearchStrategy[Any], Any]] = [
    ("temperature", ops.temperature, st.floats(0.1, 5), 1.0),
    ("top_k", ops.top_k, st.integers(1, 50), 0),
    ("top_p", ops.top_p, st.floats(0, 0.999), 2.0),
    ("min_p", ops.min_p, st.floats(0.01, 1), 0.0),
    ("top_h", ops.top_h, st.floats(0.01, 1), 2.0),
    ("typical_p", ops.typical_p, st.floats(0.01, 0.99), 2.0),
    ("epsilon_cutoff", ops.epsilon_cutoff, st.floats(0.001, 0.9), 0.0),
    ("eta_cutoff", ops.eta_cutoff, st.floats(0.001, 0.9), 0.0),
]


@pytest.mark.parametrize(("op", "values", "off"), [case[1:] for case in COLUMNS], ids=[case[0] for case in COLUMNS])
def test_column_is_the_number_row_by_row(op: Op, values: st.SearchStrategy[Any], off: Any) -> None:
    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), rows=st.integers(1, 5), vocab=st.integers(4, 300), kind=st.sampled_from(KINDS[:4]))
    def check(data: st.DataObject, rows: int, vocab: int, kind: str) -> None:
        scores = make_scores(rows, vocab, data.draw(st.integers(0, 9999)), kind)
        scores[:, 0] = 1.0  # a row of -inf alone has no distribution
        chosen = [data.draw(st.one_of(values, st.just(off))) for _ in range(rows)]
        dtype = torch.long if isinstance(off, int) else torch.float64
        found = op(scores, torch.tensor(chosen, dtype=dtype))
        alone = [scores[i : i + 1] if v == off else op(scores[i : i + 1], v) for i, v in enumerate(chosen)]
        same(found, torch.cat(alone))

    check()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), width=st.integers(1, 30), seed=st.integers(0, 9999))
def test_history_columns(data: st.DataObject, rows: int, width: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, 8, generator=random)
    ids = torch.randint(0, 4, (rows, width), generator=random)
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))
    found = ops.no_repeat_ngram(scores, ids, torch.tensor(sizes), longest=max(sizes))
    one = slice(0, 1)
    for row, size in enumerate(sizes):
        one = slice(row, row + 1)
        same(found[one], ops.no_repeat_ngram(scores[one], ids[one], size) if size else scores[one])
    penalties = data.draw(st.lists(st.floats(0.5, 2), min_size=rows, max_size=rows))
    ignore = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    found = ops.repetition_penalty(
        scores, ids, torch.tensor(penalties, dtype=torch.float64), ignore=torch.tensor(ignore)
    )
    for row, penalty in enumerate(penalties):
        one = slice(row, row + 1)
        same(found[one], ops.repetition_penalty(scores[one], ids[one], penalty, ignore=ignore[row]))


def test_top_k_column_with_a_bound() -> None:
    scores = make_scores(3, 500, 0, "ties")
    k = torch.tensor([3, 0, 20])
    same(ops.top_k(scores, k, largest=20), ops.top_k(scores, k))
