"""Processors, criteria and lengths in random combinations: the same tokens as transformers from the same call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCAB, make_checkpoint
from hypothesis import HealthCheck, given, reject, settings, strategies as st

import unspool

TOKENS = st.integers(1, VOCAB - 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("llama")
    theirs = make_checkpoint("llama", folder, seed=5)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), theirs


def optional(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


HISTORY = optional(
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.4, 4.0]),
    no_repeat_ngram_size=st.integers(1, 3),
    encoder_repetition_penalty=st.sampled_from([0.7, 1.5]),
    encoder_no_repeat_ngram_size=st.integers(1, 3),
    bad_words_ids=st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=3),
    sequence_bias=st.lists(
        st.tuples(st.lists(TOKENS, min_size=1, max_size=2), st.sampled_from([-5.0, 3.0])),
        min_size=1, max_size=3, unique_by=lambda pair: tuple(pair[0]),
    ).map(lambda pairs: [[tokens, bias] for tokens, bias in pairs]),
)  # fmt: skip
PLACES = optional(
    suppress_tokens=st.lists(TOKENS, min_size=1, max_size=6),
    begin_suppress_tokens=st.lists(TOKENS, min_size=1, max_size=6),
    forced_eos_token_id=TOKENS,
    forced_bos_token_id=TOKENS,
    min_new_tokens=st.integers(1, 9),
    min_length=st.integers(1, 20),
    exponential_decay_length_penalty=st.tuples(st.integers(1, 6), st.sampled_from([1.1, 1.6])),
    remove_invalid_values=st.booleans(),
    renormalize_logits=st.booleans(),
)
WARPERS = optional(
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 3, 40]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.02, 0.3]),
    typical_p=st.sampled_from([0.3, 0.9]),
    epsilon_cutoff=st.sampled_from([0.001, 0.05]),
    eta_cutoff=st.sampled_from([0.001, 0.05]),
    top_h=st.sampled_from([0.3, 0.8]),
)
PROMPTS = st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=PROMPTS,
    history=HISTORY,
    places=PLACES,
    warpers=WARPERS,
    do_sample=st.booleans(),
    copies=st.integers(1, 2),
    eos=st.sampled_from([[], [7], list(range(3, 40))]),
    chunk=st.sampled_from([None, 2, 5]),
    seed=st.integers(0, 99),
)
def test_any_combination(
    pair: tuple[Any, Any],
    prompts: list[list[int]],
    history: dict[str, Any],
    places: dict[str, Any],
    warpers: dict[str, Any],
    do_sample: bool,
    copies: int,
    eos: list[int],
    chunk: int | None,
    seed: int,
) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    kwargs = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "do_sample": do_sample}
    kwargs |= history | places
    if not eos or "forced_eos_token_id" in kwargs:  # transformers then computes inf * -inf, or refuses
        kwargs.pop("exponential_decay_length_penalty", None)
    if do_sample:
        kwargs |= warpers | {"num_return_sequences": copies}
    ours, theirs = pair
    torch.manual_seed(seed)
    try:
        expected = theirs.generate(ids, eos_token_id=eos or None, **kwargs)
    except (ValueError, RuntimeError):  # it found the settings contradictory, or left itself no token to choose
        reject()
    torch.manual_seed(seed)
    got = ours.generate(ids, eos_token_id=eos or None, prefill_chunk_size=chunk, **kwargs)
    assert got.tolist() == expected.tolist()
    if do_sample:
        assert torch.rand(1).item() == _next_random(seed, theirs, ids, eos, kwargs), "the generator moved on alike"


def _next_random(seed: int, model: Any, ids: torch.Tensor, eos: list[int], kwargs: dict[str, Any]) -> float:
    torch.manual_seed(seed)
    model.generate(ids, eos_token_id=eos or None, **kwargs)
    return float(torch.rand(1).item())


def test_prefix_function_and_foreign_processors_see_every_row(pair: tuple[Any, Any]) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    seen: list[tuple[int, ...]] = []

    class Watch:
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(input_ids.shape))
            return scores - torch.arange(VOCAB) * 0.01

    def allowed(row: int, tokens: torch.Tensor) -> list[int]:
        return list(range(2 + row, 60 + row))

    kwargs: dict[str, Any] = {
        "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": [20, 21, 22, 23, 24, 25, 26, 27],
        "prefix_allowed_tokens_fn": allowed,
    }  # fmt: skip
    ours = pair[0].generate(ids, logits_processor=[Watch()], **kwargs)
    mine, seen = seen.copy(), []
    theirs = pair[1].generate(ids, logits_processor=[Watch()], **kwargs)
    assert ours.tolist() == theirs.tolist()
    assert mine == seen


def test_criteria_of_the_callers_own(pair: tuple[Any, Any]) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])

    class Third:
        """Ends a row once its new tokens hold one divisible by three, as a plain callable."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return (input_ids[:, 3:] % 3 == 0).any(1)

    kwargs: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": 96}
    import transformers

    ours = pair[0].generate(ids, stopping_criteria=[Third()], **kwargs)
    theirs = pair[1].generate(ids, stopping_criteria=transformers.StoppingCriteriaList([Third()]), **kwargs)
    assert ours.tolist() == theirs.tolist()
    width = unspool.StoppingCriteriaList([unspool.MaxLengthCriteria(6)])
    assert pair[0].generate(ids, stopping_criteria=width, **kwargs).shape == (2, 6)


@pytest.mark.parametrize(
    "limit", [{"max_length": 9}, {"max_new_tokens": 1}, {}, {"max_length": 9, "max_new_tokens": 4}]
)
def test_lengths(pair: tuple[Any, Any], limit: dict[str, int]) -> None:
    ids, mask = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours, theirs = (m.generate(ids, attention_mask=mask, pad_token_id=0, **limit) for m in pair)
    assert ours.tolist() == theirs.tolist()
