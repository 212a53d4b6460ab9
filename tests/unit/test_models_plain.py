"""What models do without an oracle: fresh weights, bad arguments, layers that change their layout."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch

from unspool.errors import CheckpointError
from unspool.models.base import ModelConfig
from unspool.models.layers.linear import Linear, multiply
from unspool.models.layers.norm import RMSNorm
from unspool.models.registry import build, dtype_of, empty, supported

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 8,
}


def test_fresh_models_repeat_with_the_seed() -> None:
    torch.manual_seed(3)
    one = build(LLAMA)
    torch.manual_seed(3)
    two = build(LLAMA)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    weight = one.get_parameter("layers.0.mlp.gate_up.weight")
    assert 0.015 < weight.std() < 0.025
    assert torch.equal(one.get_parameter("norm.weight"), torch.ones(32))


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GPT2], ids=["llama", "tied", "gpt2"])
def test_a_fresh_model_learns(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build(config)
    ids = torch.randint(0, 50, (4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert (model.lm_head.weight is model.embedding.weight) == model.tied


def test_an_empty_model_has_shapes_and_no_memory() -> None:
    model = empty({**LLAMA, "hidden_size": 4096, "intermediate_size": 10**6, "dtype": "bfloat16"})
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not model.training


def test_unknown_families_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"'mamba'.*supported are .*llama.*unspool\[transformers\]"):
        empty({"model_type": "mamba"})
    with pytest.raises(CheckpointError, match="names no `model_type`"):
        build({})
    assert set(supported()) >= {"gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"hidden_act": "swoosh"}, "'swoosh'"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}}, "has 1 numbers"),
    ],
)
def test_contradictory_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        empty({**LLAMA, **changes})


def test_old_and_new_rope_forms_mean_the_same() -> None:
    old = empty({**LLAMA, "rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = empty({**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}})
    positions = torch.arange(20)
    for a, b in zip(*(m.rotary(positions, None, torch.float32) for m in (old, new)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, 50]])}, r"holds 50; token ids of this model lie in \[0, 50\)"),
        ({"input_ids": torch.tensor([[1, -1]])}, "holds -1"),
        ({"input_ids": torch.tensor([1, 2])}, "shape"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "neither of them 0"),
        ({"input_ids": torch.ones(1, 3)}, "integers"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 4)}, "`attention_mask`"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(3)}, "`labels`"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "position_ids": torch.arange(3)}, "`position_ids`"),
        ({"input_ids": torch.ones(1, 9, dtype=torch.long)}, "has 8 positions"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "return_dict": False}, "`return_dict=False`"),
    ],
)
def test_bad_arguments_of_a_plain_call(arguments: dict[str, Any], message: str) -> None:
    model = build(GPT2)
    with pytest.raises(ValueError, match=message):
        model(**arguments)
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 50)


def test_output_names_what_it_holds() -> None:
    with pytest.raises(KeyError, match="it holds logits"):
        build(GPT2)(torch.ones(1, 3, dtype=torch.long))["loss"]


@pytest.mark.parametrize("dtype", ["int8", "no_such", torch.int32, "Tensor"])
def test_dtypes_that_weights_cannot_have(dtype: Any) -> None:
    with pytest.raises(ValueError, match="`dtype`"):
        dtype_of(dtype, {})


def test_dtype_comes_from_the_configuration() -> None:
    assert dtype_of(None, {"torch_dtype": "bfloat16"}) == torch.bfloat16
    assert dtype_of("auto", {"dtype": "float16"}) == torch.float16
    assert dtype_of("torch.float32", {"dtype": "float16"}) == torch.float32
    assert dtype_of(None, {}) == torch.float32


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 40])
def test_products_equal_whatever_the_route(rows: int, bias: bool, dtype: torch.dtype, packed: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(64, 40, 24, 24, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(rows, 64).to(dtype)
    layer = layer.to(dtype)
    exact = torch.nn.functional.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    if packed:
        layer.pack()
    with torch.inference_mode():
        got = layer(x)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(got.double(), exact, atol=tolerance, rtol=0)
    assert got.shape == (rows, 88)
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_the_same_layer(dtype: torch.dtype) -> None:
    layer = Linear(32, 48).to(dtype)
    torch.nn.init.normal_(layer.weight)
    plain = layer.weight.detach().clone()
    layer.pack()
    assert layer.weight.shape == plain.shape
    assert torch.equal(layer.state_dict()["weight"], plain)
    packed, twin = layer._packed, copy.deepcopy(layer)
    assert torch.equal(twin.plain, plain)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).plain, plain)
    assert layer.to("cpu") is layer and layer._packed is packed, "whoever looks at a layer leaves it as it is"
    twin.unpack()
    assert torch.equal(twin.weight, plain) and layer._packed is packed
    assert torch.equal(layer.to(torch.float64).weight, plain.double())
    layer.to(torch.float32)
    layer.pack()
    layer.load_state_dict({"weight": plain * 2})
    assert torch.equal(layer.weight.to(dtype), plain * 2)
    layer.pack()
    layer.train()
    layer.weight.requires_grad_(True)
    layer(torch.ones(1, 32)).sum().backward()
    assert layer.weight.grad is not None


def test_the_switch_of_onednn_survives_threads() -> None:
    weight, x = torch.randn(256, 256).bfloat16(), torch.randn(1, 256).bfloat16()
    expected = torch.nn.functional.linear(x.float(), weight.float())
    worst: list[float] = []

    def work() -> None:
        with torch.inference_mode():
            worst.extend((multiply(x, weight).float() - expected).abs().max().item() for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 800 and max(worst) < 0.5
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_normed_like_many(dtype: torch.dtype) -> None:
    norm = RMSNorm(96, 1e-5)
    torch.nn.init.normal_(norm.weight)
    norm.to(dtype)
    for scale in (1.0, 1e-3, 300.0):
        x = (torch.randn(3, 96) * scale).to(dtype)
        with torch.no_grad():
            many, alone = norm(x), torch.cat([norm(row[None]) for row in x])
        torch.testing.assert_close(alone, many, rtol=2**-7, atol=1e-6)


def test_the_configuration_reads_both_ways() -> None:
    config = ModelConfig({"vocab_size": 7})
    assert config.vocab_size == config["vocab_size"] == config.to_dict()["vocab_size"]
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = config.nothing_like_it
