"""`unspool chat`: turns of a conversation, typed or piped."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unspool.cli.options import ModelOptions
from unspool.cli.run import UsageError, describe, note
from unspool.cli.text import Clock, Printer, complete, encode_chat, load_model, room, rows_of

if TYPE_CHECKING:
    from unspool.cache import PastKeyValues
    from unspool.hub import CausalLM
    from unspool.tokenization import Tokenizer

__all__ = ["run"]

HELP = """\
/reset   forget the conversation
/exit    leave (so does Ctrl-D)
/help    show this
Ctrl-C   stop the answer"""


EXIT = ("/exit", "/quit", "exit", "quit")  # the last two are what people try first

# New tokens of an answer when nobody names a limit.
LONGEST_ANSWER = 1024


def run(options: ModelOptions, settings: dict[str, Any], system: str | None, quiet: bool) -> None:
    """Answer until the input ends."""
    model, tokenizer = load_model(options)
    if rows_of(model, settings) > 1:
        raise UsageError("num_return_sequences: a talk has one answer at a time; leave it at 1")
    talk = Talk(model, tokenizer, settings, system)
    encode_chat(tokenizer, talk.messages({"role": "user", "content": ""}))  # refuses a model without chat template
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                _turn(talk, line.strip(), quiet)
        return
    note(f"talking with {options.model}; /exit leaves, /help lists what else can be typed")
    while (line := _read_line()) is not None and line not in EXIT:
        if line:
            _react(talk, line, quiet)


def _read_line() -> str | None:
    """What was typed; nothing after Ctrl-C, and `None` after Ctrl-D."""
    import readline  # noqa: F401  # gives input() editing and history

    try:
        return input("> " if sys.stdout.isatty() else "").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        print()
        return None


def _react(talk: Talk, line: str, quiet: bool) -> None:
    """Obey a command or answer; neither Ctrl-C nor an error ends the program."""
    if line == "/help":
        note(f"type and press Enter; besides that\n{HELP}")
    elif line == "/reset":
        talk.reset()
        note("the conversation is forgotten")
    elif line.startswith("/"):
        note(f"there is no {line.split()[0]}; /help lists what there is")
    else:
        try:
            _turn(talk, line, quiet)
        except KeyboardInterrupt:
            print()
        except (ValueError, RuntimeError, MemoryError) as error:
            note(f"error: {describe(error)} (/reset starts anew)")


@dataclass(slots=True)
class Talk:
    """A conversation with a model.

    Attributes:
        model, tokenizer: who answers.
        settings: generation settings of every turn.
        system: the system message, or `None`.
        history: what was said, in turns of question and answer.
        past: keys and values of the last turn, so that the next computes only what is new.
    """

    model: CausalLM
    tokenizer: Tokenizer
    settings: dict[str, Any]
    system: str | None
    history: list[dict[str, str]] = field(default_factory=list)
    past: PastKeyValues | None = None

    def messages(self, question: dict[str, str]) -> list[dict[str, str]]:
        """The conversation with a new question, as the chat template wants it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.history, question]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.history.clear()
        self.past = None

    def remember(self, question: dict[str, str], answer: list[int]) -> None:
        """Add a turn to the history; an answer that was stopped counts as far as it came."""
        text = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
        if text:
            self.history += [question, {"role": "assistant", "content": text}]


def _turn(talk: Talk, line: str, quiet: bool) -> None:
    """One question and its answer, printed as it is made."""
    question = {"role": "user", "content": line}
    inputs = encode_chat(talk.tokenizer, talk.messages(question))
    prompt_ids: list[int] = inputs["input_ids"][0].tolist()
    settings = room(talk.model, len(prompt_ids), talk.settings, LONGEST_ANSWER)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    clock = Clock(Printer(talk.tokenizer, prompt_ids, columns))
    try:
        output = complete(talk.model, talk.tokenizer, inputs, settings, clock, talk.past)
        talk.past = output.past_key_values
    finally:  # after Ctrl-C too: what was said was said
        talk.remember(question, clock.tokens)
    print(flush=True)
    if not quiet:
        full = output.finish_reasons == ["length"]
        clock.say(len(clock.tokens), "; stopped at the limit of tokens" if full else "")
