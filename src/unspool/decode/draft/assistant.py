"""A draft model made ready for the rows of a call or a request, whatever its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unspool.config import GenerationConfig
from unspool.config.lengths import end_tokens
from unspool.decode.choose.noise import GlobalNoise, Noise
from unspool.decode.choose.ragged import Columns, RaggedChooser
from unspool.decode.draft.model import ModelDrafter
from unspool.decode.draft.rules import draft_rules, draft_setting
from unspool.decode.draft.vocabularies import shared_tokens, tongue
from unspool.decode.draft.words import SameText, SharedWords, Words
from unspool.decode.runner import Runner
from unspool.decode.sequence import Chooser, Sequence
from unspool.logits import LogitsProcessorList, warped_again
from unspool.models.adapters import Adapter

__all__ = ["DraftModel", "model_drafter"]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What drafts.

    Attributes:
        runner: gives what runs the rows that mirror those of the call, with room for their prompts and more.
        device: where its tokens are chosen.
        vocab: how many tokens it has.
        positions: most tokens of a row.
        recompute_past: see `ModelSpec`.
        config: its own generation settings.
        tokenizers: the rows' and its own, where these differ.
        adapters: what the tokens of each row go through beside its weights.
    """

    runner: Callable[[list[Sequence]], Runner]
    device: torch.device
    vocab: int
    positions: int | float
    recompute_past: int | None
    config: GenerationConfig
    tokenizers: tuple[Any, Any] | None
    adapters: Items[Adapter | None]


def model_drafter(
    draft: DraftModel,
    rows: Items[Sequence],
    columns: Tensor,
    *,
    config: GenerationConfig,
    eos: frozenset[int],
    vocab: int,
    processors: LogitsProcessorList,
    noise: Noise | None,
    room: Callable[[Sequence], int],
) -> ModelDrafter:
    """The drafter of `rows`, which have only their prompts.

    Args:
        draft: what drafts.
        rows: whose tokens are drafted.
        columns: `[rows, columns]` what processors see of the prompts.
        config: resolved settings of the rows.
        eos: end tokens of the rows.
        vocab: how many tokens the rows' model has.
        processors, noise: how the rows' tokens are decided, and so the drafted ones.
        room: `row -> most tokens it may still get`.

    Raises:
        ValueError: the tokenizers have no token in common, and tokens are drawn.
    """
    if isinstance(noise, GlobalNoise) and draft.tokenizers is None:
        # transformers warps a draft's scores twice, and its draws depend on it
        processors = warped_again(processors, config)
    mirrors, shadows = (
        [
            Sequence(i, list(row.tokens), adapter=own)
            for i, (row, own) in enumerate(zip(rows, draft.adapters, strict=True))
        ]
        for _ in range(2)
    )
    drawn = isinstance(noise, GlobalNoise) or config.assistant_ensemble_weight is not None
    rules = draft_rules(config, draft.config, eos)
    weighed = drawn or rules.confidence > 0
    chooser: Chooser = RaggedChooser(
        Columns(columns.to(draft.device), [len(row.tokens) for row in rows]),
        processors or None,
        noise,
        keep_scores=weighed,
    )
    words: Words | None = None
    if draft.tokenizers is not None:
        ours, theirs = map(tongue, draft.tokenizers)
        if noise is None and not drawn:
            behind, draft_behind = (
                int(draft_setting(config, draft.config, name)) for name in ("target_lookbehind", "assistant_lookbehind")
            )
            words = SameText(len(mirrors), ours, theirs, behind, draft_behind)
            rules = replace(rules, eos=frozenset(end_tokens(draft.config)))
            chooser = RaggedChooser(Columns(columns, []), None, None, keep_scores=weighed)
        else:
            pairs = shared_tokens(*draft.tokenizers).items()
            shared = {token: other for token, other in pairs if token < vocab and other < draft.vocab}
            shadows = [Sequence(row.row, list(row.tokens)) for row in rows]
            chooser = words = SharedWords(chooser, shadows, shared, vocab, ours, theirs, draft.device)
        for mirror in mirrors:
            mirror.tokens = words.known(mirror)
    return ModelDrafter(
        draft.runner(mirrors),
        mirrors,
        chooser,
        rules,
        room,
        draft.device,
        recompute_past=draft.recompute_past,
        distributions=drawn,
        greedy=noise is None and not processors and not drawn,
        words=words,
        positions=draft.positions,
    )
