"""Loads the compiled kernels and says whether they are in use, and why.

The library is loaded after torch, so that its OpenMP is the one that torch brought: two pools of threads in one process
would wait for each other's cores.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  (brings OpenMP)

__all__ = ["active", "describe", "function", "level", "library"]

logger = logging.getLogger(__name__)

# As `unspool_interface` in native.cpp.
_INTERFACE = 8
# Levels of native.cpp: instructions of x86 and of ARM processors.
_WORDS = {
    "avx2": "AVX2",
    "avx2-vnni": "AVX2 with VNNI",
    "avx512": "AVX-512",
    "avx512-bf16": "AVX-512 BF16",
    "amx": "AMX",
    "neon": "NEON",
    "dotprod": "NEON with dot products",
}


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    level: str | None
    words: str


def library() -> ctypes.CDLL | None:
    """The library, where it was built and runs here, and `UNSPOOL_KERNELS` is not 0 in the environment."""
    return _load().library


def active() -> bool:
    """Whether the kernels are in use."""
    return _load().level is not None


def level() -> str | None:
    """Which instructions the kernels use; `None` where they are not in use.

    One of `avx2`, `avx2-vnni`, `avx512` (with VNNI), `avx512-bf16`, `amx`; on ARM, `neon` and `dotprod`. It is the best
    that the processor has or, where it has that, the one that `UNSPOOL_KERNELS` names in the environment.
    """
    return _load().level


def describe() -> str:
    """In words, whether the kernels are in use, with which instructions, and why not with better ones or not at all."""
    return _load().words


def function(
    name: str, result: type[ctypes._SimpleCData[int]] | None, *arguments: type, alone: bool = False
) -> ctypes._NamedFuncPointer:
    """The C function `name` of the library, which must be there, with the types it gives and takes.

    `alone`: no other thread of Python runs meanwhile.
    """
    loaded = library()
    assert loaded is not None, describe()
    found = (ctypes.PyDLL(loaded._name, handle=loaded._handle) if alone else loaded)[name]
    found.restype, found.argtypes = result, arguments
    return found


@cache
def _load() -> _Loaded:
    loaded = _look()
    logger.info(loaded.words)
    return loaded


def _look() -> _Loaded:
    wanted = os.environ.get("UNSPOOL_KERNELS", "")
    if wanted == "0":
        return _off("UNSPOOL_KERNELS=0 turns them off")
    files = sorted(Path(__file__).parent.glob("_native*.so"))
    if not files:
        return _off("they were not built (a C++ compiler is needed when unspool is installed)")
    try:
        if not _whole(files[0]):
            return _off(f"{files[0].name} is damaged; install unspool anew")
        loaded = ctypes.CDLL(str(files[0]))
        interface = loaded.unspool_interface()
    except (OSError, AttributeError) as error:
        return _off(f"{files[0].name} does not load ({error})")
    if interface != _INTERFACE:
        return _off(f"{files[0].name} was built from another version of unspool; install unspool anew")
    for text in (loaded.unspool_level_name, loaded.unspool_level_lacks):
        text.restype = ctypes.c_char_p
    lacks = {
        loaded.unspool_level_name(index).decode(): loaded.unspool_level_lacks(index).decode()
        for index in range(loaded.unspool_levels())
    }
    if not lacks:
        return _off("there are none for this kind of processor")
    return _choose(loaded, lacks, wanted)


def _whole(file: Path) -> bool:
    """Whether a Linux library (ELF) is as it was built; loading another may end the process.

    Its list of sections, which the header points to, comes last; `setup.py` adds a checksum of all before. Tools that
    write the library anew leave that away.
    """
    content = file.read_bytes()
    if content[:5] != b"\x7fELF\x02":
        return sys.platform != "linux"
    if len(content) < 64:
        return False
    (start,), (size, count) = struct.unpack_from("<Q", content, 0x28), struct.unpack_from("<HH", content, 0x3A)
    end = start + size * count
    if end > len(content) or not any(content[start:end]):
        return False
    return len(content) == end or content[end:] == _checksum(content[:end])


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _choose(loaded: ctypes.CDLL, lacks: dict[str, str], wanted: str) -> _Loaded:
    """The level to use, of those that lack something or `""`, in ascending order."""
    names = list(lacks)
    usable = [name for name in names if not lacks[name]]
    if not usable:
        return _off(f"this machine lacks {lacks[names[0]]}")
    best = usable[-1]
    if wanted in usable:
        name, why = wanted, f"UNSPOOL_KERNELS={wanted}"
    elif wanted:
        reason = f"this machine lacks {lacks[wanted]}" if wanted in lacks else f"it may be 0, {', '.join(usable)}"
        name, why = best, f"UNSPOOL_KERNELS={wanted} is not used: {reason}"
        logger.warning(why)
    elif best == names[-1]:
        name, why = best, "the best of this kind of processor"
    else:
        name, why = best, f"this machine lacks {lacks[names[names.index(best) + 1]]}"
    loaded.unspool_choose(names.index(name))
    alone = "" if loaded.unspool_has_threads() else "; on one thread, for torch brought no OpenMP"
    return _Loaded(loaded, name, f"compiled kernels in use, {_WORDS[name]} ({why}){alone}")


def _off(reason: str) -> _Loaded:
    return _Loaded(None, None, f"compiled kernels not in use: {reason}")
