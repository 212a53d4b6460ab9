"""Greedy decoding and sampling in a static call: rows that are decided one by one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from unspool.decode.choose.sample import Rectangle, SampleChooser
from unspool.decode.runner import Runner
from unspool.decode.sequence import Group, Sequence
from unspool.generate.call import Call, Setup
from unspool.generate.outputs import GenerateDecoderOnlyOutput
from unspool.generate.recorder import Recorder

T = TypeVar("T")


def set_up_sampling(call: Call) -> Setup:
    """A row for each output."""
    rows = call.rows()
    history = Rectangle(call.prompts.rectangle, call.limits.max_columns, call.filler)
    chooser = SampleChooser(
        history,
        call.processors or None,
        call.noise(),
        keep_scores=call.kept.needs_scores,
        keep_logits=call.kept.logits is not None,
    )
    sink = Recorder(rows, history, call.limits, call.stream, call.kept, call.every_row, call.backend.fault)
    group = Group(rows, chooser, sink, twins=call.twins(rows), watch=call.tracer)

    def result(runner: Runner) -> Tensor | GenerateDecoderOnlyOutput:
        return sampled_output(call, rows, runner) if call.detailed else sequences(call, rows)

    return Setup(group, result, forks=False, in_step=bool(call.limits.criteria), keep_finished=call.every_row)


def sequences(call: Call, rows: list[Sequence]) -> Tensor:
    """The rectangle with every row's output to the right of it."""
    prompts = call.prompts
    news = [row.tokens[len(tokens) :] for row, tokens in zip(rows, prompts.tokens, strict=True)]
    width = max(map(len, news))
    rectangle = prompts.rectangle
    filled = [new + [call.filler] * (width - len(new)) for new in news]
    return torch.cat([rectangle, torch.tensor(filled, dtype=torch.int64, device=rectangle.device)], dim=1)


def sampled_output(
    call: Call, rows: list[Sequence], runner: Runner, stored: list[Sequence] | None = None
) -> GenerateDecoderOnlyOutput:
    """Everything that was recorded of the rows, whose keys and values are those of the rows `stored`, if not theirs."""
    made = sequences(call, rows)
    tracer = call.tracer
    tops, chances = (None, None) if call.kept.tops is None else call.kept.tops.result()
    return GenerateDecoderOnlyOutput(
        sequences=made,
        scores=as_tuple(call.kept.scores),
        logits=as_tuple(call.kept.logits),
        attentions=as_tuple(tracer.attentions) if tracer else None,
        hidden_states=as_tuple(tracer.hidden_states) if tracer else None,
        past_key_values=call.backend.past(stored or rows, runner, made.shape[1] - 1) if call.config.use_cache else None,
        finish_reasons=[row.finish or "length" for row in rows],
        top_logprobs=tops,
        token_logprobs=chances,
    )


def as_tuple(items: list[T] | None) -> tuple[T, ...] | None:
    """What was collected, for an output; `None` stays."""
    return None if items is None else tuple(items)
