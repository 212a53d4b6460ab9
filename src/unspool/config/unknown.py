"""What to say about arguments that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from unspool.config.fields import FIELDS

__all__ = ["ARGUMENTS", "no_use_for"]

ARGUMENTS = (
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

_ELSEWHERE = {
    "best_of": "num_beams",
    "frequency_penalty": "repetition_penalty",
    "generator": "seed",
    "logprobs": "output_top_logprobs",
    "n": "num_return_sequences",
    "num_samples": "num_return_sequences",
    "presence_penalty": "repetition_penalty",
    "prompt": "input_ids",
    "random_seed": "seed",
    "response_format": "json_schema",
    "stop": "stop_strings",
    "stop_sequences": "stop_strings",
    "top_logprobs": "output_top_logprobs",
}
"""What other libraries call things, and the nearest here."""

_ALIKE = 0.7  # below, names have letters in common rather than a meaning


def no_use_for(who: str, wrong: Iterable[str], known: Iterable[str] = (*FIELDS, *ARGUMENTS)) -> str:
    """`"<who> has no use for: <names>"`, with the nearest names that are known.

    Args:
        who: what was called.
        wrong: names of arguments it does not know.
        known: the names it knows; by default settings and arguments of `generate()`.
    """
    names = sorted(wrong)
    every = sorted(known)
    near = dict.fromkeys(match for name in names if name not in every for match in _nearest(name, every))
    hint = f"did you mean {', '.join(near)}?" if near else "a misspelt setting?"
    if all(name in every for name in names):
        hint = "that is for generate()"
    return f"{who} has no use for: {', '.join(names)} ({hint})"


def _nearest(name: str, known: list[str]) -> list[str]:
    other = _ELSEWHERE.get(name)
    if other in known:
        return [other]
    return get_close_matches(name, known, 1, _ALIKE) or [one for one in known if one.startswith(f"{name}_")][:1]
