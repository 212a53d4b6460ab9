"""Products of a few rows with weights in PyTorch's own layout: right, the same bits in any company, refused else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from unspool.kernels.plain import product, usable

compiled = pytest.mark.skipif(not usable(), reason="no AVX-512 BF16 kernels here")


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


def weight(outputs: int, inputs: int) -> nn.Parameter:
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
    return nn.Parameter(values.bfloat16(), requires_grad=False)


def activations(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()


@compiled
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 32), (33, 70), (50, 576), (192, 31)])
@pytest.mark.parametrize("biased", [False, True])
def test_products(outputs: int, inputs: int, biased: bool) -> None:
    w = weight(outputs, inputs)
    bias = torch.linspace(-3, 3, outputs).bfloat16() if biased else None
    alone = []
    every = activations(12, inputs)
    for rows in range(1, 13):
        x = every[:rows].contiguous()
        found = product(x, w, bias)
        assert found is not None
        expected = x.double() @ w.double().t() + (0 if bias is None else bias.double())
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=0.03)
        alone.append(product(x[-1:].contiguous(), w, bias))
        assert torch.equal(found, torch.cat([one for one in alone if one is not None]))
    shaped = product(every[None, :3].contiguous(), w, bias)
    assert shaped is not None
    assert shaped.shape == (1, 3, outputs)


@compiled
def test_threads_change_nothing() -> None:
    w, x = weight(301, 700), activations(5, 700)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(product(x, w))
    finally:
        torch.set_num_threads(threads)
    assert all(one is not None and torch.equal(one, found[0]) for one in found)


@compiled
def test_numbers_that_are_none_stay_so() -> None:
    x = activations(2, 40)
    x[1, 3] = float("nan")
    found = product(x, weight(9, 40))
    assert found is not None
    assert bool(found[0].isfinite().all())
    assert bool(found[1].isnan().all())


@compiled
def test_what_does_not_fit_is_left_to_pytorch() -> None:
    w, x = weight(8, 64), activations(2, 64)
    assert product(x, w) is not None
    assert product(activations(13, 64), w) is None
    assert product(x[:0], w) is None
    assert product(x.float(), w) is None
    assert product(activations(2, 63), w) is None
    assert product(activations(64, 2).t(), w) is None
    assert product(x, nn.Parameter(w.float(), requires_grad=False)) is None
    assert product(x, nn.Parameter(w.t(), requires_grad=False)) is None
    assert product(x, w.data) is None  # no parameter: who knows what it stands for
    assert product(x, w, torch.zeros(8)) is None
    with torch.enable_grad():
        assert product(x, w) is None


@pytest.mark.parametrize("level", ["0", "avx2"])
def test_other_processors_leave_it_to_pytorch(level: str) -> None:
    code = """
import torch
from unspool.kernels.plain import product, usable
with torch.no_grad():
    print(usable(), product(torch.ones(2, 64).bfloat16(), torch.nn.Parameter(torch.ones(8, 64).bfloat16())))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "UNSPOOL_KERNELS": level}, capture_output=True, text=True
    )
    assert done.stdout == "False None\n", done.stderr
