"""From an output of `generate()` to a report: where rows begin and end, what each step had to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unspool.inspection.report import Alternative, Report, Row, Step
from unspool.inspection.spelling import Speller
from unspool.inspection.tree import Path, Scores, grow

__all__ = ["read"]

_NOTABLE = 0.01
"""Least probability of a masked token that is shown."""


def read(output: Any, tokenizer: Any, *, top: int, eos_token_id: int | Iterable[int] | None) -> Report:
    """Everything that an output says; see `unspool.inspect` for arguments and errors."""
    span = _span(output, tokenizer, eos_token_id)
    speller = Speller(tokenizer)
    looks = _looks(output, span, top)
    rows = tuple(_row(output, span, row, looks, speller) for row in range(len(span.ids)))
    trees = grow(getattr(output, "beam_steps", None), span.paths(), _scores(output, span), speller.name)
    kept = getattr(output, "scores", None) or getattr(output, "logits", None)
    return Report(
        rows=rows,
        trees=tuple(trees) if span.origins is not None else (),
        vocab=int(kept[0].shape[-1]) if kept else None,
        acceptance_rate=getattr(output, "acceptance_rate", None),
        notes=tuple(_notes(output, span)),
    )


@dataclass(frozen=True, slots=True)
class _Span:
    """Where things are in an output.

    Attributes:
        ids: `[rows][columns]`, prompts included.
        begin: first new column.
        lengths: new tokens of each row.
        origins: per row and step the beam row that was chosen for; `None` without beams.
        pad: what fills up, or `None`.
    """

    ids: list[list[int]]
    begin: int
    lengths: list[int]
    origins: list[list[int]] | None
    pad: int | None

    def new(self, row: int) -> list[int]:
        """The row's new tokens."""
        return self.ids[row][self.begin : self.begin + self.lengths[row]]

    def prompt(self, row: int) -> list[int]:
        """The row's prompt, without what fills it up on either side."""
        ids = self.ids[row][: self.begin]
        while len(ids) > 1 and ids[0] == self.pad:
            ids = ids[1:]
        while len(ids) > 1 and ids[-1] == self.pad:
            ids = ids[:-1]
        return ids

    def origin(self, row: int, step: int) -> int:
        """The row of `scores` that a token was chosen from."""
        return row if self.origins is None else self.origins[row][step]

    def paths(self) -> list[Path]:
        """The rows as paths through a tree of beams."""
        if self.origins is None:
            return []
        return [
            Path(self.new(row), [beam for beam in origins if beam >= 0]) for row, origins in enumerate(self.origins)
        ]


def _span(output: Any, tokenizer: Any, eos_token_id: int | Iterable[int] | None) -> _Span:
    sequences = output.sequences
    if sequences.ndim != 2:
        raise ValueError(f"sequences is {list(sequences.shape)}; only outputs of [rows, columns] can be shown")
    beams, tops = getattr(output, "beam_indices", None), getattr(output, "top_logprobs", None)
    kept = getattr(output, "scores", None) or getattr(output, "logits", None)
    if beams is not None:
        steps = beams.shape[1]
    elif tops is not None:
        steps = tops.ids.shape[1]
    elif kept:
        steps = len(kept)
    else:
        raise ValueError(
            "the output says nothing of its tokens' probabilities; generate with return_dict_in_generate=True and "
            "output_scores=True (or output_top_logprobs=5 where whole scores would be too large)"
        )
    ids = sequences.tolist()
    begin = sequences.shape[1] - steps
    pad = getattr(tokenizer, "pad_token_id", None)
    if beams is not None:
        lengths = (beams >= 0).sum(dim=1).tolist()
    elif tops is not None:
        lengths = (tops.ids[:, :, 0] >= 0).sum(dim=1).tolist()
    else:
        ends = getattr(tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        reasons = getattr(output, "finish_reasons", None) or [None] * len(ids)
        lengths = [_length(row[begin:], reason, ends, pad) for row, reason in zip(ids, reasons, strict=True)]
    return _Span(ids, begin, lengths, None if beams is None else beams.tolist(), pad)


def _length(new: list[int], reason: str | None, ends: set[int], pad: int | None) -> int:
    """How many of the new tokens are a row's own; what follows fills up."""
    if reason == "length":
        return len(new)
    end = next((i + 1 for i, token in enumerate(new) if token in ends), None)
    if end is not None:
        return end
    end = len(new)
    while end > 1 and new[end - 1] == pad:
        end -= 1
    return end


@dataclass(frozen=True, slots=True)
class _Looks:
    """What each row's steps had to choose from, by row and step; a list is empty where nothing was kept.

    Attributes:
        p, own: of the chosen token, by the processed scores, by the model's logits.
        rank, allowed: of the chosen token, of tokens.
        others: ids, processed probabilities and own ones.
    """

    p: list[list[float]]
    own: list[list[float]]
    rank: list[list[int]]
    allowed: list[list[int]]
    others: list[list[list[tuple[int, float, float | None]]]]


def _looks(output: Any, span: _Span, top: int) -> _Looks:
    rows = len(span.ids)
    looks = _Looks(*([[] for _ in range(rows)] for _ in range(5)))  # type: ignore[arg-type]
    scores, logits = getattr(output, "scores", None), getattr(output, "logits", None)
    tops, chances = getattr(output, "top_logprobs", None), getattr(output, "token_logprobs", None)
    for step in range(max(span.lengths, default=0)):
        live = [row for row in range(rows) if step < span.lengths[row]]
        origins = torch.tensor([span.origin(row, step) for row in live])
        tokens = torch.tensor([span.ids[row][span.begin + step] for row in live])
        if scores or logits:
            _look(looks, live, _of(scores, step, origins), _of(logits, step, origins), tokens, top)
        elif tops is not None and chances is not None:
            for row in live:
                values, ids = tops.values[row, step, :top].exp().tolist(), tops.ids[row, step, :top].tolist()
                looks.others[row].append([(i, p, None) for i, p in zip(ids, values, strict=True) if p > 0])
                looks.p[row].append(float(chances[row, step].exp()))
    return looks


def _of(kept: Sequence[Tensor] | None, step: int, origins: Tensor) -> Tensor | None:
    """The rows of one step's scores, `[rows, vocab]`, on the CPU."""
    return None if not kept else kept[step][origins.to(kept[step].device)].detach().cpu().float()


def _look(
    looks: _Looks, rows: list[int], scores: Tensor | None, logits: Tensor | None, tokens: Tensor, top: int
) -> None:
    """Add one step of the rows that still ran, from `scores` and `logits` `[rows, vocab]`."""
    made = scores if scores is not None else logits
    assert made is not None
    possible = made > torch.finfo(made.dtype).min
    chances = made.softmax(dim=-1)
    at = tokens.clamp_min(0)[:, None]
    top = min(top, made.shape[1])
    best = chances.topk(top)
    ranks = (1 + (made > made.gather(1, at)).sum(dim=1)).tolist()
    mine, allowed = chances.gather(1, at)[:, 0].tolist(), possible.sum(dim=1).tolist()
    ids, values = best.indices.tolist(), best.values.tolist()
    for i, row in enumerate(rows):
        looks.p[row].append(mine[i])
        looks.rank[row].append(ranks[i])
        looks.allowed[row].append(allowed[i])
        looks.others[row].append([(one, p, None) for one, p in zip(ids[i], values[i], strict=True) if p > 0])
    if logits is not None:
        _look_before(looks, rows, logits.softmax(dim=-1), possible, at, best.indices)


def _look_before(looks: _Looks, rows: list[int], own: Tensor, possible: Tensor, at: Tensor, shown: Tensor) -> None:
    """Add the model's own probabilities of one step, and of its favourites those that were masked out."""
    masked = own.masked_fill(possible, 0.0).topk(shown.shape[1])
    mine, others = own.gather(1, at)[:, 0].tolist(), own.gather(1, shown).tolist()
    ids, values = masked.indices.tolist(), masked.values.tolist()
    for i, row in enumerate(rows):
        looks.own[row].append(mine[i])
        last = looks.others[row][-1]
        last[:] = [(one, p, before) for (one, p, _), before in zip(last, others[i], strict=False)]
        last += [(one, 0.0, p) for one, p in zip(ids[i], values[i], strict=True) if p >= _NOTABLE]


def _row(output: Any, span: _Span, row: int, looks: _Looks, speller: Speller) -> Row:
    new, prompt = span.new(row), span.prompt(row)
    pieces = speller.pieces([*prompt, *new])
    accepted, refused, drafts = _drafts(output, row, new, len(prompt))
    steps = tuple(
        Step(
            text=pieces[len(prompt) + i],
            name=speller.name(token),
            id=token,
            p=_at(looks.p[row], i),
            own=_at(looks.own[row], i),
            rank=_at(looks.rank[row], i),
            allowed=_at(looks.allowed[row], i),
            others=tuple(Alternative(speller.name(one), p, own) for one, p, own in _at(looks.others[row], i) or ()),
            drafted=i in accepted,
            refused=tuple(speller.pieces(refused.get(i, ()))),
        )
        for i, token in enumerate(new)
    )
    reasons, ranking = getattr(output, "finish_reasons", None), getattr(output, "sequences_scores", None)
    return Row(
        prompt="".join(pieces[: len(prompt)]),
        steps=steps,
        finish=None if reasons is None else reasons[row],
        score=None if ranking is None else float(ranking[row]),
        drafted=None if drafts is None else sum(len(draft.tokens) for draft in drafts),
        accepted=None if drafts is None else sum(draft.accepted for draft in drafts),
        rounds=None if drafts is None else len(drafts),
    )


def _at(items: list[Any], i: int) -> Any:
    return items[i] if i < len(items) else None


def _drafts(output: Any, row: int, new: list[int], prompt: int) -> tuple[set[int], dict[int, list[int]], Any]:
    """Steps whose token was drafted, tokens refused at steps, and the row's drafts."""
    every = getattr(output, "drafts", None)
    if every is None:
        return set(), {}, None
    drafts = every[row]

    def fits(begin: int) -> bool:
        return all(
            part.position >= begin
            and new[part.position - begin : part.position - begin + part.accepted] == part.tokens[: part.accepted]
            for part in drafts
        )

    # What looks like padding may have been part of a prompt, and the other way round: accepted tokens know better.
    first = min((part.position for part in drafts), default=prompt)
    begin = next((length for length in (prompt, *range(first, -1, -1)) if fits(length)), prompt)
    accepted: set[int] = set()
    refused: dict[int, list[int]] = {}
    for part in drafts:
        at = part.position - begin
        accepted.update(range(at, at + part.accepted))
        if part.accepted < len(part.tokens):
            refused[at + part.accepted] = part.tokens[part.accepted :]
    return accepted, refused, drafts


def _scores(output: Any, span: _Span) -> Scores:
    """Probabilities and scores of beams, as far as they were kept."""
    kept = getattr(output, "scores", None)
    norms: dict[int, Tensor] = {}

    def scores(step: int, row: int, token: int) -> tuple[float, float] | None:
        if not kept or step >= len(kept) or row < 0 or token < 0:
            return None
        if step not in norms:
            norms[step] = kept[step].float().logsumexp(dim=-1)
        score = kept[step][row, token]
        return float((score - norms[step][row]).exp()), float(score)

    return scores


def _notes(output: Any, span: _Span) -> Iterable[str]:
    """What is not to be seen, and why."""
    kept = getattr(output, "scores", None)
    if not kept and getattr(output, "top_logprobs", None) is None:
        if getattr(output, "logits", None):
            yield "Probabilities are those of the model's logits, before processors: no scores were kept."
        else:
            yield "No probabilities: pass output_scores=True or output_top_logprobs=5 to generate()."
    elif not kept:
        yield "Ranks and masked tokens need output_scores=True."
    elif not getattr(output, "logits", None):
        yield "What processors changed is not to be seen: pass output_logits=True as well."
    if span.origins is not None and getattr(output, "beam_steps", None) is None:
        yield "The tree has the returned outputs alone: the other beams were not recorded."
