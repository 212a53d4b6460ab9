"""`output_top_logprobs`: what whole scores would give, without keeping them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import unspool
from unspool import GenerationConfig

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.5},
    "caller's criterion": {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 3 == 0]},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 3, "do_sample": True},
    "beams in groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 3},
    "words forced": {"num_beams": 3, "force_words_ids": [[40, 41]]},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Any) -> Any:
    model, _ = unspool.load(str(tiny_llama_dir))
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", [[2], list(range(20, 60))], ids=["rarely ends", "soon ends"])
def test_the_same_as_from_whole_scores(tiny: Any, mode: str, ends: list[int]) -> None:
    settings = {"max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": 0, "seed": 3, **MODES[mode]}
    settings |= {"return_dict_in_generate": True}
    prompts = [[5, 6, 7, 8, 9, 6, 7], [30], [11, 12, 13]]
    whole = tiny.generate(prompts, output_scores=True, **settings)
    out = tiny.generate(prompts, output_top_logprobs=4, **settings)
    assert out.scores is None
    assert torch.equal(out.sequences, whole.sequences)
    values, ids = out.top_logprobs
    new = out.sequences.shape[1] - 7
    assert values.shape == ids.shape == (len(out.sequences), new, 4)
    assert out.token_logprobs.shape == (len(out.sequences), new)
    for row in range(len(out.sequences)):
        tokens = out.sequences[row, 7:].tolist()
        for step in range(new):
            beam = row if whole.get("beam_indices") is None else int(whole.beam_indices[row, step])
            if beam < 0 or (beam == row and ids[row, step, 0] < 0):
                assert values[row, step].isneginf().all()
                assert ids[row, step].eq(-1).all()
                assert out.token_logprobs[row, step] == 0
                continue
            logprobs = whole.scores[step][beam].log_softmax(dim=-1)
            assert_close(values[row, step], logprobs.topk(4)[0])
            assert_close(logprobs[ids[row, step]], values[row, step])
            assert_close(out.token_logprobs[row, step], logprobs[tokens[step]])


def test_a_row_past_its_end(tiny: Any) -> None:
    out = tiny.generate(
        [[5, 6], [9]], max_new_tokens=30, eos_token_id=list(range(100, 200)), output_top_logprobs=2,
        return_dict_in_generate=True,
    )  # fmt: skip
    lengths = (out.top_logprobs.ids[:, :, 0] >= 0).sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        assert 100 <= out.sequences[row, 2 + length - 1] < 200 or length == out.token_logprobs.shape[1]
        assert out.token_logprobs[row, :length].lt(0).all()
        assert out.token_logprobs[row, length:].eq(0).all()


def test_more_than_the_vocabulary(tiny: Any) -> None:
    out = tiny.generate([[5]], max_new_tokens=2, output_top_logprobs=10**6, return_dict_in_generate=True)
    assert out.top_logprobs.values.shape == (1, 2, tiny.spec.vocab_size)
    assert_close(out.top_logprobs.values.exp().sum(dim=-1), torch.ones(1, 2))


def test_the_setting(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="output_top_logprobs must be at least 1"):
        tiny.generate([[5]], output_top_logprobs=0)
    with caplog.at_level(logging.WARNING, "unspool"):
        GenerationConfig(output_top_logprobs=3, return_dict_in_generate=False)
    assert "output_top_logprobs has no effect without return_dict_in_generate" in caplog.text
    assert isinstance(tiny.generate([[5]], max_new_tokens=2, output_top_logprobs=3), torch.Tensor)
