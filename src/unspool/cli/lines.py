"""Lines of a file of prompts: what `generate --input` and `bench --input` read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unspool.cli.text import encode_chat, room

if TYPE_CHECKING:
    from unspool.hub import CausalLM
    from unspool.tokenization import Tokenizer

# What a line may set besides fields of `GenerationConfig`.
_OF_REQUESTS = ("priority", "deadline", "cache_salt", "adapter_name")

__all__ = ["Line", "read_line", "read_lines"]


@dataclass(slots=True)
class Line:
    """One prompt of a file.

    Attributes:
        number: of the line, from 1.
        own_id: what the line calls itself, or `None`.
        prompt: its tokens.
        settings: fields of `GenerationConfig`.
        error: why it cannot be, in place of the rest.
    """

    number: int
    own_id: Any = None
    prompt: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


def read_lines(path: Path, done: set[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and contents of the lines that are not `done`."""
    with path.open("rb") as source:
        for number, text in enumerate(source, start=1):
            if done is None or number not in done:
                yield number, text


def read_line(
    number: int, text: bytes, model: CausalLM, tokenizer: Tokenizer, settings: dict[str, Any], chat: bool
) -> Line:
    """What a line asks for; its own settings are put on top of `settings`."""
    from unspool.config.fields import FIELDS
    from unspool.config.unknown import no_use_for

    line = Line(number)
    try:
        values = _object(text)
        if not isinstance(values, dict):
            raise ValueError('a line must be a JSON object like {"prompt": "Once upon a time"}')
        line.own_id = values.pop("id", None)
        line.prompt = _encode(tokenizer, values, chat)
        known = {*FIELDS, *_OF_REQUESTS}
        if wrong := [name for name in values if name not in known]:
            raise ValueError(no_use_for("a line", wrong, known))
        line.settings = room(model, len(line.prompt), {**settings, **values})
    except Exception as error:
        line.error = error
    return line


def _object(text: bytes) -> Any:
    """The JSON of a line."""
    if not text.strip():
        raise ValueError("the line is empty")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f'the line is not JSON like {{"prompt": "Once upon a time"}}: {error}') from None


def _encode(tokenizer: Tokenizer, values: dict[str, Any], chat: bool) -> list[int]:
    """The tokens of a line's prompt, which is taken out of its values."""
    prompt, messages = values.pop("prompt", None), values.pop("messages", None)
    if messages is None and not isinstance(prompt, str):
        raise ValueError("a line needs a `prompt`, a text, or `messages`")
    if messages is None and not chat:
        return list(tokenizer(prompt).input_ids)
    turns = [{"role": "user", "content": prompt}] if messages is None else messages
    tokens: list[int] = encode_chat(tokenizer, turns)["input_ids"][0].tolist()
    return tokens
