"""Beams in a static call: the chooser made from settings, the sink for its choices, and the output object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.config import GenerationConfig
from unspool.decode.choose.beam import BeamChooser, BeamRules, Ends
from unspool.decode.choose.constraints import Progress, read_constraints
from unspool.decode.choose.groups import GroupBeamChooser
from unspool.decode.runner import Runner
from unspool.decode.sequence import Choice, Group, Sequence
from unspool.generate.call import Call, Setup
from unspool.generate.outputs import GenerateBeamDecoderOnlyOutput
from unspool.generate.recorder import Kept, Tracer, refuse_nothing
from unspool.generate.stream import Stream
from unspool.stopping import Limits

Beams = BeamChooser | GroupBeamChooser


def beam_filler(config: GenerationConfig, eos: list[int]) -> int:
    """What follows the end of a finished beam. As in transformers, 0 as pad counts as none, but not for groups."""
    pad = config.pad_token_id
    if _grouped(config) and pad is not None:
        return int(pad)
    return (pad or eos[0]) if eos else -1


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

    return Setup(group, result, forks=True, in_step=True, keep_finished=call.every_row)


def _grouped(config: GenerationConfig) -> bool:
    """Whether rows are decided as transformers 4 did, which knew groups and constraints."""
    constrained = config.constraints is not None or config.force_words_ids is not None
    return constrained or (config.num_beam_groups or 1) > 1


def _chooser(call: Call) -> Beams:
    """The chooser that the settings ask for."""
    config, limits, kept = call.config, call.limits, call.kept
    groups = config.num_beam_groups or 1
    eos = config.eos_token_id
    ends = list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    longest = config.max_length if config.max_length is not None else limits.max_columns
    rules = BeamRules(
        beams=call.copies,
        candidates=max(2, 1 + len(ends)) * (call.copies // groups),
        length_penalty=1.0 if config.length_penalty is None else float(config.length_penalty),
        early_stopping=config.early_stopping or False,
        max_new=int(longest) - call.prompts.rectangle.shape[1],
        filler=call.filler,
    )
    tokens = torch.tensor(sorted(limits.eos), dtype=torch.int64, device=call.backend.device)
    end = Ends(tokens, limits.max_columns, limits.criteria, kept.scores)
    keep = {"keep_scores": kept.needs_scores, "keep_logits": kept.logits is not None}
    processors = call.processors or None
    if not _grouped(config):
        together = call.every_row or not limits.criteria.row_independent
        return BeamChooser(call.prompts.rectangle, processors, call.noise(), rules, end, together=together, **keep)
    return GroupBeamChooser(
        call.prompts.rectangle,
        processors,
        rules,
        end,
        groups=groups,
        close=(ends or sorted(limits.eos) or [-1])[0],
        progress=_progress(call),
        together=call.every_row,
        number=int(config.num_return_sequences or 1),
        **keep,
    )


def _progress(call: Call) -> Progress | None:
    """What constraints there are, and how far the prompts have come with them."""
    config = call.config
    if config.constraints is None and config.force_words_ids is None:
        return None
    constraints = read_constraints(config.constraints, config.force_words_ids, call.backend.vocab)
    return Progress(constraints, call.prompts.tokens[:: call.copies], call.copies)


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
            news[prompt] = self.chooser.agreed(place, self._sent[prompt], self._ended[prompt])
            self._sent[prompt] += len(news[prompt])
        stream.news(news, self._ended, self.chooser.rules.filler)


def beam_sequences(chooser: Beams, prompts: Tensor, number: int) -> Tensor:
    """`[prompts * number, columns]`: the `number` best outputs of each prompt, after it."""
    tokens = chooser.best(number).tokens.flatten(0, 1)
    return torch.cat([prompts.repeat_interleave(number, dim=0), tokens], dim=1)


def beam_output(
    chooser: Beams, prompts: Tensor, number: int, limits: Limits, kept: Kept, tracer: Tracer | None
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
        scores=None if kept.scores is None else tuple(kept.scores),
        logits=None if kept.logits is None else tuple(kept.logits),
        beam_indices=best.origins.flatten(0, 1).clone(),
        attentions=None if tracer is None or tracer.attentions is None else tuple(tracer.attentions),
        hidden_states=None if tracer is None or tracer.hidden_states is None else tuple(tracer.hidden_states),
        finish_reasons=reasons,
        top_logprobs=tops,
        token_logprobs=chances,
    )
