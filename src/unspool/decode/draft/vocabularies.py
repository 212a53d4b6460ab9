"""Drafts from a model with another tokenizer: what the call's tokenizers come to."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

from unspool.decode.draft.words import Tongue

__all__ = ["read_tokenizers", "shared_tokens", "tongue"]

_shared: WeakKeyDictionary[Any, WeakKeyDictionary[Any, tuple[int, int, dict[int, int]]]] = WeakKeyDictionary()
_lock = threading.Lock()


def read_tokenizers(tokenizer: Any, assistant_tokenizer: Any, vocab: int | None, draft_vocab: int | None) -> Any:
    """The two tokenizers of a call with an assistant; `None` where both models have the same vocabulary.

    Raises:
        ValueError: they are needed and not there.
    """
    if assistant_tokenizer is None:
        if vocab == draft_vocab or vocab is None or draft_vocab is None:
            return None
        raise ValueError(
            f"assistant_model has a vocabulary of {draft_vocab} and the model one of {vocab}; with tokenizers of "
            "their own, pass both: tokenizer= and assistant_tokenizer="
        )
    if tokenizer is None:
        raise ValueError("assistant_tokenizer goes with the model's own tokenizer; pass tokenizer= too")
    if vocab == draft_vocab and tokenizer.get_vocab() == assistant_tokenizer.get_vocab():
        return None
    return tokenizer, assistant_tokenizer


def shared_tokens(tokenizer: Any, assistant_tokenizer: Any) -> dict[int, int]:
    """The assistant's id of each of the model's tokens that both have, by their names.

    Args:
        tokenizer, assistant_tokenizer: with `get_vocab`, `convert_ids_to_tokens` and a call that encodes.

    Raises:
        ValueError: they have no token in common.

    Source: `AssistantToTargetTranslator` of transformers.
    """
    sizes = len(tokenizer), len(assistant_tokenizer)
    with _lock:
        made = _shared.setdefault(tokenizer, WeakKeyDictionary())
        found = made.get(assistant_tokenizer)
        if found is None or found[:2] != sizes:
            found = made[assistant_tokenizer] = (*sizes, _pairs(tokenizer, assistant_tokenizer))
    if not found[2]:
        raise ValueError(
            "tokenizer and assistant_tokenizer have no token in common, so there is nothing to draft when sampling; "
            "decode with do_sample=False, or take another assistant_model"
        )
    return found[2]


def _pairs(tokenizer: Any, assistant_tokenizer: Any) -> dict[int, int]:
    names = assistant_tokenizer.get_vocab()
    ours, theirs = _space(tokenizer), _space(assistant_tokenizer)
    if ours and theirs and ours != theirs:
        names = {ours + name[1:] if name.startswith(theirs) else name: token for name, token in names.items()}
    return {token: names[name] for name, token in tokenizer.get_vocab().items() if name in names}


def _space(tokenizer: Any) -> str:
    """How the names of tokens write a space; empty where it has no token."""
    ids = tokenizer(" ", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids)[0][0]) if ids else ""


def tongue(tokenizer: Any) -> Tongue:
    """A tokenizer's texts."""

    def encode(text: str, whole: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=whole)["input_ids"])

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return Tongue(encode, decode)
