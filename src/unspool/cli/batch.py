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

from unspool.cli.options import ModelOptions
from unspool.cli.run import UsageError, describe, note
from unspool.cli.text import continuation, encode_chat, load_model, room

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


def run(files: BatchFiles, options: ModelOptions, settings: dict[str, Any], chat: bool, quiet: bool) -> None:
    """Continue every prompt that the output does not have yet."""
    if not files.source.is_file():
        raise UsageError(f"--input {files.source}: there is no such file")
    if files.target.exists() and files.target.samefile(files.source):
        raise UsageError(f"--output {files.target} is the input; name another file")
    with files.source.open("rb") as source:
        total = sum(1 for _ in source)
    files.target.touch()
    with files.target.open("r+b") as target:
        done = _repair(target, files.target)
        if len(done) >= total:
            note(f"all {total} lines are done")
            return
        model, tokenizer = load_model(options)
        with _progress(total, len(done)) if sys.stderr.isatty() and not quiet else _no_progress() as advance:
            batch = _Batch(model, tokenizer, settings, chat, target, advance)
            batch.run(_lines(files.source, done))
    if not quiet:
        left = f", {batch.failed} of them with an error" if batch.failed else ""
        kept = f"; {len(done)} were there already" if done else ""
        note(f"{batch.written} lines written{left}{kept}")


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


def _lines(path: Path, done: set[int]) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and contents of the lines that are left."""
    with path.open("rb") as source:
        for number, line in enumerate(source, start=1):
            if number not in done:
                yield number, line


@dataclass(slots=True)
class _Line:
    """A line under way: its own `id`, its prompt's tokens, and its outputs so far."""

    number: int
    own_id: Any
    prompt: list[int]
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
        advance: Callable[[], None],
    ) -> None:
        self.written = self.failed = 0
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._chat = chat
        self._target = target
        self._advance = advance
        self._live: dict[str, _Line] = {}
        self._manager: ContinuousBatchingManager = model.init_continuous_batching(tokenizer=tokenizer)

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
                self._manager.step()
                while (output := self._manager.get_result(timeout=0)) is not None:
                    self._take(output)
        finally:
            self._manager.stop(hard_stop=True)

    def _begin(self, number: int, text: bytes) -> None:
        """Queue a line, or write at once why it cannot be."""
        own_id = None
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError('a line must be a JSON object like {"prompt": "Once upon a time"}')
            own_id = values.pop("id", None)
            prompt = self._encode(values)
            settings = room(self._model, len(prompt), {**self._settings, **values})
            name = self._manager.add_request(prompt, f"line {number}", **settings)
        except Exception as error:
            note(f"line {number}: {describe(error)}")
            self._write(_Line(number, own_id, [], 1), {"error": describe(error), "finish_reason": "rejected"})
            self.failed += 1
            return
        default = self._model.generation_config.num_return_sequences
        self._live[name] = _Line(number, own_id, prompt, int(settings.get("num_return_sequences", default) or 1))

    def _encode(self, values: dict[str, Any]) -> list[int]:
        """The tokens of a line's prompt, which is taken out of its values."""
        prompt, messages = values.pop("prompt", None), values.pop("messages", None)
        if messages is None and not isinstance(prompt, str):
            raise ValueError("a line needs a `prompt`, a text, or `messages`")
        if messages is None and not self._chat:
            return list(self._tokenizer(prompt).input_ids)
        turns = [{"role": "user", "content": prompt}] if messages is None else messages
        tokens: list[int] = encode_chat(self._tokenizer, turns)["input_ids"][0].tolist()
        return tokens

    def _take(self, output: GenerationOutput) -> None:
        """Note an output, and write its line when it is the last."""
        name = output.request_id.partition("__child#")[0]
        line = self._live[name]
        line.made.append(output)
        if len(line.made) < line.outputs:
            return
        del self._live[name]
        line.made.sort(key=lambda one: (len(one.request_id), one.request_id))
        wrong = next((one for one in line.made if one.error is not None), None)
        if wrong is not None:
            note(f"line {line.number}: {wrong.error}")
            self._write(line, {"error": wrong.error, "finish_reason": wrong.finish_reason})
            self.failed += 1
            return
        texts = [
            continuation(self._tokenizer, line.prompt, one.generated_tokens, set(), None, one.finish_reason or "")
            for one in line.made
        ]
        told = [{"text": text.text, "tokens": text.tokens, "finish_reason": text.finish_reason} for text in texts]
        self._write(line, told[0] if len(told) == 1 else {"outputs": told})

    def _write(self, line: _Line, told: dict[str, Any]) -> None:
        """One whole line, out of our hands at once, so that a kill loses none and repeats none."""
        begin = {"line": line.number} | ({} if line.own_id is None else {"id": line.own_id})
        whole = {**begin, "prompt_tokens": len(line.prompt), **told}
        self._target.write(json.dumps(whole, ensure_ascii=False).encode() + b"\n")
        self._target.flush()
        self.written += 1
        self._advance()


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr with an estimate of the time left, and what moves it by a line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("lines", total=total, completed=done)
        yield lambda: progress.advance(task)


@contextmanager
def _no_progress() -> Iterator[Callable[[], None]]:
    yield lambda: None
