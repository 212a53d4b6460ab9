"""The criterion interface and the list that asks every criterion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CriterionLike = Callable[..., Any]
"""Anything that may stand in a `StoppingCriteriaList`: ours, transformers' or a plain function."""

Scores = tuple[Tensor, ...] | None
"""Processed scores of the steps so far, each `[rows, vocab]`, or None when they are not kept."""


class StoppingCriteria:
    """Base class of everything that ends rows. Subclass it and define `__call__`.

    Attributes:
        row_independent: the answer for a row depends on that row alone, so finished rows may leave the batch. The
            value here is the careful one, right for any criterion of a user.
    """

    row_independent: bool = False

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        """Return which rows are done, `[rows]` bool; `input_ids` is `[rows, width]` with the newest token last."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores, **kwargs)")


class StoppingCriteriaList(list[CriterionLike]):
    """Criteria of which any one ends a row; an ordinary list besides.

    Source: `StoppingCriteriaList` of transformers.
    """

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        """Ask every criterion and return which rows are done, `[rows]` bool.

        A criterion may answer for all rows with one bool.
        """
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            try:
                answer = criterion(input_ids, scores, **kwargs)
            except Exception as error:
                if scores is None:
                    error.add_note(
                        "scores reach stopping criteria with return_dict_in_generate=True and output_scores=True only"
                    )
                raise
            done = done | _checked(criterion, answer, input_ids.shape[0])
        return done

    @property
    def row_independent(self) -> bool:
        """Every criterion judges rows one by one, so finished rows may leave the batch."""
        return all(getattr(criterion, "row_independent", False) for criterion in self)

    @property
    def max_length(self) -> int | None:
        """The first `max_length` of a criterion, or None when the width is not limited."""
        limits = (getattr(criterion, "max_length", None) for criterion in self)
        return next((limit for limit in limits if limit is not None), None)


def _checked(criterion: CriterionLike, answer: Any, rows: int) -> Tensor | bool:
    """What a criterion answered, if it is one bool or one for each row."""
    if isinstance(answer, Tensor) and answer.shape in ((rows,), (1,), ()):
        return answer
    if isinstance(answer, bool) or (not isinstance(answer, Tensor) and getattr(answer, "ndim", None) == 0):
        return bool(answer)  # NumPy's too
    name = getattr(criterion, "__name__", type(criterion).__name__)
    found = f"a tensor of shape {list(answer.shape)}" if isinstance(answer, Tensor) else repr(answer)
    kind = ValueError if isinstance(answer, Tensor) else TypeError
    raise kind(f"the stopping criterion {name} returned {found}; it must return a bool, or a tensor of {rows} bools")
