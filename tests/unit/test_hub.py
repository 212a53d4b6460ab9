"""From a name to a model: folders, the Hub (a stand-in for it), transformers' arguments, and errors."""

from __future__ import annotations

import copy
import fnmatch
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import unspool
from unspool import hub
from unspool.models.base import Model
from unspool.models.layers.packed import Packable


@pytest.fixture
def checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "checkpoint"))


def test_load_gives_a_model_that_generates(tiny_llama_dir: Path) -> None:
    model, tokenizer = unspool.load(tiny_llama_dir, device="cpu")
    assert isinstance(model, Model)
    assert isinstance(model, unspool.GenerationMixin)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert model.name_or_path == str(tiny_llama_dir)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    tokens = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > 1


def test_the_class_is_made_once(tiny_llama_dir: Path) -> None:
    one, two = (unspool.AutoModelForCausalLM.from_pretrained(tiny_llama_dir) for _ in range(2))
    assert type(one) is type(two)
    assert type(copy.deepcopy(one)) is type(one)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float32"}, {"quantize": "int4"}])
def test_a_model_that_is_moved_copied_or_pickled_keeps_its_fast_weights(options: dict[str, Any]) -> None:
    model, tokenizer = unspool.load(device="cpu", **options)
    inputs = tokenizer("Once upon a time", return_tensors="pt")

    def kinds(one: Any) -> list[type]:
        return [type(part._packed) for part in one.modules() if isinstance(part, Packable)]

    def tokens(one: Any) -> list[int]:
        return list(one.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())

    packed, expected = kinds(model), tokens(model)
    forms = [part._packed for part in model.modules() if isinstance(part, Packable)]
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert model.to("cpu").eval() is model
    assert all(
        part._packed is form
        for part, form in zip((part for part in model.modules() if isinstance(part, Packable)), forms, strict=True)
    ), "what was only looked at or moved to where it is was packed anew"
    model.train()
    twins.append(model.eval())
    for one in twins:
        assert type(one) is type(model)
        assert one.lm_head.weight is one.embedding.weight
        assert kinds(one) == packed
        assert tokens(one) == expected


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_where_a_model_is_can_be_asked_of_its_first_parameter(options: dict[str, Any]) -> None:
    """As much code for transformers does; packed weights are nowhere."""
    model, _ = unspool.load(device="cpu", **options)
    first = next(model.parameters())
    assert (first.device, first.dtype) == (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("first", ["optimizer", "train"])
def test_an_optimizer_finds_the_weights_that_are_trained(first: str) -> None:
    model, tokenizer = unspool.load(device="cpu", dtype="float32")
    ids = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    model.requires_grad_(True)
    if first == "train":
        model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = model.eval().state_dict()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same, "these were not trained"


def test_generation_settings_fall_back_to_the_model_config(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    model = unspool.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.generation_config.eos_token_id == json.loads((checkpoint / "config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_under_both_names(tiny_llama_dir: Path, argument: str, dtype: Any) -> None:
    model = unspool.AutoModelForCausalLM.from_pretrained(tiny_llama_dir, **{argument: dtype})
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}])
def test_device_map(tiny_llama_dir: Path, device_map: Any) -> None:
    model = unspool.AutoModelForCausalLM.from_pretrained(tiny_llama_dir, device_map=device_map)
    assert model.device == torch.device("cpu")


def test_device_map_auto(tiny_llama_dir: Path) -> None:
    model = unspool.AutoModelForCausalLM.from_pretrained(tiny_llama_dir, device_map="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_auto_tokenizer(tiny_llama_dir: Path) -> None:
    tokenizer = unspool.AutoTokenizer.from_pretrained(tiny_llama_dir, padding_side="right", trust_remote_code=True)
    assert isinstance(tokenizer, unspool.Tokenizer)
    assert tokenizer.padding_side == "right"


def test_config_overrides(tiny_llama_dir: Path) -> None:
    model, _ = unspool.load(tiny_llama_dir, config_overrides={"max_position_embeddings": 64})
    assert model.spec.max_positions == 64


def test_subfolder(tiny_llama_dir: Path) -> None:
    parent, name = tiny_llama_dir.parent, tiny_llama_dir.name
    model, tokenizer = unspool.load(parent, subfolder=name)
    assert model.spec.vocab_size >= len(tokenizer)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"load_in_4bit": True}, TypeError, "load_in_4bit"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, ValueError, "torch_dtype"),
        ({"dtype": "float8"}, ValueError, "float8"),
        ({"quantization_config": {"quant_method": "hqq"}}, unspool.Unsupported, "quantization_config"),
        ({"device_map": {"model": 0, "lm_head": 1}}, unspool.Unsupported, "device_map"),
        ({"device_map": "balanced"}, unspool.Unsupported, "balanced"),
        ({"attn_implementation": "flash_attention_2"}, ValueError, "flash_attention_2"),
        ({"use_safetensors": False}, unspool.Unsupported, "use_safetensors"),
    ],
)
def test_arguments_that_are_refused(
    tiny_llama_dir: Path, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        unspool.AutoModelForCausalLM.from_pretrained(tiny_llama_dir, **arguments)


def test_auto_classes_have_no_instances() -> None:
    for auto in (unspool.AutoModelForCausalLM, unspool.AutoTokenizer):
        with pytest.raises(TypeError, match="from_pretrained"):
            auto()


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "two words", "", Path("no-such-folder")])
def test_neither_folder_nor_hub_id(name: Any) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        unspool.load(name)


def test_a_file_is_not_a_folder(tiny_llama_dir: Path) -> None:
    with pytest.raises(NotADirectoryError, match="give the folder"):
        unspool.load(tiny_llama_dir / "model.safetensors")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files(checkpoint: Path, missing: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(unspool.CheckpointError, match=missing):
        unspool.load(checkpoint)


def test_remote_code_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (checkpoint / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_trap.Trap", "AutoConfig": "modeling_trap.TrapConfig"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = unspool.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not trap.exists()


def test_a_class_name_from_a_file_is_only_a_name(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["__import__('os')"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert type(unspool.AutoModelForCausalLM.from_pretrained(checkpoint)).__name__ == "LlamaForCausalLM"


# The Hub


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The tiny checkpoint as the repository "owner/tiny", with files that must not be fetched; what was asked for."""
    for name in ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "onnx/model.onnx"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"no")
    asked: list[list[str]] = []
    cache = tmp_path / "cache"

    def snapshot_download(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert repo == "owner/tiny"
        asked.append(allow_patterns)
        for file in sorted(checkpoint.rglob("*")):
            name = file.relative_to(checkpoint).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_fetches_only_what_is_read(repository: list[list[str]], tmp_path: Path) -> None:
    model, _ = unspool.load("owner/tiny")
    assert model.name_or_path == "owner/tiny"
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {
        ".json",
        ".jinja",
        ".safetensors",
    }
    assert not (tmp_path / "cache/consolidated.safetensors").exists()


def test_hub_tokenizer_alone_fetches_no_weights(repository: list[list[str]], tmp_path: Path) -> None:
    assert len(unspool.AutoTokenizer.from_pretrained("owner/tiny")) > 300
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_hub_fetches_the_shards_that_the_index_names(
    repository: list[list[str]], checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "part-one.safetensors")
    index = {"weight_map": {"lm_head.weight": "part-one.safetensors", "trap": "pytorch_model.bin"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = hub.locate("owner/tiny", weights=True)
    assert repository[-1] == ["part-one.safetensors"]
    assert (folder / "part-one.safetensors").is_file()
    assert not (folder / "pytorch_model.bin").exists()


def test_hub_repository_with_pickles_only(repository: list[list[str]], checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(unspool.CheckpointError, match="no safetensors"):
        unspool.load("owner/tiny")


@pytest.mark.parametrize(
    ("raised", "error", "says"),
    [
        (GatedRepoError, PermissionError, "gated"),
        (RevisionNotFoundError, FileNotFoundError, "no revision 'v9'"),
        (RepositoryNotFoundError, FileNotFoundError, "no such repository"),
        (LocalEntryNotFoundError, ConnectionError, "cannot be reached"),
    ],
)
def test_hub_errors(
    monkeypatch: pytest.MonkeyPatch, raised: type[Exception], error: type[Exception], says: str
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise raised.__new__(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(error, match=says):
        unspool.load("owner/tiny", revision="v9")


def test_what_was_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not downloaded before"):
        unspool.load("owner/tiny", local_files_only=True, cache_dir=tmp_path)


def test_a_token_is_never_shown() -> None:
    assert "hf_secret" not in repr(hub.HubArguments(token="hf_secret"))


def test_built_in_models_are_in_the_package() -> None:
    for name, folder in hub.BUILT_IN.items():
        assert hub.locate(name) == folder
        assert all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def test_names_and_devices_that_cannot_be_say_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"adapter; load it beside one: model.load_adapter\('storyteller-pirate'\)"
    ):
        unspool.load("storyteller-pirate")
    with pytest.raises(TypeError, match="not None"):
        unspool.load(None)  # type: ignore[arg-type]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="did you mean 'storyteller'"):
        unspool.load("storyteler", local_files_only=True)
    with pytest.raises(ValueError, match="device='gpu' is unknown; use 'cpu', 'cuda'"):
        unspool.load("storyteller", device="gpu")
    with pytest.raises(ValueError, match="device='cuda:99': there"):
        unspool.load("storyteller", device="cuda:99")
