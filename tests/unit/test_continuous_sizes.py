"""How large stores and swap areas are, and what the swap area copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_checkpoint
from hypothesis import given, settings, strategies as st

import unspool
from unspool import ContinuousBatchingConfig
from unspool.cache import LayerGroup, PagedStore
from unspool.cache.swap import SwapArea
from unspool.continuous import sizes
from unspool.continuous.sizes import share_out
from unspool.decode.sequence import Sequence

GROUPS = (LayerGroup((0, 2), kv_heads=1, head_dim=2), LayerGroup((1,), kv_heads=2, head_dim=4, window=5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("qwen2")
    make_checkpoint("qwen2-window", folder)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def counts_of(model: Any, **config: Any) -> list[int]:
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(**config))
    return [pool.count for pool in manager._engine.room.store.blocks]


@settings(max_examples=50, deadline=None)
@given(
    space=st.integers(0, 5000),
    each=st.lists(st.integers(1, 50), min_size=3, max_size=3),
    most=st.lists(st.none() | st.integers(1, 60), min_size=3, max_size=3),
    useful=st.integers(1, 200),
)
def test_space_is_shared_out(space: int, each: list[int], most: list[int | None], useful: int) -> None:
    counts = share_out(space, each, most, useful)
    limits = [useful if limit is None else min(limit, useful) for limit in most]
    used = sum(count * size for count, size in zip(counts, each, strict=True))
    assert used <= space and all(0 <= count <= limit for count, limit in zip(counts, limits, strict=True))
    below = [i for i in range(3) if counts[i] < limits[i]]
    assert len({counts[i] for i in below}) <= 1, "those that want more get the same"
    assert not below or space - used < sum(each[i] for i in below), "and nothing is left over"
    assert all(counts[i] <= min((counts[j] for j in below), default=counts[i]) for i in range(3) if i not in below)


def test_a_store_by_share_of_the_free_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of = [16 * group.bytes_per_token(4) for group in model.spec.groups]
    monkeypatch.setattr(sizes, "free_memory", lambda device: 100 * sum(bytes_of))
    assert counts_of(model, max_memory_percent=0.5) == [50, 50]
    assert counts_of(model) == [30, 30], "the share of a CPU, when nobody says"
    window = [group.window for group in model.spec.groups].index(6)
    few = counts_of(model, max_requests_per_batch=1, max_batch_tokens=16, max_memory_percent=0.5)
    assert few[window] == 4, "what one row sees, two blocks that are begun, and a step"
    assert few[1 - window] == min(256 // 16, 50 + 46 * bytes_of[window] // bytes_of[1 - window])
    monkeypatch.setattr(sizes, "free_memory", lambda device: 10)
    with pytest.raises(unspool.errors.OutOfMemory, match="one block"):
        counts_of(model)


def test_the_step_that_is_measured_is_a_step(model: Any) -> None:
    store = PagedStore(model.spec.groups, 4, dtype=torch.float32, device=torch.device("cpu"))
    row = Sequence(0, [0] * 50)
    store.reserve(row, 50)
    with torch.no_grad():
        logits = sizes._one_step(model, store, row)
        assert torch.allclose(logits[0], model(torch.tensor([row.tokens])).logits[0, -1], atol=1e-4)


def test_the_swap_area_by_number_or_by_threshold(model: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def area(**config: Any) -> Any:
        given = ContinuousBatchingConfig(num_blocks=8, page_size=16, **config)
        return model.init_continuous_batching(continuous_batching_config=given)._engine.room.swap

    whole = sum(8 * 16 * group.bytes_per_token(4) for group in model.spec.groups)
    assert area() is None and area(cpu_offload_space=1e-9) is None
    assert [pool.count for pool in area(cpu_offload_space=2 * whole / 2**30).blocks] == [16, 16]
    monkeypatch.setattr(sizes, "free_memory", lambda device: whole)
    threshold = {"cpu_offload_space_safety_threshold": 0.5}
    assert [pool.count for pool in area(cpu_offload_space=None, **threshold).blocks] == [4, 4]
    assert "cpu_offload_space" not in caplog.text
    assert [pool.count for pool in area(cpu_offload_space=50.0, **threshold).blocks] == [4, 4]
    assert "cpu_offload_space=50.00 GiB is more than is free" in caplog.text


def test_rows_are_copied_out_and_back_with_what_they_share_once() -> None:
    store = PagedStore(GROUPS, 12, dtype=torch.float32, device=torch.device("cpu"), block_size=2)
    for layer in store.keys:
        store.keys[layer].normal_()
        store.values[layer].normal_()
    first, second = Sequence(0, []), Sequence(1, [])
    store.reserve(first, 9)
    first.computed = 9
    store.leave_behind(first)
    store.share(first, second)
    assert store.extend(second, 1), "its last block is its own now"
    before = {layer: (store.keys[layer].clone(), store.values[layer].clone()) for layer in store.keys}
    area = SwapArea(store, [6, 4])
    shelf = area.put([first, second])
    assert shelf is not None and shelf.computed == [9, 9]
    assert [len(shelf.blocks(index)) for index in (0, 1)] == [6, 4], "five and four of which they share all but one"
    assert area.put([first]) is None, "full"
    assert [pool.free for pool in area.blocks] == [0, 0]
    for index, group in enumerate(GROUPS):
        some = shelf.blocks(index)
        area.fetch(shelf, index, some, [11 - i for i in range(len(some))])
        place = {block: 11 - i for i, block in enumerate(some)}
        for row, tables in zip((first, second), shelf.tables, strict=True):
            for old, put in zip(row.blocks[index], tables[index], strict=True):
                if old < 0:
                    assert put < 0
                    continue
                for layer in group.layers:
                    for pool, saved in zip((store.keys[layer], store.values[layer]), before[layer], strict=True):
                        assert torch.equal(pool.view(12, -1)[place[put]], saved.view(12, -1)[old])
    area.drop(shelf)
    assert [pool.free for pool in area.blocks] == [6, 4]
