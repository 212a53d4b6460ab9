"""One static call: the core's objects put together for rows that start together, run, and taken apart again."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unspool.cache import PagedStore, PastKeyValues
from unspool.cache.past import PastRow
from unspool.config import GenerationConfig
from unspool.decode.choose.sample import GlobalNoise, Noise, Rectangle, SampleChooser, SeededNoise
from unspool.decode.loop import Loop
from unspool.decode.plan import StaticScheduler
from unspool.decode.sequence import Group, Sequence
from unspool.generate.fault import find_fault
from unspool.generate.inputs import Prompts
from unspool.generate.outputs import GenerateDecoderOnlyOutput
from unspool.generate.recorder import Kept, Limits, Recorder, Stream, Tracer
from unspool.logits import LogitsProcessorList
from unspool.models.base import Model

T = TypeVar("T")

# New tokens a store has room for at first; it doubles when they are used up, so that a generous limit costs nothing.
_FIRST_ROOM = 1024
# Prompt tokens computed in one step when the caller names no chunk: enough to keep matrix products at full speed, few
# enough to bound activations.
_PROMPT_BUDGET = {"cpu": 2048}
_PROMPT_BUDGET_ELSEWHERE = 8192


@dataclass(slots=True)
class StaticCall:
    """Everything a greedy or sampling call needs, settled.

    Attributes:
        model: native model.
        config: resolved settings.
        prompts: one entry per row to generate; rows made by `num_return_sequences` stand side by side.
        copies: how many rows share each prompt (`num_return_sequences`).
        processors: logits processors in order.
        limits: when rows end.
        filler: token in the columns of rows that ended.
        stream: the streamer's entrance, or `None`.
        past: stored keys and values of an earlier call, or `None`.
        foreign: processors or criteria of the caller's own take part.
    """

    model: Model
    config: GenerationConfig
    prompts: Prompts
    copies: int
    processors: LogitsProcessorList
    limits: Limits
    filler: int
    stream: Stream | None
    past: PastKeyValues | None
    foreign: bool

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate: `[rows, columns]` ids, or the output object when `return_dict_in_generate` is set."""
        config = self.config
        detailed = bool(config.return_dict_in_generate)
        keep = Kept(
            scores=[] if detailed and config.output_scores else None,
            logits=[] if detailed and config.output_logits else None,
        )
        attentions, hidden = detailed and config.output_attentions, detailed and config.output_hidden_states
        tracer = None
        if attentions or hidden:
            tracer = Tracer(len(self.prompts.tokens), bool(attentions), bool(hidden))
        every_row = tracer is not None or keep.scores is not None or keep.logits is not None
        every_row |= not self.processors.row_independent
        rows = [Sequence(number, list(tokens)) for number, tokens in enumerate(self.prompts.tokens)]
        history = Rectangle(self.prompts.rectangle, self.limits.max_columns, self.filler)
        recorder = Recorder(rows, history, self.limits, self.stream, keep, every_row, self._fault)
        chooser = SampleChooser(
            history,
            self.processors or None,
            self._noise(len(rows)),
            keep_scores=keep.scores is not None,
            keep_logits=keep.logits is not None,
        )
        group = Group(rows, chooser, recorder)
        store = self._store(rows)
        twins = [rows[i - i % self.copies] for i in range(len(rows))] if self.copies > 1 and tracer is None else None
        scheduler = StaticScheduler(
            group,
            store,
            steps=self.limits.max_columns - history.width,
            chunk=self._chunk(rows),
            leaders=rows[:: self.copies] if twins else None,
            recompute_past=self.model.spec.recompute_past,
            keep_finished=every_row,
            keep_stored=detailed,
        )
        loop = Loop(
            self.model,
            store,
            group,
            scheduler,
            device=self.model.device,
            twins=twins,
            in_step=every_row or bool(self.limits.criteria) or self.model.spec.recompute_past is not None,
            watch=tracer,
        )
        with self._mode(every_row or detailed):
            loop.run()
        return self._output(rows, store, keep, tracer) if detailed else self._sequences(rows)

    def _mode(self, kept: bool) -> AbstractContextManager[Any]:
        """Inference mode, unless its tensors would reach the caller, who may want to compute with them."""
        return torch.no_grad() if kept or self.foreign else torch.inference_mode()

    def _noise(self, rows: int) -> Noise | None:
        if not self.config.do_sample:
            return None
        if self.config.seed is not None:
            return SeededNoise(self.config.seed, self.copies, self.model.device)
        return GlobalNoise(rows, self.model.device)

    def _fault(self, row: Sequence) -> str:
        return find_fault(self.model, row)

    def _store(self, rows: list[Sequence]) -> PagedStore:
        """A store for exactly these rows, longest first, with what an earlier call already computed."""
        new = self.limits.max_columns - self.prompts.rectangle.shape[1]
        room = max(len(row.tokens) for row in rows) + min(new, _FIRST_ROOM)
        blocks = -(-room // 16)
        store = PagedStore(
            self.model.spec.groups,
            blocks * len(rows),
            dtype=self.model.dtype,
            device=self.model.device,
            block_size=16,
        )
        for row in sorted(rows, key=lambda row: -len(row.tokens)):
            store.reserve(row, room)
        if self.past is not None:
            for i, old in enumerate(self.past.rows):
                for row in rows[i * self.copies : (i + 1) * self.copies]:
                    store.adopt(row, self.past.store, old, _common(row.tokens, old.tokens[: old.computed]))
        return store

    def _chunk(self, rows: list[Sequence]) -> int | None:
        """Columns of prompt per step."""
        if self.config.prefill_chunk_size is not None:
            return int(self.config.prefill_chunk_size)
        budget = _PROMPT_BUDGET.get(self.model.device.type, _PROMPT_BUDGET_ELSEWHERE)
        if sum(len(row.tokens) for row in rows[:: self.copies]) <= budget:
            return None
        return max(64, budget // -(-len(rows) // self.copies))

    def _sequences(self, rows: list[Sequence]) -> Tensor:
        """The rectangle with every row's output to the right of it."""
        start = [len(tokens) for tokens in self.prompts.tokens]
        news = [row.tokens[begin:] for row, begin in zip(rows, start, strict=True)]
        width = max(map(len, news))
        filled = torch.tensor([new + [self.filler] * (width - len(new)) for new in news])
        return torch.cat([self.prompts.rectangle, filled.to(self.prompts.rectangle.device)], dim=1)

    def _output(
        self, rows: list[Sequence], store: PagedStore, kept: Kept, tracer: Tracer | None
    ) -> GenerateDecoderOnlyOutput:
        sequences = self._sequences(rows)
        past = None
        if self.config.use_cache:
            stored = [PastRow(row.tokens[: row.computed], row.computed, row.blocks) for row in rows]
            past = PastKeyValues(store, stored, sequences.shape[1] - 1)
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_tuple(kept.scores),
            logits=_tuple(kept.logits),
            attentions=_tuple(tracer.attentions) if tracer else None,
            hidden_states=_tuple(tracer.hidden_states) if tracer else None,
            past_key_values=past,
            finish_reasons=[row.finish or "length" for row in rows],
        )


def _tuple(items: list[T] | None) -> tuple[T, ...] | None:
    return None if items is None else tuple(items)


def _common(tokens: list[int], stored: list[int]) -> int:
    """How many leading tokens agree; at least one token of the new prompt is left to compute."""
    limit = min(len(tokens) - 1, len(stored))
    return next((i for i in range(limit) if tokens[i] != stored[i]), limit)
