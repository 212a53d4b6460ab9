"""Tokens to text, incrementally: pieces that join to exactly what one `decode` of all tokens gives, at linear cost.

Three things make a token's text depend on its neighbours, and each has its own bounded remedy:

* **Bytes of one character in several tokens** (byte-level BPE). An unfinished character is always the last thing
  decoded and reads U+FFFD, so one trailing U+FFFD waits for the next token; all before it is final, invalid bytes
  included.
* **Runs of byte-fallback tokens** (`<0xE4>`, SentencePiece style). One bad byte turns every byte of its run into
  U+FFFD, so a run waits until a token of another kind closes it, or until it cannot become valid any more.
* **The first token** (a leading space that is dropped). A few tokens already emitted are kept in front as context.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from unspool.streaming.cleanup import CleanUp, tokenizer_cleans

__all__ = ["Decoder", "IncrementalDetokenizer", "TokenKinds"]

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Context kept when the window is cut, and the length at which it is cut, in tokens that have text. An unfinished
# character spans at most 3 tokens and UTF-8 falls into step after at most 3 bytes, so 6 are enough for any cut; 12
# halves the number of cuts.
_KEEP = 6
_LIMIT = 12


class Decoder(Protocol):
    """What the detokeniser needs of a tokenizer. `convert_ids_to_tokens` and `encode` are used too where they exist.

    `decode` must accept `skip_special_tokens` and `clean_up_tokenization_spaces`.
    """

    @property
    def decode(self) -> Callable[..., Any]:
        """`(ids, *, skip_special_tokens, ...) -> text`."""
        ...


class TokenKinds:
    """What kind of token an id is, found by decoding it once.

    Detokenisers of one tokenizer with the same settings can share it.
    """

    def __init__(self, tokenizer: Decoder, *, skip_special_tokens: bool = False, **decode_kwargs: Any) -> None:
        self._tokenizer = tokenizer
        self._settings = {**decode_kwargs, "skip_special_tokens": skip_special_tokens}
        self._bytes: dict[int, int | None] = {}
        self._silent: dict[int, bool] = {}
        self._name_of = getattr(tokenizer, "convert_ids_to_tokens", None)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, spaces left as they are."""
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False, **self._settings)
        assert isinstance(text, str)
        return text

    def byte(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for, 0 to 255; `None` for any other token."""
        if token not in self._bytes:
            self._bytes[token] = self._find_byte(token)
        return self._bytes[token]

    def silent(self, token: int) -> bool:
        """Whether the token never has any text: a special token that is skipped, or an id outside the vocabulary."""
        if token not in self._silent:
            # Twice, since a lone first token may lose its space.
            self._silent[token] = self.decode([token, token]) == ""
        return self._silent[token]

    def _find_byte(self, token: int) -> int | None:
        name = self._name_of(token) if self._name_of is not None else None
        match = _BYTE_TOKEN.fullmatch(name) if isinstance(name, str) else None
        if match is None or self.decode([token]) == name or self.silent(token):
            return None  # ordinary text, or a name that merely looks like a byte
        return int(match[1], 16)


class _ByteRun:
    """A run of byte-fallback tokens that is not closed yet, and whether it can still become valid UTF-8."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.poison: list[int] | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    def add(self, token: int, byte: int) -> None:
        """Append a byte. `poison` becomes the last few ids, invalid by themselves, once the run is beyond repair."""
        self.ids.append(token)
        if self.poison is not None:
            return
        unfinished = len(self._utf8.getstate()[0])
        try:
            self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self.poison = self.ids[-unfinished - 1 :]


class IncrementalDetokenizer:
    """Turns a stream of token ids into text, piece by piece.

    For every way of cutting `ids` into pushes, the pieces joined with `finish()` equal `tokenizer.decode(ids)` with the
    same settings. Text is given out as soon as no further token can change it. Each id is decoded a bounded number of
    times, whatever the text (an endless run of invalid bytes included).

    Args:
        tokenizer: Anything with a `decode` method as transformers' and unspool's tokenizers have it.
        skip_special_tokens: Leave special tokens out of the text.
        clean_up_tokenization_spaces: Remove spaces before punctuation where the tokenizer does so; `None` asks the
            tokenizer's attribute of that name. A tokenizer that cleans up in an unknown way makes all text wait for
            `finish()`.
        prompt_ids: Tokens before the stream. They count as context and are not part of the text given out: the pieces
            then join to `decode(prompt_ids + ids)` less what of the prompt's text was already final.
        kinds: Share what is known about the tokenizer's ids between detokenisers (same tokenizer and settings).
        decode_kwargs: Passed to `decode` as they are.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = False,
        prompt_ids: Iterable[int] = (),
        kinds: TokenKinds | None = None,
        **decode_kwargs: Any,
    ) -> None:
        self._kinds = kinds or TokenKinds(tokenizer, skip_special_tokens=skip_special_tokens, **decode_kwargs)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        cleans = tokenizer_cleans(tokenizer) if clean_up_tokenization_spaces else False
        self._clean = CleanUp() if cleans else None
        self._whole: list[int] | None = None if cleans is not None else []
        self._decode_whole: Callable[[list[int]], str] = lambda ids: tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=True, **decode_kwargs
        )
        self._prompt = [int(token) for token in prompt_ids]
        self._reset()
        if self._prompt:
            self.push(self._prompt)

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens and return the text that became final, `""` if none did.

        Args:
            ids: Token ids in order, any number of them.
        """
        new = [int(token) for token in ids]
        if self._whole is not None:
            self._whole += new
            return ""
        piece = self._push(new)
        return self._clean.push(piece) if self._clean is not None else piece

    def finish(self) -> str:
        """End the stream: return the text still held back. The next `push` starts a new, empty stream."""
        if self._whole is not None:
            return self._finish_whole(self._whole)
        rest = self._kinds.decode(self._window + self._run.ids)[self._shown :]
        self._reset()
        return self._clean.push(rest) + self._clean.finish() if self._clean is not None else rest

    def _finish_whole(self, ids: list[int]) -> str:
        text, prompt = self._decode_whole(ids), self._decode_whole(self._prompt) if self._prompt else ""
        self._whole, self._prompt = [], []
        same = zip(prompt, text, strict=False)
        return text[next((at for at, (a, b) in enumerate(same) if a != b), len(prompt)) :]

    def _reset(self) -> None:
        self._window: list[int] = []  # context and unfinished tokens, the last ones decoded
        self._shown = 0  # characters of the window's text that were given out
        self._run = _ByteRun()

    def _push(self, new: list[int]) -> str:
        kinds = self._kinds
        start = len(new)  # of the trailing tokens that are bytes, or silent between them
        while start and (kinds.byte(new[start - 1]) is not None or kinds.silent(new[start - 1])):
            start -= 1
        ready: list[int] = []
        if start:  # a token with text of its own closes the run
            ready = self._run.ids + new[:start]
            self._run = _ByteRun()
        for token in new[start:]:
            byte = kinds.byte(token)
            if byte is not None:
                self._run.add(token, byte)
        if self._is_lost(self._run):
            ready += self._run.ids
            self._run.ids = []
        return self._emit(ready) if ready else ""

    def _is_lost(self, run: _ByteRun) -> bool:
        """Whether every byte of the run reads U+FFFD, come what may."""
        if run.poison is None or not run.ids:
            return False
        # Some decoders of this kind repair the valid part of a run: then it has to wait for its end.
        return self._kinds.decode(run.poison) == _REPLACEMENT * len(run.poison)

    def _emit(self, ready: list[int]) -> str:
        """Decode `ready` behind the window and return what is final."""
        self._window += ready
        text = self._kinds.decode(self._window)
        lost = self._run.poison if not self._run.ids else None
        final = len(text) - (lost is None and text.endswith(_REPLACEMENT))
        piece = text[self._shown : final]
        held = len(text) - max(final, self._shown)
        if lost is not None:
            # The bytes that follow must see that their run is lost; nothing further back matters.
            self._window, self._shown = list(lost), len(lost)
        elif len(self._window) > _LIMIT:
            self._window = self._tail()
            self._shown = len(self._kinds.decode(self._window)) - held
        else:
            self._shown = len(text) - held
        return piece

    def _tail(self) -> list[int]:
        """The last few tokens of the window that have text."""
        tail: list[int] = []
        for token in reversed(self._window):
            if len(tail) == _KEEP:
                break
            if not self._kinds.silent(token):
                tail.append(token)
        return tail[::-1]
