"""What there is to see of an output, as plain data: rows, their tokens, and trees of beams. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log
from typing import NamedTuple


class Alternative(NamedTuple):
    """A token that might have been chosen.

    Attributes:
        text: how it reads by itself.
        p: its probability by the distribution that was chosen from; 0 if it was masked out.
        own: its probability by the model's logits; `None` where those were not kept.
    """

    text: str
    p: float
    own: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token.

    Attributes:
        text: what it adds to the row's text.
        name: how it reads by itself.
        id: the token.
        p: its probability by the distribution it was chosen from; `None` where nothing was kept that says so.
        own: its probability by the model's logits, before processors, likewise.
        rank: 1 for the likeliest token of the step, likewise.
        allowed: how many tokens could be chosen, likewise.
        others: the likeliest tokens, itself among them or not, likeliest first; then those of the model's favourites
            that were masked out.
        drafted: it was drafted, and accepted.
        refused: tokens that were drafted for this place and those after it, and refused.
    """

    text: str
    name: str
    id: int
    p: float | None = None
    own: float | None = None
    rank: int | None = None
    allowed: int | None = None
    others: tuple[Alternative, ...] = ()
    drafted: bool = False
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One output.

    Attributes:
        prompt: text of its prompt, without padding.
        steps: its new tokens.
        finish: why it ended: `"stop"`, `"length"`, or `None` where the output does not say.
        score: its score among the beams, or `None`.
        drafted, accepted, rounds: draft tokens, those that were accepted, and drafts; `None` without drafts.
    """

    prompt: str
    steps: tuple[Step, ...]
    finish: str | None = None
    score: float | None = None
    drafted: int | None = None
    accepted: int | None = None
    rounds: int | None = None

    @property
    def mean_probability(self) -> float | None:
        """Geometric mean of the tokens' probabilities; `None` where one is unknown or 0."""
        chances = [step.p for step in self.steps]
        if not chances or not all(chances):
            return None
        return exp(sum(log(p) for p in chances if p) / len(chances))


@dataclass(slots=True)
class Node:
    """A token of a tree of beams.

    Attributes:
        step: when it was chosen, from 0.
        parent: place of the node before it, -1 for the first.
        text: how it reads by itself.
        p: its probability by the distribution it was chosen from, or `None`.
        total: sum of the scores up to it, or `None`.
        fate: `"went on"`, `"pruned"` (no beam goes on from it), `"returned"` (an output ends here), or `"left"` (it
            still ran when the search ended).
        until: the step in which it was pruned.
        outputs: rows of the report that end here.
        wins: whether a returned output goes through it.
        lane: line of the drawing that it stands on; no two nodes of one step share one.
    """

    step: int
    parent: int
    text: str
    p: float | None = None
    total: float | None = None
    fate: str = "went on"
    until: int | None = None
    outputs: list[int] = field(default_factory=list)
    wins: bool = False
    lane: int = 0


@dataclass(frozen=True, slots=True)
class Tree:
    """The beams of one prompt (of one group, with groups), parents before children.

    Attributes:
        nodes: in the order in which they were found.
        chains: the drawing's lines: places of nodes that follow each other, each line leaving an earlier one.
        lanes: how many lines stand side by side at most.
        whole: all beams were recorded, and not only those that were returned.
    """

    nodes: list[Node]
    chains: list[list[int]]
    lanes: int
    whole: bool

    @property
    def best(self) -> int:
        """The report's row that the first line leads to, the first one where it leads to none."""
        return min(self.nodes[self.chains[0][-1]].outputs, default=0)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything there is to see.

    Attributes:
        rows: the outputs.
        trees: of the beams.
        vocab: number of tokens that scores are for, or `None`.
        acceptance_rate: accepted over drafted tokens, or `None`.
        notes: what could not be shown, and what would have to be recorded for it.
    """

    rows: tuple[Row, ...]
    trees: tuple[Tree, ...]
    vocab: int | None
    acceptance_rate: float | None
    notes: tuple[str, ...]
