"""Requests that are decided by themselves: the home of their rows, which are a group of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.continuous.requests import RequestState, Wishes
from unspool.decode.choose.noise import SeededNoise
from unspool.decode.opened import Opener
from unspool.decode.runner import Decoder
from unspool.decode.sequence import Group, Sequence
from unspool.errors import NonFiniteLogits, Unsupported
from unspool.logits.guidance import GuidanceLogitsProcessor
from unspool.models.base import Model

__all__ = ["Apart"]


@dataclass(slots=True, eq=False)
class Apart:
    """Home of one request; see `requests.Home`. What its mode is made from, and then its group.

    Attributes:
        model: computes.
        wishes: what is asked for.
        find_fault: names the first layer whose output is not finite for a row, for the error message.
        group: its rows, how they are decided and where the tokens go. Owner: `modes.set_apart`.
        states: the request, and its other outputs that come of the same rows. Owner: the manager.
        prompt_told: see `RequestState`.
        guidance: among the processors, or `None`.
    """

    model: Decoder | Opener
    wishes: Wishes
    find_fault: Callable[[Sequence], str]
    group: Group = field(init=False)
    states: list[RequestState] = field(default_factory=list)
    prompt_told: list[tuple[float, dict[int, float]]] = field(default_factory=list)

    guidance: GuidanceLogitsProcessor | None = field(init=False)

    def __post_init__(self) -> None:
        found = (one for one in self.wishes.processors if isinstance(one, GuidanceLogitsProcessor))
        self.guidance = next(found, None)

    @property
    def leaders(self) -> list[int]:
        """For each row the number of the first with the same prompt."""
        rows = len(self.group.rows)
        if self.wishes.negative is None:
            return [0] * rows
        return [0] * (rows // 2) + [rows // 2] * (rows // 2)

    @property
    def one_text(self) -> bool:
        """Whether the first row's tokens are the output, rather than what some rows come to."""
        return sum(leader == 0 for leader in self.leaders) == 1

    @property
    def prompt(self) -> Tensor:
        """`[1, tokens]` what processors and criteria see of the prompt."""
        return torch.tensor([self.wishes.prompt], device=self.model.device)

    @property
    def positions(self) -> int | float:
        """Most tokens of a row."""
        spec = self.model.spec
        return spec.max_positions if spec.hard_limit else math.inf

    def native(self, what: str) -> Model:
        """The model, for a mode that looks into its layers; raises `Unsupported` for a module of another library."""
        if not isinstance(self.model, Model):
            raise Unsupported(f"{what} looks into the model's layers, which takes a native model; leave it out")
        return self.model

    def rows(self, number: int = 1) -> list[Sequence]:
        """So many rows that have the prompt."""
        wishes = self.wishes
        return [Sequence(i, list(wishes.prompt), adapter=wishes.adapter, inputs=wishes.inputs) for i in range(number)]

    def noise(self, rows: int = 1) -> SeededNoise | None:
        """Where sampling noise comes from; `None` when nothing is drawn."""
        wishes = self.wishes
        if not wishes.config.do_sample:
            return None
        return SeededNoise(wishes.seed, rows, self.model.device, wishes.sample)

    def fail(self, row: Sequence) -> None:
        """End the request for a row that has no token to choose."""
        state = self.states[0]
        text = f"no token can be chosen at position {len(row.tokens)}; {self.find_fault(row)}"
        state.end("error", error=NonFiniteLogits(text, request_id=state.request_id))

    def enter(self, state: RequestState) -> None:
        """See `Home`."""

    def leave(self, state: RequestState) -> None:
        """See `Home`."""
        for row in state.rows:
            row.draft = []
