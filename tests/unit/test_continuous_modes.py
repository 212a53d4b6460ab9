"""What requests decided by themselves tell while they go on, and what is read before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import unspool
from unspool import ContinuousBatchingConfig

PROMPT = [5, 6, 7, 8, 9, 6, 7, 40, 41, 42] * 4
PLAIN: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafted": {"prompt_lookup_num_tokens": 3},
    "guided": {"guidance_scale": 2.0, "negative_prompt_ids": [7, 7, 9]},
    "guided beams": {"guidance_scale": 2.0, "num_beams": 2},
    "beams": {"num_beams": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "layers": {"dola_layers": "low", "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> tuple[Any, Any]:
    return unspool.load(tiny_llama_dir, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model(tiny: tuple[Any, Any]) -> Any:
    return tiny[0]


def make(model: Any, **config: Any) -> Any:
    config = {"num_blocks": 40, "page_size": 16} | config
    return model.init_continuous_batching(PLAIN, continuous_batching_config=ContinuousBatchingConfig(**config))


def answer(manager: Any, *names: str) -> list[Any]:
    while manager.step():
        pass
    return [manager.get_result(name) for name in names]


def told(model: Any, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_told_on_the_way_stays_true(mode: str, model: Any) -> None:
    with make(model) as manager:
        name = manager.add_request(
            PROMPT, streaming=True, top_logprobs=2, prompt_logprobs=1, record_timestamps=True, **MODES[mode]
        )
        outputs = list(manager.request_id_iter(name))
    last = outputs[-1]
    assert last.finish_reason == "length" and len(last.generated_tokens) == 8
    assert len(outputs) > 1
    for one in outputs:
        count = len(one.generated_tokens)
        assert one.generated_tokens == last.generated_tokens[:count]
        assert one.logprobs == last.logprobs[:count]
        assert one.top_logprobs == last.top_logprobs[:count]
        assert len(one.timestamps) >= count and all(len(best) == 2 for best in one.top_logprobs)
        assert one.prompt_logprobs == last.prompt_logprobs
    expected = told(model, PROMPT)
    assert last.prompt_logprobs[0] is None and last.prompt_top_logprobs[0] is None
    assert last.prompt_logprobs[1:] == pytest.approx(
        [float(expected[i, token]) for i, token in enumerate(PROMPT[1:])], abs=1e-4
    )
    for i, best in enumerate(last.prompt_top_logprobs[1:]):
        assert list(best) == [int(expected[i].argmax())]


@pytest.mark.parametrize("mode", MODES)
def test_why_it_stopped(mode: str, model: Any) -> None:
    manager = make(model)
    (whole,) = answer(manager, manager.add_request(PROMPT, **MODES[mode]))
    end = whole.generated_tokens[3]
    settings = {"eos_token_id": end} | MODES[mode]
    wanted = model.generate(
        torch.tensor([PROMPT]),
        **PLAIN
        | settings
        | {"return_dict_in_generate": True, "pad_token_id": 0}
        | ({"negative_prompt_ids": torch.tensor([[7, 7, 9]])} if "negative_prompt_ids" in settings else {}),
    )
    (output,) = answer(manager, manager.add_request(PROMPT, **settings))
    assert output.finish_reason == wanted.finish_reasons[0] == "stop"
    assert output.stop == output.generated_tokens[-1] == end
    made = wanted.sequences[0, len(PROMPT) :].tolist()
    assert output.generated_tokens == made[: made.index(end) + 1]


def test_prompts_are_told_of_where_they_are_stored_too(model: Any) -> None:
    manager = make(model, max_batch_tokens=17)
    answer(manager, manager.add_request(PROMPT))
    first, second, third = answer(
        manager,
        manager.add_request(PROMPT, prompt_logprobs=0),
        manager.add_request(PROMPT),
        manager.add_request([9], prompt_logprobs=3, num_return_sequences=2, num_beams=2),
    )
    assert first.usage.cached_tokens == 0 and second.usage.cached_tokens > 0
    assert first.prompt_logprobs[1:] == pytest.approx(
        told(model, PROMPT)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist(), abs=1e-4
    )
    assert first.prompt_top_logprobs is None and second.prompt_logprobs is None
    assert first.generated_tokens == second.generated_tokens
    assert third.prompt_logprobs == [None] == third.prompt_top_logprobs
    assert manager.get_result(f"{third.request_id}__child#0").prompt_logprobs == [None]


def test_the_settings_say_how_many_log_probabilities(model: Any) -> None:
    manager = make(model)
    few, none = answer(
        manager,
        manager.add_request(PROMPT, output_top_logprobs=3),
        manager.add_request(PROMPT, output_top_logprobs=3, top_logprobs=1),
    )
    assert [len(best) for best in few.top_logprobs] == [3] * 8
    assert [len(best) for best in none.top_logprobs] == [1] * 8


@pytest.mark.parametrize("mode", MODES)
def test_a_healed_prompt(mode: str, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompt = tokenizer("Once upon a ti").input_ids
    settings = PLAIN | {"token_healing": True} | MODES[mode]
    more = {"negative_prompt_ids": torch.tensor([[7, 7, 9]])} if "negative_prompt_ids" in settings else {}
    wanted = model.generate(torch.tensor([prompt]), tokenizer=tokenizer, **settings | more)[0].tolist()
    manager = make(model)
    (output,) = answer(manager, manager.add_request(prompt, tokenizer=tokenizer, **settings))
    assert [*output.prompt_ids, *output.generated_tokens] == wanted


def test_several_outputs_that_are_guided(model: Any) -> None:
    settings = {"do_sample": True, "seed": 3, "num_return_sequences": 3, "guidance_scale": 1.5}
    wanted = model.generate(torch.tensor([PROMPT]), **PLAIN | settings)[:, len(PROMPT) :].tolist()
    outputs = model.generate_batch([PROMPT], **PLAIN | settings)
    assert [one.generated_tokens for one in outputs.values()] == wanted
    assert len(set(map(tuple, wanted))) > 1
