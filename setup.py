"""Adds the compiled CPU kernels to the build that `pyproject.toml` describes; where they do not build, PyTorch serves.

In a checkout, `python setup.py build_ext --inplace` builds them anew.
"""

import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("src/unspool/kernels")
# No -march: each function names the instructions it needs, and is called where the processor has them. Sums of products
# are fused only where the code says so. What is switched off: what gcc says of vectors, and clang of loops it leaves.
FLAGS = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-g0"]
FLAGS += ["-Wextra", "-Wno-uninitialized", "-Wno-pass-failed"]


def checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


class Build(build_ext):
    """Compiles sources side by side, and names the library after no version of Python: it is plain C to its user."""

    def build_extensions(self) -> None:
        compile_some = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = pool.map(lambda source: compile_some([source], **options), sources)
                return [name for part in parts for name in part]

        self.compiler.compile = compile_all
        super().build_extensions()
        for extension in self.extensions:
            self.seal(Path(self.get_ext_fullpath(extension.name)))

    def seal(self, library: Path) -> None:
        """Add a checksum to its end, where ELF allows anything, by which `native.py` sees damage."""
        if sys.platform != "linux" or not library.exists():
            return
        content = library.read_bytes()
        if content[-4:] != checksum(content[:-4]):
            library.write_bytes(content + checksum(content))

    def get_ext_filename(self, fullname: str) -> str:
        return "/".join(fullname.split(".")) + ".so"


class Wheel(bdist_wheel):
    """One wheel for every Python on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "unspool.kernels._native",
            sources=sorted(map(str, KERNELS.glob("*.cpp"))),
            depends=sorted(map(str, KERNELS.glob("*.h"))),
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
