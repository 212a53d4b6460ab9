"""The manager: one result for every request, whatever happens; threads, coroutines, limits and mistakes."""

from __future__ import annotations

import asyncio
import gc
import io
import multiprocessing
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accounts import check_all_given_back

import unspool
from unspool import (
    ContinuousBatchingConfig,
    FIFOScheduler,
    GenerationConfig,
    GenerationOutput,
    LogitsProcessor,
    ManagerStopped,
    NonFiniteLogits,
    QueueFull,
    RequestState,
    RequestStatus,
    Scheduler,
    StoppingCriteria,
    register_scheduler,
)
from unspool.attention import registry

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13] * 12, [14]]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    loaded = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")[0]
    loaded.generation_config.eos_token_id = None  # so that texts are as long as they are asked for
    return loaded


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    return [model.generate(torch.tensor([p]), **SETTINGS)[0, len(p) :].tolist() for p in PROMPTS]


def make(model: Any, settings: dict[str, Any] | None = None, **config: Any) -> Any:
    config = {"num_blocks": 40, "page_size": 16} | config
    settings = SETTINGS if settings is None else settings
    return model.init_continuous_batching(settings, continuous_batching_config=ContinuousBatchingConfig(**config))


def finish(manager: Any) -> None:
    while manager.step():
        pass


def assert_nothing_is_left(manager: Any) -> None:
    room = manager._engine.room
    assert not manager._engine.live and not manager._engine._sent
    check_all_given_back(room)
    assert manager.metrics.running == manager.metrics.waiting == 0
    assert len(manager._engine.plain._free) == len(manager._engine.plain.states)


class Breaks(LogitsProcessor):
    """Raises when a row has so many tokens."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.at:
            raise ZeroDivisionError("broken on purpose")
        return scores


class BreaksToo(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        raise ZeroDivisionError("broken on purpose")


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, float("nan"))


class Listener:
    """A streamer that keeps what it hears, and can break at any call."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.heard: list[Any] = []
        self.breaks_at = breaks_at

    def _hear(self, what: Any) -> None:
        if len(self.heard) == self.breaks_at:
            raise ZeroDivisionError("broken on purpose")
        self.heard.append(what)

    def put(self, value: torch.Tensor) -> None:
        self._hear(value.tolist())

    def end(self) -> None:
        self._hear("end")


# Results


def test_results_in_threads_and_in_order(model: Any, expected: list[list[int]]) -> None:
    with make(model) as manager:
        names = manager.add_requests(PROMPTS, record_timestamps=True)
        outputs = {name: manager.get_result(name, timeout=30) for name in reversed(names)}
        assert manager.is_running()
    assert not manager.is_running()
    for name, prompt, tokens in zip(names, PROMPTS, expected, strict=True):
        output = outputs[name]
        assert output.request_id == name
        assert output.prompt_ids == prompt
        assert output.generated_tokens == tokens
        assert output.is_finished() and output.status is RequestStatus.FINISHED
        assert output.finish_reason == "length"
        assert output.error is None and output.exception is None
        assert output.usage.prompt_tokens == len(prompt) and output.usage.completion_tokens == 8
        assert output.timestamps is not None and len(output.timestamps) == 8
        assert output.timestamps == sorted(output.timestamps)
        times = output.timings
        assert times.queued is not None and times.first_token is not None and times.total is not None
        assert 0 <= times.queued <= times.first_token <= times.total
        assert output.created_time <= output.lifespan[0] <= output.lifespan[1]
    assert_nothing_is_left(manager)


def test_iterating_over_all_of_them(model: Any, expected: list[list[int]]) -> None:
    with make(model) as manager:
        names = manager.add_requests(PROMPTS)
        got = {}
        for output in manager:
            got[output.request_id] = output.generated_tokens
            if len(got) == len(names):
                break
    assert got == dict(zip(names, expected, strict=True))
    assert list(manager) == []


def test_streaming_gives_every_token_once(model: Any, expected: list[list[int]]) -> None:
    with make(model) as manager:
        name = manager.add_request(PROMPTS[0], streaming=True)
        outputs = list(manager.request_id_iter(name))
    assert [one.generated_tokens for one in outputs] == [expected[0][: i + 1] for i in range(7)] + [expected[0]]
    assert [one.is_finished() for one in outputs] == [False] * 7 + [True]
    assert outputs[0].status is RequestStatus.DECODING


def test_why_a_request_stopped(model: Any, expected: list[list[int]]) -> None:
    manager = make(model)
    first = manager.add_request(PROMPTS[0], eos_token_id=[expected[0][3], 9999])
    second = manager.add_request(PROMPTS[1], stopping_criteria=[lambda ids, scores, **kw: ids.shape[1] == 5])
    finish(manager)
    output = manager.get_result(first)
    end = expected[0].index(expected[0][3])
    assert (output.finish_reason, output.stop) == ("stop", expected[0][3])
    assert output.generated_tokens == expected[0][: end + 1]
    output = manager.get_result(second)
    assert (output.finish_reason, output.stop, len(output.generated_tokens)) == ("stop", "function", 3)


def test_log_probabilities(model: Any, expected: list[list[int]]) -> None:
    outputs = model.generate_batch(PROMPTS, **SETTINGS, return_logprobs=True, top_logprobs=3)
    for prompt, output in zip(PROMPTS, outputs.values(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.generated_tokens])).logits[0, len(prompt) - 1 : -1]
        right = logits.log_softmax(-1)
        assert output.logprobs == pytest.approx(
            [float(r[t]) for r, t in zip(right, output.generated_tokens, strict=True)], abs=1e-4
        )
        for row, told, token in zip(right, output.top_logprobs, output.generated_tokens, strict=True):
            assert list(told) == row.topk(3)[1].tolist()
            assert next(iter(told)) == token
    sampled = {"do_sample": True, "seed": 1, "temperature": 0.5, "top_k": 2, "max_new_tokens": 6}
    (output,) = model.generate_batch(PROMPTS[:1], **(SETTINGS | sampled), return_logprobs=True).values()
    assert all(-0.7 < value <= 0 or value < 0 for value in output.logprobs)
    assert sum(value > -0.6932 for value in output.logprobs) > 0, "of two tokens, one has at least a half"
    assert output.top_logprobs is None or output.top_logprobs == [{}] * 6


def test_unseeded_requests_follow_the_global_seed(model: Any) -> None:
    settings = SETTINGS | {"do_sample": True}

    def run(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return [one.generated_tokens for one in model.generate_batch(PROMPTS * 2, **settings).values()]

    assert run(1) == run(1) != run(2)
    assert run(1)[0] != run(1)[4], "equal prompts get numbers of their own"
    config = ContinuousBatchingConfig(seed=7)
    first, second = (
        [
            o.generated_tokens
            for o in model.generate_batch(PROMPTS, **settings, continuous_batching_config=config).values()
        ]
        for _ in range(2)
    )
    assert first == second


# asyncio


def test_async_for_and_handlers(model: Any, expected: list[list[int]]) -> None:
    async def main() -> None:
        with make(model) as manager:

            async def read(prompt: list[int]) -> list[int]:
                tokens: list[int] = []
                async for output in manager.request_id_iter(manager.add_request(prompt, streaming=True)):
                    assert output.generated_tokens[: len(tokens)] == tokens
                    tokens = output.generated_tokens
                return tokens

            assert await asyncio.gather(*map(read, PROMPTS)) == expected
            heard: asyncio.Queue[tuple[GenerationOutput, bool]] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            name = manager.add_request(PROMPTS[1])
            manager.register_result_handler(
                name, lambda output: heard.put_nowait((output, asyncio.get_running_loop() is loop))
            )
            output, in_the_loop = await asyncio.wait_for(heard.get(), 30)
            assert in_the_loop and output.generated_tokens == expected[1]

    asyncio.run(main())


def test_cancelling_the_reading_task_cancels_the_request(model: Any) -> None:
    async def main() -> None:
        with make(model, SETTINGS | {"max_new_tokens": 400}) as manager:
            name = manager.add_request(PROMPTS[0], streaming=True)
            seen = asyncio.Event()

            async def read() -> None:
                async for _ in manager.request_id_iter(name):
                    seen.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(seen.wait(), 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while (output := await asyncio.to_thread(manager.get_result, name, 30)) and not output.is_finished():
                pass
            assert output.finish_reason == "cancelled"
        assert_nothing_is_left(manager)

    asyncio.run(main())


def test_leaving_does_not_hold_up_the_event_loop(model: Any) -> None:
    async def main() -> None:
        seen: list[int] = []

        def waits(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert ready.wait(30), "another task sets it while the manager is being left"
            return scores

        async def other() -> None:
            seen.append(1)
            ready.set()

        ready = threading.Event()
        async with make(model) as manager:
            name = manager.add_request(PROMPTS[0], max_new_tokens=2, logits_processor=[waits])
            task = asyncio.create_task(other())
        await task
        assert manager.get_result(name).error is None
        assert seen
        manager = make(model)

        async def breaks() -> None:
            async with manager:
                manager.add_request(PROMPTS[0], "one", max_new_tokens=400)
                raise KeyError

        with pytest.raises(KeyError):
            await breaks()
        assert manager.get_result("one").finish_reason == "cancelled"

    asyncio.run(main())


# Faults stay with the request that caused them

FAULTS: dict[str, dict[str, Any]] = {
    "processor at once": {"logits_processor": [Breaks(0)]},
    "processor later": {"logits_processor": [Breaks(7)]},
    "criterion": {"stopping_criteria": [BreaksToo()]},
    "streamer at the prompt": {"streamer": Listener(0)},
    "streamer at a token": {"streamer": Listener(3)},
    "streamer at the end": {"streamer": Listener(9)},
    "not a number": {"logits_processor": [Nothing()]},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: 1 // 0},
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_ends_its_request_alone(fault: str, model: Any, expected: list[list[int]]) -> None:
    manager = make(model)
    names = [manager.add_request(PROMPTS[0]), manager.add_request(PROMPTS[0], **FAULTS[fault])]
    names += [manager.add_request(prompt) for prompt in PROMPTS[1:]]
    finish(manager)
    outputs = [manager.get_result(name) for name in names]
    broken = outputs.pop(1)
    assert [one.generated_tokens for one in outputs] == expected
    assert {one.finish_reason for one in outputs} == {"length"}
    assert_nothing_is_left(manager)
    if fault == "streamer at the end":  # all tokens were made by then
        assert broken.generated_tokens == expected[0]
        return
    assert broken.finish_reason == "error" and broken.status is RequestStatus.FAILED
    assert names[1] in broken.error
    if fault == "not a number":
        assert isinstance(broken.exception, NonFiniteLogits)
    else:
        assert isinstance(broken.exception.__cause__, ZeroDivisionError)
    assert broken.generated_tokens == expected[0][: len(broken.generated_tokens)]


@pytest.mark.parametrize("prompt", [14, 40], ids=["none", "some of its blocks are findable"])
def test_what_is_not_a_number_stays_with_its_request(prompt: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention reads rows as a rectangle: what a failed request left in a block must not reach the next."""
    monkeypatch.setattr(registry, "serves", lambda store: False)
    manager = make(model, num_blocks=8, max_batch_tokens=64)
    store = manager._engine.room.store
    long = manager.add_request(PROMPTS[2], max_new_tokens=20)
    bad = manager.add_request([5] * prompt, max_new_tokens=20)
    manager.step()
    (row,) = next(state.rows for name, state in manager._engine.scheduler.active_requests.items() if name == bad)
    for pool in (store.keys[0], store.values[0]):
        pool[[row.blocks[0][place // 16] * 16 + place % 16 for place in range(row.computed)]] = float("nan")
    manager.step()
    assert isinstance(manager.get_result(bad).exception, NonFiniteLogits)
    others = [manager.add_request([5 + i] * (2 + i), max_new_tokens=4) for i in range(4)]
    finish(manager)
    assert [manager.get_result(name).error for name in (long, *others)] == [None] * 5


def test_a_result_handler_that_raises(model: Any, expected: list[list[int]]) -> None:
    def handler(output: GenerationOutput) -> None:
        raise ZeroDivisionError("broken on purpose")

    manager = make(model)
    bad, good = manager.add_request(PROMPTS[0], streaming=True), manager.add_request(PROMPTS[1])
    manager.register_result_handler(bad, handler)
    finish(manager)
    assert manager.get_result(good).generated_tokens == expected[1]
    assert manager.metrics.finished == {"error": 1, "length": 1}
    assert_nothing_is_left(manager)


def test_a_step_that_fails_answers_its_requests_and_the_rest_go_on(
    model: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make(model, max_requests_per_batch=2)
    names = manager.add_requests(PROMPTS)
    manager.step()
    step = type(model).step

    def fail(self: Any, batch: Any) -> torch.Tensor:
        monkeypatch.setattr(type(model), "step", step)
        raise MemoryError("no room on purpose")

    monkeypatch.setattr(type(model), "step", fail)
    finish(manager)
    outputs = [manager.get_result(name) for name in names]
    assert [one.finish_reason for one in outputs] == ["error", "error", "length", "length"]
    assert isinstance(outputs[0].exception.__cause__, MemoryError)
    assert [one.generated_tokens for one in outputs[2:]] == expected[2:]
    assert_nothing_is_left(manager)


class Broken(Scheduler):
    def schedule_batch(self, token_budget: int, cache_budget: int) -> list[RequestState]:
        raise ZeroDivisionError("broken on purpose")


class Refusing(FIFOScheduler):
    def add_waiting_request(self, state: RequestState) -> None:
        raise ZeroDivisionError("broken on purpose")


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("kind", [Broken, Refusing])
def test_a_scheduler_that_raises_ends_the_manager_and_everybody_is_told(
    model: Any, kind: type[Scheduler], threaded: bool
) -> None:
    register_scheduler("broken", kind)
    manager = make(model, scheduler_type="broken")
    names = manager.add_requests(PROMPTS)
    if threaded:
        manager.start()
    else:
        with pytest.raises(ZeroDivisionError):
            manager.step()
    for name in names:
        output = manager.get_result(name, timeout=30)
        assert output.finish_reason == "error"
        assert isinstance(output.exception, ManagerStopped)
        assert isinstance(output.exception.__cause__, ZeroDivisionError)
    manager.join(30)
    assert isinstance(manager.fatal_error, ZeroDivisionError)
    with pytest.raises(ManagerStopped, match="ZeroDivisionError"):
        manager.add_request(PROMPTS[0])
    assert manager.get_result(timeout=0) is None
    manager.stop()


def test_who_waits_while_a_failure_is_told_is_told_too(model: Any) -> None:
    """Requests are answered one after another; until all of them are, there is something to wait for."""
    manager = make(model)
    entered = threading.Event()

    def slow(output: GenerationOutput) -> None:
        entered.set()
        time.sleep(0.3)

    names = [manager.add_request(prompt) for prompt in PROMPTS[:2]]
    manager.register_result_handler(names[0], slow)
    manager._engine.scheduler.schedule_batch = lambda *budgets: 1 / 0
    manager.start()
    assert entered.wait(30)
    assert isinstance(manager.get_result(names[1], timeout=30).exception, ManagerStopped)


def test_an_idle_thread_takes_no_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make(model)
    turns: list[None] = []
    step = manager._worker._step
    monkeypatch.setattr(manager._worker, "_step", lambda: (turns.append(None), step())[1])
    manager.start()
    for _ in range(2):
        manager.get_result(manager.add_request(PROMPTS[0], max_new_tokens=3))
        with manager.pause():
            taken = len(turns)
        time.sleep(0.1)
        assert taken <= len(turns) <= taken + 1, "one to see that nothing is left, at most"
    manager.stop()


def test_who_waits_for_any_output_is_told_of_the_end(model: Any) -> None:
    manager = make(model)
    manager.start()
    took: list[Any] = []
    waiter = threading.Thread(target=lambda: took.append(manager.get_result()), daemon=True)
    waiter.start()
    time.sleep(0.1)
    manager.stop()
    waiter.join(20)
    assert took == [None]


def test_a_killed_thread_is_no_silence(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    monkeypatch.setattr(threading, "excepthook", lambda *args: None)
    manager = make(model)

    def kill(ids: Any, scores: Any, **kwargs: Any) -> bool:
        raise Killed

    names = [manager.add_request(PROMPTS[0]), manager.add_request(PROMPTS[1], stopping_criteria=[kill])]
    manager.start()
    for name in names:
        assert manager.get_result(name, timeout=30).finish_reason == "error"
    assert isinstance(manager.fatal_error, Killed)
    assert not manager.is_running()


def test_a_stalled_step_is_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make(model, watchdog_timeout=0.1)
    release = threading.Event()

    def stall(ids: Any, scores: Any, **kwargs: Any) -> bool:
        return not release.wait(30)

    names = [manager.add_request(PROMPTS[0]), manager.add_request(PROMPTS[1], stopping_criteria=[stall])]
    manager.start()
    for name in names:
        output = manager.get_result(name, timeout=20)
        assert output.finish_reason == "error" and "watchdog_timeout=0.1" in output.error
    with pytest.raises(ManagerStopped, match="watchdog_timeout"):
        manager.add_request(PROMPTS[0])
    release.set()
    manager.join(20)
    assert manager.get_result(timeout=0) is None, "nobody is answered twice"


# Cancelling, deadlines, stopping


def test_cancelling_at_every_moment(model: Any, expected: list[list[int]]) -> None:
    for steps in range(10):
        manager = make(model, max_batch_tokens=16)
        names = manager.add_requests(PROMPTS)
        for _ in range(steps):
            manager.step()
        live = [manager.cancel_request(name) for name in names[1:3]]
        finish(manager)
        outputs = [manager.get_result(name) for name in names]
        for output, tokens in zip(outputs, expected, strict=True):
            assert output.generated_tokens == tokens[: len(output.generated_tokens)]
        assert [one.finish_reason for one in outputs] == [
            "length",
            *("cancelled" if alive else "length" for alive in live),
            "length",
        ]
        assert all((one.status is RequestStatus.CANCELLED) == (one.finish_reason == "cancelled") for one in outputs)
        assert_nothing_is_left(manager)
        assert not manager.cancel_request(names[1]) and not manager.cancel_request("nobody")


def test_cancelling_before_the_scheduler_knows_the_request(model: Any) -> None:
    """It comes, and is cancelled, while others are taken in for a step."""
    manager = make(model)

    class Adds:
        def put(self, value: torch.Tensor) -> None:
            if value.numel() > 1:  # the prompt
                manager.add_request([5, 6], "late", num_beams=2, num_return_sequences=2)
                assert manager.cancel_request("late__child#0")

        def end(self) -> None: ...

    manager.add_request([3, 4], "first", streamer=Adds())
    finish(manager)
    assert manager.get_result("first").finish_reason == "length"
    for name in ("late", "late__child#0"):
        output = manager.get_result(name)
        assert (output.finish_reason, output.generated_tokens) == ("cancelled", [])
    assert_nothing_is_left(manager)


def test_cancelling_cancels_every_output(model: Any) -> None:
    manager = make(model)
    name = manager.add_request(PROMPTS[0], do_sample=True, num_return_sequences=3)
    manager.step()
    assert manager.cancel_request(name)
    finish(manager)
    for one in (name, f"{name}__child#0", f"{name}__child#1"):
        assert manager.get_result(one).finish_reason == "cancelled"


def test_deadlines(model: Any, expected: list[list[int]]) -> None:
    manager = make(model, max_requests_per_batch=1)
    runs = manager.add_request(PROMPTS[0], deadline=0.05, max_new_tokens=400)
    waits = manager.add_request(PROMPTS[1], deadline=0.05)
    fine = manager.add_request(PROMPTS[2], deadline=60)
    manager.add_request(PROMPTS[0], deadline=0.05, do_sample=True, num_return_sequences=3)
    manager.step()
    time.sleep(0.06)
    finish(manager)
    output = manager.get_result(runs)
    assert output.finish_reason == "deadline" and output.status is RequestStatus.FINISHED
    assert output.generated_tokens[:1] == expected[0][:1]
    output = manager.get_result(waits)
    assert (output.finish_reason, output.generated_tokens) == ("deadline", [])
    assert manager.get_result(fine).generated_tokens == expected[2]
    assert_nothing_is_left(manager)


def test_stop_finishes_what_there_is_or_cancels_it(model: Any, expected: list[list[int]]) -> None:
    manager = make(model)
    names = manager.add_requests(PROMPTS)
    manager.start()
    manager.stop()
    assert [manager.get_result(name).generated_tokens for name in names] == expected
    with pytest.raises(ManagerStopped, match="stopped"):
        manager.add_request(PROMPTS[0])
    manager.start()
    name = manager.add_request(PROMPTS[0], max_new_tokens=450)
    later = manager.add_request(PROMPTS[1], max_new_tokens=450)
    manager.stop(hard_stop=True)
    assert manager.get_result(name).finish_reason == "cancelled"
    assert manager.get_result(later).finish_reason == "cancelled"
    assert manager.get_result() is None
    assert_nothing_is_left(manager)


def test_stop_without_a_thread(model: Any, expected: list[list[int]]) -> None:
    manager = make(model)
    names = manager.add_requests(PROMPTS)
    manager.stop()
    assert [manager.get_result(name).generated_tokens for name in names] == expected
    manager = make(model)
    names = manager.add_requests(PROMPTS)
    manager.stop(hard_stop=True)
    assert {manager.get_result(name).finish_reason for name in names} == {"cancelled"}


def test_an_error_in_the_context_cancels(model: Any) -> None:
    manager = make(model)
    name = manager.add_request(PROMPTS[0], max_new_tokens=450)
    with pytest.raises(KeyError), manager:
        raise KeyError
    assert manager.get_result(name).finish_reason == "cancelled"


def test_pausing(model: Any, expected: list[list[int]]) -> None:
    with make(model) as manager:
        with manager.pause():
            name = manager.add_request(PROMPTS[0])
            assert manager.get_result(name, timeout=0.1) is None
            assert manager.metrics.steps == 0
        assert manager.get_result(name, timeout=30).generated_tokens == expected[0]


def test_step_beside_the_thread(model: Any) -> None:
    with make(model) as manager, pytest.raises(RuntimeError, match="without start"):
        manager.step()


def test_a_forgotten_manager_ends_its_thread(model: Any) -> None:
    manager = make(model)
    manager.start()
    manager.add_request(PROMPTS[0], max_new_tokens=450)
    thread, store = manager._worker._thread, weakref.ref(manager._engine.room.store)
    del manager
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert store() is None, "its memory is given back"


def test_destroying_gives_memory_back(model: Any) -> None:
    manager = make(model)
    manager.start()
    name = manager.add_request(PROMPTS[0], max_new_tokens=450)
    memory = weakref.ref(next(iter(manager._engine.room.store.keys.values())))
    manager.destroy()
    gc.collect()
    assert memory() is None
    assert manager.get_result(name).finish_reason == "cancelled"
    with pytest.raises(ManagerStopped, match="destroyed"):
        manager.start()
    with pytest.raises(ManagerStopped, match="destroyed"):
        manager.add_request(PROMPTS[0])
    manager.destroy()


def _in_a_fork(manager: Any, names: list[str], answers: Any) -> None:
    told = [manager.is_running(), manager.get_result(timeout=20)]
    try:
        manager.add_request([5])
    except ManagerStopped as error:
        told.append(str(error))
    manager.stop()
    answers.put(told)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_a_forked_process_does_not_hang(model: Any) -> None:
    with make(model) as manager:
        names = manager.add_requests(PROMPTS)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_in_a_fork, args=(manager, names, answers))
        child.start()
        told = answers.get(timeout=30)
        child.join(30)
        assert child.exitcode == 0
        assert told[:2] == [False, None] and "process" in told[2]
        assert all(manager.get_result(name, timeout=30).finish_reason == "length" for name in names)


ENDS = {
    "while it runs": "manager.get_result(timeout=0.2)",
    "while it is held": "manager.pause().__enter__()",
    "while a step hangs": (
        "manager.add_request([5], stopping_criteria=[lambda ids, scores, **kw: time.sleep(600)])\ntime.sleep(0.2)"
    ),
    "after a stop that did not wait": "manager.stop(block=False)",
    "after a stop that waited too short": "manager.stop(timeout=0.05)",
    "when it is forgotten": (
        "thread = manager._worker._thread\ndel manager\ngc.collect()\nthread.join(20)\nassert not thread.is_alive()"
    ),
    "in a forked process": (
        "child = os.fork()\n"
        "if not child:\n"
        "    manager.stop()\n"
        "    del manager\n"
        "    sys.exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "manager.stop(hard_stop=True)\n"
        "assert not manager.is_running()"
    ),
}


@pytest.mark.parametrize("way", sorted(ENDS))
def test_the_interpreter_ends(way: str, tiny_llama_dir: Path) -> None:
    if "fork" in way and sys.platform != "linux":
        pytest.skip("needs fork")
    code = (
        "import gc, logging, os, sys, time, warnings, unspool\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"  # of forks beside threads
        "logging.disable()\n"
        f"model, _ = unspool.load({str(tiny_llama_dir)!r}, dtype='float32', device='cpu')\n"
        "manager = model.init_continuous_batching({'max_new_tokens': 480, 'eos_token_id': None})\n"
        "manager.start()\n"
        "manager.add_requests([[5, 6]] * 20)\n"
        f"{ENDS[way]}\n"
        "print('done')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.strip()) == (0, "done"), ended.stderr
    assert not ended.stderr


# Limits and mistakes


def test_bounded_queues(model: Any) -> None:
    manager = make(model, max_queue_size=2)
    names = manager.add_requests(PROMPTS)
    with pytest.raises(QueueFull, match="max_queue_size is 2"):
        manager.add_request(PROMPTS[0])
    finish(manager)
    reasons = [manager.get_result(name).finish_reason for name in names]
    assert reasons == ["length", "length", "rejected", "rejected"]
    manager = make(model, max_queued_tokens=10)
    manager.add_request([5] * 8)
    with pytest.raises(QueueFull, match="max_queued_tokens is 10"):
        manager.add_request([5] * 3)
    manager.add_request([5, 6])


MISTAKES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "id outside the vocabulary": ([5, 10**6], {}, ValueError, "1000000"),
    "negative id": ([5, -1], {}, ValueError, "-1"),
    "empty": ([], {}, ValueError, "empty"),
    "text": ("once", {}, TypeError, "encode"),
    "floats": ([1.5], {}, TypeError, "1.5"),
    "two rows": ([[5], [6]], {}, TypeError, "each row"),
    "no new tokens": ([5], {"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    "absurd length": ([5], {"max_new_tokens": 10**12}, ValueError, "max_new_tokens"),
    "beyond the cache": ([5], {"max_new_tokens": 480}, ValueError, "cache holds 320"),
    "prompt beyond the positions": ([5] * 600, {}, ValueError, "512"),
    "misspelt setting": ([5], {"temprature": 1.0}, ValueError, "temprature"),
    "out of range": ([5], {"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
    "contradiction": ([5], {"do_sample": False, "num_return_sequences": 3}, ValueError, "num_return_sequences"),
    "absurd number": ([5], {"do_sample": True, "num_return_sequences": 10**6}, ValueError, "num_return_sequences"),
    "no tokenizer": ([5], {"stop_strings": "x"}, ValueError, "tokenizer"),
    "past deadline": ([5], {"deadline": 0}, ValueError, "deadline"),
    "priority": ([5], {"priority": "high"}, TypeError, "priority"),
    "streaming": ([5], {"streaming": "yes"}, TypeError, "streaming"),
    "timestamps": ([5], {"record_timestamps": 2.5}, TypeError, "record_timestamps"),
    "salt": ([5], {"cache_salt": []}, TypeError, "cache_salt"),
    "streamer": ([5], {"streamer": print}, TypeError, "streamer"),
    "streamer of several": (
        [5],
        {"streamer": Listener(), "do_sample": True, "num_return_sequences": 2},
        ValueError,
        "one output",
    ),
    "candidates beyond the step": ([5], {"penalty_alpha": 0.6, "top_k": 200}, ValueError, "max_batch_tokens=100"),
    "candidates beyond the cache": ([5] * 30, {"penalty_alpha": 0.6, "top_k": 11}, ValueError, "cache holds 320"),
    "layers that are not there": ([5], {"dola_layers": [5]}, ValueError, "dola_layers"),
    "guided by nothing": ([5], {"guidance_scale": 2.0, "negative_prompt_ids": []}, ValueError, "negative_prompt_ids"),
    "guided by strangers": (
        [5],
        {"guidance_scale": 2.0, "negative_prompt_ids": [10**6]},
        ValueError,
        "negative_prompt_ids",
    ),
    "guided by what is masked": (
        [5],
        {"guidance_scale": 2.0, "negative_prompt_ids": [5], "negative_prompt_attention_mask": [0]},
        ValueError,
        "negative_prompt_attention_mask",
    ),
    "guided by half a mask": (
        [5],
        {"guidance_scale": 2.0, "negative_prompt_ids": [5], "negative_prompt_attention_mask": [1, 1]},
        ValueError,
        "negative_prompt_attention_mask",
    ),
    "guided beyond the cache": (
        [5],
        {"guidance_scale": 2.0, "negative_prompt_ids": [5] * 310},
        ValueError,
        "cache holds 320",
    ),
    "a negative prompt for nothing": ([5], {"negative_prompt_ids": [5]}, ValueError, "guidance_scale"),
    "healing without a tokenizer": ([5, 6], {"token_healing": True}, ValueError, "tokenizer"),
    "log-probabilities of prompts": ([5], {"prompt_logprobs": -1}, ValueError, "prompt_logprobs"),
    "attention weights": ([5], {"output_attentions": True}, unspool.Unsupported, "output_attentions"),
    "hidden states": ([5], {"output_hidden_states": True}, unspool.Unsupported, "output_hidden_states"),
    "drafts by layers of no model": ([5], {"use_mtp": True}, unspool.Unsupported, "use_mtp"),
    "a store of its own": ([5], {"cache_implementation": "quantized"}, unspool.Unsupported, "cache_implementation"),
    "a tokenizer for no assistant": ([5], {"assistant_tokenizer": object()}, ValueError, "assistant_model"),
    "beams beyond the cache": ([5] * 30, {"num_beams": 8, "max_new_tokens": 60}, ValueError, "num_beams"),
    "assistant": ([5], {"assistant_model": 5}, TypeError, "assistant_model"),
    "all layers": ([5], {"assistant_early_exit": 2}, ValueError, "assistant_early_exit"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_is_answered_at_once_and_alone(mistake: str, model: Any, expected: list[list[int]]) -> None:
    prompt, arguments, kind, text = MISTAKES[mistake]
    manager = make(model, num_blocks=20, max_batch_tokens=100)
    with pytest.raises(kind, match=text):
        manager.add_request(prompt, **arguments)
    assert manager.add_requests([]) == []
    (rejected,) = manager.add_requests([prompt], **arguments)
    good = manager.add_request(PROMPTS[0])
    output = manager.get_result(rejected)
    assert (output.finish_reason, output.status) == ("rejected", RequestStatus.FAILED)
    assert isinstance(output.exception, kind) and text.split(" ")[0] in output.error
    finish(manager)
    assert manager.get_result(good).generated_tokens == expected[0]
    assert_nothing_is_left(manager)


def test_padded_prompts(model: Any) -> None:
    ids, mask = torch.tensor([[0, 5, 6], [5, 6, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    for inputs, marks in ((ids, mask), (ids.tolist(), mask.tolist()), (list(ids), mask)):
        outputs = list(model.generate_batch(inputs, attention_mask=marks, max_new_tokens=4, do_sample=False).values())
        assert [output.prompt_ids for output in outputs] == [[5, 6], [5, 6, 7]]
        for output in outputs:
            alone = model.generate(torch.tensor([output.prompt_ids]), max_new_tokens=4, do_sample=False)
            assert output.generated_tokens == alone[0, len(output.prompt_ids) :].tolist()
    for wrong in (mask[:1], mask[:, :2], 5, [[1, 1, 1], None]):
        with pytest.raises(ValueError, match="attention_mask must have a 0 or 1 for each token"):
            model.generate_batch(ids, attention_mask=wrong)
    with pytest.raises(ValueError, match=r"inputs_embeds \(that is for generate"):
        model.generate_batch(ids, inputs_embeds=ids)


def test_names(model: Any) -> None:
    manager = make(model)
    manager.add_request(PROMPTS[0], "mine")
    with pytest.raises(ValueError, match="'mine' is in use"):
        manager.add_request(PROMPTS[0], "mine")
    finish(manager)
    with pytest.raises(ValueError, match="not taken"):
        manager.add_request(PROMPTS[0], "mine")
    assert manager.get_result("mine") is not None
    for call in (
        manager.get_result,
        manager.request_id_iter,
        lambda name: manager.register_result_handler(name, print),
    ):
        with pytest.raises(ValueError, match="unknown"):
            call("mine")
    manager.add_request(PROMPTS[0], "mine")
    finish(manager)


def test_names_that_are_made_up_are_nobodys(model: Any) -> None:
    manager = make(model)
    with pytest.raises(TypeError, match="request_id must be a text, not 5"):
        manager.add_request(PROMPTS[0], request_id=5)
    for name in ("", "mine__child#0"):
        with pytest.raises(ValueError, match="request_id"):
            manager.add_request(PROMPTS[0], name)
    manager.add_request(PROMPTS[0], "req_0")
    assert manager.add_request(PROMPTS[1]) == "req_1"
    manager.add_request(PROMPTS[0], "req_2")
    assert manager.add_requests(PROMPTS[:2]) == ["req_3", "req_4"]
    finish(manager)


def test_mistakes_that_concern_no_request(model: Any, expected: list[list[int]]) -> None:
    manager = make(model)
    manager.add_request(PROMPTS[0], "mine")
    with pytest.raises(TypeError, match="callback must be callable"):
        manager.register_result_handler("mine", 5)
    with pytest.raises(TypeError, match="timeout"):
        manager.get_result(timeout="soon")
    assert manager.get_result(timeout=-1) is None
    assert manager.cancel_request("nobody") is False and manager.cancel_request(None) is False
    for config in ({"scheduler_type": 5}, {"scheduler_type": ["fifo"]}):
        with pytest.raises(TypeError, match="scheduler_type"):
            ContinuousBatchingConfig(**config)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name must be a text"):
        register_scheduler(5, Scheduler)  # type: ignore[arg-type]
    for wrong in ("text", 5, None):
        with pytest.raises(TypeError, match="inputs must be a list of prompts"):
            model.generate_batch(wrong)
    with pytest.raises(TypeError, match="must be a ContinuousBatchingConfig or a dict, not int"):
        model.generate_batch([PROMPTS[0]], continuous_batching_config=5)
    assert model.generate_batch([]) == {}
    rows = model.generate_batch(
        torch.tensor([PROMPTS[0]]), SETTINGS, continuous_batching_config={"num_blocks": 4, "page_size": 16}
    )
    assert [one.generated_tokens for one in rows.values()] == expected[:1]
    finish(manager)
    assert manager.get_result("mine").generated_tokens == expected[0]


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
def test_what_cannot_be_called_is_refused(model: Any, name: str) -> None:
    manager = make(model)
    for wrong in (5, max, [0], [len, "x"]):
        with pytest.raises(TypeError, match=f"{name} must"):
            manager.add_request(PROMPTS[0], **{name: wrong})
    assert not manager.step()


def test_settings_of_managers(model: Any) -> None:
    for name in ("max_requests_per_batch", "num_blocks"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[1, "):
            make(model, **{name: 10**9})
    with pytest.raises(ValueError, match="scheduler_type='best'"):
        make(model, scheduler_type="best")
    with pytest.raises(TypeError, match="Scheduler"):
        register_scheduler("x", int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\[prompt\]"):
        model.generate_batch([5, 6])
    assert model.generate_batch([]) == {}


def test_whole_configs_of_requests(model: Any, expected: list[list[int]]) -> None:
    manager = make(model, {})
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    first = manager.add_request(PROMPTS[0], generation_config=config, eos_token_id=None)
    second = manager.add_request(PROMPTS[0], generation_config=config, eos_token_id=None, max_new_tokens=3)
    third = manager.add_request(PROMPTS[0], eos_token_id=None)
    finish(manager)
    assert manager.get_result(first).generated_tokens == expected[0]
    assert manager.get_result(second).generated_tokens == expected[0][:3]
    assert len(manager.get_result(third).generated_tokens) == 20, "generate()'s own default"


# Requests of several rows, and of several tokens a step


def test_beams_give_all_their_outputs(model: Any) -> None:
    settings = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 8}
    reference = model.generate(
        torch.tensor(PROMPTS[:1]), **settings, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    outputs = model.generate_batch([*PROMPTS[:1], PROMPTS[1]], do_sample=False, **settings)
    assert list(outputs) == [f"req_{i}{end}" for i in range(2) for end in ("", "__child#0", "__child#1")]
    for i, output in enumerate(list(outputs.values())[:3]):
        assert output.generated_tokens == reference.sequences[i, 4:].tolist()
        assert output.score == pytest.approx(float(reference.sequences_scores[i]))
        assert output.finish_reason == "length" and output.usage.completion_tokens == 8


def test_beams_are_put_back_and_go_on(model: Any) -> None:
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 40, "do_sample": False}
    prompts = [PROMPTS[2], PROMPTS[0], [7] * 20]
    for sharing, space in ((True, 0.0), (False, 0.0), (True, 0.01), (False, 0.01)):
        manager = make(model, num_blocks=16, allow_block_sharing=sharing, safety_margin=0.0, cpu_offload_space=space)
        names = [manager.add_request(prompt, **settings) for prompt in prompts]
        plain = manager.add_request(PROMPTS[3], max_new_tokens=100)
        finish(manager)
        assert manager.metrics.preemptions > 0 and (manager.metrics.swaps > 0) == (space > 0)
        for name, prompt in zip(names, prompts, strict=True):
            wanted = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
            assert manager.get_result(name).generated_tokens == wanted
        assert manager.get_result(plain).finish_reason == "length"
        assert_nothing_is_left(manager)


@pytest.mark.parametrize("steps", range(5))
def test_cancelling_one_output_of_beams_cancels_all(model: Any, steps: int) -> None:
    manager = make(model)
    name = manager.add_request(PROMPTS[0], num_beams=3, num_return_sequences=2)
    for _ in range(steps):
        manager.step()
    assert manager.cancel_request(f"{name}__child#0")
    finish(manager)
    assert [manager.get_result(one).finish_reason for one in (name, f"{name}__child#0")] == ["cancelled"] * 2
    assert_nothing_is_left(manager)
    assert not manager._engine.parents


def test_streaming_beams(model: Any) -> None:
    settings = {"num_beams": 3, "max_new_tokens": 8}
    wanted = model.generate(torch.tensor(PROMPTS[:1]), **settings, do_sample=False)[0, 4:].tolist()
    listener = Listener()
    with make(model) as manager:
        name = manager.add_request(PROMPTS[0], streaming=True, streamer=listener, **settings)
        outputs = list(manager.request_id_iter(name))
    assert outputs[-1].generated_tokens == wanted
    assert all(wanted[: len(one.generated_tokens)] == one.generated_tokens for one in outputs)
    assert listener.heard == [[PROMPTS[0]], *([token] for token in wanted), "end"]


KINDS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "guided": {"guidance_scale": 2.0, "negative_prompt_ids": [7, 7, 9]},
    "guided beams": {"guidance_scale": 2.0, "num_beams": 2, "num_return_sequences": 2},
    "guided drafts": {"guidance_scale": 2.0, "prompt_lookup_num_tokens": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "guided and contrastive": {"penalty_alpha": 0.6, "top_k": 3, "guidance_scale": 2.0},
    "contrasted layers": {"dola_layers": "low", "repetition_penalty": 1.2},
    "prompt told": {"prompt_logprobs": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fault", ["processor at once", "processor later", "criterion", "streamer at a token", "not a number"]
)
def test_a_fault_in_another_mode_ends_its_request_alone(
    kind: str, fault: str, model: Any, expected: list[list[int]]
) -> None:
    mode = dict(KINDS[kind])
    faulty = FAULTS[fault] | ({"streamer": Listener(3)} if "streamer" in fault else {})
    if "streamer" in fault:
        mode.pop("num_return_sequences", None)
    manager = make(model)
    names = [manager.add_request(PROMPTS[0]), manager.add_request(PROMPTS[0], **mode, **faulty)]
    names += [manager.add_request(prompt) for prompt in PROMPTS[1:]]
    fine = manager.add_request(PROMPTS[0], **mode)
    finish(manager)
    outputs = [manager.get_result(name) for name in names]
    broken = outputs.pop(1)
    assert [one.generated_tokens for one in outputs] == expected
    assert broken.finish_reason == "error"
    if fault == "not a number":
        assert isinstance(broken.exception, NonFiniteLogits)
    else:
        assert "broken on purpose" in broken.error
    if mode.get("num_return_sequences") == 2:
        assert manager.get_result(f"{names[1]}__child#0").exception is broken.exception
    assert manager.get_result(fine).finish_reason == "length"
    assert_nothing_is_left(manager)


def test_a_draft_model_that_breaks(model: Any, tiny_llama_dir: Path, expected: list[list[int]]) -> None:
    broken = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")[0]
    manager = make(model)
    assisted = manager.add_request(PROMPTS[0], assistant_model=broken)
    other = manager.add_request(PROMPTS[1], assistant_model=broken)
    plain = manager.add_request(PROMPTS[0])
    manager.step()
    assert manager._engine.live
    broken.step = lambda batch: 1 // 0
    assert manager.cancel_request(other)
    finish(manager)
    output = manager.get_result(assisted)
    assert output.finish_reason == "error" and isinstance(output.exception.__cause__, ZeroDivisionError)
    assert manager.get_result(plain).generated_tokens == expected[0]
    assert_nothing_is_left(manager)


def test_drafts_are_counted(model: Any, expected: list[list[int]]) -> None:
    (output,) = model.generate_batch(PROMPTS[:1], **SETTINGS, assistant_model=model, return_logprobs=True).values()
    (plain,) = model.generate_batch(PROMPTS[:1], **SETTINGS, return_logprobs=True).values()
    assert output.generated_tokens == expected[0]
    assert output.usage.drafted_tokens == output.usage.accepted_tokens > 0
    assert output.logprobs == pytest.approx(plain.logprobs, abs=1e-5)


# Schedulers


class ByPriority(Scheduler):
    """A third scheduler, as a user may write it."""

    def schedule_batch(self, token_budget: int, cache_budget: int) -> list[RequestState]:
        every = [*self.active_requests.values(), *self.waiting_requests.values()]
        every.sort(key=lambda state: (-state.priority, state.number))
        return self.fill(every, token_budget, cache_budget)


def test_a_scheduler_of_ones_own(model: Any, expected: list[list[int]]) -> None:
    register_scheduler("priority", ByPriority)
    manager = make(model, scheduler_type="priority", num_blocks=4, max_requests_per_batch=3)
    names = [manager.add_request(prompt) for prompt in PROMPTS]
    for _ in range(3):
        manager.step()
    urgent = manager.add_request([11, 12, 14] * 12, priority=5)
    order = []
    while manager.step():
        while (output := manager.get_result()) is not None:
            order.append(output)
    assert order.index(next(one for one in order if one.request_id == urgent)) <= 2
    assert manager.metrics.preemptions > 0
    got = {one.request_id: one.generated_tokens for one in order}
    assert [got[name] for name in names] == expected
    assert_nothing_is_left(manager)


def test_the_methods_of_a_scheduler(model: Any, expected: list[list[int]]) -> None:
    manager = make(model)
    scheduler = manager._engine.scheduler
    assert not scheduler.has_pending_requests()
    name, other = manager.add_request(PROMPTS[0]), manager.add_request(PROMPTS[1])
    for _ in range(3):
        manager.step()
    assert scheduler.has_pending_requests()
    assert scheduler.get_active_request_static_outputs(name) == expected[0][:3]
    assert scheduler.get_active_request_static_outputs("nobody") == []
    assert not scheduler.request_is_cancelled(name)
    assert scheduler.request_is_cancelled("nobody")
    scheduler.set_request_cancellation(name)
    assert scheduler.request_is_cancelled(name)
    finish(manager)
    assert manager.get_result(name).finish_reason == "cancelled"
    assert manager.get_result(other).generated_tokens == expected[1]
    assert scheduler.request_is_cancelled(other), "it is over"


def test_prompts_first_or_tokens_first(model: Any) -> None:
    """With a budget of few tokens, a long prompt either waits for running rows or holds them up."""
    made = {}
    for kind in ("fifo", "prefill_first"):
        manager = make(model, scheduler_type=kind, max_batch_tokens=4)
        first = manager.add_request(PROMPTS[0])
        manager.step()
        manager.add_request(PROMPTS[2])
        for _ in range(4):
            manager.step()
        made[kind] = len(manager._engine.scheduler.get_active_request_static_outputs(first))
        manager.stop(hard_stop=True)
    assert made == {"fifo": 5, "prefill_first": 2}


# What is shared


def test_equal_beginnings_are_computed_once_for_each_tenant(model: Any) -> None:
    prefix = list(range(5, 105))
    prompts = [[*prefix, i, i + 1] for i in range(200, 212)]
    alone = [model.generate(torch.tensor([p]), **SETTINGS)[0, len(p) :].tolist() for p in prompts]
    for salts, most in ((["a"] * 12, 96 + 12 * 14), (["a", "b"] * 6, 2 * 96 + 12 * 14)):
        manager = make(model, num_blocks=200)
        names = [manager.add_request(p, cache_salt=salt) for p, salt in zip(prompts, salts, strict=True)]
        finish(manager)
        outputs = [manager.get_result(name) for name in names]
        assert [one.generated_tokens for one in outputs] == alone
        assert manager.metrics.tokens_fed <= most
        assert sum(one.usage.cached_tokens for one in outputs) == manager.metrics.cached_tokens
        again = manager.add_request(prompts[0], cache_salt="a")
        stranger = manager.add_request(prompts[0], cache_salt="z")
        finish(manager)
        assert manager.get_result(again).usage.cached_tokens == 96
        assert manager.get_result(stranger).usage.cached_tokens == 0
    off = model.init_continuous_batching(SETTINGS, allow_block_sharing=False)
    names = off.add_requests(prompts)
    finish(off)
    assert [off.get_result(name).generated_tokens for name in names] == alone
    assert off.metrics.tokens_fed == sum(map(len, prompts)) + 12 * 7


def test_a_conversation_finds_its_own_answer(model: Any) -> None:
    manager = make(model, SETTINGS | {"max_new_tokens": 40})
    first = manager.add_request(PROMPTS[0])
    finish(manager)
    answer = manager.get_result(first).generated_tokens
    second = manager.add_request([*PROMPTS[0], *answer, 7, 7])
    finish(manager)
    output = manager.get_result(second)
    assert output.usage.cached_tokens == 32, "44 tokens were made and all but the last stored: two full blocks"
    whole = torch.tensor([[*PROMPTS[0], *answer, 7, 7]])
    settings = SETTINGS | {"max_new_tokens": 40}
    assert output.generated_tokens == model.generate(whole, **settings)[0, whole.shape[1] :].tolist()


def test_eviction_by_hand(model: Any) -> None:
    manager = model.init_continuous_batching(SETTINGS, manual_eviction=True)
    name = manager.add_request(PROMPTS[2])
    with pytest.raises(ValueError, match="not over"):
        manager.evict_request_from_cache(name)
    finish(manager)
    assert len(manager._engine.room.index) == 2
    manager.evict_request_from_cache(name)
    assert len(manager._engine.room.index) == 0
    manager.evict_request_from_cache(name)


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = set(vars(model)), model.generation_config.to_dict()
    model.generate_batch(PROMPTS, **SETTINGS)
    with make(model) as manager:
        manager.get_result(manager.add_request(PROMPTS[0]))
    assert (set(vars(model)), model.generation_config.to_dict()) == before


# Numbers


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", self)
        for name in ("engine", "metrics", "scheduler"):
            monkeypatch.setattr(f"unspool.continuous.{name}.perf_counter", self)

    def __call__(self) -> float:
        return self.now


def test_metrics_by_hand(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step a second; chunks of 16 tokens. Blocks are of 16 tokens, 8 of them."""
    clock = Clock(monkeypatch)
    manager = make(model, num_blocks=8, max_batch_tokens=16, safety_margin=0.0)

    def step() -> Any:
        clock.now += 1
        manager.step()
        return manager.metrics

    before = manager.metrics
    assert (before.tokens_per_second, before.cache_use, before.cache_kept) == (0, 0, 0)
    assert before.time_to_first_token is before.time_per_token is before.prefix_hits is before.acceptance is None
    assert before.last_token is None
    long = list(range(1, 37))  # 36 tokens: chunks of 16, 16 and 4
    manager.add_request(long, "first", max_new_tokens=3)
    assert manager.metrics.waiting == 1 and manager.metrics.running == 0
    one = step()
    assert (one.waiting, one.running, one.steps, one.tokens_fed, one.tokens_made) == (0, 1, 1, 16, 0)
    assert one.cache_use == 1 / 8
    step()
    three = step()  # the first token, 3 s after the request came
    assert (three.steps, three.tokens_fed, three.tokens_made, three.last_token) == (3, 36, 1, 0)
    assert (three.time_to_first_token, three.time_per_token, three.cache_use) == (3, None, 3 / 8)
    clock.now += 1.5
    assert manager.metrics.last_token == 1.5
    step()
    end = step()  # the third token, 3.5 s after the first
    assert end.finished == {"length": 1} and end.running == 0
    assert end.time_to_first_token == 3 and end.time_per_token == 3.5 / 2
    assert end.tokens_made == 3 and end.tokens_fed == 38
    assert end.tokens_per_second == 2 / 3.5  # since the first
    assert (end.cache_use, end.cache_peak, end.cache_kept) == (0, 3 / 8, 2 / 8)  # two of its blocks are full
    assert end.prefix_hits == 0
    manager.add_request(long[:33], "second", max_new_tokens=2)  # finds 32 of its tokens
    step()
    found = manager.metrics
    assert (found.cached_tokens, found.prefix_hits, found.tokens_fed) == (32, 32 / (36 + 33), 39)
    assert (found.cache_use, found.cache_kept) == (3 / 8, 0)
    last = step()
    assert last.time_to_first_token == (3 + 1) / 2 and last.time_per_token == (3.5 + 1) / 3
    clock.now += 9
    assert manager.metrics.tokens_per_second == pytest.approx(1 / 10)  # two tokens lately, one of them since the other
    clock.now += 2
    assert manager.metrics.tokens_per_second == 0
    assert manager.metrics.preemptions == 0


def test_metrics_count_what_was_made(model: Any) -> None:
    """Tokens of beams, drafts and failed requests are those that outputs have; a refused start is no hit."""
    manager = make(model, num_blocks=7, safety_margin=0.0)
    prompt = [5, 6, 7, 8] * 8
    assert [manager.step(), manager.add_request(prompt, max_new_tokens=30)] == [False, "req_0"]
    manager.step()
    for more in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20},
        {"logits_processor": [Breaks(36)]},
        {"stopping_criteria": [BreaksToo()]},
        {"num_return_sequences": 2, "do_sample": True, "seed": 1, "max_new_tokens": 50},
    ):
        manager.add_request([*prompt, 9], **more)
    outputs = []
    while manager.step():
        while (output := manager.get_result(timeout=0)) is not None:
            outputs.append(output)
    metrics = manager.metrics
    assert len(outputs) == 8
    assert sum(len(one.generated_tokens) for one in outputs) == metrics.tokens_made
    usage = [one.usage for one in outputs]
    assert sum(one.preemptions for one in usage) == metrics.preemptions > 0
    drafted, accepted = (sum(getattr(one, f"{name}_tokens") for one in usage) for name in ("drafted", "accepted"))
    assert (metrics.drafted_tokens, metrics.accepted_tokens) == (drafted, accepted)
    assert metrics.acceptance == accepted / drafted
    assert 0 < metrics.cached_tokens <= 33 * 5 + 83 * metrics.preemptions
    assert metrics.prefix_hits is not None and 0 < metrics.prefix_hits < 1


def test_the_switch_of_determinism(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="deterministic must be True, False or None"):
        ContinuousBatchingConfig(deterministic="yes")  # type: ignore[arg-type]
    kinds = {one: type(make(model, deterministic=one)._engine._loop.runner) for one in (None, True, False)}
    assert kinds[None] is kinds[True] is not kinds[False]
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(unspool.Unsupported, match="on a CPU only"):
        make(model, deterministic=True)


def test_watching(model: Any) -> None:
    from rich.console import Console

    from unspool.continuous.view import Watch, lines

    manager = make(model, max_requests_per_batch=2)
    for i in range(3):
        manager.add_request([*PROMPTS[2], i], prompt_lookup_num_tokens=2 if i else None)
    for _ in range(3):  # the second waits for what it shares with the first
        manager.step()
    shown = dict(lines(manager.metrics, [0.0, 5.0, 10.0]))
    assert shown["requests"] == "2 running, 1 waiting"
    assert shown["tokens/s"].endswith(" ▄█")
    assert shown["per token"] == "-" and "on average" in shown["first token"]
    finish(manager)
    shown = dict(lines(manager.metrics, []))
    assert shown["requests"] == "0 running, 0 waiting; 3 length"
    numbers = manager.metrics
    assert shown["acceptance"].endswith(f"{numbers.accepted_tokens:,} of {numbers.drafted_tokens:,} drafted tokens")
    assert shown["prefix hits"].endswith(f", {numbers.cached_tokens} tokens")
    assert "last token" not in shown
    console = Console(width=60, record=True, force_terminal=True, file=io.StringIO())
    with Watch(lambda: manager.metrics, console=console, above="over it") as watch:
        console.export_text()
        console.print(watch.draw())
        text = console.export_text()
    assert "over it" in text and "3 length" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 60
    with manager, manager.watch(every=60):
        manager.add_request(PROMPTS[0])
        assert len(list(manager)) == 1 + 3
    with pytest.raises(ValueError, match="every"):
        manager.watch(every=0)


class InTurn(Scheduler):
    """A step for each request, one after the other."""

    turn = -1

    def schedule_batch(self, token_budget: int, cache_budget: int) -> list[RequestState]:
        every = [*self.active_requests.values(), *self.waiting_requests.values()]
        self.turn += 1
        return self.fill([every[self.turn % len(every)]], token_budget, cache_budget)


@pytest.mark.parametrize("more", [1, 3])
def test_a_launch_that_raises_does_not_take_the_step_before_with_it(model: Any, more: int) -> None:
    """A step is in flight when the next one, of another request, fails: what it made is told in that very step."""
    register_scheduler("in turn", InTurn)
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(scheduler_type="in turn")
    )
    engine = manager._engine
    engine._ahead = True  # as on a GPU
    first, second = (
        manager.add_request(prompt, **SETTINGS | {"max_new_tokens": length})
        for prompt, length in zip(PROMPTS, (more, 8), strict=False)
    )
    engine._loop.runner, runner = _Breaking(engine._loop.runner), engine._loop.runner
    while manager.get_result(second, timeout=0) is None:
        before = list(engine._loop._flights)
        assert manager.step()
    assert before, "one was in flight"
    assert not engine._loop._flights
    failed = engine._loop.runner.failed
    assert failed == 1
    output = manager.get_result(first, timeout=0)
    assert (output is not None) == (more == 1)
    engine._loop.runner = runner
    while manager.step():
        pass
    output = output or manager.get_result(first, timeout=0)
    prompt = torch.tensor([PROMPTS[0]])
    assert output.generated_tokens == model.generate(prompt, **SETTINGS | {"max_new_tokens": more})[0, 4:].tolist()
    check_all_given_back(engine.room)


def ahead(model: Any, *lengths: int) -> tuple[Any, list[str]]:
    """A manager that launches ahead, as on a GPU, and steps requests in turn."""
    register_scheduler("in turn", InTurn)
    config = ContinuousBatchingConfig(scheduler_type="in turn")
    manager = model.init_continuous_batching(continuous_batching_config=config)
    manager._engine._ahead = True
    requests = zip(PROMPTS, lengths, strict=False)
    return manager, [manager.add_request(prompt, **SETTINGS | {"max_new_tokens": n}) for prompt, n in requests]


def test_a_chooser_that_raises_does_not_take_the_step_before_with_it(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token of the first request is in flight when the tokens of the second cannot be chosen."""
    manager, (first, second) = ahead(model, 1, 8)
    plain = manager._engine.plain
    decide = plain._decide

    def breaks(kin: Any, scores: Any) -> Any:
        if kin.states[0].request_id == second:
            raise RuntimeError("no choice")
        return decide(kin, scores)

    monkeypatch.setattr(plain, "_decide", breaks)
    while manager.step():
        pass
    one, other = manager.get_result(first), manager.get_result(second)
    assert one.finish_reason == "length"
    assert len(one.generated_tokens) == 1
    assert other.finish_reason == "error"
    assert "no choice" in other.error
    check_all_given_back(manager._engine.room)


def test_what_ended_in_flight_is_not_cancelled(model: Any) -> None:
    manager, (first, second) = ahead(model, 1, 8)
    manager.step()
    assert manager._engine._loop._flights
    manager.stop(hard_stop=True)
    one, other = manager.get_result(first), manager.get_result(second)
    assert one.finish_reason == "length"
    assert len(one.generated_tokens) == 1
    assert other.finish_reason == "cancelled"
    check_all_given_back(manager._engine.room)


class _Breaking:
    """A runner that fails the second request's first step."""

    failed = 0

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, work: Any, want: Any) -> Any:
        if work[0].seq.tokens[:2] == PROMPTS[1]:
            self.failed += 1
            raise RuntimeError("the device is gone")
        return self._runner.run(work, want)


# What later versions of transformers have


def test_methods_of_later_versions(model: Any, expected: list[list[int]]) -> None:
    """Nothing is kept on the model, switched on it, or left to be warmed up."""
    model.destroy_cached_continuous_batching_manager()
    manager = make(model)
    manager.warmup()
    manager.switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)
    name = manager.add_request(PROMPTS[0])
    while manager.step():
        pass
    assert manager.get_result(name).generated_tokens == expected[0]
    assert_nothing_is_left(manager)


def test_a_scheduler_is_reset(model: Any) -> None:
    manager = make(model, max_requests_per_batch=2)
    for prompt in PROMPTS:
        manager.add_request(prompt)
    manager.step()
    manager.step()
    scheduler = manager._engine.scheduler
    assert scheduler.active_requests and scheduler.waiting_requests
    scheduler.reset()
    assert not scheduler.has_pending_requests()
    check_all_given_back(manager._engine.room)
