"""Wrapped modules compute in PyTorch's inference mode, and nobody comes by a tensor of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families import make_model
from torch import Tensor, nn

import unspool

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
ROWS: dict[str, Any] = {"cache_implementation": "dynamic"}


def llama(kind: type[Any] = transformers.LlamaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return kind(transformers.LlamaConfig(vocab_size=97, num_key_value_heads=2, **shape, **more)).eval()


def learn(model: Any) -> list[Tensor]:
    """Gradients of a step of training."""
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [one.grad for one in model.parameters()]


@pytest.mark.parametrize("more", [{}, ROWS], ids=["ragged", "rows"])
def test_steps_are_in_inference_mode_where_nobody_looks(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    modes: list[bool] = []
    original = nn.Embedding.forward

    def watched(self: Any, input: Tensor) -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return original(self, input)

    wrapped = unspool.wrap(model)
    wrapped.unspool_report()
    monkeypatch.setattr(nn.Embedding, "forward", watched)
    assert not wrapped.generate(IDS, max_new_tokens=3, **more).is_inference()
    assert modes[-1]
    modes.clear()
    wrapped.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **more)
    assert not any(modes)
    learn(model)


@pytest.mark.parametrize("more", [{}, ROWS], ids=["ragged", "rows"])
@pytest.mark.parametrize("way", ["hook", "forward"])
def test_what_is_looked_at_can_be_learned_from(way: str, more: dict[str, Any]) -> None:
    model = make_model("llama")
    part, seen = model.model.layers[1].mlp, []
    if way == "hook":
        part.register_forward_hook(lambda module, given, output: seen.append(output))
    else:
        original = part.forward

        def forward(x: Tensor) -> Tensor:
            seen.append(original(x))
            return seen[-1]

        part.forward = forward
    unspool.wrap(model).generate(IDS, max_new_tokens=3, **more)
    probe = nn.Linear(seen[-1].shape[-1], 1)
    sum(probe(one).sum() for one in seen).backward()
    assert probe.weight.grad is not None


def test_what_a_module_keeps_is_ordinary() -> None:
    """Angles of rows longer than the first ones: a buffer that is exchanged while a text is written."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = llama(max_position_embeddings=8, rope_parameters=rope)
    other = copy.deepcopy(model)
    tokens = unspool.wrap(model).generate(IDS, max_new_tokens=12)
    assert torch.equal(tokens, other.generate(IDS, max_new_tokens=12))
    assert torch.equal(model.model.rotary_emb.inv_freq, other.model.rotary_emb.inv_freq)
    assert not model.model.rotary_emb.inv_freq.is_inference()
    assert all(map(torch.equal, learn(model), learn(other)))


class Keeping(transformers.LlamaForCausalLM):
    """Keeps its newest logits in every kind of box."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        logits = output.logits
        self.newest = logits
        self.boxes = [{"one": (logits, 3)}, SimpleNamespace(two=[logits])]
        return output


def test_boxes_of_a_module_hold_ordinary_tensors() -> None:
    model = llama(Keeping)
    unspool.wrap(model).generate(IDS, max_new_tokens=3)
    (found, three), other = model.boxes[0]["one"], model.boxes[1].two[0]
    assert three == 3
    assert found is other is model.newest
    weight = torch.ones_like(found, requires_grad=True)
    (weight * found).sum().backward()
    assert torch.equal(weight.grad, found)


def test_a_cache_of_the_callers_holds_ordinary_tensors() -> None:
    model = make_model("llama")
    past = transformers.DynamicCache()
    unspool.wrap(model).generate(IDS, max_new_tokens=3, past_key_values=past)
    assert not any(layer.keys.is_inference() for layer in past.layers)
