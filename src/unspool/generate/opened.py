"""A foreign module that runs in rows, for rows that come and go: opened one by one, and fed together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from unspool.bridge.cohort import Cohort, Member, feed_together
from unspool.bridge.module import CACHE_NAMES
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

# Inputs that are of a call, not of a request.
_WHOLE_CALLS = (
    "cache_position",
    "use_cache",
    "labels",
    "decoder_inputs_embeds",
    "position_ids",
    "decoder_position_ids",
)


class RowsModel(Opener):
    """See `Opener`.

    Args:
        source: reads the module's inputs.
        width: of the logits, where that is known better than the module says.
        makes_its_start: the module's own `generate()` chooses what the decoder begins with.
    """

    def __init__(self, source: ForeignSource, width: int | None = None, *, makes_its_start: bool = False) -> None:
        self.foreign = source.foreign
        self.device = source.device
        self.adapters = Adapters()
        self.width = width or source.vocab_size
        self._source = source
        self._makes_its_start = makes_its_start
        self.spec = ModelSpec(
            family=type(source.module).__name__,
            vocab_size=int(self.width or _UNBOUNDED),
            hidden_size=0,
            heads=0,
            groups=(),
            max_positions=source.max_positions or _UNBOUNDED,
            needs_extents=True,  # for all we know, what comes of a token depends on all of its row
        )

    def read(
        self, ids: list[int] | None, inputs: Mapping[str, Any], config: GenerationConfig
    ) -> tuple[list[int], Mapping[str, Any] | None]:
        """See `Opener`."""
        foreign, name = self.foreign, type(self.foreign.module).__name__
        told = {key: value for key, value in inputs.items() if value is not None}
        foreign.check(dict(told))
        for key in told.keys() & {*CACHE_NAMES, *_WHOLE_CALLS}:
            raise Unsupported(
                f"{key} is for generate() alone: a manager keeps the past of {name} and counts its tokens"
            )
        if foreign.encoder_decoder:
            return self._read_encoder(ids, told, config)
        if "inputs_embeds" in told:
            raise Unsupported("inputs_embeds is for generate() alone: requests are counted in tokens")
        if ids is None:
            if not told or config.bos_token_id is None:
                raise ValueError(f"input_ids is missing; {name} continues tokens, so a request needs at least one")
            ids = [int(config.bos_token_id)]
        return (ids, {**told, "input_ids": ids}) if told else (ids, None)

    def _read_encoder(
        self, ids: list[int] | None, told: dict[str, Any], config: GenerationConfig
    ) -> tuple[list[int], Mapping[str, Any]]:
        """What the encoder reads is an input, and what the decoder begins with are the tokens."""
        foreign = self.foreign
        main = getattr(foreign.module, "main_input_name", "input_ids")
        if ids is not None:
            told["input_ids"] = ids
        read = [key for key in dict.fromkeys((main, "input_ids", "inputs_embeds", "encoder_outputs")) if key in told]
        if not read:
            raise ValueError(f"{main} is missing; it is what the encoder of {type(foreign.module).__name__} reads")
        value = told[read[0]]
        if isinstance(value, Tensor) and value.shape[:1] != (1,):
            raise ValueError(
                f"{read[0]} is {list(value.shape)}, and a request is one row: [1, ...]; add one request for each row"
            )
        mask = told.pop("decoder_attention_mask", None)
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ValueError("decoder_attention_mask leaves out tokens of decoder_input_ids; leave them out yourself")
        begin = told.pop("decoder_input_ids", None)
        if begin is None and self._makes_its_start:
            raise Unsupported(
                f"{type(foreign.module).__name__} chooses in its own generate() what the decoder begins with (its "
                "language or task); pass that as decoder_input_ids, to be continued plainly, or call generate()"
            )
        own = {} if begin is None else {"decoder_input_ids": torch.as_tensor(begin, device=self.device).view(1, -1)}
        their = foreign.their_config(config, True, 1)
        start, _ = self._source.decoder_ids(1, read[0], own, config, their)
        tokens: list[int] = start[0].tolist()
        return tokens, told

    def open(self, row: Sequence) -> _Row:
        """See `Opener`; runs the encoder, where there is one."""
        config = resolve({}, None, getattr(self.foreign.module, "generation_config", None)).config
        config.use_cache, config.cache_implementation = True, None
        config.return_dict_in_generate = config.output_attentions = config.output_hidden_states = False
        inputs = dict(row.inputs or {})
        encoder = self.foreign.encoder_decoder
        # What was told of a prompt is of its length: tokens after it are fed one by one, as they were before.
        tokens = row.tokens if encoder or row.inputs is None else inputs.pop("input_ids")
        ids = inputs.pop("input_ids", None) if encoder else tokens
        if ids is not None:
            inputs["input_ids"] = torch.tensor([ids], device=self.device)
            if self.foreign.accepts("attention_mask"):
                # all are true tokens, also those that could be padding
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if encoder:
            config.decoder_start_token_id = row.tokens[0]
            inputs["decoder_input_ids"] = torch.tensor([row.tokens], device=self.device)
        backend = self._source.read_rows(Arguments(None, inputs), config, 1).backend
        own = Sequence(0, tokens)
        runner = backend.runner([own], 1, 1, None, forks=False)
        assert isinstance(runner, RowsRunner)
        return _Row(runner, own, joins=row.inputs is None or (encoder and row.inputs.keys() <= {"input_ids"}))

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
        joins: see `OpenRow`; what can be put together was looked at with texts.
        member: among rows that are fed together.
    """

    def __init__(self, runner: RowsRunner | None, row: Sequence, *, joins: bool, member: Member | None = None) -> None:
        self._runner = runner
        self._row = row
        self.joins = joins
        self._member = member

    def feed(self, item: Work) -> Tensor:
        """See `OpenRow`."""
        if self._runner is None:
            return feed_together([self.member()], [self.take(item)])
        row, tokens = self._row, item.seq.tokens
        for known in range(row.computed + 1 if row.computed else len(row.tokens), len(tokens) + 1):
            row.tokens = tokens if known == len(tokens) else tokens[:known]
            logits = self._runner.run([Work(row, known - row.computed, 1, item.group)], Want()).logits
            row.computed = known
        if logits.shape[0] != 1:
            raise Unsupported(f"a module that gives {logits.shape[0]} rows of logits for one is for generate() alone")
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

    @property
    def held(self) -> list[Any]:
        """See `OpenRow`."""
        runner, member = self._runner, self._member  # in one look: a step may be under way
        if member is not None:
            return member.cohort.held
        return [] if runner is None else [runner.inputs, runner.ids]

    def fork(self) -> OpenRow:
        """See `OpenRow`."""
        row = Sequence(0, self._row.tokens, computed=self._row.computed)
        if self._member is not None:
            return _Row(None, row, joins=self.joins, member=self._member.fork())
        assert self._runner is not None
        return _Row(self._runner.copy([row]), row, joins=self.joins)
