"""Processors, criteria and lengths in random combinations: the same tokens as transformers from the same call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from drawn import BEAMS, HISTORY, PLACES, TOKENS, WARPERS, tied
from families import VOCAB, make_checkpoint
from hypothesis import HealthCheck, given, reject, settings, strategies as st

import unspool


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("llama")
    theirs = make_checkpoint("llama", folder, seed=5)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), theirs


KEYS = [654, 400, 836, 123, 340]
# The class's name and its arguments, for either library.
MARKS: list[tuple[str, dict[str, Any]] | None] = [
    None,
    None,
    ("WatermarkingConfig", {"bias": 3.0}),
    ("WatermarkingConfig", {"seeding_scheme": "selfhash", "greenlist_ratio": 0.5, "context_width": 3}),
    ("SynthIDTextWatermarkingConfig", {"ngram_len": 3, "keys": KEYS, "context_history_size": 5}),
    ("SynthIDTextWatermarkingConfig", {"ngram_len": 5, "keys": KEYS[:2], "skip_first_ngram_calls": True}),
]
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
    mark=st.sampled_from(MARKS),
    beams=st.sampled_from([None, None, 3]),
    competing=BEAMS,
    own=st.booleans(),
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
    mark: tuple[str, dict[str, Any]] | None,
    beams: int | None,
    competing: dict[str, Any],
    own: bool,
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
        kwargs |= warpers
    if beams is not None:
        kwargs |= competing | {"num_beams": beams}
    if do_sample or beams is not None:
        kwargs["num_return_sequences"] = copies
    if own:
        kwargs["logits_processor"] = [_lean]
    marks: list[dict[str, Any]] = [{}, {}]
    # With beams, a context of SynthID is on purpose another here (test_watermark.py).
    if mark is not None and not (beams and "keys" in mark[1]):
        marks = [{"watermarking_config": getattr(library, mark[0])(**mark[1])} for library in (unspool, transformers)]
    ours, theirs = pair
    torch.manual_seed(seed)
    try:
        expected = theirs.generate(ids, eos_token_id=eos or None, **kwargs, **marks[1])
    except (ValueError, RuntimeError):  # it found the settings contradictory, or left itself no token to choose
        reject()
    after = torch.rand(1).item()
    torch.manual_seed(seed)
    got = ours.generate(ids, eos_token_id=eos or None, prefill_chunk_size=chunk, **kwargs, **marks[0])
    moved_on = torch.rand(1).item()
    if beams is None and not torch.equal(got, expected):
        torch.manual_seed(seed)
        detailed = {"return_dict_in_generate": True, "output_logits": True}
        logits = theirs.generate(ids, eos_token_id=eos or None, **kwargs, **marks[1], **detailed).logits
        if tied(got, expected, logits, width):
            reject()
    assert got.tolist() == expected.tolist()
    assert moved_on == after, "the generator moved on alike"


def _lean(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A caller's own processor: even tokens after odd ones."""
    return scores + 0.5 * ((input_ids[:, -1:] + torch.arange(scores.shape[1])) % 2)


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
    del kwargs["max_new_tokens"]
    assert pair[0].generate(ids, stopping_criteria=width, **kwargs).shape == (2, 6)


@pytest.mark.parametrize(
    "limit", [{"max_length": 9}, {"max_new_tokens": 1}, {}, {"max_length": 9, "max_new_tokens": 4}]
)
def test_lengths(pair: tuple[Any, Any], limit: dict[str, int]) -> None:
    ids, mask = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours, theirs = (m.generate(ids, attention_mask=mask, pad_token_id=0, **limit) for m in pair)
    assert ours.tolist() == theirs.tolist()


@pytest.fixture(scope="module")
def storytellers() -> tuple[Any, Any, Any, Any]:
    """The built-in model in fp32, transformers' load of it and each one's tokenizer: logits with a meaning."""
    folder = Path(unspool.__file__).parent / "assets" / "storyteller"
    ours, tokenizer = unspool.load("storyteller", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ours, theirs, tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.sampled_from(["Once upon a time", "The old owl said", "One morning the little fox", "In"]),
        min_size=1, max_size=3,
    ),
    history=HISTORY,
    places=PLACES,
    warpers=WARPERS,
    stops=st.sampled_from([None, [" the"], ["."], ["ing", " a "]]),
    mark=st.sampled_from(MARKS),
    beams=st.sampled_from([None, None, 2]),
    do_sample=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_combination_on_a_trained_model(
    storytellers: tuple[Any, Any, Any, Any],
    texts: list[str],
    history: dict[str, Any],
    places: dict[str, Any],
    warpers: dict[str, Any],
    stops: list[str] | None,
    mark: tuple[str, dict[str, Any]] | None,
    beams: int | None,
    do_sample: bool,
    seed: int,
) -> None:
    ours, theirs, tokenizer, reader = storytellers
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    kwargs = {**inputs, "max_new_tokens": 16, "do_sample": do_sample, "num_beams": beams or 1, **history, **places}
    if "forced_eos_token_id" in kwargs:
        kwargs.pop("exponential_decay_length_penalty", None)
    if do_sample:
        kwargs |= warpers
    if stops is not None:
        kwargs |= {"stop_strings": stops}
    marks: list[dict[str, Any]] = [{}, {}]
    if mark is not None and not (beams and "keys" in mark[1]):
        marks = [{"watermarking_config": getattr(library, mark[0])(**mark[1])} for library in (unspool, transformers)]
    found = []
    for model, reads, own in ((theirs, reader, marks[1]), (ours, tokenizer, marks[0])):
        torch.manual_seed(seed)
        try:
            tokens = model.generate(**kwargs, **own, tokenizer=reads)
        except (ValueError, RuntimeError):
            if model is ours:
                raise
            reject()
        found.append((tokens.tolist(), torch.rand(1).item()))
    assert found[1] == found[0]
