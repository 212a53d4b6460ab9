"""The compiled kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, under their own tests.

The compiler checks plain loads and stores and all copies; vector loads and stores under a mask it does not see.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_builds import SOURCES, compile_all, link_harness, package_with

from unspool.kernels import native

TESTS = Path(__file__).parent
FLAGS = ["-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

OVERFLOW = """
import torch
from unspool.kernels.attention import Plan
plan = Plan([16], [16], [[0]], 16)
plan._slots = 0  # what keeps it from smaller pools
x, pool = torch.ones(16, 1, 16), torch.zeros(8, 1, 16)
plan.attend(x, x, x, pool, pool.clone(), 1.0)
"""

pytestmark = [
    pytest.mark.skipif(not native.active(), reason=native.describe()),
    pytest.mark.skipif(platform.system() != "Linux", reason="loads the sanitizers as Linux does"),
    pytest.mark.skipif(not (SOURCES / "native.cpp").exists(), reason="needs the kernels' source"),
]


@pytest.fixture(scope="module")
def runtimes() -> list[str]:
    """The sanitizers' libraries."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in found):
        pytest.skip("g++ has no libasan or libubsan")
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="tries AVX2")
def test_the_kernels_for_avx2_without_python(runtimes: list[str], tmp_path: Path) -> None:
    """Enough for each day: one level, barely compiled; a buffer that is too short shows that the sanitizers look."""
    flags = ["-O0", *FLAGS[1:]]
    objects = compile_all("g++", flags, tmp_path, ("level_avx2.cpp", "linear.cpp", "quantised.cpp", "parallel.cpp"))
    program = link_harness("g++", flags, tmp_path, objects, "avx2_alone.cpp")
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([program, "avx2"], env=environment, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout) > 10**5
    done = subprocess.run([program, "avx2", "cut"], env=environment, capture_output=True, timeout=300, check=False)
    assert done.returncode != 0
    assert b"ERROR: AddressSanitizer" in done.stderr
    assert b"silu_gate" in done.stderr


@pytest.fixture(scope="module")
def sanitized(runtimes: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python whose unspool has the kernels with sanitizers in them."""
    return {
        **package_with(tmp_path_factory.mktemp("sanitized"), "g++", *FLAGS),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much behind at its end
    }


@pytest.mark.full
def test_the_kernels_touch_only_what_is_theirs(sanitized: dict[str, str]) -> None:
    files = ("_attention", "s", "s_draw", "s_lowrank", "s_program", "_levels")
    chosen = [str(TESTS / f"test_kernel{name}.py") for name in files]
    names = "definition or same_bits_alone_in_company_in_chunks_and or stored or norm or gate or turn or levels"
    names += " or greatest or each_row_alone_and_on_any_number_of_threads or its_operations_one_by_one or kernels_draw"
    quick = ["-q", "-x", "-m", "not full", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *quick, *chosen, "-k", names]
    done = subprocess.run(command, env=sanitized, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@pytest.mark.full
def test_the_sanitizer_sees_what_is_not(sanitized: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", OVERFLOW], env=sanitized, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
