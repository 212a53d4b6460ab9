"""bf16 products from one packed copy of the weight: right, the same bits in any company, and the plain weight kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from unspool.kernels.linear import PackedWeight, fits
from unspool.models.base import Model
from unspool.models.layers.linear import Linear
from unspool.models.registry import build

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 75,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 53,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}

pytestmark = pytest.mark.skipif(
    not fits(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="the kernels are not in use on this machine"
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_product(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`got` is the exact product, but for its rounding to bf16 and fp32 sums."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + 1
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= exact.abs() * 2**-8 + size * 1e-5).all())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 200),
    pairs=st.integers(1, 150),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(rows: int, outputs: int, pairs: int, bias: bool, seed: int) -> None:
    weight, x = normal(seed, outputs, 2 * pairs), normal(seed + 1, rows, 2 * pairs)
    added = normal(seed + 2, outputs) if bias else None
    assert_product(PackedWeight(weight).product(x, added), x, weight, added)


@pytest.mark.parametrize("rows", range(1, 71))
def test_every_number_of_rows_and_each_row_alone(rows: int) -> None:
    weight, x, bias = normal(0, 80, 70), normal(1, rows, 70), normal(2, 80)
    packed = PackedWeight(weight)
    together = packed.product(x, bias)
    assert_product(together, x, weight, bias)
    alone = torch.cat([packed.product(row[None], bias) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("inputs", [2046, 2048, 2050, 4098, 8192])
@pytest.mark.parametrize("rows", [1, 8, 30, 97, 120, 121, 230])
def test_wide_inputs_in_passes_and_blocks_of_rows(rows: int, inputs: int) -> None:
    weight, x = normal(0, 72, inputs), normal(1, rows, inputs)
    packed = PackedWeight(weight)
    together = packed.product(x)
    assert_product(together, x, weight, None)
    torch.set_num_threads(1)
    assert torch.equal(together, packed.product(x))
    some = torch.tensor([0, rows // 2, rows - 1])
    assert torch.equal(together[some], torch.cat([packed.product(x[i : i + 1]) for i in some.tolist()]))


def test_many_threads_on_a_small_weight() -> None:
    weight, x = normal(0, 64, 2048), normal(1, 5, 2048)
    torch.set_num_threads(7)
    assert_product(PackedWeight(weight).product(x), x, weight, None)


def test_inputs_in_other_layouts() -> None:
    weight, wide = normal(0, 48, 64), normal(1, 20, 131)
    packed = PackedWeight(weight.T.contiguous().T)
    for rows in (1, 3, 20):
        for x in (
            wide[:rows, 3:67],
            wide[:rows, ::2][:, :64],
            wide[:1, :64].expand(rows, -1),
            wide.T[:rows, :1].expand(-1, 64),
        ):
            assert_product(packed.product(x), x, weight, None)
    assert packed.product(wide[:0, :64]).shape == (0, 48)


def test_infinities_and_nan_stay_in_their_rows_and_outputs() -> None:
    weight, x = normal(0, 40, 64), normal(1, 30, 64)
    weight[7, 5], x[4, 9] = float("inf"), float("nan")
    got = PackedWeight(weight).product(x)
    assert bool(got[4].isnan().all())
    rest = [row for row in range(30) if row != 4]
    assert bool(got[rest, 7].isinf().all())
    assert bool(got[rest][:, [i for i in range(40) if i != 7]].isfinite().all())


@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 200), pairs=st.integers(1, 60), seed=st.integers(0, 99))
def test_plain_weight_and_its_rows_come_back_bit_for_bit(outputs: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (outputs, 2 * pairs), generator=generator).short()
    packed = PackedWeight(bits.view(torch.bfloat16))
    assert torch.equal(packed.plain().view(torch.int16), bits)
    indexes = torch.randint(0, outputs, (seed,), generator=generator)
    assert torch.equal(packed.rows(indexes).view(torch.int16), bits[indexes])
    assert torch.equal(packed.rows(indexes.int()).view(torch.int16), bits[indexes])


def test_what_does_not_fit_is_refused() -> None:
    packed = PackedWeight(normal(0, 48, 64))
    for x in (normal(1, 2, 62), normal(1, 2, 64).float(), torch.empty(2, 64, dtype=torch.bfloat16, device="meta")):
        with pytest.raises(ValueError, match="`x` must be bfloat16"):
            packed.product(x)
    for bias in (normal(1, 47), normal(1, 48).float(), normal(1, 1, 48)):
        with pytest.raises(ValueError, match="`bias` must be bfloat16"):
            packed.product(normal(1, 2, 64), bias)
    for index in (-1, 48):
        with pytest.raises(IndexError, match=f"holds {index}; .* lie in \\[0, 48\\)"):
            packed.rows(torch.tensor([0, index, 3]))
    with pytest.raises(ValueError, match="`indexes` must be"):
        packed.rows(torch.zeros(2, 2, dtype=torch.long))
    for weight in (normal(0, 4, 5), normal(0, 4, 4).float(), normal(0, 4), normal(0, 0, 4)):
        assert not fits(weight)
        with pytest.raises(ValueError, match="cannot be packed"):
            PackedWeight(weight)


def test_layers_use_it() -> None:
    layer = Linear(32, 48).bfloat16()
    torch.nn.init.normal_(layer.weight)
    layer.pack()
    assert isinstance(layer._packed, PackedWeight)
    odd = Linear(33, 48).bfloat16()
    torch.nn.init.normal_(odd.weight)
    plain, x = odd.weight.detach().clone(), normal(1, 3, 33)
    odd.pack()
    with torch.inference_mode():
        assert_product(odd(x), x, plain, None)


def tied(config: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    return build(config, dtype="bfloat16").requires_grad_(False).eval()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_tied_head_and_its_embedding_are_packed_once(config: dict[str, Any]) -> None:
    model = tied(config)
    assert model.lm_head.weight is model.embedding.weight
    ids = torch.randint(0, config["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids).logits
        model.pack()
        got = model(ids).logits
        alone = model(ids[1:2]).logits
    assert isinstance(model.embedding._packed, PackedWeight)
    assert model.lm_head._packed is model.embedding._packed
    assert model.lm_head.weight is model.embedding.weight
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.bfloat16
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02
    error = (alone.float() - got[1:2].float()).norm() / got[1:2].float().norm()
    assert error < 0.02


def test_a_packed_model_is_the_same_model() -> None:
    model = tied(LLAMA)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(10)[None]

    def packed() -> None:
        model.requires_grad_(False).pack()
        assert model.lm_head._packed is not None

    def still_packed() -> None:
        assert model.lm_head._packed is not None
        assert model.lm_head._packed is model.embedding._packed
        assert torch.equal(model.state_dict()["layers.0.mlp.down.weight"], plain["layers.0.mlp.down.weight"])

    def whole() -> None:
        assert model.lm_head._packed is None
        assert model.lm_head.weight is model.embedding.weight
        assert torch.equal(model.embedding.weight.bfloat16(), plain["embedding.weight"])

    packed()
    state = model.state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert state["lm_head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.embedding.weight
    assert torch.equal(twin(ids).logits, model(ids).logits)
    still_packed()
    twin.requires_grad_(True)
    assert twin.lm_head._packed is None and torch.equal(twin.lm_head.weight, plain["lm_head.weight"])
    assert twin.lm_head.weight is twin.embedding.weight
    still_packed()
    assert model.to("cpu").bfloat16() is model
    still_packed()
    assert torch.equal(model.to(torch.float32).embedding.weight, plain["embedding.weight"].float())
    whole()
    model.bfloat16()
    still_packed()
    model.load_state_dict(plain)
    still_packed()
    model.train()
    whole()
    model.eval()
    still_packed()
    model.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    assert model.embedding.weight.grad is not None
    whole()


def test_rows_written_in_any_parts_are_the_same_weight() -> None:
    for outputs, cuts in (
        (75, (0, 3, 17, 64, 75)),
        (64, (0, 64)),
        (33, (0, 32, 33)),
        (5, (0, 4, 5)),
        (32, (0, 16, 32)),
    ):
        weight = normal(outputs, outputs, 134)
        parts = list(pairwise(cuts))
        for order in (parts, parts[::-1]):
            packed = PackedWeight(weight.to("meta"))
            packed._memory.fill_(float("nan"))
            for first, end in order:
                packed.write(first, weight[first:end], threads=1 + first % 2)
            assert torch.equal(packed._memory.view(torch.int16), PackedWeight(weight)._memory.view(torch.int16))
    with pytest.raises(ValueError, match=r"rows 4 to 6 of shape \[2, 134\] are not of a weight \[5, 134\]"):
        PackedWeight(normal(0, 5, 134).to("meta")).write(4, normal(0, 2, 134))
    with pytest.raises(ValueError, match="`rows` must be bfloat16"):
        PackedWeight(normal(0, 5, 134).to("meta")).write(0, normal(0, 2, 134).float())
