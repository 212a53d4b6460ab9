"""The streamer protocol and the streamer that prints."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

from unspool.streaming.detokenize import Decoder
from unspool.streaming.rows import Rows, as_rows

__all__ = ["BaseStreamer", "TextStreamer"]


class BaseStreamer:
    """What `generate(streamer=...)` calls: `put` with the prompt, `put` with each step's tokens, then `end`.

    Attributes:
        row_aware: whether `put` also takes `live=` and `mask=` (see `TextStreamer.put`). A streamer of your own that
            has `put(value)` alone leaves it `False` and is called as transformers calls it.
    """

    row_aware: ClassVar[bool] = False

    def put(self, value: Any) -> None:
        """Receive tokens: first the prompt `[rows, len]`, then per step `[rows]`, on the CPU."""
        raise NotImplementedError

    def end(self) -> None:
        """The stream is complete."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """Generation stopped with `error`, and neither `put` nor `end` will be called any more.

        The error is raised in the thread that generates in any case. A streamer with a reader elsewhere hands it on
        there.
        """


class TextStreamer(BaseStreamer):
    """Prints text to stdout as it is generated, each piece as soon as no further token can change it.

    The printed text is `tokenizer.decode` of the tokens, whole: nothing is lost or altered where pieces meet. (Where
    transformers' streamer waits for the end of a word, this one does not; the joined text is the same.)

    With several rows, they are printed one below the other in order, each behind `[row] `: the first row that is not
    finished is printed live, those below it wait and appear as soon as all above are complete.

    A subclass may override `on_finalized_text` (one row), as in transformers, and `on_finalized_rows` (several rows).

    Args:
        tokenizer: An unspool or transformers tokenizer.
        skip_prompt: Leave the prompt out.
        decode_kwargs: Passed to `tokenizer.decode`: `skip_special_tokens`, `clean_up_tokenization_spaces`, ...
    """

    row_aware: ClassVar[bool] = True

    def __init__(self, tokenizer: Decoder, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self.next_tokens_are_prompt = True
        self._rows: Rows | None = None
        self._waiting: list[str] = []  # printing several rows: what is not printed yet
        self._current = -1  # the row being printed; -1 before the first piece

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "put" in cls.__dict__:  # an override written for transformers takes the tokens only
            parameters = inspect.signature(cls.__dict__["put"]).parameters
            cls.row_aware = "live" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def put(self, value: Any, *, live: Sequence[bool] | None = None, mask: Any = None) -> None:
        """Receive tokens and give out the text that became final.

        Args:
            value: The prompt `[rows, len]` in the first call; then the tokens of a step, `[rows]` or `[rows, new]`.
            live: For a step, whether each row is still being generated; tokens of the others are ignored.
            mask: For the prompt, `[rows, len]` with 1 at real tokens; the others are ignored. Without it, leading pad
                tokens of a batch are ignored.

        Raises:
            ValueError: The number of rows differs from that of the first call.
        """
        ids, has_rows = as_rows(value)
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if self._rows is None:
            self._rows = Rows(self.tokenizer, len(ids), self.decode_kwargs)
        rows = self._rows
        if not has_rows and len(rows) > 1:
            ids = [[token] for token in ids[0]]
        if len(ids) != len(rows):
            raise ValueError(
                f"value has {len(ids)} rows, but this stream began with {len(rows)}; call end() before another stream"
            )
        if not is_prompt:
            self._give(rows.step(ids, live))
        elif not self.skip_prompt:
            self._give(rows.prompt(ids, mask))

    def end(self) -> None:
        """Give out the text held back, end the line, and be ready for another stream."""
        rows, self._rows = self._rows, None
        self.next_tokens_are_prompt = True
        rest = rows.finish() if rows is not None else [""]
        if len(rest) == 1:
            self.on_finalized_text(rest[0], stream_end=True)
        else:
            self.on_finalized_rows(rest, [True] * len(rest), stream_end=True)

    def fail(self, error: BaseException) -> None:
        """Give out the text there is and end the line; the error itself is raised where `generate` was called."""
        self.end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with the new text of a single row, `""` where there is none yet; prints it.

        Args:
            text: The new piece.
            stream_end: Whether it is the last one; ends the line.
        """
        print(text, flush=True, end="\n" if stream_end else "")

    def on_finalized_rows(self, texts: list[str], finished: list[bool], stream_end: bool = False) -> None:
        """Called instead of `on_finalized_text` when the stream has several rows; prints the rows in order.

        Args:
            texts: The new piece of each row, `""` where there is none.
            finished: Which rows are complete.
            stream_end: Whether these are the last pieces.
        """
        if self._current < 0:
            self._current, self._waiting = 0, [f"[{row}] " for row in range(len(texts))]
        self._waiting = [before + text for before, text in zip(self._waiting, texts, strict=True)]
        while self._current < len(texts):
            row = self._current
            print(self._waiting[row], flush=True, end="\n" if finished[row] else "")
            self._waiting[row] = ""
            if not finished[row]:
                break
            self._current += 1
        if stream_end:
            self._current = -1

    def _give(self, texts: list[str]) -> None:
        if len(texts) == 1:
            self.on_finalized_text(texts[0])
        else:
            assert self._rows is not None
            self.on_finalized_rows(texts, [not is_open for is_open in self._rows.open])
