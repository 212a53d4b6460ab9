"""Random traffic with cancels, deadlines and faults: everything is answered once, and nothing is left behind."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accounts import check_all_given_back
from architectures import MULTIMODAL

import unspool
from unspool import ContinuousBatchingConfig, ManagerStopped, QueueFull
from unspool.bridge.ragged import RaggedModel


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    loaded = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")[0]
    loaded.generation_config.eos_token_id = None
    return loaded


class Fault(Exception):
    pass


def sometimes(chance: random.Random, rate: float) -> Any:
    """A processor that breaks now and then."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if chance.random() < rate:
            raise Fault
        return scores

    return process


def wanted(chance: random.Random) -> dict[str, Any]:
    """A request of any kind."""
    kinds: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": chance.randint(1, 3)},
        {"do_sample": True, "seed": 3, "repetition_penalty": 1.2},
        {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": True, "seed": 4, "guidance_scale": 1.5, "negative_prompt_ids": [7] * chance.choice([1, 20])},
        {"do_sample": False, "guidance_scale": 1.5, "num_beams": 2, "logits_processor": [sometimes(chance, 0.05)]},
        {"do_sample": False, "guidance_scale": 1.5, "prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 3, "logits_processor": [sometimes(chance, 0.05)]},
        {"dola_layers": "low", "repetition_penalty": 1.2, "prompt_logprobs": 1},
        {"do_sample": False, "logits_processor": [sometimes(chance, 0.1)]},
        {"do_sample": False, "stopping_criteria": [lambda ids, scores, **kw: ids[0, -1] % 5 == 0]},
    ]
    settings = {"max_new_tokens": chance.randint(1, 30)} | chance.choice(kinds)
    if chance.random() < 0.1:
        settings["deadline"] = chance.choice([0.001, 0.02, 5.0])
    if chance.random() < 0.2:
        settings["cache_salt"] = chance.choice("ab")
    return settings


def prompt(chance: random.Random) -> list[int]:
    shared = [7] * chance.choice([0, 16, 40])
    return shared + [chance.randint(3, 300) for _ in range(chance.randint(1, 30))]


def wait_for(manager: Any) -> None:
    """Until its thread has ended, for a minute of a machine that is not asleep meanwhile."""
    left = 120
    while left and not manager._worker.join(0.5):
        left -= 1


def outputs_of(settings: dict[str, Any]) -> int:
    return int(settings.get("num_return_sequences", 1))


def simple(chance: random.Random) -> dict[str, Any]:
    """A request of a kind that modules in rows take too."""
    kinds: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": chance.randint(1, 3)},
        {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
        {"do_sample": False, "logits_processor": [sometimes(chance, 0.1)]},
    ]
    settings = {"max_new_tokens": chance.randint(1, 30)} | chance.choice(kinds)
    if chance.random() < 0.1:
        settings["deadline"] = chance.choice([0.001, 0.02, 5.0])
    return settings


def told(chance: random.Random) -> dict[str, Any]:
    """A prompt with a picture, which sometimes cannot be one, or a text."""
    if chance.random() < 0.5:
        return {"input_ids": [token % 90 + 3 for token in prompt(chance)]} | simple(chance)
    size = 16 if chance.random() < 0.95 else 12
    pixels = torch.full((1, 3, size, size), chance.random())
    return {"input_ids": [1, 96, 96, 96, 96, chance.randint(3, 90)], "pixel_values": pixels} | simple(chance)


def plain(chance: random.Random) -> dict[str, Any]:
    return {"input_ids": prompt(chance)} | wanted(chance)


def traffic(
    manager: Any, chance: random.Random, until: float, owed: Counter[str], lock: threading.Lock, make: Any = plain
) -> None:
    """Send requests and cancel some of them."""
    while time.monotonic() < until:
        settings = make(chance)
        try:
            name = manager.add_request(**settings)
        except QueueFull:
            time.sleep(0.002)
            continue
        except ManagerStopped:
            return
        with lock:
            owed[name] += outputs_of(settings)
        if chance.random() < 0.3:
            time.sleep(chance.random() * 0.01)
            manager.cancel_request(name)


def soak(
    model: Any, seconds: float, seed: int, monkeypatch: pytest.MonkeyPatch, make: Any = plain, steps: Any = None
) -> Counter[str]:
    """Traffic of what `make` makes, for so long; `steps` has the method `step` that faults are put into."""
    steps = steps or type(model)
    chance = random.Random(seed)
    config = ContinuousBatchingConfig(
        num_blocks=30,
        page_size=16,
        max_batch_tokens=40,
        max_requests_per_batch=8,
        max_queue_size=40,
        cpu_offload_space=0.0 if seed % 200 else 0.0003,
        safety_margin=0.2 if seed % 200 else 0.0,
    )
    manager = model.init_continuous_batching(continuous_batching_config=config)
    step = steps.step

    def breaks(self: Any, batch: Any) -> torch.Tensor:
        if chance.random() < 0.01:
            raise Fault
        return step(self, batch)

    monkeypatch.setattr(steps, "step", breaks)
    owed: Counter[str] = Counter()
    lock = threading.Lock()
    until = time.monotonic() + seconds
    senders = [
        threading.Thread(target=traffic, args=(manager, random.Random(seed + i), until, owed, lock, make))
        for i in range(3)
    ]
    manager.start()
    for sender in senders:
        sender.start()
    got: Counter[str] = Counter()
    reasons: Counter[str] = Counter()

    def collect(timeout: float | None) -> bool:
        output = manager.get_result(timeout=timeout)
        if output is None:
            return False
        assert output.is_finished() and output.finish_reason is not None
        if output.finish_reason == "error":
            assert isinstance(output.exception, unspool.RequestFailed)
            cause = output.exception.__cause__
            assert isinstance(cause, Fault) or (cause is None and "its forward raised" in output.error)
        got[output.request_id.partition("__child#")[0]] += 1
        reasons[output.finish_reason] += 1
        return True

    while any(sender.is_alive() for sender in senders):
        collect(0.01)
    with manager.pause():
        pass
    manager.stop(block=False)
    wait_for(manager)
    assert not manager.is_running() and manager.fatal_error is None
    while collect(None):
        pass
    assert got == owed
    room, engine = manager._engine.room, manager._engine
    assert not engine.live and not engine.parents and not engine._sent
    assert not manager._outbox._boxes and not manager._outbox._unread
    assert len(engine.plain._free) == 8
    check_all_given_back(room)
    assert seed % 200 or room.swaps or make is not plain
    assert manager.metrics.past_bytes == 0
    print(f"{seconds:g} s, {sum(owed.values())} outputs: {dict(reasons)}, {manager.metrics.preemptions} put back")
    return reasons


def test_a_short_soak(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = soak(model, 3.0, 1, monkeypatch)
    assert reasons["length"] and reasons["cancelled"] and reasons["error"] and reasons["stop"]


@pytest.fixture(scope="module")
def seeing() -> Any:
    made = next(one for one in MULTIMODAL if one.model_type == "llava").make()
    made.generation_config.eos_token_id = None
    return unspool.wrap(made)


def test_a_short_soak_with_pictures(seeing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts over the store, and pictures in rows beside them."""
    reasons = soak(seeing, 3.0, 1, monkeypatch, told, RaggedModel)
    assert reasons["length"]
    assert reasons["cancelled"]
    assert reasons["error"]


@pytest.mark.full
def test_a_long_soak_with_pictures(seeing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    soak(seeing, 60.0, 2, monkeypatch, told, RaggedModel)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_long_soak(model: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    soak(model, 60.0, seed * 100, monkeypatch)


class Killed(BaseException):
    pass


def killed(model: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread dies in some step amid traffic: everything is answered once, and nobody waits for ever."""
    chance = random.Random(seed)
    config = ContinuousBatchingConfig(num_blocks=30, page_size=16, max_batch_tokens=40, max_requests_per_batch=8)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    step, left = type(model).step, iter(range(chance.randint(0, 60)))

    def dies(self: Any, batch: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise Killed
        return step(self, batch)

    owed: Counter[str] = Counter()
    lock, until = threading.Lock(), time.monotonic() + 60
    senders = [
        threading.Thread(target=traffic, args=(manager, random.Random(seed + i), until, owed, lock)) for i in range(3)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "step", dies)
        patch.setattr(threading, "excepthook", lambda *args: None)
        manager.start()
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(90)
        wait_for(manager)
    assert isinstance(manager.fatal_error, Killed) and not manager.is_running()
    got: Counter[str] = Counter()
    while (output := manager.get_result(timeout=0)) is not None:
        assert output.is_finished() and output.finish_reason is not None
        got[output.request_id.partition("__child#")[0]] += 1
    assert got == owed
    manager.destroy()
    (again,) = model.generate_batch([[5, 6, 7]], max_new_tokens=6, do_sample=False, progress_bar=False).values()
    assert again.finish_reason == "length", "the model serves on"


@pytest.mark.parametrize("seed", range(4))
def test_threads_that_are_killed(model: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(model, seed * 10, monkeypatch)


@pytest.mark.full
def test_many_threads_that_are_killed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4, 100):
        killed(model, seed * 10, monkeypatch)


@pytest.mark.parametrize("boundary", range(12))
def test_a_fault_at_every_step(model: Any, boundary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of a fixed mixture fails: its requests are told, and those that come later get their text."""
    chance = random.Random(5)
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=24, page_size=16, max_batch_tokens=30)
    )
    requests = [(prompt(chance), wanted(chance) | {"max_new_tokens": 8}) for _ in range(9)]
    for _, settings in requests:
        settings.pop("deadline", None)
        settings.pop("logits_processor", None)
    names = [(manager.add_request(ids, **settings), outputs_of(settings)) for ids, settings in requests]
    step, count = type(model).step, iter(range(1000))

    def breaks(self: Any, batch: Any) -> torch.Tensor:
        if next(count) == boundary:
            raise Fault
        return step(self, batch)

    monkeypatch.setattr(type(model), "step", breaks)
    while manager.step():
        pass
    reasons = Counter()
    for name, outputs in names:
        for one in [name, *(f"{name}__child#{i}" for i in range(outputs - 1))]:
            reasons[manager.get_result(one).finish_reason] += 1
    assert reasons["error"] > 0 and sum(reasons.values()) == sum(outputs for _, outputs in names)
    again = manager.add_request([5, 6, 7], max_new_tokens=6, do_sample=False)
    while manager.step():
        pass
    wanted_tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert manager.get_result(again).generated_tokens == wanted_tokens
    check_all_given_back(manager._engine.room)
