"""The grammar mask as a logits processor."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from unspool.errors import RequestFailed
from unspool.logits.base import LogitsProcessor
from unspool.logits.grammar.matching import Exhausted, Matching
from unspool.logits.grammar.vocabulary import Grammar
from unspool.logits.ops import NEG_INF

# Scores of forced tokens where other beams go on. A beam search takes -1e9 for what must not be taken: a finished text
# with less is no result.
_POOR = -1e6
_HOPELESS = -1e30


class GrammarLogitsProcessor(LogitsProcessor):
    """Allow only tokens with which the generated text can still become one of the grammar's.

    An end token is allowed where the text is complete, and alone where nothing else can follow. Where other processors
    have banned all that the grammar allows, the allowed tokens are equally likely instead: the grammar wins. Among
    beams such a row gets so low a score that the others go first, and one that has ended gets one with which it never
    becomes a result, as long as another row of its prompt goes on.

    Belongs after processors that change scores and before those that choose among them, such as top-k.

    Args:
        grammar: from `compile_structure`.
        prompt_length: columns of `input_ids` that were not generated.
        num_beams: rows of each prompt, side by side.
        num_beam_groups: groups of them that compete, each processed by a call of its own.

    Raises:
        RequestFailed: (when called) following the grammar became too complex.
    """

    reads_history = True
    row_independent = True

    def __init__(self, grammar: Grammar, prompt_length: int, num_beams: int = 1, num_beam_groups: int = 1) -> None:
        self._grammar = grammar
        self._prompt_length = prompt_length
        self._num_beams = num_beams
        self._groups = num_beam_groups
        self._matching: dict[int, Matching] = {}
        self._seen: dict[int, Tensor] = {}
        self._room: Tensor | None = None
        self._ends = torch.tensor(sorted(grammar.table.eos))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with every token that may not come next at -inf."""
        return self._process(input_ids, scores, None)

    def on_rows(self, input_ids: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        """The same for the rows numbered `rows` `[rows]`."""
        return self._process(input_ids, scores, rows)

    def _process(self, input_ids: Tensor, scores: Tensor, rows: Tensor | None) -> Tensor:
        group = 0 if self._groups == 1 or rows is None else int(rows[0]) % self._num_beams
        matching = self._catch_up(group, input_ids[:, self._prompt_length :])
        try:
            bits = matching.masks()
        except Exhausted as error:
            row = error.place if rows is None else int(rows[error.place])
            raise RequestFailed(f"the grammar is too complex to follow further: {error.why}", row=row) from None
        ceiling = self._ceiling(bits.to(scores.device, non_blocking=True))[:, : scores.shape[1]].to(scores.dtype)
        over = torch.tensor([branch.over for branch in matching.branches], device=scores.device)
        if over.any():
            ceiling[over.nonzero(), self._ends] = -NEG_INF
        masked = torch.minimum(scores, ceiling)
        lost = over & ~self._everywhere(over)
        stuck = masked.amax(dim=-1).isneginf() | lost
        if not bool(stuck.any()):
            return masked
        level = torch.where(self._everywhere(stuck), 0.0, _POOR).masked_fill(lost, _HOPELESS)
        return torch.where(stuck[:, None], torch.minimum(ceiling, level[:, None]), masked)

    def _everywhere(self, rows: Tensor) -> Tensor:
        """Which rows belong to a prompt all of whose rows are among `rows` `[rows]` bool."""
        size = self._num_beams // self._groups
        return rows.view(-1, size).all(dim=-1).repeat_interleave(size)

    def _ceiling(self, bits: Tensor) -> Tensor:
        """From `[rows, words]` int32 the highest score that each token may have: inf for a set bit, else -inf.

        A minimum of two floats is several times faster on a CPU than filling by a mask of bools. The result is written
        over that of the step before: the time of a fresh tensor would be that of its first touch.
        """
        octets = bits.view(torch.uint8)
        if self._room is None or len(self._room) < octets.numel():
            self._room = torch.empty(octets.numel(), 8, dtype=torch.float32, device=bits.device)
        room = self._room[: octets.numel()]
        torch.index_select(_table(bits.device), 0, octets.flatten().int(), out=room)
        return room.view(len(bits), -1)

    def _catch_up(self, group: int, texts: Tensor) -> Matching:
        """The matching of a group, brought to `texts` `[rows, generated]`."""
        seen, self._seen[group] = self._seen.get(group), texts
        if seen is None:
            self._matching[group] = Matching(self._grammar, pinned=texts.is_cuda)
        matching = self._matching[group]
        width = 0 if seen is None else seen.shape[1]
        if seen is not None and len(seen) == len(texts) and torch.equal(texts[:, :width], seen):
            matching.grow(texts[:, width:].tolist())
        else:
            matching.follow(texts.tolist())
        return matching


@cache
def _table(device: torch.device) -> Tensor:
    """`[256, 8]`: for each byte, inf where a bit, the lowest first, is set, and -inf where it is not."""
    with torch.inference_mode(False):  # it outlives the call
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        return torch.where(bits == 1, -NEG_INF, NEG_INF).to(device, torch.float32)
