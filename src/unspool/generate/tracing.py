"""Attentions and hidden states of a static call, in transformers' shapes, of rows in step and of rows with drafts."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from unspool.decode.sequence import Want, Work


class Tracer:
    """Turns what the loop's watch reports into transformers' shapes, per step and layer.

    Hidden states become `[rows, queries, hidden]` and attentions `[rows, heads, queries, keys]`; a row's true tokens
    stand at the right end, and what would be padding is zero.

    Args:
        rows: rows of the call.
        copies: rows that share each prompt; where only the first of them is fed, it stands for all.
        heads, hidden: whether to keep attentions, hidden states.
    """

    def __init__(self, rows: int, copies: int, heads: bool, hidden: bool) -> None:
        self.attentions: list[tuple[Tensor, ...]] | None = [] if heads else None
        self.hidden_states: list[tuple[Tensor, ...]] | None = [] if hidden else None
        self.want = Want(heads, None if hidden else frozenset())
        self._rows = rows
        self._copies = copies
        self._chunks: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        self._begun = False

    def __call__(self, work: list[Work], weights: list[list[Tensor]], hidden: list[Tensor]) -> None:
        """Take one step's attention weights (per layer, per row) and hidden states (per layer)."""
        order = [self._places(item.seq.row, work) for item in work]
        feeds = [item.feed for item in work]
        heads = tuple(self._pad_weights(layer, order) for layer in weights) if self.want.weights else ()
        states = tuple(self._pad_hidden(layer, order, feeds) for layer in hidden) if self.want.layers is None else ()
        self._chunks.append((heads, states))
        if not all(item.keep for item in work):
            return
        chunks, self._chunks = self._chunks, []
        if self._begun:  # of a row that had to be computed anew, the newest token alone
            chunks = [
                (tuple(w[:, :, -1:] for w in heads), tuple(h[:, -1:] for h in states)) for heads, states in chunks
            ]
        self._begun = True
        if self.attentions is not None:
            self.attentions.append(tuple(_join_weights(layer) for layer in zip(*(c[0] for c in chunks), strict=True)))
        if self.hidden_states is not None:
            self.hidden_states.append(tuple(torch.cat(layer, 1) for layer in zip(*(c[1] for c in chunks), strict=True)))

    def _places(self, row: int, work: list[Work]) -> slice:
        """The rows that what is seen of `row` is for."""
        leaders = all(item.seq.row % self._copies == 0 for item in work)
        return slice(row, row + (self._copies if leaders else 1))

    def _pad_weights(self, layer: list[Tensor], order: list[slice]) -> Tensor:
        queries = max(row.shape[1] for row in layer)
        keys = max(row.shape[2] for row in layer)
        out = layer[0].new_zeros(self._rows, layer[0].shape[0], queries, keys)
        for places, row in zip(order, layer, strict=True):
            out[places, :, queries - row.shape[1] :, keys - row.shape[2] :] = row
        return out

    def _pad_hidden(self, layer: Tensor, order: list[slice], feeds: list[int]) -> Tensor:
        out = layer.new_zeros(self._rows, max(feeds), layer.shape[-1])
        for places, row in zip(order, torch.split(layer, feeds), strict=True):
            out[places, out.shape[1] - row.shape[0] :] = row
        return out


class _Seen(NamedTuple):
    """What was seen of a row: by layer, weights `[heads, queries, keys]` and hidden `[queries, hidden]`."""

    weights: list[Tensor]
    hidden: list[Tensor]

    def upto(self, end: int) -> _Seen:
        """Of the first `end` queries, with the keys that were there for the last of them."""
        return _Seen(
            [layer[:, :end, : layer.shape[2] - layer.shape[1] + end] for layer in self.weights],
            [layer[:end] for layer in self.hidden],
        )

    def last(self, windows: Items[int | None]) -> _Seen:
        """Of the last query alone, with the keys that it may see."""
        return _Seen(
            [
                layer[:, -1:, max(0, layer.shape[2] - (window or layer.shape[2])) :]
                for layer, window in zip(self.weights, windows, strict=False)
            ],
            [layer[-1:] for layer in self.hidden],
        )


class DraftTracer:
    """The same for rows that get any number of tokens in a step: one entry for each token, as if they came one by one.

    Past a row's end, entries are zero.

    Args:
        rows, copies, heads, hidden: as of `Tracer`.
        windows: for each layer how many keys a query sees at most, or `None` for all.
    """

    def __init__(self, rows: int, copies: int, heads: bool, hidden: bool, windows: Items[int | None]) -> None:
        self.want = Want(heads, None if hidden else frozenset())
        self._copies = copies
        self._windows = windows
        self._prompts: list[list[_Seen]] = [[] for _ in range(rows)]
        self._steps: list[list[_Seen]] = [[] for _ in range(rows)]
        self._fed: dict[int, tuple[_Seen, int]] = {}

    def __call__(self, work: list[Work], weights: list[list[Tensor]], hidden: list[Tensor]) -> None:
        """Take one step's attention weights (per layer, per row) and hidden states (per layer)."""
        self._fed = {}
        first = 0
        for place, item in enumerate(work):
            seen = _Seen(
                [layer[place] for layer in weights] if self.want.weights else [],
                [layer[first : first + item.feed] for layer in hidden] if self.want.layers is None else [],
            )
            first += item.feed
            if item.keep:
                self._fed[item.seq.row] = (seen, item.feed - item.keep)
            else:
                self._prompts[item.seq.row].append(seen)

    def took(self, row: int, tokens: int) -> None:
        """Keep what the first `tokens` choices of the last step were made from."""
        source = row if row in self._fed else row - row % self._copies
        seen, before = self._fed[source]
        steps = self._steps[row]
        for place in range(before, before + tokens):
            known = seen.upto(place + 1)
            # the first choice is made from all of the prompt
            steps.append(known.last(self._windows) if steps else _joined([*self._prompts[source], known]))

    @property
    def attentions(self) -> list[tuple[Tensor, ...]] | None:
        """Per step and layer `[rows, heads, queries, keys]`, or `None`."""
        return self._stacked([[seen.weights for seen in row] for row in self._steps]) if self.want.weights else None

    @property
    def hidden_states(self) -> list[tuple[Tensor, ...]] | None:
        """Per step and layer `[rows, queries, hidden]`, or `None`."""
        if self.want.layers is not None:
            return None
        return self._stacked([[seen.hidden for seen in row] for row in self._steps])

    def _stacked(self, rows: list[list[list[Tensor]]]) -> list[tuple[Tensor, ...]]:
        """What rows have by step and layer, as one rectangle for each step and layer."""
        found = []
        for step in range(max(map(len, rows))):
            here = [row[step] if step < len(row) else None for row in rows]
            layers = len(next(parts for parts in here if parts is not None))
            found.append(tuple(_at_the_end([None if p is None else p[layer] for p in here]) for layer in range(layers)))
        return found


def _joined(chunks: list[_Seen]) -> _Seen:
    """Chunks of a prompt as one."""
    return _Seen(
        [_join_weights(layer) for layer in zip(*(chunk.weights for chunk in chunks), strict=True)],
        [torch.cat(layer) for layer in zip(*(chunk.hidden for chunk in chunks), strict=True)],
    )


def _at_the_end(rows: Items[Tensor | None]) -> Tensor:
    """Tensors `[queries, hidden]` or `[heads, queries, keys]` in one, at its right end; zeros around and for `None`."""
    some = [row for row in rows if row is not None]
    shape = [max(row.shape[axis] for row in some) for axis in range(some[0].ndim)]
    out = some[0].new_zeros(len(rows), *shape)
    for place, row in enumerate(rows):
        if row is not None:
            ends = [slice(size - own, None) for size, own in zip(shape, row.shape, strict=True)]
            out[place][tuple(ends)] = row
    return out


def _join_weights(chunks: Items[Tensor]) -> Tensor:
    """Chunks of one prompt's attention `[..., queries, keys]` under each other.

    Later chunks see more keys; behind a window they begin later too. Each ends with its own newest key.
    """
    behind = [sum(later.shape[-2] for later in chunks[place + 1 :]) for place in range(len(chunks))]
    keys = max(chunk.shape[-1] + right for chunk, right in zip(chunks, behind, strict=True))
    pads = [(keys - chunk.shape[-1] - right, right) for chunk, right in zip(chunks, behind, strict=True)]
    return torch.cat([torch.nn.functional.pad(chunk, pad) for chunk, pad in zip(chunks, pads, strict=True)], dim=-2)
