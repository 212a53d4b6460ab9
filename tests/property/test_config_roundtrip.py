"""Any configuration survives its file, and merging never touches what it merges."""

from __future__ import annotations

import copy
import json
import tempfile
from typing import Any

from hypothesis import assume, given, settings, strategies as st

from unspool.config import GenerationConfig, default_generation_params, resolve
from unspool.config.checks import RANGES
from unspool.config.fields import FIELDS
from unspool.config.ranges import Check

IDS = st.integers(0, 99)
OTHERS: dict[str, st.SearchStrategy[Any]] = {
    "eos_token_id": IDS | st.lists(IDS, min_size=1, max_size=3),
    "do_sample": st.booleans(),
    "use_cache": st.booleans(),
    "output_scores": st.booleans(),
    "return_dict_in_generate": st.booleans(),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "stop_strings": st.text(min_size=1, max_size=4) | st.lists(st.text(min_size=1, max_size=4), max_size=2),
    "sequence_bias": st.dictionaries(st.lists(IDS, min_size=1, max_size=3).map(tuple), st.floats(-5, 5), min_size=1),
    "bad_words_ids": st.lists(st.lists(IDS, min_size=1, max_size=2), min_size=1, max_size=2),
    "watermarking_config": st.sampled_from([{"bias": 1.5}, {"ngram_len": 4, "keys": [1, 2]}]),
    "exponential_decay_length_penalty": st.tuples(IDS, st.floats(1, 2)),
    "my_own": st.none() | st.text(max_size=4) | st.lists(IDS, max_size=2),
}


def inside(check: Check) -> st.SearchStrategy[Any]:
    low, high = max(check.low, -9), min(check.high, 99)
    if check.kind is int:
        return st.integers(int(low), int(high))
    return st.floats(low, high, exclude_min=check.open_low, exclude_max=check.open_high)


SETTINGS = st.fixed_dictionaries({}, optional={**{name: inside(RANGES[name]) for name in RANGES}, **OTHERS})


def make(values: dict[str, Any]) -> GenerationConfig | None:
    try:
        return GenerationConfig(**values)
    except ValueError:  # a contradiction between two settings
        return None


@settings(max_examples=60, deadline=None)
@given(SETTINGS)
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = make(values)
    assume(config is not None)
    assert config is not None
    for use_diff in (True, False):
        again = GenerationConfig.from_dict(json.loads(config.to_json_string(use_diff=use_diff)))
        assert again == config
        assert hash(again) == hash(config)
        assert again.get_generation_mode() is config.get_generation_mode()
    assert GenerationConfig.from_dict(config.to_dict()) == config
    with tempfile.TemporaryDirectory() as folder:
        config.to_json_file(f"{folder}/generation_config.json")
        assert GenerationConfig.from_pretrained(folder) == config


@settings(max_examples=60, deadline=None)
@given(SETTINGS, SETTINGS, SETTINGS)
def test_merging_picks_the_strongest_and_changes_nothing(
    call: dict[str, Any], passed: dict[str, Any], model: dict[str, Any]
) -> None:
    one, two = make(passed), make(model)
    before = copy.deepcopy((call, one, two))
    try:
        result = resolve(call, one, two)
    except ValueError:  # the settings contradict each other
        result = None
    assert (call, one, two) == before
    assume(result is not None)
    assert result is not None
    defaults = default_generation_params()
    for name in FIELDS:
        value = getattr(result.config, name)
        if name in call:
            assert result.sources[name] == "call"
            assert value == call[name] or value.to_dict().items() >= call[name].items()
        else:
            candidates = (("object", getattr(one, name, None)), ("model", getattr(two, name, None)))
            expected = next(((s, v) for s, v in candidates if v is not None), ("default", defaults.get(name)))
            assert (result.sources[name], value) == expected
