"""Assisted decoding in a static call: drafts from a smaller model, the model's own first layers, or the text so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.config.checks import STATIC_CACHES
from unspool.config.notice import warn_once
from unspool.decode.choose.noise import GlobalNoise, Noise
from unspool.decode.choose.ragged import Columns, RaggedChooser
from unspool.decode.draft.assistant import DraftModel, model_drafter
from unspool.decode.draft.lookup import Lookup
from unspool.decode.draft.model import ModelDrafter
from unspool.decode.runner import Runner
from unspool.decode.sequence import Choice, Drafter, Group, Sequence
from unspool.decode.tops import Tops
from unspool.errors import Unsupported
from unspool.generate.call import Assistant, Call, Setup
from unspool.generate.outputs import Draft, GenerateDecoderOnlyOutput
from unspool.generate.recorder import refuse_nothing
from unspool.generate.sampling import as_tuple, sequences
from unspool.generate.stream import Stream
from unspool.generate.tracing import DraftTracer
from unspool.logits import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor
from unspool.stopping import Limits


@dataclass(slots=True, eq=False)
class RaggedRecorder:
    """The sink of rows that get any number of tokens in a step (see `decode.sequence.Sink`).

    Attributes:
        columns: what criteria see.
        limits: when rows end.
        steps: most new tokens of a row.
        begin: how many of each row's tokens are its prompt's.
        stream: the streamer's entrance, or `None`.
        find_fault: names the first layer whose output is not finite for a row, for the error message.
        scores, logits: per row, one `[vocab]` for each of its new tokens; `None` when they are not wanted.
        tops: the likeliest tokens, where they are asked for.
        tracer: takes attentions and hidden states, or `None`.
        rounds: per row, every draft that was checked.
    """

    columns: Columns
    limits: Limits
    steps: int
    begin: list[int]
    stream: Stream | None
    filler: int
    find_fault: Callable[[Sequence], str]
    scores: list[list[Tensor]] | None
    logits: list[list[Tensor]] | None
    tops: Tops | None
    tracer: DraftTracer | None
    rounds: list[list[Draft]] = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = [[] for _ in self.begin]
        self._ended = [False] * len(self.begin)

    _ended: list[bool] = field(init=False)

    def room(self, row: Sequence) -> int:
        """Most tokens a row may still get."""
        return self.steps - (len(row.tokens) - self.begin[row.row])

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Append each row's tokens until it ends, stream; raises `NonFiniteLogits` for a row without a choice."""
        assert choice.counts is not None
        news: list[list[int]] = [[] for _ in self.begin]
        first = place = 0
        for row, count in zip(rows, choice.counts, strict=True):
            draft, row.draft = row.draft, []
            known = len(row.tokens)
            self._append(row, tokens[first : first + count])
            taken = len(row.tokens) - known
            if draft:
                self.rounds[row.row].append(Draft(known, draft, min(taken, count - 1)))
            for kept, made in ((self.scores, choice.scores), (self.logits, choice.logits)):
                if kept is not None and made is not None:
                    kept[row.row] += made[place : place + taken].unbind()
            if self.tracer is not None:
                self.tracer.took(row.row, taken)
            if self.tops is not None and choice.scores is not None:
                made = choice.scores[place : place + taken]
                self.tops.add([row.row] * taken, made, choice.tokens[first : first + taken])
            news[row.row] = row.tokens[known:]
            self._ended[row.row] = row.finish is not None
            first += count
            place += 1 + len(draft)
        if self.stream is not None:
            self.stream.news(news, self._ended, self.filler)

    def _append(self, row: Sequence, tokens: list[int]) -> None:
        for token in tokens:
            if token < 0:
                refuse_nothing(row, self.find_fault)
            row.tokens.append(token)
            if token in self.limits.eos:
                row.finish = "stop"
            elif self.room(row) <= 0:
                row.finish = "length"
            elif self.limits.criteria and self._asked(row):
                row.finish = "stop"
            if row.finish is not None:
                return

    def _asked(self, row: Sequence) -> bool:
        """Ask the criteria about one row, as if its tokens had come one by one."""
        scores = None if self.scores is None else tuple(score[None] for score in self.scores[row.row])
        return bool(self.limits.criteria(self.columns.ids(row)[None], scores).any())


def set_up_assisted(call: Call) -> Setup:
    """A row for each output, with drafts checked in each step."""
    if call.prompts.embeds is not None:
        raise Unsupported("inputs_embeds and drafts cannot be combined; pass input_ids, or leave the drafts out")
    for name in ("use_mtp", "speculation_type"):
        if getattr(call.config, name):
            raise Unsupported(
                f"{name}={getattr(call.config, name)!r}: drafts here come from an assistant_model, "
                "prompt_lookup_num_tokens or assistant_early_exit; leave it out, or use one of these"
            )
    if not call.backend.abilities.traces:
        _refuse_foreign(call)
    if call.assistant is not None and (call.config.assistant_early_exit or call.config.prompt_lookup_num_tokens):
        warn_once("assistant_model has no effect beside assistant_early_exit or prompt_lookup_num_tokens")
    if call.config.assistant_early_exit and call.config.prompt_lookup_num_tokens:
        warn_once("prompt_lookup_num_tokens has no effect beside assistant_early_exit")
    guidance = call.guidance
    if guidance is not None:  # which takes the positions of all rows at once, and drafts are made without
        call.processors = LogitsProcessorList(one for one in call.processors if one is not guidance)
    rows = call.rows()
    begin = [len(tokens) for tokens in call.prompts.tokens]
    columns = Columns(call.prompts.rectangle, begin)
    sink = RaggedRecorder(
        columns,
        call.limits,
        call.steps,
        begin,
        call.stream,
        call.filler,
        call.backend.fault,
        None if call.kept.scores is None else [[] for _ in rows],
        None if call.kept.logits is None else [[] for _ in rows],
        call.kept.tops,
        call.tracer if isinstance(call.tracer, DraftTracer) else None,
    )
    noise = call.noise()
    drafter = _drafter(call, rows, columns, sink.room, noise)
    chooser = RaggedChooser(
        columns,
        call.processors or None,
        noise,
        guidance=guidance,
        proposals=drafter.proposals if isinstance(drafter, ModelDrafter) else None,
        ensemble=call.config.assistant_ensemble_weight,
        keep_scores=call.kept.needs_scores,
        keep_logits=sink.logits is not None,
    )
    group = Group(rows, chooser, sink, twins=call.twins(rows), drafter=drafter, watch=call.tracer)

    def result(runner: Runner) -> Tensor | GenerateDecoderOnlyOutput:
        return _output(call, rows, sink, runner) if call.detailed else sequences(call, rows)

    return Setup(group, result, forks=False, in_step=True, keep_finished=False)


def _refuse_foreign(call: Call) -> None:
    """Raise `Unsupported` for what goes with drafts only where the loop itself sees attentions and adds rows."""
    guided = any(isinstance(one, UnbatchedClassifierFreeGuidanceLogitsProcessor) for one in call.processors)
    kind = call.config.cache_implementation
    for name, wrong in (
        ("output_attentions", call.detailed and call.config.output_attentions),
        ("output_hidden_states", call.detailed and call.config.output_hidden_states),
        ("guidance_scale", guided),
        ("use_cache=False", not call.config.use_cache),
        (f"cache_implementation={kind!r}", kind in STATIC_CACHES),
    ):
        if wrong:
            raise Unsupported(
                f"{name} and drafts (assistant_model, prompt_lookup_num_tokens) go together on native models, and on "
                "modules that run ragged (see unspool_report()) with input_ids and attention_mask alone; leave one out"
            )


def _drafter(
    call: Call,
    rows: list[Sequence],
    columns: Columns,
    room: Callable[[Sequence], int],
    noise: Noise | None,
) -> Drafter:
    """What drafts: the model's own first layers, the text so far, or the assistant, in transformers' precedence."""
    config = call.config
    if config.assistant_early_exit is not None:
        early = call.backend.first_layers(int(config.assistant_early_exit))
        return _model_drafter(call, Assistant(early, config), rows, room, noise)
    if config.prompt_lookup_num_tokens is not None:
        if config.assistant_ensemble_weight is not None:
            raise ValueError(
                f"assistant_ensemble_weight={config.assistant_ensemble_weight} weighs a draft model's probabilities, "
                "which prompt_lookup_num_tokens has not; leave one of them out"
            )
        tokens, ngram = int(config.prompt_lookup_num_tokens), int(config.max_matching_ngram_size or 2)
        drawn = isinstance(noise, GlobalNoise) and len(rows) == 1 and call.negative is None
        allowed = _allowed(call, columns) if drawn and call.processors else None

        def most(row: Sequence) -> int:
            left = room(row) - 1
            # transformers drafts past the end of a row too, and what it draws depends on it
            return tokens if left > 0 and drawn and len(row.tokens) + tokens < call.backend.positions else left

        return Lookup(tokens, ngram, most, call.limits.eos, allowed)
    assert call.assistant is not None
    return _model_drafter(call, call.assistant, rows, room, noise)


def _model_drafter(
    call: Call,
    assistant: Assistant,
    rows: list[Sequence],
    room: Callable[[Sequence], int],
    noise: Noise | None,
) -> ModelDrafter:
    backend, own = assistant.backend, assistant is call.assistant
    draft = DraftModel(
        lambda mirrors: backend.runner(mirrors, 1, call.steps, None, forks=False, drafts=True),
        backend.device,
        backend.vocab,
        backend.positions,
        backend.recompute_past,
        assistant.config,
        assistant.tokenizers,
        [assistant.adapter if own else row.adapter for row in rows],
    )
    return model_drafter(
        draft,
        rows,
        call.prompts.rectangle,
        config=call.config,
        eos=call.limits.eos,
        vocab=call.backend.vocab,
        processors=call.processors,
        noise=noise,
        room=room,
    )


def _allowed(call: Call, columns: Columns) -> Callable[[Sequence, list[int]], int]:
    """How many tokens of a draft the processors leave possible; transformers asks so, and its draws depend on it."""
    vocab = call.backend.vocab

    def allowed(row: Sequence, draft: list[int]) -> int:
        for i, token in enumerate(draft):
            row.draft = draft[:i]
            scores = call.processors(
                columns.ids(row)[None], torch.ones(1, vocab, dtype=torch.float32, device=call.backend.device)
            )
            row.draft = []
            value = float(scores[0, token])
            if value == float("-inf") or value == torch.finfo(scores.dtype).min:
                return i
        return len(draft)

    return allowed


def _output(call: Call, rows: list[Sequence], sink: RaggedRecorder, runner: Runner) -> GenerateDecoderOnlyOutput:
    made = sequences(call, rows)
    drafted = [sum(len(part.tokens) for part in rounds) for rounds in sink.rounds]
    accepted = [sum(part.accepted for part in rounds) for rounds in sink.rounds]
    tops, chances = (None, None) if sink.tops is None else sink.tops.result()
    return GenerateDecoderOnlyOutput(
        sequences=made,
        scores=_by_step(sink.scores),
        logits=_by_step(sink.logits),
        attentions=as_tuple(sink.tracer.attentions) if sink.tracer else None,
        hidden_states=as_tuple(sink.tracer.hidden_states) if sink.tracer else None,
        past_key_values=call.backend.past(rows, runner, made.shape[1] - 1) if call.config.use_cache else None,
        finish_reasons=[row.finish or "length" for row in rows],
        acceptance_rate=sum(accepted) / max(1, sum(drafted)),
        drafts=[list(rounds) for rounds in sink.rounds],
        top_logprobs=tops,
        token_logprobs=chances,
    )


def _by_step(kept: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """Rows' records as one `[rows, vocab]` for each step; zeros past a row's end."""
    if kept is None:
        return None
    steps = max(map(len, kept))
    nothing = torch.zeros_like(next(part for row in kept for part in row))
    return tuple(torch.stack([row[i] if i < len(row) else nothing for row in kept]) for i in range(steps))
