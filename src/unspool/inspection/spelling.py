"""How tokens read: their own bytes, characters that several of them share, and nothing that could act on a terminal.

Bytes that are not a character by themselves are written `⟨E4⟩`, characters that cannot be seen `⟨U+200B⟩` or as the
pictures that Unicode has for controls. Spaces and line breaks stay as they are.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies (GPT-2's and most since) write bytes in names of tokens."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def visible(text: str) -> str:
    """The text with everything that cannot be seen, or that changes how its neighbours are shown, spelt out."""
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(map(_visible, text))
    return f"◌{shown}" if shown and all(unicodedata.category(char)[0] == "M" for char in shown) else shown


def _visible(char: str) -> str:
    if char in " \n" or char.isprintable():
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def _chips(data: bytes) -> str:
    return "".join(f"⟨{byte:02X}⟩" for byte in data)


class Speller:
    """Texts of tokens, each found once.

    Args:
        tokenizer: anything with `decode`; `convert_ids_to_tokens` tells the bytes of tokens that are no characters.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._names: dict[int, str] = {}

    def name(self, token: int) -> str:
        """How a token reads by itself."""
        if token not in self._names:
            self._names[token] = next(iter(self.pieces([token])))
        return self._names[token]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each token adds to the text of them all. A character shows where its last byte is."""
        reader = codecs.getincrementaldecoder("utf-8")("strict")
        return [self._piece(token, reader) for token in ids]

    def _piece(self, token: int, reader: codecs.IncrementalDecoder) -> str:
        shown, mine = "", b""  # mine: this token's bytes of a character that is not whole
        for byte in self._bytes(token):
            one = bytes([byte])
            try:
                text = reader.decode(one)
            except UnicodeDecodeError:
                reader.reset()
                shown += _chips(mine)
                mine = b""
                try:
                    text = reader.decode(one)
                except UnicodeDecodeError:
                    reader.reset()
                    shown += _chips(one)
                    continue
            mine = b"" if text else mine + one
            shown += text
        # chips are made of printable characters, so they pass unchanged
        return visible(shown) + _chips(mine)

    def _bytes(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> bytes:
        if token < 0:
            return f"⟨{token}⟩".encode()
        text = self._decode([token])
        if _REPLACEMENT in text:
            return self._from_name(token, text)
        twice = self._decode([token, token])
        if len(twice) > 2 * len(text):  # a tokenizer that drops the space before the first word
            text = twice[len(text) :]
        return (text or f"⟨{token}⟩").encode("utf-8", "backslashreplace")

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _from_name(self, token: int, text: str) -> bytes:
        """Bytes of a token that does not decode by itself."""
        ask = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        name = ask(token) if ask is not None else None
        if isinstance(name, str):
            if match := _BYTE_NAME.fullmatch(name):
                return bytes([int(match[1], 16)])
            if all(char in _ALPHABET for char in name):
                data = bytes(_ALPHABET[char] for char in name)
                if data.decode("utf-8", "replace") == text:
                    return data
        return text.encode()
