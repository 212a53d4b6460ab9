"""Quantised modules of transformers in continuous batching: each request's tokens are those of the module alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import make_checkpoint

import unspool

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def bits(**more: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **more)


def torchao(name: str) -> Any:
    return transformers.TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())


KINDS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: bits(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4-double": lambda: bits(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "llm.int8": lambda: bits(load_in_8bit=True),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_checkpoint("llama", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_as_by_themselves(kind: str, llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=KINDS[kind](), dtype=torch.float32
    )
    expected = [model.generate(torch.tensor([one]), **SETTINGS)[0, len(one) :].tolist() for one in PROMPTS]
    found = unspool.wrap(model).generate_batch(PROMPTS, **SETTINGS)
    assert [one.generated_tokens for one in found.values()] == expected
    with unspool.enabled():
        found = model.generate_batch(PROMPTS, **SETTINGS)
    assert [one.generated_tokens for one in found.values()] == expected
