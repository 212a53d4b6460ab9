"""Processors of many rows in one step: each row's own settings as a value in a column.

A request's processors are read once, into steps. Rows whose steps are of the same kinds run them together, with a
number for each row; what no row asks for is not computed. A processor that has no such form stays itself and runs on
its row alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unspool.logits import ops
from unspool.logits.base import ProcessorLike
from unspool.logits.fused import top_k_top_p, top_p
from unspool.logits.length import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor
from unspool.logits.ngram import NoRepeatNGramLogitsProcessor
from unspool.logits.penalties import RepetitionPenaltyLogitsProcessor
from unspool.logits.sanity import LogitNormalization
from unspool.logits.warpers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopKTopPLogitsWarper,
    TopPLogitsWarper,
)

__all__ = ["Column", "as_columns", "run_column"]


class Column(NamedTuple):
    """One step of a row's processing.

    Attributes:
        kind: what is done; rows with equal `(kind, static)` do it together.
        static: what of it is the same for all of them.
        value: the row's own number.
        reads_ids: the row's tokens matter.
    """

    kind: str
    static: Hashable = None
    value: float = 0.0
    reads_ids: bool = False


def as_columns(processors: Iterable[ProcessorLike]) -> tuple[Column, ...] | None:
    """The steps that `processors` come to, or `None` where one of them can only run by itself."""
    steps = [_column(processor) for processor in processors]
    return None if None in steps else tuple(step for step in steps if step is not None)


def _column(processor: ProcessorLike) -> Column | None:
    if getattr(processor, "min_tokens_to_keep", 1) != 1 or getattr(processor, "filter_value", ops.NEG_INF) != (
        ops.NEG_INF
    ):
        return None
    kind = type(processor)  # exactly: a subclass may do anything
    if kind is TemperatureLogitsWarper:
        return Column("temperature", value=processor.temperature)  # type: ignore[attr-defined]
    if kind is TopKTopPLogitsWarper:
        return Column("top_k_top_p", processor.top_k, processor.top_p)  # type: ignore[attr-defined]
    if kind is TopKLogitsWarper:
        return Column("top_k", processor.top_k)  # type: ignore[attr-defined]
    if kind is TopPLogitsWarper:
        return Column("top_p", value=processor.top_p)  # type: ignore[attr-defined]
    if kind is MinPLogitsWarper:
        return Column("min_p", value=processor.min_p)  # type: ignore[attr-defined]
    if kind is LogitNormalization:
        return Column("normalize")
    if kind is RepetitionPenaltyLogitsProcessor and processor.prompt_ignore_length is None:  # type: ignore[attr-defined]
        return Column("repetition", value=processor.penalty, reads_ids=True)  # type: ignore[attr-defined]
    if kind is NoRepeatNGramLogitsProcessor:
        return Column("ngram", processor.ngram_size, reads_ids=True)  # type: ignore[attr-defined]
    if kind is MinLengthLogitsProcessor:
        return Column("floor", _ids(processor.eos_token_id), processor.min_length)  # type: ignore[attr-defined]
    if kind is MinNewTokensLengthLogitsProcessor:
        least = processor.prompt_length_to_skip + processor.min_new_tokens  # type: ignore[attr-defined]
        return Column("floor", _ids(processor.eos_token_id), least)  # type: ignore[attr-defined]
    return None


def _ids(tokens: Tensor) -> tuple[int, ...]:
    return tuple(tokens.tolist())


def run_column(
    kind: str,
    static: Hashable,
    values: Sequence[float],
    scores: Tensor,
    widths: Sequence[int],
    ids: Tensor | None,
) -> Tensor:
    """Run one step on the rows that share it.

    Args:
        kind, static: of their columns.
        values: each row's number.
        scores: `[rows, vocab]`; not changed.
        widths: tokens of each row.
        ids: `[rows, longest]` their tokens, filled up with ids of `vocab` or more; needed by steps that read them.
    """
    if kind == "floor":
        return _floor(static, values, scores, widths)
    number: float | Tensor = values[0]
    if any(value != number for value in values):
        number = torch.tensor(values, dtype=torch.float64, device=scores.device)
    if kind == "temperature":
        return ops.temperature(scores, number)
    if kind == "top_p":
        return top_p(scores, number)
    if kind == "min_p":
        return ops.min_p(scores, number)
    if kind == "normalize":
        return scores.log_softmax(dim=-1)
    if kind == "repetition":
        assert ids is not None
        return ops.repetition_penalty(scores, ids, number)
    assert isinstance(static, int)
    if kind == "top_k":
        return ops.top_k(scores, static)
    if kind == "top_k_top_p":
        return top_k_top_p(scores, static, number)
    assert kind == "ngram" and ids is not None, f"{kind!r} is no kind of step"
    return _ngram(scores, ids, static, widths)


def _floor(banned: Hashable, least: Sequence[float], scores: Tensor, widths: Sequence[int]) -> Tensor:
    """-inf for `banned` tokens of rows that are too short for them."""
    assert isinstance(banned, tuple)
    short = [i for i, (width, most) in enumerate(zip(widths, least, strict=True)) if width < most]
    inside = [token for token in banned if 0 <= token < scores.shape[1]]
    if not short or not inside:
        return scores
    scores = scores.clone()
    rows = torch.tensor(short, device=scores.device)
    scores[rows[:, None], torch.tensor(inside, device=scores.device)] = ops.NEG_INF
    return scores


def _ngram(scores: Tensor, ids: Tensor, size: int, widths: Sequence[int]) -> Tensor:
    """Rows of one length together, since the newest tokens must stand at the end."""
    out = torch.empty_like(scores)
    for width in sorted(set(widths)):
        rows = torch.tensor([i for i, own in enumerate(widths) if own == width], device=scores.device)
        out[rows] = ops.no_repeat_ngram(scores[rows], ids[rows, :width], size)
    return out
