"""Token healing: a prompt's last token replaced by the likeliest token that begins with its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unspool.generate.inputs import Prompts

# The prompt's own token is favoured a little, as in transformers, against "http" becoming "https" everywhere.
_OWN = 1.0


def heal_prompts(model: Callable[..., Any], prompts: Prompts, tokenizer: Any) -> Prompts:
    """Prompts with healed last tokens; see `heal_tokens`. `model(ids [1, n]).logits` is asked once for each row."""
    if prompts.embeds is not None:
        raise ValueError("token_healing needs input_ids; inputs_embeds have no last token to replace")
    device = prompts.rectangle.device

    @torch.no_grad()
    def next_logits(rows: list[list[int]]) -> Tensor:
        return torch.cat([model(torch.tensor([row], device=device)).logits[:, -1] for row in rows])

    tokens = heal_tokens(next_logits, prompts.tokens, tokenizer)
    rectangle = prompts.rectangle.clone()
    for row, mask, own in zip(rectangle, prompts.mask, tokens, strict=True):
        row[mask.nonzero()[-1]] = own[-1]
    return Prompts(rectangle, prompts.mask, tokens)


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
