"""From work to logits: the seam between the loop and whatever computes, and the runner of native models."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unspool.attention.registry import paged_attention, reads_any_order
from unspool.cache.paged import BLOCK_SIZE, PagedStore
from unspool.decode.batch import Steady, build_batch
from unspool.decode.sequence import Sequence, Want, Work
from unspool.kernels.program import Chosen, Stops
from unspool.models.adapters import Adapter, Adapters, Mixer
from unspool.models.base import Batch, Model, ModelSpec, Trace

_NOTHING = Want()


@dataclass(slots=True)
class Output:
    """What one step computed.

    Attributes:
        logits: `[kept, vocab]` in the order of the work.
        weights: per layer and item of work, attention weights `[heads, queries, keys]`, if they were asked for.
        hidden: per layer (embeddings first), `[tokens, hidden]` in the order of the work, if they were asked for; empty
            tensors for layers that nobody wants.
    """

    logits: Tensor
    weights: list[list[Tensor]]
    hidden: list[Tensor]


class Runner(Protocol):
    """Computes tokens of rows, and keeps what their later tokens need.

    The loop counts what is computed (`Sequence.computed`); a runner reads it, and sets it where it forks or rewinds.
    """

    def run(self, work: list[Work], want: Want) -> Output:
        """Feed the work; make room for it first. Give what is wanted besides logits."""
        ...

    def fork(self, rows: Items[Sequence], parents: Items[int]) -> None:
        """Make what is stored of `rows[i]` that of `rows[parents[i]]`, and its `computed` too."""
        ...

    def rewind(self, row: Sequence, tokens: int) -> None:
        """Forget all but the first `tokens` computed tokens of a row."""
        ...

    def retire(self, ended: Items[Sequence], live: Items[Sequence]) -> None:
        """Let go of what rows that ended have stored; `live` are the rows of their group that go on."""
        ...


class Steps(Protocol):
    """The part of a model a `PagedRunner` uses: true tokens in, logits out, keys and values through `batch.attend`."""

    spec: ModelSpec

    def step(self, batch: Batch) -> Tensor:
        """Logits of the kept tokens, `[kept, vocab]`."""
        ...


class Decoder(Steps, Protocol):
    """A model whose keys and values a paged store can keep, as front ends know it: a native one, or a ragged module.

    Attributes:
        adapters: low-rank adapters that rows can name.
    """

    adapters: Adapters

    @property
    def device(self) -> torch.device:
        """Of keys, values and logits."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        ...


class PagedRunner:
    """Runs a model over a paged store.

    Args:
        model: gives logits.
        store: keys and values.
        device: of both.
        rows: every row that may have blocks, when the runner makes room and may enlarge the store for them; without
            it, the scheduler has made room.
        forks: rows refer to blocks of others, rather than having places of their own in the store.
        alike: rows that go on to refer to the same blocks, but for the one being filled.
    """

    def __init__(
        self,
        model: Steps,
        store: PagedStore,
        device: torch.device,
        rows: list[Sequence] | None = None,
        *,
        forks: bool = False,
        alike: int = 1,
    ) -> None:
        self.model = model
        self.store = store
        self.device = device
        self._rows = rows
        self._forks = forks
        self._alike = alike
        self._mixer = Mixer()
        self._steady: Steady | None = None

    def run(self, work: list[Work], want: Want) -> Output:
        """See `Runner`."""
        if self._rows is not None:
            for item in work:
                self._make_room(item.seq, item.feed, self._rows)
        if self._steady is not None:
            steady = None if want != _NOTHING else self._steady.next(work, self.device)
            if steady is not None:
                return Output(self.model.step(steady), [], [])
            self._steady = None
        order = list(range(len(work)))
        weights: list[list[Tensor]] | None = [] if want.weights else None
        hidden = Trace(want.layers) if want.layers is None or want.layers else None
        if weights is None and hidden is None and not self._forks and not reads_any_order(self.store):
            order.sort(key=lambda i: work[i].seq.blocks[0][0])  # so that attention finds neighbours side by side
        batch = build_batch(work, order, self.store, self.model.spec, self.device, self._mixer, weights, hidden)
        if weights is None:
            self._steady = Steady.of(work, batch)
        return Output(self.model.step(batch), weights or [], hidden or [])

    def go_on(self, rows: Items[Sequence], stops: Stops) -> list[Chosen]:
        """Let rows choose their next tokens by themselves, the likeliest; see `Model.go_on`.

        Each has few tokens that are not computed yet. What they choose is the caller's to append. Nothing is chosen
        where the model or its kernels cannot do this.
        """
        model, fed = self.model, [row.tokens[row.computed :] for row in rows]
        steps = max(map(len, fed)) - 1 + max(stops.limits)
        if not isinstance(model, Model) or not reads_any_order(self.store):
            return []
        if any(row.adapter is not None or row.embeds is not None for row in rows):
            return []
        if self._rows is None:  # room is made by a scheduler, which does not know of these steps
            return []
        for row in rows:
            self._make_room(row, steps, self._rows)
        self._steady = None
        attend = paged_attention(self.store, rows, [1] * len(rows))
        went = model.go_on(attend, fed, [row.computed for row in rows], stops)
        if went is None:
            return []
        chosen, done = went
        for row in rows:
            row.computed += done
        return chosen

    def _make_room(self, row: Sequence, feed: int, rows: list[Sequence]) -> None:
        if self.store.extend(row, feed):
            return
        tokens = row.computed + feed
        # twice as much, which the blocks of one row are for all that are alike
        self.store.enlarge([other for other in rows if other.blocks], tokens + tokens // self._alike)
        made = self.store.extend(row, feed)
        assert made, "enlarge makes room for every row"

    def fork(self, rows: Items[Sequence], parents: Items[int]) -> None:
        """See `Runner`."""
        if self._forks:
            self.store.reparent(rows, parents)
            return
        for parent in dict.fromkeys(parents):
            self.store.copy(rows[parent], [row for i, row in enumerate(rows) if parents[i] == parent != i])

    def rewind(self, row: Sequence, tokens: int) -> None:
        """See `Runner`; blocks stay with the row, which is about to fill them again."""
        row.computed = min(row.computed, tokens)

    def retire(self, ended: Items[Sequence], live: Items[Sequence]) -> None:
        """See `Runner`. PyTorch's attention reads live rows as one rectangle, so they move together for it."""
        if self._forks or reads_any_order(self.store):
            for row in ended:
                self.store.release(row)
        else:
            self.store.compact(live, ended)


@torch.no_grad()
def logits_alone(
    model: Decoder, tokens: list[int], adapter: Adapter | None, trace: list[Tensor] | None = None
) -> Tensor:
    """Logits `[1, vocab]` of what follows a text, computed by itself and not kept; `trace` as in `Batch`."""
    count, device = len(tokens), model.device
    ids = torch.tensor(tokens, device=device)
    store = PagedStore(model.spec.groups, -(-count // BLOCK_SIZE), dtype=model.dtype, device=device)
    row = Sequence(0, tokens)
    store.reserve(row, count)
    batch = Batch(
        tokens=ids,
        positions=torch.arange(count, device=device),
        attend=paged_attention(store, [row], [count]),
        keep=torch.tensor([count - 1], device=device),
        extents=torch.full_like(ids, count) if model.spec.needs_extents else None,
        trace=trace,
        adapters=Mixer().select([adapter], [count], device),
    )
    return model.step(batch)
