"""Draws by torch's random numbers, and the best of many scores: the same bits as by PyTorch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import unspool
from unspool.decode.choose.noise import GlobalNoise, SeededNoise, key
from unspool.decode.sequence import Sequence
from unspool.kernels import best as bests, draw as draws, native
from unspool.kernels.best import best, keep_best
from unspool.kernels.draw import draw, draw_seeded
from unspool.logits import ops
from unspool.logits.fused import top_k_top_p, top_p

pytestmark = pytest.mark.skipif(not native.active(), reason=native.describe())

seeds = st.one_of(st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63 - 1]), st.integers(0, 2**63 - 1))
widths = st.one_of(st.integers(1, 700), st.sampled_from([2048, 4097, 20000]))


@pytest.fixture(autouse=True)
def _two_threads_without_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63))


def probabilities(kind: str, seed: int, rows: int, vocab: int) -> Tensor:
    scores = 4 * normal(seed, rows, vocab)
    if kind == "few":
        scores = scores.masked_fill(scores < scores.topk(min(5, vocab))[0][:, -1:], -torch.inf)
    if kind == "flat":  # the noise alone decides
        scores = torch.zeros(rows, vocab)
    if kind == "bare":  # not even summed to 1, of every size
        return scores.abs().mul(9).exp() * (scores > -2)
    return scores.softmax(dim=-1)


def race(probs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as the choosers took them from all the noise, and their ratios."""
    ratio = probs / noise
    tokens = ratio.argmax(dim=-1)
    value = ratio.gather(1, tokens[:, None])[:, 0]
    return tokens.where(value.isfinite() & (value > 0), -1), value


def started(seed: int, read: int) -> torch.Generator:
    """A generator of which `read` words were taken."""
    generator = torch.Generator().manual_seed(seed)
    if read:
        torch.randint(2, (read,), generator=generator)
    return generator


def assert_drawn(probs: Tensor, generator: torch.Generator, places: list[int] | None = None, rows: int = 0) -> None:
    state = generator.get_state()
    noise = torch.empty(rows or len(probs), probs.shape[1]).exponential_(1, generator=generator)
    expected, values = race(probs, noise if places is None else noise[places])
    after = generator.get_state()
    generator.set_state(state)
    tokens, ratios = draws._draw(probs, places, rows or len(probs), generator)
    assert tokens is not None
    assert torch.equal(tokens, expected)
    assert torch.equal(generator.get_state(), after)
    regular = values.isfinite()
    assert torch.equal(ratios[regular], values[regular])
    generator.set_state(state)
    assert torch.equal(draw(probs.clone(), places, rows, generator), expected)
    assert torch.equal(generator.get_state(), after)


def test_torchs_generator_is_the_one_that_is_known() -> None:
    assert draws._alike()


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    read=st.integers(0, 1300),
    rows=st.integers(1, 5),
    vocab=widths,
    kind=st.sampled_from(["usual", "few", "flat", "bare"]),
)
def test_draws_and_the_state_after(seed: int, read: int, rows: int, vocab: int, kind: str) -> None:
    generator = started(seed, read)
    probs = probabilities(kind, seed, rows, vocab)
    assert_drawn(probs, generator)
    assert_drawn(probs, generator)  # from where it was left


@pytest.mark.parametrize("read", [0, 1, 2, 622, 623, 624, 625, 1247, 1248])
@pytest.mark.parametrize("vocab", [1, 2, 311, 312, 313, 624])
def test_every_end_of_a_state(read: int, vocab: int) -> None:
    assert_drawn(probabilities("usual", read, 1, vocab), started(3, read))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, vocab=widths, places=st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True))
def test_rows_of_a_rectangle_of_which_some_ended(seed: int, vocab: int, places: list[int]) -> None:
    assert_drawn(probabilities("usual", seed, len(places), vocab), started(seed, 5), places, 7)


@settings(max_examples=25, deadline=None)
@given(each=st.lists(seeds, min_size=1, max_size=9), vocab=widths)
def test_seeded_draws(each: list[int], vocab: int) -> None:
    probs = probabilities("usual", each[0], len(each), vocab)
    generator = torch.Generator()
    noise = torch.stack([torch.empty(vocab).exponential_(1, generator=generator.manual_seed(seed)) for seed in each])
    expected, values = race(probs, noise)
    tokens, ratios = draws._draw_seeded(probs, each)
    assert torch.equal(tokens, expected)
    assert torch.equal(ratios, values)
    assert torch.equal(draw_seeded(probs.clone(), each, generator), expected)


def test_rows_with_nothing_to_draw() -> None:
    probs = probabilities("usual", 0, 7, 5000)
    probs[1, 4999] = torch.nan
    probs[2] = torch.nan
    probs[3] = 0
    probs[4, 17] = torch.inf
    probs[5, 0], probs[5, 1] = torch.nan, torch.inf
    assert_drawn(probs, started(0, 0))
    tokens = draw(probs.clone())
    assert (tokens >= 0).tolist() == [True, False, False, False, False, False, True]
    assert torch.equal(draw_seeded(probs.clone(), list(range(7)), torch.Generator()) >= 0, tokens >= 0)


def test_a_generators_other_numbers_after_a_draw() -> None:
    """Uniform ones, and normal ones of which one is kept for the next call."""
    probs = probabilities("usual", 0, 2, 1001)
    after = []
    for drawn in (lambda: draw(probs.clone()), lambda: torch.empty(2, 1001).exponential_(1)):
        torch.manual_seed(11)
        torch.randn(3, dtype=torch.float64)
        torch.randn(1)
        drawn()
        after.append(
            torch.cat([torch.rand(700), torch.randn(1), torch.randn(3), torch.randn(40), torch.get_rng_state()])
        )
    assert torch.equal(*after)


def test_what_the_kernel_is_not_for() -> None:
    """Other dtypes and strange states of generators are PyTorch's; rows that do not lie together are drawn right."""
    probs = probabilities("usual", 0, 6, 1500)
    half = probs.double()
    expected, _ = race(half, torch.empty(6, 1500, dtype=torch.float64).exponential_(1, generator=started(5, 0)))
    assert torch.equal(draw(half.clone(), generator=started(5, 0)), expected)
    apart = torch.cat([probs, probs], dim=1)[:, :1500]
    assert torch.equal(draw(apart, generator=started(5, 0)), draw(probs.clone(), generator=started(5, 0)))
    state = torch.Generator().get_state()
    state[16] = 7  # words read, of which none are missing
    kept = state.clone()
    code = draws._functions()[0](state.data_ptr(), probs.data_ptr(), 1500, None, 6, None, None)
    assert code == 1
    assert torch.equal(state, kept)


def test_threads_draw_different_numbers() -> None:
    """Of threads that draw from one generator, each gets numbers of its own: together, those of one thread."""
    probs = torch.full((1, 60_000), 1 / 60_000)
    torch.manual_seed(0)
    alone = [int(draw(probs)) for _ in range(64)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: int(draw(probs)), range(64)))
    assert sorted(together) == sorted(alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_who_draws_elsewhere_meanwhile_gets_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our reading of torch's generator and our writing, another thread may have drawn from it."""
    probs = torch.full((1, 60_000), 1 / 60_000)
    real, meanwhile = draws._functions(), [True, False]

    def disturbed(*args: Any) -> Any:
        if meanwhile.pop(0):
            torch.rand(5)
        return real[0](*args)

    torch.manual_seed(0)
    torch.rand(5)
    expected, state = int(draw(probs)), torch.get_rng_state()
    monkeypatch.setattr(draws, "_functions", lambda: (disturbed, real[1]))
    torch.manual_seed(0)
    assert int(draw(probs)) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_rows() -> None:
    """What draws for rows gives what their noise does: rows that ended, and drafts."""
    rows = [Sequence(number, [1] * (3 + number)) for number in (0, 2, 3)]
    rows[1].draft = [5, 6]
    for noise in (GlobalNoise(4, torch.device("cpu")), SeededNoise(9, 2, torch.device("cpu"), first=1)):
        probs = probabilities("usual", 1, 3, 3000)
        torch.manual_seed(4)
        expected, _ = race(probs, noise(rows, 3000))
        torch.manual_seed(4)
        assert torch.equal(noise.draw(probs.clone(), rows), expected)
    ahead = probabilities("usual", 2, 5, 3000)
    torch.manual_seed(4)
    expected, _ = race(ahead, torch.empty(5, 3000).exponential_(1))
    torch.manual_seed(4)
    assert torch.equal(GlobalNoise(4, torch.device("cpu")).draw_ahead(ahead.clone(), rows), expected)
    keys = [key(9, 1, 3), key(9, 1, 5), key(9, 1, 6), key(9, 1, 7), key(9, 2, 6)]
    found = SeededNoise(9, 2, torch.device("cpu"), first=1).draw_ahead(ahead.clone(), rows)
    assert torch.equal(found, draw_seeded(ahead.clone(), keys, torch.Generator()))


@pytest.fixture(scope="module")
def story() -> Any:
    return unspool.load("storyteller", dtype="bfloat16")


WAYS: list[dict[str, Any]] = [
    {},
    {"top_k": 40, "temperature": 0.8, "num_return_sequences": 2},
    {"top_k": 50, "top_p": 0.9, "seed": 5},
    {"top_k": 0, "top_p": 0.8},
    {"prompt_lookup_num_tokens": 3},
    {"assistant": True},
    {"assistant": True, "seed": 5},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "plain")
def test_the_text_that_pytorchs_operations_give(
    story: Any, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same state of torch's generator afterwards."""
    torch.set_num_threads(1)
    way = dict(way)
    model, tokenizer = story
    if way.pop("assistant", False):
        way["assistant_model"], _ = unspool.load("storyteller-draft", dtype="bfloat16")
    prompts = tokenizer(["Once upon a time", "The owl", "A fox and"], return_tensors="pt", padding=True)
    told = []
    for theirs in (False, True):
        if theirs:
            monkeypatch.setattr(draws, "_alike", lambda: False)
            monkeypatch.setattr(bests, "_usable", lambda scores, count: False)
        torch.manual_seed(3)
        out = model.generate(**prompts, do_sample=True, max_new_tokens=12, **way)
        told.append((out.tolist(), torch.get_rng_state().tolist()))
    assert told[0] == told[1]


def test_the_text_of_requests_that_pytorchs_operations_give(story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    model, tokenizer = story
    prompts = tokenizer(["Once upon a time", "The owl", "A fox and"])["input_ids"]
    config = unspool.GenerationConfig(do_sample=True, max_new_tokens=12, top_k=30, seed=4)
    texts = []
    for theirs in (False, True):
        if theirs:
            monkeypatch.setattr(draws, "_alike", lambda: False)
        results = model.generate_batch(prompts, generation_config=config)
        texts.append([result.generated_tokens for result in results.values()])
    assert texts[0] == texts[1]


# ---- The best of many scores ----------------------------------------------------------------------------------------


def top_k(scores: Tensor, k: int, filler: float) -> Tensor:
    return torch.where(scores < torch.topk(scores, k)[0][..., -1:], filler, scores)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(1, 4),
    width=st.integers(1024, 5000) | st.sampled_from([65536, 65537, 70001]),
    k=st.integers(1, 2048),
    levels=st.sampled_from([0, 1, 2, 30, 3000]),
    masked=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_the_best_with_ties_and_masks(seed: int, rows: int, width: int, k: int, levels: int, masked: float) -> None:
    k = min(k, width)
    scores = normal(seed, rows, width)
    if levels:
        scores = (scores * levels).round() / levels  # with zeros of both signs
    scores[torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < masked] = -torch.inf
    kept = keep_best(scores, k, -torch.inf)
    assert kept is not None
    assert torch.equal(bits(kept), bits(top_k(scores, k, -torch.inf)))
    found = best(scores, k)
    assert found is not None
    values, places = torch.sort(scores, dim=-1, descending=True, stable=True)
    assert torch.equal(found[1], places[:, :k])
    assert torch.equal(bits(found[0]), bits(values[:, :k]))


def test_the_best_of_what_is_sorted() -> None:
    """All candidates in one place, and each better than those before."""
    for scores in (torch.arange(9000.0)[None], -torch.arange(9000.0)[None], torch.zeros(1, 9000)):
        for k in (1, 50, 2048):
            assert torch.equal(keep_best(scores, k, -1e9), top_k(scores, k, -1e9))  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", [[torch.nan], [torch.inf], [torch.inf, -torch.inf], [-torch.inf, torch.nan]])
def test_filters_of_scores_that_are_not_finite(odd: list[float]) -> None:
    scores = normal(0, 3, 3000)
    scores[1, 100 : 100 + len(odd)] = torch.tensor(odd)
    for filler in (-torch.inf, -7.0):
        found = ops.top_k(scores, 20, filter_value=filler)
        assert torch.equal(bits(found), bits(top_k(scores, 20, filler)))
    wide = torch.cat([scores, scores, scores], dim=-1)
    assert torch.equal(bits(top_p(wide, 0.9)), bits(ops.top_p(wide, 0.9)))
    both = top_k_top_p(scores, 20, 0.9)
    assert torch.equal(bits(both), bits(ops.top_p(top_k(scores, 20, -torch.inf), 0.9)))


@settings(max_examples=20, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(1, 3),
    width=st.sampled_from([8192, 9001]),
    sharpness=st.sampled_from([0.0, 1.0, 3.0, 6.0, 30.0]),
    levels=st.sampled_from([0, 1, 4]),
    masked=st.sampled_from([0.0, 0.5, 0.9999]),
    p=st.floats(0, 1) | st.sampled_from([0.5, 0.9, 0.99, 1.0]),
    min_keep=st.sampled_from([1, 3, 50]),
    column=st.booleans(),
)
def test_a_nucleus_without_sorting(
    seed: int,
    rows: int,
    width: int,
    sharpness: float,
    levels: int,
    masked: float,
    p: float,
    min_keep: int,
    column: bool,
) -> None:
    scores = normal(seed, rows, width) * sharpness
    if levels:
        scores = (scores * levels).round() / levels
    scores[torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < masked] = -torch.inf
    limit: Any = torch.tensor([p, 0.7, 1.1][:rows], dtype=torch.float64) if column else p
    for filler in (-torch.inf, -5.0):
        found = top_p(scores, limit, filter_value=filler, min_keep=min_keep)
        assert torch.equal(bits(found), bits(ops.top_p(scores, limit, filter_value=filler, min_keep=min_keep)))


@pytest.mark.parametrize("share", [2.0**-10, 2.0**-12, 2.0**-13])
def test_a_nucleus_that_ends_between_tokens_for_all_that_rounding_says(share: float) -> None:
    """Tokens of one probability, so that sums meet the limit exactly, or nearly."""
    count = int(1 / share)
    scores = torch.full((1, 16384), -torch.inf)
    scores[0, torch.randperm(16384, generator=torch.Generator().manual_seed(1))[:count]] = torch.linspace(
        0, 1e-6, count
    )
    for tokens in (1, 7, 500, 900):
        for off in (-1e-7, 0.0, 1e-7, share / 2):
            p = tokens * share + off
            assert torch.equal(bits(top_p(scores, p)), bits(ops.top_p(scores, p)))


def test_a_usual_nucleus_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = normal(3, 4, 49152) * 6
    expected = ops.top_p(scores, 0.9)
    monkeypatch.setattr(ops, "top_p", None)
    assert torch.equal(bits(top_p(scores, 0.9)), bits(expected))


def test_which_scores_are_pytorchs() -> None:
    scores = normal(0, 2, 3000)
    assert keep_best(scores, 20, -torch.inf) is not None
    assert keep_best(scores[:, :1000], 20, -torch.inf) is None
    assert keep_best(scores, 2500, -torch.inf) is None
    assert keep_best(scores.bfloat16(), 20, -torch.inf) is None
    assert best(scores.double(), 20) is None
    assert best(scores, 0) is None
    sliced = keep_best(torch.cat([scores, scores], dim=1)[:, :3000], 20, -torch.inf)
    assert sliced is not None
    assert torch.equal(sliced, top_k(scores, 20, -torch.inf))
    with torch.enable_grad():
        followed = scores.clone().requires_grad_()
        ops.top_k(followed, 20, filter_value=0.0).sum().backward()
    assert followed.grad is not None
    assert int(followed.grad.sum()) == 40
