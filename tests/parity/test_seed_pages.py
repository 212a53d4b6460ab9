"""The examples of transformers' v5.2 pages that need no assistant or adapter, with the import line changed.

Each runs here on the built-in model, and on transformers itself on the same files; both give the same.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import unspool
from unspool.hub import BUILT_IN


@pytest.fixture(params=["unspool", "transformers"])
def library(request: pytest.FixtureRequest) -> ModuleType:
    return {"unspool": unspool, "transformers": transformers}[request.param]


@pytest.fixture
def parts(library: ModuleType) -> tuple[Any, Any, torch.Tensor]:
    folder = BUILT_IN["storyteller"]
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", device_map="cpu")
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Hello my name is", return_tensors="pt")
    return model, tokenizer, inputs["input_ids"].to(model.device)


def reference(input_ids: torch.Tensor, **kwargs: Any) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(BUILT_IN["storyteller"], dtype="float32")
    torch.manual_seed(0)
    return model.generate(input_ids=input_ids, **kwargs)[0].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 50, "do_sample": False},
        {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95},
        {"max_new_tokens": 100, "do_sample": False},
        {"max_new_tokens": 200, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {},
    ],
)
def test_generate(parts: tuple[Any, Any, torch.Tensor], settings: dict[str, Any]) -> None:
    model, tokenizer, input_ids = parts
    torch.manual_seed(0)
    with torch.no_grad():
        output = model.generate(input_ids=input_ids, **settings)
    assert output[0].tolist() == reference(input_ids, **settings)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("Hello my name is")


def test_streaming_output(library: ModuleType, parts: tuple[Any, Any, torch.Tensor], capsys: Any) -> None:
    model, tokenizer, input_ids = parts
    streamer = library.TextStreamer(tokenizer, skip_special_tokens=True)
    torch.manual_seed(0)
    output = model.generate(input_ids=input_ids, max_new_tokens=256, do_sample=True, temperature=0.7, streamer=streamer)
    assert capsys.readouterr().out.strip() == tokenizer.decode(output[0], skip_special_tokens=True).strip()


def test_transition_scores(library: ModuleType, parts: tuple[Any, Any, torch.Tensor]) -> None:
    model, tokenizer, _ = parts
    inputs = tokenizer(["Today is"], return_tensors="pt")
    outputs = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    scores = model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
    generated = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    lines = [
        f"| {t:5d} | {tokenizer.decode(t):8s} | {s.numpy():.3f}" for t, s in zip(generated[0], scores[0], strict=True)
    ]
    assert len(lines) == generated.shape[1]
    with torch.no_grad():
        logits = model(outputs.sequences).logits[0].log_softmax(-1)
    for i, token in enumerate(outputs.sequences[0, -generated.shape[1] :].tolist()):
        place = inputs["input_ids"].shape[1] + i - 1
        torch.testing.assert_close(scores[0, i], logits[place, token], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # the page divides a tensor by an array
def test_transition_scores_of_beams(parts: tuple[Any, Any, torch.Tensor]) -> None:
    """The page's reconstruction of `sequences_scores`; a setting that the model leaves open is None on both sides."""
    model, tokenizer, _ = parts
    # Not the page's "Today is": the page counts scores below 0, and a token the storyteller is sure of scores 0.
    inputs = tokenizer(["She had a"], return_tensors="pt")
    outputs = model.generate(
        **inputs,
        max_new_tokens=5,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,  # as GPT-2 on the page; the storyteller's own settings sample
        return_dict_in_generate=True,
        output_scores=True,
    )
    transition_scores = model.compute_transition_scores(
        outputs.sequences, outputs.scores, outputs.beam_indices, normalize_logits=False
    )
    output_length = np.sum(transition_scores.numpy() < 0, axis=1)
    length_penalty = model.generation_config.length_penalty or 1.0
    reconstructed_scores = transition_scores.sum(axis=1) / (output_length**length_penalty)
    assert np.allclose(outputs.sequences_scores, reconstructed_scores)


def test_generation_config_files(library: ModuleType, tmp_path: Path) -> None:
    config = library.GenerationConfig.from_pretrained(BUILT_IN["storyteller"])
    config.save_pretrained(tmp_path)
    assert library.GenerationConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path, config_file_name="my_configuration.json")
    config = library.GenerationConfig.from_pretrained(tmp_path, "my_configuration.json")
    config, unused = library.GenerationConfig.from_pretrained(
        BUILT_IN["storyteller"], top_k=1, foo=False, do_sample=True, return_unused_kwargs=True
    )
    assert config.top_k == 1
    if library is unspool:  # the page promises it; transformers itself takes any name for a setting
        assert unused == {"foo": False}
