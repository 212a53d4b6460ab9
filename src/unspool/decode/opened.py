"""Rows that begin each by itself, of a module that keeps its past in its own way; the store only counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence as Items
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from unspool.cache.held import bytes_held
from unspool.cache.layout import LayerGroup
from unspool.cache.paged import PagedStore, Row
from unspool.config import GenerationConfig
from unspool.decode.runner import Output, Runner
from unspool.decode.sequence import Sequence, Want, Work
from unspool.models.adapters import Adapters
from unspool.models.base import ModelSpec

__all__ = ["BesideRunner", "Ledger", "OpenRow", "OpenedRunner", "Opener", "Together"]


Together: TypeAlias = Literal["any", "equal", "none"]
"""Rows that can be fed in one forward: of any lengths, of one length, or only one."""


class OpenRow(ABC):
    """A row that has begun, with the module's past of it.

    Attributes:
        joins: it may be fed in one forward with others, as `Opener.together` says; else only by itself.
    """

    joins: bool

    @abstractmethod
    def feed(self, item: Work) -> Tensor:
        """Feed what is new of a row's tokens; logits `[1, vocab]` of what follows."""

    @abstractmethod
    def fork(self) -> OpenRow:
        """Another one with the same past, of its own."""

    @property
    @abstractmethod
    def held(self) -> list[Any]:
        """What holds tensors of its past, with what an encoder made for it; of rows fed together it is the same."""


class Opener(ABC):
    """A module that opens rows each by itself, as front ends know it.

    Attributes:
        spec: its shape; it has no layer groups, since nothing of it is in a store of ours.
        width: of the logits; `None` where the module does not say.
        adapters: none.
        device: of logits.
    """

    spec: ModelSpec
    width: int | None
    adapters: Adapters
    device: torch.device

    @abstractmethod
    def read(
        self, ids: list[int] | None, inputs: Mapping[str, Any], config: GenerationConfig
    ) -> tuple[list[int], Mapping[str, Any] | None]:
        """A request's tokens, those of the decoder where there is an encoder, and the `inputs` of its rows.

        Args:
            ids: its `input_ids`, or `None`.
            inputs: what else the module is told of this request, by the names that its `forward` has.
            config: the request's.

        Raises:
            ValueError, TypeError: something is missing, or the module has no use for it.
            Unsupported: what only a whole call can take.
        """

    @abstractmethod
    def open(self, row: Sequence) -> OpenRow:
        """Make a row ready to be fed all the tokens it has."""

    @property
    @abstractmethod
    def together(self) -> Together:
        """Which open rows can be fed in one forward, with what they get by themselves but for rounding."""

    @abstractmethod
    def feed(self, rows: list[OpenRow], work: list[Work]) -> Tensor:
        """Feed each of some open rows its next token, in one forward; logits `[rows, vocab]`."""


class Ledger(PagedStore):
    """A store that also holds the pasts of open rows, which fill no blocks and are counted as if they did.

    So they are scheduled as all others. What they take of memory is looked at, and bounds how many begin.

    Attributes:
        opened: pasts by row.
        faults: why a row has no logits.
        most_bytes: that pasts should take.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.opened: dict[Row, OpenRow] = {}
        self.faults: dict[Row, str] = {}
        self.most_bytes: float = math.inf
        self._each = 0.0  # bytes of a past, at most so far

    def past_bytes(self) -> int:
        """Bytes that the pasts of open rows take."""
        return bytes_held(one for past in list(self.opened.values()) for one in past.held)

    def share_held(self, more: int = 0) -> float:
        """The same as a share of what they should take, with so many more pasts as large as any so far."""
        held = self.past_bytes()
        self._each = max(self._each, held / len(self.opened) if self.opened else 0.0)
        return (held + more * self._each) / self.most_bytes

    @property
    def opens_all(self) -> bool:
        """Whether every row is opened, since no layer keeps anything in the blocks."""
        return not any(group.layers for group in self.groups)

    @classmethod
    def empty(cls, blocks: int, device: torch.device) -> Ledger:
        """One of `blocks` blocks that hold nothing, for a module all of whose rows are opened."""
        return cls((LayerGroup((), 0, 0),), blocks, dtype=torch.float32, device=device)

    def release(self, row: Row) -> None:
        """See `PagedStore`; the row's past goes too, and is computed again when the row comes back."""
        super().release(row)
        self.opened.pop(row, None)
        self.faults.pop(row, None)


class OpenedRunner:
    """See `decode.runner.Runner`.

    A row is opened when it first chooses, with all its tokens; chunks of a prompt before that are only counted. Open
    rows are fed together, where the module allows it. One whose computing raises gets NaN for logits, so that it fails
    alone.

    Args:
        model: opens rows.
        ledger: knows which are open.
        alone: feed each row by itself, so that what it gets is the same bits whatever else is in the step.
    """

    def __init__(self, model: Opener, ledger: Ledger, *, alone: bool = False) -> None:
        self._model = model
        self._ledger = ledger
        self._alone = alone
        self._width = model.width

    def run(self, work: list[Work], want: Want) -> Output:
        """See `Runner`; nothing besides logits can be had."""
        kept = [item for item in work if item.keep]
        found = self._feed_together(kept)
        error: Exception | None = None
        begun: dict[tuple[int, ...], tuple[Sequence, Tensor]] = {}  # rows of one group that were opened in this step
        for item in kept:
            if item.seq in found:
                continue
            try:
                found[item.seq] = self._feed(item, begun)
            except Exception as raised:
                error = raised
                self._ledger.faults[item.seq] = f"its forward raised {raised!r}"
        self._width = next((one.shape[1] for one in found.values()), self._width)
        if error is not None and self._width is None:
            raise error
        lost = torch.full((1, self._width or 0), float("nan"), dtype=torch.float32, device=self._model.device)
        parts = [found.get(item.seq, lost) for item in kept]
        return Output(torch.cat(parts) if parts else lost[:0], [], [])

    def _feed_together(self, work: list[Work]) -> dict[Sequence, Tensor]:
        """Logits of the rows that are open, where they can be fed in one forward."""
        opened = self._ledger.opened
        ready = [item for item in work if item.seq in opened and opened[item.seq].joins]
        if self._alone or len(ready) < 2 or self._model.together == "none":
            return {}
        parts: dict[int, list[Work]] = {}
        for item in ready:
            parts.setdefault(item.seq.known if self._model.together == "equal" else 0, []).append(item)
        found: dict[Sequence, Tensor] = {}
        for part in parts.values():
            try:
                logits = self._model.feed([opened[item.seq] for item in part], part)
            except Exception:  # each is opened again, and the one whose fault it was is found
                for item in part:
                    del opened[item.seq]
            else:
                found |= {item.seq: line[None] for item, line in zip(part, logits, strict=True)}
        return found

    def _feed(self, item: Work, begun: dict[tuple[int, ...], tuple[Sequence, Tensor]]) -> Tensor:
        """Logits of what follows one row; rows that begin with the same tokens, as beams do, are opened once."""
        opened, row = self._ledger.opened, item.seq
        if row in opened:
            return opened[row].feed(item)
        key = (id(item.group), *row.tokens) if len(item.group.rows) > 1 else ()
        if key in begun:
            twin, logits = begun[key]
            opened[row] = opened[twin].fork()
            return logits
        past = self._model.open(row)
        logits = past.feed(item)
        opened[row] = past
        if key:
            begun[key] = row, logits
        return logits

    def fork(self, rows: Items[Sequence], parents: Items[int]) -> None:
        """See `Runner`. A past goes to one of the rows that continue it, and the others get copies."""
        self._ledger.reparent(rows, parents)
        opened = self._ledger.opened
        before = [opened.get(row) for row in rows]
        taken = {parent for i, parent in enumerate(parents) if parent == i}
        for i, parent in enumerate(parents):
            past = before[parent]
            if parent == i or past is None:
                continue
            opened[rows[i]] = past.fork() if parent in taken else past
            taken.add(parent)

    def rewind(self, row: Sequence, tokens: int) -> None:
        """See `Runner`: nothing here drafts."""
        raise AssertionError("rows that are computed by themselves are not drafted for")

    def retire(self, ended: Items[Sequence], live: Items[Sequence]) -> None:
        """See `Runner`."""
        for row in ended:
            self._ledger.release(row)

    def fault(self, row: Sequence) -> str:
        """Say why a row has no token to choose, for an error message."""
        return self._ledger.faults.get(row) or (
            f"the logits of {self._model.spec.family} are not finite, or a logits processor left no token to choose"
        )


class BesideRunner:
    """See `decode.runner.Runner`: rows that are told more than tokens are opened, beside those that a store serves.

    Args:
        paged: runs the others.
        opened: runs those with `Sequence.inputs`.
    """

    def __init__(self, paged: Runner, opened: OpenedRunner) -> None:
        self._paged = paged
        self._opened = opened

    def _of(self, row: Sequence) -> Runner:
        return self._paged if row.inputs is None else self._opened

    def run(self, work: list[Work], want: Want) -> Output:
        """See `Runner`."""
        told = [item for item in work if item.seq.inputs is not None]
        if len(told) in (0, len(work)):
            return (self._opened if told else self._paged).run(work, want)
        apart = self._opened.run(told, want).logits
        stored = self._paged.run([item for item in work if item.seq.inputs is None], want).logits
        seen, read = iter(apart), iter(stored)
        kept = [next(read if item.seq.inputs is None else seen) for item in work for _ in range(item.keep)]
        # nothing else is wanted of modules that are not ours; of parts of prompts alone, not even logits
        return Output(torch.stack(kept) if kept else stored[:0], [], [])

    def fork(self, rows: Items[Sequence], parents: Items[int]) -> None:
        """See `Runner`."""
        self._of(rows[0]).fork(rows, parents)

    def rewind(self, row: Sequence, tokens: int) -> None:
        """See `Runner`."""
        self._of(row).rewind(row, tokens)

    def retire(self, ended: Items[Sequence], live: Items[Sequence]) -> None:
        """See `Runner`."""
        self._opened.retire(ended, live)  # the store is one

    def fault_finder(self, paged: Callable[[Sequence], str]) -> Callable[[Sequence], str]:
        """What says why a row has no token to choose; `paged` says so of those that the store serves."""
        return lambda row: paged(row) if row.inputs is None else self._opened.fault(row)
