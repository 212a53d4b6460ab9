"""Contrastive search: of a prompt's likeliest next tokens, the one that is least like what the text already says.

Each prompt has a row for each candidate. A step feeds every row its candidate; then the best of them is taken, all rows
of the prompt become its forks, and its logits give the next candidates. So a token is settled one step after it was
proposed, by its own hidden state (Su et al., 2022, https://arxiv.org/abs/2202.06417).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.decode.choose.sample import Rectangle
from unspool.decode.sequence import Choice, Group, Sequence, Sink, Want, Watch, Work
from unspool.logits import LogitsProcessorList
from unspool.logits.guidance import GuidanceLogitsProcessor


class Directions:
    """Hidden states of texts, each divided by its length, in columns that end together.

    Args:
        lengths: tokens of each text.
    """

    def __init__(self, lengths: Items[int]) -> None:
        self._width = max(lengths)
        self._free = [self._width - length for length in lengths]
        self._states = torch.empty(len(lengths), 0, 0)

    def fill(self, text: int, begin: int, hidden: Tensor) -> None:
        """Take hidden states `[tokens, hidden]` of a text from its token number `begin` on."""
        if not self._states.numel():
            self._states = hidden.new_zeros(len(self._free), self._width + 64, hidden.shape[1], dtype=torch.float32)
        column = self._free[text] + begin
        self._states[text, column : column + len(hidden)] = _unit(hidden)

    def append(self, hidden: Tensor) -> None:
        """Take the hidden states `[texts, hidden]` of one more token of each."""
        if self._width == self._states.shape[1]:
            self._states = F.pad(self._states, (0, 0, 0, self._width))
        self._states[:, self._width] = _unit(hidden)
        self._width += 1

    def likeness(self, hidden: Tensor) -> Tensor:
        """The largest cosine of each of `[texts, candidates, hidden]` with its text, `[texts, candidates]`."""
        cosines = torch.bmm(self._states[:, : self._width], _unit(hidden).transpose(1, 2))
        free = torch.tensor(self._free, device=hidden.device)[:, None, None]
        outside = torch.arange(self._width, device=hidden.device)[None, :, None] < free
        return cosines.masked_fill(outside, -torch.inf).amax(dim=1)

    def keep(self, texts: list[int]) -> None:
        """Forget all but some texts."""
        self._states = self._states[torch.tensor(texts, device=self._states.device)]
        self._free = [self._free[text] for text in texts]


def _unit(hidden: Tensor) -> Tensor:
    hidden = hidden.float()
    length: Tensor = hidden.norm(dim=-1, keepdim=True)
    return hidden / length


@dataclass(slots=True)
class _Proposed:
    """What was decided of the next token of the prompts that are left, and what the choice was made from.

    Attributes:
        tokens, chances: `[prompts, candidates]`, likeliest first; a banned one has no chance, which is -inf.
        scores, logits: `[prompts, vocab]`, where they are kept.
    """

    tokens: Tensor
    chances: Tensor
    scores: Tensor | None
    logits: Tensor | None


class ContrastiveChooser:
    """Settles each prompt's token and proposes candidates for the one after it; see `decode.sequence.Chooser`.

    Rows of one prompt stand side by side, and prompts that ended need not come again. The chooser is its group's watch
    too, since it compares hidden states. A candidate that the processors ban is fed and never taken.

    Args:
        texts: a row for each prompt, with its settled tokens; `sink` appends to them and ends them.
        sink: takes the settled tokens, before anything is proposed for the place after them.
        history: the columns that `process` sees, a row for each prompt; this chooser appends to them.
        process: logits processors, or `None` when there are none.
        candidates: rows of each prompt.
        alpha: weight of the likeness to the text so far; the rest is the weight of the probability.
        layer: number of the hidden states that are compared.
        keep_finished: prompts that ended come all the same, until all have.
        guidance: among `process`; what it guides by is narrowed to the prompts.
        watch: sees the settled tokens' attention weights and hidden states, as if each had been fed alone.
        keep_scores, keep_logits: hand the processed scores, the raw logits on to `sink`.
    """

    def __init__(
        self,
        texts: list[Sequence],
        sink: Sink,
        history: Rectangle,
        process: LogitsProcessorList | None,
        *,
        candidates: int,
        alpha: float,
        layer: int,
        keep_finished: bool = False,
        guidance: GuidanceLogitsProcessor | None = None,
        watch: Watch | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self._texts = texts
        self._sink = sink
        self._history = history
        self._process = process
        self._candidates = candidates
        self._alpha = alpha
        self._layer = layer
        self._keep_finished = keep_finished
        self._guidance = guidance
        self._watch = watch
        self._keep_scores = keep_scores
        self._keep_logits = keep_logits
        self._directions = Directions([len(text.tokens) for text in texts])
        self._proposed: _Proposed | None = None
        self._newest = torch.empty(0)  # hidden states of the candidates, [prompts, candidates, hidden]
        self._seen: tuple[list[Work], list[list[Tensor]], list[Tensor]] = ([], [], [])

    @property
    def want(self) -> Want:
        """See `Watch`."""
        own = Want(layers=frozenset((self._layer,)))
        return own if self._watch is None else own | self._watch.want

    def __call__(self, work: list[Work], weights: list[list[Tensor]], hidden: list[Tensor]) -> None:
        """See `Watch`. Prompts are fed by one row for each at first; later all rows are."""
        parts = torch.split(hidden[self._layer], [item.feed for item in work])
        prompts = [item.seq.row // self._candidates for item in work]
        if self._proposed is None:
            for prompt, item, part in zip(prompts, work, parts, strict=True):
                self._directions.fill(prompt, item.seq.computed - item.feed, part)
            self._show(list(range(len(work))), prompts, (work, weights, hidden))
            return
        if not all(item.keep for item in work):  # rows are computed anew up to the candidate
            for prompt, item, part in zip(prompts, work, parts, strict=True):
                self._directions.fill(prompt, item.seq.computed - item.feed, part)
            return
        newest = torch.stack([part[-1] for part in parts])
        self._newest = newest.view(-1, self._candidates, newest.shape[1])
        for place, part in enumerate(parts[:: self._candidates]):
            if len(part) > 1:  # the whole row was computed anew
                self._directions.fill(place, 0, part[:-1])
        self._seen = (work, weights, hidden)

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Settle the token that `rows` (all rows of each of their prompts) were fed candidates for; propose others."""
        prompts = [row.row // self._candidates for row in rows[:: self._candidates]]
        places = torch.arange(len(prompts), device=logits.device) * self._candidates
        parents, live = None, list(range(len(prompts)))
        if self._proposed is not None:
            best = self._best(self._proposed)
            places = places + best
            parents = places.repeat_interleave(self._candidates)
            live = self._settle(prompts, best, places, self._proposed)
        tokens = torch.zeros(len(prompts), self._candidates, dtype=torch.int64, device=logits.device)
        if live:
            index = torch.tensor(live, device=logits.device)
            tokens[index] = self._propose(logits, [prompts[i] for i in live], places[index])
        return Choice(tokens.flatten(), parents=parents)

    def _best(self, proposed: _Proposed) -> Tensor:
        """Which candidate is taken, `[prompts]`."""
        score = (1.0 - self._alpha) * proposed.chances - self._alpha * self._directions.likeness(self._newest)
        return score.argmax(dim=1)

    def _settle(self, prompts: list[int], best: Tensor, places: Tensor, proposed: _Proposed) -> list[int]:
        """Give the sink the taken candidates; which of the prompts, by place, are to go on."""
        texts = [self._texts[prompt] for prompt in prompts]
        tokens = proposed.tokens.gather(1, best[:, None])[:, 0]
        ended = torch.tensor([text.finish is not None for text in texts], device=tokens.device)
        shown = tokens.masked_fill(ended, self._history.filler)
        numbers = None if len(texts) == len(self._texts) else torch.tensor(prompts, device=tokens.device)
        self._history.append(shown, numbers)
        self._sink.commit(texts, shown.tolist(), Choice(shown, proposed.scores, proposed.logits))
        left = [place for place, text in enumerate(texts) if text.finish is None]
        if not left:
            return []
        live = list(range(len(texts))) if self._keep_finished else left
        self._show(places.tolist(), prompts, self._seen)
        hidden = self._newest[torch.arange(len(best), device=best.device), best]
        if len(live) < len(texts):
            self._directions.keep(live)
            hidden = hidden[torch.tensor(live, device=hidden.device)]
        self._directions.append(hidden)
        return live

    def _propose(self, logits: Tensor, prompts: list[int], places: Tensor) -> Tensor:
        """Candidates `[prompts, candidates]` that follow the rows at `places`; -1 where there is nothing to choose."""
        scores = logits.index_select(0, places).float()
        raw = (scores.clone() if self._process else scores) if self._keep_logits else None
        if self._guidance is not None and self._guidance.unconditional is not None:
            self._guidance.unconditional = self._guidance.unconditional.index_select(0, places)
        if self._process is not None:
            numbers = None if len(prompts) == len(self._texts) else torch.tensor(prompts, device=logits.device)
            ids = self._history.ids(numbers)
            scores = self._process(ids, scores) if numbers is None else self._process.on_rows(ids, scores, numbers)
        chances, tokens = scores.softmax(dim=-1).topk(self._candidates)
        banned = scores.gather(1, tokens) == -torch.inf
        kept = scores if self._keep_scores else None
        self._proposed = _Proposed(tokens, chances.masked_fill(banned, -torch.inf), kept, raw)
        return tokens.where(~chances[:, :1].isnan(), -1)

    def _show(
        self, places: list[int], prompts: list[int], seen: tuple[list[Work], list[list[Tensor]], list[Tensor]]
    ) -> None:
        """Show the watch some items of a step, each as that of a prompt's text."""
        if self._watch is None:
            return
        work, weights, hidden = seen
        feeds = [item.feed for item in work]
        self._watch(
            [work[place]._replace(seq=self._texts[prompt]) for place, prompt in zip(places, prompts, strict=True)],
            [[layer[place] for place in places] for layer in weights],
            [_some(layer, feeds, places) for layer in hidden],
        )


def _some(layer: Tensor, feeds: list[int], places: list[int]) -> Tensor:
    """Hidden states of some items of a step; an empty layer stays as it is."""
    if not layer.shape[0]:
        return layer
    parts = torch.split(layer, feeds)
    return torch.cat([parts[place] for place in places])


@dataclass(slots=True, eq=False)
class CandidateSink:
    """Makes candidates what their rows are fed next (see `decode.sequence.Sink`).

    Attributes:
        texts: a row for each prompt, which has ended when its candidates' rows have.
        candidates: rows of each.
        refuse: told of a text without a candidate; ends it, or raises.
    """

    texts: list[Sequence]
    candidates: int
    refuse: Callable[[Sequence], Any]

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """Append, and end rows with their texts."""
        for row, token in zip(rows, tokens, strict=True):
            text = self.texts[row.row // self.candidates]
            row.finish = text.finish
            if token < 0 and text.finish is None:
                self.refuse(text)
            row.tokens.append(max(0, token))  # rows that ended may be fed on


def contrastive_group(
    texts: list[Sequence],
    sink: Sink,
    history: Rectangle,
    processors: LogitsProcessorList,
    refuse: Callable[[Sequence], Any],
    *,
    candidates: int,
    alpha: float,
    layer: int,
    vocab: int,
    **options: Any,
) -> Group:
    """The group of rows that try candidates for `texts`, whose settled tokens go to `sink`.

    Args:
        refuse: see `CandidateSink`.
        vocab: how many tokens there are.
        options: `keep_finished`, `watch`, `keep_scores` and `keep_logits`, and the other arguments: see
            `ContrastiveChooser`.

    Raises:
        ValueError: there are not so many tokens.
    """
    if candidates > vocab:
        raise ValueError(f"top_k={candidates} asks for more candidates than the {vocab} tokens there are")
    rows = [
        Sequence(text.row * candidates + i, list(text.tokens), embeds=text.embeds, adapter=text.adapter)
        for text in texts
        for i in range(candidates)
    ]
    chooser = ContrastiveChooser(
        texts,
        sink,
        history,
        processors or None,
        candidates=candidates,
        alpha=alpha,
        layer=layer,
        guidance=next((one for one in processors if isinstance(one, GuidanceLogitsProcessor)), None),
        **options,
    )
    return Group(rows, chooser, CandidateSink(texts, candidates, refuse), watch=chooser)
