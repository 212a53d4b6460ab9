"""Rows of a foreign module that came at different times, fed in one forward.

They are a rectangle aligned at the newest tokens: shorter rows have columns of padding before their first token, which
the mask hides and positions do not count. Rows come and go between steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Items
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from unspool.bridge.module import CACHE_NAMES, Foreign
from unspool.bridge.rows import RowsRunner
from unspool.cache import Cache
from unspool.cache.recurrent import RecurrentLayer
from unspool.cache.together import put_together
from unspool.errors import Unsupported

__all__ = ["Cohort", "Member", "feed_together"]

# Told anew for every step.
_PER_TOKEN = ("attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids", "cache_position")


class Member:
    """A row of a cohort.

    Attributes:
        cohort: has its past.
        place: of its row there.
    """

    cohort: Cohort
    place: int

    def __init__(self, cohort: Cohort, place: int) -> None:
        self.join(cohort, place)

    def join(self, cohort: Cohort, place: int) -> None:
        """Become a row of a cohort, which has its past, and leave the one before."""
        if "cohort" in self.__dict__:
            self.cohort.members.discard(self)
        self.cohort, self.place = cohort, place
        cohort.members.add(self)

    def fork(self) -> Member:
        """Another one with the same past; nothing is copied until they are fed."""
        return Member(self.cohort, self.place)


class Source:
    """What an encoder made of the prompts of some rows, aligned at their ends.

    Args:
        encoded: the encoder's output, of whose fields the first is replaced.
        hidden: `[rows, columns, dim]` that field.
        mask: `[rows, columns]` of true columns.
    """

    def __init__(self, encoded: Any, hidden: Tensor, mask: Tensor) -> None:
        self._encoded = copy.copy(encoded)
        self._encoded.last_hidden_state = hidden.new_empty(0)  # this one is let go of when rows are put together
        self._hidden = hidden
        self._mask = mask
        self.columns = hidden.shape[1]

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Source:
        """That of the one row of a runner.

        Raises:
            Unsupported: the encoder gives something else.
        """
        encoded, mask = inputs.get("encoder_outputs"), inputs.get("attention_mask")
        hidden = getattr(encoded, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]:
            raise Unsupported(f"a {type(encoded).__name__} is not put beside that of other rows")
        return cls(encoded, hidden, mask)

    @staticmethod
    def gather(sources: Items[Source], places: Items[Tensor]) -> Source:
        """Of the rows at `places` of others."""
        longest = max(int(one._mask[index].sum(dim=1).max()) for one, index in zip(sources, places, strict=True))
        hidden = put_together([one._hidden[:, None] for one in sources], places, longest)[:, 0]
        mask = put_together([one._mask[:, None, :, None] for one in sources], places, longest)[:, 0, :, 0]
        return Source(sources[0]._encoded, hidden, mask)

    def inputs(self) -> dict[str, Any]:
        """What the module is told of it."""
        encoded = copy.copy(self._encoded)
        encoded.last_hidden_state = self._hidden
        return {"encoder_outputs": encoded, "attention_mask": self._mask}


class Cohort:
    """Rows that share a rectangle; membership never changes but by rows that are no more.

    Attributes:
        members: rows with a past here; two of them may have the same place.

    Args:
        foreign: the module.
        ids: `[rows, columns]` tokens, aligned at the right.
        lengths: tokens of each row.
        past: the module's, of these rows and columns.
        settings: what the module is told besides, the same for all rows and steps.
        source: what the rows' encoder made of their prompts, or `None`.
    """

    def __init__(
        self,
        foreign: Foreign,
        ids: Tensor,
        lengths: list[int],
        past: Any,
        settings: dict[str, Any],
        source: Source | None,
    ) -> None:
        self.members: WeakSet[Member] = WeakSet()
        self._foreign = foreign
        self._ids = ids
        self._lengths = lengths
        self._past = past
        self._settings = settings
        self._source = source

    @classmethod
    def of(cls, runner: RowsRunner) -> Cohort:
        """The one row of a runner that was fed its prompt; the runner's past goes to the cohort.

        Raises:
            Unsupported: the module is told, or remembers, something that other rows could not be put beside.
        """
        foreign, ids, inputs = runner.foreign, runner.ids, runner.inputs
        name = type(foreign.module).__name__
        columns = ids.shape[1]
        places = inputs.get("position_ids")
        told = torch.arange(columns + 1, device=ids.device)[None]
        # of all columns, or (transformers 5.2) of the next one alone
        if places is not None and not (
            torch.equal(places[..., :columns], told[:, :columns]) or torch.equal(places, told[:, columns:])
        ):
            raise Unsupported(f"{name} counts positions in its own way")
        settings: dict[str, Any] = {"cache_position": None} if "cache_position" in inputs else {}
        for key, value in inputs.items():
            if key in _PER_TOKEN or key == foreign.cache_name or (key == "encoder_outputs" and foreign.encoder_decoder):
                continue
            if value is not None and (key in CACHE_NAMES or not isinstance(value, bool | int | float | str)):
                raise Unsupported(f"{name} is told {key} in each step")
            settings[key] = value
        past = inputs.get(foreign.cache_name)
        if isinstance(past, Cache) and not _only_states(past) and past.get_seq_length() != columns:
            raise Unsupported(f"{name} remembers {past.get_seq_length()} tokens of {columns}")
        source = Source.of(inputs) if foreign.encoder_decoder else None
        return cls(foreign, ids, [columns], past, settings, source)

    @property
    def held(self) -> list[Any]:
        """Everything of it that takes memory."""
        return [self._past, self._source, self._ids]

    @staticmethod
    def gather(rows: Items[Member]) -> Cohort:
        """A new cohort of rows of others, which they join in an order of its own."""
        by_cohort: dict[Cohort, list[Member]] = {}
        for row in rows:
            by_cohort.setdefault(row.cohort, []).append(row)
        device = rows[0].cohort._ids.device
        lengths = [cohort._lengths[row.place] for cohort, own in by_cohort.items() for row in own]
        width = max(lengths)
        index = [torch.tensor([row.place for row in own], device=device) for own in by_cohort.values()]
        ids = put_together([one._ids[:, None, :, None] for one in by_cohort], index, width)[:, 0, :, 0]
        sources = [one._source for one in by_cohort if one._source is not None]
        source = Source.gather(sources, index) if sources else None
        past = put_together([one._past for one in by_cohort], index, width, source.columns if source else 0)
        first = rows[0].cohort
        made = Cohort(first._foreign, ids, lengths, past, first._settings, source)
        place = 0
        for own in by_cohort.values():
            for row in own:
                row.join(made, place)
                place += 1
        return made

    def made_of(self, rows: Items[Member]) -> bool:
        """Whether these are the rows, each by itself."""
        return len(rows) == len(self._lengths) == len(self.members) == len({row.place for row in rows}) and all(
            row.cohort is self for row in rows
        )

    def feed(self, tokens: list[int]) -> Tensor:
        """Feed each row's next token; logits `[rows, vocab]`. After an error the past is of no use."""
        foreign, device = self._foreign, self._ids.device
        self._ids = torch.cat([self._ids, torch.tensor(tokens, device=device)[:, None]], dim=1)
        self._lengths = [length + 1 for length in self._lengths]
        columns = self._ids.shape[1]
        padding = torch.tensor([[columns - length] for length in self._lengths], device=device)
        places = torch.arange(columns, device=device)
        inputs = dict(self._settings)
        inputs[foreign.cache_name] = self._past
        padded = min(self._lengths) < columns
        if foreign.accepts(foreign.mask_name) and (padded or (foreign.by_place and self._source is None)):
            inputs[foreign.mask_name] = (places >= padding).long()
        if self._source is not None:
            inputs |= self._source.inputs()
        position = "position_ids" if self._source is None else "decoder_position_ids"
        if foreign.accepts(position) and (padded or self._source is None):
            inputs[position] = (places - padding).clamp_min(0)
        if "cache_position" in inputs:
            inputs["cache_position"] = places[-1:]
        fed = 1 if inputs.get("use_cache") else None
        output = foreign.call(foreign.prepare(self._ids, inputs, fed, False))
        self._past = foreign.update(output, inputs, 1).get(foreign.cache_name)
        return foreign.logits(output)[:, -1].to(device)


def feed_together(rows: Items[Member], tokens: Items[int]) -> Tensor:
    """Feed each row its next token, in one forward; logits `[rows, vocab]`."""
    cohort = rows[0].cohort
    if not cohort.made_of(rows):
        cohort = Cohort.gather(rows)
    column = [0] * len(rows)
    for row, token in zip(rows, tokens, strict=True):
        column[row.place] = token
    logits = cohort.feed(column)
    if logits.shape[0] != len(rows):
        raise Unsupported(
            f"a module that gives {logits.shape[0]} rows of logits for {len(rows)} is for generate() alone"
        )
    return logits[torch.tensor([row.place for row in rows], device=logits.device)]


def _only_states(past: Cache) -> bool:
    return all(isinstance(layer, RecurrentLayer) for layer in past.layers)
