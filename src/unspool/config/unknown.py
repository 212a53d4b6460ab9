"""What to say about arguments that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from unspool.config.fields import FIELDS

__all__ = ["no_use_for"]

_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "past_key_values",
    "tokenizer",
    "logits_processor",
    "stopping_criteria",
    "streamer",
    "assistant_model",
    "negative_prompt_ids",
)


def no_use_for(who: str, wrong: Iterable[str], known: Iterable[str] = (*FIELDS, *_ARGUMENTS)) -> str:
    """`"<who> has no use for: <names>"`, with the nearest names that are known.

    Args:
        who: what was called.
        wrong: names of arguments it does not know.
        known: the names it knows; by default settings and arguments of `generate()`.
    """
    names = sorted(wrong)
    every = sorted(known)
    near = dict.fromkeys(match for name in names for match in get_close_matches(name, every, 1))
    hint = f"did you mean {', '.join(near)}?" if near else "a misspelt setting?"
    return f"{who} has no use for: {', '.join(names)} ({hint})"
