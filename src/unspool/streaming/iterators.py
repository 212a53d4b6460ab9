"""Streamers that are read from another thread or from a coroutine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, Queue
from typing import Any, NamedTuple, TypeAlias

from unspool.streaming.detokenize import Decoder
from unspool.streaming.streamers import TextStreamer

__all__ = ["AsyncTextIteratorStreamer", "Piece", "TextIteratorStreamer"]

Piece: TypeAlias = "str | list[str]"
"""New text: of the one row, or of each row."""

# Seconds between looks at whether the producing thread still lives, and how long a silent queue is believed after its
# death.
_LOOK_EVERY = 0.5
_GRACE = 1.0


class _Failure(NamedTuple):
    """Stands in the queue for the exception to raise in the reader."""

    error: BaseException


class _Reader(TextStreamer):
    """What both iterators share: pieces go to `_send`, and a failure or a dead producer becomes an exception."""

    def __init__(
        self, tokenizer: Decoder, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.stop_signal: Any = None
        self._producer: threading.Thread | None = None
        self._failure: BaseException | None = None  # how the stream ended, as the producer told
        self._raised: BaseException | None = None  # the same, once the reader has met it
        self._exhausted = False

    def put(self, value: Any, **rows: Any) -> None:
        """Receive tokens (see `TextStreamer.put`) and queue the text that became final."""
        self._producer, self._failure, self._raised = threading.current_thread(), None, None
        super().put(value, **rows)

    def end(self) -> None:
        """Queue the last piece and end the iteration."""
        self._producer = None
        super().end()

    def fail(self, error: BaseException) -> None:
        """End the iteration with `error`: the reader gets the pieces queued so far, then the exception."""
        self._rows, self.next_tokens_are_prompt, self._producer = None, True, None
        if error is not self._failure:  # told once by the loop and once by the thread that ran it
            self._failure = error
            self._send(_Failure(error))

    def start(self, generate: Callable[..., Any], /, *args: Any, **kwargs: Any) -> threading.Thread:
        """Run `generate(*args, streamer=self, **kwargs)` in a thread whose failure ends this stream with its exception.

            for piece in streamer:  # after streamer.start(model.generate, **inputs, max_new_tokens=50)
                ...

        Returns:
            The started (daemon) thread.
        """

        def run() -> None:
            try:
                generate(*args, streamer=self, **kwargs)
            except BaseException as error:  # it goes to the reader, whatever it is
                self.fail(error)

        thread = threading.Thread(target=run, name="unspool-stream", daemon=True)
        self._producer, self._failure, self._raised = thread, None, None
        thread.start()
        return thread

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue a piece of the one row. It may be `""`, so that `timeout` measures the wait for a token."""
        self._queue(text, stream_end)

    def on_finalized_rows(self, texts: list[str], finished: list[bool], stream_end: bool = False) -> None:
        """Queue a piece of each row as one list."""
        self._queue(texts, stream_end)

    def _queue(self, piece: Piece, stream_end: bool) -> None:
        self._send(piece)
        if stream_end:
            self._send(self.stop_signal)

    def _send(self, item: Any) -> None:
        """Hand an item to the reader; called in the producing thread."""
        raise NotImplementedError

    def _receive(self, item: Any) -> Piece | None:
        """The piece in an item, `None` at the end of the stream; raises the producer's exception."""
        if isinstance(item, _Failure):
            if item.error is self._failure:  # no other stream has begun since
                self._raised = item.error
            raise item.error
        if item is self.stop_signal:
            self._exhausted = True
            return None
        piece: Piece = item
        return piece

    def _begin(self) -> None:
        """A new iteration: after the end of a stream it waits for the next one."""
        self._exhausted = False


class _Patience:
    """How long one wait of a reader may go on."""

    def __init__(self, streamer: _Reader, timeout: float | None) -> None:
        self._streamer = streamer
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._dead_since: float | None = None

    def slice(self) -> float:
        """Seconds to wait before looking again; at most 0 when the time is up."""
        left = _LOOK_EVERY if self._deadline is None else self._deadline - time.monotonic()
        return min(_LOOK_EVERY, left)

    def check_producer(self) -> None:
        """Raise if the thread that was producing ended long enough ago without ending the stream."""
        producer, now = self._streamer._producer, time.monotonic()
        if producer is None or producer.is_alive():
            self._dead_since = None
        elif self._dead_since is None:
            self._dead_since = now
        elif now - self._dead_since >= _GRACE:
            raise RuntimeError(
                f"the stream broke off: thread {producer.name!r} ended without end() or fail(); "
                "run generate with streamer.start(...) to get its exception here"
            )


class TextIteratorStreamer(_Reader):
    """An iterator over the text as another thread generates it.

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        streamer.start(model.generate, **inputs, max_new_tokens=50)  # or a Thread of your own
        for piece in streamer:
            print(piece, end="")

    One row yields `str` pieces, several rows yield `list[str]`, one piece per row and `""` where there is nothing new.
    If the producer fails, the pieces made so far come first, then its exception is raised here, and again on every
    further read until another stream begins. After the end, iterating again waits for the next stream put into it.

    Args:
        tokenizer: An unspool or transformers tokenizer.
        skip_prompt: Leave the prompt out.
        timeout: Seconds to wait for one piece; `None` waits for ever (but not for a thread that is dead).
        decode_kwargs: Passed to `tokenizer.decode`.

    Raises:
        queue.Empty: While iterating, when `timeout` passes without a piece.
        RuntimeError: While iterating, when the producing thread ended without `end()` or `fail()`.
    """

    def __init__(
        self, tokenizer: Decoder, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, timeout, **decode_kwargs)
        self.text_queue: Queue[Any] = Queue()

    def __iter__(self) -> Iterator[Piece]:
        self._begin()
        return self

    def __next__(self) -> Piece:
        if self._exhausted:
            raise StopIteration
        piece = self._receive(self._wait())
        if piece is None:
            raise StopIteration
        return piece

    def _send(self, item: Any) -> None:
        self.text_queue.put(item)

    def _wait(self) -> Any:
        patience = _Patience(self, self.timeout)
        while True:
            if self._raised is not None:
                return _Failure(self._raised)
            try:
                return self.text_queue.get(timeout=max(0.0, patience.slice()))
            except Empty:
                if patience.slice() <= 0:
                    raise
                patience.check_producer()


class AsyncTextIteratorStreamer(_Reader):
    """An asynchronous iterator over the text as another thread generates it.

        streamer = AsyncTextIteratorStreamer(tokenizer)
        streamer.start(model.generate, **inputs, max_new_tokens=50)
        async for piece in streamer:
            print(piece, end="")

    Made inside a coroutine it belongs to the running event loop, as in transformers; made elsewhere, to the loop in
    which it is first read. Pieces, failures and reuse are those of `TextIteratorStreamer`.

    Args:
        tokenizer: An unspool or transformers tokenizer.
        skip_prompt: Leave the prompt out.
        timeout: Seconds to wait for one piece; `None` waits for ever (but not for a thread that is dead).
        decode_kwargs: Passed to `tokenizer.decode`.

    Raises:
        TimeoutError: While iterating, when `timeout` passes without a piece.
        RuntimeError: While iterating, when the producing thread ended without `end()` or `fail()`, or in another event
            loop than the streamer's.
    """

    def __init__(
        self, tokenizer: Decoder, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, timeout, **decode_kwargs)
        self.text_queue: asyncio.Queue[Any] = asyncio.Queue()
        self._lock = threading.Lock()
        self._early: list[Any] = []  # items sent before the loop was known
        self.loop: asyncio.AbstractEventLoop | None = None
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = None  # taken when it is first read

    def __aiter__(self) -> AsyncIterator[Piece]:
        self._begin()
        return self

    async def __anext__(self) -> Piece:
        self._take_loop()
        if self._exhausted:
            raise StopAsyncIteration
        piece = self._receive(await self._wait())
        if piece is None:
            raise StopAsyncIteration
        return piece

    def _take_loop(self) -> None:
        running = asyncio.get_running_loop()
        with self._lock:
            if self.loop is None:
                self.loop = running
                for item in self._early:
                    self.text_queue.put_nowait(item)
                self._early.clear()
        if self.loop is not running:
            raise RuntimeError(
                "this AsyncTextIteratorStreamer belongs to another event loop; make one in the loop that reads it"
            )

    def _send(self, item: Any) -> None:
        with self._lock:
            if self.loop is None:
                self._early.append(item)
            else:
                self.loop.call_soon_threadsafe(self.text_queue.put_nowait, item)

    async def _wait(self) -> Any:
        patience = _Patience(self, self.timeout)
        while True:
            if self._raised is not None:
                return _Failure(self._raised)
            try:
                async with asyncio.timeout(max(0.0, patience.slice())):
                    return await self.text_queue.get()
            except TimeoutError:
                if patience.slice() <= 0:
                    raise
                patience.check_producer()
