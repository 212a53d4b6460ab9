"""Habits of transformers' beam search that are kept on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_checkpoint

import unspool

IDS = torch.tensor([[17, 4], [5, 9], [3, 8]])


def odd(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    """A criterion that ends outputs at different lengths."""
    return input_ids[:, -1] % 8 == 1


@pytest.mark.parametrize(
    ("pad", "eos", "filler"),
    [
        (96, [50, 51, 90], 96),
        (0, [50, 51, 90], 50),  # 0 counts as no pad token
        (96, None, -1),  # without an end token the pad token is not looked at
    ],
)
def test_what_fills_finished_beams(tmp_path: Path, pad: int, eos: list[int] | None, filler: int) -> None:
    theirs = make_checkpoint("llama", tmp_path, seed=3)
    ours = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    results = [
        model.generate(
            IDS, num_beams=3, num_return_sequences=3, max_new_tokens=12, do_sample=False, pad_token_id=pad,
            eos_token_id=eos, stopping_criteria=[odd], early_stopping=True,
        ).tolist()
        for model in (ours, theirs)
    ]  # fmt: skip
    assert results[0] == results[1]
    assert filler in {row[-1] for row in results[0]}
