"""What nobody in a step asks for is not computed: operations are counted, with what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import unspool
from unspool.logits.grammar.processor import GrammarLogitsProcessor

GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 3, "top_k": None, "top_p": None, "temperature": 1.0}

# What makes room for a result, or brings rows' parts of one together.
_PLACES = {
    "_to_copy",
    "empty",
    "new_empty",
    "empty_like",
    "index",
    "index_put_",
    "view",
    "slice",
    "detach",
    "lift_fresh",
}
_GREEDY = _PLACES | {"argmax"}
# The tokens drawn are those greatest in `p / e`, where `e` is noise; without the kernels, by these.
_DRAWN = _GREEDY | {"_softmax", "exponential_", "div_", "unsqueeze", "gather", "select", "unbind", "abs", "mul"}
_DRAWN |= {"ne", "eq", "gt", "bitwise_and", "scalar_tensor", "where"}


class Counted(TorchDispatchMode):
    """The operations of a chooser, and the rows of the tensors that each is given."""

    def __init__(self, chooser: Any) -> None:
        super().__init__()
        self.ops: dict[str, list[int]] = {}
        self._chooser = chooser

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows = [one.shape[0] for one in args if isinstance(one, Tensor) and one.ndim == 2]
        self.ops.setdefault(func.overloadpacket.__name__, []).extend(rows)
        return func(*args, **(kwargs or {}))

    def choose(self, logits: Tensor, rows: Any) -> Any:
        with self:
            return self._chooser.choose(logits, rows)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    loaded = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")[0]
    loaded.generation_config.eos_token_id = None
    return loaded


def step_of(model: Any, *requests: dict[str, Any]) -> tuple[dict[str, list[int]], Any]:
    """The operations of one decode step of requests side by side, and their manager."""
    manager = model.init_continuous_batching()
    group = manager._engine.plain.group
    counted = group.chooser = Counted(group.chooser)
    for first, settings in enumerate(requests):
        manager.add_request([5 + first, 6, 7], max_new_tokens=9, **settings)
    for _ in range(4):
        counted.ops.clear()
        manager.step()
    return counted.ops, manager


def test_nothing_is_computed_that_nobody_asks_for(model: Any) -> None:
    ops, manager = step_of(model, GREEDY, GREEDY, GREEDY)
    assert set(ops) <= _GREEDY
    assert not manager._engine.plain._history._ids.numel(), "no tokens are kept for processors"
    ops, manager = step_of(model, SAMPLED, SAMPLED | {"seed": 4})
    assert set(ops) <= _DRAWN
    assert len(ops["_softmax"]) == 1
    assert not manager._engine.plain._history._ids.numel()


@pytest.mark.parametrize(
    ("settings", "costs", "spared"),
    [
        (SAMPLED | {"top_p": 0.9}, {"_softmax"}, {"topk", "_log_softmax"}),
        (SAMPLED | {"temperature": 0.7}, {"div"}, {"sort", "cumsum", "topk"}),
        (SAMPLED | {"min_p": 0.1}, {"_softmax"}, {"cumsum", "topk"}),
        (GREEDY | {"repetition_penalty": 1.3}, {"scatter_"}, {"sort", "_softmax", "topk", "_log_softmax"}),
        (GREEDY | {"return_logprobs": True}, {"_log_softmax"}, {"topk", "sort"}),
        (GREEDY | {"top_logprobs": 2}, {"_log_softmax", "topk"}, {"sort"}),
        (GREEDY | {"suppress_tokens": [4]}, set(), {"_log_softmax", "topk", "sort", "_softmax"}),
    ],
)
def test_a_row_pays_for_itself_alone(model: Any, settings: dict[str, Any], costs: set[str], spared: set[str]) -> None:
    """One row asks for something, and two beside it do not: it is computed for one row."""
    ops, _ = step_of(model, GREEDY, settings, GREEDY)
    assert costs <= set(ops)
    assert not spared & set(ops)
    for name in set(ops) - _PLACES - {"argmax"}:
        assert set(ops[name]) <= {1}, f"{name} is computed for rows that do not ask for it"


def test_who_asks_is_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors, criteria and grammars of one request see its row in each step, and no other's."""
    seen: list[tuple[str, list[int]]] = []

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(("processor", list(scores.shape)))
        return scores

    def stops(ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        seen.append(("criterion", list(ids.shape)))
        return False

    def masks(self: Any, ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(("grammar", list(scores.shape)))
        return scores

    monkeypatch.setattr(GrammarLogitsProcessor, "__call__", masks)
    _, manager = step_of(model, GREEDY, GREEDY)
    while manager.step():
        pass
    assert not seen
    step_of(model, GREEDY, GREEDY | {"logits_processor": [process], "stopping_criteria": [stops]}, GREEDY)
    vocab = model.spec.vocab_size
    assert seen == [one for step in range(4) for one in (("processor", [1, vocab]), ("criterion", [1, 4 + step]))]
