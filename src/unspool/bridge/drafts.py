"""Rows of a foreign module that get several tokens in a step, and may lose the last of them again.

What a row loses is masked where other rows still need the columns, and cropped off the module's cache where none does.
So rows of one rectangle come to have holes at different places; the mask and the positions tell the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unspool.bridge.module import Foreign
from unspool.bridge.rows import RowsRunner
from unspool.cache.layers import DynamicLayer
from unspool.decode.runner import Output
from unspool.decode.sequence import Sequence, Want, Work
from unspool.errors import Unsupported

__all__ = ["DraftRows"]

# Inputs with a column for each token, of kinds that this runner cannot lay out.
_PER_TOKEN = ("inputs_embeds", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class DraftRows(RowsRunner):
    """See `RowsRunner`.

    Raises:
        Unsupported: the module's past cannot be taken back, or its rows cannot have holes.
    """

    def __init__(self, foreign: Foreign, rows: list[Sequence], *args: Any) -> None:
        super().__init__(foreign, rows, *args)
        reason = _why_not(foreign, self.inputs, len(rows))
        if reason is not None:
            raise Unsupported(
                f"drafts (assistant_model, prompt_lookup_num_tokens) cannot be checked with "
                f"{type(foreign.module).__name__}: {reason}; leave them out"
            )
        self._cache = self.inputs[foreign.cache_name]
        self._cache.activate_past_recording()
        mask = self.inputs.get(foreign.mask_name)
        mask = torch.ones_like(self._ids) if mask is None else mask
        self._columns: list[list[int]] = [row.nonzero().flatten().tolist() for row in mask]  # of each row's own tokens

    def run(self, work: list[Work], want: Want) -> Output:
        """See `Runner`."""
        if self._fed == self._prompt and self._begun:
            new = {item.seq.row: self._tokens(item.seq, item.feed) for item in work}
            logits = self._feed_rows(new)
            return Output(torch.cat([logits[item.seq.row, -item.keep :] for item in work]), [], [])
        plain = [item._replace(feed=item.feed - len(item.seq.draft), keep=min(item.keep, 1)) for item in work]
        first = super().run(plain, want)
        drafts = {item.seq.row: list(item.seq.draft) for item in work if item.seq.draft}
        if not drafts:
            return first
        logits = self._feed_rows(drafts)
        parts = [
            part
            for item, own in zip(work, first.logits, strict=True)
            for part in (own[None], logits[item.seq.row, logits.shape[1] - len(item.seq.draft) :])
        ]
        return Output(torch.cat(parts), [], [])

    def _tokens(self, row: Sequence, feed: int) -> list[int]:
        return (row.tokens[row.computed :] + row.draft)[:feed]

    def _feed_rows(self, new: dict[int, list[int]]) -> Tensor:
        """Feed rows their new tokens, right-aligned in as many columns as the most need: `[rows, new, vocab]`."""
        self._crop()
        foreign, begin = self.foreign, self._ids.shape[1]
        count = max(map(len, new.values()))
        end = begin + count
        block = torch.full((self._ids.shape[0], count), self._filler)
        for row, tokens in new.items():
            block[row, count - len(tokens) :] = torch.tensor(tokens)
            self._columns[row] += range(end - len(tokens), end)
        self._ids = torch.cat([self._ids, block.to(self._ids.device)], dim=1)
        mask, places = self._layout(end)
        inputs = dict(self.inputs)
        inputs[foreign.mask_name] = None if bool(mask.all()) and not foreign.by_place else mask
        if foreign.accepts("position_ids"):
            inputs["position_ids"] = places
        if foreign.accepts("logits_to_keep"):
            inputs["logits_to_keep"] = count
        if foreign.by_place:
            inputs["cache_position"] = torch.arange(begin, end, device=self._ids.device)
        output = foreign.call(foreign.prepare(self._ids, inputs, count, False))
        self.inputs[foreign.cache_name] = self._cache = foreign.update(output, inputs, 1)[foreign.cache_name]
        logits = foreign.logits(output)[:, -count:].to(self._ids.device)
        self.logits = logits[:, -1]
        return logits

    def _layout(self, end: int) -> tuple[Tensor, Tensor]:
        """Mask and positions `[rows, end]`: a row's own tokens count, in the order they came."""
        mask = torch.zeros(len(self._columns), end, dtype=torch.int64)
        places = torch.zeros_like(mask)
        for row, columns in enumerate(self._columns):
            index = torch.tensor(columns, dtype=torch.int64)
            mask[row, index] = 1
            places[row, index] = torch.arange(len(columns))
        return mask.to(self._ids.device), places.to(self._ids.device)

    def _crop(self) -> None:
        """Drop the columns at the end in which no row has a token."""
        used = max((columns[-1] + 1 for columns in self._columns if columns), default=0)
        if used < self._ids.shape[1]:
            self._cache.crop(used - self._ids.shape[1])
            self._ids = self._ids[:, :used]

    def rewind(self, row: Sequence, tokens: int) -> None:
        """See `Runner`."""
        del self._columns[row.row][tokens:]
        row.computed = min(row.computed, tokens)


def _why_not(foreign: Foreign, inputs: dict[str, Any], rows: int) -> str | None:
    """Why tokens of single rows cannot be taken back; `None` when they can."""
    cache = inputs.get(foreign.cache_name)
    layers = getattr(cache, "layers", None)
    if cache is None or layers is None or not hasattr(cache, "activate_past_recording"):
        return "it needs a cache that can be cropped"
    if cache.get_seq_length() > 0:
        return "a past of the caller's cannot be cropped"
    odd = next((layer for layer in layers if not isinstance(layer, DynamicLayer)), None)
    if odd is not None:
        return f"a {type(odd).__name__} cannot go back"
    wide = next((name for name in _PER_TOKEN if inputs.get(name) is not None), None)
    places = inputs.get("position_ids")
    if wide is not None or (places is not None and places.ndim != 2):
        return f"{wide or 'position_ids'} would have to be drafted too"
    return foreign.cannot_draft(rows)
