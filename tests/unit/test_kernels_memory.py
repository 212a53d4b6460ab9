"""Memory of packed weights: zero, aligned, nobody else's, and given back."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from unspool.kernels.memory import reserve


def test_pieces_are_zero_aligned_and_apart() -> None:
    sizes = [1, 100, 4 << 10, 5001, 130_001, 3 << 20, 17 << 20, 40 << 20] * 2
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(reserve, sizes))
    for piece, size in zip(pieces, sizes, strict=True):
        assert piece.shape == (size,)
        assert piece.dtype == torch.uint8
        assert piece.data_ptr() % 64 == 0
        assert not piece.is_inference()
    places = sorted((piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in pieces)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    for number, piece in enumerate(pieces, 1):
        assert not piece[:: max(1, len(piece) // 1000)].any()
        piece[0] = piece[-1] = number
    assert [int(piece[0]) for piece in pieces] == list(range(1, len(pieces) + 1))


GIVEN_BACK = """
from pathlib import Path
from unspool.kernels.memory import reserve

def resident():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) >> 10

before = resident()
pieces = [reserve(size << 20).fill_(1) for size in (64, 8, 8, 8, 8, 8, 8, 8, 8)]
assert resident() > before + 120, (resident(), before)
pieces.clear()
assert resident() < before + 70, (resident(), before)  # the slab that is in use stays
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory as Linux tells it")
def test_memory_is_given_back() -> None:
    subprocess.run([sys.executable, "-c", GIVEN_BACK], check=True)
