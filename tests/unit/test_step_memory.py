"""What a step of decoding takes of memory: a few tensors of its own, the same however long the text is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unspool
from unspool.kernels import native


class Made(TorchDispatchMode):
    """Notes tensors with memory of their own, step by step; also what a streamer hears, so that it knows the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[tuple[int, ...], int]]] = [[]]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.steps[-1].append((tuple(x.shape), x.untyped_storage().nbytes()))
        return out

    def put(self, value: torch.Tensor) -> None:
        self.steps.append([])

    def end(self) -> None:
        pass


@pytest.mark.skipif(not native.active(), reason=native.describe())
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_step_takes_the_same_little_memory(rows: int, quantize: str | None) -> None:
    model, tokenizer = unspool.load("storyteller", dtype="bfloat16", quantize=quantize)
    inputs = tokenizer(["Once upon a time"] * rows, return_tensors="pt")
    made = Made()
    with made:
        model.generate(**inputs, max_new_tokens=100, do_sample=False, eos_token_id=None, streamer=made)
    early, late = made.steps[10:20], made.steps[-20:-10]
    assert early == late  # of the same kinds and sizes
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    numbers = 32 * hidden + 2 * vocab  # of all parts of one layer, and the logits
    for step in late:
        assert sum(size for _, size in step) <= 2 * rows * numbers + 1000
        assert len(step) <= 20
