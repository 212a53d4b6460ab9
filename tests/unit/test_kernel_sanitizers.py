"""The compiled kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, under their own tests.

The compiler checks plain loads and stores and all copies; vector loads and stores under a mask it does not see.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_builds import SOURCES, package_with

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
    pytest.mark.full,
    pytest.mark.skipif(not native.active(), reason=native.describe()),
    pytest.mark.skipif(platform.system() != "Linux", reason="loads the sanitizers as Linux does"),
    pytest.mark.skipif(not (SOURCES / "native.cpp").exists(), reason="needs the kernels' source"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python whose unspool has the kernels with sanitizers in them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("g++ has no libasan or libubsan")
    return {
        **package_with(tmp_path_factory.mktemp("sanitized"), compiler, *FLAGS),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much behind at its end
    }


def test_the_kernels_touch_only_what_is_theirs(sanitized: dict[str, str]) -> None:
    chosen = [str(TESTS / f"test_kernel{name}.py") for name in ("_attention", "s", "s_lowrank", "_levels")]
    names = "definition or same_bits_alone_in_company_in_chunks_and or stored or norm or gate or turn or levels"
    names += " or each_row_alone_and_on_any_number_of_threads"
    quick = ["-q", "-x", "-m", "not full", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *quick, *chosen, "-k", names]
    done = subprocess.run(command, env=sanitized, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_the_sanitizer_sees_what_is_not(sanitized: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", OVERFLOW], env=sanitized, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
