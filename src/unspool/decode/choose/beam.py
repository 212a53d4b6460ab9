"""Beam search and beam sampling: of each prompt's rows together, the continuations that score best.

The arithmetic is that of transformers 5 (`GenerationMixin._beam_search`), operation for operation where rounding or the
order of equals could show: a score is a sum of log probabilities, `-1e9` stands for "not to be taken", and finished
sequences compete by their score over their length to the power of the length penalty.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.decode.choose.noise import Noise
from unspool.decode.sequence import Choice, Sequence
from unspool.logits import LogitsProcessorList
from unspool.stopping import StoppingCriteriaList

_FAR = -1.0e9


@dataclass(frozen=True, slots=True)
class BeamRules:
    """How beams compete.

    Attributes:
        beams: rows of each prompt.
        candidates: continuations looked at for each prompt and step, enough that rows are left when some of them end.
        length_penalty: finished scores are divided by the length to this power.
        early_stopping: `True` ends a prompt at `beams` finished sequences; `False` and `"never"` when no row can
            become better, judged by the length so far and by the longest possible.
        max_new: longest possible output, in tokens.
        filler: what follows the end of a finished sequence.
    """

    beams: int
    candidates: int
    length_penalty: float
    early_stopping: bool | str
    max_new: int
    filler: int


class Ends(NamedTuple):
    """What ends a candidate.

    Attributes:
        eos: `[ids]` end tokens; may be empty.
        columns: width at which every row ends.
        criteria: further ones, asked about all candidates; may be empty.
        scores: where processed scores of the steps before are kept, for criteria that look at them, or `None`.
    """

    eos: Tensor
    columns: int
    criteria: StoppingCriteriaList
    scores: list[Tensor] | None


@dataclass(slots=True)
class Hypotheses:
    """Outputs of some prompts, a number for each, as rectangles.

    Attributes:
        tokens: `[prompts, number, steps]` int64.
        origins: `[prompts, number, steps]` int32, the row that each token was chosen for; -1 past the end.
        scores: `[prompts, number]` fp32.
        done: `[prompts, number]` bool; those that are not are still running, or stand where nothing is yet.
        closed: `[prompts, number]` bool, where the chosen tokens are followed by one that was chosen for no row; `None`
            where there are no such.
    """

    tokens: Tensor
    origins: Tensor
    scores: Tensor
    done: Tensor
    closed: Tensor | None = None

    def take(self, places: Tensor) -> Hypotheses:
        """Those at `places` `[prompts, number]` of each prompt."""
        by_step = places[..., None].expand(-1, -1, self.tokens.shape[2])
        return Hypotheses(
            self.tokens.gather(1, by_step),
            self.origins.gather(1, by_step),
            self.scores.gather(1, places),
            self.done.gather(1, places),
        )

    def of(self, prompts: Tensor) -> Hypotheses:
        """Those of the prompts at places `prompts` `[prompts]`."""
        return Hypotheses(self.tokens[prompts], self.origins[prompts], self.scores[prompts], self.done[prompts])

    def widen(self, steps: int, filler: int) -> Hypotheses:
        """The same with room for `steps` steps."""
        more = (0, steps - self.tokens.shape[2])
        return Hypotheses(
            F.pad(self.tokens, more, value=filler), F.pad(self.origins, more, value=-1), self.scores, self.done
        )


def _join(parts: Items[Hypotheses], dim: int) -> Hypotheses:
    return Hypotheses(
        torch.cat([part.tokens for part in parts], dim),
        torch.cat([part.origins for part in parts], dim),
        torch.cat([part.scores for part in parts], dim),
        torch.cat([part.done for part in parts], dim),
    )


class BeamChooser:
    """Decides the rows of each prompt together; see `decode.sequence.Chooser`.

    Rows of one prompt stand side by side. A choice names for each row the one it continues (`parents`), and the rows
    of prompts whose results are settled (`ended`); those need not come again.

    Args:
        prompts: `[rows, columns]` what processors and criteria see of the prompts.
        process: logits processors, or `None` when there are none.
        noise: where sampling noise comes from; `None` takes the best.
        rules, ends: see there.
        together: end all prompts in the same step, the last one's.
        keep_scores, keep_logits: hand the processed scores, the raw logits on with the choice.

    Attributes:
        places: numbers of the prompts that are not settled, in order.
        running: their rows' outputs so far, best first.
        finished: their finished outputs, best first.
    """

    def __init__(
        self,
        prompts: Tensor,
        process: LogitsProcessorList | None,
        noise: Noise | None,
        rules: BeamRules,
        ends: Ends,
        *,
        together: bool,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.rules = rules
        self._prompts = prompts
        self._process = process
        self._noise = noise
        self._ends = ends
        self._together = together
        self._keep_scores = keep_scores
        self._keep_logits = keep_logits
        self._settled: dict[int, Hypotheses] = {}
        number, beams, device = prompts.shape[0] // rules.beams, rules.beams, prompts.device
        self.places = list(range(number))
        nothing = Hypotheses(
            torch.empty(number, beams, 0, dtype=torch.int64, device=device),
            torch.empty(number, beams, 0, dtype=torch.int32, device=device),
            torch.full((number, beams), _FAR, dtype=torch.float32, device=device),
            torch.zeros(number, beams, dtype=torch.bool, device=device),
        )
        # All rows of a prompt begin alike: the first alone counts, lest the same continuations be taken several times.
        first = nothing.scores.clone()
        first[:, 0] = 0.0
        self.running = Hypotheses(nothing.tokens, nothing.origins, first, nothing.done)
        self.finished = nothing
        self._open = torch.ones(number, 1, dtype=torch.bool, device=device)  # a running row may still be returned

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """Decide for each of `rows` (all rows of each of their prompts) what it continues and with which token."""
        beams = self.rules.beams
        self._settle([row.row // beams for row in rows[::beams]])
        raw = logits.float()
        scores = self._processed(raw.log_softmax(dim=-1))
        candidates, fine = self._candidates(scores, rows)
        hits = self._hits(candidates, scores)
        penalised = candidates.scores + hits.float() * _FAR
        taken = penalised.topk(beams)[1]
        self.running = candidates.take(taken)
        self.running.scores = penalised.gather(1, taken)
        self._finish(candidates, hits)
        ended = self._ended(hits)
        offset = torch.tensor(self.places, device=logits.device)[:, None] * beams
        here = torch.arange(len(self.places), device=logits.device)[:, None] * beams
        return Choice(
            tokens=self.running.tokens[:, :, -1].where(fine[:, None], -1).flatten(),
            scores=scores if self._keep_scores else None,
            logits=raw if self._keep_logits else None,
            parents=(self.running.origins[:, :, -1] - offset + here).flatten(),
            ended=ended.repeat_interleave(beams),
            candidates=(
                ((candidates.origins[:, :, -1] - offset + here) * raw.shape[1] + candidates.tokens[:, :, -1]).flatten()
                if self._keep_scores
                else None
            ),
        )

    def best(self, number: int) -> Hypotheses:
        """The `number` best finished outputs of every prompt, in the prompts' order; once all are settled.

        Cut to the longest of them; what is shorter is filled up.
        """
        self._settle([])
        every = [self._settled[prompt] for prompt in sorted(self._settled)]
        steps = max(part.tokens.shape[2] for part in every)
        joined = _join([part.widen(steps, self.rules.filler) for part in every], 0)
        steps = int((joined.origins[:, :number] >= 0).sum(-1).max())
        return Hypotheses(
            joined.tokens[:, :number, :steps],
            joined.origins[:, :number, :steps],
            joined.scores[:, :number],
            joined.done[:, :number],
        )

    def agreed(self, place: int, begin: int, ended: bool) -> list[tuple[int, int]]:
        """Tokens from step `begin` on that are certain for prompt number `place` of those in `places`.

        Each with the number of the row it was chosen for.
        That is what all outputs begin with that may still become its best: those that run and those that finished.
        When it has `ended`, that is the best one.
        """
        tokens = self.finished.tokens[place, :, begin:]
        origins = self.finished.origins[place, :, begin:]
        if ended:
            tokens, origins = tokens[:1], origins[:1]
        else:
            done = self.finished.done[place]
            tokens = torch.cat([self.running.tokens[place, :, begin:], tokens[done]])
            origins = torch.cat([self.running.origins[place, :, begin:], origins[done]])
        same = ((tokens == tokens[:1]) & (origins >= 0)).all(dim=0)
        certain = int(same.int().cumprod(0).sum())
        return list(zip(tokens[0, :certain].tolist(), origins[0, :certain].tolist(), strict=True))

    def _settle(self, live: list[int]) -> None:
        """Put away the results of prompts that are not among `live`."""
        if live == self.places:
            return
        device = self.running.tokens.device
        for place, prompt in enumerate(self.places):
            if prompt not in live:
                self._settled[prompt] = self.finished.of(torch.tensor([place], device=device))
        left = torch.tensor([self.places.index(prompt) for prompt in live], dtype=torch.int64, device=device)
        self.running, self.finished, self._open = self.running.of(left), self.finished.of(left), self._open[left]
        self.places = live

    def _rows(self) -> Tensor:
        """Numbers of the rows of the prompts that are not settled, `[rows]`."""
        beams, device = self.rules.beams, self._prompts.device
        return (
            torch.tensor(self.places, device=device)[:, None] * beams + torch.arange(beams, device=device)
        ).flatten()

    def _columns(self, tokens: Tensor) -> Tensor:
        """Prompts with outputs `[prompts, number, steps]` after them, `[prompts * number, columns]`."""
        prompts = self._prompts[:: self.rules.beams]
        if len(self.places) < len(prompts):
            prompts = prompts[torch.tensor(self.places, device=prompts.device)]
        return torch.cat([prompts.repeat_interleave(tokens.shape[1], dim=0), tokens.flatten(0, 1)], dim=1)

    def _processed(self, scores: Tensor) -> Tensor:
        if self._process is None:
            return scores
        ids = self._columns(self.running.tokens)
        if len(ids) == len(self._prompts):
            return self._process(ids, scores)
        return self._process.on_rows(ids, scores, self._rows())

    def _candidates(self, scores: Tensor, rows: Items[Sequence]) -> tuple[Hypotheses, Tensor]:
        """The continuations looked at in this step, and for which prompts `[prompts]` there was one to choose."""
        prompts, beams = self.running.scores.shape
        vocab = scores.shape[1]
        total = (scores.view(prompts, beams, vocab) + self.running.scores[:, :, None]).view(prompts, -1)
        if self._noise is None:
            found, flat = total.topk(self.rules.candidates)
            fine = found[:, 0] > -torch.inf
        else:  # without replacement, as `torch.multinomial` draws
            ratio = total.softmax(dim=-1).div_(self._noise(rows, vocab).view(prompts, -1))
            most, flat = ratio.topk(self.rules.candidates)
            found = total.gather(1, flat)
            fine = most[:, 0].isfinite() & (most[:, 0] > 0)
        beam = flat // vocab
        grown = self.running.take(beam)
        origin = beam + torch.tensor(self.places, device=beam.device)[:, None] * beams
        tokens = torch.cat([grown.tokens, (flat % vocab)[..., None]], dim=2)
        origins = torch.cat([grown.origins, origin[..., None].int()], dim=2)
        return Hypotheses(tokens, origins, found, grown.done), fine

    def _hits(self, candidates: Hypotheses, scores: Tensor) -> Tensor:
        """Which candidates end with their newest token, `[prompts, candidates]`."""
        ends = self._ends
        hits = torch.isin(candidates.tokens[:, :, -1], ends.eos)
        if self._prompts.shape[1] + candidates.tokens.shape[2] >= ends.columns:
            hits = torch.ones_like(hits)
        if ends.criteria:
            seen = None if ends.scores is None else (*ends.scores, scores)
            hits = hits | ends.criteria(self._columns(candidates.tokens), seen).view_as(hits)
        return hits

    def _finish(self, candidates: Hypotheses, hits: Tensor) -> None:
        """Let candidates that ended compete with the finished outputs; only the first `beams` of them may."""
        rules = self.rules
        steps = candidates.tokens.shape[2]
        fresh = hits.clone()
        fresh[:, rules.beams :] = False
        scores = candidates.scores / steps**rules.length_penalty
        if rules.early_stopping is True:
            scores = scores + self.finished.done.all(dim=-1, keepdim=True).float() * _FAR
        scores = scores + (~self._open).float() * _FAR
        scores = scores + (~fresh).float() * _FAR
        ended = Hypotheses(candidates.tokens, candidates.origins, scores, fresh)
        merged = _join([self.finished.widen(steps, rules.filler), ended], 1)
        self.finished = merged.take(merged.scores.topk(rules.beams)[1])

    def _ended(self, hits: Tensor) -> Tensor:
        """Which prompts are settled after this step, `[prompts]`."""
        rules = self.rules
        never = rules.early_stopping == "never" and rules.length_penalty > 0.0
        length = rules.max_new if never else self.running.tokens.shape[2]
        hoped = self.running.scores[:, :1] / length**rules.length_penalty
        worst = self.finished.scores.amin(dim=1, keepdim=True).where(self.finished.done, _FAR)
        self._open = self._open & (hoped > worst).any(dim=-1, keepdim=True)
        full = self.finished.done.all(dim=-1) if rules.early_stopping is True else torch.zeros_like(self._open[:, 0])
        over = ~self._open.any() | full.all() | hits.all()
        return over.expand(full.shape) if self._together else over | full | ~self._open[:, 0]
