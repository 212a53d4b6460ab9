"""A tokenizer's tokens in llguidance's form, and the grammars compiled for them; both are kept for later calls."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from unspool.logits.grammar.compiling import compile_matcher

__all__ = ["Grammar", "TokenTable", "compile_structure", "token_table"]

V = TypeVar("V")

_TABLES_KEPT = 4
"""Tables of one tokenizer: one for each width of a model's head and each set of end tokens that came up last."""
_GRAMMARS_KEPT = 32


class Recent(OrderedDict[Hashable, V]):
    """The entries used last, a bounded number of them; for use by several threads."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._lock = Lock()

    def find(self, key: Hashable) -> V | None:
        """The entry, which now is the one used last."""
        with self._lock:
            value = self.get(key)
            if value is not None:
                self.move_to_end(key)
            return value

    def keep(self, key: Hashable, value: V) -> V:
        """Add an entry, unless another thread did so meanwhile; returns the one that is kept."""
        with self._lock:
            value = self.setdefault(key, value)
            self.move_to_end(key)
            while len(self) > self._most:
                self.popitem(last=False)
            return value


class TokenTable:
    """The text of each token, as a tree that grammars walk.

    Args:
        tokenizer_json: content of a tokenizer.json.
        size: number of tokens, at least the tokenizer's.
        eos: end tokens.

    Attributes:
        trie: llguidance's tokenizer.
        size: as given.
        eos: as given.
        plain_eos: end tokens that are ordinary text too.

    Raises:
        ValueError: llguidance cannot use this tokenizer.
    """

    def __init__(self, tokenizer_json: str, size: int, eos: Sequence[int]) -> None:
        library = import_llguidance()
        try:
            self.trie = library.LLTokenizer(tokenizer_json, n_vocab=size, eos_token=list(eos))
        except ValueError as error:
            raise ValueError(f"structured output cannot use this tokenizer: {error}") from error
        self.size = size
        self.eos = frozenset(eos)
        self.plain_eos = [token for token in eos if not self.trie.is_special_token(token)]
        self._grammars: Recent[Grammar] = Recent(_GRAMMARS_KEPT)

    def compile(self, kind: str, text: str) -> Grammar:
        """The grammar of `text`, which is a `kind` of structure; see `compile_matcher`."""
        found = self._grammars.find((kind, text))
        if found is None:
            found = self._grammars.keep((kind, text), Grammar(self, compile_matcher(self.trie, kind, text)))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar, which any number of rows may follow.

    Attributes:
        table: the tokens it is for.
        template: a matcher at the start, only ever copied.
    """

    table: TokenTable
    template: Any

    def matcher(self) -> Any:
        """A matcher at the start."""
        return self.template.deep_copy()


_tables: WeakKeyDictionary[Any, Recent[TokenTable]] = WeakKeyDictionary()
_tables_lock = Lock()


def compile_structure(
    kind: str, structure: Any, *, tokenizer: Any, eos: Sequence[int], vocab_size: int | None = None
) -> Grammar:
    """Compile what a text must be, or find it among what was compiled before.

    Args:
        kind: `"json_schema"`, `"regex"` or `"grammar"`, as the settings call it.
        structure: its value.
        tokenizer: the model's: ours, a fast one of transformers, or a `tokenizers.Tokenizer`.
        eos: end tokens, of which one follows the complete text.
        vocab_size: width of the model's scores; the tokenizer's size if not given.

    Raises:
        ValueError: there is no tokenizer or no end token, or the structure is invalid, too large, or cannot be met.
        TypeError: the tokenizer is none of these.
        ImportError: llguidance is not installed.
    """
    if tokenizer is None:
        raise ValueError(f"`{kind}` is set and needs the model's tokenizer: pass `tokenizer=` to `generate`.")
    if not eos:
        raise ValueError(
            f"`{kind}` needs a token to end the text with, and the model has no eos_token_id; pass `eos_token_id=`."
        )
    text = json.dumps(structure, ensure_ascii=False) if kind == "json_schema" else structure
    return token_table(tokenizer, eos, vocab_size).compile(kind, text)


def token_table(tokenizer: Any, eos: Sequence[int], vocab_size: int | None = None) -> TokenTable:
    """The table of a tokenizer, made once; arguments and errors are those of `compile_structure`."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TypeError(
            "structured output needs a tokenizer of unspool, a fast one of transformers, or a tokenizers.Tokenizer, "
            f"not a {type(tokenizer).__name__}"
        )
    own = backend.get_vocab_size(with_added_tokens=True)
    key = (own, vocab_size, tuple(eos))
    kept = _kept_tables(tokenizer)
    found = None if kept is None else kept.find(key)
    if found is not None:
        return found
    size = max(own, vocab_size or 0, 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=0))
    ends = [token for token in eos if 0 <= token < (vocab_size or size)]
    if not ends:
        raise ValueError(f"eos_token_id {list(eos)} is outside the vocabulary of {size} tokens, so no text could end")
    table = TokenTable(_plain_json(backend), size, ends)
    return table if kept is None else kept.keep(key, table)


def import_llguidance() -> Any:
    """The library.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return import_module("llguidance")
    except ImportError as error:
        raise ImportError(
            "json_schema, regex and grammar need the package llguidance: pip install 'unspool[structured]'"
        ) from error


def _kept_tables(tokenizer: Any) -> Recent[TokenTable] | None:
    """Where a tokenizer's tables are kept for as long as it lives; `None` where it cannot be watched."""
    try:
        with _tables_lock:
            return _tables.setdefault(tokenizer, Recent(_TABLES_KEPT))
    except TypeError:  # not hashable, or no weak references to it
        return None


def _plain_json(backend: Any) -> str:
    """The tokenizer as JSON, without padding and truncation, which are settings of somebody's calls."""
    text: str = backend.to_str()
    if backend.padding is None and backend.truncation is None:
        return text
    return json.dumps({**json.loads(text), "padding": None, "truncation": None})
