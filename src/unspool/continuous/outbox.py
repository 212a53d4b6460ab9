"""Outputs on their way to whoever waits for them: in threads, in coroutines, or by callback."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from unspool.continuous.requests import GenerationOutput

__all__ = ["Outbox"]

Callback = Callable[[GenerationOutput], None]


@dataclass(slots=True)
class _Box:
    """One request's outputs that nobody has taken yet, and who is told of new ones."""

    outputs: deque[GenerationOutput] = field(default_factory=deque)
    callback: Callback | None = None
    over: bool = False
    claimed: bool = False  # somebody reads this request alone, so `get()` leaves it to them


class Outbox:
    """Outputs by request and in the order in which they were made. All methods are safe from any thread.

    A request is known from `open` until its last output has been taken.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._boxes: dict[str, _Box] = {}
        self._unread: OrderedDict[str, None] = OrderedDict()  # requests with outputs for whoever asks, oldest first
        self._live = 0
        self._sleepers: set[Callable[[], None]] = set()

    @property
    def live(self) -> int:
        """Requests that are not over."""
        return self._live

    def open(self, request_id: str) -> bool:
        """Begin to know a request; `False` when it is known already."""
        with self._changed:
            if request_id in self._boxes:
                return False
            self._boxes[request_id] = _Box()
            self._live += 1
            return True

    def knows(self, request_id: str) -> bool:
        """Whether the request is alive or has outputs that nobody took."""
        return request_id in self._boxes

    def is_live(self, request_id: str) -> bool:
        """Whether the request is not over."""
        box = self._boxes.get(request_id)
        return box is not None and not box.over

    def names(self, request_id: str) -> list[str]:
        """The requests called so and their further outputs, as far as they are known."""
        with self._changed:
            children = f"{request_id}__child#"
            return [name for name in self._boxes if name == request_id or name.startswith(children)]

    def forget(self, request_id: str) -> None:
        """Stop knowing a request that was never queued."""
        with self._changed:
            if self._boxes.pop(request_id, None) is not None:
                self._live -= 1

    def claim(self, request_id: str) -> bool:
        """Keep a request's outputs for readers that name it; `False` for an unknown one."""
        with self._changed:
            box = self._boxes.get(request_id)
            if box is None:
                return False
            box.claimed = True
            self._unread.pop(request_id, None)
            return True

    def handle(self, request_id: str, callback: Callback) -> bool:
        """Give a request's outputs, also those made before, to `callback`; `False` for an unknown one."""
        with self._changed:
            box = self._boxes.get(request_id)
            if box is None:
                return False
            box.callback = callback
            waiting = list(box.outputs)
            box.outputs.clear()
            self._unread.pop(request_id, None)
            if box.over:
                del self._boxes[request_id]
        for output in waiting:
            callback(output)
        return True

    def put(self, output: GenerationOutput) -> None:
        """Add an output; one whose status is final is the request's last."""
        with self._changed:
            box = self._boxes.get(output.request_id)
            if box is None or box.over:
                return
            over = output.is_finished()
            if over:
                box.over = True
                self._live -= 1
            callback = box.callback
            if callback is None:
                box.outputs.append(output)
                if not box.claimed:
                    self._unread.setdefault(output.request_id)
            elif over:
                del self._boxes[output.request_id]
            self._wake()
        if callback is not None:
            callback(output)

    def wake(self) -> None:
        """Let everybody who waits look again."""
        with self._changed:
            self._wake()

    def take(self, request_id: str | None = None) -> GenerationOutput | None:
        """The next output, of one request or of any, or `None` when there is none now."""
        with self._changed:
            return self._take(request_id)

    def wait(
        self, request_id: str | None, timeout: float | None, hopeless: Callable[[], bool]
    ) -> GenerationOutput | None:
        """The next output, of one request or of any; waits for it.

        Args:
            timeout: most seconds to wait; `None` waits as long as there is hope.
            hopeless: whether no further output can come; asked whenever something changed.
        """
        end = None if timeout is None else monotonic() + timeout
        with self._changed:
            while True:
                output = self._take(request_id)
                if output is not None:
                    return output
                if hopeless() or (request_id is not None and request_id not in self._boxes):
                    return None
                left = None if end is None else end - monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)

    async def wait_async(self, request_id: str, hopeless: Callable[[], bool]) -> GenerationOutput | None:
        """The same for a coroutine, which may be cancelled."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._sleepers.add(wake)
        try:
            while True:
                changed.clear()
                output = self.take(request_id)
                if output is not None or hopeless() or not self.knows(request_id):
                    return output
                await changed.wait()
        finally:
            with self._changed:
                self._sleepers.discard(wake)

    def _take(self, request_id: str | None) -> GenerationOutput | None:
        if request_id is not None:
            return self._pop(request_id)
        for first in self._unread:
            output = self._pop(first)
            if first in self._unread:  # it has more: others first
                self._unread.move_to_end(first)
            return output
        return None

    def _pop(self, request_id: str) -> GenerationOutput | None:
        box = self._boxes.get(request_id)
        if box is None or not box.outputs:
            return None
        output = box.outputs.popleft()
        if not box.outputs:
            self._unread.pop(request_id, None)
            if box.over:
                del self._boxes[request_id]
        return output

    def _wake(self) -> None:
        self._changed.notify_all()
        for wake in list(self._sleepers):
            try:
                wake()
            except RuntimeError:  # its event loop is closed
                self._sleepers.discard(wake)
