"""Beam search and beam sampling of one request: rows that are decided together, and outputs that come of them."""

from __future__ import annotations

import time

from unspool.continuous.apart import Apart
from unspool.decode.choose.beam_rules import Beams, beam_chooser, beam_filler
from unspool.decode.sequence import Choice, Group, Sequence
from unspool.decode.tops import Tops

__all__ = ["set_up_beams"]


class BeamSink:
    """Takes the beams' tokens; see `decode.sequence.Sink`.

    Attributes:
        tops: what log-probabilities are told of, or `None`.
    """

    def __init__(self, apart: Apart, chooser: Beams) -> None:
        wishes = apart.wishes
        self._apart = apart
        self._chooser = chooser
        self._most = wishes.limits.max_columns - len(wishes.prompt)
        self._tops = None if wishes.top_logprobs is None else Tops(wishes.top_logprobs, chooser.rules.beams)

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """See `Sink`."""
        assert choice.ended is not None
        main = self._apart.states[0]
        for row, token, ended in zip(rows, tokens, choice.ended.tolist(), strict=True):
            if token < 0:
                self._apart.fail(row)
                return
            row.tokens.append(token)
            if ended:
                row.finish = "stop"
        if self._tops is not None:
            assert choice.scores is not None and choice.candidates is not None
            self._tops.add_candidates([row.row for row in rows], choice.scores, choice.candidates)
        over = rows[0].finish is not None
        assert main.made is not None
        news = self._chooser.agreed(0, len(main.made), over)
        self._tell(news)
        main.made += [token for token, _ in news]
        keeps_scores, keeps_logits = main.wishes.keeps
        if keeps_scores and choice.scores is not None:
            main.scores.append(choice.scores.clone())
        if keeps_logits and choice.logits is not None:
            main.logits.append(choice.logits.clone())
        now = time.perf_counter()
        if main.first_token is None:
            main.first_token = now
        if main.wishes.record_timestamps:
            main.timestamps += [now] * len(news)
        if over:
            self._finish()

    def _tell(self, news: list[tuple[int, int]], place: int = 0) -> None:
        """Note the log-probabilities of an output's next tokens, each with the row that it was chosen for."""
        if self._tops is None:
            return
        state = self._apart.states[place]
        for token, origin in news:
            value, best = self._tops.at(len(state.logprobs), origin, token)
            state.logprobs.append(value)
            state.top_logprobs.append(best)

    def _finish(self) -> None:
        """Give the best outputs to the request, one each."""
        states = self._apart.states
        best = self._chooser.best(len(states))
        scores: list[float] = best.scores[0].tolist()
        every: list[list[int]] = best.tokens[0].tolist()
        origins: list[list[int]] = best.origins[0].tolist()
        closed: list[bool] = [False] * len(states) if best.closed is None else best.closed[0].tolist()
        for place, (state, output, rows, score) in enumerate(zip(states, every, origins, scores, strict=True)):
            length = sum(row >= 0 for row in rows)
            made = output[:length]
            state.made, state.score, state.origins = output[: length + closed[place]], score, rows[:length]
            state.scores, state.logits = states[0].scores, states[0].logits
            state.logprobs, state.top_logprobs = [], []
            self._tell(list(zip(made, rows, strict=False)), place)
            if closed[place] and self._tops is not None:  # a token that nobody chose, as in generate()
                state.logprobs.append(0.0)
                state.top_logprobs.append({})
            last = made[-1] if made else None
            if last in state.wishes.limits.eos:
                state.end("stop", stop=last)
            elif length == self._most:
                state.end("length")
            else:
                state.end("stop", stop="criterion")


def set_up_beams(apart: Apart) -> Group:
    """`num_beams` rows."""
    wishes, config = apart.wishes, apart.wishes.config
    beams = int(config.num_beams or 1)
    rows = apart.rows(beams)
    chooser = beam_chooser(
        config,
        wishes.limits,
        apart.prompt.expand(beams, -1),
        [row.tokens for row in rows],
        processors=wishes.processors,
        noise=apart.noise(beams),
        filler=beam_filler(config, sorted(wishes.limits.eos)),
        vocab=apart.model.spec.vocab_size,
        keep_scores=wishes.top_logprobs is not None or wishes.keeps[0],
        keep_logits=wishes.keeps[1],
    )
    return Group(rows, chooser, BeamSink(apart, chooser))
