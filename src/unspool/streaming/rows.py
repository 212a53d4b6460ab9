"""The rows of a stream: which tokens belong to which row, and the text of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from unspool.streaming.detokenize import Decoder, IncrementalDetokenizer, TokenKinds

__all__ = ["Rows", "as_rows"]


def as_rows(value: Any) -> tuple[list[list[int]], bool]:
    """Token ids as nested lists, and whether they came with a row axis.

    Args:
        value: a tensor, array or list of ids, `[rows, len]` or `[len]`; the latter becomes one list.
    """
    ids = value.tolist() if hasattr(value, "tolist") else list(value)
    if not isinstance(ids, list):  # a scalar tensor
        return [[int(ids)]], False
    if ids and isinstance(ids[0], list):
        return ids, True
    return [ids], False


class Rows:
    """Detokenisers of the rows of one stream.

    Args:
        tokenizer: what decodes the ids.
        count: number of rows.
        decode_kwargs: settings of `decode`.
    """

    def __init__(self, tokenizer: Decoder, count: int, decode_kwargs: dict[str, Any]) -> None:
        settings = {"skip_special_tokens": False, **decode_kwargs}
        clean = settings.pop("clean_up_tokenization_spaces", None)
        kinds = TokenKinds(tokenizer, **settings)
        self._rows = [
            IncrementalDetokenizer(tokenizer, clean_up_tokenization_spaces=clean, kinds=kinds, **settings)
            for _ in range(count)
        ]
        self._pad = getattr(tokenizer, "pad_token_id", None)
        self._eos = getattr(tokenizer, "eos_token_id", None)
        self._ended = [False] * count  # the last token with text was eos: what follows may be filler
        self.open = [True] * count  # rows that may still get text

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, ids: list[list[int]], mask: Any) -> list[str]:
        """Add the prompt and return the final text of each row. Padding is left out.

        Args:
            ids: `[rows, len]`.
            mask: `[rows, len]`, 1 where a token is real; `None` takes leading pad tokens of a batch for padding.
        """
        if mask is not None:
            masks, _ = as_rows(mask)
            ids = [[token for token, real in zip(*pair, strict=True) if real] for pair in zip(ids, masks, strict=True)]
        elif len(ids) > 1 and self._pad is not None:
            ids = [row[next((at for at, token in enumerate(row) if token != self._pad), 0) :] for row in ids]
        return [row.push(tokens) for row, tokens in zip(self._rows, ids, strict=True)]

    def step(self, ids: list[list[int]], live: Sequence[bool] | None) -> list[str]:
        """Add the tokens of one step and return the final text of each row.

        Args:
            ids: `[rows, new tokens]`, ragged.
            live: whether each row is still being generated. A row that is not gives its last text and is closed. `None`
                (transformers' own loop, which says nothing) takes pad tokens after the end-of-sequence token for
                filler.
        """
        return list(self._step(ids, live))

    def _step(self, ids: list[list[int]], live: Sequence[bool] | None) -> Iterator[str]:
        for row, tokens in enumerate(ids):
            if live is not None and not live[row]:
                yield self._close(row)
            elif live is None and len(self) > 1:
                yield self._rows[row].push(self._without_filler(row, tokens))
            else:
                yield self._rows[row].push(tokens)

    def finish(self) -> list[str]:
        """Close all rows and return the text each still held back."""
        return [self._close(row) for row in range(len(self))]

    def _close(self, row: int) -> str:
        if not self.open[row]:
            return ""
        self.open[row] = False
        return self._rows[row].finish()

    def _without_filler(self, row: int, tokens: list[int]) -> Iterator[int]:
        for token in tokens:
            if self._ended[row] and token in (self._pad, self._eos):
                continue
            self._ended[row] = token == self._eos
            yield token
