"""Running the command as a shell does, and in a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "unspool"]
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("UNSPOOL_TRACEBACK", None)


def unspool(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command with pipes at all ends."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


def one_error(code: int, expected: int, output: str, errors: str) -> str:
    """The one line on stderr of a command that failed as expected and printed nothing."""
    assert code == expected, errors
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("unspool: error: ")
    return line


# Makes stdin the controlling terminal, so that Ctrl-C reaches the program.
IN_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.argv[0] = 'unspool'\n"
    "from unspool.cli import main; main()"
)


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read(self) -> None:
        """Take in some more of what the program shows."""
        ready, _, _ = select.select([self.descriptor], [], [], 60)
        assert ready, f"nothing more after {self.seen!r}"
        self.seen += os.read(self.descriptor, 4096).decode(errors="replace")

    def press(self, key: str, until: str, since: int) -> int:
        """Type a key again and again until `until` appears: input() may miss a signal while it sets itself up."""
        for _ in range(60):
            self.type(key)
            ready, _, _ = select.select([self.descriptor], [], [], 1)
            if ready:
                return self.wait_for(until, since)
        pytest.fail(f"{key!r} does nothing after {self.seen!r}")

    def wait_for(self, text: str, since: int = 0) -> int:
        """Read until `text` appears behind `since`; returns the place behind it."""
        while (at := self.seen.find(text, since)) < 0:
            self.read()
        return at + len(text)


@contextmanager
def terminal(*arguments: str, before: str = "") -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", before + IN_TERMINAL, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(ours), process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)
