"""The exceptions that unspool raises besides ``ValueError`` and ``TypeError``.

A caller's mistake (a bad argument) is a plain ``ValueError`` or ``TypeError``, raised before any work is done. What
else can go wrong has a name here, so that one ``except UnspoolError`` catches all of it::

    UnspoolError
    ├── CacheFull                            no block is left for another token
    ├── Unsupported (NotImplementedError)    a combination that this build, model or device cannot do
    ├── ManagerStopped (RuntimeError)        a continuous batching manager that takes no requests any more
    ├── QueueFull                            too much waits already
    ├── RequestFailed                        one request failed; the others go on
    │   └── NonFiniteLogits                  the model gave NaN or infinite scores for a row
    ├── CheckpointError (ValueError)         files on disk do not make the model they promise
    └── OutOfMemory (MemoryError)            the device has no room

Every message says what was wrong and what to change.
"""

from __future__ import annotations

__all__ = [
    "CacheFull",
    "CheckpointError",
    "ManagerStopped",
    "NonFiniteLogits",
    "OutOfMemory",
    "QueueFull",
    "RequestFailed",
    "UnspoolError",
    "Unsupported",
]


class UnspoolError(Exception):
    """Base of every exception that is unspool's own."""


class CacheFull(UnspoolError):
    """The key/value store has no free block and nothing that may be released."""


class Unsupported(UnspoolError, NotImplementedError):
    """What was asked is meaningful, but this model, device or installation cannot do it."""


class ManagerStopped(UnspoolError, RuntimeError):
    """The continuous batching manager was stopped, or failed, or belongs to another process."""


class QueueFull(UnspoolError):
    """As much waits as the manager's `max_queue_size` or `max_queued_tokens` allow; try again later."""


class RequestFailed(UnspoolError):
    """One request failed while others may have finished.

    Args:
        message: What went wrong, in one sentence.
        request_id: The failed request's id, or `None` in `generate()`, which has rows only.
        row: The row of the batch, or `None` when the failure belongs to no single row.
        cause: The exception underneath; also set as ``__cause__``, so a traceback shows it.
    """

    def __init__(
        self,
        message: str,
        *,
        request_id: str | None = None,
        row: int | None = None,
        cause: BaseException | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.row = row
        self.cause = cause
        if cause is not None:
            self.__cause__ = cause

    def __str__(self) -> str:
        where = [f"request {self.request_id!r}"] if self.request_id is not None else []
        where += [f"row {self.row}"] if self.row is not None else []
        return f"{', '.join(where)}: {self.message}" if where else self.message

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the exception crosses a process boundary."""
        return _rebuild, (type(self), self.message, self.__dict__.copy())


class NonFiniteLogits(RequestFailed):
    """The model returned NaN (or only infinite) scores for a row, so no token can be chosen.

    Args:
        message: What was found.
        layer: The first layer with non-finite output, when the run was asked to look for it.
    """

    def __init__(
        self,
        message: str,
        *,
        request_id: str | None = None,
        row: int | None = None,
        cause: BaseException | None = None,
        layer: str | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id, row=row, cause=cause)
        self.layer = layer

    def __str__(self) -> str:
        found = f" (first non-finite output: {self.layer})" if self.layer is not None else ""
        return super().__str__() + found


class CheckpointError(UnspoolError, ValueError):
    """A checkpoint cannot be read as the model it claims to be.

    Raised for a missing or misshapen tensor, a truncated file, pickled weights, an unknown model type and a folder
    without a tokenizer. A `ValueError` too, since the path is the caller's argument.
    """


class OutOfMemory(UnspoolError, MemoryError):
    """The device cannot hold what was asked.

    Args:
        what: What does not fit ("the key/value cache of 32 rows of 4096 tokens"), or the whole message when nothing
            else is given.
        needed: Bytes needed.
        available: Bytes free when it was asked, where known.
        lower: What the caller can lower ("max_new_tokens or the number of prompts").
    """

    def __init__(
        self, what: str, *, needed: int | None = None, available: int | None = None, lower: str | None = None
    ) -> None:
        self.what, self.needed, self.available, self.lower = what, needed, available, lower
        need = "" if needed is None else f" needs {_bytes(needed)}"
        free = "" if available is None else f", {_bytes(available)} are free"
        super().__init__(what + need + free + ("" if lower is None else f"; lower {lower}"))

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the exception crosses a process boundary."""
        return _rebuild_memory, (self.what, self.needed, self.available, self.lower)


def _bytes(count: int) -> str:
    size = f"{count / 2**30:.2f} GiB" if count >= 2**30 // 10 else f"{count / 2**20:.2f} MiB"
    return f"{count:,} bytes ({size})"


def _rebuild(kind: type[RequestFailed], message: str, state: dict[str, object]) -> RequestFailed:
    error = kind(message)
    error.__dict__.update(state)
    error.__cause__ = error.cause
    return error


def _rebuild_memory(what: str, needed: int | None, available: int | None, lower: str | None) -> OutOfMemory:
    return OutOfMemory(what, needed=needed, available=available, lower=lower)
