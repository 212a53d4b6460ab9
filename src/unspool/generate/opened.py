"""A foreign module that runs in rows, for rows that come and go: opened one by one, and fed together."""

from __future__ import annotations

from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from unspool.bridge.cohort import Cohort, Member, feed_together
from unspool.bridge.probe import judge_together
from unspool.bridge.rows import RowsRunner
from unspool.config import GenerationConfig, resolve
from unspool.decode.opened import Opener, OpenRow, Together
from unspool.decode.sequence import Sequence, Want, Work
from unspool.errors import Unsupported
from unspool.generate.foreign import ForeignSource
from unspool.generate.reading import Arguments
from unspool.models.adapters import Adapters
from unspool.models.base import ModelSpec

__all__ = ["RowsModel"]

_UNBOUNDED = 2**31  # tokens, or positions, of a module that names no number


class RowsModel(Opener):
    """See `Opener`.

    Args:
        source: reads the module's inputs.
    """

    def __init__(self, source: ForeignSource) -> None:
        self.foreign = source.foreign
        self.device = source.device
        self.adapters = Adapters()
        self._source = source
        self.spec = ModelSpec(
            family=type(source.module).__name__,
            vocab_size=int(source.vocab_size or _UNBOUNDED),
            hidden_size=0,
            heads=0,
            groups=(),
            max_positions=source.max_positions or _UNBOUNDED,
            needs_extents=True,  # for all we know, what comes of a token depends on all of its row
        )

    def prefix(self, config: GenerationConfig) -> list[int] | None:
        """See `Opener`."""
        if not self.foreign.encoder_decoder:
            return None
        their = self.foreign.their_config(config, True, 1)
        ids, _ = self._source.decoder_ids(1, "input_ids", {}, config, their)
        tokens: list[int] = ids[0].tolist()
        return tokens

    def open(self, row: Sequence) -> _Row:
        """See `Opener`; runs the encoder, where there is one."""
        config = resolve({}, None, getattr(self.foreign.module, "generation_config", None)).config
        config.use_cache, config.cache_implementation = True, None
        config.return_dict_in_generate = config.output_attentions = config.output_hidden_states = False
        ids = torch.tensor([row.tokens if row.encoded is None else row.encoded], device=self.device)
        inputs = {"input_ids": ids}
        if self.foreign.accepts("attention_mask"):
            inputs["attention_mask"] = torch.ones_like(ids)  # all are true tokens, also those that could be padding
        if row.encoded is not None:
            config.decoder_start_token_id = row.tokens[0]
            inputs["decoder_input_ids"] = torch.tensor([row.tokens], device=self.device)
        backend = self._source.read_rows(Arguments(None, inputs), config, 1).backend
        own = Sequence(0, row.tokens)
        runner = backend.runner([own], 1, 1, None, forks=False)
        assert isinstance(runner, RowsRunner)
        return _Row(runner, own)

    @cached_property
    def together(self) -> Together:
        """See `Opener`."""
        return judge_together(self.foreign, self).lengths

    def feed(self, rows: list[OpenRow], work: list[Work]) -> Tensor:
        """See `Opener`."""
        mine = [cast(_Row, row) for row in rows]
        tokens = [row.take(item) for row, item in zip(mine, work, strict=True)]
        return feed_together([row.member() for row in mine], tokens)


class _Row(OpenRow):
    """See `OpenRow`: a rectangle of one row, and later a member of a rectangle of many.

    Args:
        runner: of its own rectangle; `None` once it is a member.
        row: its row there, which has the tokens of the request's one.
        member: among rows that are fed together.
    """

    def __init__(self, runner: RowsRunner | None, row: Sequence, member: Member | None = None) -> None:
        self._runner = runner
        self._row = row
        self._member = member

    def feed(self, item: Work) -> Tensor:
        """See `OpenRow`."""
        if self._runner is None:
            return feed_together([self.member()], [self.take(item)])
        row = self._row
        row.tokens = item.seq.tokens
        logits = self._runner.run([Work(row, len(row.tokens) - row.computed, 1, item.group)], Want()).logits
        if logits.shape[0] != 1:
            raise Unsupported(f"a module that gives {logits.shape[0]} rows of logits for one is for generate() alone")
        row.computed = len(row.tokens)
        return logits

    def take(self, item: Work) -> int:
        """The token that is to be fed next, which then counts as computed."""
        row = self._row
        row.tokens = item.seq.tokens
        assert row.computed == len(row.tokens) - 1, "an open row is fed one token a step"
        row.computed += 1
        return row.tokens[-1]

    def member(self) -> Member:
        """The row among others."""
        if self._member is None:
            assert self._runner is not None
            self._member, self._runner = Member(Cohort.of(self._runner), 0), None
        return self._member

    def fork(self) -> OpenRow:
        """See `OpenRow`."""
        row = Sequence(0, self._row.tokens, computed=self._row.computed)
        if self._member is not None:
            return _Row(None, row, self._member.fork())
        assert self._runner is not None
        return _Row(self._runner.copy([row]), row)
