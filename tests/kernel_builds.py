"""The kernels built in other ways than the package's own library: by another compiler, with sanitizers, emulated."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import unspool

PACKAGE = Path(unspool.__file__).parent
SOURCES = PACKAGE / "kernels"
NATIVE = Path(__file__).parent / "native"
FLAGS = ("-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fPIC")


def compile_all(compiler: str, flags: Iterable[str], folder: Path, names: Iterable[str] = ()) -> list[str]:
    """Object files of the kernels' sources, or of some of them, side by side."""

    def one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = [compiler, "-c", *FLAGS, *flags, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(target)

    sources = [SOURCES / name for name in names] or sorted(SOURCES.glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def link_harness(compiler: str, flags: Iterable[str], folder: Path, objects: Iterable[str], *more: str) -> str:
    """The program of `native/levels.cpp` with these object files, and more sources that lie beside it."""
    program = folder / "levels"
    sources = [str(NATIVE / name) for name in ("levels.cpp", *more)]
    command = [compiler, "-std=c++20", "-fopenmp", f"-I{SOURCES}", *flags, *sources, *objects, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return str(program)


def package_with(folder: Path, compiler: str, *flags: str) -> dict[str, str]:
    """The environment of a Python whose unspool has the kernels as `compiler` builds them with these flags."""
    package = folder / "unspool"
    package.mkdir()
    for part in PACKAGE.iterdir():
        if part.name != "kernels":
            (package / part.name).symlink_to(part)
    shutil.copytree(SOURCES, package / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    objects = compile_all(compiler, flags, folder)
    subprocess.run(
        [compiler, "-shared", *flags, *objects, "-o", str(package / "kernels" / "_native.so")], check=True, timeout=300
    )
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
