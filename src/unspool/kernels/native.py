"""Loads the compiled kernels and says whether they are in use, and why.

The library is loaded after torch, so that its OpenMP is the one that torch brought: two pools of threads in one process
would wait for each other's cores.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  (brings OpenMP)

__all__ = ["describe", "function", "level", "library"]

logger = logging.getLogger(__name__)

# As `unspool_interface` in native.cpp.
_INTERFACE = 3
_LEVELS = ("none", "AVX-512", "AVX-512 BF16")


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    level: int
    words: str


def library() -> ctypes.CDLL | None:
    """The library, where it was built and runs here, and `UNSPOOL_KERNELS` is not 0 in the environment."""
    return _load().library


def level() -> int:
    """Which instructions the kernels use: 0 the kernels are not in use, 1 AVX-512, 2 and AVX-512 BF16."""
    return _load().level


def describe() -> str:
    """In words, whether the kernels are in use and with which instructions, or why they are not."""
    return _load().words


def function(name: str, result: type[ctypes._SimpleCData[int]] | None, *arguments: type) -> ctypes._NamedFuncPointer:
    """The C function `name` of the library, which must be there, with the types it gives and takes."""
    loaded = library()
    assert loaded is not None, describe()
    found = loaded[name]
    found.restype, found.argtypes = result, arguments
    return found


@cache
def _load() -> _Loaded:
    loaded = _look()
    logger.info(loaded.words)
    return loaded


def _look() -> _Loaded:
    if os.environ.get("UNSPOOL_KERNELS") == "0":
        return _off("UNSPOOL_KERNELS=0 turns them off")
    files = sorted(Path(__file__).parent.glob("_native*.so"))
    if not files:
        return _off("they were not built (a C++ compiler is needed when unspool is installed)")
    try:
        loaded = ctypes.CDLL(str(files[0]))
        interface, reached = loaded.unspool_interface(), loaded.unspool_level()
    except (OSError, AttributeError) as error:
        return _off(f"{files[0].name} does not load ({error})")
    if interface != _INTERFACE:
        return _off(f"{files[0].name} was built from another version of unspool; install unspool anew")
    if reached == 0:
        return _off("this processor lacks AVX-512")
    return _Loaded(loaded, reached, f"compiled kernels in use, {_LEVELS[reached]}")


def _off(reason: str) -> _Loaded:
    return _Loaded(None, 0, f"compiled kernels not in use: {reason}")
