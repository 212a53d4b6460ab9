"""From what a request asks for to the home of its rows: a place among the plain ones, or a group of its own."""

from __future__ import annotations

from collections.abc import Callable

from unspool.config import GenerationMode
from unspool.continuous.apart import Apart
from unspool.continuous.beams import set_up_beams
from unspool.continuous.prompts import PromptLogprobs
from unspool.continuous.requests import Wishes
from unspool.continuous.texts import set_up_contrastive, set_up_dola, set_up_text
from unspool.decode.choose.guided import guided_group
from unspool.decode.opened import Opener
from unspool.decode.runner import Decoder
from unspool.decode.sequence import Group, Sequence

__all__ = ["BEAMS", "rows_in_step", "set_apart", "stands_apart", "stored_at_worst"]

BEAMS = frozenset(
    (
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.GROUP_BEAM_SEARCH,
        GenerationMode.CONSTRAINED_BEAM_SEARCH,
    )
)
_PLAIN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_SET_UP: dict[GenerationMode, Callable[[Apart], Group]] = {
    **dict.fromkeys(BEAMS, set_up_beams),
    **dict.fromkeys(_PLAIN, set_up_text),
    GenerationMode.ASSISTED_GENERATION: set_up_text,
    GenerationMode.CONTRASTIVE_SEARCH: set_up_contrastive,
    GenerationMode.DOLA_GENERATION: set_up_dola,
}


def stands_apart(wishes: Wishes) -> bool:
    """Whether a request needs a group of its own; others are decided together, as columns."""
    plain = wishes.mode in _PLAIN and wishes.negative is None and wishes.prompt_logprobs is None
    return not plain or True in wishes.keeps


def rows_in_step(wishes: Wishes) -> int:
    """Rows of a request that are decided together."""
    return _own_rows(wishes) * (1 if wishes.negative is None else 2)


def stored_at_worst(wishes: Wishes, size: int, *, sharing: bool) -> list[tuple[int, int, int]]:
    """Tokens that a request must have room for, in blocks of `size`: `(tokens, rows, shared)` as `Room.holds` takes it.

    Args:
        sharing: whether rows find what others have stored of the same tokens; see `Room`.
    """
    rows, parts = _own_rows(wishes), []
    for prompt in (wishes.prompt, wishes.negative):
        if prompt is None:
            continue
        most = len(prompt) + wishes.limits.max_columns - len(wishes.prompt)
        shared = len(prompt)  # no more, and rows that are computed again not even that
        if wishes.mode is GenerationMode.CONTRASTIVE_SEARCH:
            shared = (-(-most // size) - 2) * size  # rows differ in their newest token
        parts.append((most, rows, max(0, shared) if sharing else 0))
    return parts


def _own_rows(wishes: Wishes) -> int:
    """Rows that have the request's own prompt."""
    if wishes.mode in BEAMS:
        return int(wishes.config.num_beams or 1)
    return int(wishes.config.top_k or 1) if wishes.mode is GenerationMode.CONTRASTIVE_SEARCH else 1


def set_apart(model: Decoder | Opener, wishes: Wishes, find_fault: Callable[[Sequence], str]) -> Apart:
    """The home of a request that `stands_apart`.

    Raises:
        ValueError, Unsupported: settings that only the mode itself can judge.
    """
    apart = Apart(model, wishes, find_fault)
    group = _SET_UP[wishes.mode](apart)
    if wishes.prompt_logprobs is not None:
        group.watch = PromptLogprobs(apart, group.watch)
    if wishes.negative is not None:
        assert apart.guidance is not None
        group = guided_group(
            group,
            apart.guidance,
            [wishes.negative] * len(group.rows),
            steps=wishes.limits.max_columns - len(wishes.prompt),
            positions=apart.positions,
            recompute_past=model.spec.recompute_past,
        )
    apart.group = group
    return apart
