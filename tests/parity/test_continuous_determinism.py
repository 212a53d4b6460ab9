"""A request's tokens and log-probabilities, bit for bit: whatever its company, order, chunks, prefix hits, preemptions.

In bf16 the compiled kernels compute each row by itself, so this holds exactly. PyTorch's own matrix products take other
paths for other numbers of rows; there (fp32, or without kernels) tokens are held to and log-probabilities to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accounts import check_all_given_back
from families import make_checkpoint

import unspool
from unspool import ContinuousBatchingConfig
from unspool.kernels import linear

PREFIX = [
    7,
    3,
    44,
    9,
    12,
    60,
    5,
    5,
    81,
    2,
    90,
    33,
    14,
    15,
    16,
    17,
    21,
    22,
    23,
    24,
    25,
    26,
    27,
    28,
    29,
    30,
    31,
    32,
    1,
    2,
]
PROMPTS = [[*PREFIX, 40, 41, 42], [*PREFIX, 50], [*PREFIX, 40, 41, 42, 43, 44, 45, 46, 47], [8, 9], [*PREFIX[:17], 3]]
SETTINGS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "seed": 5, "temperature": 0.9, "top_p": 0.95},
    {"do_sample": True, "seed": 6, "repetition_penalty": 1.2, "top_k": 20},
    {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    {"do_sample": True, "seed": 7, "min_p": 0.05, "top_k": 0},
]
MODES: dict[str, dict[str, Any]] = {
    "beams": {"do_sample": False, "num_beams": 3},
    "looked up": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "early exit": {"do_sample": True, "seed": 8, "assistant_early_exit": 1},
    "guided": {"do_sample": True, "seed": 9, "guidance_scale": 1.7, "negative_prompt_ids": [*PREFIX[:20], 60]},
    "guided beams": {"do_sample": False, "num_beams": 2, "guidance_scale": 1.7},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "layers": {"do_sample": True, "seed": 10, "dola_layers": "low", "repetition_penalty": 1.2},
    "prompt told": {"do_sample": False, "prompt_logprobs": 2},
}
Result = tuple[list[int], list[float]]

needs_kernels = pytest.mark.skipif(
    not linear.fits(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="the kernels are not in use on this machine"
)


@pytest.fixture(scope="module", params=[pytest.param("bfloat16", marks=needs_kernels), "float32"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    loaded = unspool.AutoModelForCausalLM.from_pretrained(folder, dtype=request.param)
    loaded.generation_config.eos_token_id = None
    return loaded


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def manager_of(model: Any, **config: Any) -> Any:
    config = {"num_blocks": 120, "page_size": 16, "return_logprobs": True} | config
    return model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(**config))


def add(manager: Any, i: int) -> str:
    return str(manager.add_request(PROMPTS[i], max_new_tokens=12, eos_token_id=None, **SETTINGS[i]))


def finish(manager: Any, names: list[str]) -> list[Result]:
    while manager.step():
        pass
    outputs = [manager.get_result(name) for name in names]
    assert [one.error for one in outputs] == [None] * len(names)
    return [(one.generated_tokens, one.logprobs) for one in outputs]


@pytest.fixture(scope="module")
def alone(model: Any) -> list[Result]:
    results = []
    for i in range(len(PROMPTS)):
        manager = manager_of(model)
        results += finish(manager, [add(manager, i)])
    assert len({len(set(tokens)) for tokens, _ in results} - {1}) > 0
    return results


def assert_same(got: list[Result], alone: list[Result], model: Any) -> None:
    for (tokens, logprobs), (right, exact) in zip(got, alone, strict=True):
        assert tokens == right
        if model.dtype is torch.bfloat16:
            assert logprobs == exact
        else:
            assert logprobs == pytest.approx(exact, abs=1e-4)


CASES: dict[str, dict[str, Any]] = {
    "together": {},
    "without sharing": {"allow_block_sharing": False},
    "chunks of 5": {"max_batch_tokens": 5},
    "chunks of 7, without sharing": {"max_batch_tokens": 7, "allow_block_sharing": False},
    "chunks of 19": {"max_batch_tokens": 19},
    "prompts first": {"scheduler_type": "prefill_first", "max_batch_tokens": 11},
    "little room": {"num_blocks": 6, "safety_margin": 0.0},
    "little room, without sharing": {"num_blocks": 6, "safety_margin": 0.0, "allow_block_sharing": False},
    "little room, swapped": {"num_blocks": 6, "safety_margin": 0.0, "cpu_offload_space": 0.01},
    "little room, swapped, chunks of 5": {
        "num_blocks": 6,
        "safety_margin": 0.0,
        "cpu_offload_space": 0.01,
        "max_batch_tokens": 5,
        "allow_block_sharing": False,
    },
    "two at a time": {"max_requests_per_batch": 2},
}


@pytest.mark.parametrize(("case", "threads"), [(case, 1) for case in sorted(CASES)] + [("chunks of 19", 2)])
def test_company(case: str, threads: int, model: Any, alone: list[Result]) -> None:
    torch.set_num_threads(threads)
    manager = manager_of(model, **CASES[case])
    got = finish(manager, [add(manager, i) for i in range(len(PROMPTS))])
    assert_same(got, alone, model)
    assert (manager.metrics.preemptions > 0) == case.startswith("little room")
    assert (manager.metrics.swaps > 0) == ("swapped" in case)
    assert (manager.metrics.cached_tokens > 0) == CASES[case].get("allow_block_sharing", True)


def test_order_and_moments_of_arrival(model: Any, alone: list[Result]) -> None:
    for gap in range(5):
        manager = manager_of(model)
        names = {}
        for i in (3, 1, 4, 0, 2):
            names[i] = add(manager, i)
            for _ in range(gap):
                manager.step()
        got = finish(manager, [names[i] for i in range(5)])
        assert_same(got, alone, model)


def test_what_ended_requests_left(model: Any, alone: list[Result]) -> None:
    """Everything but the last tokens is found stored, some of it computed as output rather than as a prompt."""
    manager = manager_of(model)
    for _ in range(2):
        got = finish(manager, [add(manager, i) for i in range(len(PROMPTS))])
        assert_same(got, alone, model)
    first = manager.add_request(PROMPTS[0] + alone[0][0][:8], max_new_tokens=4, eos_token_id=None, do_sample=False)
    ((tokens, logprobs),) = finish(manager, [first])
    assert_same([(tokens, logprobs)], [(alone[0][0][8:], alone[0][1][8:])], model)


def test_others_that_are_cancelled_or_fail_or_go_other_ways(model: Any, alone: list[Result]) -> None:
    manager = manager_of(model, max_batch_tokens=23)
    settings = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
    bad = manager.add_request(PROMPTS[1], logits_processor=[lambda ids, scores: 1 // (ids.shape[1] < 35)], **settings)
    manager.add_request(PROMPTS[2], num_beams=3, **settings)
    names = [add(manager, i) for i in range(len(PROMPTS))]
    manager.add_request(PROMPTS[0], prompt_lookup_num_tokens=3, **settings)
    gone = manager.add_request(PROMPTS[4], **settings)
    for _ in range(4):
        manager.step()
    manager.cancel_request(gone)
    got = finish(manager, names)
    assert_same(got, alone, model)
    assert manager.get_result(bad).finish_reason == "error"
    assert manager.get_result(gone).finish_reason == "cancelled"


def test_the_same_as_generate(model: Any, alone: list[Result]) -> None:
    for i, (prompt, (tokens, _)) in enumerate(zip(PROMPTS, alone, strict=True)):
        row = model.generate(torch.tensor([prompt]), max_new_tokens=12, eos_token_id=None, **SETTINGS[i])
        assert row[0, len(prompt) :].tolist() == tokens


@pytest.mark.parametrize("case", ["together", "chunks of 7, without sharing", "little room", "little room, swapped"])
def test_steps_that_are_launched_ahead(case: str, model: Any) -> None:
    """On a GPU a step is launched before the one before is committed; the same order of work, here on the CPU.

    Rows end by tokens that are seen when the next step is under way, and others come into their places.
    """
    ends = [alone_tokens[6] for alone_tokens in (_greedy(model, prompt, {}) for prompt in PROMPTS)]
    settings = {"eos_token_id": ends, "max_new_tokens": 30}
    wanted = [_greedy(model, prompt, settings) for prompt in PROMPTS]
    assert {len(tokens) for tokens in wanted} - {30}
    manager = manager_of(model, **CASES[case] | {"return_logprobs": False, "max_requests_per_batch": 3})
    manager._engine._ahead = True
    greedy = {"do_sample": False, **settings}
    names = [manager.add_request(prompt, **greedy) for prompt in PROMPTS * 2]
    drawn = {"do_sample": True, "seed": 4, **settings}
    first = manager.add_request(PROMPTS[0], **drawn)
    heedful = manager.add_request(PROMPTS[1], repetition_penalty=1.3, **greedy)
    loop, flying, alone = manager._engine._loop, 0, manager_of(model, return_logprobs=False)
    while manager.step():
        flying += bool(loop._flights)
        assert all(row.pending == 1 for flight in loop._flights for row in flight.rows)
    assert flying > 5 and not loop._flights and not manager._engine._flying
    assert [manager.get_result(name).generated_tokens for name in names] == wanted * 2
    others = [alone.add_request(PROMPTS[0], **drawn), alone.add_request(PROMPTS[1], repetition_penalty=1.3, **greedy)]
    while alone.step():
        pass
    for name, other in zip((first, heedful), others, strict=True):
        assert manager.get_result(name).generated_tokens == alone.get_result(other).generated_tokens
    check_all_given_back(manager._engine.room)
    assert len(manager._engine.plain._free) == 3


def _greedy(model: Any, prompt: list[int], settings: dict[str, Any]) -> list[int]:
    settings = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False} | settings
    row = model.generate(torch.tensor([prompt]), **settings)
    return row[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def test_what_is_in_flight_when_everything_is_cancelled(model: Any) -> None:
    manager = manager_of(model, return_logprobs=False)
    manager._engine._ahead = True
    names = [manager.add_request(prompt, max_new_tokens=50, do_sample=False) for prompt in PROMPTS]
    for _ in range(5):
        manager.step()
    assert manager._engine._loop._flights
    manager.cancel_request(names[0])
    manager.step()
    assert manager.get_result(names[0]).finish_reason == "cancelled"
    manager.stop(hard_stop=True)
    assert {manager.get_result(name).finish_reason for name in names[1:]} == {"cancelled"}
    assert not manager._engine._loop._flights
    check_all_given_back(manager._engine.room)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_company(mode: str, model: Any) -> None:
    """Bit for bit also where rows are decided together, beside all other modes, chunked, put back and found stored."""

    def ask(manager: Any, prompt: list[int]) -> str:
        return str(manager.add_request(prompt, max_new_tokens=9, eos_token_id=None, top_logprobs=2, **MODES[mode]))

    def made(manager: Any, name: str) -> tuple[Any, ...]:
        while manager.step():
            pass
        one = manager.get_result(name)
        assert one.error is None
        return one.generated_tokens, one.logprobs, [[*best.values()] for best in one.top_logprobs], one.prompt_logprobs

    manager = manager_of(model)
    exact = made(manager, ask(manager, PROMPTS[0]))
    little = {"num_blocks": 10, "safety_margin": 0.0, "max_batch_tokens": 60}
    for case in ({}, {"max_batch_tokens": 9}, little, {"scheduler_type": "prefill_first", "max_batch_tokens": 21}):
        manager = manager_of(model, **case)
        for i in range(2):
            add(manager, i)
        manager.step()
        name = ask(manager, PROMPTS[0])
        for other in (*MODES, mode):
            manager.add_request(PROMPTS[2], max_new_tokens=7, eos_token_id=None, **MODES[other])
        got = made(manager, name)
        assert (manager.metrics.preemptions > 0) == (case is little)
        assert got[0] == exact[0]
        if model.dtype is torch.bfloat16:
            assert got == exact
        else:
            assert got[1] == pytest.approx(exact[1], abs=1e-4)
        again = made(manager, ask(manager, PROMPTS[0]))  # with much of the prompt stored
        assert again == exact if model.dtype is torch.bfloat16 else again[0] == exact[0]
