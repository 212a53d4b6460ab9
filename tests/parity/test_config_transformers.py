"""GenerationConfig against transformers' own: fields, defaults, modes, files in both directions, merging, lengths."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import configuration_utils as theirs

from unspool.config import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMode,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    default_generation_params,
    effective_lengths,
    resolve,
)
from unspool.config.fields import FIELDS

OWN = {"seed", "json_schema", "regex", "grammar", "output_top_logprobs"}
METADATA = {"transformers_version", "_from_model_config"}

EXAMPLES: dict[str, dict[str, Any]] = {
    "empty": {},
    "llama": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7], "bos_token_id": 1},
    "beams": {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5, "num_return_sequences": 2},
    "custom": {"lang_to_id": {"<|en|>": 5}, "is_multilingual": True, "dtype": "float16"},
    "ids": {"bad_words_ids": [[1], [2, 3]], "suppress_tokens": [4], "decoder_start_token_id": [1, 2]},
    "watermark": {"watermarking_config": {"bias": 3.0, "seeding_scheme": "selfhash", "context_width": 2}},
    "decay": {"exponential_decay_length_penalty": [5, 1.5], "max_new_tokens": 7, "stop_strings": ["a", "b"]},
    "bias list": {"sequence_bias": [[[1, 2], -1.5]]},
    "old strategies": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "force_words_ids": [[1]]},
    "contrastive": {"penalty_alpha": 0.6, "dola_layers": "low", "low_memory": True},
}


def values(config: Any) -> dict[str, Any]:
    """A configuration's content without its origin, nested settings as dicts."""
    plain = json.loads(config.to_json_string(use_diff=False, ignore_metadata=True))
    assert isinstance(plain, dict)
    return {key: value for key, value in plain.items() if key not in OWN}


def test_fields_and_defaults() -> None:
    assert set(FIELDS) == (set(theirs.GenerationConfig().to_dict()) - METADATA) | OWN
    assert all(value is None for value in GenerationConfig().to_dict().values())
    assert default_generation_params() == theirs.GenerationConfig._get_default_generation_params()
    assert GenerationConfig._get_default_generation_params() == default_generation_params()
    assert {mode.name: mode.value for mode in GenerationMode} == {m.name: m.value for m in theirs.GenerationMode}
    assert GenerationConfig.extra_output_flags == theirs.GenerationConfig.extra_output_flags


@pytest.mark.parametrize("name", EXAMPLES)
def test_same_dicts(name: str) -> None:
    mine, other = GenerationConfig(**EXAMPLES[name]), theirs.GenerationConfig(**EXAMPLES[name])
    assert values(mine) == values(other)
    diff = json.loads(other.to_json_string(ignore_metadata=True))
    assert json.loads(mine.to_json_string(ignore_metadata=True)) == diff
    assert mine.to_diff_dict().keys() == other.to_diff_dict().keys() - METADATA
    assert hash(mine) == hash(GenerationConfig(**EXAMPLES[name]))
    assert repr(mine) == repr(other)


@pytest.mark.parametrize("name", EXAMPLES)
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    theirs.GenerationConfig(**EXAMPLES[name]).save_pretrained(tmp_path / "theirs")
    mine = GenerationConfig.from_pretrained(tmp_path / "theirs")
    assert values(mine) == values(theirs.GenerationConfig.from_pretrained(tmp_path / "theirs"))
    assert mine == GenerationConfig(**EXAMPLES[name])
    mine.save_pretrained(tmp_path / "mine")
    assert values(theirs.GenerationConfig.from_pretrained(tmp_path / "mine")) == values(mine)
    GenerationConfig(**EXAMPLES[name]).save_pretrained(tmp_path / "new")
    assert GenerationConfig.from_pretrained(tmp_path / "new") == mine


def test_files_with_dtypes_and_nested_settings(tmp_path: Path) -> None:
    other = theirs.GenerationConfig(
        dtype=torch.bfloat16, compile_config=theirs.CompileConfig(dynamic=True), sequence_bias={(1, 2): 0.5}
    )
    other.to_json_file(tmp_path / "generation_config.json")
    mine = GenerationConfig.from_pretrained(tmp_path)
    assert mine.dtype == "bfloat16"  # type: ignore[attr-defined]
    assert mine.compile_config == CompileConfig(dynamic=True)
    assert mine.sequence_bias == {(1, 2): 0.5}
    mine.save_pretrained(tmp_path / "mine")  # leaves out compile_config, as theirs does
    assert theirs.GenerationConfig.from_pretrained(tmp_path / "mine").sequence_bias == [[[1, 2], 0.5]]


def test_a_synthid_file_of_theirs_loads(tmp_path: Path) -> None:
    watermark = theirs.SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, 2])
    theirs.GenerationConfig(watermarking_config=watermark).save_pretrained(tmp_path)
    mine = GenerationConfig.from_pretrained(tmp_path)
    assert mine.watermarking_config == SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, 2])


def test_their_objects_are_accepted() -> None:
    other = theirs.GenerationConfig(
        watermarking_config=theirs.WatermarkingConfig(bias=3.0), compile_config=theirs.CompileConfig(mode="default")
    )
    config = resolve({}, other).config  # type: ignore[arg-type]
    assert config.watermarking_config == WatermarkingConfig(bias=3.0)
    assert config.compile_config == CompileConfig(mode="default")


@pytest.mark.parametrize("mine", [WatermarkingConfig, CompileConfig, ContinuousBatchingConfig])
def test_nested_settings_have_their_names_and_defaults(mine: type) -> None:
    ours = mine().to_dict()
    if mine is ContinuousBatchingConfig:  # ours besides
        del ours["max_queued_tokens"], ours["watchdog_timeout"], ours["deterministic"]
    assert ours == dict(vars(getattr(theirs, mine.__name__)()))


def test_synthid_names_and_defaults() -> None:
    other = theirs.SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1])
    assert SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1]).to_dict() == other.to_dict()


GRID = {
    "num_beams": [None, 1, 4],
    "do_sample": [None, False, True],
    "num_beam_groups": [None, 2],
    "penalty_alpha": [None, 0.0, 0.6],
    "top_k": [None, 1, 4],
    "dola_layers": [None, "low"],
    "force_words_ids": [None, [[1]]],
    "prompt_lookup_num_tokens": [None, 3],
}


def test_modes_over_a_grid(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "transformers")
    for combination in itertools.product(*GRID.values()):
        chosen = {key: value for key, value in zip(GRID, combination, strict=True) if value is not None}
        mine, other = GenerationConfig(**chosen), theirs.GenerationConfig(**chosen)
        for assistant in (None, object()):
            assert mine.get_generation_mode(assistant) == other.get_generation_mode(assistant), chosen


SUSPECTS: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"top_k": 50},
    {"top_k": 5},
    {"do_sample": True, "top_k": 5},
    {"do_sample": False, "min_p": 0.1},
    {"typical_p": 0.9},
    {"epsilon_cutoff": 0.1, "eta_cutoff": 0.0},
    {"early_stopping": True},
    {"num_beams": 2, "early_stopping": True},
    {"length_penalty": 2.0},
    {"length_penalty": 1.0},
    {"use_cache": False, "cache_implementation": "static"},
    {"output_scores": True},
    {"output_logits": True, "return_dict_in_generate": True},
    {"pad_token_id": -1},
    {"max_cache_len": 8},
]


@pytest.mark.parametrize("chosen", SUSPECTS, ids=str)
def test_strict_refuses_what_theirs_refuses(chosen: dict[str, Any]) -> None:
    refused = []
    for config in (GenerationConfig(**chosen), theirs.GenerationConfig(**chosen)):
        try:
            config.validate(strict=True)
        except ValueError:
            refused.append(True)
        else:
            refused.append(False)
    assert refused[0] == refused[1]


@pytest.mark.parametrize(
    "chosen",
    [
        {"early_stopping": "x"},
        {"max_new_tokens": 0},
        {"cache_implementation": "x"},
        {"num_return_sequences": 2},
        {"num_return_sequences": 3, "num_beams": 2},
        {"assistant_ensemble_weight": 0.0},
        {"forced_bos_token_id": 1, "suppress_tokens": [1]},
        {"watermarking_config": {"context_width": 0}},
        {"logits_processor": []},
    ],
    ids=str,
)
def test_both_raise(chosen: dict[str, Any]) -> None:
    for kind in (GenerationConfig, theirs.GenerationConfig):
        with pytest.raises(ValueError):
            kind(**chosen)


@pytest.mark.parametrize("defaults_only", [False, True])
@pytest.mark.parametrize("allow_custom_entries", [False, True])
def test_update(defaults_only: bool, allow_custom_entries: bool) -> None:
    new = {"top_k": 9, "top_p": 0.5, "own": 2, "other": 3, "watermarking_config": {"bias": 1.0}}
    results = []
    for kind in (GenerationConfig, theirs.GenerationConfig):
        config = kind(top_k=3, own=1, do_sample=True)
        unused = config.update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **new)
        results.append((unused, values(config)))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "model_config",
    [
        {"eos_token_id": 3, "top_k": 4, "hidden_size": 9, "output_scores": True},
        {"top_k": None, "decoder": {"top_k": 7, "num_beams": 2}},
        {"bos_token_id": 2, "force_bos_token_to_be_generated": True},
    ],
    ids=str,
)
def test_from_model_config(model_config: dict[str, Any]) -> None:
    mine = GenerationConfig.from_model_config(model_config)
    assert values(mine) == values(theirs.GenerationConfig.from_model_config(dict(model_config)))


def test_from_their_model_config() -> None:
    config = LlamaConfig(eos_token_id=[5, 6], bos_token_id=4)
    mine = GenerationConfig.from_model_config(config)
    assert values(mine) == values(theirs.GenerationConfig.from_model_config(config))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=32, **size)).eval()


CALLS: list[dict[str, Any]] = [
    {},
    {"top_k": 3, "do_sample": True, "attention_mask": 1},
    {"top_k": None, "temperature": None, "top_p": None},
    {"max_new_tokens": 4, "max_length": 9},
    {"num_beams": 3, "foo": 1},
    {"eos_token_id": [1, 2], "min_new_tokens": 2},
    {"max_length": 30},
]
OBJECTS: list[dict[str, Any] | None] = [None, {}, {"top_p": 0.5, "do_sample": True}, {"max_length": 12, "mine": 5}]
MODELS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.6, "top_k": 7, "lang": "de"},
    {"max_length": 15, "min_length": 3},
    {"max_new_tokens": 6, "cache_implementation": "hybrid", "do_sample": True},
]


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("passed", OBJECTS, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_merging_and_lengths(
    llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: dict[str, Any],
    passed: dict[str, Any] | None,
    model: dict[str, Any],
) -> None:
    caplog.set_level(logging.ERROR, "transformers")
    monkeypatch.setattr(llama, "generation_config", theirs.GenerationConfig(**model))
    other = None if passed is None else theirs.GenerationConfig(**passed)
    expected, unused = llama._prepare_generation_config(other, **call)
    mine = resolve(call, None if passed is None else GenerationConfig(**passed), GenerationConfig.from_dict(model))
    assert values(mine.config) == values(expected)
    assert mine.unused == unused

    prompt = 5
    default = {
        name: call.get(name) is None and (passed or {}).get(name) is None and model.get(name) is None
        for name in ("max_length", "min_length")
    }
    expected = llama._prepare_generated_length(
        expected, default["max_length"], default["min_length"], "input_ids", prompt, torch.zeros(1, prompt)
    )
    found = effective_lengths(mine, prompt, max_positions=32)
    assert (found.max_length, found.min_length) == (expected.max_length, expected.min_length)
