"""Beams in a static call: the chooser made from settings, the sink for its choices, and the output object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.decode.choose.beam_rules import Beams, beam_chooser
from unspool.decode.runner import Runner
from unspool.decode.sequence import Choice, Group, Sequence
from unspool.generate.call import Call, Setup
from unspool.generate.outputs import BeamStep, GenerateBeamDecoderOnlyOutput
from unspool.generate.recorder import Kept, refuse_nothing
from unspool.generate.sampling import as_tuple
from unspool.generate.stream import Stream
from unspool.generate.tracing import DraftTracer, Tracer
from unspool.stopping import Limits


def set_up_beams(call: Call) -> Setup:
    """`num_beams` rows for each prompt, decided together."""
    rows = call.rows()
    chooser = _chooser(call)
    sink = BeamRecorder(chooser, call.kept, call.stream, call.backend.fault)
    group = Group(rows, chooser, sink, twins=call.twins(rows), watch=call.tracer)

    def result(runner: Runner) -> Tensor | GenerateBeamDecoderOnlyOutput:
        prompts, number = call.prompts.rectangle[:: call.copies], int(call.config.num_return_sequences or 1)
        if call.detailed:
            return beam_output(chooser, prompts, number, call.limits, call.kept, call.tracer)
        return beam_sequences(chooser, prompts, number)

    return Setup(group, result, forks=True, in_step=True, keep_finished=call.every_row, gives_past=False)


def _chooser(call: Call) -> Beams:
    """The chooser that the settings ask for."""
    return beam_chooser(
        call.config,
        call.limits,
        call.prompts.rectangle,
        call.prompts.tokens,
        processors=call.processors,
        noise=call.noise(),
        filler=call.filler,
        vocab=call.backend.vocab,
        every_row=call.every_row,
        scores=call.kept.scores,
        keep_scores=call.kept.needs_scores,
        keep_logits=call.kept.logits is not None,
    )


@dataclass(slots=True, eq=False)
class BeamRecorder:
    """The sink of a static group of beams (see `decode.sequence.Sink`).

    Attributes:
        chooser: knows which outputs are still possible.
        kept: scores and logits.
        stream: the streamer's entrance, a row for each prompt, or `None`.
        find_fault: names the first layer whose output is not finite for a row, for the error message.
    """

    chooser: Beams
    kept: Kept
    stream: Stream | None
    find_fault: Callable[[Sequence], str]
    _sent: list[int] = field(init=False)
    _ended: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self._sent = [0] * len(self.chooser.places)
        self._ended = [False] * len(self.chooser.places)

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Append, end rows, stream; raises `NonFiniteLogits` for a row without a choice."""
        assert choice.ended is not None
        for row, token, ended in zip(rows, tokens, choice.ended.tolist(), strict=True):
            if token < 0:
                refuse_nothing(row, self.find_fault)
            row.tokens.append(token)
            if ended:
                row.finish = "stop"
        self.kept.add(choice, rows, [])
        if self.stream is not None:
            self._put(self.stream, rows)

    def _put(self, stream: Stream, rows: list[Sequence]) -> None:
        """Stream what has become certain of each prompt's best output."""
        news: list[list[int]] = [[] for _ in self._sent]
        for place, row in enumerate(rows[:: self.chooser.rules.beams]):
            prompt = self.chooser.places[place]
            self._ended[prompt] = row.finish is not None
            agreed = self.chooser.agreed(place, self._sent[prompt], self._ended[prompt])
            news[prompt] = [token for token, _ in agreed]
            self._sent[prompt] += len(news[prompt])
        stream.news(news, self._ended, self.chooser.rules.filler)


def beam_sequences(chooser: Beams, prompts: Tensor, number: int) -> Tensor:
    """`[prompts * number, columns]`: the `number` best outputs of each prompt, after it."""
    tokens = chooser.best(number).tokens.flatten(0, 1)
    return torch.cat([prompts.repeat_interleave(number, dim=0), tokens], dim=1)


def beam_output(
    chooser: Beams, prompts: Tensor, number: int, limits: Limits, kept: Kept, tracer: Tracer | DraftTracer | None
) -> GenerateBeamDecoderOnlyOutput:
    """Everything that was recorded, for the `number` best outputs of each prompt."""
    best = chooser.best(number)
    lengths = (best.origins >= 0).sum(dim=-1).flatten().tolist()
    outputs = best.tokens.flatten(0, 1).tolist()
    full = limits.max_columns - prompts.shape[1]
    reasons = [
        "length" if length == full and tokens[length - 1] not in limits.eos else "stop"
        for tokens, length in zip(outputs, lengths, strict=True)
    ]
    tops, chances = None, None
    if kept.tops is not None:
        tops, chances = kept.tops.of_beams(best.tokens.flatten(0, 1), best.origins.flatten(0, 1))
    return GenerateBeamDecoderOnlyOutput(
        sequences=beam_sequences(chooser, prompts, number),
        sequences_scores=best.scores.flatten().clone() if kept.scores is not None else None,
        scores=as_tuple(kept.scores),
        logits=as_tuple(kept.logits),
        beam_indices=best.origins.flatten(0, 1).clone(),
        attentions=as_tuple(tracer.attentions) if tracer else None,
        hidden_states=as_tuple(tracer.hidden_states) if tracer else None,
        finish_reasons=reasons,
        top_logprobs=tops,
        token_logprobs=chances,
        beam_steps=None
        if kept.beams is None
        else [_step(*made) for made in kept.beams[: full - 1]],  # none runs on from the last
    )


def _step(rows: list[int], parents: Tensor, tokens: Tensor) -> BeamStep:
    return BeamStep(rows, [rows[place] for place in parents.tolist()], tokens.tolist())
