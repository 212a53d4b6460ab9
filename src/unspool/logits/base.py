"""The processor interface, the list that runs processors in order, and the token ids they write to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

ProcessorLike = Callable[..., Tensor]
"""Anything that may stand in a `LogitsProcessorList`: ours, transformers' or a plain function."""


class LogitsProcessor:
    """Base class of everything that changes next-token scores.

    Subclass it and define `__call__`. The class attributes tell the decoding core what a processor needs; the
    values here are the careful ones, right for any processor of a user.

    Attributes:
        reads_history: the contents of `input_ids` matter, not only its shape.
        reads_width: how many columns `input_ids` has matters. Without, and without `reads_history`, it may have none.
        row_independent: the result of a row depends on that row alone, so finished rows may leave the batch. One that
            must know which rows are left has a method `on_rows(input_ids, scores, rows)`, called in place of itself.
    """

    reads_history: bool = True
    reads_width: bool = True
    row_independent: bool = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the processed scores `[rows, vocab]`; `input_ids` is `[rows, width]`, `scores` is left unchanged."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores)")


class LogitsProcessorList(list[ProcessorLike]):
    """Processors applied one after the other; an ordinary list besides.

    Source: `LogitsProcessorList` of transformers.
    """

    def __init__(self, processors: Iterable[ProcessorLike] = ()) -> None:
        super().__init__(processors)
        self._signatures: dict[type, tuple[dict[str, bool], bool]] = {}

    def on_rows(self, input_ids: Tensor, scores: Tensor, rows: Tensor, **kwargs: Any) -> Tensor:
        """Run every processor on the rows numbered `rows` `[rows]` of a batch; `kwargs` as in a call."""
        for processor in self:
            some = getattr(processor, "on_rows", None)
            if some is None:
                scores = self._run(processor, input_ids, scores, kwargs)
            else:
                scores = some(input_ids, scores, rows)
        return scores

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Run every processor on `scores` `[rows, vocab]` and return the last result.

        Args:
            input_ids: tokens so far, `[rows, width]`.
            scores: next-token scores, `[rows, vocab]`.
            kwargs: extra arguments, handed to the processors whose `__call__` names them (or takes `**kwargs`).

        Raises:
            ValueError: a processor requires an argument that is not in `kwargs`.
        """
        for processor in self:
            scores = self._run(processor, input_ids, scores, kwargs)
        return scores

    def _run(self, processor: ProcessorLike, input_ids: Tensor, scores: Tensor, kwargs: dict[str, Any]) -> Tensor:
        names, takes_any = self._extra_arguments(processor)
        if names or takes_any:
            made = processor(input_ids, scores, **_select(processor, names, takes_any, kwargs))
        else:
            made = processor(input_ids, scores)
        # guidance makes one row of two
        if not isinstance(made, Tensor) or made.shape[1:] != scores.shape[1:]:
            _refuse_result(processor, made, scores)
        return made

    @property
    def row_independent(self) -> bool:
        """Every processor treats rows one by one, so finished rows may leave the batch."""
        return all(getattr(processor, "row_independent", False) for processor in self)

    @property
    def reads_history(self) -> bool:
        """Some processor needs the contents of `input_ids`, not only its shape."""
        return any(getattr(processor, "reads_history", True) for processor in self)

    @property
    def reads_width(self) -> bool:
        """Some processor needs the shape of `input_ids`, or its contents."""
        return self.reads_history or any(getattr(processor, "reads_width", True) for processor in self)

    def _extra_arguments(self, processor: ProcessorLike) -> tuple[dict[str, bool], bool]:
        """Arguments after `(input_ids, scores)` as `{name: required}`, and whether any name is taken. Read once."""
        kind = type(processor)
        if kind not in self._signatures:
            call: Any = processor
            parameters = list(inspect.signature(call.__call__).parameters.values())
            named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            # A plain function shows as (*args, **kwargs): it gets the two tensors and nothing else.
            takes_any = len(parameters) > 2 and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
            extra = {p.name: p.default is p.empty for p in parameters[2:] if p.kind in named}
            self._signatures[kind] = (extra, takes_any)
        return self._signatures[kind]


def _refuse_result(processor: ProcessorLike, made: object, scores: Tensor) -> NoReturn:
    name = getattr(processor, "__name__", type(processor).__name__)
    found = f"scores of shape {list(made.shape)}" if isinstance(made, Tensor) else repr(made)
    kind = ValueError if isinstance(made, Tensor) else TypeError
    raise kind(f"the logits processor {name} returned {found}; it must return scores of shape {list(scores.shape)}")


def _select(
    processor: ProcessorLike, names: dict[str, bool], takes_any: bool, kwargs: dict[str, Any]
) -> dict[str, Any]:
    missing = [name for name, required in names.items() if required and name not in kwargs]
    if missing:
        raise ValueError(
            f"{type(processor).__name__} needs the argument(s) {', '.join(missing)}; pass them to the processor list "
            "by keyword."
        )
    return kwargs if takes_any else {name: value for name, value in kwargs.items() if name in names}


class TokenIds:
    """Token ids a processor writes to, as an index made once for each vocabulary width and device.

    Ids outside the vocabulary are left out, so one set serves models whose heads differ in width.
    """

    __slots__ = ("_index", "ids")

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = tuple(int(token) for token in ids)
        self._index: tuple[int, torch.device, Tensor] | None = None

    def index(self, scores: Tensor) -> Tensor:
        """The ids that exist in `scores` `[rows, vocab]`, as a 1-d index on its device."""
        vocab, device = scores.shape[-1], scores.device
        known = self._index
        if known is None or known[0] != vocab or known[1] != device:
            inside = [token for token in self.ids if 0 <= token < vocab]
            known = self._index = (vocab, device, torch.tensor(inside, dtype=torch.long, device=device))
        return known[2]


def token_tensor(name: str, value: int | Iterable[int] | Tensor, device: str | torch.device | None = None) -> Tensor:
    """One id, several ids or a tensor of ids as a 1-d integer tensor.

    Raises:
        ValueError: the ids are not integers; `name` is the argument blamed.
    """
    if isinstance(value, Tensor):
        ids = value.reshape(-1)
    else:
        ids = torch.tensor(list(value) if isinstance(value, Iterable) else [value], device=device)
    if (ids.is_floating_point() and ids.numel()) or ids.dtype is torch.bool:
        raise ValueError(f"`{name}` has to be a token id or a list of token ids (integers), but is {value}.")
    return ids.to(torch.long)


def check_count(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`; `name` is the argument blamed."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "strictly positive" if least == 1 else "non-negative"
        raise ValueError(f"`{name}` has to be a {kind} integer, but is {value!r}.")


def check_positive(name: str, value: object, advice: str = "") -> float:
    """`value` as a float if it is a number above zero, else ValueError; `name` is the argument blamed."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"`{name}` has to be a strictly positive number, but is {value!r}.{advice}")
    return float(value)
