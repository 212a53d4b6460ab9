"""GenerationConfig by itself: values, files, messages."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unspool.config import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMode,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    warn_once,
)
from unspool.config.checks import RANGES
from unspool.config.fields import FIELDS
from unspool.errors import CheckpointError


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    warn_once.cache_clear()


def test_import_is_light() -> None:
    heavy = "torch transformers huggingface_hub tokenizers safetensors jinja2"
    code = f"import unspool.config, sys; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_fields_start_unset_and_extras_are_kept() -> None:
    config = GenerationConfig(top_k=3, my_own="x")
    assert config.top_k == 3
    assert config.my_own == "x"  # type: ignore[attr-defined]
    assert all(getattr(config, name) is None for name in FIELDS if name != "top_k")
    with pytest.raises(ValueError, match="'update' is a method"):
        GenerationConfig(update=1)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"do_sample": True, "temperature": 0.0}, ValueError, "do_sample=False"),
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": float("inf")}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, not 'hot'"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\]"),
        ({"top_k": -1}, ValueError, "0 switches it off"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an int"),
        ({"max_length": "20"}, TypeError, "max_length must be an int"),
        ({"min_length": -3}, ValueError, "min_length"),
        ({"num_beams": 0}, ValueError, "num_beams"),
        ({"num_return_sequences": 3}, ValueError, "needs do_sample=True or num_beams"),
        ({"num_return_sequences": 3, "num_beams": 2}, ValueError, "must not exceed num_beams"),
        ({"repetition_penalty": 0.0}, ValueError, "greater than 0"),
        ({"early_stopping": "soon"}, ValueError, "'never'"),
        ({"cache_implementation": "magic"}, ValueError, "'dynamic'"),
        ({"assistant_ensemble_weight": 1.0}, ValueError, r"in \(0, 1\)"),
        ({"do_sample": "yes"}, TypeError, "do_sample must be True, False or None"),
        ({"eos_token_id": "2"}, TypeError, "eos_token_id must be an int or a list of ints"),
        ({"eos_token_id": [2, None]}, TypeError, "eos_token_id"),
        ({"suppress_tokens": 3}, TypeError, "suppress_tokens must be a list of ints"),
        ({"stop_strings": ["a", ""]}, ValueError, "empty text"),
        ({"stop_strings": [1]}, TypeError, "stop_strings"),
        ({"num_assistant_tokens_schedule": "x"}, ValueError, "heuristic_transient"),
        ({"streamer": object()}, ValueError, "pass it to generate"),
        ({"forced_eos_token_id": 2, "suppress_tokens": [1, 2]}, ValueError, "also in suppress_tokens"),
        ({"seed": -1}, ValueError, "seed"),
        ({"compile_config": 3}, TypeError, "compile_config must be a dict or a CompileConfig"),
        ({"compile_config": {"speed": 1}}, ValueError, "'speed'"),
        ({"watermarking_config": {"keys": [1]}}, ValueError, "not complete"),
        ({"watermarking_config": {"bias": 1.0, "color": 1}}, ValueError, "'color'"),
        ({"sequence_bias": {"(a,)": 1.0}}, ValueError, "sequence_bias"),
    ],
)
def test_wrong_values_raise(values: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        GenerationConfig(**values)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_every_range_has_a_field_and_refuses_text(name: str) -> None:
    assert name in FIELDS
    with pytest.raises(TypeError, match=f"^{name} must be"):
        GenerationConfig(**{name: "1"})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},  # greedy, as many ask for it
        {"top_k": 0, "do_sample": True},
        {"pad_token_id": 0, "eos_token_id": [0, 1]},  # handled where rows end, not here
        {"cache_implementation": "paged"},
        {"temperature": 1, "do_sample": True},
        {"early_stopping": "never", "num_beams": 2},
    ],
)
def test_right_values_pass(values: dict[str, Any]) -> None:
    config = GenerationConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_arrays_become_plain_data() -> None:
    config = GenerationConfig(eos_token_id=torch.tensor([1, 2]), top_k=np.int64(3), top_p=np.float32(0.5))
    assert (config.eos_token_id, type(config.top_k), config.top_p) == ([1, 2], int, 0.5)


def test_remarks_are_logged_once_and_only_about_what_was_set(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "unspool")
    GenerationConfig(top_p=0.5)  # the model's file may still say do_sample
    assert caplog.messages == []
    for _ in range(2):
        GenerationConfig(do_sample=False, top_p=0.5)
    assert caplog.messages == ["top_p has no effect without do_sample=True"]
    GenerationConfig.from_dict({"do_sample": False, "top_k": 5})
    assert len(caplog.messages) == 1
    GenerationConfig(num_beams=1, length_penalty=2.0)
    GenerationConfig(use_cache=False, cache_implementation="static")
    GenerationConfig(return_dict_in_generate=False, output_scores=True)
    GenerationConfig(max_cache_len=10)
    GenerationConfig(pad_token_id=-1)
    assert [message.split()[0] for message in caplog.messages[1:]] == [
        "length_penalty",
        "cache_implementation",
        "output_scores",
        "max_cache_len",
        "pad_token_id",
    ]


def test_strict_raises_for_settings_without_effect() -> None:
    config = GenerationConfig(top_p=0.5)
    with pytest.raises(ValueError, match="top_p has no effect"):
        config.validate(strict=True)
    GenerationConfig(top_k=4, penalty_alpha=0.6).validate(strict=True)


def test_update_changes_all_or_nothing() -> None:
    config = GenerationConfig(top_k=3)
    assert config.update(top_k=4, attention_mask="m") == {"attention_mask": "m"}
    assert config.update(defaults_only=True, top_k=5, top_p=0.9) == {"top_k": 5}
    assert config.update(allow_custom_entries=True, mine=1) == {}
    assert (config.top_k, config.top_p, config.mine) == (4, 0.9, 1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="num_beams"):
        config.update(top_k=7, num_beams=0)
    assert config.top_k == 4
    config.update(watermarking_config={"bias": 1.0})
    assert config.watermarking_config == WatermarkingConfig(bias=1.0)
    assert config.update(_sources=1, update=2) == {"_sources": 1, "update": 2}


def test_from_dict_hands_back_what_it_does_not_know() -> None:
    config, unused = GenerationConfig.from_dict(
        {"top_k": 1, "own": 2}, top_k=3, own=4, foo=5, return_unused_kwargs=True
    )
    assert (config.top_k, config.own, unused) == (3, 4, {"foo": 5})
    assert not hasattr(config, "foo")
    assert GenerationConfig.from_dict({}, foo=5).foo == 5
    with pytest.raises(TypeError, match="config_dict must be a dict"):
        GenerationConfig.from_dict([1])  # type: ignore[call-overload]


def test_a_files_unused_nonsense_does_not_stop_loading(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.0}))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.temperature == 0.0
    with pytest.raises(ValueError, match="temperature"):
        config.validate()


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, "has no generation_config.json"),
        (b"{", CheckpointError, "not valid JSON"),
        (b"\xff\xfe", CheckpointError, "not valid JSON"),
        (b"[1]", CheckpointError, "must hold a JSON object, not a list"),
        (b'{"max_new_tokens": 0}', ValueError, "max_new_tokens"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, error: type[Exception], words: str) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(error, match=words):
        GenerationConfig.from_pretrained(tmp_path)


def test_from_pretrained_arguments(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.json").write_text('{"top_k": 7, "own": 1}')
    config, unused = GenerationConfig.from_pretrained(
        tmp_path, "mine.json", subfolder="sub", own=2, foo=3, return_unused_kwargs=True
    )
    assert (config.top_k, config.own, unused) == (7, 2, {"foo": 3})
    with pytest.raises(ValueError, match="pass its folder"):
        GenerationConfig.from_pretrained(tmp_path / "sub" / "mine.json")
    with pytest.raises(ValueError, match="HTTPS_PROXY"):
        GenerationConfig.from_pretrained(tmp_path, proxies={"http": "x"})


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked: dict[str, Any] = {}
    (tmp_path / "file").write_text('{"top_k": 7}')

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id, filename=filename)
        if repo_id == "no/file":
            raise EntryNotFoundError("404 not here")
        return str(tmp_path / "file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = GenerationConfig.from_pretrained(
        "some/model", cache_dir=tmp_path, force_download=True, local_files_only=True, token="t", revision="v1"
    )
    assert config.top_k == 7
    assert asked == {
        "repo_id": "some/model",
        "filename": "generation_config.json",
        "subfolder": None,
        "cache_dir": tmp_path,
        "force_download": True,
        "local_files_only": True,
        "token": "t",
        "revision": "v1",
    }
    with pytest.raises(FileNotFoundError, match=r"'no/file'.*404 not here"):
        GenerationConfig.from_pretrained("no/file")


def test_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        repo_id = "me/folder"
        commit_url = "https://x"

        def __init__(self, token: str | None) -> None:
            calls.append(("api", {"token": token}))

        def create_repo(self, repo_id: str, **kwargs: Any) -> Api:
            calls.append((repo_id, kwargs))
            return self

        def upload_file(self, **kwargs: Any) -> Api:
            calls.append(("upload", kwargs))
            return self

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    GenerationConfig(top_k=50).save_pretrained(tmp_path / "folder", push_to_hub=True, private=True, token="t")
    assert [name for name, _ in calls] == ["api", "folder", "upload"]
    assert calls[1][1] == {"private": True, "exist_ok": True}
    assert calls[2][1]["repo_id"] == "me/folder"
    assert calls[2][1]["path_or_fileobj"] == (tmp_path / "folder" / "generation_config.json").read_bytes()


def test_saving_refuses_what_has_no_effect_unless_it_was_loaded_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Mend this before saving"):
        GenerationConfig(top_p=0.5).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    config = GenerationConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "copy")
    assert GenerationConfig.from_pretrained(tmp_path / "copy") == config
    config.top_p = 0.6
    with pytest.raises(ValueError, match="Mend this"):
        config.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="is a file"):
        GenerationConfig().save_pretrained(tmp_path / "generation_config.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GenerationConfig(max_new_tokens=5).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="constraints cannot be written"):
        GenerationConfig(constraints=[object()], num_beams=2).save_pretrained(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        GenerationConfig(max_new_tokens=6).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["generation_config.json"]
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 5


def test_json_forms() -> None:
    config = GenerationConfig(
        sequence_bias={(5, 7): -2.0}, compile_config={"dynamic": True}, exponential_decay_length_penalty=(3, 1.1)
    )
    assert config.compile_config == CompileConfig(dynamic=True)
    values = json.loads(config.to_json_string())
    assert values["sequence_bias"] == [[[5, 7], -2.0]]
    assert values["compile_config"]["dynamic"] is True
    assert values["exponential_decay_length_penalty"] == [3, 1.1]
    assert "compile_config" not in json.loads(config.to_json_string(keys_to_pop=["compile_config"]))
    assert GenerationConfig.from_dict(values) == config
    assert json.loads(GenerationConfig(dtype=torch.float16, n={"dtype": torch.int8}).to_json_string()) == {
        "dtype": "float16",
        "n": {"dtype": "int8"},
    }
    assert GenerationConfig(sequence_bias={"(5, 7)": 1.0}).sequence_bias == {(5, 7): 1.0}
    assert "seed" in json.loads(config.to_json_string(use_diff=False))


def test_equality_hash_repr_copy_pickle() -> None:
    config = GenerationConfig(top_k=3, mine=[1], watermarking_config={"bias": 1.0})
    other = GenerationConfig(top_k=3, mine=[1], watermarking_config=WatermarkingConfig(bias=1.0))
    other.transformers_version = "5.2.0"
    assert config == other
    assert hash(config) == hash(other)
    assert config != GenerationConfig(top_k=4)
    assert config != 3
    assert repr(GenerationConfig(top_k=3)) == 'GenerationConfig {\n  "top_k": 3\n}\n'
    assert "object object" in repr(GenerationConfig(constraints=[object()], num_beams=2))
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_from_model_config_takes_only_settings() -> None:
    model = {"hidden_size": 8, "eos_token_id": 2, "top_k": None, "text_config": {"top_k": 9, "eos_token_id": 3}}
    before = copy.deepcopy(model)
    config = GenerationConfig.from_model_config(model)
    assert (config.eos_token_id, config.top_k, hasattr(config, "hidden_size")) == (2, 9, False)
    assert model == before
    assert GenerationConfig.from_model_config({"output_attentions": True}).return_dict_in_generate is True
    with pytest.raises(TypeError, match="model_config must be a dict"):
        GenerationConfig.from_model_config(3)


def test_explain_of_an_unresolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    GenerationConfig(temperature=0.3, stop_strings=["x" * 99]).explain()
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert rows["temperature"].endswith("the GenerationConfig object")
    assert rows["top_k"].split() == ["top_k", "50", "the", "default"]
    assert len(rows["stop_strings"]) < 110
    assert "max_new_tokens" in rows["off:"]


def test_mode_with_left_out_strategy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "unspool")
    mode = GenerationConfig(num_beams=2).get_generation_mode(assistant_model=object())
    assert mode is GenerationMode.BEAM_SEARCH
    assert "assisted_generation" in caplog.text


# Nested settings


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (WatermarkingConfig(seeding_scheme="x"), "seeding_scheme"),
        (WatermarkingConfig(greenlist_ratio=1.5), "greenlist_ratio"),
        (WatermarkingConfig(context_width=0), "context_width"),
        (SynthIDTextWatermarkingConfig(5, [1], sampling_table_size=2**25), "sampling_table_size"),
        (SynthIDTextWatermarkingConfig(5, []), "keys"),
        (SynthIDTextWatermarkingConfig(1, [1]), "ngram_len"),
    ],
)
def test_watermark_settings_out_of_range(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.validate()
    with pytest.raises(ValueError, match=words):
        GenerationConfig(watermarking_config=config)


def test_watermark_settings_as_data(tmp_path: Path) -> None:
    config = SynthIDTextWatermarkingConfig.from_dict({"ngram_len": 5, "keys": [1]}, keys=[2], other=3)
    config.update(debug_mode=True, nothing=1)
    assert dict(iter(config)) == config.to_dict()
    assert SynthIDTextWatermarkingConfig.from_dict(json.loads(config.to_json_string())) == config
    config.to_json_file(tmp_path / "w.json")
    assert json.loads((tmp_path / "w.json").read_text()) == config.to_dict()
    assert GenerationConfig(watermarking_config=config.to_dict()).watermarking_config == config


def test_continuous_batching_settings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "unspool")
    config = ContinuousBatchingConfig(
        block_size=32, use_default_compile_configs=True, max_cached_graphs=3, decode_compile_config={"mode": "default"}
    )
    assert (config.page_size, config.default_compile_level) == (32, 3)
    assert config.decode_compile_config == CompileConfig(mode="default")
    assert len(caplog.messages) == 3
    assert ContinuousBatchingConfig.from_dict(config.to_dict()) == config
    assert ContinuousBatchingConfig().cuda_graph_booleans == (False, False)
    assert ContinuousBatchingConfig(use_cuda_graph=True).cuda_graph_booleans == (True, True)
    assert ContinuousBatchingConfig.from_dict({"use_cuda_graph": [True, False]}).cuda_graph_booleans == (True, False)
    with pytest.raises(ValueError, match="page_size"):
        ContinuousBatchingConfig(page_size=2)
    with pytest.raises(ValueError, match="'pages'"):
        ContinuousBatchingConfig.from_dict({"pages": 2})
