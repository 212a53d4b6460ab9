"""Token healing in a static call: the prompts as tensors, and the model's plain call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unspool.decode.healing import heal_tokens
from unspool.generate.inputs import Prompts


def heal_prompts(logits_of: Callable[[Tensor], Tensor], prompts: Prompts, tokenizer: Any) -> Prompts:
    """Prompts with healed last tokens; see `decode.healing`. `logits_of(ids [1, n])` is asked once for each row."""
    if prompts.embeds is not None:
        raise ValueError("token_healing needs input_ids; inputs_embeds have no last token to replace")
    device = prompts.rectangle.device

    @torch.no_grad()
    def next_logits(rows: list[list[int]]) -> Tensor:
        return torch.cat([logits_of(torch.tensor([row], device=device))[:, -1] for row in rows])

    tokens = heal_tokens(next_logits, prompts.tokens, tokenizer)
    rectangle = prompts.rectangle.clone()
    for row, mask, own in zip(rectangle, prompts.mask, tokens, strict=True):
        row[mask.nonzero()[-1]] = own[-1]
    return Prompts(rectangle, prompts.mask, tokens)
