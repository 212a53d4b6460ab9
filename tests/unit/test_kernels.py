"""The compiled CPU kernels: right against PyTorch's operations, the same bits in any company, and never needed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from unspool.attention.native import NativeAttention
from unspool.attention.reference import PagedAttention
from unspool.attention.registry import paged_attention
from unspool.cache.layout import LayerGroup
from unspool.cache.paged import PagedStore
from unspool.kernels import elementwise, native
from unspool.kernels.attention import Plan

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(native.level() == 0, reason=native.describe())
floats = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _two_threads_without_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def python(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Attention ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)


@dataclass
class Case:
    """A store with rows of some lengths, in runs or scattered blocks; NaN where no row has stored anything."""

    store: PagedStore
    rows: list[Row]
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def make(
        cls,
        stored: list[int],
        seed: int,
        *,
        kv: int = 2,
        fold: int = 3,
        dim: int = 32,
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        scatter: bool = False,
    ) -> Case:
        group = LayerGroup((0,), kv, dim, window)
        blocks = sum(-(-(n + 1) // 16) for n in stored) + 2
        store = PagedStore((group,), blocks, dtype=dtype, device=torch.device("cpu"))
        free = list(range(blocks))
        if scatter:
            random.Random(seed).shuffle(free)
        rows = []
        store.keys[0].fill_(float("nan"))
        store.values[0].fill_(float("nan"))
        for i, n in enumerate(stored):
            table = [free.pop(0) for _ in range(-(-(n + 1) // 16))]
            rows.append(Row(n, [table]))
            slots = torch.tensor([table[p // 16] * 16 + p % 16 for p in range(n)], dtype=torch.int64)
            store.keys[0][slots] = normal(seed + 10 * i, n, kv, dim, dtype=dtype)
            store.values[0][slots] = normal(seed + 10 * i + 1, n, kv, dim, dtype=dtype)
        q, k, v = (
            torch.cat([normal(seed + 10 * i + j, 1, heads, dim, dtype=dtype) for i in range(len(rows))])
            for j, heads in ((2, kv * fold), (3, kv), (4, kv))
        )
        return cls(store, rows, q, k, v)

    def native(self, rows: list[int] | None = None, softcap: float | None = None) -> Tensor:
        """Answers of some rows in one step, by default of all."""
        rows = list(range(len(self.rows))) if rows is None else rows
        attend = NativeAttention(self.store, [self.rows[i] for i in rows], [1] * len(rows))
        return attend(0, self.q[rows], self.k[rows], self.v[rows], 0.2, softcap)

    def plain(self, row: int, window: int | None, softcap: float | None) -> Tensor:
        """The answer to one row by its definition, in fp64, from what is stored."""
        length = self.rows[row].computed + 1
        table = self.rows[row].blocks[0]
        begin = 0 if window is None else max(0, length - window)
        slots = [table[p // 16] * 16 + p % 16 for p in range(begin, length)]
        fold = self.q.shape[1] // self.k.shape[1]
        keys, values = (
            pool[0][slots].double().repeat_interleave(fold, dim=1) for pool in (self.store.keys, self.store.values)
        )
        scores = torch.einsum("hd,thd->ht", self.q[row].double(), keys) * 0.2
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values).flatten()


@compiled
@settings(max_examples=25, deadline=None)
@given(
    stored=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 600])), min_size=1, max_size=5),
    kv=st.integers(1, 3),
    fold=st.sampled_from([1, 2, 3, 4, 5, 8, 9]),
    dim=st.sampled_from([16, 32, 48, 64, 80, 128, 256]),
    dtype=floats,
    window=st.sampled_from([None, 1, 17, 300]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scatter=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rows_are_answered_by_the_definition(
    stored: list[int],
    kv: int,
    fold: int,
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    scatter: bool,
    seed: int,
) -> None:
    case = Case.make(stored, seed, kv=kv, fold=fold, dim=dim, dtype=dtype, window=window, scatter=scatter)
    out = case.native(softcap=softcap)
    assert out.shape == (len(stored), kv * fold * dim)
    assert out.dtype == dtype
    exact = torch.stack([case.plain(i, window, softcap) for i in range(len(stored))])
    torch.testing.assert_close(out.double(), exact, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5)


@compiled
@settings(max_examples=10, deadline=None)
@given(
    stored=st.lists(st.one_of(st.integers(0, 40), st.integers(200, 900)), min_size=2, max_size=6),
    fold=st.sampled_from([1, 3, 6]),
    dtype=floats,
    window=st.sampled_from([None, 100]),
    scatter=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rows_alone_in_company_and_on_any_threads_are_the_same_bits(
    stored: list[int], fold: int, dtype: torch.dtype, window: int | None, scatter: bool, seed: int
) -> None:
    case = Case.make(stored, seed, fold=fold, dtype=dtype, window=window, scatter=scatter)
    together = case.native()
    order = random.Random(seed).sample(range(len(stored)), k=len(stored))
    assert torch.equal(case.native(order), together[order])
    torch.set_num_threads(1)
    assert torch.equal(case.native(), together)
    torch.set_num_threads(2)
    for i in range(len(stored)):
        assert torch.equal(case.native([i]), together[i : i + 1])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_keys_and_values_are_stored_where_the_reference_stores_them(dtype: torch.dtype) -> None:
    case, other = (Case.make([0, 31, 15, 32], 5, dtype=dtype, scatter=True) for _ in range(2))
    case.native()
    PagedAttention(other.store, other.rows, [1] * 4)(0, other.q, other.k, other.v, 0.2)
    for ours, theirs in ((case.store.keys, other.store.keys), (case.store.values, other.store.values)):
        assert torch.equal(ours[0].nan_to_num(nan=-9.0), theirs[0].nan_to_num(nan=-9.0))


@compiled
@pytest.mark.parametrize("feeds", [[3, 1, 2, 1], [1, 4, 1, 1], [2, 2, 2, 2]])
def test_rows_with_one_query_beside_rows_with_several(feeds: list[int]) -> None:
    """A mixed step: each kind of row gets what it gets among its own kind, bit for bit."""
    stored = [20, 40, 7, 3]
    places = [range(sum(feeds[:i]), sum(feeds[: i + 1])) for i in range(4)]
    case = Case.make([n + feed for n, feed in zip(stored, feeds, strict=True)], 3)
    for row, n in zip(case.rows, stored, strict=True):
        row.computed = n
    q, k, v = (normal(seed, sum(feeds), heads, 32) for seed, heads in ((1, 6), (2, 2), (3, 2)))
    out = NativeAttention(case.store, case.rows, feeds)(0, q, k, v, 0.2)
    for row, feed, place in zip(case.rows, feeds, places, strict=True):
        kind = NativeAttention if feed == 1 else PagedAttention
        assert torch.equal(kind(case.store, [row], [feed])(0, q[place], k[place], v[place], 0.2), out[place])


@compiled
def test_heads_may_lie_apart_in_memory() -> None:
    case = Case.make([5, 300], 1)
    fused = torch.cat((case.q, case.k, case.v), dim=1)
    q, k, v = fused.split([6, 2, 2], dim=1)
    plain = case.native()
    assert torch.equal(NativeAttention(case.store, case.rows, [1, 1])(0, q, k, v, 0.2), plain)
    turned = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(NativeAttention(case.store, case.rows, [1, 1])(0, turned, k, v, 0.2), plain)


@compiled
def test_what_is_not_a_number_stays_with_its_row() -> None:
    case = Case.make([40, 300, 9], 2)
    clean = case.native()
    case.store.keys[0][case.rows[1].blocks[0][3] * 16 + 2] = float("nan")
    out = case.native()
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@compiled
def test_tensors_that_do_not_fit_are_refused() -> None:
    case = Case.make([5, 20], 0)
    plan = Plan([6, 21], [row.blocks[0] for row in case.rows], 16)
    q, k, v, keys, values = case.q, case.k, case.v, case.store.keys[0], case.store.values[0]
    wrong = [
        (q[:1], k[:1], v[:1], keys, values),
        (q[..., :16], k, v, keys, values),
        (q[:, :5], k, v, keys, values),
        (q, k[:, :1], v, keys, values),
        (q, k, v[:1], keys, values),
        (q.bfloat16(), k, v, keys, values),
        (q, k, v, keys[:32], values[:32]),
        (q, k, v, keys, values[:48]),
        (q, k, v, keys.transpose(0, 1).contiguous().transpose(0, 1), values),
        *[tuple(x.half() for x in (q, k, v, keys, values))],
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="cannot take"):
            plan.attend(*tensors, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        Plan([33], [[0, 1]], 16)
    with pytest.raises(ValueError, match="counted from 0"):
        Plan([33], [[0, 1, -2]], 16)
    assert torch.equal(plan.attend(q, k, v, keys, values, 0.2), case.native())


@compiled
def test_the_backend_is_chosen_by_what_it_can_do() -> None:
    def chosen(dtype: torch.dtype = torch.float32, dim: int = 32, weights: list[list[Tensor]] | None = None) -> type:
        group = LayerGroup((0,), 1, dim)
        store = PagedStore((group,), 2, dtype=dtype, device=torch.device("cpu"))
        return type(paged_attention(store, [Row(0, [[0]])], [1], weights))

    assert chosen() is NativeAttention
    assert chosen(torch.bfloat16) is NativeAttention
    assert chosen(torch.float16) is PagedAttention
    assert chosen(dim=24) is PagedAttention
    assert chosen(weights=[]) is PagedAttention
    with torch.enable_grad():
        assert chosen() is PagedAttention


# ---- Elementwise ----------------------------------------------------------------------------------------------------


def assert_one_rounding_apart(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2**-7 if got.dtype == torch.bfloat16 else 2e-6, atol=1e-7)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers' Llama rounds it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 700), dtype=floats, seed=st.integers(0, 10**6))
def test_norm_of_a_sum(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, branch = normal(seed, rows, width, dtype=dtype), normal(seed + 1, rows, width, dtype=dtype)
    weight = normal(seed + 2, width, dtype=dtype)
    assert_one_rounding_apart(elementwise.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    before, total = x.clone(), x + branch
    got, normed = elementwise.add_rms_norm(x, branch, weight, 1e-5)
    assert torch.equal(x, before)
    assert torch.equal(got, total)
    assert got.data_ptr() == branch.data_ptr(), "the sum costs no memory"
    assert_one_rounding_apart(normed, rms_norm(total, weight, 1e-5))
    if native.level():
        torch.set_num_threads(1)
        assert torch.equal(elementwise.rms_norm(total[:1], weight, 1e-5), normed[:1])
        torch.set_num_threads(2)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 700), dtype=floats, seed=st.integers(0, 10**6))
def test_gate(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x = 8 * normal(seed, rows, 2 * width, dtype=dtype)
    assert_one_rounding_apart(elementwise.silu_gate(x), F.silu(x[:, :width]) * x[:, width:])


def test_gate_at_the_ends_of_the_numbers() -> None:
    x = torch.tensor([-1e30, -104.0, -88.0, -0.0, 0.0, 88.0, 1e30, float("inf"), float("nan"), float("-inf")])
    got = elementwise.silu_gate(torch.cat((x, torch.ones(10))).view(1, -1))[0]
    torch.testing.assert_close(got, F.silu(x), equal_nan=True, rtol=1e-6, atol=1e-35)


@compiled
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 30),
    heads=st.integers(1, 12),
    half=st.integers(1, 40),
    more=st.integers(0, 20),
    dtype=floats,
    seed=st.integers(0, 10**6),
)
def test_turn(tokens: int, heads: int, half: int, more: int, dtype: torch.dtype, seed: int) -> None:
    """In place, for some of the heads of a fused projection and some of the numbers of a head, rounded step by step."""
    width, dim = 2 * half, 2 * half + more
    fused = normal(seed, tokens, heads + 2, dim, dtype=dtype)
    cos, sin = (normal(seed + i, tokens, 1, width, dtype=dtype) for i in (1, 2))
    x = fused[:, :heads, :width]
    expected = fused.clone()
    expected[:, :heads, :width] = x * cos + x.roll(half, -1) * sin
    out = elementwise.turn(fused[:, :heads], cos, sin)
    assert out.data_ptr() == fused.data_ptr()
    assert torch.equal(fused, expected)


def test_gradients_pass() -> None:
    """Training goes through the same functions."""
    with torch.enable_grad():
        x = normal(0, 3, 8).requires_grad_()
        weight = torch.ones(8, requires_grad=True)
        total, normed = elementwise.add_rms_norm(x, normal(1, 3, 8), weight, 1e-5)
        cos, sin = normal(2, 3, 1, 4), normal(3, 3, 1, 4)
        turned = elementwise.turn(elementwise.rms_norm(total, weight, 1e-5).view(3, 2, 4), cos, sin)
        (elementwise.silu_gate(normed).sum() + turned.sum()).backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().min() > 0


# ---- The library ----------------------------------------------------------------------------------------------------

STORY = """
import sys
import torch
import unspool
from unspool.kernels import native
model, _ = unspool.load(sys.argv[1], dtype=sys.argv[2], device="cpu")
ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
print(native.level())
print(model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=20, do_sample=False, eos_token_id=None))
"""


@compiled
def test_text_is_the_same_without_the_kernels(tiny_llama_dir: Path) -> None:
    level, ours = python(STORY, str(tiny_llama_dir), "float32").split("\n", 1)
    off, plain = python(STORY, str(tiny_llama_dir), "float32", UNSPOOL_KERNELS="0").split("\n", 1)
    assert (int(level), int(off)) == (native.level(), 0)
    assert ours == plain


def test_says_whether_the_kernels_are_in_use_and_why() -> None:
    assert native.describe().startswith("compiled kernels " + ("in use" if native.level() else "not in use"))
    assert (native.library() is None) == (native.level() == 0)
    code = "from unspool.kernels import native; print(native.level(), native.library(), native.describe())"
    assert python(code, UNSPOOL_KERNELS="0") == (
        "0 None compiled kernels not in use: UNSPOOL_KERNELS=0 turns them off\n"
    )


@compiled
@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_damaged_library_is_not_used(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_native.so").write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    found = native._load.__wrapped__()
    assert found.library is None
    assert "does not load" in found.words
    (tmp_path / "_native.so").unlink()
    assert "not built" in native._load.__wrapped__().words


@compiled
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INTERFACE", -1)
    found = native._load.__wrapped__()
    assert found.library is None
    assert "install unspool anew" in found.words


@compiled
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's map of the memory")
def test_torch_brings_the_only_openmp() -> None:
    code = """
import torch
def openmp():
    return sorted({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]})
before = openmp()
from unspool.kernels import elementwise
with torch.no_grad():
    elementwise.silu_gate(torch.ones(512, 512))
print(before == openmp(), len(before))
"""
    assert python(code) == "True 1\n"


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_installs_without_a_compiler(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
