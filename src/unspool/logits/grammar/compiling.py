"""From a JSON schema, a regular expression or a grammar to a matcher, within bounds of size, work, stack and time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["compile_matcher", "reason"]

MOST_CHARACTERS = 256 * 1024
"""Longest text of a structure. llguidance's own limits bound what smaller ones may unfold to."""
MOST_SECONDS = 30.0
_STACK = 512 * 2**20
"""Bytes of address space, touched only as deep as needed. llguidance follows rules recursively: chains of some thousand
rules, which the size allows, overflow an ordinary stack, and that would end the process."""

_NO_MORE = ("NoExtension", "NoExtensionBias", "EndOfSentence")  # llguidance's words for a text that cannot go on

# As `json.dumps` writes it. Free white space would let a model go on with it forever.
_JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_stack_lock = threading.Lock()


def compile_matcher(trie: Any, kind: str, text: str) -> Any:
    """A matcher at the start of the grammar, the first mask already computed.

    Args:
        trie: llguidance's tokenizer.
        kind: `"json_schema"`, `"regex"` or `"grammar"`.
        text: JSON, a regular expression or Lark.

    Raises:
        ValueError: it is invalid, too large, or no text meets it. One sentence that begins with `kind`.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{kind} has {len(text)} characters; {MOST_CHARACTERS} is the most, so make it smaller")
    return _on_deep_stack(lambda: _compile(trie, kind, text), kind)


def reason(matcher: Any) -> str:
    """Why a matcher failed, in one line; empty when it merely came to an end that is none."""
    lines = [line.strip() for line in matcher.get_error().replace("<non-verbose/>", "").splitlines()] or [""]
    if matcher.stop_reason() in _NO_MORE or lines[0] in _NO_MORE:
        return ""
    # Of several lines, the first says what and where, and one may say why; the others show the source.
    why = next((line.removeprefix("error:") for line in lines[1:] if line.startswith("error:")), "")
    return (lines[0] if len(lines[0]) <= 200 else f"{lines[0][:197]}...") + why


def _compile(trie: Any, kind: str, text: str) -> Any:
    library = import_module("llguidance")
    make = library.LLMatcher
    try:
        if kind == "json_schema":
            source = make.grammar_from_json_schema(text, defaults=_JSON_LAYOUT)
        else:
            source = make.grammar_from_regex(text) if kind == "regex" else make.grammar_from_lark(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} cannot be used: {' '.join(str(error).split())}") from None
    limits = library.LLParserLimits(verbose_errors=False)
    matcher = make(trie, source, log_level=0, limits=limits)
    _probe(matcher, kind)
    # What follows a forced beginning, such as a schema's `{"`, shows whether the grammar is too large.
    ahead = matcher.deep_copy()
    if ahead.try_consume_tokens(ahead.compute_ff_tokens()) or ahead.is_error():
        _probe(ahead, kind)
    return matcher


def _probe(matcher: Any, kind: str) -> None:
    """Raise unless the text can go on from here, or may end."""
    some = not matcher.is_error() and any(matcher.compute_bitmask())
    if matcher.is_error() or not some:
        why = reason(matcher) or "no text that this tokenizer can write meets it"
        raise ValueError(f"{kind} cannot be used: {why}")


def _on_deep_stack(work: Callable[[], Any], kind: str) -> Any:
    """The result of `work`, done in a thread with a deep stack and for a bounded time; its errors are raised here."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # llguidance's panics are no Exceptions
            errors.append(error)

    with _stack_lock:
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run, name="unspool-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join(MOST_SECONDS)
    if thread.is_alive():
        raise ValueError(f"{kind} takes more than {MOST_SECONDS:g} seconds to compile; make it smaller")
    if errors:
        error = errors[0]
        if isinstance(error, Exception):
            raise error
        raise ValueError(f"{kind} cannot be used: {' '.join(str(error).split())}") from error
    return results[0]
