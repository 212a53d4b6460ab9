"""The compiled attention: right by its definition, the same bits in any company and however a prompt is cut."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, make_checkpoint
from hypothesis import given, settings, strategies as st
from torch import Tensor

import unspool
from unspool.attention import registry
from unspool.attention.native import NativeAttention
from unspool.attention.reference import PagedAttention
from unspool.attention.registry import paged_attention
from unspool.cache.layout import LayerGroup
from unspool.cache.paged import PagedStore
from unspool.kernels import linear, native
from unspool.kernels.attention import Plan

pytestmark = pytest.mark.skipif(not native.active(), reason=native.describe())
floats = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _two_threads_without_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class Row:
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)


@dataclass
class Case:
    """A store with rows of some lengths, in runs or scattered blocks; NaN where no row has stored anything.

    `q`, `k`, `v` are the new tokens of all rows, row by row.
    """

    store: PagedStore
    rows: list[Row]
    feeds: list[int]
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def make(
        cls,
        stored: list[int],
        feeds: list[int],
        seed: int,
        *,
        kv: int = 2,
        fold: int = 3,
        dim: int = 32,
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        scatter: bool = False,
    ) -> Case:
        group = LayerGroup((0,), kv, dim, window)
        need = [-(-(n + feed) // 16) for n, feed in zip(stored, feeds, strict=True)]
        store = PagedStore((group,), sum(need) + 2, dtype=dtype, device=torch.device("cpu"))
        free = list(range(sum(need) + 2))
        if scatter:
            random.Random(seed).shuffle(free)
        store.keys[0].fill_(float("nan"))
        store.values[0].fill_(float("nan"))
        rows = [Row(n, [[free.pop(0) for _ in range(count)]]) for n, count in zip(stored, need, strict=True)]
        case = cls(store, rows, feeds, *(normal(seed + i, sum(feeds), heads, dim, dtype=dtype)
                                         for i, heads in enumerate((kv * fold, kv, kv))))  # fmt: skip
        for i, n in enumerate(stored):
            slots = case.slots(i)[:n]
            store.keys[0][slots] = normal(seed + 10 * i + 5, n, kv, dim, dtype=dtype)
            store.values[0][slots] = normal(seed + 10 * i + 6, n, kv, dim, dtype=dtype)
        return case

    def slots(self, row: int) -> Tensor:
        """Where the tokens of a row are, the new ones too."""
        table = torch.tensor(self.rows[row].blocks[0])
        places = torch.arange(self.rows[row].computed + self.feeds[row])
        return table[places // 16] * 16 + places % 16

    def new(self, row: int) -> slice:
        """A row's place among the new tokens."""
        end = sum(self.feeds[: row + 1])
        return slice(end - self.feeds[row], end)

    def native(self, rows: list[int] | None = None, softcap: float | None = None) -> list[Tensor]:
        """Answers of some rows in one step, by default of all; one tensor a row."""
        rows = list(range(len(self.rows))) if rows is None else rows
        feeds = [self.feeds[i] for i in rows]
        attend = NativeAttention(self.store, [self.rows[i] for i in rows], feeds)
        q, k, v = (torch.cat([x[self.new(i)] for i in rows]) for x in (self.q, self.k, self.v))
        return list(attend(0, q, k, v, 0.2, softcap).split(feeds))

    def in_chunks(self, row: int, sizes: list[int], softcap: float | None = None) -> Tensor:
        """A row's answers when its new tokens, forgotten before, come in chunks of these sizes, again and again."""
        fresh = self.slots(row)[self.rows[row].computed :]
        self.store.keys[0][fresh] = float("nan")
        self.store.values[0][fresh] = float("nan")
        here = self.new(row)
        begins = [b for b in accumulate(sizes * self.feeds[row], initial=here.start) if b < here.stop] + [here.stop]
        out = []
        for begin, end in pairwise(begins):
            part = Row(self.rows[row].computed + begin - here.start, self.rows[row].blocks)
            attend = NativeAttention(self.store, [part], [end - begin])
            out.append(attend(0, self.q[begin:end], self.k[begin:end], self.v[begin:end], 0.2, softcap))
        return torch.cat(out)

    def plain(self, row: int, softcap: float | None = None) -> Tensor:
        """The answers to one row by their definition, in fp64, from what is stored."""
        fold = self.q.shape[1] // self.k.shape[1]
        keys, values = (
            pool[0][self.slots(row)].double().repeat_interleave(fold, dim=1)
            for pool in (self.store.keys, self.store.values)
        )
        scores = torch.einsum("qhd,thd->hqt", self.q[self.new(row)].double(), keys) * 0.2
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(scores.shape[2])
        queries = places[-self.feeds[row] :, None]
        window = self.store.groups[0].window or len(places)
        scores = scores.masked_fill((places > queries) | (places <= queries - window), float("-inf"))
        return torch.einsum("hqt,thd->qhd", scores.softmax(dim=-1), values).flatten(1)


lengths = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 600]))
news = st.one_of(st.just(1), st.integers(1, 20), st.sampled_from([33, 64, 129, 300]))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(lengths, news), min_size=1, max_size=4),
    kv=st.integers(1, 3),
    fold=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17]),
    dim=st.sampled_from([16, 32, 48, 64, 80, 128, 256]),
    dtype=floats,
    window=st.sampled_from([None, 1, 17, 300]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scatter=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rows_are_answered_by_the_definition(
    rows: list[tuple[int, int]],
    kv: int,
    fold: int,
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    scatter: bool,
    seed: int,
) -> None:
    stored, feeds = map(list, zip(*rows, strict=True))
    case = Case.make(stored, feeds, seed, kv=kv, fold=fold, dim=dim, dtype=dtype, window=window, scatter=scatter)
    for row, out in enumerate(case.native(softcap=softcap)):
        assert out.shape == (feeds[row], kv * fold * dim)
        assert out.dtype == dtype
        # fp32: sums in another order; bf16: the result is rounded, and so are the weights
        rough = dtype == torch.bfloat16
        torch.testing.assert_close(
            out.double(), case.plain(row, softcap), rtol=2**-8 if rough else 1e-5, atol=2**-7 if rough else 1e-5
        )


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(st.tuples(lengths, news), min_size=2, max_size=5),
    fold=st.sampled_from([1, 3, 6]),
    dtype=floats,
    window=st.sampled_from([None, 100]),
    scatter=st.booleans(),
    sizes=st.lists(st.sampled_from([1, 2, 15, 16, 17, 100]), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_the_same_bits_alone_in_company_in_chunks_and_on_any_threads(
    rows: list[tuple[int, int]],
    fold: int,
    dtype: torch.dtype,
    window: int | None,
    scatter: bool,
    sizes: list[int],
    seed: int,
) -> None:
    stored, feeds = map(list, zip(*rows, strict=True))
    case = Case.make(stored, feeds, seed, fold=fold, dtype=dtype, window=window, scatter=scatter)
    together = case.native()
    order = random.Random(seed).sample(range(len(rows)), k=len(rows))
    for row, out in zip(order, case.native(order), strict=True):
        assert torch.equal(out, together[row])
    torch.set_num_threads(1)
    for out, expected in zip(case.native(), together, strict=True):
        assert torch.equal(out, expected)
    torch.set_num_threads(2)
    for row, expected in enumerate(together):
        assert torch.equal(case.native([row])[0], expected)
        assert torch.equal(case.in_chunks(row, sizes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_keys_and_values_are_stored_where_the_reference_stores_them(dtype: torch.dtype) -> None:
    feeds = [1, 40, 17, 1]
    case, other = (Case.make([0, 31, 15, 32], feeds, 5, dtype=dtype, scatter=True) for _ in range(2))
    case.native()
    PagedAttention(other.store, other.rows, feeds)(0, other.q, other.k, other.v, 0.2)
    for ours, theirs in ((case.store.keys, other.store.keys), (case.store.values, other.store.values)):
        assert torch.equal(ours[0].nan_to_num(nan=-9.0), theirs[0].nan_to_num(nan=-9.0))


def test_heads_may_lie_apart_in_memory() -> None:
    case = Case.make([5, 300], [20, 1], 1)
    fused = torch.cat((case.q, case.k, case.v), dim=1)
    q, k, v = fused.split([6, 2, 2], dim=1)
    plain = torch.cat(case.native())
    assert torch.equal(NativeAttention(case.store, case.rows, case.feeds)(0, q, k, v, 0.2), plain)
    turned = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(NativeAttention(case.store, case.rows, case.feeds)(0, turned, k, v, 0.2), plain)


def test_what_is_not_a_number_stays_with_its_row() -> None:
    case = Case.make([40, 300, 9], [1, 20, 30], 2)
    clean = case.native()
    case.store.keys[0][case.rows[1].blocks[0][3] * 16 + 2] = float("nan")
    out = case.native()
    assert out[1].isnan().all()
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[2], clean[2])


@pytest.mark.parametrize("place", [256, 300])
def test_a_query_that_sees_what_is_not_a_number_gives_none(place: int) -> None:
    """Also where it is all that the query sees of a chunk."""
    case = Case.make([250], [60], 2)
    clean = case.native()[0]
    case.k[place - 250] = float("nan")
    out = case.native()[0]
    assert out[place - 250 :].isnan().all()
    assert torch.equal(out[: place - 250], clean[: place - 250])


def test_tensors_that_do_not_fit_are_refused() -> None:
    case = Case.make([5, 16], [1, 5], 0)
    plan = Plan([6, 21], [1, 5], [row.blocks[0] for row in case.rows], 16)
    q, k, v, keys, values = case.q, case.k, case.v, case.store.keys[0], case.store.values[0]
    wrong = [
        (q[:1], k[:1], v[:1], keys, values),
        (q[..., :16], k, v, keys, values),
        (q[:, :5], k, v, keys, values),
        (q, k[:, :1], v, keys, values),
        (q, k, v[:1], keys, values),
        (q.bfloat16(), k, v, keys, values),
        (q, k, v, keys[:32], values[:32]),
        (q, k, v, keys, values[:48]),
        (q, k, v, keys.transpose(0, 1).contiguous().transpose(0, 1), values),
        *[tuple(x.half() for x in (q, k, v, keys, values))],
        (q.to("meta"), k, v, keys, values),
        (q, k, v, keys, values.to("meta")),
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="cannot take"):
            plan.attend(*tensors, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        Plan([33], [1], [[0, 1]], 16)
    with pytest.raises(ValueError, match="counted from 0"):
        Plan([33], [1], [[0, 1, -2]], 16)
    for block, window in ((8, None), (0, None), (16, 0), (16, -3)):
        with pytest.raises(ValueError, match=f"blocks of {block} tokens and a window of {window} cannot be"):
            Plan([6], [1], [[0]], block, window)
    for feed in (0, 34):
        with pytest.raises(ValueError, match="cannot have"):
            Plan([33], [feed], [[0, 1, 2]], 16)
    assert torch.equal(plan.attend(q, k, v, keys, values, 0.2), torch.cat(case.native()))


def test_the_backend_is_chosen_by_what_it_can_do() -> None:
    def chosen(dtype: torch.dtype = torch.float32, dim: int = 32, weights: list[list[Tensor]] | None = None) -> type:
        group = LayerGroup((0,), 1, dim)
        store = PagedStore((group,), 2, dtype=dtype, device=torch.device("cpu"))
        return type(paged_attention(store, [Row(0, [[0]])], [1], weights))

    assert chosen() is NativeAttention
    assert chosen(torch.bfloat16) is NativeAttention
    assert chosen(torch.float16) is PagedAttention
    assert chosen(dim=24) is PagedAttention
    assert chosen(weights=[]) is PagedAttention
    with torch.enable_grad():
        assert chosen() is PagedAttention


# ---- Texts ----------------------------------------------------------------------------------------------------------


def prompts() -> tuple[Tensor, Tensor]:
    """Three left-padded prompts, one of them longer than a chunk, and their mask."""
    ids = torch.randint(3, VOCAB, (3, 210), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(210) >= torch.tensor([[0], [190], [77]])).long()
    return ids * mask, mask


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-window"])
def test_text_is_the_same_by_pytorch(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(family, tmp_path, max_position_embeddings=512)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ids, mask = prompts()
    used: list[type] = []
    monkeypatch.setattr(
        registry, "NativeAttention", lambda *args: used.append(NativeAttention) or NativeAttention(*args)
    )
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    assert used
    monkeypatch.setattr(registry, "serves", lambda store: False)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False), ours)


def test_logits_are_the_same_bits_alone_in_company_and_in_chunks(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, max_position_embeddings=512)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    if not linear.fits(torch.empty(2, 2, dtype=torch.bfloat16)):
        pytest.skip("products are PyTorch's here, whose bits depend on the number of rows")
    ids, mask = prompts()

    def logits(rows: slice, **settings: int) -> Tensor:
        out = model.generate(
            ids[rows],
            attention_mask=mask[rows],
            max_new_tokens=40,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        return torch.stack(out.logits, dim=1)

    whole = logits(slice(None))
    assert torch.equal(logits(slice(None), prefill_chunk_size=23), whole)
    for row in range(3):
        assert torch.equal(logits(slice(row, row + 1)), whole[row : row + 1])


@settings(max_examples=30, deadline=None)
@given(
    stored=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    window=st.sampled_from([None, 7, 40]),
    steps=st.integers(1, 90),
    reserved=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_a_plan_that_is_kept_gives_what_a_new_one_gives(
    stored: list[int], window: int | None, steps: int, reserved: int, seed: int
) -> None:
    """Rows get blocks as they grow, lose those out of sight, and have some exchanged for equal ones."""
    draw = random.Random(seed)
    groups = (LayerGroup((0,), 1, 16), LayerGroup((1,), 1, 16, window))
    store = PagedStore(groups, 80, dtype=torch.float32, device=torch.device("cpu"))
    rows = [Row() for _ in stored]
    for row, length in zip(rows, stored, strict=True):
        store.reserve(row, length + 16 * draw.randint(0, reserved))
        row.computed = length
    for layer in (0, 1):
        store.keys[layer].normal_()
        store.values[layer].normal_()
    feeds, kept, used, tables = [1] * len(rows), None, 0, []
    for step in range(steps):
        for row in rows:
            store.leave_behind(row)
            assert store.extend(row, 1)
            if not draw.randrange(20) and store.blocks[0].free and row.computed >= 16:
                place = draw.randrange(row.computed // 16)
                (other,) = store.blocks[0].take(1) or ()
                for pool in (store.keys[0], store.values[0]):
                    by_block = pool.view(-1, 16, 1, 16)
                    by_block[other] = by_block[row.blocks[0][place]]
                store.exchange(row, 0, place, other)
                store.blocks[0].drop([other])
        lengths = np.array([row.computed + 1 for row in rows])
        changed = [(i, row) for i, row in enumerate(rows) if kept and row.blocks is not tables[i]]
        if kept is None or not kept.advance(lengths, changed):
            kept = NativeAttention(store, rows, feeds)
        else:
            used += 1
        tables = [row.blocks for row in rows]
        new = NativeAttention(store, rows, feeds)
        for layer in (0, 1):
            q, k, v = (normal(seed * 1000 + step * 10 + i, len(rows), heads, 16) for i, heads in enumerate((2, 1, 1)))
            wanted = new(layer, q, k, v, 0.25)
            assert torch.equal(kept(layer, q, k, v, 0.25), wanted)
        for row in rows:
            row.computed += 1
    assert used >= steps * 2 // 3 - 2
