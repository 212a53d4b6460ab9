"""Eight threads on one model, each with settings of its own: the texts they get alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import unspool


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def story(request: pytest.FixtureRequest) -> Any:
    return unspool.load("storyteller", dtype=request.param)


def test_eight_threads_on_one_model(story: Any) -> None:
    """bf16 runs the compiled kernels, where there are any, from all threads at once."""
    pytest.importorskip("llguidance")
    model, tokenizer = story
    draft, _ = unspool.load("storyteller-draft", dtype=model.dtype)
    texts = ["Once upon a time", "The owl"]
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    ways: list[dict[str, Any]] = [
        {"do_sample": False, "repetition_penalty": 1.2},
        {"do_sample": True, "seed": 1, "temperature": 1.2, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "no_repeat_ngram_size": 3},
        {"do_sample": False, "assistant_model": draft},
        {"do_sample": True, "seed": 2, "guidance_scale": 1.5},
        {"do_sample": True, "seed": 3, "regex": "[a-z ,.]+", "tokenizer": tokenizer},
        {"do_sample": False, "prompt_lookup_num_tokens": 3, "stop_strings": ["and"], "tokenizer": tokenizer},
        {"do_sample": False, "assistant_early_exit": 2, "return_dict_in_generate": True, "output_scores": True},
    ]

    def text(way: dict[str, Any]) -> list[list[int]]:
        out = model.generate(**prompts, max_new_tokens=16, **way)
        return out.tolist() if not way.get("return_dict_in_generate") else out.sequences.tolist()

    alone = [text(way) for way in ways]
    before = {name: id(value) for name, value in vars(model).items()}
    together: list[list[Any]] = [[] for _ in ways]
    start = threading.Barrier(len(ways))

    def work(place: int) -> None:
        start.wait()
        for _ in range(2):
            try:
                together[place].append(text(ways[place]))
            except Exception as error:
                together[place].append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(ways))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for way, expected, found in zip(ways, alone, together, strict=True):
        assert found == [expected] * 2, way
    assert {name: id(value) for name, value in vars(model).items()} == before, "nothing stays on the model"
