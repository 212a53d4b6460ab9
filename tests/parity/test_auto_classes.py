"""transformers' auto classes from unspool: native where there is a native model, through transformers where not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from families import make_checkpoint

import unspool
from unspool.interop import Wrapped

KINDS = {
    "falcon": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "llava": "AutoModelForImageTextToText",
}


def architecture(name: str) -> Architecture:
    return next(one for one in ARCHITECTURES if one.model_type == name)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_native_comes_wrapped(name: str, tmp_path: Path) -> None:
    one = architecture(name)
    theirs = one.make()
    theirs.save_pretrained(tmp_path)
    ours: Any = getattr(unspool, KINDS[name]).from_pretrained(tmp_path)
    assert isinstance(ours, Wrapped)
    assert not ours.training
    expected = theirs.generate(**one.inputs(), max_new_tokens=5)
    assert torch.equal(ours.generate(**one.inputs(), max_new_tokens=5), expected)


def test_arguments_reach_transformers(tmp_path: Path) -> None:
    architecture("falcon").make().save_pretrained(tmp_path / "inner")
    model: Any = unspool.AutoModelForCausalLM.from_pretrained(
        tmp_path, subfolder="inner", torch_dtype="bfloat16", attn_implementation="eager", device_map=None
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="contradict"):
        unspool.AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", dtype="float16", torch_dtype="auto")


def test_native_families_stay_native(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    assert not isinstance(model, Wrapped)


def test_mistakes_are_named(tmp_path: Path) -> None:
    architecture("t5").make().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="has no instances"):
        unspool.AutoModelForSeq2SeqLM()
    with pytest.raises(unspool.Unsupported, match="use_safetensors=False"):
        unspool.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(TypeError, match="num_wheels"):
        unspool.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, num_wheels=4)
    with pytest.raises(OSError, match="nowhere"):
        unspool.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "nowhere", local_files_only=True)


@pytest.mark.parametrize(("kind", "name"), [("AutoModelForSeq2SeqLM", "t5"), ("AutoModelForCausalLM", "falcon")])
def test_without_transformers_the_extra_is_named(kind: str, name: str, tmp_path: Path) -> None:
    architecture(name).make().save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["transformers"] = None
import unspool
try:
    unspool.{kind}.from_pretrained({str(tmp_path)!r})
except unspool.Unsupported as error:
    assert "unspool[transformers]" in str(error), error
else:
    raise SystemExit("nothing was raised")
try:
    unspool.enable()
except unspool.Unsupported as error:
    assert "unspool[transformers]" in str(error), error
else:
    raise SystemExit("nothing was raised")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
