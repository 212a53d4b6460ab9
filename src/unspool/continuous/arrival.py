"""From what a request asks for to the states that wait: its outputs, their names, and whether they can ever fit."""

from __future__ import annotations

from typing import Any

from unspool.continuous.engine import Engine
from unspool.continuous.modes import BEAMS, rows_in_step, set_apart, stands_apart, stored_at_worst
from unspool.continuous.plain import PlainRows
from unspool.continuous.requests import RequestState, Wishes
from unspool.decode.opened import Opener
from unspool.decode.runner import Decoder
from unspool.decode.sequence import Sequence

__all__ = ["check_fits", "check_name", "states_of"]

_CHILD = "__child#"


def states_of(
    name: str, number: int, every: list[Wishes], decoder: Decoder | Opener, plain: PlainRows
) -> list[RequestState]:
    """A request's outputs: rows of their own, or one set of beams that several outputs come of.

    Args:
        name: of the request.
        number: its place in the order of arrival.
        every: what it asks for, once for each of its outputs.
        decoder: computes.
        plain: home of greedy and sampled rows.
    """
    states: list[RequestState] = []
    for i, wishes in enumerate(every):
        if not stands_apart(wishes):
            rows = [Sequence(0, list(wishes.prompt), adapter=wishes.adapter, inputs=wishes.inputs)]
            states.append(RequestState(_child(name, i), number, wishes.given, wishes, plain, rows))
            continue
        home = set_apart(decoder, wishes, plain.find_fault)
        outputs = int(wishes.config.num_return_sequences or 1) if wishes.mode in BEAMS else 1
        home.states = [
            RequestState(
                _child(name, i + output),
                number,
                wishes.given,
                wishes,
                home,
                home.group.rows,
                made=None if home.one_text else [],
                leaders=home.leaders,
                prompt_told=home.prompt_told,
                seen=0 if wishes.sees_prompt else None,
            )
            for output in range(outputs)
        ]
        home.states[0].children = home.states[1:]
        states.append(home.states[0])
    return states


def check_fits(wishes: Wishes, engine: Engine) -> None:
    """Raise `ValueError` for a request that is too large for a step or for the store, also alone."""
    rows = rows_in_step(wishes)
    if rows > engine.token_budget:
        raise ValueError(
            f"the request decides {rows} rows together, more than max_batch_tokens={engine.token_budget}, tokens "
            "of a step; lower num_beams (or top_k of contrastive search), or raise it"
        )
    sharing = engine.room.sharing and wishes.inputs is None
    if not engine.room.holds(*stored_at_worst(wishes, engine.room.store.block_size, sharing=sharing)):
        most = wishes.limits.max_columns
        grown = f"{most} in each of {rows} rows" if rows > 1 else f"{most}"
        raise ValueError(
            f"input_ids has {len(wishes.prompt)} tokens and the request may grow to {grown}, but the cache holds "
            f"{engine.room.capacity}; "
            "lower max_new_tokens (or num_beams), or raise num_blocks or max_memory_percent"
        )


def check_name(name: Any) -> None:
    """Raise `TypeError` or `ValueError` for what is no name of a request."""
    if not isinstance(name, str):
        raise TypeError(f"request_id must be a text, not {name!r}")
    if not name or _CHILD in name:
        raise ValueError(f"request_id={name!r} must not be empty, nor hold {_CHILD!r}, which names further outputs")


def _child(name: str, number: int) -> str:
    """What output number `number` of a request is called."""
    return f"{name}{_CHILD}{number - 1}" if number else name
