"""The arguments of a call that are objects of the caller's, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Items
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PrefixFn = Callable[[int, Tensor], list[int]]


@dataclass(slots=True)
class Given:
    """See `GenerationMixin.generate`.

    Raises:
        TypeError: one of them cannot be called as it will be.
    """

    logits_processor: Items[Any] | None
    stopping_criteria: Items[Any] | None
    prefix_allowed_tokens_fn: PrefixFn | None
    assistant: Any
    streamer: Any
    negative_ids: Tensor | None
    negative_mask: Tensor | None

    def __post_init__(self) -> None:
        _check_list("logits_processor", self.logits_processor, "processor(input_ids, scores)")
        _check_list("stopping_criteria", self.stopping_criteria, "criterion(input_ids, scores)")
        function = self.prefix_allowed_tokens_fn
        if function is not None and not callable(function):
            raise TypeError(
                f"prefix_allowed_tokens_fn must be a function (row, tokens so far) -> allowed ids, not {function!r}"
            )
        if self.streamer is not None and not all(callable(getattr(self.streamer, n, None)) for n in ("put", "end")):
            raise TypeError(f"streamer must have the methods put(tokens) and end(), which {self.streamer!r} has not")


def _check_list(name: str, value: Any, kind: str) -> None:
    if value is None:
        return
    if not isinstance(value, Iterable):
        hint = f"; pass {name}=[...] with it inside" if callable(value) else ""
        raise TypeError(f"{name} must be a list of callables {kind}, not {value!r}{hint}")
    wrong = next((one for one in value if not callable(one)), None)
    if wrong is not None:
        raise TypeError(f"{name} holds {wrong!r}, which cannot be called as {kind}")
