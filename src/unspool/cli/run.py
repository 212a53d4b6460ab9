"""Exit codes and errors: what the shell, and the person before it, see of a command that ends.

0    done
1    it failed: one line on stderr says why (`UNSPOOL_TRACEBACK=1` shows the whole traceback)
2    the command line makes no sense
130  Ctrl-C
141  whoever read our output went away (`unspool generate … | head -1`); nothing is said
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

__all__ = ["UsageError", "check_watch", "describe", "note", "run", "show_warning"]

INTERRUPTED = 130
PIPE_CLOSED = 141


class UsageError(Exception):
    """Options that contradict each other, or a missing one; exit code 2."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing is raised."""
    try:
        code = _call(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt goes below what was written
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would raise again at exit, so it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if os.environ.get("UNSPOOL_TRACEBACK"):
            raise
        return _report(error)
    return code


def check_watch(asked: bool) -> None:
    """Refuse `--watch` where nobody watches.

    Raises:
        UsageError: stderr is no terminal.
    """
    if asked and not sys.stderr.isatty():
        raise UsageError("--watch draws on stderr, which is no terminal; leave it out")


def note(text: str) -> None:
    """Say something that is not output, on stderr."""
    print(f"unspool: {text}", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """What an exception says, in one line."""
    if hasattr(error, "format_message"):
        text = str(error.format_message())
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
    return " ".join(text.split())


def _call(arguments: Sequence[str]) -> int:
    from typer.main import get_command

    from unspool.cli.app import app

    # Not standalone: typer then raises instead of printing boxes, and returns what the command returned: its work, or
    # an exit code when there is none (--help, --version).
    work = get_command(app).main(list(arguments), prog_name="unspool", standalone_mode=False)
    if not callable(work):
        return int(work or 0)
    work()
    return 0


def _report(error: Exception) -> int:
    """Say in one line what went wrong, and return the exit code that goes with it."""
    # typer's own usage errors have no public base class in every version; they carry their exit code and their text.
    usage = isinstance(error, UsageError) or getattr(error, "exit_code", None) == 2
    note(f"error: {describe(error)}" + (" (see unspool --help)" if usage else ""))
    return 2 if usage else 1


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning` in the form of the command's other notes."""
    note(f"warning: {' '.join(str(message).split())}")
