"""Whose setting wins, and which lengths a call ends up with."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from unspool.config import GenerationConfig, Resolved, effective_lengths, resolve, warn_once


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    warn_once.cache_clear()


def test_the_order_call_object_model_default() -> None:
    call = {"top_k": 1, "attention_mask": "m"}
    passed = GenerationConfig(top_k=2, top_p=0.2, do_sample=True)
    model = GenerationConfig.from_dict({"top_k": 3, "top_p": 0.3, "min_p": 0.3, "lang": "de"})
    before = copy.deepcopy((call, passed, model))
    result = resolve(call, passed, model)
    names = ("top_k", "top_p", "min_p", "temperature", "lang", "seed")
    assert [getattr(result.config, name) for name in names] == [1, 0.2, 0.3, 1.0, "de", None]
    assert [result.sources[name] for name in names] == ["call", "object", "model", "default", "model", "default"]
    assert result.unused == {"attention_mask": "m"}
    assert (call, passed, model) == before
    assert [result.caller_set(name) for name in names] == [True, True, False, False, False, False]


def test_the_result_shares_nothing_with_its_inputs() -> None:
    model = GenerationConfig(eos_token_id=[1, 2])
    result = resolve({}, None, model)
    assert isinstance(result.config.eos_token_id, list)
    result.config.eos_token_id.append(3)
    assert model.eos_token_id == [1, 2]


def test_an_explicit_none_in_the_call_switches_off() -> None:
    result = resolve({"top_k": None, "num_beams": None, "max_length": None}, None, GenerationConfig(num_beams=4))
    assert (result.config.top_k, result.config.num_beams, result.config.max_length) == (None, 1, 20)
    assert (result.sources["top_k"], result.sources["num_beams"]) == ("call", "default")


def test_custom_entries_of_the_model_can_be_set_by_the_call() -> None:
    result = resolve({"lang": "fr"}, None, GenerationConfig(lang="de"))
    assert (result.config.lang, result.unused) == ("fr", {})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_beam_groups": 2, "num_beams": 3}, "multiple of num_beam_groups"),
        ({"num_beam_groups": 2, "num_beams": 4}, "diversity_penalty above 0"),
        ({"num_beam_groups": 2, "num_beams": 4, "do_sample": True}, "do_sample"),
        ({"diversity_penalty": 1.0, "num_beams": 4}, "diversity_penalty=1.0 needs num_beam_groups"),
        ({"force_words_ids": [[1]]}, "num_beams to be at least 2"),
        ({"force_words_ids": [[1]], "num_beams": 2, "do_sample": True}, "do_sample to be False"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_contradictions(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(values)


def test_a_models_bad_sampling_value_counts_only_when_sampling() -> None:
    model = GenerationConfig.from_dict({"temperature": 0.0, "top_p": 7.0})
    assert resolve({}, None, model).config.do_sample is False
    with pytest.raises(ValueError, match="top_p"):
        resolve({"do_sample": True}, None, model)


def test_a_models_penalty_without_groups_is_left_alone() -> None:
    model = GenerationConfig.from_dict({"diversity_penalty": 1.0})
    assert resolve({"num_beams": 4}, None, model).config.num_beams == 4
    grouped = resolve({"num_beams": 4, "num_beam_groups": 2}, None, model).config
    assert grouped.diversity_penalty == 1.0


def test_remarks_only_about_what_the_caller_set(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "unspool")
    model = GenerationConfig.from_dict({"do_sample": True, "top_p": 0.7})
    resolve({"do_sample": False}, None, model)
    resolve({"do_sample": False}, model)  # an object just as loaded is a file's word, not the caller's
    assert caplog.messages == []
    resolve({"do_sample": False}, GenerationConfig(top_p=0.7), None)
    assert caplog.messages == ["top_p has no effect without do_sample=True"]


def test_wrong_kind_of_object() -> None:
    with pytest.raises(TypeError, match="generation_config must be a GenerationConfig or a dict, not int"):
        resolve({}, 3)  # type: ignore[arg-type]


def test_explain_of_a_resolved_configuration() -> None:
    text = resolve({"top_k": 1}, GenerationConfig(do_sample=True), GenerationConfig(top_p=0.3)).config.explanation()
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert rows["top_k"].endswith("the call")
    assert rows["do_sample"].endswith("the GenerationConfig object")
    assert rows["top_p"].endswith("the model's generation_config")
    assert rows["max_length"].endswith("the default")


# Lengths


def lengths(prompt: int = 5, **values: Any) -> tuple[int, int]:
    found = effective_lengths(resolve(values), prompt)
    return found.max_length, found.min_length


def test_length_rules() -> None:
    assert lengths() == (25, 0)
    assert lengths(max_new_tokens=3) == (8, 0)
    assert lengths(max_length=9) == (9, 0)
    assert lengths(max_new_tokens=3, max_length=100) == (8, 0)
    assert lengths(max_length=9, min_length=7) == (9, 7)
    assert lengths(max_length=9, min_new_tokens=1, min_length=8) == (9, 6)
    assert effective_lengths(resolve({"max_new_tokens": 3}), 5).max_new_tokens == 3


def test_default_stays_within_the_positions() -> None:
    assert effective_lengths(resolve({}), 5, max_positions=12).max_length == 12
    assert effective_lengths(resolve({}), 5, max_positions=12, beyond="allow").max_length == 12
    assert effective_lengths(resolve({}), 14, max_positions=12, beyond="allow").max_length == 34


def test_embeddings_count_for_explicit_lengths() -> None:
    assert effective_lengths(resolve({"max_length": 9, "min_length": 7}), 0, embeds_length=5).max_length == 4
    assert effective_lengths(resolve({"max_length": 9, "min_length": 7}), 0, embeds_length=5).min_length == 2
    assert effective_lengths(resolve({}), 0, embeds_length=5).max_length == 20


@pytest.mark.parametrize(
    ("values", "prompt", "options", "words"),
    [
        ({"max_length": 5}, 5, {}, "no room"),
        ({"max_new_tokens": 2**40}, 5, {}, "max_new_tokens=1099511627776"),
        ({}, 13, {"max_positions": 12}, "shorten the prompt"),
        ({"max_new_tokens": 9}, 5, {"max_positions": 12, "beyond": "refuse"}, "at most 8 new tokens"),
    ],
)
def test_impossible_lengths(values: dict[str, Any], prompt: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        effective_lengths(resolve(values), prompt, **options)


def test_the_last_token_needs_no_position() -> None:
    found = effective_lengths(resolve({"max_new_tokens": 8}), 5, max_positions=12, beyond="refuse")
    assert found.max_length == 13


def test_prompt_length_must_be_an_int() -> None:
    with pytest.raises(TypeError, match="prompt_length must be an int"):
        effective_lengths(resolve({}), 5.0)  # type: ignore[arg-type]


def said(caplog: pytest.LogCaptureFixture, resolved: Resolved, **options: Any) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.WARNING, "unspool")
    effective_lengths(resolved, 5, **options)
    return [message.split(";")[0] for message in caplog.messages]


def test_length_remarks(caplog: pytest.LogCaptureFixture) -> None:
    both = {"max_length": 9, "max_new_tokens": 3}
    assert said(caplog, resolve({}, None, GenerationConfig(**both))) == []
    assert said(caplog, resolve(both)) == ["max_new_tokens=3 wins over max_length=9"]
    assert said(caplog, resolve(both)) == []
    assert said(caplog, resolve({"min_length": 2, "min_new_tokens": 1})) == ["min_new_tokens=1 wins over min_length=2"]
    assert said(caplog, resolve({"min_length": 99})) == [
        "the least length (99) is above the greatest (25), at which generation stops"
    ]
    assert said(caplog, resolve({"max_length": 99}), max_positions=50)[0].startswith("max_length=99 lets rows")
    assert said(caplog, resolve({"max_length": 98}), max_positions=50, beyond="allow") == []
