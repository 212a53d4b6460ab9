"""The engine behind a lock: requests from any thread, a thread that steps, a watchdog, and an orderly end."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from time import monotonic

from unspool.continuous.engine import Engine
from unspool.continuous.metrics import Metrics
from unspool.continuous.requests import RequestState
from unspool.errors import ManagerStopped, QueueFull

__all__ = ["Worker"]

logger = logging.getLogger("unspool")


class Worker:
    """Feeds an `Engine` and steps it, in a thread of its own (`start`) or wherever `step` is called.

    Args:
        engine: does the work.
        max_queue_size, max_queued_tokens: most waiting requests, and prompt tokens of them; 0 for no limit.
        watchdog: seconds a step may take before everybody is told that it stalled; `None` for ever.

    Attributes:
        fatal: why no step will be taken any more, when something went wrong.
    """

    def __init__(self, engine: Engine, *, max_queue_size: int, max_queued_tokens: int, watchdog: float | None) -> None:
        self.engine = engine
        self.fatal: BaseException | None = None
        self._max_queue_size = max_queue_size
        self._max_queued_tokens = max_queued_tokens
        self._watchdog = watchdog
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards what is below it
        self._arrived: deque[RequestState] = deque()
        self._stop: str | None = None  # "drain" or "abort", once asked for
        self._pauses = 0
        self._thread: threading.Thread | None = None
        self._silent = False  # the thread has given its last answer, also of those that tell why it failed
        self._began: float | None = None  # when the step under way began
        self._stepping = threading.RLock()  # held during a step, and by whoever pauses

    def is_running(self) -> bool:
        """Whether the thread is there and takes steps."""
        thread = self._thread
        return self._process == os.getpid() and thread is not None and thread.is_alive() and self.fatal is None

    def hopeless(self) -> bool:
        """Whether no further output will come by itself."""
        thread = self._thread
        return self._silent or self._process != os.getpid() or thread is None or not thread.is_alive()

    def check_open(self) -> None:
        """Raise `ManagerStopped` where no request can be taken any more."""
        if self._process != os.getpid():
            raise ManagerStopped("this manager belongs to the process that made it; make one in this process")
        if isinstance(self.fatal, ManagerStopped):
            raise ManagerStopped("the manager was destroyed; make a new one")
        if self.fatal is not None:
            raise ManagerStopped(f"the manager failed: {self.fatal!r}; make a new one") from self.fatal
        if self._stop is not None:
            raise ManagerStopped("the manager was stopped; start() it again or make a new one")

    def submit(self, states: list[RequestState]) -> None:
        """Queue requests, all or none.

        Raises:
            ManagerStopped: none are taken any more.
            QueueFull: as much waits as may.
        """
        with self._changed:
            self.check_open()
            self._check_queue(states)
            self._arrived += states
            self._changed.notify_all()

    def metrics(self) -> Metrics:
        """The engine's numbers, with the requests that it has not taken in yet among those that wait."""
        numbers = self.engine.metrics()
        return replace(numbers, waiting=numbers.waiting + len(self._arrived))

    def cancel(self, request_id: str) -> None:
        """Cancel a live request; it is answered before the next step."""
        name = self.engine.parents.get(request_id, request_id)
        with self._changed:
            arrived = next((state for state in self._arrived if state.request_id == name), None)
            if arrived is None:
                self.engine.scheduler.set_request_cancellation(name)
            else:  # the scheduler does not know it yet, and would forget the mark
                arrived.end("cancelled")
            self._changed.notify_all()

    def start(self) -> None:
        """Start the thread, or start it again after `stop`."""
        if self.is_running() and self._stop is None:
            return
        self.join()  # it may be finishing what there was when it was stopped
        with self._changed:
            self._stop = None
            self.check_open()
            self._silent = False
            self._thread = threading.Thread(target=self._run, name="unspool-continuous", daemon=True)
            self._thread.start()
            if self._watchdog is not None:
                threading.Thread(target=self._watch, args=(self._thread,), name="unspool-watchdog", daemon=True).start()

    def stop(self, how: str) -> None:
        """Take no further requests; `"drain"` finishes those there are, `"abort"` answers them as cancelled."""
        if self._process != os.getpid():
            return
        with self._changed:
            if self._stop != "abort":
                self._stop = how
            self._changed.notify_all()
        if not self.is_running() and self.fatal is None:
            while how == "drain" and self._step():
                pass
            self._end(how)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; whether it has."""
        thread = self._thread
        if thread is None or thread is threading.current_thread() or self._process != os.getpid():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def step(self) -> bool:
        """Take one step here and now; `False` when there was nothing to do.

        Raises:
            ManagerStopped: the manager failed, or is another process's.
            RuntimeError: the thread does that.
        """
        if self.is_running() and self._thread is not threading.current_thread():
            raise RuntimeError("the manager's thread takes the steps; call step() only without start()")
        if self._process != os.getpid() or self.fatal is not None:
            self.check_open()
        try:
            return self._step()
        except BaseException as error:
            self._die(error)
            raise

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Hold the thread between two steps while the context is open."""
        with self._changed:
            self._pauses += 1
        try:
            with self._stepping:
                yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody will read outputs any more: end the thread, and wait for it a moment."""
        if self._process == os.getpid() and self.is_running():
            self.stop("abort")
            self.join(5.0)

    def close(self) -> None:
        """After the thread ended: never step again, and let go of the store's memory."""
        self.fatal = self.fatal or ManagerStopped("it was destroyed")
        if self.join(0):
            store = self.engine.room.store
            store.keys.clear()
            store.values.clear()

    def _check_queue(self, states: list[RequestState]) -> None:
        engine = self.engine
        count = len(self._arrived) + len(engine.scheduler.waiting_requests)
        if self._max_queue_size and count + len(states) > self._max_queue_size:
            raise QueueFull(f"{count} requests wait and max_queue_size is {self._max_queue_size}; try again later")
        if self._max_queued_tokens:
            waiting = list(engine.scheduler.waiting_requests.values())
            tokens = sum(len(state.prompt_ids) for state in (*self._arrived, *waiting))
            more = sum(len(state.prompt_ids) for state in states)
            if tokens + more > self._max_queued_tokens:
                raise QueueFull(
                    f"prompts of {tokens} tokens wait, this is {more}, and max_queued_tokens is "
                    f"{self._max_queued_tokens}; try again later"
                )

    def _step(self) -> bool:
        with self._stepping:
            if self._began is not None:
                return True  # a callback of this very step asks for one
            self._began = monotonic()
            try:
                with self._changed:
                    arrived = list(self._arrived)
                    self._arrived.clear()
                self.engine.take_in(arrived)
                return self.engine.step()
            finally:
                self._began = None

    def _run(self) -> None:
        """The thread: step while there is something to do, else sleep until there is."""
        try:
            while self._next_turn():
                self._step()
                if self.fatal is not None:
                    break
            if self.fatal is None:
                self._end(self._stop or "drain")
        except BaseException as error:
            self._die(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._silent = True
            self.engine.outbox.wake()

    def _next_turn(self) -> bool:
        """Wait for something to do; `False` when the thread should end."""
        with self._changed:
            while True:
                if self._stop == "abort" or self.fatal is not None:
                    return False
                if not self._pauses:
                    if self._arrived or self.engine.scheduler.has_pending_requests():
                        return True
                    if self._stop == "drain":
                        return False
                self._changed.wait()

    def _end(self, how: str) -> None:
        """Answer what is left, when it was asked to stop."""
        if how != "abort":
            return
        with self._stepping:
            with self._changed:
                arrived = list(self._arrived)
                self._arrived.clear()
            self.engine.take_in(arrived)
            self.engine.answer_all("cancelled", None)
            self.engine.outbox.wake()

    def _die(self, error: BaseException) -> None:
        """Nothing can go on: tell everybody why."""
        if not isinstance(error, KeyboardInterrupt):  # who pressed the keys knows
            logger.error("continuous batching stopped: %r", error)
        with self._changed:
            self.fatal = self.fatal or error
            arrived = list(self._arrived)
            self._arrived.clear()
        failure = ManagerStopped(f"the generation loop ended: {error!r}")
        failure.__cause__ = error
        try:
            self.engine.take_in(arrived)
            self.engine.answer_all("error", failure)
        except BaseException:  # its bookkeeping is broken too: the answers alone
            self._answer_bare(failure)
        self.engine.outbox.wake()

    def _answer_bare(self, failure: BaseException) -> None:
        """Answer every live request without touching anything else; also while a step hangs in another thread."""
        for state in [*self.engine.live.values(), *self._arrived]:
            state.end("error", error=failure)
            output = state.to_generation_output()
            output.status = type(output.status)(4)
            with contextlib.suppress(Exception):
                self.engine.outbox.put(output)

    def _watch(self, thread: threading.Thread) -> None:
        """Notice a step that takes too long, or a thread that died without a word."""
        limit = self._watchdog
        assert limit is not None
        while self.fatal is None:
            thread.join(min(limit / 4, 5.0))
            if not thread.is_alive():
                return
            began = self._began
            if began is not None and monotonic() - began > limit:
                text = f"a step has taken more than watchdog_timeout={limit:g} seconds; the device may have stalled"
                logger.error(text)
                with self._changed:
                    self.fatal = TimeoutError(text)
                failure = ManagerStopped(text)
                self._answer_bare(failure)
                self._silent = True
                self.engine.outbox.wake()
                return
