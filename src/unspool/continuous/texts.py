"""Requests decided by themselves that make one text: guided, drafted, DoLa and contrastive search, and plain ones."""

from __future__ import annotations

import time

import torch

from unspool.config import GenerationMode
from unspool.continuous.apart import Apart
from unspool.continuous.drafted import drafter_of
from unspool.continuous.plain import log_probabilities
from unspool.decode.choose.contrastive import contrastive_group
from unspool.decode.choose.dola import DolaChooser, early_layers
from unspool.decode.choose.ragged import Columns, RaggedChooser
from unspool.decode.choose.sample import Rectangle
from unspool.decode.draft.model import ModelDrafter
from unspool.decode.sequence import Choice, Group, Sequence
from unspool.logits import LogitsProcessorList
from unspool.logits.dola import DolaLogitsProcessor

__all__ = ["set_up_contrastive", "set_up_dola", "set_up_text"]


class TextSink:
    """Takes the tokens of a request's text, any number in a step; see `decode.sequence.Sink`."""

    def __init__(self, apart: Apart, columns: Columns) -> None:
        self._apart = apart
        self._columns = columns

    def room(self, row: Sequence) -> int:
        """Most tokens the text may still get."""
        return self._apart.wishes.limits.max_columns - len(row.tokens)

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Append the tokens until the text ends."""
        (row,), state, wishes = rows, self._apart.states[0], self._apart.wishes
        draft, row.draft = row.draft, []
        known, now = len(row.tokens), time.perf_counter()
        for token in tokens:
            if token < 0:
                self._apart.fail(row)
                break
            row.tokens.append(token)
            if self._ends(row, token):
                break
        taken = len(row.tokens) - known
        state.drafted += len(draft)
        state.accepted += min(taken, len(tokens) - 1)
        if state.first_token is None:
            state.first_token = now
        if state.made is not None:
            state.made += row.tokens[known:]
        if wishes.record_timestamps:
            state.timestamps += [now] * taken
        keeps_scores, keeps_logits = wishes.keeps
        if keeps_scores and choice.scores is not None:
            state.scores += [line.clone() for line in choice.scores[:taken]]
        if keeps_logits and choice.logits is not None:
            state.logits += [line.clone() for line in choice.logits[:taken]]
        if wishes.top_logprobs is not None and choice.scores is not None and taken:
            chosen = torch.tensor(tokens[:taken], device=choice.scores.device)
            for value, best in log_probabilities([wishes] * taken, choice.scores[:taken], chosen):
                state.logprobs.append(value)
                state.top_logprobs.append(best)

    def _ends(self, row: Sequence, token: int) -> bool:
        """Whether the text ends with its newest token, asked as if tokens had come one by one."""
        state, limits = self._apart.states[0], self._apart.wishes.limits
        if token in limits.eos:
            state.end("stop", stop=token)
        elif limits.criteria:
            state.ask(limits.criteria, self._columns.ids(row)[None])
        if state.finish_reason is None and self.room(row) <= 0:
            state.end("length")
        if state.finish_reason is not None:
            row.finish = "length" if state.finish_reason == "length" else "stop"
        return row.finish is not None


def set_up_text(apart: Apart) -> Group:
    """One row, drafted where the settings say so."""
    wishes, rows, drafted = apart.wishes, apart.rows(), apart.wishes.mode is GenerationMode.ASSISTED_GENERATION
    if drafted:  # guidance takes all positions of a draft at once, and drafts are made without
        wishes.processors = LogitsProcessorList(one for one in wishes.processors if one is not apart.guidance)
    columns = Columns(apart.prompt, [len(wishes.prompt)])
    sink, noise = TextSink(apart, columns), apart.noise()
    drafter = drafter_of(apart, rows, sink.room, noise) if drafted else None
    chooser = RaggedChooser(
        columns,
        wishes.processors or None,
        noise,
        guidance=apart.guidance if drafted else None,
        proposals=drafter.proposals if isinstance(drafter, ModelDrafter) else None,
        ensemble=wishes.config.assistant_ensemble_weight if drafted else None,
        keep_scores=wishes.top_logprobs is not None or wishes.keeps[0],
        keep_logits=wishes.keeps[1],
    )
    return Group(rows, chooser, sink, drafter=drafter)


def set_up_dola(apart: Apart) -> Group:
    """One row, with logits of early layers beside its own."""
    model, config = apart.native("dola_layers"), apart.wishes.config
    layers = early_layers(config.dola_layers or "high", model.spec.layers, model.tied)
    contrast = DolaLogitsProcessor()
    apart.wishes.processors.insert(0, contrast)
    group = set_up_text(apart)
    chooser = DolaChooser(group.chooser, contrast, layers, model.lm_head, 1, None)
    group.chooser, group.watch = chooser, chooser
    return group


def set_up_contrastive(apart: Apart) -> Group:
    """A row for each candidate."""
    wishes, texts, config = apart.wishes, apart.rows(), apart.wishes.config
    spec = apart.native("contrastive search (penalty_alpha)").spec
    columns = Columns(apart.prompt, [len(wishes.prompt)])
    return contrastive_group(
        texts,
        TextSink(apart, columns),
        Rectangle(apart.prompt, wishes.limits.max_columns, 0),
        wishes.processors,
        apart.fail,
        candidates=int(config.top_k or 0),
        alpha=float(config.penalty_alpha or 0.0),
        layer=spec.layers,
        vocab=spec.vocab_size,
        keep_scores=wishes.top_logprobs is not None or wishes.keeps[0],
        keep_logits=wishes.keeps[1],
    )
