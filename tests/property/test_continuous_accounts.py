"""Mixed requests, faults at any step, cancels, little room: exact accounts of blocks after every single step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accounts import check_accounts, check_all_given_back, check_swapped
from families import make_checkpoint
from hypothesis import example, given, settings, strategies as st

import unspool
from unspool import ContinuousBatchingConfig
from unspool.cache.blocks import GONE

PROMPTS = [[5, 9, 11], [7] * 40, [*([7] * 33), 3, 4], [*range(3, 60)], [12]]


class Fault(Exception):
    pass


def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if ids.shape[1] % 7 == 0:
        raise Fault
    return scores


def no_number(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores * float("nan") if ids.shape[1] % 9 == 0 else scores


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "three": {"do_sample": True, "num_return_sequences": 3, "seed": 1},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "breaks": {"do_sample": False, "logits_processor": [breaks]},
    "beams that break": {"do_sample": False, "num_beams": 2, "logits_processor": [breaks]},
    "no number": {"do_sample": False, "logits_processor": [no_number]},
    "another tenant": {"do_sample": False, "cache_salt": "b"},
    "guided": {"do_sample": False, "guidance_scale": 1.5, "negative_prompt_ids": [7] * 20},
    "guided beams": {"do_sample": False, "num_beams": 2, "guidance_scale": 1.5, "negative_prompt_ids": [8, 9]},
    "guided lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3, "guidance_scale": 1.5},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "dola": {"do_sample": False, "dola_layers": "low"},
    "prompt's own": {"do_sample": False, "prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One with layers that see all and layers that see 6 tokens, one with windows alone."""
    made = {}
    for family in ("qwen2-window", "mistral"):
        folder = tmp_path_factory.mktemp(family)
        make_checkpoint(family, folder)
        made[family] = unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return made


arrivals = st.lists(
    st.tuples(
        st.sampled_from(PROMPTS),
        st.sampled_from(sorted(KINDS)),
        st.integers(0, 5),  # steps before the next one
        st.sampled_from([None, None, 0, 2, 5]),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["qwen2-window", "mistral"]),
    requests=arrivals,
    faults=st.frozensets(st.integers(0, 30), max_size=3),
    budget=st.sampled_from([5, 40]),
    blocks=st.sampled_from([15, 17, 40]),
    sharing=st.booleans(),
    space=st.sampled_from([0.0, 0.0005, 0.01]),
    ahead=st.booleans(),
)
@example("qwen2-window", [(PROMPTS[3], "beams", 0, None)] * 3, frozenset(), 40, 15, True, 0.01, False)
@example("mistral", [(PROMPTS[1], "greedy", 0, None)] * 5, frozenset({4}), 5, 12, True, 0.01, True)
def test_every_block_is_accounted_for(
    models: dict[str, Any],
    family: str,
    requests: list[tuple[list[int], str, int, int | None]],
    faults: frozenset[int],
    budget: int,
    blocks: int,
    sharing: bool,
    space: float,
    ahead: bool,
) -> None:
    config = ContinuousBatchingConfig(
        num_blocks=blocks,
        page_size=16,
        max_batch_tokens=budget,
        allow_block_sharing=sharing,
        cpu_offload_space=space,
        max_requests_per_batch=5,
        safety_margin=0.0,
    )
    manager = models[family].init_continuous_batching(continuous_batching_config=config)
    room, active = manager._engine.room, manager._engine.scheduler.active_requests
    manager._engine._ahead = ahead  # as on a GPU
    runner = manager._engine._loop.runner
    compute, clock = runner.run, 0

    def run(work: Any, want: Any) -> Any:
        for item in work:
            row = item.seq
            for index, (group, pool) in enumerate(zip(room.store.groups, room.store.blocks, strict=True)):
                table = row.blocks[index]
                for block in table[row.computed // 16 : (row.computed + item.feed - 1) // 16 + 1]:
                    assert pool.references(block) == 1 and block not in room.index._nodes[index], "one may write it"
                assert GONE not in table[group.first_seen(row.computed) // 16 :], "what is seen is there"
        if clock in faults:
            raise Fault
        return compute(work, want)

    runner.run = run
    names: list[tuple[str, str]] = []
    cancels: dict[int, list[str]] = {}

    def step() -> bool:
        nonlocal clock
        for name in cancels.pop(clock, ()):
            manager.cancel_request(name)
        moved = manager.step()
        clock += 1
        check_accounts(room, [row for state in active.values() for row in state.rows])
        check_swapped(room)
        return moved

    for prompt, kind, wait, until in requests:
        name = manager.add_request(prompt, max_new_tokens=20, eos_token_id=None, **KINDS[kind])
        outputs = KINDS[kind].get("num_return_sequences", 1)
        names += [(one, kind) for one in [name, *(f"{name}__child#{i}" for i in range(outputs - 1))]]
        if until is not None:
            cancels.setdefault(clock + until, []).append(name)
        for _ in range(wait):
            step()
    while step():
        assert clock < 3000, "it ends"
    for name, kind in names:
        output = manager.get_result(name)
        assert output is not None and output.finish_reason in ("length", "cancelled", "error")
        may_fail = kind in ("breaks", "beams that break", "no number") or faults
        assert output.finish_reason != "error" or may_fail, output.error
    check_all_given_back(room)


@pytest.mark.parametrize("family", ["qwen2-window", "mistral"])
def test_windows_release_what_they_cannot_see(models: dict[str, Any], family: str) -> None:
    """A long prompt and a long text need a few blocks of a layer that sees 6 tokens, and are the same as ever."""
    model = models[family]
    prompt = [3 + i % 90 for i in range(150)]
    config = ContinuousBatchingConfig(num_blocks=20, page_size=16, max_batch_tokens=32, max_requests_per_batch=1)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    room = manager._engine.room
    pool = room.store.blocks[[group.window for group in room.store.groups].index(6)]
    assert pool.count == 5, "what a row sees, two blocks that are begun, and a step"
    settings: dict[str, Any] = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None}
    name = manager.add_request(prompt, **settings)
    held = []
    while manager.step():
        check_accounts(
            room, [row for state in manager._engine.scheduler.active_requests.values() for row in state.rows]
        )
        held.append(pool.count - pool.free - pool.idle)
    assert max(held) <= 3 and held[-2] <= 2
    tokens = manager.get_result(name).generated_tokens
    assert tokens == model.generate(torch.tensor([prompt]), **settings)[0, 150:].tolist()
    again = manager.add_request([*prompt, *tokens, 5], **(settings | {"max_new_tokens": 2}))
    while manager.step():
        pass
    output = manager.get_result(again)
    assert output.usage.cached_tokens == 240, "249 tokens were stored, and the blocks seen last are still there"
    whole = torch.tensor([[*prompt, *tokens, 5]])
    wanted = model.generate(whole, **(settings | {"max_new_tokens": 2}))
    assert output.generated_tokens == wanted[0, -2:].tolist()
    check_all_given_back(room)
