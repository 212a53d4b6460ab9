"""What a request is while it lives, and what is told of it: its status, its output, why it ended."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from unspool.cache.prefix import Node
from unspool.config import GenerationConfig, GenerationMode
from unspool.decode.sequence import Group, Sequence, Work
from unspool.errors import RequestFailed
from unspool.logits import Column, LogitsProcessorList
from unspool.models.adapters import Adapter
from unspool.stopping import Limits, StoppingCriteriaList

__all__ = ["GenerationOutput", "RequestState", "RequestStatus", "Timings", "Usage"]


class RequestStatus(IntEnum):
    """Where a request is in its life; from `FINISHED` on it is over."""

    PENDING = 0
    """It waits."""
    PREFILLING = 1
    """Its prompt is being computed."""
    DECODING = 2
    """It makes tokens."""
    FINISHED = 3
    """It ended as asked: an end token, a stop, its length or its deadline."""
    FAILED = 4
    """It was refused, or an error ended it."""
    CANCELLED = 5
    """Somebody cancelled it."""


@dataclass(slots=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: length of the prompt.
        completion_tokens: tokens it made.
        cached_tokens: prompt tokens that were found stored when it first began.
        preemptions: how often it was put back to make room.
        drafted_tokens, accepted_tokens: tokens that were drafted for it, and that it took of them.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Timings:
    """Seconds since the request was made; `None` where it has not come to that.

    Attributes:
        queued: until its prompt began.
        first_token: until its first token.
        total: until it ended.
    """

    queued: float | None = None
    first_token: float | None = None
    total: float | None = None


@dataclass
class GenerationOutput:
    """The result of a request, or with `streaming` its state after a step.

    Attributes:
        request_id: whose it is.
        prompt_ids: the prompt.
        generated_tokens: tokens made so far, the end token included.
        logprobs: log-probability of each, of the distribution it was chosen from, where asked for.
        error: what went wrong, in a sentence, or `None`.
        status: where the request is in its life.
        created_time: when it was made (`time.perf_counter`).
        lifespan: when it began and ended, -1 where it has not.
        timestamps: when each token was made, with `record_timestamps`.
        finish_reason: `"stop"`, `"length"`, `"cancelled"`, `"deadline"`, `"rejected"`, `"error"`, or `None` while it
            lives.
        stop: what stopped it: the end token's id, the stop string, or the name of the criterion.
        exception: the error itself.
        top_logprobs: per token, the most likely ids and their log-probabilities, where asked for.
        prompt_logprobs: what the model gave each token of the prompt, as far as it is computed, where asked for; the
            first has no log-probability, which is `None`.
        prompt_top_logprobs: the most likely ids at each place of the prompt, likewise.
        score: a beam's score.
        beam_indices: of an output of beams, once it is over, the beam that each of its tokens was chosen for.
        scores: `[tokens, vocab]` fp32, what each token was chosen from, with `output_scores` and once it is over; of
            beams `[steps, num_beams, vocab]`, of all of them and the same for all outputs.
        logits: `[tokens, vocab]` fp32, the same before all processors, with `output_logits`.
        usage: what it took.
        timings: how long it took.
    """

    request_id: str
    prompt_ids: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    status: RequestStatus = RequestStatus.PENDING
    created_time: float = field(default_factory=time.perf_counter)
    lifespan: tuple[float, float] = (-1, -1)
    timestamps: list[float] | None = None
    finish_reason: str | None = None
    stop: int | str | None = None
    exception: BaseException | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    score: float | None = None
    beam_indices: list[int] | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    def is_finished(self) -> bool:
        """Whether the request is over, in whatever way."""
        return self.status >= RequestStatus.FINISHED


class Home(Protocol):
    """Where a request's rows are decided: the group they join when they begin, and leave when they are put back."""

    group: Group

    def enter(self, state: RequestState) -> None:
        """The request begins (again)."""
        ...

    def leave(self, state: RequestState) -> None:
        """The request ended, or was put back."""
        ...


@dataclass(slots=True, eq=False)
class Wishes:
    """What a request asks for, settled and checked; see `ContinuousBatchingManager.add_request`.

    Attributes:
        prompt: its tokens, the last of them healed where that was asked for; of an encoder-decoder, what the decoder
            begins with.
        config: resolved settings.
        mode: what strategy they mean.
        assistant: the draft model, or `None`.
        tokenizers: the model's and the draft model's, where these differ.
        negative: tokens of the negative prompt, when guidance is asked for.
        limits: when its rows end.
        processors: logits processors in order.
        columns: the same as steps that rows of several requests share, or `None` where some cannot.
        seed: of its random numbers.
        sample: its number among the outputs of one request.
        key: what keys and values depend on besides the tokens, and who may share them.
        adapter: what its tokens go through beside the model's weights, or `None`.
        deadline: `time.monotonic()` at which it ends, or `None`.
        top_logprobs: how many log-probabilities to give beside the chosen one's; `None` for no log-probabilities.
        prompt_logprobs: the same for the prompt's own tokens.
        inputs: what the module is told beside the tokens, by name, or `None`; see `Sequence`.
        given: the prompt as the caller knows it: of an encoder-decoder, what the encoder reads where that is tokens.
    """

    prompt: list[int]
    config: GenerationConfig
    mode: GenerationMode
    assistant: Any
    tokenizers: tuple[Any, Any] | None
    negative: list[int] | None
    limits: Limits
    processors: LogitsProcessorList
    columns: tuple[Column, ...] | None
    seed: int
    sample: int = 0
    key: Hashable = None
    adapter: Adapter | None = None
    priority: int = 0
    deadline: float | None = None
    streaming: bool = False
    record_timestamps: bool = False
    streamer: Any = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    inputs: Mapping[str, Any] | None = None
    given: list[int] = field(default_factory=list)

    @property
    def keeps(self) -> tuple[bool, bool]:
        """Whether the scores, and the logits, of every token are wanted whole."""
        return bool(self.config.output_scores), bool(self.config.output_logits)

    @property
    def sees_prompt(self) -> bool:
        """Whether the whole prompt must be computed before somebody's eyes."""
        return self.prompt_logprobs is not None or self.mode is GenerationMode.CONTRASTIVE_SEARCH

    @property
    def reads_ids(self) -> bool:
        """Whether somebody must see the tokens as a tensor."""
        steps = self.columns
        return bool(self.limits.criteria) or steps is None or any(step.reads_ids for step in steps)


@dataclass(slots=True, eq=False)
class RequestState:
    """A request, from its arrival to its end.

    Attributes:
        request_id: its name.
        number: place in the order of arrival.
        prompt_ids: the prompt as the caller knows it.
        wishes: what it asks for.
        home: where its rows are decided.
        rows: its rows; one, or one for each beam. Their tokens are the prompt and what was made.
        status: where it is in its life. Owner: the scheduler while it lives.
        work: what of it the next step feeds. Owner: the scheduler.
        finish_reason, stop, error: how it ended. Owner: `end`.
    """

    request_id: str
    number: int
    prompt_ids: list[int]
    wishes: Wishes
    home: Home
    rows: list[Sequence]
    status: RequestStatus = RequestStatus.PENDING
    work: list[Work] = field(default_factory=list)
    finish_reason: str | None = None
    stop: int | str | None = None
    error: BaseException | None = None
    created_time: float = field(default_factory=lambda: time.perf_counter())
    lifespan: tuple[float, float] = (-1, -1)
    first_token: float | None = None
    timestamps: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    score: float | None = None
    origins: list[int] | None = None
    """Of an output of beams, the row that each token was chosen for."""
    scores: list[Tensor] = field(default_factory=list)
    """Of each token, what it was chosen from, where that is wanted;"""
    logits: list[Tensor] = field(default_factory=list)
    """and that before all processors."""
    cached_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    children: list[RequestState] = field(default_factory=list)
    """Further outputs that come of the same rows, and end with it."""
    started_over: set[Sequence] = field(default_factory=set)
    """Rows that were computed anew at the length at which their keys no longer fit. Owner: the scheduler."""
    nodes: list[Node] = field(default_factory=list)
    """What is kept of it in the prefix index since it ended."""
    made: list[int] | None = None
    """The output, where it is not the first row's."""
    counted: int = 0
    """Output tokens that are counted already, where they are not one a step. Owner: `newly_made`."""
    leaders: list[int] = field(default_factory=list)
    """For each row the number of the first with the same prompt, which computes it; by default the first of all."""
    prompt_told: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens after its first, and of the likeliest in their places."""
    seen: int | None = None
    """Tokens that were computed before the eyes of a watch that must see the whole prompt; `None` where there is none.
    Only so many may be taken from what is stored. Owner: the scheduler."""
    reach: int = 0
    """Tokens that the row's blocks have room for. Owner: the scheduler."""
    eos: frozenset[int] = field(init=False)
    most: int = field(init=False)
    attentive: bool = field(init=False)
    """Every token concerns more than the row itself."""
    heedful: bool = field(init=False)
    """What follows a token depends on the host: its next step cannot be launched before."""
    next_token: list[Work] = field(init=False)
    """The work of a plain decode step, which is the same every time; empty where steps differ."""

    def __post_init__(self) -> None:
        wishes, group = self.wishes, self.home.group
        self.eos, self.most = wishes.limits.eos, wishes.limits.max_columns
        self.attentive = wishes.reads_ids or wishes.record_timestamps
        plain = not group.rows  # the group of plain rows lists none, since they come and go
        self.leaders = self.leaders or [0] * len(self.rows)
        alone = not plain or wishes.inputs is not None  # rows of a module's own are told their tokens by the host
        self.heedful = alone or wishes.reads_ids or wishes.top_logprobs is not None
        self.next_token = [Work(self.rows[0], 1, 1, group)] if plain else []

    @property
    def priority(self) -> int:
        """Higher goes first, where the scheduler looks at it."""
        return self.wishes.priority

    @property
    def generated_tokens(self) -> list[int]:
        """Tokens made so far."""
        return self.rows[0].tokens[len(self.wishes.prompt) :] if self.made is None else self.made

    def newly_made(self) -> int:
        """Output tokens since the last call, of its children too."""
        before = self.counted
        self.counted = sum(len(one.generated_tokens) for one in (self, *self.children))
        return self.counted - before

    def current_len(self) -> int:
        """Tokens whose keys and values are stored, of all rows."""
        return sum(row.computed for row in self.rows)

    def ask(self, criteria: StoppingCriteriaList, ids: Tensor) -> None:
        """Let criteria see the tokens `[1, width]`, and end when one says so, or raises."""
        for criterion in criteria:
            try:
                done = bool(torch.as_tensor(criterion(ids, None)).any())
            except Exception as error:
                text = f"its criterion {type(criterion).__name__} raised {error!r}"
                self.end("error", error=RequestFailed(text, request_id=self.request_id, cause=error))
                return
            if done:
                matched = getattr(criterion, "matched", None)
                self.end("stop", stop=matched[0] if matched else type(criterion).__name__)
                return

    def end(self, reason: str, *, stop: int | str | None = None, error: BaseException | None = None) -> None:
        """Note how the request ended; the first reason counts."""
        if self.finish_reason is None:
            self.finish_reason, self.stop, self.error = reason, stop, error

    def _stacked(self, lines: list[Tensor]) -> Tensor | None:
        """Whole distributions of all tokens, once there will be no more."""
        return torch.stack(lines) if lines and self.finish_reason is not None else None

    def to_generation_output(self) -> GenerationOutput:
        """What is to be told of it now, in copies."""
        tokens = list(self.generated_tokens)
        begin, over = self.lifespan
        wishes = self.wishes
        return GenerationOutput(
            request_id=self.request_id,
            prompt_ids=list(self.prompt_ids),
            generated_tokens=tokens,
            logprobs=list(self.logprobs),
            error=None if self.error is None else str(self.error) or type(self.error).__name__,
            status=self.status,
            created_time=self.created_time,
            lifespan=self.lifespan,
            timestamps=list(self.timestamps) if wishes.record_timestamps else None,
            finish_reason=self.finish_reason,
            stop=self.stop,
            exception=self.error,
            top_logprobs=list(self.top_logprobs) if wishes.top_logprobs else None,
            prompt_logprobs=None if wishes.prompt_logprobs is None else [None, *(one for one, _ in self.prompt_told)],
            prompt_top_logprobs=[None, *(best for _, best in self.prompt_told)] if wishes.prompt_logprobs else None,
            score=self.score,
            beam_indices=self.origins,
            scores=self._stacked(self.scores),
            logits=self._stacked(self.logits),
            usage=Usage(
                len(self.prompt_ids), len(tokens), self.cached_tokens, self.preemptions, self.drafted, self.accepted
            ),
            timings=Timings(
                begin - self.created_time if begin >= 0 else None,
                None if self.first_token is None else self.first_token - self.created_time,
                over - self.created_time if over >= 0 else None,
            ),
        )
