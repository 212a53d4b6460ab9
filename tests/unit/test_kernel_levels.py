"""Every level of the kernels that this machine can run: right, the same bits in any company, every family on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, make_checkpoint
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import unspool
from unspool.attention import registry
from unspool.attention.native import NativeAttention
from unspool.kernels import elementwise, lowrank, native
from unspool.kernels.attention import Plan
from unspool.kernels.encode import encode
from unspool.kernels.linear import PackedWeight
from unspool.models.layers.linear import Linear
from unspool.models.layers.quantised import INT4, INT8, NF4, Code, Codes, QuantisedForm, dequantise
from unspool.weights import save_model

TESTS = Path(__file__).parent


def usable() -> dict[str, int]:
    """The levels that this machine can run, and their numbers."""
    library = native.library()
    if library is None:
        return {}
    names = (library.unspool_level_name(index).decode() for index in range(library.unspool_levels()))
    return {name: index for index, name in enumerate(names) if not library.unspool_level_lacks(index)}


LEVELS = usable()
pytestmark = pytest.mark.skipif(not native.active(), reason=native.describe())


def choose(name: str) -> None:
    library = native.library()
    assert library is not None
    library.unspool_choose(LEVELS[name])


@pytest.fixture(autouse=True)
def _two_threads_without_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)
    if (name := native.level()) is not None:
        choose(name)


@pytest.fixture(params=LEVELS or [pytest.param("none", marks=pytest.mark.skip)])
def level(request: pytest.FixtureRequest) -> str:
    choose(request.param)
    return str(request.param)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- Kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs"), [(80, 70), (144, 2), (32, 1100), (7, 6)])
def test_bf16_products(level: str, outputs: int, inputs: int) -> None:
    weight, bias = normal(0, outputs, inputs).bfloat16(), normal(2, outputs).bfloat16()
    packed = PackedWeight(weight)
    x = normal(1, 130, inputs).bfloat16()
    exact, size = x.double() @ weight.double().T + bias.double(), x.double().abs() @ weight.double().abs().T + 1
    alone = torch.cat([packed.product(row[None], bias) for row in x])
    assert bool(((alone.double() - exact).abs() <= exact.abs() * 2**-8 + size * 1e-5).all())
    for rows in (*range(1, 28), 32, 33, 47, 130):
        torch.set_num_threads(1 + rows % 3)
        assert torch.equal(packed.product(x[:rows], bias), alone[:rows])
    apart = torch.cat((x, x), dim=1)[:50, inputs:]
    assert torch.equal(packed.product(apart, bias), alone[:50])


@pytest.mark.parametrize("code", [INT8, INT4, NF4], ids=lambda code: code.name)
@pytest.mark.parametrize(("outputs", "inputs"), [(80, 200), (33, 64)])
def test_quantised_products(level: str, code: Code, outputs: int, inputs: int) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2**code.bits, (outputs, inputs), generator=draw, dtype=torch.uint8)
    scales = torch.rand((outputs, code.groups(inputs)), generator=draw) + 0.5
    form = QuantisedForm(outputs, inputs, code, torch.bfloat16)
    form.write(0, Codes(values, scales.half().float(), None))
    x, bias = normal(1, 60, inputs).bfloat16(), normal(2, outputs).bfloat16()
    alone = torch.cat([form.product(row[None], bias) for row in x])
    for rows in (*range(1, 28), 60):
        torch.set_num_threads(1 + rows % 3)
        assert torch.equal(form.product(x[:rows], bias), alone[:rows])
    plain = dequantise(code, form._read(slice(0, outputs))).float()
    exact = x.float() @ plain.T + bias.float()
    assert (alone.float() - exact).norm() < (0.02 if code.bits == 8 else 0.005) * exact.norm()
    wide = form.product(x.float(), bias.float())
    assert (wide - exact).norm() < (0.02 if code.bits == 8 else 1e-4) * exact.norm()
    if code.bits == 8:  # sums of integers: no level differs
        choose(next(iter(LEVELS)))
        assert torch.equal(form.product(x, bias), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("dim", "window", "softcap"), [(64, None, None), (80, 100, None), (16, None, 5.0)])
def test_attention(level: str, dtype: torch.dtype, dim: int, window: int | None, softcap: float | None) -> None:
    lengths, feeds, kv, heads = [300, 40, 270, 1], [1, 40, 30, 1], 2, 6
    tables = [list(range(first, first + 19)) for first in (19, 0, 38, 57)]
    pools = [normal(seed, 80 * 16, kv, dim, dtype=dtype) for seed in (0, 1)]
    new = [normal(2 + i, sum(feeds), n, dim, dtype=dtype) for i, n in enumerate((heads, kv, kv))]

    def answer(rows: list[int], parts: list[slice]) -> Tensor:
        """Of some of the new tokens of each row."""
        plan = Plan(
            [lengths[i] - feeds[i] + part.stop for i, part in zip(rows, parts, strict=True)],
            [part.stop - part.start for part in parts], [tables[i] for i in rows], 16, window,
        )  # fmt: skip
        starts = [sum(feeds[:i]) for i in rows]
        cut = [
            torch.cat([x[s + p.start : s + p.stop] for s, p in zip(starts, parts, strict=True)]).contiguous()
            for x in new
        ]
        return plan.attend(*cut, *pools, 0.2, softcap).view(-1, heads, dim)

    whole = [slice(0, feed) for feed in feeds]
    together = answer([0, 1, 2, 3], whole).split(feeds)
    for row, out in enumerate(together):
        torch.set_num_threads(1 + row % 2)
        assert torch.equal(answer([row], [whole[row]]), out)
        cuts = [slice(i, min(i + 7, feeds[row])) for i in range(0, feeds[row], 7)]
        assert torch.equal(torch.cat([answer([row], [cut]) for cut in cuts]), out)
        slots = torch.tensor(tables[row])[torch.arange(lengths[row]) // 16] * 16 + torch.arange(lengths[row]) % 16
        k, v = (pool[slots].double().repeat_interleave(heads // kv, dim=1) for pool in pools)
        q = new[0][sum(feeds[:row]) : sum(feeds[: row + 1])].double()
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.2
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        ago = torch.arange(lengths[row] - feeds[row], lengths[row])[:, None] - torch.arange(lengths[row])
        scores.masked_fill_((ago < 0) | (ago >= (window or 10**6)), float("-inf"))
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        coarse = dtype == torch.bfloat16
        torch.testing.assert_close(
            out.double(), expected, rtol=2**-7 if coarse else 1e-5, atol=1e-2 if coarse else 1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_stands_between_products(level: str, dtype: torch.dtype) -> None:
    close = {"rtol": 2**-7 if dtype == torch.bfloat16 else 2e-6, "atol": 1e-6}
    for width in (5, 64, 77):
        x, weight = normal(0, 9, width, dtype=dtype), normal(1, width, dtype=dtype)
        normed = elementwise.rms_norm(x, weight, 1e-5)
        wide = x.float()
        expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
        torch.testing.assert_close(normed, expected, **close)
        assert torch.equal(elementwise.rms_norm(x[3:4], weight, 1e-5), normed[3:4])
        total, after = elementwise.add_rms_norm(x, x.clone(), weight, 1e-5)
        assert torch.equal(total, x + x)
        torch.testing.assert_close(after, elementwise.rms_norm(total, weight, 1e-5), rtol=0, atol=0)
        gate = 8 * normal(2, 9, 2 * width, dtype=dtype)
        gate[0, :5] = torch.tensor([-1e30, -104.0, 88.0, float("inf"), float("nan")])
        both = F.silu(gate[:, :width]) * gate[:, width:]
        torch.testing.assert_close(elementwise.silu_gate(gate), both, **close, equal_nan=True)
        heads = normal(3, 9, 2, 2 * width, dtype=dtype)
        cos, sin = (normal(seed, 9, 1, 2 * width, dtype=dtype) for seed in (4, 5))
        turned = heads * cos + heads.roll(width, -1) * sin
        assert torch.equal(elementwise.turn(heads, cos, sin), turned)


def test_quantising(level: str) -> None:
    rows = normal(0, 20, 100, dtype=torch.bfloat16)
    codes, scales = encode(rows, 100, 8, None, None)
    expected = (rows.float() / (rows.float().abs().amax(1, keepdim=True) / 127)).round() + 128
    assert torch.equal(codes.float(), expected)
    assert torch.equal(scales, rows.float().abs().amax(1, keepdim=True) / 127)
    codes, scales = encode(rows, 32, 4, None, None)
    back = (codes.float() - 8) * scales.repeat_interleave(32, dim=1)[:, :100]
    assert (back - rows.float()).norm() < 0.12 * rows.float().norm()


# ---- Models ---------------------------------------------------------------------------------------------------------


def logits(model: Any, rows: Tensor, **settings: Any) -> Tensor:
    """`[rows, 4, vocab]`, of four greedy steps."""
    settings |= {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(rows, attention_mask=torch.ones_like(rows), eos_token_id=None, **settings)
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_on_the_kernels(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products and all attention, with logits near those of fp32 and the same bits alone and in company."""
    theirs = make_checkpoint(family, tmp_path)
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    used: list[type] = []
    monkeypatch.setattr(
        registry, "NativeAttention", lambda *args: used.append(NativeAttention) or NativeAttention(*args)
    )
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    expected = theirs.bfloat16().float()(ids).logits
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert linears
    assert all(isinstance(module._packed, PackedWeight) for module in linears)

    for name in LEVELS:
        choose(name)
        together = logits(model, ids)
        assert used
        used.clear()
        error = (together[:, 0].float() - expected[:, -1]).norm() / expected[:, -1].norm()
        assert error < 0.06, name
        assert torch.equal(logits(model, ids[1:]), together[1:])


# What `quantize=` takes; the first two have a head of eight bits, the last one of four.
QUANTISED: list[Any] = [
    "int8",
    "int4",
    unspool.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[]),
]


def quantised_families() -> list[Any]:
    """Every family in every code, with a head of its own and without; in the quick tests each of these six once."""
    cases = []
    for turn, family in enumerate(FAMILIES):
        for number, (quantize, tied) in enumerate(product(QUANTISED, (False, True))):
            name = f"{family}-{quantize if isinstance(quantize, str) else 'nf4'}-{'tied' if tied else 'apart'}"
            marks = () if turn == 3 * number else pytest.mark.full
            cases.append(pytest.param(family, quantize, tied, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(("family", "quantize", "tied"), quantised_families())
def test_every_family_quantised(family: str, quantize: Any, tied: bool, tmp_path: Path) -> None:
    """Against transformers with the weights that the codes stand for; the same bits alone and in company."""
    make_checkpoint(family, tmp_path / "plain", tie_word_embeddings=tied)
    shutil.copy(Path(unspool.__file__).parent / "assets" / "storyteller" / "tokenizer.json", tmp_path / "plain")
    model, _ = unspool.load(tmp_path / "plain", dtype="bfloat16", quantize=quantize)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert all(isinstance(module._packed, QuantisedForm) for module in linears)
    assert model.lm_head._packed.code == (NF4 if quantize is QUANTISED[2] else INT8)
    assert (model.embedding._packed is model.lm_head._packed) == tied
    save_model(model, tmp_path / "codes")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits[:, -1]
    for name in LEVELS:
        choose(name)
        together = logits(model, ids)
        assert (together[:, 0].float() - expected).norm() < 0.06 * expected.norm(), name
        assert torch.equal(logits(model, ids[1:]), together[1:])


def test_adapters_where_pytorch_multiplies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low-rank products have kernels with BF16 instructions only: below, rows of a batch get their adapters as well."""
    names = ["pirate", None, "pirate"]
    ids = torch.randint(3, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    exact = unspool.AutoModelForCausalLM.from_pretrained("storyteller", dtype="float32")
    exact.load_adapter("storyteller-pirate", "pirate")
    expected = logits(exact, ids, adapter_names=names)[:, 0]
    assert (expected - logits(exact, ids)[:, 0])[1].norm() > 0.1 * expected[1].norm()
    monkeypatch.setattr(lowrank, "_function", lambda: None)
    model = unspool.AutoModelForCausalLM.from_pretrained("storyteller", dtype="bfloat16")
    model.load_adapter("storyteller-pirate", "pirate")
    for name in LEVELS:
        choose(name)
        found = logits(model, ids, adapter_names=names)[:, 0].float()
        assert bool(((found - expected).norm(dim=1) < 0.06 * expected.norm(dim=1)).all()), name


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in LEVELS if name != native.level()])
def test_all_tests_of_the_kernels(name: str) -> None:
    files = [str(path) for path in TESTS.glob("test_kernel*.py") if path.stem[12:] not in ("_levels", "_sanitizers")]
    assert len(files) >= 4
    files += [str(TESTS / "test_adapters.py"), str(TESTS.parent / "parity" / "test_ragged.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not full", "-p", "no:cacheprovider", *files],
        env={**os.environ, "UNSPOOL_KERNELS": name}, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
