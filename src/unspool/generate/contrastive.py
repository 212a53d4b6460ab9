"""Contrastive search in a static call: its group, and what is to be handed back."""

from __future__ import annotations

from torch import Tensor

from unspool.decode.choose.contrastive import contrastive_group
from unspool.decode.choose.sample import Rectangle
from unspool.decode.runner import Runner
from unspool.decode.sequence import Sequence
from unspool.generate.call import Call, Setup
from unspool.generate.outputs import GenerateDecoderOnlyOutput
from unspool.generate.recorder import Recorder, refuse_nothing
from unspool.generate.sampling import sampled_output, sequences


def set_up_contrastive(call: Call) -> Setup:
    """`top_k` rows for each prompt, which try its next tokens."""
    layer = call.backend.exits().layers
    candidates, texts = int(call.config.top_k or 0), call.rows()
    if call.past is not None:
        raise ValueError(
            "contrastive search (penalty_alpha) compares with the hidden states of the whole prompt, which "
            "past_key_values does not hold; leave it out"
        )
    history = Rectangle(call.prompts.rectangle, call.limits.max_columns, call.filler)

    def refuse(text: Sequence) -> None:
        refuse_nothing(text, call.backend.fault)

    group = contrastive_group(
        texts,
        Recorder(texts, history, call.limits, call.stream, call.kept, call.every_row, call.backend.fault),
        history,
        call.processors,
        refuse,
        candidates=candidates,
        alpha=float(call.config.penalty_alpha or 0.0),
        layer=layer,
        vocab=call.backend.vocab,
        keep_finished=call.every_row,
        watch=call.tracer,
        keep_scores=call.kept.needs_scores,
        keep_logits=call.kept.logits is not None,
    )
    rows = group.rows
    group.twins = call.twins(rows, candidates)

    def result(runner: Runner) -> Tensor | GenerateDecoderOnlyOutput:
        if not call.detailed:
            return sequences(call, texts)
        stored = rows[::candidates]
        for row in stored:
            runner.rewind(row, row.computed - 1)  # the newest token is not stored after any other call either
        return sampled_output(call, texts, runner, stored)

    return Setup(
        group,
        result,
        forks=True,
        in_step=True,
        keep_finished=call.every_row,
        candidates=candidates,
        ahead=1,
    )
