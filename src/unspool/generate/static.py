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
from unspool.decode.choose.beam import BeamChooser
from unspool.decode.choose.sample import GlobalNoise, Noise, Rectangle, SampleChooser, SeededNoise
from unspool.decode.loop import Loop
from unspool.decode.plan import StaticScheduler
from unspool.decode.sequence import Group, Sequence
from unspool.generate.beams import BeamRecorder, beam_chooser, beam_output, beam_sequences
from unspool.generate.fault import find_fault
from unspool.generate.inputs import Prompts
from unspool.generate.outputs import GenerateDecoderOnlyOutput, GenerateOutput
from unspool.generate.recorder import Kept, Limits, Recorder, Tracer
from unspool.generate.stream import Stream
from unspool.logits import LogitsProcessorList
from unspool.models.base import Model

T = TypeVar("T")

# New tokens a store has room for at first; it doubles when they are used up, so that a generous limit costs nothing.
_FIRST_ROOM = 1024
# Prompt tokens computed in one step when the caller names no chunk: enough to keep matrix products at full speed and
# ordinary batches whole, few enough to bound activations.
_PROMPT_BUDGET = 8192


@dataclass(slots=True)
class StaticCall:
    """Everything a call needs, settled.

    Attributes:
        model: native model.
        config: resolved settings.
        prompts: one entry per row to generate; rows made by `num_return_sequences` or `num_beams` stand side by side.
        copies: how many rows share each prompt (`num_beams`, or else `num_return_sequences`).
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

    def run(self) -> Tensor | GenerateOutput:
        """Generate: `[rows, columns]` ids, or the output object when `return_dict_in_generate` is set."""
        config = self.config
        detailed = bool(config.return_dict_in_generate)
        keep = Kept(
            scores=[] if detailed and config.output_scores else None,
            logits=[] if detailed and config.output_logits else None,
        )
        tracer = self._tracer() if detailed else None
        every_row = tracer is not None or keep.scores is not None or keep.logits is not None
        every_row |= not self.processors.row_independent
        rows = [Sequence(number, list(tokens)) for number, tokens in enumerate(self.prompts.tokens)]
        beams = self._beams(keep, every_row)
        group = self._group(rows, keep, every_row) if beams is None else self._beam_group(rows, beams, keep)
        forks = beams is not None
        store = self._forked_store(rows) if forks else self._store(rows)
        leaders = rows[:: self.copies]
        scheduler = StaticScheduler(
            group,
            store,
            steps=self.limits.max_columns - self.prompts.rectangle.shape[1],
            chunk=self._chunk(rows),
            leaders=leaders,
            recompute_past=self.model.spec.recompute_past,
            keep_finished=every_row,
            keep_stored=detailed and not forks,
            forks=forks,
        )
        loop = Loop(
            self.model,
            store,
            group,
            scheduler,
            device=self.model.device,
            twins=[leaders[i // self.copies] for i in range(len(rows))] if self.copies > 1 else None,
            forks=forks,
            in_step=forks or every_row or bool(self.limits.criteria) or self.model.spec.recompute_past is not None,
            watch=tracer,
        )
        with self._mode(every_row or detailed):
            loop.run()
        if beams is not None:
            prompts, number = self.prompts.rectangle[:: self.copies], int(config.num_return_sequences or 1)
            if detailed:
                return beam_output(beams, prompts, number, self.limits, keep, tracer)
            return beam_sequences(beams, prompts, number)
        return self._output(rows, store, keep, tracer) if detailed else self._sequences(rows)

    def _tracer(self) -> Tracer | None:
        heads, hidden = bool(self.config.output_attentions), bool(self.config.output_hidden_states)
        return Tracer(len(self.prompts.tokens), self.copies, heads, hidden) if heads or hidden else None

    def _group(self, rows: list[Sequence], keep: Kept, every_row: bool) -> Group:
        """Rows that are decided one by one."""
        history = Rectangle(self.prompts.rectangle, self.limits.max_columns, self.filler)
        chooser = SampleChooser(
            history,
            self.processors or None,
            self._noise(len(rows)),
            keep_scores=keep.scores is not None,
            keep_logits=keep.logits is not None,
        )
        return Group(rows, chooser, Recorder(rows, history, self.limits, self.stream, keep, every_row, self._fault))

    def _beams(self, keep: Kept, every_row: bool) -> BeamChooser | None:
        """What decides the rows of each prompt together, when that is asked for."""
        if (self.config.num_beams or 1) == 1:
            return None
        together = every_row or not self.limits.criteria.row_independent
        noise = self._noise(len(self.prompts.tokens))
        return beam_chooser(self.config, self.prompts, self.processors, self.limits, noise, self.filler, keep, together)

    def _beam_group(self, rows: list[Sequence], chooser: BeamChooser, keep: Kept) -> Group:
        return Group(rows, chooser, BeamRecorder(chooser, keep, self.stream, self._fault))

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
        store = self._empty(blocks * len(rows))
        for row in sorted(rows, key=lambda row: -len(row.tokens)):
            store.reserve(row, room)
        if self.past is not None:
            for i, old in enumerate(self.past.rows):
                for row in rows[i * self.copies : (i + 1) * self.copies]:
                    store.adopt(row, self.past.store, old, _common(row.tokens, old.tokens[: old.computed]))
        return store

    def _forked_store(self, rows: list[Sequence]) -> PagedStore:
        """A store for rows that share their prompts: blocks for each prompt once, and for each row's output."""
        new = self.limits.max_columns - self.prompts.rectangle.shape[1]
        blocks = 0
        for row in rows[:: self.copies]:
            full, prompt = len(row.tokens) // 16, len(row.tokens)
            blocks += full + self.copies * (-(-(prompt + min(new, _FIRST_ROOM)) // 16) - full)
        store = self._empty(blocks)
        for row in rows[:: self.copies]:
            store.reserve(row, len(row.tokens))
        if self.past is not None:
            for row, old in zip(rows[:: self.copies], self.past.rows, strict=True):
                store.adopt(row, self.past.store, old, _common(row.tokens, old.tokens[: old.computed]))
        return store

    def _empty(self, blocks: int) -> PagedStore:
        return PagedStore(
            self.model.spec.groups, blocks, dtype=self.model.dtype, device=self.model.device, block_size=16
        )

    def _chunk(self, rows: list[Sequence]) -> int | None:
        """Columns of prompt per step."""
        if self.config.prefill_chunk_size is not None:
            return int(self.config.prefill_chunk_size)
        if sum(len(row.tokens) for row in rows[:: self.copies]) <= _PROMPT_BUDGET:
            return None
        return max(64, _PROMPT_BUDGET // -(-len(rows) // self.copies))

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
