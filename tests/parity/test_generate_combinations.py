"""Modes, outputs, caches and guidance in random combinations with every setting: transformers' tokens and records."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drawn import BEAMS, HISTORY, PLACES, TOKENS, WARPERS, optional, tied
from families import VOCAB, make_checkpoint
from hypothesis import HealthCheck, given, reject, settings, strategies as st

import unspool

OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Any]:
    """Ours, our draft model, theirs, their draft model."""
    whole, small = (tmp_path_factory.mktemp(name) for name in ("llama", "draft"))
    theirs = make_checkpoint("llama", whole, seed=5)
    theirs.set_attn_implementation("eager")
    draft = copy.deepcopy(theirs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.004)
    draft.save_pretrained(small)
    load = unspool.AutoModelForCausalLM.from_pretrained
    return load(whole, dtype="float32"), load(small, dtype="float32"), theirs, draft


GUIDANCE = optional(
    guidance_scale=st.sampled_from([0.6, 1.0, 1.5]),
    negative_prompt_ids=st.lists(TOKENS, min_size=1, max_size=4),
)
CACHES = st.sampled_from([{}, {}, {"use_cache": False}, {"cache_implementation": "dynamic"},
                          {"cache_implementation": "static"}])  # fmt: skip


def allowed(row: int, tokens: torch.Tensor) -> list[int]:
    """A prefix function: half of the vocabulary, another half for each row and last token."""
    return [token for token in range(1, VOCAB) if (token + row + int(tokens[-1])) % 2]


def assert_records_alike(got: Any, expected: Any) -> None:
    """What was asked for has the same shapes, and the same contents."""
    for name in ("scores", "logits", "attentions", "hidden_states"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        for step, (ours, other) in enumerate(zip(mine or (), theirs or (), strict=True)):
            parts = zip(ours, other, strict=True) if isinstance(ours, tuple) else [(ours, other)]
            for a, b in parts:
                assert a.shape == b.shape, (name, step)
                if isinstance(ours, tuple) and step == 0:  # pads are computed there, and not here
                    a, b = a[..., -1:, :], b[..., -1:, :]
                torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4, equal_nan=True)


def both(
    four: tuple[Any, Any, Any, Any], ids: torch.Tensor, seed: int, kwargs: dict[str, Any], drafts: bool
) -> list[Any]:
    """Ours and theirs, each with where the generator is afterwards."""
    results = []
    for model, draft in (four[2:], four[:2]):
        if (
            model is four[2]
        ):  # transformers asks the draft model's own settings, and leaves its heuristic's result there
            for name in ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"):
                setattr(draft.generation_config, name, kwargs.get(name))
        torch.manual_seed(seed)
        more = {"assistant_model": draft} if drafts else {}
        try:
            out = model.generate(ids, **kwargs, **more, return_dict_in_generate=True)
        except (ValueError, RuntimeError):
            if model is four[0]:
                raise
            reject()  # transformers found the settings contradictory, or left itself no token to choose
        results.append((out, torch.rand(1).item()))
    return results[::-1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(TOKENS, min_size=1, max_size=7), min_size=1, max_size=3),
    history=HISTORY,
    places=PLACES,
    warpers=WARPERS,
    do_sample=st.booleans(),
    copies=st.integers(1, 2),
    eos=st.sampled_from([[], [7], list(range(3, 40))]),
    beams=st.sampled_from([None, None, 3]),
    competing=BEAMS,
    guidance=GUIDANCE,
    cache=CACHES,
    outputs=st.sets(st.sampled_from(OUTPUTS)),
    prefix=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_caches_and_guidance(
    four: tuple[Any, Any, Any, Any],
    prompts: list[list[int]],
    history: dict[str, Any],
    places: dict[str, Any],
    warpers: dict[str, Any],
    do_sample: bool,
    copies: int,
    eos: list[int],
    beams: int | None,
    competing: dict[str, Any],
    guidance: dict[str, Any],
    cache: dict[str, Any],
    outputs: set[str],
    prefix: bool,
    seed: int,
) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "pad_token_id": 0, "do_sample": do_sample}
    kwargs |= {"eos_token_id": eos or None, **history, **places, **cache, **dict.fromkeys(outputs, True)}
    if not eos or "forced_eos_token_id" in kwargs:  # transformers then computes inf * -inf, or refuses
        kwargs.pop("exponential_decay_length_penalty", None)
    if do_sample:
        kwargs |= warpers
    if beams is not None:
        kwargs |= competing | {"num_beams": beams}
    if do_sample or beams is not None:
        kwargs["num_return_sequences"] = copies
    if prefix:
        kwargs["prefix_allowed_tokens_fn"] = allowed
    if cache.get("cache_implementation") == "static":  # transformers' attentions are as long as the cache
        kwargs.pop("output_attentions", None)
    if "use_cache" in cache:  # transformers records all columns in each step
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
    if beams is None:
        kwargs |= guidance
        if "negative_prompt_ids" in guidance:  # as many rows as there are to decode, or transformers fails
            rows = len(prompts) * (kwargs.get("num_return_sequences") or 1)
            kwargs["negative_prompt_ids"] = torch.tensor([guidance["negative_prompt_ids"]] * rows)
    (got, moved_on), (expected, after) = both(four, ids, seed, kwargs, False)
    if beams is None and not torch.equal(got.sequences, expected.sequences):
        torch.manual_seed(seed)
        again = four[2].generate(ids, **kwargs | {"output_logits": True}, return_dict_in_generate=True)
        if tied(got.sequences, expected.sequences, again.logits, width):
            reject()
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert moved_on == after, "the generator moved on alike"
    assert_records_alike(got, expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.lists(TOKENS, min_size=2, max_size=9),
    history=HISTORY,
    places=PLACES,
    warpers=WARPERS,
    do_sample=st.booleans(),
    eos=st.sampled_from([[], [7], list(range(3, 20))]),
    way=st.sampled_from([
        {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
        {"num_assistant_tokens": 2, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0},
        {"assistant_ensemble_weight": 0.5},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
    ]),
    outputs=st.sets(st.sampled_from(OUTPUTS[:2])),
    prefix=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_drafts(
    four: tuple[Any, Any, Any, Any],
    prompt: list[int],
    history: dict[str, Any],
    places: dict[str, Any],
    warpers: dict[str, Any],
    do_sample: bool,
    eos: list[int],
    way: dict[str, Any],
    outputs: set[str],
    prefix: bool,
    seed: int,
) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": do_sample}
    kwargs |= {"eos_token_id": eos or None, **history, **places, **way, **dict.fromkeys(outputs, True)}
    # transformers' draft model would take generated pads for padding
    kwargs["suppress_tokens"] = [0, *kwargs.get("suppress_tokens", [])]
    if not eos or "forced_eos_token_id" in kwargs:
        kwargs.pop("exponential_decay_length_penalty", None)
    if do_sample:
        kwargs |= warpers
    if prefix:
        kwargs["prefix_allowed_tokens_fn"] = allowed
    ids = torch.tensor([prompt])
    (got, moved_on), (expected, after) = both(four, ids, seed, kwargs, "prompt_lookup_num_tokens" not in way)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert moved_on == after, "the generator moved on alike"
    assert_records_alike(got, expected)
