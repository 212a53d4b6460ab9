"""Token healing: a prompt's last token replaced by the likeliest token that begins with its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["heal_tokens"]

# The prompt's own token is favoured a little, as in transformers, against "http" becoming "https" everywhere.
_OWN = 1.0


def heal_tokens(
    next_logits: Callable[[list[list[int]]], Tensor], rows: list[list[int]], tokenizer: Any
) -> list[list[int]]:
    """Prompts `rows` with the last token of each replaced where another token that begins like it fits better.

    Prompts of a single token, and last tokens that nothing extends, stay as they are.

    Args:
        next_logits: `prompts -> [prompts, vocab]`.
        rows: true tokens of each prompt.
        tokenizer: of the model.

    Raises:
        ValueError: without a tokenizer.

    Source: `GenerationMixin.heal_tokens` of transformers; unlike there, prompts are not stripped and
        tokenized anew, and no other token can win, however likely.
    """
    if tokenizer is None:
        raise ValueError("token_healing looks at the tokens' texts; pass tokenizer=")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    names = {token: name for name, token in vocabulary.items()}
    found: list[tuple[int, list[int]]] = []
    for place, row in enumerate(rows):
        own = names.get(row[-1])
        if len(row) < 2 or own is None or row[-1] in special:
            continue
        longer = [token for name, token in vocabulary.items() if name.startswith(own) and token not in special]
        if len(longer) > 1:
            found.append((place, longer))
    if not found:
        return rows
    logits = next_logits([rows[place][:-1] for place, _ in found]).float()
    healed = [list(row) for row in rows]
    for scores, (place, longer) in zip(logits, found, strict=True):
        tokens = torch.tensor(longer, device=scores.device)
        kept = (tokens == rows[place][-1]) * _OWN
        healed[place][-1] = longer[int((scores[tokens] + kept).argmax())]
    return healed
