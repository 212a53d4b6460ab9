"""Quantised weights: codes kept bit for bit, products right and the same bits in any company, forms that move."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from unspool.kernels.quantised import PackedCodes, usable
from unspool.models.layers import quantised
from unspool.models.layers.linear import Linear
from unspool.models.layers.packed import exchange
from unspool.models.layers.quantised import FP4, INT4, INT8, NF4, Code, Codes, QuantisedForm, dequantise

CODES = [INT8, INT4, replace(INT4, group=32), replace(INT4, group=128, offsets=True), NF4, FP4]
names = st.sampled_from(CODES)
kernels = pytest.mark.skipif(not usable(), reason="the kernels are not in use on this machine")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def codes(code: Code, outputs: int, inputs: int, seed: int) -> Codes:
    draw = torch.Generator().manual_seed(seed)
    shape = (outputs, code.groups(inputs))
    values = torch.randint(0, 2**code.bits, (outputs, inputs), generator=draw, dtype=torch.uint8)
    # exact in fp16, around a power of two that differs between the outputs
    unit = 2.0 ** torch.randint(-12, 4, (outputs, 1), generator=draw)
    scales = (torch.rand(shape, generator=draw) + 0.5).half().float() * unit
    offsets = torch.randint(-8, 8, shape, generator=draw) / 4 * unit if code.offsets else None
    return Codes(values, scales, offsets)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def form(code: Code, rows: Codes, dtype: torch.dtype = torch.bfloat16) -> QuantisedForm:
    outputs, inputs = rows.codes.shape
    made = QuantisedForm(outputs, inputs, code, dtype)
    made.write(0, rows)
    return made


def assert_product(got: Tensor, x: Tensor, made: QuantisedForm, bias: Tensor | None) -> None:
    """`got` is the exact product of the dequantised weight, but for sums in fp32, the result's rounding, and with
    weights of eight bits that of activations to a 127th of the largest of 64."""
    weight = dequantise(made.code, made._read(slice(0, made.outputs))).double()
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.abs().T + 1e-6
    if made.code.offsets:
        size = size + x.double().abs() @ dequantise(made.code, made._read(slice(0, made.outputs))).double().abs().T * 20
    allowed = size * 1e-5 + exact.abs() * (2**-8 if got.dtype == torch.bfloat16 else 2**-15)
    if made.code.bits == 8 and made._packed is not None:
        groups = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 64)).view(len(x), -1, 64)
        step = groups.abs().amax(dim=2, keepdim=True).expand_as(groups).flatten(1)[:, : x.shape[1]] / 254
        allowed = allowed + step * 1.01 @ weight.abs().T
    assert got.dtype == x.dtype
    assert bool(((got.double() - exact).abs() <= allowed).all())


@kernels
@settings(max_examples=60, deadline=None)
@given(
    code=names,
    rows=st.integers(1, 40),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 300),
    bias=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(
    code: Code, rows: int, outputs: int, inputs: int, bias: bool, wide: bool, seed: int
) -> None:
    dtype = torch.float32 if wide else torch.bfloat16
    made, x = form(code, codes(code, outputs, inputs, seed)), normal(seed, rows, inputs).to(dtype)
    added = normal(seed + 1, outputs).to(dtype) if bias else None
    assert made._packed is not None
    got = made.product(x, added)
    assert_product(got, x, made, added)
    torch.set_num_threads(1 + seed % 5)
    alone = torch.cat([made.product(row[None], added) for row in x])
    assert torch.equal(got, alone)


@kernels
@pytest.mark.parametrize("code", [INT8, CODES[3]], ids=lambda code: f"{code.name}-{code.group}")
def test_every_number_of_rows_has_the_same_bits(code: Code) -> None:
    made, x = form(code, codes(code, 144, 576, 0)), normal(1, 50, 576).bfloat16()
    one = torch.cat([made.product(row[None]) for row in x])
    for rows in range(1, 51):
        assert torch.equal(made.product(x[:rows]), one[:rows])


@settings(max_examples=40, deadline=None)
@given(code=names, outputs=st.integers(1, 90), inputs=st.integers(1, 200), seed=st.integers(0, 99))
def test_codes_come_back_bit_for_bit(code: Code, outputs: int, inputs: int, seed: int) -> None:
    rows = codes(code, outputs, inputs, seed)
    made = QuantisedForm(outputs, inputs, code, torch.float32)
    cuts = sorted({0, outputs // 3, outputs // 2, outputs})
    for first, end in pairwise(cuts):
        part = Codes(*(None if value is None else value[first:end] for value in rows))
        made.write(first, part, threads=1)
    kept = made._read(slice(0, outputs))
    assert torch.equal(kept.codes, rows.codes)
    assert torch.equal(kept.scales, rows.scales)
    assert kept.offsets is rows.offsets or torch.equal(kept.offsets, rows.offsets)
    indexes = torch.randint(0, outputs, (5,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(made.rows(indexes), made.plain()[indexes])
    exact = dequantise(made.code, made._read(indexes))
    assert torch.equal(made.rows(indexes), exact.to(made.dtype))
    assert made._packed is None or torch.equal(made._packed.rows(indexes, torch.float32), exact)


@pytest.mark.parametrize("code", CODES, ids=lambda code: f"{code.name}-{code.group}")
def test_pytorch_gives_nearly_the_same(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, x = codes(code, 70, 192, 3), normal(4, 5, 192)
    made = form(code, rows, torch.float32)
    monkeypatch.setattr(quantised, "usable", lambda: False)
    monkeypatch.setattr(quantised, "_AT_ONCE", 192 * 16)  # several parts
    plain = form(code, rows, torch.float32)
    assert plain._packed is None
    assert torch.equal(plain.plain(), made.plain())
    assert_product(plain.product(x), x, plain, None)
    error = (plain.product(x) - made.product(x)).norm() / plain.product(x).norm()
    assert error < (0.01 if code.bits == 8 else 1e-3)
    half = plain.product(x.half())
    assert half.dtype == torch.float16
    with pytest.raises(IndexError):
        plain.rows(torch.tensor([70]))


@kernels
@pytest.mark.parametrize("code", [INT8, NF4], ids=lambda code: f"{code.name}-{code.group}")
def test_infinities_and_nan_stay_in_their_rows(code: Code) -> None:
    made, x = form(code, codes(code, 40, 128, 0)), normal(1, 20, 128).bfloat16()
    x[4, 9], x[6, 100] = float("nan"), float("inf")
    got = made.product(x)
    assert bool(got[4].isnan().all())
    assert not bool(got[6].isfinite().any())
    rest = [row for row in range(20) if row not in (4, 6)]
    assert bool(got[rest].isfinite().all())
    assert torch.equal(made.product(torch.zeros(2, 128).bfloat16()), torch.zeros(2, 40).bfloat16())


@kernels
def test_what_does_not_fit_is_refused() -> None:
    made = PackedCodes(48, 64, torch.tensor(NF4.table), 64)
    for x in (normal(1, 2, 62).bfloat16(), normal(1, 2, 64).half(), torch.empty(2, 64, device="meta")):
        with pytest.raises(ValueError, match="`x` must be bfloat16 or float32"):
            made.product(x)
    for bias in (normal(1, 47).bfloat16(), normal(1, 48), normal(1, 1, 48).bfloat16()):
        with pytest.raises(ValueError, match="`bias` must be"):
            made.product(normal(1, 2, 64).bfloat16(), bias)
    for index in (-1, 48):
        with pytest.raises(IndexError, match=f"holds {index}; .* lie in \\[0, 48\\)"):
            made.read(torch.tensor([0, index, 3]))
    zeros = torch.zeros(2, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows 47 to 49 are not of a weight"):
        made.write(47, zeros, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="this weight has 1 groups"):
        made.write(0, zeros, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="`codes` must be uint8"):
        made.write(0, zeros.int(), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="`table` must be"):
        PackedCodes(48, 128, torch.zeros(8), 64)
    for table, group in ((NF4.table, 48), (NF4.table, 0), (None, 64)):
        with pytest.raises(ValueError, match="has no packed layout"):
            PackedCodes(48, 128, None if table is None else torch.tensor(table), group)


def linear(code: Code) -> tuple[Linear, Tensor]:
    layer = Linear(64, 48, bias=True).bfloat16().requires_grad_(False)
    torch.nn.init.normal_(layer.bias)
    made = form(code, codes(code, 48, 64, 1))
    exchange([layer], made)
    return layer, made.plain()


def test_a_quantised_layer_stays_so_when_copied_moved_and_trained_around() -> None:
    layer, plain = linear(NF4)
    x = normal(1, 3, 64).bfloat16()
    with torch.inference_mode():
        before = layer(x)
    assert torch.equal(layer.state_dict()["weight"], plain)
    twin = copy.deepcopy(layer)
    again = pickle.loads(pickle.dumps(layer))
    layer.train()
    for each in (layer, twin, again, layer.eval().to("cpu")):
        assert isinstance(each._packed, QuantisedForm)
        with torch.inference_mode():
            assert torch.equal(each(x), before)
    wide = x.float().requires_grad_()
    layer.float()
    assert isinstance(layer._packed, QuantisedForm)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    layer(wide).sum().backward()
    assert wide.grad is not None
    assert torch.allclose(wide.grad, plain.float().sum(dim=0).expand(3, -1), rtol=0.02, atol=1.0)
    layer.requires_grad_(True)
    layer(wide).sum().backward()
    assert layer._packed is None
    assert layer.weight.grad is not None


def test_two_modules_share_a_quantised_weight() -> None:
    one, _ = linear(INT8)
    two = Linear(64, 48).bfloat16()
    made = form(INT8, codes(INT8, 48, 64, 1))
    exchange([one, two], made)
    both = torch.nn.ModuleList([one, two]).float()
    assert both[0]._packed is both[1]._packed
    assert both[0].weight is both[1].weight
    assert both[0].weight.dtype == torch.float32
    two.unpack()
    assert one._packed is None
    assert one.weight is two.weight
