"""Diverse (group) and constrained beam search: the rows of each prompt in groups that follow one another in a step.

The arithmetic is that of transformers 4 (`_group_beam_search`, `_constrained_beam_search` and their scorers), which v5
left out, and it is another than that of plain beam search in v5: finished outputs are ranked in double precision, an
end token is not chosen by a row but closes a copy of it, and prompts and groups settle one by one.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from unspool.config import warn_once
from unspool.decode.choose.beam import BeamRules, Ends, Hypotheses
from unspool.decode.choose.constraints import Pick, Progress
from unspool.decode.sequence import Choice, Sequence
from unspool.logits import LogitsProcessorList

_FAR = -1.0e9


class Link(NamedTuple):
    """The newest token of an output, the row it was chosen for, and what it follows (`None`: the prompt)."""

    before: Link | None
    token: int
    origin: int


class Output(NamedTuple):
    """An output that competes.

    Attributes:
        score: its total over the length to the power of the length penalty.
        end: its newest token.
        steps: tokens it has.
        closed: it ended with an end token.
        complete: it fulfils every constraint, if there are any.
    """

    score: float
    end: Link | None
    steps: int
    closed: bool
    complete: bool

    def unwound(self, begin: int = 0) -> list[Link]:
        """Its tokens from step `begin` on."""
        return _unwind(self.end, self.steps - begin)


class Contest:
    """The best finished outputs of one prompt's group.

    Args:
        rules: see there.
        size: how many there may be.

    Attributes:
        outputs: in the order in which they were added.
        over: nothing is added any more.
    """

    def __init__(self, rules: BeamRules, size: int) -> None:
        self.outputs: list[Output] = []
        self.over = False
        self._rules = rules
        self._size = size
        self._worst = 1e9

    def add(self, total: float, steps: int, end: Link | None, *, closed: bool, complete: bool = True) -> None:
        """Let an output compete; `total` is the sum of its log probabilities."""
        score = total / steps**self._rules.length_penalty
        if len(self.outputs) == self._size and not score > self._worst:
            return
        self.outputs.append(Output(score, end, steps, closed, complete))
        if len(self.outputs) > self._size:
            ranks = sorted((output.score, place) for place, output in enumerate(self.outputs))
            del self.outputs[ranks[0][1]]
            self._worst = ranks[1][0]
        else:
            self._worst = min(score, self._worst)

    def judge(self, best: float, steps: int) -> None:
        """End it when it is full and no continuation can become better; `best` is the step's best total."""
        rules = self._rules
        if len(self.outputs) < self._size:
            return
        never = rules.early_stopping == "never" and rules.length_penalty > 0.0
        hoped = best / (rules.max_new if never else steps) ** rules.length_penalty
        self.over = rules.early_stopping is True or self._worst >= hoped


class GroupBeamChooser:
    """Decides the rows of each prompt, group after group; see `decode.sequence.Chooser`.

    Rows of one prompt stand side by side, and among them those of one group. A choice names for each row the one it
    continues (`parents`), and the rows of prompts whose results are settled (`ended`); those need not come again.
    Rows of a group that is settled while others of its prompt are not are filled up.

    Args:
        prompts: `[rows, columns]` what processors and criteria see of the prompts.
        process: logits processors, or `None` when there are none; they are called once for each group.
        rules: see there; `candidates` are those of a group.
        ends: see there; criteria end all prompts, once every row that competes meets one.
        groups: groups of each prompt.
        close: the token that closes outputs, whichever end token was chosen; not looked at without end tokens.
        progress: what outputs must fulfil, or `None`; then `groups` is 1.
        together: end all prompts in the same step, the last one's.
        keep_scores, keep_logits: hand the processed scores, the raw logits on with the choice.
        number: outputs wanted of each prompt.

    Attributes:
        places: numbers of the prompts that are not settled, in order.
    """

    def __init__(
        self,
        prompts: Tensor,
        process: LogitsProcessorList | None,
        rules: BeamRules,
        ends: Ends,
        *,
        groups: int,
        close: int,
        progress: Progress | None,
        together: bool,
        number: int,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.rules = rules
        self._process = process
        self._ends = ends
        self._end_tokens = frozenset(ends.eos.tolist())
        self._groups = groups
        self._size = rules.beams // groups
        self._close = close
        self._progress = progress
        self._together = together
        self._number = number
        self._keep_scores = keep_scores
        self._keep_logits = keep_logits
        count = prompts.shape[0] // rules.beams
        self.places = list(range(count))
        self._contests = [[Contest(rules, self._size) for _ in range(groups)] for _ in range(count)]
        self._heads: list[list[Link | None]] = [[None] * rules.beams for _ in range(count)]  # of each prompt's rows
        self._steps = 0
        self._full = ends.columns - prompts.shape[1]
        self._ids = prompts if process or ends.criteria else None
        # All rows of a group begin alike: the first alone counts, lest the same continuations be taken several times.
        self._totals = torch.full((count, rules.beams), _FAR, dtype=torch.float32, device=prompts.device)
        self._totals[:, :: self._size] = 0.0

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Decide for each of `rows` (all rows of each of their prompts) what it continues and with which token."""
        beams = self.rules.beams
        self._leave([row.row // beams for row in rows[::beams]])
        self._steps += 1
        raw = logits.float()
        picks, scores, candidates = self._pick(raw.log_softmax(dim=-1))
        tokens = torch.tensor([pick.token for mine in picks for pick in mine], device=logits.device)
        places = [place * beams + pick.beam for place, mine in enumerate(picks) for pick in mine]
        parents = torch.tensor(places, device=logits.device)
        self._totals = self._totals.new_tensor([[pick.score for pick in mine] for mine in picks])
        self._follow(picks)
        if self._ids is not None:
            self._ids = torch.cat([self._ids[parents], tokens[:, None]], dim=1)
        failed = any(pick.token < 0 for mine in picks for pick in mine)
        ended = [False] * len(self.places) if failed else self._ended(picks, scores)
        return Choice(
            tokens=tokens,
            scores=scores if self._keep_scores else None,
            logits=raw if self._keep_logits else None,
            parents=parents,
            ended=torch.tensor(ended, device=logits.device).repeat_interleave(beams),
            candidates=self._looked_at(candidates, parents, tokens, raw.shape[1]) if self._keep_scores else None,
        )

    def best(self, number: int) -> Hypotheses:
        """The `number` best finished outputs of every prompt, in the prompts' order; once all are settled.

        Those that were not closed get a closing token (of no row, -1) if there is room and there are end tokens.
        """
        chosen = [self._ranked(prompt)[:number] for prompt in range(len(self._contests))]
        if not all(output.complete for mine in chosen for output in mine):
            warn_once(
                "constraints or force_words_ids were not met by every output: the words need more tokens than "
                "max_new_tokens left, or were hardly possible; raise max_new_tokens or num_beams"
            )
        tokens, origins, closed = [], [], []
        for output in (output for mine in chosen for output in mine):
            links = output.unwound()
            more = not output.closed and output.steps < self._full and bool(self._end_tokens)
            tokens.append([link.token for link in links] + [self._close] * more)
            origins.append([link.origin for link in links] + [-1] * more)
            closed.append(more)
        width = max(map(len, tokens))
        device, shape = self._totals.device, (len(chosen), number, width)
        filled = [mine + [self.rules.filler] * (width - len(mine)) for mine in tokens]
        traced = [mine + [-1] * (width - len(mine)) for mine in origins]
        return Hypotheses(
            torch.tensor(filled, device=device).view(shape),
            torch.tensor(traced, dtype=torch.int32, device=device).view(shape),
            self._totals.new_tensor([[output.score for output in mine] for mine in chosen]),
            torch.ones(shape[:2], dtype=torch.bool, device=device),
            torch.tensor(closed, device=device).view(shape[:2]),
        )

    def agreed(self, place: int, begin: int, ended: bool) -> list[tuple[int, int]]:
        """Tokens from step `begin` on that are certain for prompt number `place` of those in `places`.

        Each with the number of the row it was chosen for.
        That is what all outputs begin with that may still become its best: those that run and those that finished.
        When it has `ended`, that is the best one.
        """
        prompt = self.places[place]
        contests = self._contests[prompt]
        if ended or all(contest.over for contest in contests):
            return [(link.token, link.origin) for link in self._ranked(prompt)[0].unwound(begin)]
        possible = [output.unwound(begin) for contest in contests for output in contest.outputs]
        for beam, head in enumerate(self._heads[prompt]):
            if not contests[beam // self._size].over:
                possible.append(_unwind(head, self._steps - begin))
        certain: list[tuple[int, int]] = []
        for links in zip(*possible, strict=False):
            if any(link.token != links[0].token for link in links):
                break
            certain.append((links[0].token, links[0].origin))
        return certain

    def _looked_at(self, candidates: Tensor, parents: Tensor, tokens: Tensor, vocab: int) -> Tensor:
        """The continuations that may be in a result: the best ones, those picked, and those with the closing token."""
        picked = parents * vocab + tokens.clamp_min(0)
        closed = torch.arange(len(parents), device=parents.device) * vocab + max(0, self._close)
        return torch.cat([candidates, picked, closed])

    def _pick(self, before: Tensor) -> tuple[list[list[Pick]], Tensor, Tensor]:
        """What each row of each prompt becomes, the processed scores `[rows, vocab]` of log probabilities, candidates.

        The latter as in `Choice`.
        """
        size, count, vocab = self._size, len(self.places), before.shape[1]
        before = before.view(count, -1, vocab)
        tokens = torch.zeros(before.shape[:2], dtype=torch.int64, device=before.device)
        picks: list[list[Pick]] = [[] for _ in self.places]
        parts, every = [], []
        here = torch.arange(count, device=before.device)[:, None] * self.rules.beams
        for group in range(self._groups):
            part = slice(group * size, (group + 1) * size)
            scores = self._processed(before[:, part], group, tokens)
            totals = scores + self._totals[:, part, None]
            found, flat = totals.view(count, -1).topk(self.rules.candidates)
            every.append(((here + group * size) * vocab + flat).flatten())
            for place, candidates in enumerate(zip(found.tolist(), flat.tolist(), strict=True)):
                picks[place] += self._decide(self.places[place], group, *candidates, totals[place])
            if group + 1 < self._groups:
                tokens[:, part] = tokens.new_tensor([[max(0, pick.token) for pick in mine[part]] for mine in picks])
            parts.append(scores)
        scores = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(0, 1)
        return picks, scores, torch.cat(every)

    def _processed(self, scores: Tensor, group: int, tokens: Tensor) -> Tensor:
        """`scores` `[prompts, size, vocab]` of one group, processed; `tokens` are those chosen by the groups before."""
        if self._process is None:
            return scores
        assert self._ids is not None
        first, beams = group * self._size, self.rules.beams
        part = slice(first, first + self._size)
        ids = self._ids.view(*tokens.shape, -1)[:, part].flatten(0, 1)
        rows = [prompt * beams + first + beam for prompt in self.places for beam in range(self._size)]
        processed = self._process.on_rows(
            ids,
            scores.flatten(0, 1),
            torch.tensor(rows, device=ids.device),
            current_tokens=tokens.flatten(),
            beam_group_idx=group,
        )
        return processed.view(scores.shape)

    def _decide(self, prompt: int, group: int, found: list[float], flat: list[int], totals: Tensor) -> list[Pick]:
        """What the rows of one group become, given its best continuations, their scores and places in `totals`."""
        first, size, contest = group * self._size, self._size, self._contests[prompt][group]
        rows = range(first, first + size)
        if contest.over:
            return [Pick(0.0, self.rules.filler, beam) for beam in rows]
        if found[0] != found[0]:  # NaN: nothing can be chosen
            return [Pick(0.0, -1, beam) for beam in rows]
        picks: list[Pick] = []
        for rank, (score, place) in enumerate(zip(found, flat, strict=True)):
            beam, token = divmod(place, totals.shape[1])
            beam += first
            if token not in self._end_tokens:
                picks.append(Pick(score, token, beam))
            elif rank < size and (self._progress is None or self._progress.complete(prompt, beam)):
                link = Link(self._heads[prompt][beam], self._close, prompt * self.rules.beams + beam)
                contest.add(score, self._steps, link, closed=True)
        picks = picks[:size]
        if self._progress is not None:
            picks = self._progress.step(prompt, picks, totals)
        contest.judge(found[0], self._steps)
        return picks

    def _follow(self, picks: list[list[Pick]]) -> None:
        """Let the rows become what was picked."""
        for prompt, mine in zip(self.places, picks, strict=True):
            first, heads = prompt * self.rules.beams, self._heads[prompt]
            self._heads[prompt] = [Link(heads[pick.beam], pick.token, first + pick.beam) for pick in mine]

    def _ended(self, picks: list[list[Pick]], scores: Tensor) -> list[bool]:
        """Which prompts are settled after this step."""
        if self._steps == self._full or self._stopped(picks, scores):
            for prompt in self.places:
                self._close_running(prompt)
            return [True] * len(self.places)
        over = [all(contest.over for contest in self._contests[prompt]) for prompt in self.places]
        return [all(over)] * len(over) if self._together else over

    def _stopped(self, picks: list[list[Pick]], scores: Tensor) -> bool:
        """Whether every row that competes meets a criterion, or ends with an end token that a constraint asked for."""
        ends = self._ends
        met = [[pick.token in self._end_tokens for pick in mine] for mine in picks]
        if ends.criteria and self._ids is not None:
            seen = None if ends.scores is None else (*ends.scores, scores)
            more = ends.criteria(self._ids, seen).view(len(picks), -1).tolist()
            met = [[a or b for a, b in zip(mine, also, strict=True)] for mine, also in zip(met, more, strict=True)]
        return all(
            done or self._contests[prompt][beam // self._size].over
            for prompt, flags in zip(self.places, met, strict=True)
            for beam, done in enumerate(flags)
        )

    def _close_running(self, prompt: int) -> None:
        """Let what runs compete as it is; what lacks a constraint only where there are too few others."""
        totals = self._totals[self.places.index(prompt)].tolist()
        for group, contest in enumerate(self._contests[prompt]):
            if contest.over:
                continue
            beams = complete = list(range(group * self._size, (group + 1) * self._size))
            if self._progress is not None:
                complete = [beam for beam in beams if self._progress.complete(prompt, beam)]
                enough = len(complete) >= self._number
                beams = complete if enough else complete + [beam for beam in beams if beam not in complete]
            for beam in beams:
                head = self._heads[prompt][beam]
                contest.add(totals[beam], self._steps, head, closed=False, complete=beam in complete)

    def _ranked(self, prompt: int) -> list[Output]:
        """A prompt's finished outputs, best first; of equals, the one that came last."""
        every = [output for contest in self._contests[prompt] for output in contest.outputs]
        return sorted(every, key=lambda output: output.score)[::-1]

    def _leave(self, live: list[int]) -> None:
        """Go on with the prompts that are `live`."""
        if live == self.places:
            return
        left = torch.tensor([self.places.index(prompt) for prompt in live], device=self._totals.device)
        self._totals = self._totals[left]
        if self._ids is not None:
            self._ids = self._ids.view(len(self.places), self.rules.beams, -1)[left].flatten(0, 1)
        self.places = live


def _unwind(end: Link | None, steps: int) -> list[Link]:
    """The last `steps` tokens up to `end`, in order."""
    links: list[Link] = []
    while end is not None and len(links) < steps:
        links.append(end)
        end = end.before
    return links[::-1]
