"""A request's tokens and log-probabilities, bit for bit: whatever its company, order, chunks, prefix hits, preemptions.

In bf16 the compiled kernels compute each row by itself. Elsewhere steps are cut into parts of one shape. Both hold to
the last bit; with `deterministic=False`, tokens are held to and log-probabilities to rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accounts import check_all_given_back
from families import make_checkpoint, make_model
from safetensors.torch import save_file

import unspool
from unspool import ContinuousBatchingConfig
from unspool.kernels import native

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


KINDS = ["llama, bfloat16", "llama, float32", "mistral, float32", "gpt2, float32", "llama, float16"]
LOOSE = "llama, float32, not deterministic"


@pytest.fixture(scope="module", params=[*KINDS, LOOSE])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, dtype = request.param.split(", ")[:2]
    folder = tmp_path_factory.mktemp(family)
    make_checkpoint(family, folder)
    loaded = unspool.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded.generation_config.eos_token_id = None
    loaded.kind = request.param
    return loaded


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def manager_of(model: Any, **config: Any) -> Any:
    config = {"num_blocks": 120, "page_size": 16, "return_logprobs": True} | config
    if model.kind == LOOSE:
        config["deterministic"] = False
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
        if model.kind == LOOSE:
            assert logprobs == pytest.approx(exact, abs=1e-4)
        else:
            assert logprobs == exact


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
    if threads > 1 and not native.level():
        pytest.skip("without the kernels, the promise is for one number of threads")
    torch.set_num_threads(threads)
    manager = manager_of(model, **CASES[case])
    got = finish(manager, [add(manager, i) for i in range(len(PROMPTS))])
    assert_same(got, alone, model)
    if not model.kind.startswith("llama"):
        return  # layers with a window need less room
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
    if model.dtype is torch.float16 or (model.dtype is torch.bfloat16 and not native.level()):
        return  # generate() promises no bits there, and scores within rounding are common
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
    if not model.kind.startswith("llama") or model.dtype is torch.float16:
        return

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
        if model.kind == LOOSE:
            assert got[1] == pytest.approx(exact[1], abs=1e-4)
        else:
            assert got == exact
        again = made(manager, ask(manager, PROMPTS[0]))  # with much of the prompt stored
        assert again[0] == exact[0] if model.kind == LOOSE else again == exact


def make_adapter(folder: Path, seed: int) -> None:
    """A random adapter for the tiny Llama of `families`."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for layer in range(3):
        for module, outputs in (("q_proj", 64), ("v_proj", 32)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(4, 64, generator=generator) * 0.3
            weights[f"{stem}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.3
    save_file(weights, folder / "adapter_model.safetensors")


def test_log_probabilities_of_prompts(model: Any) -> None:
    if not model.kind.startswith("llama") or model.kind == LOOSE:
        return
    told = []
    for budget, others in ((1024, 0), (7, 0), (16, 2), (1024, 3)):
        manager = manager_of(model, max_batch_tokens=budget, allow_block_sharing=False)
        for i in range(others):
            manager.add_request(PROMPTS[i], max_new_tokens=9, do_sample=False)
        name = manager.add_request(PROMPTS[2], max_new_tokens=2, do_sample=False, prompt_logprobs=0)
        while manager.step():
            pass
        told.append(manager.get_result(name).prompt_logprobs)
    assert len(told[0]) >= len(PROMPTS[2]) - 1
    assert told[1:] == told[:1] * 3


def test_drafts_and_adapters(model: Any, alone: list[Result], tmp_path: Path) -> None:
    """Rows with adapters have company with none and with others; drafted rows have plain rows' log-probabilities."""
    if not model.kind.startswith("llama"):
        return
    for i, name in enumerate(("one", "two")):
        make_adapter(tmp_path / name, i)
        model.load_adapter(tmp_path / name, adapter_name=name)
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
    try:
        apart: list[Result] = []
        for name in ("one", "two", "__base__"):
            manager = manager_of(model)
            apart += finish(manager, [manager.add_request(PROMPTS[0], adapter_name=name, **settings)])
        assert apart[0] != apart[1] != apart[2] == alone[0]
        manager = manager_of(model, max_batch_tokens=21)
        mixed = [
            manager.add_request(PROMPTS[0], adapter_name=name, **settings, **more)
            for more in ({}, {"prompt_lookup_num_tokens": 3})
            for name in ("one", "two", "__base__")
        ]
        assert_same(finish(manager, mixed), apart * 2, model)
    finally:
        for name in ("one", "two"):
            model.delete_adapter(name)


def test_bits_do_not_depend_on_company_where_pytorch_computes_adapters_alone() -> None:
    """The kernels take quantised weights with activations in fp32, and adapters in bf16 only."""
    model, _ = unspool.load("storyteller", dtype="float32", quantize="int8")
    model.load_adapter("storyteller-pirate", "pirate")
    config = ContinuousBatchingConfig(num_blocks=120, page_size=16, return_logprobs=True)

    def told(prompts: list[list[int]]) -> list[Result]:
        manager = model.init_continuous_batching(continuous_batching_config=config)
        settings: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
        return finish(manager, [manager.add_request(one, adapter_name="pirate", **settings) for one in prompts])

    assert told(PROMPTS) == [told([prompt])[0] for prompt in PROMPTS]


def test_modules_of_others() -> None:
    """Where it is asked for; by default they are computed as they come."""
    wrapped = unspool.wrap(make_model("llama"))
    wrapped.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}

    def answers(prompts: list[list[int]], **changes: Any) -> list[Result]:
        config = ContinuousBatchingConfig(
            num_blocks=120, page_size=16, return_logprobs=True, deterministic=True, **changes
        )
        manager = wrapped.init_continuous_batching(settings, continuous_batching_config=config)
        return finish(manager, [manager.add_request(prompt) for prompt in prompts])

    apart = [answers([prompt])[0] for prompt in PROMPTS]
    for changes in ({}, {"max_batch_tokens": 7}, {"allow_block_sharing": False}):
        assert answers(PROMPTS, **changes) == apart


def test_without_the_kernels() -> None:
    """The same promise where nothing is compiled; the kernels are chosen when a process begins."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "(llama or mistral) and (company or cancelled or drafts)"]
    environment = {**os.environ, "UNSPOOL_KERNELS": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
