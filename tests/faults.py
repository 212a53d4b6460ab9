"""Faults of a caller's own: what processors, criteria, prefix functions and streamers may do amid a call."""

from __future__ import annotations

from typing import Any

import torch


class Refusal(Exception):
    """A fault of the caller's own."""


class Fails:
    """Fails when it is called for the `number`-th time; a processor, a criterion, a streamer, a prefix function."""

    def __init__(self, number: int = 3) -> None:
        self.left = number

    def count(self) -> None:
        self.left -= 1
        if not self.left:
            raise Refusal("no")

    def processor(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count()
        return scores

    def criterion(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        self.count()
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    def prefix(self, row: int, ids: torch.Tensor) -> list[int]:
        self.count()
        return list(range(1, 40))

    def put(self, tokens: torch.Tensor) -> None:
        self.count()

    def end(self) -> None:
        raise AssertionError("the call failed")


def faults() -> list[dict[str, Any]]:
    """One call's argument each."""
    return [
        {"logits_processor": [Fails().processor]},
        {"stopping_criteria": [Fails().criterion]},
        {"prefix_allowed_tokens_fn": Fails().prefix},
        {"streamer": Fails()},
    ]
