"""Low-rank products by row in one call: right, the same bits in any company, and nobody else's rows touched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from unspool.kernels.lowrank import LowRankPair, Pairs, RowsOfPairs, fits

pytestmark = pytest.mark.skipif(
    not fits(torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)),
    reason="the kernels are not in use on this machine",
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def matrices(seed: int, rank: int, inputs: int, outputs: int, projections: int = 1) -> tuple[Tensor, Tensor]:
    """`down` and `up`, the latter of so many projections that each have their own ranks and outputs."""
    up = normal(seed + 1, rank, outputs)
    edges = [(rank * i // projections, outputs * i // projections) for i in range(projections + 1)]
    for (first, begin), (end, last) in pairwise(edges):
        up[first:end, :begin] = 0
        up[first:end, last:] = 0
    return normal(seed, rank, inputs), up


def assert_sum(got: Tensor, x: Tensor, out: Tensor, pair: tuple[Tensor, Tensor]) -> None:
    """`got` is `out` plus the pair's product, but for rounding between the two matrices and at the end."""
    down, up = (matrix.double() for matrix in pair)
    inner = x.double() @ down.T
    exact = out.double() + inner @ up
    size = x.double().abs() @ down.abs().T
    allowed = exact.abs() * 2**-8 + (inner.abs() * 2**-8 + size * 1e-5 + 1e-30) @ up.abs() + 1e-5
    assert bool(((got.double() - exact).abs() <= allowed).all())


@settings(max_examples=50, deadline=None)
@given(
    owners=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    ranks=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    pairs=st.integers(1, 300),
    outputs=st.integers(1, 200),
    projections=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_rows_of_any_shape_and_pair(
    owners: list[int], ranks: list[int], pairs: int, outputs: int, projections: int, seed: int
) -> None:
    """Numbers 3 (a pair that changes nothing) and 4 (no pair) leave their rows as they are."""
    plain = [matrices(seed + i, rank, 2 * pairs, outputs, projections) for i, rank in enumerate(ranks)]
    together = Pairs([*(LowRankPair(*pair) for pair in plain), None])
    x, out = normal(seed, len(owners), 2 * pairs), normal(seed + 1, len(owners), outputs)
    got = together.add(x, out.clone(), RowsOfPairs(owners, 4))
    for row, owner in enumerate(owners):
        if owner < 3:
            assert_sum(got[row], x[row], out[row], plain[owner])
        else:
            assert torch.equal(got[row], out[row])


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 9, 13, 95, 97, 200])
def test_each_row_alone_and_on_any_number_of_threads(rows: int) -> None:
    together = Pairs([LowRankPair(*matrices(i, rank, 1034, 333, 3)) for i, rank in enumerate((16, 48, 7))])
    x, out = normal(3, rows, 1034), normal(4, rows, 333)
    owners = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()
    got = together.add(x, out.clone(), RowsOfPairs(owners, 3))
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(got, together.add(x, out.clone(), RowsOfPairs(owners, 3)))
    for row, owner in enumerate(owners):
        alone = together.add(x[row : row + 1], out[row : row + 1].clone(), RowsOfPairs([owner], 3))
        assert torch.equal(got[row : row + 1], alone)


def test_infinities_and_nan_stay_in_their_rows() -> None:
    pair = matrices(0, 4, 64, 40)
    broken = (pair[0].clone(), pair[1].clone())
    broken[0][1, 5] = float("inf")
    together = Pairs([LowRankPair(*pair), LowRankPair(*broken)])
    x, out = normal(1, 6, 64), normal(2, 6, 40)
    x[4, 9] = float("nan")
    got = together.add(x, out.clone(), RowsOfPairs([0, 1, 0, 1, 0, 2], 2))
    assert got.isfinite().all(1).tolist() == [True, False, True, False, False, True]


def test_inputs_in_other_layouts() -> None:
    pair, wide, out = matrices(0, 5, 64, 48), normal(1, 20, 131), normal(2, 20, 48)
    together = Pairs([LowRankPair(*pair)])
    for x in (wide[:, 3:67], wide[:, ::2][:, :64], wide[:1, :64].expand(20, -1), wide.T[:20, :1].expand(-1, 64)):
        assert_sum(together.add(x, out.clone(), RowsOfPairs([0] * 20, 1)), x, out, pair)
    assert together.add(wide[:0, :64], out[:0], RowsOfPairs([], 1)).shape == (0, 48)


def test_what_does_not_fit_is_refused() -> None:
    down, up = matrices(0, 4, 64, 48)
    for wrong in ((down.float(), up), (down, up.float()), (down[:, :63], up), (down[:3], up), (down, up[:, :0])):
        with pytest.raises(ValueError, match="no low-rank pair"):
            LowRankPair(*wrong)
    together = Pairs([LowRankPair(down, up)])
    x, out, rows = normal(1, 2, 64), normal(2, 2, 48), RowsOfPairs([0, 0], 1)
    for other in (x.float(), x[:1], x[:, :62], x.to("meta")):
        with pytest.raises(ValueError, match="`x` must be bfloat16"):
            together.add(other, out, rows)
    for other in (out.float(), out[:1], out[:, :47]):
        with pytest.raises(ValueError, match="`out` must be bfloat16"):
            together.add(x, other, rows)
    with pytest.raises(ValueError, match="with gaps"):
        together.add(x, normal(2, 48, 2).T, rows)
    with pytest.raises(ValueError, match="rows of 2 pairs"):
        together.add(x, out, RowsOfPairs([0, 1], 2))
    with pytest.raises(ValueError, match="one shape"):
        Pairs([LowRankPair(down, up), LowRankPair(*matrices(0, 4, 62, 48))])
    with pytest.raises(ValueError, match="one shape"):
        Pairs([None])
