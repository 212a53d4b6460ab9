"""How long a call's rows may and must become.

transformers' rules: `max_new_tokens` wins over `max_length` wherever each comes from; nothing set means 20 new tokens,
within the model's positions; lengths count padded columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unspool.config.fields import GenerationFields
from unspool.config.notice import warn_once
from unspool.config.ranges import Check, check_number
from unspool.config.resolve import Resolved

__all__ = ["Lengths", "effective_lengths", "end_tokens"]

_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class Lengths:
    """The limits of a call, in columns of the padded rectangle."""

    prompt: int
    """Columns of the prompt."""
    max_length: int
    """A row ends when it has this many columns."""
    min_length: int
    """No end-of-sequence token while a row has fewer."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens a row can gain, at least 1."""
        return self.max_length - self.prompt


def effective_lengths(
    resolved: Resolved,
    prompt_length: int,
    *,
    max_positions: int | None = None,
    beyond: Literal["refuse", "warn", "allow"] = "warn",
    embeds_length: int = 0,
) -> Lengths:
    """Work out the limits of a call.

    Args:
        resolved: The call's settings.
        prompt_length: Columns of the prompt's token ids, padding included; 0 when the prompt is embeddings only.
        max_positions: Positions the model was made for; `None` when it has no such limit.
        beyond: What to do when rows may pass them. `"refuse"`: error, for models that have no further positions
            (learned embeddings); `"warn"`: the prompt must fit, longer outputs are mentioned once; `"allow"`: go on
            silently, for rope scalings made for it.
        embeds_length: Columns of a prompt given as embeddings, when these are not counted in `prompt_length`; they
            count for an explicit `max_length` and `min_length`.

    Raises:
        ValueError: a limit leaves no room for a token, or the model has no such positions.
        TypeError: a length is no int.
    """
    check_number("prompt_length", prompt_length, Check(int, 0))
    columns = prompt_length + embeds_length
    if max_positions is not None and beyond != "allow" and columns > max_positions:
        raise ValueError(f"the prompt has {columns} tokens and the model {max_positions} positions; shorten the prompt")
    # a default length stays within the positions, unless the prompt already is past them and may be
    within = None if beyond == "allow" and max_positions is not None and columns >= max_positions else max_positions
    max_length = _max_length(resolved, prompt_length, within, embeds_length)
    min_length = _min_length(resolved, prompt_length, embeds_length)
    if max_length > _LONGEST:
        raise ValueError(f"{_cause(resolved)} asks for rows of {max_length} tokens; the most is {_LONGEST}")
    if max_length <= prompt_length:
        raise ValueError(
            f"the prompt has {columns} tokens and max_length is {max_length + embeds_length}, which leaves no room for "
            "a new one; raise max_length or, better, set max_new_tokens"
        )
    # the last token of a row is never fed back, so it needs no position
    fed = max_length + embeds_length - 1
    if max_positions is not None and fed > max_positions and beyond != "allow":
        text = (
            f"{_cause(resolved)} lets rows of {columns} tokens grow to {fed + 1}, past the model's {max_positions} "
            "positions"
        )
        if beyond == "refuse":
            raise ValueError(f"{text}; lower it to at most {max_positions + 1 - columns} new tokens")
        if resolved.caller_set("max_new_tokens") or resolved.caller_set("max_length"):
            warn_once(f"{text}; the text may get worse there")
    if min_length > max_length and (resolved.caller_set("min_length") or resolved.caller_set("min_new_tokens")):
        warn_once(f"the least length ({min_length}) is above the greatest ({max_length}), at which generation stops")
    return Lengths(prompt_length, max_length, min_length)


def end_tokens(config: GenerationFields) -> list[int]:
    """A configuration's end tokens, as a list."""
    value = config.eos_token_id
    if value is None:
        return []
    return [int(token) for token in value] if isinstance(value, (list, tuple)) else [int(value)]


def _max_length(resolved: Resolved, prompt_length: int, max_positions: int | None, embeds_length: int) -> int:
    config = resolved.config
    assert config.max_length is not None
    if config.max_new_tokens is not None:
        if resolved.caller_set("max_length"):
            warn_once(
                f"max_new_tokens={config.max_new_tokens} wins over max_length={config.max_length}; set only one of them"
            )
        return prompt_length + config.max_new_tokens
    if resolved.sources["max_length"] != "default":
        return config.max_length - embeds_length
    longest = prompt_length + config.max_length
    return longest if max_positions is None else min(longest, max_positions)


def _min_length(resolved: Resolved, prompt_length: int, embeds_length: int) -> int:
    config = resolved.config
    assert config.min_length is not None
    if config.min_new_tokens is not None:
        if resolved.caller_set("min_length"):
            warn_once(
                f"min_new_tokens={config.min_new_tokens} wins over min_length={config.min_length}; set only one of them"
            )
        return prompt_length + config.min_new_tokens
    return max(config.min_length - embeds_length, 0)


def _cause(resolved: Resolved) -> str:
    name = "max_length" if resolved.config.max_new_tokens is None else "max_new_tokens"
    return f"{name}={getattr(resolved.config, name)}"
