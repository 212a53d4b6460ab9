"""Log-probabilities of a prompt's own tokens, told while the prompt is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from unspool.continuous.apart import Apart
from unspool.decode.invariant import head_of
from unspool.decode.sequence import Want, Watch, Work
from unspool.decode.tops import told_logprobs

__all__ = ["PromptLogprobs"]

_PIECE = 128  # positions whose logits are there at a time


class PromptLogprobs:
    """Reads from the last hidden states what the model says of each next token of the prompt; see `Watch`.

    Args:
        apart: the request.
        inner: another watch of its group, or `None`.
    """

    def __init__(self, apart: Apart, inner: Watch | None) -> None:
        self._apart = apart
        self._inner = inner
        self._model = apart.native("prompt_logprobs")
        self._layer = self._model.spec.layers
        self._told = apart.prompt_told

    @property
    def want(self) -> Want:
        """See `Watch`: nothing more once the whole prompt has been told of."""
        wanted = Want() if self._inner is None else self._inner.want
        return wanted | Want(layers=frozenset((self._layer,))) if self._more else wanted

    @property
    def _more(self) -> bool:
        """Whether there is anything left to tell."""
        return len(self._told) < len(self._apart.wishes.prompt) - 1

    def __call__(self, work: list[Work], weights: list[list[Tensor]], hidden: list[Tensor]) -> None:
        """See `Watch`."""
        if self._inner is not None:
            self._inner(work, weights, hidden)
        place = 0
        for item in work:
            if item.seq.row == 0 and self._more:
                begin = item.seq.computed - item.feed
                self._read(hidden[self._layer][place : place + item.feed], begin)
            place += item.feed

    def _read(self, hidden: Tensor, begin: int) -> None:
        """Tell of the tokens after positions from `begin` on, as far as nobody has."""
        prompt, wishes = self._apart.wishes.prompt, self._apart.wishes
        while begin <= len(self._told) < min(begin + len(hidden), len(prompt) - 1):
            first = len(self._told) - begin
            part = hidden[first : min(first + _PIECE, len(prompt) - 1 - begin)]
            following = prompt[len(self._told) + 1 : len(self._told) + 1 + len(part)]
            logits = head_of(self._model, part).float()
            numbers = [wishes.prompt_logprobs or 0] * len(part)
            self._told += told_logprobs(logits, torch.tensor(following, device=logits.device), numbers)
