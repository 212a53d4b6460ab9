"""Checkpoints on disk: what loads, what is refused and why, what is written."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from unspool.errors import CheckpointError, Unsupported
from unspool.models.registry import build
from unspool.weights import load_model, read_config, save_model

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make_checkpoint("llama", tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a one-file checkpoint by name; `None` takes one out."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    theirs = make_checkpoint("llama", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert torch.equal(logits(load_model(tmp_path / "one")), logits(load_model(tmp_path / "many")))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_is_saved_loads_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    theirs = make_checkpoint(name, tmp_path / "in")
    ours = load_model(tmp_path / "in")
    save_model(ours, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = type(theirs).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-6, rtol=0)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(ours))


def test_a_fresh_model_saved_loads_in_transformers(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    model = build({**config, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True})
    save_model(model, tmp_path / "made" / "here")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made" / "here")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_names_without_the_prefix(name: str, tmp_path: Path) -> None:
    theirs = make_checkpoint(name, tmp_path, tie_word_embeddings=True)
    prefix = "transformer." if name == "gpt2" else "model."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(logits(load_model(tmp_path)), logits(theirs), atol=1e-5, rtol=0)


def test_tied_heads_follow_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint("llama", tmp_path)
    reconfigure(tmp_path, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING):
        apart = load_model(tmp_path)
    assert not apart.tied and "lm_head.weight differs" in caplog.text
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(apart.state_dict()["lm_head.weight"], head)

    rewrite(tmp_path, **{"model.embed_tokens.weight": head.clone()})
    same = load_model(tmp_path)
    assert same.tied and same.lm_head.weight is same.embedding.weight

    rewrite(tmp_path, **{"model.embed_tokens.weight": None})
    assert torch.equal(logits(load_model(tmp_path)), logits(same))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, "auto", "float32", torch.bfloat16, "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dtypes(name: str, stored: torch.dtype, wanted: Any, tmp_path: Path) -> None:
    theirs = make_checkpoint(name, tmp_path).to(stored)
    theirs.save_pretrained(tmp_path)
    expected = stored if wanted in (None, "auto") else getattr(torch, str(wanted).removeprefix("torch."))
    for keep in (True, False):
        if not keep:
            reconfigure(tmp_path, dtype=None, torch_dtype=None)
        model = load_model(tmp_path, dtype=wanted)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        table = theirs.get_input_embeddings().weight.detach()
        assert torch.equal(model.state_dict()["embedding.weight"], table.to(expected))


def test_parameters_of_a_loaded_model_are_complete(llama: Path) -> None:
    model = load_model(llama)
    assert not model.training and model.device.type == "cpu"
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        tensor.numel() for tensor in load_file(llama / "model.safetensors").values()
    )


def test_overrides_replace_the_configuration(llama: Path) -> None:
    reconfigure(llama, model_type="no_such")
    model = load_model(llama, config_overrides={"model_type": "llama", "rms_norm_eps": 0.5})
    assert model.config["rms_norm_eps"] == 0.5


def test_constants_of_older_files_are_ignored_and_others_reported(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rewrite(llama, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
        load_model(llama)
        make_checkpoint("gpt2", tmp_path / "gpt2")
        mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.ones(1)}
        rewrite(tmp_path / "gpt2", **mask)
        load_model(tmp_path / "gpt2")
        assert not caplog.records
        rewrite(llama, **{"model.extra": torch.ones(1), "other": torch.ones(1)})
        load_model(llama)
    assert len(caplog.records) == 1 and "model.extra, other" in caplog.text


def test_missing_and_misshapen_tensors(llama: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = load_file(llama / "model.safetensors")[name]
    rewrite(llama, **{name: whole[:-1].clone()})
    with pytest.raises(CheckpointError, match=rf"{name}.* has shape \[31, 64\].* makes it \[32, 64\]"):
        load_model(llama)
    rewrite(llama, **{name: whole.to(torch.int8)})
    with pytest.raises(CheckpointError, match="holds integers"):
        load_model(llama)
    rewrite(llama, **{name: None})
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}'"):
        load_model(llama)
    rewrite(llama, **{name: whole})
    load_model(llama)


@pytest.mark.parametrize("size", [0, 4, 100, 30_000])
def test_truncated_files(llama: Path, size: int) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"model.safetensors is .*{size}"):
        load_model(llama)


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        header(b"not json"),
        header(b"[1, 2]"),
        header(b"\xff\xfe\xfd"),
        header(b'{"a": {"dtype": "F32"}}'),
        header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"0000"),
        header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', b"0000"),
        header(b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}', b"0000"),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', b"0000"),
        b"PK\x03\x04 a pickle, in truth, and a long one at that",
    ],
)
def test_corrupt_headers(llama: Path, content: bytes) -> None:
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(llama)


def test_pickles_are_refused_and_not_read(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(llama)

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(llama / "bang"),)

    torch.save(Bomb(), llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*convert"):
        load_model(llama)
    assert not (llama / "bang").exists()


def test_folders_that_are_none(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_config(llama / "config.json")
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        load_model(llama)
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(llama)


def test_broken_indexes(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="60KB")
    folder, index = tmp_path / "b", tmp_path / "b" / "model.safetensors.index.json"
    shard = next(folder.glob("model-00002*"))
    moved = shard.rename(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match=f"names the file '{shard.name}'"):
        load_model(folder)
    moved.rename(shard)
    table = json.loads(index.read_text())
    outside = {name: f"../{file}" for name, file in table["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(CheckpointError, match="which is not in the folder"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no `weight_map`"):
        load_model(folder)


def test_an_embedding_by_itself_stays_plain(llama: Path) -> None:
    model = load_model(llama, dtype="bfloat16")
    assert not model.tied
    assert model.embedding._packed is None


def test_unknown_quantisation_is_refused(llama: Path) -> None:
    reconfigure(llama, quantization_config={"quant_method": "hqq"})
    with pytest.raises(Unsupported, match="'hqq'"):
        load_model(llama)
    with pytest.raises(ValueError, match="holds quantised weights already"):
        load_model(llama, quantize="int8")


def test_loading_writes_nothing_and_keeps_no_file_open(llama: Path) -> None:
    def look() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in llama.iterdir()}

    before, opened = look(), len(os.listdir("/proc/self/fd"))
    model = load_model(llama)
    assert look() == before
    assert len(os.listdir("/proc/self/fd")) == opened
    expected = logits(model)
    shutil.rmtree(llama)
    assert torch.equal(logits(model), expected)


def test_an_interrupted_save_leaves_what_was_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(llama)
    save_model(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_a_bar_appears_when_asked_for(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(llama, progress=False)
    load_model(llama)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    load_model(llama, progress=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "Loading llama" in captured.err


PEAK = """
import resource, sys, torch
from unspool.models.registry import build
from unspool.weights import load_model, save_model
torch.set_num_threads(1)
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
warm = load_model(sys.argv[1], dtype=sys.argv[3])
del warm
before = peak()
model = load_model(sys.argv[2], dtype=sys.argv[3])
print(peak() - before, sum(p.numel() * p.dtype.itemsize for p in model.parameters()))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_little_more_memory_than_the_weights(dtype: str, llama: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    big = build({**config, "num_attention_heads": 8, "vocab_size": 8000}, dtype="bfloat16")
    save_model(big, tmp_path / "big")
    command = [sys.executable, "-c", PEAK, str(llama), str(tmp_path / "big"), dtype]
    taken, weights = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert weights > 190e6
    assert taken <= (1.08 if dtype == "bfloat16" else 1.2) * weights
