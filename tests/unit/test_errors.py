"""The exception tree: what catches what, what a message says, what survives a process boundary."""

from __future__ import annotations

import pickle

import pytest

from unspool import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_one_base_catches_all(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.UnspoolError)


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        (errors.CheckpointError, ValueError),
        (errors.OutOfMemory, MemoryError),
        (errors.Unsupported, NotImplementedError),
        (errors.NonFiniteLogits, errors.RequestFailed),
    ],
)
def test_also_caught_as(ours: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(ours, builtin)


def test_out_of_memory_says_how_much_and_what_to_lower() -> None:
    error = errors.OutOfMemory("the cache", needed=3 * 2**30, available=2**20, lower="max_new_tokens")
    assert str(error) == (
        "the cache needs 3,221,225,472 bytes (3.00 GiB), 1,048,576 bytes (1.00 MiB) are free; lower max_new_tokens"
    )
    assert str(errors.OutOfMemory("no room")) == "no room"


def test_request_failed_names_request_row_and_cause() -> None:
    cause = KeyError("x")
    error = errors.NonFiniteLogits("scores are NaN", request_id="a", row=3, cause=cause, layer="layers.2")
    assert str(error) == "request 'a', row 3: scores are NaN (first non-finite output: layers.2)"
    assert error.__cause__ is cause
    assert str(errors.RequestFailed("gone")) == "gone"


@pytest.mark.parametrize(
    "error",
    [
        errors.OutOfMemory("the cache", needed=5, lower="n"),
        errors.NonFiniteLogits("bad", request_id="a", row=1, cause=ValueError("v"), layer="l"),
        errors.RequestFailed("bad", row=0),
        errors.CheckpointError("no tensor"),
    ],
)
def test_pickles(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__.keys() == error.__dict__.keys()
    assert repr(copy.__cause__) == repr(error.__cause__)
