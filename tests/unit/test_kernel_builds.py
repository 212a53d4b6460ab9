"""The kernels by every compiler and for other processors: by clang, for ARM in an emulator, AMX in plain C++."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kernel_builds import SOURCES, compile_all, link_harness, package_with

from unspool.kernels import native

TESTS = Path(__file__).parent
ARM_ROOT = Path("/usr/aarch64-linux-gnu")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(platform.machine() != "x86_64" or not native.active(), reason=native.describe()),
    pytest.mark.skipif(platform.system() != "Linux", reason="builds as on Linux"),
    pytest.mark.skipif(not (SOURCES / "native.cpp").exists(), reason="needs the kernels' source"),
]


def run_tests(environment: dict[str, str], *chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not full", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("compiler", ["g++", "clang++", "clang++-14"])
def test_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    quiet = ["-Wno-pass-failed"] if "clang" in compiler else ["-Wno-uninitialized"]
    environment = package_with(tmp_path, compiler, "-O3", "-Wall", "-Wextra", "-Werror", *quiet)
    run_tests(
        environment, *map(str, (TESTS / f"test_kernel{name}.py" for name in ("s", "s_draw", "_levels", "_attention")))
    )


def test_levels_that_this_machine_lacks(tmp_path: Path) -> None:
    """AMX in plain C++, and AVX-VNNI by the same instruction of AVX-512: right, and bytes with every level's bits."""
    if not native.level() or "avx512" not in native.level():
        pytest.skip("needs AVX-512")
    environment = package_with(tmp_path, "g++", "-O2", "-DUNSPOOL_EMULATE")
    code = "from unspool.kernels import native; print(native.level())"
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout == "amx\n"
    run_tests(environment, str(TESTS / "test_kernel_levels.py"), str(TESTS / "test_kernels_linear.py"))
    run_tests({**environment, "UNSPOOL_KERNELS": "avx2-vnni"}, str(TESTS / "test_kernels_quantised.py"))


def test_arm_in_an_emulator(tmp_path: Path) -> None:
    """NEON and its dot products give what AVX-512 without BF16 gives, which computes in the same order."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    if not native.level() or "avx512" not in native.level():
        pytest.skip("compares with AVX-512")
    out: dict[str, np.ndarray] = {}
    for machine, levels, run in (
        (compiler, ("neon", "dotprod"), [emulator, "-L", str(ARM_ROOT)]),
        ("g++", ("avx2", "avx512"), []),
    ):
        folder = tmp_path / Path(machine).name
        folder.mkdir()
        objects = compile_all(machine, ["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-uninitialized"], folder)
        program = link_harness(machine, ["-O1"], folder, objects)
        for level in levels:
            done = subprocess.run(
                [*run, program, level], capture_output=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "2"}
            )
            assert done.returncode == 0, done.stderr
            out[level] = np.frombuffer(done.stdout, dtype=np.float32)
    expected = out.pop("avx512")
    assert len(expected) > 10**5
    for level, got in out.items():
        np.testing.assert_allclose(got, expected, rtol=2**-7, atol=1e-5, err_msg=level)
        assert (got == expected).mean() > 0.85
