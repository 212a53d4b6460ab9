"""Special tokens: which there are, under which names, and how they get into the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import tokenizers

from unspool.errors import CheckpointError

if TYPE_CHECKING:
    from unspool.tokenization.vocabulary import Vocabulary

__all__ = ["NAMES", "SpecialTokenId", "SpecialTokenName", "SpecialTokens", "declared_tokens"]

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The names every tokenizer has, set or not. A file may define more that end in `_token` (`image_token`)."""

_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(slots=True)
class SpecialTokens:
    """The special tokens of one tokenizer, as text."""

    named: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)

    def by_name(self) -> dict[str, str]:
        """The named ones, in the order of `NAMES`, then those that only this tokenizer has."""
        return {name: self.named[name] for name in dict.fromkeys((*NAMES, *self.named)) if name in self.named}

    def all(self) -> list[str]:
        """Each special token once, named ones first."""
        return list(dict.fromkeys([*self.by_name().values(), *self.extra]))


def declared_tokens(
    config: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> tuple[SpecialTokens, list[tokenizers.AddedToken]]:
    """The special tokens that a configuration names, and the added tokens that `backend` lacks or has otherwise.

    Args:
        config: tokenizer_config.json: `bos_token` and the like as text or as the fields of an AddedToken,
            `added_tokens_decoder`, `extra_special_tokens` (`additional_special_tokens` in older files).
        backend: the tokenizer read from tokenizer.json.
    """
    defined = sorted((int(id_), _added(token)) for id_, token in (config.get("added_tokens_decoder") or {}).items())
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content: token for _, token in defined}

    special = SpecialTokens()
    values: list[Any] = []
    model_specific = [name for name in config if name.endswith("_token") and name not in NAMES]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = dict(extra) if isinstance(extra, dict) else {}
    for name, value in [*((name, config.get(name)) for name in (*NAMES, *model_specific)), *more.items()]:
        if isinstance(value, str | dict | tokenizers.AddedToken):
            special.named[name] = _content(value)
            values.append(value)
    for value in extra if isinstance(extra, list | tuple) else []:
        special.extra.append(_content(value))
        values.append(value)

    missing = [token for _, token in defined]
    for value in values:
        if _content(value) not in known:
            token = _added(value, special=True)
            known[token.content] = token
            missing.append(token)
    return special, missing


def _content(value: Any) -> str:
    return value if isinstance(value, str) else _added(value).content


def _added(value: Any, special: bool | None = None) -> tokenizers.AddedToken:
    """An AddedToken from text, from its fields or as it is."""
    if isinstance(value, tokenizers.AddedToken):
        return value
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    fields = {name: value[name] for name in _FIELDS if name in value}
    if special is not None:
        fields["special"] = special
    if not isinstance(fields.get("content"), str):
        raise CheckpointError(f"{value!r} does not describe a token: it has no text in 'content'")
    return tokenizers.AddedToken(**fields)


class SpecialTokenName:
    """An attribute of `Tokenizer` such as `eos_token`: its text, or `None` when it is not set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> SpecialTokenName: ...
    @overload
    def __get__(self, tokenizer: Vocabulary, owner: type) -> str | None: ...
    def __get__(self, tokenizer: Vocabulary | None, owner: type) -> SpecialTokenName | str | None:
        return self if tokenizer is None else tokenizer.special.named.get(self.name)

    def __set__(self, tokenizer: Vocabulary, value: str | tokenizers.AddedToken | None) -> None:
        if value is None:
            tokenizer.special.named.pop(self.name, None)
            return
        if not isinstance(value, str | tokenizers.AddedToken):
            raise TypeError(f"{self.name} is {value!r}; it takes the token's text, and {self.name}_id takes its id")
        text = str(value)
        if tokenizer.backend_tokenizer.token_to_id(text) is None:
            raise ValueError(
                f"{self.name} is {text!r}, which is not in the vocabulary; add it with "
                f"tokenizer.add_special_tokens({{{self.name!r}: {text!r}}}), and give the model a row for it"
            )
        tokenizer.special.named[self.name] = text


class SpecialTokenId:
    """An attribute of `Tokenizer` such as `eos_token_id`: the token's id, or `None` when it is not set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    @overload
    def __get__(self, tokenizer: None, owner: type) -> SpecialTokenId: ...
    @overload
    def __get__(self, tokenizer: Vocabulary, owner: type) -> int | None: ...
    def __get__(self, tokenizer: Vocabulary | None, owner: type) -> SpecialTokenId | int | None:
        if tokenizer is None:
            return self
        text = tokenizer.special.named.get(self.name)
        return None if text is None else tokenizer.backend_tokenizer.token_to_id(text)

    def __set__(self, tokenizer: Vocabulary, value: int | None) -> None:
        text = None if value is None else tokenizer.backend_tokenizer.id_to_token(value)
        if value is not None and text is None:
            raise ValueError(f"{self.name}_id is {value}, but the vocabulary has {len(tokenizer)} tokens")
        setattr(tokenizer, self.name, text)
