"""`unspool generate --input FILE --output FILE`: many prompts from a file, their continuations into another.

A line of the input is a JSON object with a `prompt` (or chat `messages`), an `id` if you like, and settings of its own.
A line of the output names the input's line by its number; lines come as they are done. What a killed run wrote is kept,
and the next run does the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unspool.cli.lines import Line, read_line, read_lines
from unspool.cli.options import ModelOptions
from unspool.cli.run import UsageError, check_watch, describe, note
from unspool.cli.text import continuation, load_model

if TYPE_CHECKING:
    from unspool.continuous import ContinuousBatchingManager, GenerationOutput
    from unspool.hub import CausalLM
    from unspool.tokenization import Tokenizer

__all__ = ["BatchFiles", "run"]

_AHEAD = 512  # requests read before they are answered


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """Where prompts are and their continuations go."""

    source: Path
    target: Path


def run(
    files: BatchFiles, options: ModelOptions, settings: dict[str, Any], chat: bool, quiet: bool, watch: bool
) -> None:
    """Continue every prompt that the output does not have yet."""
    check_watch(watch)
    if not files.source.is_file():
        raise UsageError(f"--input {files.source}: there is no such file")
    if files.target.exists() and files.target.samefile(files.source):
        raise UsageError(f"--output {files.target} is the input; name another file")
    with files.source.open("rb") as source:
        total = sum(1 for _ in source)
    files.target.touch()
    with files.target.open("r+b") as target:
        _lock(target, files.target)
        done = _repair(target, files.target)
        if len(done) >= total:
            note(f"all {total} lines are done")
            return
        model, tokenizer = load_model(options)
        batch = _Batch(model, tokenizer, settings, chat, target)
        shown = watch or (sys.stderr.isatty() and not quiet)
        with _shown(batch.manager, total, len(done), watch) if shown else _not_shown() as batch.advance:
            batch.run(read_lines(files.source, done))
    if not quiet:
        left = f", {batch.failed} of them with an error" if batch.failed else ""
        kept = f"; {len(done)} were there already" if done else ""
        note(f"{batch.written} lines written{left}{kept}")


def _lock(target: BufferedRandom, path: Path) -> None:
    """Keep a second run from writing the same file, as far as the system can."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        return
    try:
        flock(target, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"--output {path}: another run is writing it") from None
    except OSError:
        return  # this file system knows no locks


def _repair(target: BufferedRandom, path: Path) -> set[int]:
    """Numbers of the lines that are done; a last line that was cut off is taken away."""
    done: set[int] = set()
    end = 0
    for line in target:
        if not line.endswith(b"\n"):
            break
        try:
            done.add(int(json.loads(line)["line"]))
        except (ValueError, TypeError, KeyError):
            raise UsageError(f"--output {path}: it holds lines that are not of this command; name another") from None
        end += len(line)
    target.truncate(end)
    target.seek(end)
    return done


@dataclass(slots=True)
class _Answer:
    """A line under way, how many outputs it asks for, and those there are."""

    line: Line
    outputs: int
    made: list[GenerationOutput] = field(default_factory=list)


class _Batch:
    """Reads, generates and writes, a few hundred lines at a time."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        settings: dict[str, Any],
        chat: bool,
        target: BufferedRandom,
    ) -> None:
        self.written = self.failed = 0
        self.advance: Callable[[], None] = lambda: None
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._chat = chat
        self._target = target
        self._live: dict[str, _Answer] = {}
        self.manager: ContinuousBatchingManager = model.init_continuous_batching(tokenizer=tokenizer)

    def run(self, lines: Iterator[tuple[int, bytes]]) -> None:
        """Work through all lines."""
        try:
            more = True
            while more or self._live:
                while more and len(self._live) < _AHEAD:
                    number, line = next(lines, (0, b""))
                    more = number > 0
                    if more:
                        self._begin(number, line)
                self.manager.step()
                while (output := self.manager.get_result(timeout=0)) is not None:
                    self._take(output)
        except KeyboardInterrupt:
            note(f"interrupted after {self.written} lines; the same command goes on with the rest")
            raise
        finally:
            self.manager.stop(hard_stop=True)

    def _begin(self, number: int, text: bytes) -> None:
        """Queue a line, or write at once why it cannot be."""
        line = read_line(number, text, self._model, self._tokenizer, self._settings, self._chat)
        try:
            if line.error is not None:
                raise line.error
            name = self.manager.add_request(line.prompt, f"line {number}", **line.settings)
        except Exception as error:
            note(f"line {number}: {describe(error)}")
            line.prompt = []
            self._write(line, {"error": describe(error), "finish_reason": "rejected"})
            self.failed += 1
            return
        default = self._model.generation_config.num_return_sequences
        self._live[name] = _Answer(line, int(line.settings.get("num_return_sequences", default) or 1))

    def _take(self, output: GenerationOutput) -> None:
        """Note an output, and write its line when it is the last."""
        name = output.request_id.partition("__child#")[0]
        answer = self._live[name]
        answer.made.append(output)
        if len(answer.made) < answer.outputs:
            return
        del self._live[name]
        line = answer.line
        answer.made.sort(key=lambda one: (len(one.request_id), one.request_id))
        wrong = next((one for one in answer.made if one.error is not None), None)
        if wrong is not None:
            note(f"line {line.number}: {wrong.error}")
            self._write(line, {"error": wrong.error, "finish_reason": wrong.finish_reason})
            self.failed += 1
            return
        texts = [
            continuation(self._tokenizer, line.prompt, one.generated_tokens, set(), None, one.finish_reason or "")
            for one in answer.made
        ]
        told = [{"text": text.text, "tokens": text.tokens, "finish_reason": text.finish_reason} for text in texts]
        self._write(line, told[0] if len(told) == 1 else {"outputs": told})

    def _write(self, line: Line, told: dict[str, Any]) -> None:
        """One whole line, out of our hands at once, so that a kill loses none and repeats none."""
        begin = {"line": line.number} | ({} if line.own_id is None else {"id": line.own_id})
        whole = {**begin, "prompt_tokens": len(line.prompt), **told}
        self._target.write(json.dumps(whole, ensure_ascii=False).encode() + b"\n")
        self._target.flush()
        self.written += 1
        self.advance()


@contextmanager
def _shown(manager: ContinuousBatchingManager, total: int, done: int, watch: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr with an estimate of the time left, over the manager's numbers; and what moves it by a line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from unspool.continuous.view import Watch

    console = Console(stderr=True)
    progress = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)
    task = progress.add_task("lines", total=total, completed=done)
    with Watch(lambda: manager.metrics, console=console, above=progress, clear=True) if watch else progress:
        yield lambda: progress.advance(task)


@contextmanager
def _not_shown() -> Iterator[Callable[[], None]]:
    yield lambda: None
