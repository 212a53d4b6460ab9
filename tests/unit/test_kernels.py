"""The compiled CPU kernels: right against PyTorch's operations, the same bits in any company, and never needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from unspool.kernels import elementwise, native

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(not native.active(), reason=native.describe())
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


@compiled
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 2100),
    dtype=floats,
    seed=st.integers(0, 99),
    odd=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
)
def test_greatest_and_its_share(rows: int, width: int, dtype: torch.dtype, seed: int, odd: float | None) -> None:
    x = (4 * normal(seed, rows, width)).round().to(dtype)  # so that some are equal
    if odd is not None:
        x[seed % rows, seed % width] = odd
    if odd == float("-inf"):
        x[seed % rows] = odd
    found = elementwise.greatest(x, shares=True)
    assert found is not None
    places, shares = found
    assert shares is not None
    for row, place, share in zip(x.float(), places.tolist(), shares.tolist(), strict=True):
        if bool(row.isnan().any()) or float(row.max()) == float("-inf"):
            assert place == -1
            continue
        assert place == row.tolist().index(row.max().item())
        if float(row.max()) < float("inf"):
            assert share == pytest.approx(row.double().softmax(0)[place].item(), rel=1e-5)
    assert torch.equal(elementwise.greatest(x)[0], places)  # type: ignore[index]


@compiled
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
    assert (level, off) == (native.level(), "None")
    assert ours == plain


def test_says_whether_the_kernels_are_in_use_and_why() -> None:
    assert native.describe().startswith("compiled kernels " + ("in use" if native.level() else "not in use"))
    assert (native.library() is None) == (native.level() is None)
    code = "from unspool.kernels import native; print(native.level(), native.library(), native.describe())"
    assert python(code, UNSPOOL_KERNELS="0") == (
        "None None compiled kernels not in use: UNSPOOL_KERNELS=0 turns them off\n"
    )


@compiled
@pytest.mark.parametrize("kept", [None, 0, 40, 5000, 0.5, 0.99])
def test_a_damaged_library_is_not_used(kept: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is none, or of which only the first bytes or a part are there."""
    whole = next(Path(native.__file__).parent.glob("_native*.so")).read_bytes()
    part = b"not a library" if kept is None else whole[: int(kept if kept > 1 else kept * len(whole))]
    (tmp_path / "_native.so").write_bytes(part)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    found = native._load.__wrapped__()
    assert found.library is None
    assert found.words == "compiled kernels not in use: _native.so is damaged; install unspool anew"
    (tmp_path / "_native.so").unlink()
    (tmp_path / "_native.so").mkdir()
    assert "_native.so does not load (" in native._load.__wrapped__().words
    (tmp_path / "_native.so").rmdir()
    assert "not built" in native._load.__wrapped__().words


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' libraries have no checksum")
@pytest.mark.parametrize("place", [0.0005, 0.2, 0.5, 0.9, 1.0])
def test_zeros_in_a_library_are_noticed(place: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(Path(native.__file__).parent.glob("_native*.so")).read_bytes()
    if native._checksum(whole[:-4]) != whole[-4:]:  # as the tests build it
        whole += native._checksum(whole)
    content = bytearray(whole)
    first = int(place * (len(content) - 4096))
    content[first : first + 4096] = bytes(4096)
    (tmp_path / "_native.so").write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    found = native._load.__wrapped__()
    assert found.library is None
    assert found.words == "compiled kernels not in use: _native.so is damaged; install unspool anew"


@compiled
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INTERFACE", -1)
    found = native._load.__wrapped__()
    assert found.library is None
    assert "install unspool anew" in found.words


class Machine:
    """Stands for a library on some machine."""

    def __init__(self) -> None:
        self.chosen: int | None = None

    def unspool_choose(self, index: int) -> None:
        self.chosen = index

    def unspool_has_threads(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("lacks", "wanted", "level", "why"),
    [
        (["", "", ""], "", "amx", "the best of this kind of processor"),
        (["", "", "AMX"], "", "avx512", "this machine lacks AMX"),
        (["", "", "the operating system's permission for AMX"], "", "avx512", "the operating system's permission"),
        (
            ["", "", "AMX that computes right"],
            "amx",
            "avx512",
            "UNSPOOL_KERNELS=amx is not used: this machine lacks",
        ),
        (["", "AVX-512 VNNI", "AVX-512 VNNI"], "", "avx2", "this machine lacks AVX-512 VNNI"),
        (["", "", "AMX"], "avx2", "avx2", "UNSPOOL_KERNELS=avx2"),
        (["", "", "AMX"], "sse", "avx512", "UNSPOOL_KERNELS=sse is not used: it may be 0, avx2, avx512"),
        (["AVX2", "AVX2", "AVX2"], "", None, "this machine lacks AVX2"),
    ],
)
def test_the_level_is_what_the_machine_has(lacks: list[str], wanted: str, level: str | None, why: str) -> None:
    """Also an old processor, and a hypervisor that hides what there is."""
    machine = Machine()
    found = native._choose(machine, dict(zip(("avx2", "avx512", "amx"), lacks, strict=True)), wanted)  # type: ignore[arg-type]
    assert found.level == level
    assert why in found.words
    assert machine.chosen == {"avx2": 0, "avx512": 1, "amx": 2, None: None}[level]
    assert (found.library is None) == (level is None)


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


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_threads_ran_computes_the_same() -> None:
    """The child has none of the parent's threads, for which OpenMP would wait for ever."""
    code = """
import os, signal, warnings
import torch
from unspool.kernels import elementwise
torch.set_num_threads(2)
x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected = elementwise.silu_gate(x)
    warnings.simplefilter("ignore")  # Python's own, of a fork beside threads
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(int(elementwise.silu_gate(x).numpy().tobytes() != expected.numpy().tobytes()))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == "0\n"


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


def test_what_is_in_use_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="unspool.kernels.native"):
        found = native._load.__wrapped__()
    assert caplog.messages == [found.words]
