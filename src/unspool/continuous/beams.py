"""Beam search and beam sampling of one request: a group of its own, whose rows are decided together."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from unspool.continuous.requests import RequestState, Wishes
from unspool.decode.choose.beam_rules import beam_chooser, beam_filler
from unspool.decode.choose.sample import SeededNoise
from unspool.decode.runner import Decoder
from unspool.decode.sequence import Choice, Group, Sequence
from unspool.errors import NonFiniteLogits

__all__ = ["BeamRows"]


class BeamRows:
    """Home and sink of one request's beams; see `requests.Home` and `decode.sequence.Sink`.

    Args:
        model: for its device and vocabulary.
        prompt: the request's.
        wishes: what it asks for.
        find_fault: names the first layer whose output is not finite for a row, for the error message.
    """

    def __init__(
        self, model: Decoder, prompt: list[int], wishes: Wishes, find_fault: Callable[[Sequence], str]
    ) -> None:
        config, device = wishes.config, model.device
        beams = int(config.num_beams or 1)
        tokens = [list(prompt) for _ in range(beams)]
        self._chooser = beam_chooser(
            config,
            wishes.limits,
            torch.tensor(tokens, device=device),
            tokens,
            processors=wishes.processors,
            noise=SeededNoise(wishes.seed, beams, device) if config.do_sample else None,
            filler=beam_filler(config, sorted(wishes.limits.eos)),
            vocab=model.spec.vocab_size,
        )
        self._most = wishes.limits.max_columns - len(prompt)
        self._find_fault = find_fault
        rows = [Sequence(i, row, adapter=wishes.adapter) for i, row in enumerate(tokens)]
        self.group = Group(rows, self._chooser, self)
        self.states: list[RequestState] = []
        """The request, and its other outputs, best first; each with the rows or without any."""

    def enter(self, state: RequestState) -> None:
        """See `Home`."""

    def leave(self, state: RequestState) -> None:
        """See `Home`."""

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """See `Sink`."""
        assert choice.ended is not None
        main = self.states[0]
        for row, token, ended in zip(rows, tokens, choice.ended.tolist(), strict=True):
            if token < 0:
                text = f"no token can be chosen at position {len(row.tokens)}; {self._find_fault(row)}"
                main.end("error", error=NonFiniteLogits(text, request_id=main.request_id))
                return
            row.tokens.append(token)
            if ended:
                row.finish = "stop"
        over = rows[0].finish is not None
        assert main.made is not None
        news = self._chooser.agreed(0, len(main.made), over)
        main.made += news
        now = time.perf_counter()
        if main.first_token is None:
            main.first_token = now
        if main.wishes.record_timestamps:
            main.timestamps += [now] * len(news)
        if over:
            self._finish()

    def _finish(self) -> None:
        """Give the best outputs to the request, one each."""
        best = self._chooser.best(len(self.states))
        scores: list[float] = best.scores[0].tolist()
        lengths: list[int] = (best.origins[0] >= 0).sum(dim=-1).tolist()
        outputs: list[list[int]] = best.tokens[0].tolist()
        for state, output, length, score in zip(self.states, outputs, lengths, scores, strict=True):
            made = output[:length]
            state.made, state.score = made, score
            last = made[-1] if made else None
            if last in state.wishes.limits.eos:
                state.end("stop", stop=last)
            elif length == self._most:
                state.end("length")
            else:
                state.end("stop", stop="criterion")
