"""From a generation config to stopping criteria, in transformers' order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from unspool.stopping.base import CriterionLike, StoppingCriteriaList
from unspool.stopping.criteria import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from unspool.stopping.stop_strings import Decoder, StopStringCriteria

if TYPE_CHECKING:
    from unspool.config import GenerationConfig

logger = logging.getLogger(__name__)


def build_criteria(
    config: GenerationConfig,
    *,
    custom: Sequence[CriterionLike] | None = None,
    tokenizer: Decoder | None = None,
    max_position_embeddings: int | None = None,
    eos_token_id: int | Iterable[int] | Tensor | None = None,
) -> StoppingCriteriaList:
    """The criteria a config asks for, with a caller's own: width, time, stop strings, eos, confidence, the others.

    Args:
        config: resolved settings; `max_length` is the final one.
        custom: the caller's criteria. One of a type that the config asks for too takes its place.
        tokenizer: turns ids into text; needed for `stop_strings` only.
        max_position_embeddings: positions the model was made for.
        eos_token_id: ids that end a row, or None for no such criterion.

    Raises:
        ValueError: `stop_strings` is set and there is no tokenizer, or a setting is out of its range.
    """
    criteria = StoppingCriteriaList()
    if config.max_length is not None:
        criteria.append(MaxLengthCriteria(config.max_length, max_position_embeddings))
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError(
                "`stop_strings` is set, in the call or in the model's generation config, and needs the model's "
                "tokenizer: pass `tokenizer=` to `generate`."
            )
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
    if eos_token_id is not None:
        criteria.append(EosTokenCriteria(eos_token_id))
    threshold = config.assistant_confidence_threshold
    if config.is_assistant and threshold is not None and threshold > 0:
        if not (config.output_scores and config.return_dict_in_generate):
            raise ValueError(
                f"is_assistant=True ends rows at tokens below assistant_confidence_threshold={threshold}, which needs "
                "output_scores=True and return_dict_in_generate=True; set these, or leave it out"
            )
        criteria.append(ConfidenceCriteria(threshold))
    return _merge(criteria, custom or ())


def _merge(configured: StoppingCriteriaList, custom: Sequence[CriterionLike]) -> StoppingCriteriaList:
    """Configured criteria, each replaced by the caller's of its kind; then the caller's others."""
    merged = StoppingCriteriaList()
    for criterion in configured:
        own = next((candidate for candidate in custom if is_kind(candidate, type(criterion))), None)
        if own is not None:
            logger.warning(
                "The given %s replaces the one that the generation settings ask for.", type(criterion).__name__
            )
        merged.append(criterion if own is None else own)
    merged += [candidate for candidate in custom if all(candidate is not present for present in merged)]
    return merged


def is_kind(candidate: object, kind: type) -> bool:
    """Whether a criterion is of this class, or of transformers' class of the same name."""
    given = type(candidate)
    return given is kind or (given.__name__ == kind.__name__ and given.__module__.startswith("transformers."))
