"""What unspool found out about a module: in which tier it runs, and why not in a faster one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from unspool.generate.foreign import ForeignSource
from unspool.models.base import Model

__all__ = ["Report", "report_on"]


@dataclass(frozen=True, slots=True)
class Report:
    """How a model is run.

    Attributes:
        model: name of its class.
        tier: `"native"` (a model of unspool's own), `"ragged"` (a module fed true tokens alone, over our paged store)
            or `"rows"` (a module run in its own way: padded rectangles, its own cache and hooks).
        reason: why it is `"rows"`; else `None`.
    """

    model: str
    tier: Literal["native", "ragged", "rows"]
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.model}: {self.tier}" + (f", because {self.reason}" if self.reason else "")


def report_on(module: nn.Module) -> Report:
    """Find out how a module is run; probes it where that was not done yet."""
    name = type(module).__name__
    if isinstance(module, Model):
        return Report(name, "native")
    verdict = ForeignSource(module).verdict()
    return Report(name, "rows" if verdict.shape is None else "ragged", verdict.reason)
