"""When a row ends, split into what the core compares as numbers and what must be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unspool.stopping.base import CriterionLike, StoppingCriteriaList
from unspool.stopping.criteria import EosTokenCriteria, MaxLengthCriteria
from unspool.stopping.pipeline import build_criteria, is_kind
from unspool.stopping.stop_strings import Decoder

if TYPE_CHECKING:
    from unspool.config import GenerationConfig

__all__ = ["Limits", "build_limits"]


@dataclass(slots=True)
class Limits:
    """When rows end.

    Attributes:
        eos: end tokens.
        max_columns: width at which every row ends.
        criteria: further ones, asked once a step about all rows; may be empty.
    """

    eos: frozenset[int]
    max_columns: int
    criteria: StoppingCriteriaList


def build_limits(
    config: GenerationConfig,
    *,
    eos: Sequence[int],
    max_positions: int | None,
    custom: Sequence[CriterionLike] | None = None,
    tokenizer: Decoder | None = None,
) -> Limits:
    """The limits of resolved settings and of a caller's own criteria; see `build_criteria`, and for what it raises.

    Args:
        config: resolved settings; `max_length` is the final one.
        eos: the settings' end tokens.
        max_positions: positions the model was made for, or `None`.
    """
    every = build_criteria(config, custom=custom, tokenizer=tokenizer, max_position_embeddings=max_positions)
    return limits_of(every, eos)


def limits_of(criteria: Sequence[CriterionLike], eos: Sequence[int] = ()) -> Limits:
    """Criteria taken apart, transformers' own among them: widths and end tokens as numbers, the others to be asked.

    Args:
        criteria: at least one of them bounds the width.
        eos: further end tokens.
    """
    widths = [int(one.max_length) for one in criteria if is_kind(one, MaxLengthCriteria)]  # type: ignore[attr-defined]
    ends = [one.eos_token_id.tolist() for one in criteria if is_kind(one, EosTokenCriteria)]  # type: ignore[attr-defined]
    asked = [one for one in criteria if not is_kind(one, MaxLengthCriteria) and not is_kind(one, EosTokenCriteria)]
    return Limits(frozenset(eos).union(*ends), min(widths), StoppingCriteriaList(asked))
