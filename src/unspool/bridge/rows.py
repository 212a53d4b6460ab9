"""Runs a foreign module under the core's loop: a padded rectangle of ids, and the module's own kind of past.

What is fed is what transformers' own loop would feed, column by column, so tokens are the same. Rows that ended stay in
the rectangle, with filler.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from unspool.bridge.module import CACHE_NAMES, Foreign
from unspool.cache import Cache
from unspool.decode.runner import Output
from unspool.decode.sequence import Sequence, Want, Work
from unspool.errors import Unsupported

__all__ = ["Record", "RowsRunner"]


class Record:
    """Attentions and hidden states of every step, as the module gives them; `None` where they are not wanted."""

    def __init__(self, heads: bool, hidden: bool) -> None:
        self.attentions: list[Any] | None = [] if heads else None
        self.cross_attentions: list[Any] | None = [] if heads else None
        self.hidden_states: list[Any] | None = [] if hidden else None

    def add(self, output: Any, encoder_decoder: bool) -> None:
        """Take one step's output."""
        prefix = "decoder_" if encoder_decoder else ""
        if self.attentions is not None and self.cross_attentions is not None:
            self.attentions.append(getattr(output, f"{prefix}attentions", None))
            self.cross_attentions.append(getattr(output, "cross_attentions", None))
        if self.hidden_states is not None:
            self.hidden_states.append(getattr(output, f"{prefix}hidden_states", None))


class RowsRunner:
    """See `decode.runner.Runner`.

    Args:
        foreign: the module.
        rows: all rows of the call, with their prompts; each `copies` of them, side by side, share one.
        ids: `[rows, columns]` prompts, padding included.
        inputs: what the module takes besides; carried from step to step.
        filler: stands in the columns of rows that ended.
        mask_length: width of a mask without zeros, which is not passed on.
        record: takes attentions and hidden states.
    """

    def __init__(
        self,
        foreign: Foreign,
        rows: list[Sequence],
        copies: int,
        ids: Tensor,
        inputs: dict[str, Any],
        filler: int,
        mask_length: int | None = None,
        record: Record | None = None,
    ) -> None:
        self.foreign = foreign
        self.inputs = inputs
        self.logits: Tensor | None = None
        self._ids = ids
        self._rows = rows
        self._copies = copies
        self._lengths = [len(row.tokens) for row in rows]
        self._prompt = ids.shape[1]
        self._fed = 0  # columns of the prompt that went in
        # columns that rows of one prompt have in common; a past of the caller's may differ from row to row
        embeds, own = inputs.get("inputs_embeds"), inputs.get(foreign.cache_name)
        fresh = own is None or not hasattr(own, "get_seq_length") or _is_empty(own)
        prompt = self._prompt if embeds is None or foreign.encoder_decoder else max(self._prompt, embeds.shape[1])
        self._alike = prompt if fresh else None
        self._steps = 0  # columns of new tokens that went in
        self._begun = False
        self._filler = filler
        self._mask_length = mask_length
        self._record = record

    def run(self, work: list[Work], want: Want) -> Output:
        """See `Runner`."""
        if self._fed < self._prompt or not self._begun:
            left = max(item.seq.known - item.seq.computed - item.feed for item in work)
            # what looks at pictures and sounds may keep what it makes anywhere: see `unseen`
            with torch.inference_mode(False), torch.no_grad():
                output = self._feed_prompt(self._prompt - left)
        else:
            output = self._feed_tokens(work)
        if self._record is not None:
            self._record.add(output, self.foreign.encoder_decoder)
        logits = self.foreign.logits(output)
        kept = [item for item in work if item.keep]
        newest = logits[:, -1].to(self._ids.device)
        if logits.shape[1] > 1:
            newest = newest.clone()  # lets go of the prompt's logits
        self.logits = newest
        places = [item.seq.row for item in kept]
        # a module that guides itself gives both halves, which a processor brings together
        doubled = newest.shape[0] == 2 * len(kept) == 2 * self._ids.shape[0]
        if not doubled and places != list(range(newest.shape[0])):
            newest = newest[torch.tensor(places, dtype=torch.int64, device=newest.device)]
        return Output(newest, [], [])

    def _feed_prompt(self, end: int) -> Any:
        """Feed the prompt up to column `end`."""
        if not self._begun:
            self.inputs = self.foreign.begin(self._prompt, self._ids.device, self.inputs)
        self._begun = True
        if self._fed == 0 and end == self._prompt:
            arguments = self.foreign.prepare(self._ids, self.inputs, self._columns_to_feed(), True)
            self._fed = end
            output = self.foreign.call(arguments)
            self.inputs = self.foreign.update(output, self.inputs, 1)
            return output
        return self._feed_chunk(end)

    def _columns_to_feed(self) -> int | None:
        """Columns that a cache of the caller's does not hold yet; `None` for all."""
        past = self.inputs.get("past_key_values")
        if past is None or not hasattr(past, "get_seq_length"):
            return None
        embeds = self.inputs.get("inputs_embeds")
        if embeds is not None and not self.foreign.encoder_decoder:
            return int(embeds.shape[1] - past.get_seq_length())
        mask = self.inputs.get(self.foreign.mask_name)
        known = self._mask_length if mask is None else mask.shape[1]
        return self._prompt - int(past.get_seq_length()) if known == self._prompt else None

    def _feed_chunk(self, end: int) -> Any:
        """Feed the prompt's columns from the last one fed to `end`."""
        if self.inputs.get(self.foreign.cache_name) is None:
            raise Unsupported("prefill_chunk_size needs a cache; leave it out, or use_cache=False")
        part = dict(self.inputs)
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if part.get(name) is not None:
                part[name] = part[name][:, :end]
        if part.get("position_ids") is not None:
            part["position_ids"] = part["position_ids"][..., self._fed : end]
        if part.get("cache_position") is not None:
            part["cache_position"] = torch.arange(self._fed, end, device=self._ids.device)
        ids = self._ids[:, self._fed : end]
        output = self.foreign.call(self.foreign.prepare(ids, part, None, self._fed == 0))
        self._fed = end
        if end == self._prompt:
            self.inputs = self.foreign.update(output, self.inputs, 1)
        else:
            self.inputs[self.foreign.cache_name] = self.foreign.update(output, part, 1)[self.foreign.cache_name]
        return output

    def _feed_tokens(self, work: list[Work]) -> Any:
        """Feed each row's next token."""
        if any(item.seq.pending for item in work):
            column = work[0].group.last
        else:
            column = torch.tensor([self._next_of(row) for row in self._rows], device=self._ids.device)
        self._steps += 1
        self._ids = torch.cat([self._ids, column[:, None]], dim=1)
        cached = bool(self.inputs.get("use_cache"))
        output = self.foreign.call(self.foreign.prepare(self._ids, self.inputs, 1 if cached else None, False))
        self.inputs = self.foreign.update(output, self.inputs, 1)
        return output

    def _next_of(self, row: Sequence) -> int:
        """The token of a row that comes into the next column; filler once the row has no more."""
        place = self._lengths[row.row] + self._steps
        return row.tokens[place] if place < len(row.tokens) else self._filler

    def fork(self, rows: Items[Sequence], parents: Items[int]) -> None:
        """See `Runner`."""
        places = list(range(self._ids.shape[0]))
        for row, parent in zip(rows, parents, strict=True):
            places[row.row] = rows[parent].row
        if places == list(range(len(places))):
            return
        computed = [rows[parent].computed for parent in parents]
        for row, count in zip(rows, computed, strict=True):
            row.computed = count
        index = torch.tensor(places, device=self._ids.device)
        self._ids = self._ids[index]
        name = next((name for name in CACHE_NAMES if self.inputs.get(name) is not None), None)
        if name is not None:
            alike = self._alike if all(i // self._copies == j // self._copies for i, j in enumerate(places)) else None
            self.inputs[name] = self.foreign.reorder(self.inputs[name], index, alike)

    def rewind(self, row: Sequence, tokens: int) -> None:
        """See `Runner`: `DraftRows` can."""
        raise Unsupported(f"{type(self.foreign.module).__name__} cannot take back tokens")

    def retire(self, ended: Items[Sequence], live: Items[Sequence]) -> None:
        """See `Runner`: rows that ended stay where they are."""

    def copy(self, rows: list[Sequence]) -> RowsRunner:
        """Another runner, of `rows` with the same tokens, with a past of its own."""
        other = copy.copy(self)
        encoded = self.inputs.get("encoder_outputs")
        other.inputs, other._rows = copy.deepcopy(self.inputs, {id(encoded): encoded}), rows
        return other

    @property
    def ids(self) -> Tensor:
        """`[rows, columns]` what was fed."""
        return self._ids

    @property
    def past(self) -> Any:
        """The module's past, to be handed back."""
        return next((self.inputs[name] for name in CACHE_NAMES if self.inputs.get(name) is not None), None)


def _is_empty(cache: Any) -> bool:
    """Whether a cache of ours holds nothing yet; of others nobody needs to know."""
    return isinstance(cache, Cache) and cache.batch_size < 0
