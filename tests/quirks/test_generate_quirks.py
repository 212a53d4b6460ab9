"""Habits of transformers' `generate()` that callers rely on, each kept on purpose and named here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_checkpoint

import unspool


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("llama")
    theirs = make_checkpoint("llama", folder, seed=3)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), theirs


IDS = torch.tensor([[0, 0, 0, 17, 4], [5, 9, 11, 3, 8]])
MASK = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])


def test_rows_that_ended_still_draw(pair: tuple[Any, Any]) -> None:
    """What one row samples depends on its place in the rectangle, not on whether the rows before it still live."""
    ours, theirs = pair
    ends = list(range(10, 60))  # rows end soon, and at different times
    for seed in range(5):
        results = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            results.append(
                model.generate(
                    IDS, attention_mask=MASK, do_sample=True, top_k=0, temperature=2.0, max_new_tokens=15,
                    eos_token_id=ends, pad_token_id=0,
                ).tolist()
            )  # fmt: skip
        assert results[0] == results[1]


def test_lengths_count_padded_columns(pair: tuple[Any, Any]) -> None:
    for model in pair:
        out = model.generate(IDS, attention_mask=MASK, max_length=8, pad_token_id=0, eos_token_id=None)
        assert out.shape == (2, 8)


def test_n_gram_bans_see_padding_and_the_repetition_penalty_does_not(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for settings in ({"no_repeat_ngram_size": 1}, {"repetition_penalty": 6.0}):
        kwargs: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, **settings}
        got = ours.generate(IDS, attention_mask=MASK, **kwargs)
        assert got.tolist() == theirs.generate(IDS, attention_mask=MASK, **kwargs).tolist()
        alone = ours.generate(IDS[:1, 3:], **kwargs)
        if "repetition_penalty" in settings:
            assert got[0, 5:].tolist() == alone[0, 2:].tolist()
        else:
            assert 0 not in got[0, 5:], "the pad is an n-gram that was there"


def test_an_end_token_fills_where_there_is_no_pad_token(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    free = ours.generate(IDS, attention_mask=MASK, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    ends = [int(free[1, 7])]
    results = [
        m.generate(IDS, attention_mask=MASK, max_new_tokens=9, eos_token_id=ends).tolist() for m in (ours, theirs)
    ]
    assert results[0] == results[1]
    assert results[0][1][-1] == ends[0]


def test_a_pad_token_among_the_end_tokens_does_not_empty_the_text(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    kwargs: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": [0, 96], "pad_token_id": 0}
    got = ours.generate(IDS, attention_mask=MASK, **kwargs)
    assert got.tolist() == theirs.generate(IDS, attention_mask=MASK, **kwargs).tolist()
    assert got[0, 5:].any()


def test_the_past_of_a_call_may_be_handed_to_the_next(pair: tuple[Any, Any]) -> None:
    outputs = []
    for model in pair:
        kwargs: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
        first = model.generate(IDS[1:], return_dict_in_generate=True, **kwargs)
        turn = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        outputs.append(model.generate(turn, past_key_values=first.past_key_values, **kwargs).tolist())
    assert outputs[0] == outputs[1]
