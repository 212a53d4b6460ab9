"""Classifier-free guidance: scores pulled away from what the model would say to another prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor
from unspool.logits.ops import guide


class GuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance against logits that are computed beside the row's own (Sanchez et al., 2023).

    Args:
        guidance_scale: above 1 pulls towards the row's own prompt; 1 changes nothing.

    Attributes:
        unconditional: `[rows, vocab]` logits of the rows' other halves in this step; set before each call.
    """

    reads_history = False
    row_independent = True

    def __init__(self, guidance_scale: float) -> None:
        self.guidance_scale = guidance_scale
        self.unconditional: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided log probabilities `[rows, vocab]`."""
        assert self.unconditional is not None, "the chooser gives both halves"
        return guide(scores.log_softmax(-1), self.unconditional.float().log_softmax(-1), self.guidance_scale)


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance that runs the model once more in each step, for what follows another prompt.

    One object serves one call. `generate(guidance_scale=...)` does the same for native models within the batch.

    Args:
        guidance_scale: above 1 pulls towards the row's own prompt; 1 takes log probabilities only.
        model: called as `model(input_ids, attention_mask=, use_cache=, past_key_values=)`; its result has `logits`.
        unconditional_ids: the other prompt `[rows, columns]`; by default the last token of each row's own.
        unconditional_attention_mask: its mask; by default ones.
        use_cache: keep the model's keys and values from step to step.

    Source: `UnbatchedClassifierFreeGuidanceLogitsProcessor` of transformers.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Any,
        unconditional_ids: Tensor | None = None,
        unconditional_attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
    ) -> None:
        self.guidance_scale = guidance_scale
        self._model = model
        self._ids = unconditional_ids
        self._mask = unconditional_attention_mask
        self._use_cache = use_cache
        self._past: Any = None
        self._begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided log probabilities `[rows, vocab]`."""
        scores = scores.log_softmax(-1)
        if self.guidance_scale == 1:
            return scores
        return guide(scores, self._unconditional(input_ids[:, -1:]).log_softmax(-1), self.guidance_scale)

    def _unconditional(self, last: Tensor) -> Tensor:
        """Logits that follow the other prompt and the tokens so far, of which `last` is the newest."""
        fed = last
        if not self._begun:
            self._begun = True
            self._ids = last if self._ids is None else self._ids
            self._mask = torch.ones_like(self._ids) if self._mask is None else self._mask
            fed = self._ids
        else:
            assert self._ids is not None and self._mask is not None
            self._mask = torch.cat([self._mask, torch.ones_like(last)], dim=1)
            self._ids = torch.cat([self._ids, last], dim=1)
            fed = last if self._use_cache and self._past is not None else self._ids
        out = self._model(fed, attention_mask=self._mask, use_cache=self._use_cache, past_key_values=self._past)
        self._past = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits[:, -1].float()
        return logits
