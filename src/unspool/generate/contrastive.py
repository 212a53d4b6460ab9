"""Contrastive search in a static call: rows for the candidates, the chooser, and the sink that feeds them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from unspool.decode.choose.contrastive import ContrastiveChooser
from unspool.decode.choose.sample import Rectangle
from unspool.decode.runner import Runner
from unspool.decode.sequence import Choice, Group, Sequence
from unspool.generate.call import Call, Setup
from unspool.generate.outputs import GenerateDecoderOnlyOutput
from unspool.generate.recorder import Recorder, refuse_nothing
from unspool.generate.sampling import sampled_output, sequences
from unspool.logits.guidance import GuidanceLogitsProcessor


@dataclass(slots=True, eq=False)
class CandidateSink:
    """Makes candidates what their rows are fed next (see `decode.sequence.Sink`).

    Attributes:
        texts: a row for each prompt, which has ended when its candidates' rows have.
        candidates: rows of each.
        find_fault: names the first layer whose output is not finite for a row, for the error message.
    """

    texts: list[Sequence]
    candidates: int
    find_fault: Callable[[Sequence], str]

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Append, and end rows with their texts; raises `NonFiniteLogits` for a text without a candidate."""
        for row, token in zip(rows, tokens, strict=True):
            text = self.texts[row.row // self.candidates]
            row.finish = text.finish
            if token < 0 and text.finish is None:
                refuse_nothing(text, self.find_fault)
            row.tokens.append(max(0, token))  # rows that ended may be fed on


def set_up_contrastive(call: Call) -> Setup:
    """`top_k` rows for each prompt, which try its next tokens."""
    layer = call.backend.exits().layers
    candidates, texts = int(call.config.top_k or 0), call.rows()
    if candidates > call.backend.vocab:
        raise ValueError(f"top_k={candidates} asks for more candidates than the {call.backend.vocab} tokens there are")
    if call.past is not None:
        raise ValueError(
            "contrastive search (penalty_alpha) compares with the hidden states of the whole prompt, which "
            "past_key_values does not hold; leave it out"
        )
    rows = [
        Sequence(text.row * candidates + i, list(text.tokens), embeds=text.embeds, adapter=text.adapter)
        for text in texts
        for i in range(candidates)
    ]
    history = Rectangle(call.prompts.rectangle, call.limits.max_columns, call.filler)
    chooser = ContrastiveChooser(
        texts,
        Recorder(texts, history, call.limits, call.stream, call.kept, call.every_row, call.backend.fault),
        history,
        call.processors or None,
        candidates=candidates,
        alpha=float(call.config.penalty_alpha or 0.0),
        layer=layer,
        keep_finished=call.every_row,
        guidance=next((one for one in call.processors if isinstance(one, GuidanceLogitsProcessor)), None),
        watch=call.tracer,
        keep_scores=call.kept.needs_scores,
        keep_logits=call.kept.logits is not None,
    )
    sink = CandidateSink(texts, candidates, call.backend.fault)
    group = Group(rows, chooser, sink, twins=call.twins(rows, candidates), watch=chooser)

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
