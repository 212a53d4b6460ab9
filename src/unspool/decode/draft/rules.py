"""How many tokens to draft."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from unspool.config import GenerationConfig
from unspool.decode.sequence import Sequence

# Tokens, drafts included, that one step on a CPU checks at most.
_CHECKED = 32


@dataclass(frozen=True, slots=True)
class DraftRules:
    """What bounds a draft.

    Attributes:
        tokens: most tokens of a draft, at the start.
        schedule: `"constant"` keeps that number; `"heuristic"` adds 2 after a draft that was right in full and takes 1
            after any other (`"heuristic_transient"` is the same here, where nothing is kept from call to call).
        confidence: a draft ends with the first token that the draft model gives less probability; 0 never does. Drafts
            of several rows on a CPU are no longer than what it gives that probability as a whole.
        eos: end tokens; a draft ends with one.
        fixed: the caller named the number of tokens, so it holds for any number of rows.
    """

    tokens: int
    schedule: str = "constant"
    confidence: float = 0.0
    eos: frozenset[int] = frozenset()
    fixed: bool = False

    def share(self, rows: int) -> int | float:
        """Most tokens of each draft where `rows` are checked in one step on a CPU.

        There a step's time grows with its tokens, so that long drafts of many rows cost more than the steps they spare.
        """
        return math.inf if self.fixed else max(1, _CHECKED // max(1, rows) - 1)


class Pace:
    """How many tokens to draft for one row, by how its last draft fared."""

    def __init__(self, rules: DraftRules) -> None:
        self._adapts = rules.schedule != "constant"
        self._tokens = rules.tokens
        self._known = 0
        self._drafted = 0

    def next(self, row: Sequence) -> int:
        """Most tokens for the draft that is about to be made."""
        if self._adapts and self._drafted:
            right = len(row.tokens) - self._known - 1
            self._tokens = self._tokens + 2 if right >= self._drafted else max(1, self._tokens - 1)
        self._known, self._drafted = len(row.tokens), 0
        return self._tokens

    def made(self, tokens: int) -> None:
        """Tell how many were drafted."""
        self._drafted = tokens


def draft_setting(config: GenerationConfig, assistant: GenerationConfig, name: str) -> Any:
    """A setting of drafts: what the caller set, else what the assistant's own settings say, else the default."""
    own = getattr(assistant, name, None)
    return own if own is not None and not _by_caller(config, name) else getattr(config, name)


def _by_caller(config: GenerationConfig, name: str) -> bool:
    return (config._sources or {}).get(name) in ("call", "object")


def draft_rules(config: GenerationConfig, assistant: GenerationConfig, eos: frozenset[int]) -> DraftRules:
    """How much to draft; see `draft_setting`."""
    return DraftRules(
        tokens=int(draft_setting(config, assistant, "num_assistant_tokens")),
        schedule=str(draft_setting(config, assistant, "num_assistant_tokens_schedule")),
        confidence=float(draft_setting(config, assistant, "assistant_confidence_threshold") or 0.0),
        eos=eos,
        fixed=_by_caller(config, "num_assistant_tokens"),
    )
