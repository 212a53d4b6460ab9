"""A tokenizer's vocabulary: names and ids of tokens, and which of them are special."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from unspool.tokenization.encoding import to_lists
from unspool.tokenization.special import NAMES, SpecialTokenId, SpecialTokenName, SpecialTokens

__all__ = ["Vocabulary", "check_id"]


class Vocabulary:
    """Names and ids of tokens.

    Attributes:
        backend_tokenizer: The `tokenizers.Tokenizer` underneath.
        special: The special tokens. `eos_token` and the like read and set them by text, `eos_token_id` by id; `None`
            means that there is none. Setting one that is not in the vocabulary raises `ValueError`
            (`add_special_tokens` adds it).
    """

    backend_tokenizer: tokenizers.Tokenizer
    special: SpecialTokens

    bos_token = SpecialTokenName()
    eos_token = SpecialTokenName()
    unk_token = SpecialTokenName()
    sep_token = SpecialTokenName()
    pad_token = SpecialTokenName()
    cls_token = SpecialTokenName()
    mask_token = SpecialTokenName()
    bos_token_id = SpecialTokenId()
    eos_token_id = SpecialTokenId()
    unk_token_id = SpecialTokenId()
    sep_token_id = SpecialTokenId()
    pad_token_id = SpecialTokenId()
    cls_token_id = SpecialTokenId()
    mask_token_id = SpecialTokenId()

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones; `len(tokenizer)` counts those too."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Each token's name and its id, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens, by id."""
        return {token.content: id_ for id_, token in sorted(self.added_tokens_decoder.items())}

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """The added tokens, special or not, with their settings."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens, such as `{"eos_token": "</s>"}`."""
        return self.special.by_name()

    @property
    def all_special_tokens(self) -> list[str]:
        """All special tokens, each once."""
        return self.special.all()

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        ids = map(self.backend_tokenizer.token_to_id, self.all_special_tokens)
        return [id_ for id_ in ids if id_ is not None]

    def add_tokens(self, tokens: str | Sequence[str | tokenizers.AddedToken], special_tokens: bool = False) -> int:
        """Add tokens to the vocabulary, where they are not in it. The model needs a row of its embedding for each.

        Args:
            tokens: Text or `AddedToken`s.
            special_tokens: Whether they are left out by `skip_special_tokens=True`.

        Returns:
            How many were new.
        """
        new = [tokens] if isinstance(tokens, str | tokenizers.AddedToken) else list(tokens)
        return (
            self.backend_tokenizer.add_special_tokens(new) if special_tokens else self.backend_tokenizer.add_tokens(new)
        )

    def add_special_tokens(self, special_tokens: Mapping[str, Any]) -> int:
        """Name special tokens, and add those to the vocabulary that it lacks.

        Args:
            special_tokens: By name, as in `{"pad_token": "<pad>"}`; `"extra_special_tokens"` takes a list.

        Returns:
            How many were new.
        """
        added = 0
        for name, value in special_tokens.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                added += self.add_tokens(list(value), special_tokens=True)
                self.special.extra += [text for text in map(str, value) if text not in self.special.extra]
            elif name in NAMES:
                added += self.add_tokens([value], special_tokens=True)
                setattr(self, name, value)
            else:
                raise ValueError(
                    f"{name!r} is no special token; the names are {', '.join(NAMES)} and extra_special_tokens"
                )
        return added

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token's name (the unknown token's, or `None`, when there is none); a list for a list."""
        if isinstance(tokens, str):
            id_ = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if id_ is None else id_
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The name of a token's id, `None` when there is none; a list for a list, tensor or array."""
        ids = to_lists(ids)
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(check_id(ids))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend_tokenizer.id_to_token(check_id(id_)) for id_ in ids if id_ not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens given by name."""
        decoder = self.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))


def check_id(id_: int) -> int:
    """`id_`, unless it is negative."""
    if id_ < 0:
        raise ValueError(f"token id {id_} is negative; take padding such as -100 out before decoding")
    return id_
