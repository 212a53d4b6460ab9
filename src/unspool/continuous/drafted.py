"""Assisted decoding of one request: drafts, checked several tokens in a step, in a group of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from unspool.cache.paged import BLOCK_SIZE, PagedStore
from unspool.config import GenerationConfig
from unspool.continuous.plain import log_probabilities
from unspool.continuous.requests import RequestState, Wishes
from unspool.decode.choose.ragged import Columns, RaggedChooser
from unspool.decode.choose.sample import SeededNoise
from unspool.decode.draft.layers import FirstLayers
from unspool.decode.draft.lookup import Lookup
from unspool.decode.draft.model import ModelDrafter
from unspool.decode.draft.rules import draft_rules
from unspool.decode.runner import Decoder, PagedRunner, Steps
from unspool.decode.sequence import Choice, Drafter, Group, Sequence
from unspool.errors import NonFiniteLogits, Unsupported
from unspool.models.base import Model

__all__ = ["DraftedRow"]


class DraftedRow:
    """Home and sink of a request whose tokens are drafted; see `requests.Home` and `decode.sequence.Sink`.

    With greedy decoding and with a seed the text is the one of plain decoding.

    Args:
        model: checks the drafts.
        assistant: drafts; `None` where the prompt is looked up, or the model's own first layers draft.
        prompt: the request's.
        wishes: what it asks for.
        find_fault: names the first layer whose output is not finite for a row, for the error message.
    """

    def __init__(
        self,
        model: Decoder,
        assistant: Model | None,
        prompt: list[int],
        wishes: Wishes,
        find_fault: Callable[[Sequence], str],
    ) -> None:
        config, device = wishes.config, model.device
        self._most = wishes.limits.max_columns
        self._wishes = wishes
        self._find_fault = find_fault
        self._columns = Columns(torch.tensor([prompt], device=device), [len(prompt)])
        noise = SeededNoise(wishes.seed, 1, device, wishes.sample) if config.do_sample else None
        drafter = self._drafter(model, assistant, prompt, noise)
        chooser = RaggedChooser(
            self._columns,
            wishes.processors or None,
            noise,
            proposals=drafter.proposals if isinstance(drafter, ModelDrafter) else None,
            ensemble=config.assistant_ensemble_weight,
            keep_scores=wishes.top_logprobs is not None,
        )
        self.group = Group([Sequence(0, list(prompt), adapter=wishes.adapter)], chooser, self, drafter=drafter)
        self.states: list[RequestState] = []

    def enter(self, state: RequestState) -> None:
        """See `Home`."""

    def leave(self, state: RequestState) -> None:
        """See `Home`."""
        state.rows[0].draft = []

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """See `Sink`."""
        assert choice.counts is not None
        (state,), (row,) = self.states, rows
        draft, row.draft = row.draft, []
        known, now = len(row.tokens), time.perf_counter()
        for token in tokens:
            if token < 0:
                text = f"no token can be chosen at position {len(row.tokens)}; {self._find_fault(row)}"
                state.end("error", error=NonFiniteLogits(text, request_id=state.request_id))
                break
            row.tokens.append(token)
            if self._ends(state, row, token):
                break
        taken = len(row.tokens) - known
        state.drafted += len(draft)
        state.accepted += min(taken, len(tokens) - 1)
        if state.first_token is None:
            state.first_token = now
        if self._wishes.record_timestamps:
            state.timestamps += [now] * taken
        if choice.scores is not None and taken:
            chosen = torch.tensor(tokens[:taken], device=choice.scores.device)
            for value, best in log_probabilities([self._wishes] * taken, choice.scores[:taken], chosen):
                state.logprobs.append(value)
                state.top_logprobs.append(best)

    def _ends(self, state: RequestState, row: Sequence, token: int) -> bool:
        """Whether a row ends with its newest token, asked as if tokens had come one by one."""
        limits = self._wishes.limits
        if token in limits.eos:
            state.end("stop", stop=token)
        elif limits.criteria:
            state.ask(limits.criteria, self._columns.ids(row)[None])
        if state.finish_reason is None and len(row.tokens) >= self._most:
            state.end("length")
        if state.finish_reason is not None:
            row.finish = "length" if state.finish_reason == "length" else "stop"
        return row.finish is not None

    def _room(self, row: Sequence) -> int:
        return self._most - len(row.tokens)

    def _drafter(
        self, model: Decoder, assistant: Model | None, prompt: list[int], noise: SeededNoise | None
    ) -> Drafter:
        """In the precedence of `generate()`: the first layers, the text so far, the assistant."""
        config, eos = self._wishes.config, self._wishes.limits.eos
        steps: Steps
        if config.assistant_early_exit is not None:
            if not isinstance(model, Model):
                raise Unsupported("assistant_early_exit needs a native model; leave it out")
            assistant = model
            steps = FirstLayers(model, int(config.assistant_early_exit))
        elif config.prompt_lookup_num_tokens is not None:
            tokens, ngram = int(config.prompt_lookup_num_tokens), int(config.max_matching_ngram_size or 2)
            return Lookup(tokens, ngram, lambda row: self._room(row) - 1, eos)
        else:
            assert assistant is not None
            steps = assistant
        device = assistant.device
        own = self._wishes.adapter if assistant is model else assistant.adapters.current()
        mirror = Sequence(0, list(prompt), adapter=own)
        blocks = -(-self._most // BLOCK_SIZE) + 1
        store = PagedStore(steps.spec.groups, blocks, dtype=assistant.dtype, device=device)
        settings = getattr(assistant, "generation_config", None) or GenerationConfig()
        columns: Tensor = torch.tensor([prompt], device=device)
        return ModelDrafter(
            PagedRunner(steps, store, device, [mirror]),
            [mirror],
            RaggedChooser(Columns(columns, [len(prompt)]), self._wishes.processors or None, noise, keep_scores=True),
            draft_rules(config, settings, eos),
            self._room,
            device,
            recompute_past=assistant.spec.recompute_past,
            distributions=config.assistant_ensemble_weight is not None,
        )
