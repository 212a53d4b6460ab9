"""The way from a call to the caller's streamer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unspool.generate.inputs import Prompts


@contextmanager
def told_of_failure(streamer: Any) -> Iterator[None]:
    """Tell a streamer that can be told (`fail(error)`) of an error in the block, so that no reader waits for more."""
    try:
        yield
    except BaseException as error:
        fail = None if isinstance(streamer, type) else getattr(streamer, "fail", None)
        if fail is not None:
            fail(error)
        raise


class Stream:
    """A streamer's entrance; gives it the prompts at once.

    Streamers that know rows (`row_aware`) also hear where padding stands and which rows the news are of.

    Args:
        streamer: has `put(tokens)` and `end()`.
        prompts: one for each row of the stream.
    """

    def __init__(self, streamer: Any, prompts: Prompts) -> None:
        self._streamer = streamer
        self._row_aware = bool(getattr(streamer, "row_aware", False))
        self._waiting: list[list[int]] = [[] for _ in prompts.tokens]
        ids = prompts.rectangle.cpu()
        if self._row_aware:
            streamer.put(ids, mask=prompts.mask.cpu().long())
        else:
            streamer.put(ids)

    def step(self, tokens: Tensor, live: list[bool]) -> None:
        """Give one step's tokens `[rows]`, which are news for the rows that are `live` and filler for the others."""
        if self._row_aware:
            self._streamer.put(tokens, live=live)
        else:
            self._streamer.put(tokens)

    def news(self, tokens: list[list[int]], ended: list[bool], filler: int) -> None:
        """Give any number of tokens for each row, the last ones of rows that `ended`.

        A streamer that does not know rows gets them by columns, once every row has its token of a column or ended.
        """
        if self._row_aware:
            if any(tokens):
                self._streamer.put(tokens, live=[bool(new) or not end for new, end in zip(tokens, ended, strict=True)])
            return
        for waiting, new in zip(self._waiting, tokens, strict=True):
            waiting += new
        while any(self._waiting) and all(row or end for row, end in zip(self._waiting, ended, strict=True)):
            self._streamer.put(torch.tensor([row.pop(0) if row else filler for row in self._waiting]))
