"""Measuring beside other programs: how much of the machine they use, and trying again when it was too much.

Two threads that meet at every small operation lose far more than their share when a third program wants a core (a
factor of ten and more), so a figure taken meanwhile says nothing. ``undisturbed`` waits for a quiet moment and drops
calls that others disturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LIMIT = 0.25  # cores that others may use in a measurement


class Disturbed(Exception):
    """Other programs took more than ``LIMIT`` cores; raised by a watch inside a measured call."""


def _foreign_seconds() -> float:
    """Processor time used since start by all but this process and its finished children; 0 without ``/proc/stat``.

    Niced programs count in full: where two threads wait for each other, even their small share costs a multiple.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except FileNotFoundError:
        return 0.0
    user, nice, system = map(int, fields[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


class Others:
    """The cores other programs used on average since this was made (or last marked)."""

    def __init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        self.began, self.seconds = time.monotonic(), _foreign_seconds()

    def cores(self) -> float:
        return max(0.0, _foreign_seconds() - self.seconds) / max(1e-9, time.monotonic() - self.began)

    def check(self) -> None:
        """For the inside of a long call: about once a second, raise ``Disturbed`` if the last second was not quiet."""
        if time.monotonic() - self.began > 1:
            if self.cores() > LIMIT:
                raise Disturbed
            self.mark()


def undisturbed(call: Callable[[Others | None], T], patience: float) -> tuple[T, float]:
    """``call(watch)`` in a quiet moment, and the cores others used meanwhile.

    For up to ``patience`` seconds it waits for quiet, and calls again when ``call`` raised ``Disturbed`` through
    ``watch.check()`` or ended with others above ``LIMIT``. Without patience it takes one call as it comes, unwatched.

    Raises:
        Disturbed: no undisturbed call within ``patience``.
    """
    if patience <= 0:
        whole = Others()
        return call(None), whole.cores()
    end = time.monotonic() + patience
    while time.monotonic() < end:
        sample = Others()
        time.sleep(0.5)
        if sample.cores() > LIMIT / 2:
            continue
        whole = Others()
        try:
            result = call(Others())
        except Disturbed:
            continue
        if (cores := whole.cores()) <= LIMIT:
            return result, cores
    raise Disturbed(f"no quiet moment within {patience:g} seconds")
