"""What drafts for one request."""

from __future__ import annotations

import math
from collections.abc import Callable

from unspool.cache.paged import BLOCK_SIZE, PagedStore
from unspool.config import GenerationConfig
from unspool.continuous.apart import Apart
from unspool.decode.choose.noise import SeededNoise
from unspool.decode.draft.assistant import DraftModel, model_drafter
from unspool.decode.draft.layers import FirstLayers
from unspool.decode.draft.lookup import Lookup
from unspool.decode.runner import PagedRunner, Steps
from unspool.decode.sequence import Drafter, Sequence

__all__ = ["drafter_of"]


def drafter_of(
    apart: Apart, rows: list[Sequence], room: Callable[[Sequence], int], noise: SeededNoise | None
) -> Drafter:
    """In the precedence of `generate()`: the first layers, the text so far, the assistant.

    With greedy decoding and with a seed the text is the one of plain decoding.
    """
    wishes, config = apart.wishes, apart.wishes.config
    if config.assistant_early_exit is None and config.prompt_lookup_num_tokens is not None:
        tokens, ngram = int(config.prompt_lookup_num_tokens), int(config.max_matching_ngram_size or 2)
        return Lookup(tokens, ngram, lambda row: room(row) - 1, wishes.limits.eos)
    return model_drafter(
        _draft_model(apart),
        rows,
        apart.prompt,
        config=config,
        eos=wishes.limits.eos,
        vocab=apart.model.spec.vocab_size,
        processors=wishes.processors,
        noise=noise,
        room=room,
    )


def _draft_model(apart: Apart) -> DraftModel:
    """The model's own first layers, or the assistant."""
    wishes, config = apart.wishes, apart.wishes.config
    early = config.assistant_early_exit
    model = wishes.assistant if early is None else apart.native("assistant_early_exit")
    steps: Steps = model if early is None else FirstLayers(model, int(early))
    spec = model.spec

    def runner(mirrors: list[Sequence]) -> PagedRunner:
        blocks = -(-wishes.limits.max_columns // BLOCK_SIZE) + 1
        store = PagedStore(steps.spec.groups, blocks, dtype=model.dtype, device=model.device)
        return PagedRunner(steps, store, model.device, mirrors)

    return DraftModel(
        runner,
        model.device,
        spec.vocab_size,
        spec.max_positions if spec.hard_limit else math.inf,
        spec.recompute_past,
        config if early is not None else getattr(model, "generation_config", None) or GenerationConfig(),
        None if early is not None else wishes.tokenizers,
        [wishes.adapter if early is not None else model.adapters.current()],
    )
