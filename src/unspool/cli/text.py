"""What `generate` and `chat` have in common: loading, timing, the streamed text, the closing line."""

from __future__ import annotations

import logging
import re
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from unspool.cli.options import ModelOptions
from unspool.cli.run import UsageError, note

if TYPE_CHECKING:
    from torch import Tensor

    from unspool.generate.outputs import GenerateOutput
    from unspool.hub import CausalLM
    from unspool.tokenization import BatchEncoding, Tokenizer

__all__ = [
    "Clock",
    "Printer",
    "Text",
    "complete",
    "continuation",
    "dim",
    "encode_chat",
    "load_model",
    "room",
    "rows_of",
]

# New tokens when neither the caller nor the model's own settings name a limit.
DEFAULT_NEW_TOKENS = 256


def load_model(options: ModelOptions) -> tuple[CausalLM, Tokenizer]:
    """The model and tokenizer that the options name."""
    logging.getLogger("unspool").addHandler(_Notes())
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads}: at least 1 thread is needed")
    from unspool.hub import load

    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    model, tokenizer = load(
        options.model,
        dtype=options.dtype,
        quantize=options.quantize,
        device=options.device,
        revision=options.revision,
        local_files_only=options.offline,
    )
    if options.adapter is not None:
        model.load_adapter(options.adapter, local_files_only=options.offline)
    return model, tokenizer


def room(
    model: CausalLM, prompt_tokens: int, settings: dict[str, Any], most: int = DEFAULT_NEW_TOKENS
) -> dict[str, Any]:
    """A copy of the settings, with a limit of `most` new tokens where neither they nor the model's name one."""
    limits = ("max_new_tokens", "max_length")
    if any(settings.get(name) is not None or getattr(model.generation_config, name) is not None for name in limits):
        return dict(settings)
    left = model.spec.max_positions - prompt_tokens
    return {**settings, "max_new_tokens": max(1, min(most, left))}


def complete(
    model: CausalLM,
    tokenizer: Tokenizer,
    inputs: BatchEncoding,
    settings: dict[str, Any],
    clock: Clock,
    past: Any = None,
) -> GenerateOutput:
    """Run one generation call and return all there is to know of it."""
    from unspool.generate.outputs import GenerateOutput

    output = model.generate(
        **inputs.to(model.device),
        **settings,
        tokenizer=tokenizer,
        streamer=clock,
        past_key_values=past,
        return_dict_in_generate=True,
    )
    assert isinstance(output, GenerateOutput)
    return output


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> BatchEncoding:
    """The conversation as the model's chat template writes it, up to where the answer begins."""
    if tokenizer.chat_template is None:
        raise UsageError(
            "this model has no chat template, so it cannot be talked with; unspool generate continues texts"
        )
    encoded: BatchEncoding = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded


class Text(NamedTuple):
    """What one row wrote: its text, how many tokens that took, and why it ended (`"stop"`, `"length"`)."""

    text: str
    tokens: int
    finish_reason: str


def continuation(
    tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int], ends: set[int], pad: int | None, reason: str
) -> Text:
    """Text of the new tokens `ids` behind the prompt's; what fills the row after its end is left out."""
    from unspool.streaming import IncrementalDetokenizer

    end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    while end == len(ids) > 1 and (ids[-1] < 0 or (pad not in ends and ids[-1] == pad)):  # beams may fill with -1
        ids, end = ids[:-1], end - 1
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True, prompt_ids=prompt_ids)
    return Text(detokenizer.push(ids[:end]) + detokenizer.finish(), end, reason)


class Printer:
    """Writes the text of tokens to stdout as they come.

    Args:
        tokenizer, prompt_ids: how the tokens are spelt, and those before them.
        columns: width of the terminal in which lines break between words; `None` writes the text as it is. A word is
            then written when it is whole.
        lead: what is written before the first token, once it is sure that there is a call to run.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], columns: int | None = None, lead: str = "") -> None:
        from unspool.streaming import IncrementalDetokenizer

        self._lead = lead
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True, prompt_ids=prompt_ids)
        self._lines = None if columns is None else Lines(columns)

    def begin(self) -> None:
        """Write what comes before the tokens."""
        self._write(self._lead)

    def put(self, ids: list[int]) -> None:
        """Write what the tokens make final."""
        text = self._detokenizer.push(ids)
        self._write(text if self._lines is None else self._lines.push(text))

    def end(self) -> None:
        """Write what was held back."""
        text = self._detokenizer.finish()
        self._write(text if self._lines is None else self._lines.push(text) + self._lines.finish())

    @staticmethod
    def _write(text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


class Lines:
    """Breaks a text that comes in pieces into lines of at most `columns` characters, between words.

    A word longer than a line is left to the terminal; so are wide characters, which are counted as one column.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.column = 0
        self.word = ""  # not known to be whole yet
        self.inside = False  # a word that is longer than a line: it goes out piece by piece

    def push(self, piece: str) -> str:
        """What can be written now that `piece` has come."""
        *whole, self.word = re.split(r"(\s)", self.word + piece)
        out = "".join(map(self._place, whole))
        if self.inside or len(self.word) >= self.columns:
            out += self.finish()
            self.inside = True
        return out

    def finish(self) -> str:
        """The last word."""
        word, self.word = self.word, ""
        return self._place(word)

    def _place(self, part: str) -> str:
        """One word or one white space, on a new line where it does not fit."""
        space, inside = part.isspace(), self.inside and bool(part)
        self.inside = self.inside and not space
        if part == "\n":
            self.column = 0
            return part
        if inside and not space:
            self.column = (self.column + len(part)) % self.columns
            return part
        if self.column + len(part) <= self.columns or self.column == 0:
            self.column += len(part)
            return part
        self.column = 0 if space else len(part)
        return "\n" if space else f"\n{part}"


def rows_of(model: CausalLM, settings: dict[str, Any]) -> int:
    """How many texts a call writes at once."""
    rows = settings.get("num_return_sequences", model.generation_config.num_return_sequences)
    return 1 if rows is None else int(rows)


@dataclass(slots=True)
class Clock:
    """A streamer that counts and times the steps of one call, and passes their tokens on to be printed.

    Attributes:
        printer: prints the tokens; for a call of one row.
        tokens: all new tokens of all rows, so far.
        steps: steps that gave tokens, so far.
        started, first, last: `time.perf_counter` when made, at the first step and at the latest one.
    """

    printer: Printer | None = None
    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    _prompt_seen: bool = False

    def put(self, value: Tensor) -> None:
        """Take the prompt `[rows, columns]`, then each step's tokens `[rows]`."""
        if not self._prompt_seen:
            self._prompt_seen = True
            if self.printer is not None:
                self.printer.begin()
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.steps += 1
        new: list[int] = value.tolist()
        self.tokens += new
        if self.printer is not None:
            self.printer.put(new)

    def end(self) -> None:
        """Take note that nothing more comes."""
        if self.printer is not None:
            self.printer.end()

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the call to the first token."""
        return self.first - self.started

    def rate(self, tokens: int) -> float:
        """Tokens a second after the first step; over the whole call when there was only one step."""
        if self.steps > 1:
            return tokens * (self.steps - 1) / self.steps / max(self.last - self.first, 1e-9)
        return tokens / max(self.last - self.started, 1e-9)

    def say(self, tokens: int, ending: str = "") -> None:
        """The closing line on stderr."""
        if not self.steps:
            return note("no tokens")
        text = f"{tokens} token{'s' * (tokens != 1)}, {self.rate(tokens):.1f} tokens/s, "
        note(f"{text}first token after {self.time_to_first_token:.3f} s{ending}")
        return None


def dim(text: str) -> str:
    """The text in a fainter colour, where stdout is a terminal that shows colours."""
    from os import environ

    plain = not sys.stdout.isatty() or "NO_COLOR" in environ or environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[22m"


class _Notes(logging.Handler):
    """The library's remarks, in the form of the command's other notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")
