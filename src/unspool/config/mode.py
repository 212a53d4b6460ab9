"""The decoding strategies, and which one a set of settings means."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from unspool.config.notice import warn_once

if TYPE_CHECKING:
    from unspool.config.fields import GenerationFields

__all__ = ["GenerationMode", "mode_of"]


class GenerationMode(StrEnum):
    """A decoding strategy. Its value is a plain string."""

    CONTRASTIVE_SEARCH = "contrastive_search"
    """The candidate among the `top_k` that differs most from what the row already says."""
    GREEDY_SEARCH = "greedy_search"
    """The most likely token."""
    SAMPLE = "sample"
    """A token drawn from the distribution."""
    ASSISTED_GENERATION = "assisted_generation"
    """Greedy or sampling, several tokens a step, drafted first and then checked."""
    DOLA_GENERATION = "dola_generation"
    """Greedy or sampling on the contrast between layers."""
    BEAM_SEARCH = "beam_search"
    """The most likely sequences found with `num_beams` rows for each prompt."""
    BEAM_SAMPLE = "beam_sample"
    """Beam search whose candidates are drawn."""
    CONSTRAINED_BEAM_SEARCH = "constrained_beam_search"
    """Beam search whose output must contain given words."""
    GROUP_BEAM_SEARCH = "group_beam_search"
    """Beam search in groups that are pushed apart."""


def mode_of(settings: GenerationFields, assisted: bool) -> GenerationMode:
    """The strategy that `settings` mean; unset fields count as off.

    Args:
        settings: Any configuration, resolved or not.
        assisted: Whether the call brings a draft model.
    """
    mode = _base_mode(settings)
    drafts = (
        assisted
        or bool(settings.use_mtp)
        or settings.prompt_lookup_num_tokens is not None
        or settings.assistant_early_exit is not None
    )
    simple = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    for wanted, result in (
        (drafts, GenerationMode.ASSISTED_GENERATION),
        (settings.dola_layers is not None, GenerationMode.DOLA_GENERATION),
    ):
        if wanted and simple:
            mode, simple = result, False
        elif wanted:
            warn_once(f"{result} works with greedy search and sampling only; this call is {mode}, so it is left out")
    return mode


def _base_mode(settings: GenerationFields) -> GenerationMode:
    if settings.constraints is not None or settings.force_words_ids is not None:
        return GenerationMode.CONSTRAINED_BEAM_SEARCH
    sampling = settings.do_sample is True
    if (settings.num_beams or 1) > 1:
        if (settings.num_beam_groups or 1) > 1:
            return GenerationMode.GROUP_BEAM_SEARCH
        return GenerationMode.BEAM_SAMPLE if sampling else GenerationMode.BEAM_SEARCH
    if sampling:
        return GenerationMode.SAMPLE
    if (settings.top_k or 0) > 1 and (settings.penalty_alpha or 0) > 0:
        return GenerationMode.CONTRASTIVE_SEARCH
    return GenerationMode.GREEDY_SEARCH
