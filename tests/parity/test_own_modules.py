"""`unspool.GenerationMixin` on modules of a user's own: any way to keep a past, any form of output.

Each module here is a shell around one tiny model, so that transformers' `generate()` on that model is the oracle.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES
from families import make_model
from shells import Cached, Masked, Plain, Shell, Tuples
from torch import Tensor, nn

import unspool
from unspool import GenerationMixin


class Hooked(Shell):
    """Prepares its inputs by itself, as modules written for older versions do."""

    def forward(self, tokens: Tensor, input_ids: Any = None, mask: Any = None, cache: Any = None) -> Any:
        return self.inner(tokens, mask, past_key_values=cache, use_cache=cache is not None)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        if past_key_values is None:
            self.own = past_key_values = unspool.DynamicCache()
        seen = past_key_values.get_seq_length()
        return {"tokens": input_ids[:, seen:], "mask": attention_mask, "cache": past_key_values}


class Past(NamedTuple):
    layers: Any


class Named(Shell):
    """Keeps its past in a named tuple, and adds to the logits what it is told beside the ids."""

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, told: Any = None
    ) -> dict[str, Any]:
        own = None if past_key_values is None else past_key_values.layers
        past = unspool.DynamicCache.from_legacy_cache(own)
        logits = self.inner(input_ids, past_key_values=past, use_cache=True).logits
        if told is not None:
            logits = logits + told["some"][:, None]
        return {"logits": logits, "past_key_values": Past(past.to_legacy_cache())}


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "ends": {"eos_token_id": [5, 17, 33, 21, 60, 61, 62, 63], "pad_token_id": 1},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def inner() -> Any:
    return make_model("llama")


def prompts(rows: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 97, (rows, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def test_a_past_in_a_named_tuple_and_what_the_caller_passes_in_a_dict(inner: Any) -> None:
    ids = prompts()[0]
    told = {"some": torch.randn(3, 97, generator=torch.Generator().manual_seed(4))}
    calls = [Named(inner).generate(ids, told=told, num_beams=3, max_new_tokens=6) for _ in range(2)]
    assert told["some"].shape == (3, 97), "it is the caller's"
    assert calls[0].tolist() == calls[1].tolist()
    alone = Named(inner).generate(ids[1:2], told={"some": told["some"][1:2]}, num_beams=3, max_new_tokens=6)
    assert alone[0].tolist() == calls[0][1].tolist()
    plain = Named(inner).generate(ids, num_beams=3, max_new_tokens=6)
    assert plain.tolist() == inner.generate(ids, num_beams=3, max_new_tokens=6).tolist()


def test_what_an_encoder_gave_can_be_passed_to_several_calls() -> None:
    module = next(one for one in ARCHITECTURES if one.model_type == "t5").make()
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    encoded = module.get_encoder()(ids, return_dict=True)
    shape = encoded.last_hidden_state.shape
    kwargs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "num_beams": 3, "max_new_tokens": 5}
    expected = unspool.wrap(module).generate(ids, **kwargs)
    for _ in range(2):
        made = unspool.wrap(module).generate(encoder_outputs=encoded, **kwargs)
        assert made.tolist() == expected.tolist()
        assert encoded.last_hidden_state.shape == shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Masked, Tuples, Cached])
def test_tokens_are_transformers(inner: Any, kind: type[Shell], mode: str) -> None:
    ids, mask = prompts()
    torch.manual_seed(0)
    expected = inner.generate(ids, attention_mask=mask, max_new_tokens=9, **MODES[mode])
    torch.manual_seed(0)
    found = kind(inner).generate(ids, attention_mask=mask, max_new_tokens=9, **MODES[mode])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_forward_of_ids_alone_will_do(inner: Any, mode: str) -> None:
    ids, _ = prompts()
    assert torch.equal(
        Plain(inner).generate(ids, max_new_tokens=6, **MODES[mode]),
        inner.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **MODES[mode]),
    )


def test_its_own_preparation_is_honoured(inner: Any) -> None:
    ids, _ = prompts(1)
    model = Hooked(inner)
    assert torch.equal(model.generate(ids, max_new_tokens=6), inner.generate(ids, max_new_tokens=6))
    assert model.own is not None


def test_a_cache_is_fed_one_token_at_a_time(inner: Any) -> None:
    ids, mask = prompts()
    model = Cached(inner)
    model.generate(ids, attention_mask=mask, max_new_tokens=5)
    assert model.fed == [7, 1, 1, 1, 1]
    model.fed = []
    model.generate(ids, attention_mask=mask, max_new_tokens=3, use_cache=False)
    assert model.fed == [7, 8, 9]


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_cache_kinds(inner: Any, kind: str) -> None:
    ids, mask = prompts()
    model = Cached(inner)
    model.config = inner.config  # which tells how many layers there are
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, cache_implementation=kind, return_dict_in_generate=True
    )
    assert torch.equal(found.sequences, inner.generate(ids, attention_mask=mask, max_new_tokens=6))
    assert type(found.past_key_values).__name__.lower().startswith(kind)


def test_past_key_values_go_on(inner: Any) -> None:
    ids, mask = prompts()
    model = Cached(inner)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.ones_like(first.sequences)
    longer[:, :7] = mask
    model.fed = []
    again = model.generate(
        first.sequences, attention_mask=longer, past_key_values=first.past_key_values, max_new_tokens=4
    )
    assert model.fed == [1, 1, 1, 1]
    assert torch.equal(again, inner.generate(ids, attention_mask=mask, max_new_tokens=8))


def test_outputs_and_streams(inner: Any) -> None:
    ids, _ = prompts(1)

    class Heard:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    heard = Heard()
    model = Cached(inner)
    out = model.generate(
        ids, max_new_tokens=5, streamer=heard, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert heard.tokens == out.sequences[0].tolist()
    assert heard.ended
    assert len(out.scores) == len(out.logits) == 5
    assert out.finish_reasons == ["length"]
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == (1, 5)


def test_lists_of_any_lengths(inner: Any) -> None:
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    found = Cached(inner).generate(rows, max_new_tokens=4, pad_token_id=0)
    for row, out in zip(rows, found, strict=True):
        alone = inner.generate(torch.tensor([row]), max_new_tokens=4)
        assert out[4:].tolist() == alone[0, len(row) :].tolist()


def test_the_module_is_left_as_it_was(inner: Any) -> None:
    model = Tuples(inner)
    before = {**vars(model)}
    ids, mask = prompts()
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert vars(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_training_step_after_a_call_is_the_same(inner: Any) -> None:
    import copy

    ids, mask = prompts()

    def step(model: Any) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(ids, attention_mask=mask).logits.square().mean().backward()
        optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    fresh, used = copy.deepcopy(inner), copy.deepcopy(inner)
    Cached(used).generate(ids, attention_mask=mask, max_new_tokens=4)
    assert all(torch.equal(a, b) for a, b in zip(step(fresh), step(used), strict=True))


def test_no_transformers_is_needed() -> None:
    code = """
import sys, torch, unspool
from torch import nn
class Tiny(nn.Module, unspool.GenerationMixin):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 11)
    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)
torch.manual_seed(0)
model = Tiny()
out = model.generate(torch.tensor([[1, 2]]), max_new_tokens=4)
step = 2
for token in out[0, 2:].tolist():
    step = int(model.table.weight[step].argmax())
    assert token == step
assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, num_beams=2).shape == (1, 6)
assert not {"transformers", "peft"} & {name.split(".")[0] for name in sys.modules}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [Plain, Tuples, Cached])
def test_guidance(inner: Any, kind: type[Shell]) -> None:
    ids, _ = prompts()
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "guidance_scale": 1.8}
    mask = torch.ones_like(ids)
    for given in ({}, {"negative_prompt_ids": torch.tensor([[5, 6], [7, 8], [9, 10]])}):
        expected = inner.generate(ids, attention_mask=mask, **given, **kwargs)
        also = {} if kind is Plain else {"attention_mask": mask}
        assert torch.equal(kind(inner).generate(ids, **also, **given, **kwargs), expected)


class Recurrent(nn.Module, GenerationMixin):
    """Gives its state, `[layers, rows, hidden]`, whether or not that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.cell = nn.GRU(16, 16, batch_first=True)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> dict[str, Any]:
        hidden, state = self.cell(self.embedding(input_ids), past_key_values)
        return {"logits": self.head(hidden), "past_key_values": state}


class Reordered(Recurrent):
    def _reorder_cache(self, past: Any, index: Tensor) -> Any:
        return past.index_select(1, index)


def test_a_state_of_its_own_form() -> None:
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    for mode in ("greedy", "beams"):
        kwargs: dict[str, Any] = {"max_new_tokens": 9, **MODES[mode]}
        expected = Reordered().generate(ids, use_cache=False, **kwargs)
        assert torch.equal(Reordered().generate(ids, **kwargs), expected)
    model, grown = Recurrent(), ids
    for _ in range(9):
        grown = torch.cat([grown, model(grown)["logits"][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=9), grown)
    with pytest.raises(unspool.Unsupported, match=r"give it a method _reorder_cache\(past, index\)"):
        model.generate(ids, num_beams=3)


class Deaf(Shell):
    def forward(self, sound: Tensor) -> Tensor:
        return sound


class Mute(Shell):
    def forward(self, input_ids: Tensor) -> Any:
        return {"hidden": input_ids}


class Broken(Shell):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids).logits * float("nan")


def test_mistakes_are_named(inner: Any) -> None:
    ids, _ = prompts()
    with pytest.raises(TypeError, match=r"Deaf.forward takes no input_ids"):
        Deaf(inner).generate(ids)
    with pytest.raises(TypeError, match="generation needs logits"):
        Mute(inner).generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="did you mean attention_mask"):
        Cached(inner).generate(ids, atention_mask=ids)
    with pytest.raises(ValueError, match=r"integers \[rows, columns\]"):
        Cached(inner).generate(ids.float())
    with pytest.raises(unspool.NonFiniteLogits, match="the logits of Broken are not finite"):
        Broken(inner).generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="bos_token_id"):
        Plain(inner).generate()
    for wanted in ("output_attentions", "output_hidden_states"):
        with pytest.raises(unspool.Unsupported, match=rf"{wanted}=True: Plain.forward takes no {wanted}"):
            Plain(inner).generate(ids, max_new_tokens=2, return_dict_in_generate=True, **{wanted: True})

    class Nothing(GenerationMixin):
        pass

    with pytest.raises(TypeError, match=r"torch.nn.Module"):
        Nothing().generate(ids)
