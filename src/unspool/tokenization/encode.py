"""Encoding with the `tokenizers` library without touching its settings, so that threads can share one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tokenizers
from tokenizers import processors

from unspool.tokenization.encoding import PadSide

__all__ = ["Encoder", "Truncation", "truncation_of"]

_STRATEGIES = ("longest_first", "only_first", "only_second")


class Truncation(NamedTuple):
    """How long texts are cut."""

    strategy: str | None  # one of _STRATEGIES; `None` cuts nothing
    limit: int  # tokens, special ones included
    side: PadSide  # where tokens are dropped


def truncation_of(
    truncation: bool | str | None, max_length: int | None, padding: bool, model_max_length: int
) -> tuple[str | None, int]:
    """The strategy and the limit that the arguments of a call mean.

    Raises:
        ValueError: `truncation` or `max_length` has a value it cannot have.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    if truncation is None:
        truncation = max_length is not None and not padding
    if truncation is True:
        truncation = "longest_first"
    if truncation in (False, "do_not_truncate"):
        return None, 0
    if truncation not in _STRATEGIES:
        raise ValueError(f"truncation is {truncation!r}; it can be True, False or one of {', '.join(_STRATEGIES)}")
    return str(truncation), model_max_length if max_length is None else max_length


class Encoder:
    """Text to encodings.

    Args:
        backend: the tokenizer, with neither padding nor truncation set.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def surround(self, before: str | None, after: str | None) -> None:
        """Put these tokens around each text from now on, instead of what the tokenizer's file says.

        Args:
            before: token at the start, `None` for none.
            after: token at the end, `None` for none.
        """
        tokens = [token for token in (before, after) if token is not None]
        single = [f"{before}:0"] * (before is not None) + ["$A:0"] + [f"{after}:0"] * (after is not None)
        second = [f"{before}:1"] * (before is not None) + ["$B:1"] + [f"{after}:1"] * (after is not None)
        self._backend.post_processor = processors.TemplateProcessing(
            single=" ".join(single),
            pair=" ".join(single + second),
            special_tokens=[(token, self._backend.token_to_id(token)) for token in dict.fromkeys(tokens)],
        )

    def __call__(
        self,
        text: str | Sequence[str],
        pair: str | Sequence[str] | None,
        add_special_tokens: bool,
        truncation: Truncation,
    ) -> tuple[list[tokenizers.Encoding], bool]:
        """Encode one text or several.

        Returns:
            One encoding per text, and whether there were several.

        Raises:
            TypeError: something is not a text.
            ValueError: the numbers of texts differ, a text holds half a surrogate pair, or the limit leaves no room.
        """
        batched = not isinstance(text, str)
        firsts = _texts("text", text)
        seconds = None if pair is None else _texts("text_pair", pair)
        if seconds is not None and (len(firsts) != len(seconds) or batched == isinstance(pair, str)):
            raise ValueError(f"text has {len(firsts)} texts and text_pair {len(seconds)}; each needs its own")
        if truncation.strategy is not None:
            return self._cut(firsts, seconds, add_special_tokens, truncation), batched
        if len(firsts) == 1:  # without waking the library's threads
            second = None if seconds is None else seconds[0]
            return [self._backend.encode(firsts[0], second, add_special_tokens=add_special_tokens)], batched
        inputs = firsts if seconds is None else list(zip(firsts, seconds, strict=True))
        return self._backend.encode_batch_fast(inputs, add_special_tokens=add_special_tokens), batched

    def _cut(
        self, firsts: list[str], seconds: list[str] | None, add_special_tokens: bool, truncation: Truncation
    ) -> list[tokenizers.Encoding]:
        backend = self._backend
        added = backend.num_special_tokens_to_add(seconds is not None) if add_special_tokens else 0
        room = truncation.limit - added
        if room < 0:
            raise ValueError(f"max_length is {truncation.limit}, but the special tokens alone are {added}; raise it")
        bodies = backend.encode_batch_fast(firsts, add_special_tokens=False)
        others = None if seconds is None else backend.encode_batch_fast(seconds, add_special_tokens=False)
        results = []
        for row, body in enumerate(bodies):
            other = None if others is None else others[row]
            sizes = _sizes(len(body.ids), None if other is None else len(other.ids), room, truncation.strategy)
            for encoding, size in zip((body, other), sizes, strict=True):
                if encoding is not None and len(encoding.ids) > size:
                    encoding.truncate(size, direction=truncation.side)
            results.append(backend.post_process(body, other, add_special_tokens))
        return results


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a str or a list of them")
    texts = [value] if isinstance(value, str) else list(value)
    if not texts:
        raise ValueError(f"{name} is empty; pass at least one text")
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{at}] is a {type(text).__name__}; it must be a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{at}] holds half a surrogate pair at character {error.start}, which is no text; "
                "replace it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from error
    return texts


def _sizes(first: int, second: int | None, room: int, strategy: str | None) -> tuple[int, int]:
    """The lengths to cut a pair to, so that together they fit into `room` tokens."""
    if first + (second or 0) <= room:
        return first, second or 0
    if second is None:
        if strategy == "only_second":
            raise ValueError("truncation is 'only_second', but there is no text_pair")
        return room, 0
    if strategy == "longest_first":
        short, long = sorted((first, second))
        long = short if short > room else max(short, room - short)
        if short + long > room:
            short = room // 2
            long = short + room % 2
        return (short, long) if first <= second else (long, short)
    kept = second if strategy == "only_first" else first
    if room - kept < 1:
        raise ValueError(
            f"truncation is {strategy!r}, but the other text alone has {kept} tokens of max_length's {room}"
        )
    return (room - kept, kept) if strategy == "only_first" else (kept, room - kept)
