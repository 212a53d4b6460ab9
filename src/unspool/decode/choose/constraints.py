"""What a constrained beam search must say: phrases, and how far each row has come with them.

The four public classes carry the names, methods and results of transformers 4, where this search lived until v5, so
that constraints of a caller's own, written for it, work here too.

Source: Anderson et al., https://arxiv.org/abs/1612.00576, with banks as in Post and Vilar,
https://arxiv.org/abs/1804.06609.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence as Items
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST_STEPS = 10_000


class Constraint(ABC):
    """Something that an output must contain; it watches the tokens go by and asks for those that it needs next.

    Subclass it for constraints of your own. Besides the methods, one needs an attribute `seqlen`: the most tokens that
    fulfil it. `super().__init__()`, called last, checks that following `advance()` fulfils it.

    Raises:
        ValueError: (by `__init__`) following `advance()` does not fulfil it.
    """

    seqlen: int

    def __init__(self) -> None:
        self.test()

    def test(self) -> None:
        """Follow `advance()` until the constraint is fulfilled; raises ValueError if it never is."""
        name, completed = type(self).__name__, False
        for step in range(_MOST_STEPS):
            if step == 1:
                self.reset()
            wanted = self.advance()
            token = wanted[0] if isinstance(wanted, list) and wanted else wanted
            if not isinstance(token, int) or not self.does_advance(token):
                raise ValueError(f"{name}.does_advance() must be true of what advance() returns, here {wanted!r}")
            _, completed, _ = self.update(token)
            if completed:
                break
        if not completed:
            raise ValueError(f"{name} is not fulfilled after {_MOST_STEPS} tokens that its advance() asked for")
        if self.remaining() != 0:
            raise ValueError(f"{name}.remaining() must be 0 once it is fulfilled, not {self.remaining()}")

    @abstractmethod
    def advance(self) -> int | list[int] | None:
        """The token, or the tokens any of which, would bring it one step on; `None` when it is fulfilled."""

    @abstractmethod
    def does_advance(self, token_id: int) -> bool:
        """Whether `token_id` would bring it one step on."""

    @abstractmethod
    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Take note of a token: whether it was a step on, whether all is fulfilled, whether progress was lost."""

    @abstractmethod
    def reset(self) -> None:
        """Lose all progress."""

    @abstractmethod
    def remaining(self) -> int:
        """How many steps are left, at most."""

    @abstractmethod
    def copy(self, stateful: bool = False) -> Constraint:
        """The same constraint at its start, or with `stateful` where this one is."""


class PhrasalConstraint(Constraint):
    """The output must contain these tokens, one after the other.

    A token that does not continue the phrase loses all progress and is not looked at again as its beginning, as in
    transformers 4.

    Args:
        token_ids: the phrase.

    Raises:
        ValueError: `token_ids` is not a list of at least one id.
    """

    def __init__(self, token_ids: list[int]) -> None:
        _check_phrase("token_ids", token_ids)
        self.token_ids = token_ids
        self.seqlen = len(token_ids)
        self.fulfilled_idx = -1
        self.completed = False

    def advance(self) -> int | None:
        """The phrase's next token; `None` when it is complete."""
        return None if self.completed else self.token_ids[self.fulfilled_idx + 1]

    def does_advance(self, token_id: int) -> bool:
        """Whether `token_id` is the phrase's next token."""
        _check_token(token_id)
        return not self.completed and token_id == self.token_ids[self.fulfilled_idx + 1]

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Step on, or back to the start; see `Constraint`."""
        if not self.does_advance(token_id):
            self.reset()
            return False, False, True
        self.fulfilled_idx += 1
        self.completed = self.fulfilled_idx == self.seqlen - 1
        return True, self.completed, False

    def reset(self) -> None:
        """Back to the start."""
        self.completed = False
        self.fulfilled_idx = -1

    def remaining(self) -> int:
        """Tokens left to say."""
        return self.seqlen - (self.fulfilled_idx + 1)

    def copy(self, stateful: bool = False) -> PhrasalConstraint:
        """See `Constraint`."""
        made = PhrasalConstraint(self.token_ids)
        if stateful:
            made.fulfilled_idx, made.completed = self.fulfilled_idx, self.completed
        return made


class DisjunctiveConstraint(Constraint):
    """The output must contain one of these phrases.

    Args:
        nested_token_ids: the phrases; none may begin with another.

    Raises:
        ValueError: it is not a list of lists of ids, or one phrase begins with another (or is given twice).
    """

    def __init__(self, nested_token_ids: list[list[int]]) -> None:
        if not isinstance(nested_token_ids, list) or not nested_token_ids:
            raise ValueError(f"nested_token_ids must be a list of at least one phrase, not {nested_token_ids!r}")
        for phrase in nested_token_ids:
            _check_phrase("each phrase in nested_token_ids", phrase)
        self.token_ids = nested_token_ids
        self.seqlen = max(map(len, nested_token_ids))
        self.current_seq: list[int] = []
        self.completed = False
        self._tree: dict[int, Any] = {}
        ends: list[dict[int, Any]] = []
        for phrase in nested_token_ids:
            level = self._tree
            for token in phrase:
                level = level.setdefault(token, {})
            ends.append(level)
        if any(ends) or len({id(end) for end in ends}) < len(ends):
            raise ValueError(
                f"no phrase in nested_token_ids may begin with another or come twice, here {nested_token_ids}; "
                "leave out the longer one, since the shorter one fulfils the constraint"
            )

    def advance(self) -> list[int] | None:
        """The tokens that continue some phrase; `None` when one is complete."""
        return list(self._level()) or None

    def does_advance(self, token_id: int) -> bool:
        """Whether `token_id` continues some phrase."""
        _check_token(token_id)
        return token_id in self._level()

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Step on, or back to the start; see `Constraint`."""
        stepped = self.does_advance(token_id)
        if stepped:
            self.current_seq.append(token_id)
        else:
            self.reset()
        self.completed = not self._level()
        return stepped, self.completed, not stepped

    def reset(self) -> None:
        """Back to the start."""
        self.completed = False
        self.current_seq = []

    def remaining(self) -> int:
        """Tokens left to say of the longest phrase; 0 once one is complete."""
        return 0 if self.completed else self.seqlen - len(self.current_seq)

    def copy(self, stateful: bool = False) -> DisjunctiveConstraint:
        """See `Constraint`. With `stateful` the copy goes on with this one's list of tokens, as in transformers 4.

        Thus of several continuations of a phrase begun, tried side by side, later ones see those before them; which
        rows a search prefers then depends on it, and results would differ without it.
        """
        made = DisjunctiveConstraint(self.token_ids)
        if stateful:
            made.current_seq, made.completed = self.current_seq, self.completed
        return made

    def _level(self) -> dict[int, Any]:
        """What may follow, as the branches of a tree."""
        level = self._tree
        for token in self.current_seq:
            level = level[token]
        return level


class ConstraintListState:
    """How far one output has come with a list of constraints: some complete, one in progress at most, the rest pending.

    Args:
        constraints: what is to be fulfilled, in any order; they stay as they are.
    """

    def __init__(self, constraints: list[Constraint]) -> None:
        self.constraints = constraints
        self.max_seqlen = max(constraint.seqlen for constraint in constraints)
        self.n_constraints = len(constraints)
        self.completed = False
        self.init_state()

    def init_state(self) -> None:
        """Back to the start, all constraints pending."""
        self.complete_constraints: list[Constraint] = []
        self.inprogress_constraint: Constraint | None = None
        self.pending_constraints = [constraint.copy() for constraint in self.constraints]

    def get_bank(self) -> int:
        """How far it is, in tokens: `max_seqlen` for each complete constraint, and steps made in the one under way."""
        under_way = self.inprogress_constraint
        steps = 0 if under_way is None else self.max_seqlen - under_way.remaining()
        return len(self.complete_constraints) * self.max_seqlen + steps

    def advance(self) -> list[int] | None:
        """Tokens that bring it on: of the constraint under way, or else of any pending one; `None` without any."""
        under_way = self.inprogress_constraint
        tokens: list[int] = []
        for constraint in self.pending_constraints if under_way is None else [under_way]:
            wanted = constraint.advance()
            tokens += wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
        return tokens or None

    def reset(self, token_ids: Iterable[int] | None) -> None:
        """Back to the start, and from there through `token_ids`."""
        self.completed = False
        self.init_state()
        for token in token_ids or ():
            self.add(token)
            if self.completed:
                break

    def add(self, token_id: int) -> tuple[bool, bool]:
        """Take note of a token: whether it completed a constraint, and whether it was a step on.

        A token counts for one constraint only, and one that breaks a phrase does not begin another.
        """
        _check_token(token_id)
        if self.completed:
            return True, False
        if self.inprogress_constraint is not None:
            complete, stepped = self._go_on(self.inprogress_constraint, token_id)
        else:
            complete, stepped = self._begin(token_id)
        self.completed = complete and not self.pending_constraints and self.inprogress_constraint is None
        return complete, stepped

    def copy(self, stateful: bool = True) -> ConstraintListState:
        """The same list at its start, or with `stateful` as far as this one."""
        made = ConstraintListState(self.constraints)
        if stateful:
            made.complete_constraints = [one.copy(stateful=True) for one in self.complete_constraints]
            if self.inprogress_constraint is not None:
                made.inprogress_constraint = self.inprogress_constraint.copy(stateful=True)
            made.pending_constraints = [one.copy() for one in self.pending_constraints]
        return made

    def followed(self, token_id: int) -> ConstraintListState:
        """The state after one more token; this one stays as it is, and both share nothing that changes."""
        if self.completed:
            return self
        made = ConstraintListState.__new__(ConstraintListState)
        made.constraints, made.max_seqlen, made.n_constraints = self.constraints, self.max_seqlen, self.n_constraints
        made.completed = False
        made.complete_constraints = list(self.complete_constraints)
        made.inprogress_constraint = deepcopy(self.inprogress_constraint)
        made.pending_constraints = [one.copy() for one in self.pending_constraints]
        made.add(token_id)
        return made

    def _go_on(self, constraint: Constraint, token_id: int) -> tuple[bool, bool]:
        stepped, complete, lost = constraint.update(token_id)
        if lost:
            self.pending_constraints.append(constraint.copy())
            self.inprogress_constraint = None
        if complete:
            self.complete_constraints.append(constraint)
            self.inprogress_constraint = None
        return complete, stepped

    def _begin(self, token_id: int) -> tuple[bool, bool]:
        for place, constraint in enumerate(self.pending_constraints):
            if not constraint.does_advance(token_id):
                continue
            stepped, complete, _ = constraint.update(token_id)
            if not stepped:
                name = type(constraint).__name__
                raise ValueError(f"{name}.update({token_id}) was no step on, though does_advance({token_id}) was true")
            del self.pending_constraints[place]
            if complete:
                self.complete_constraints.append(constraint)
            else:
                self.inprogress_constraint = constraint
            return complete, True
        return False, False


class Pick(NamedTuple):
    """A continuation: `token` after the prompt's row `beam`, with its running score."""

    score: float
    token: int
    beam: int


class Progress:
    """How far the rows of every prompt have come with the constraints, and what that makes of a step's picks.

    Args:
        constraints: what every output must fulfil.
        prompts: true tokens of every prompt; what stands there already counts.
        beams: rows of each.
    """

    def __init__(self, constraints: list[Constraint], prompts: Items[list[int]], beams: int) -> None:
        self._states: list[list[ConstraintListState]] = []
        self._texts: list[list[int]] = []  # a number for each row's output so far: equal numbers, equal outputs
        self._numbers: dict[tuple[int, int], int] = {}
        for tokens in prompts:
            state = ConstraintListState([constraint.copy() for constraint in constraints])
            state.reset(tokens)
            self._states.append([state] * beams)
            self._texts.append([-1] * beams)

    def complete(self, prompt: int, beam: int) -> bool:
        """Whether row `beam` of a prompt has fulfilled every constraint."""
        return self._states[prompt][beam].completed

    def step(self, prompt: int, picks: list[Pick], totals: Tensor) -> list[Pick]:
        """Of a step's picks, and of what would bring the rows on, the continuations to take.

        They are ranked by progress, then score, and taken from the ranks of progress in turn.

        Args:
            prompt: its number.
            picks: the best continuations, one for each row to be.
            totals: `[beams, vocab]` running scores of all continuations.
        """
        states, texts = self._states[prompt], self._texts[prompt]
        after = [states[pick.beam].followed(pick.token) for pick in picks]
        seen = {(texts[pick.beam], pick.token) for pick in picks}
        banks = [state.get_bank() for state in after]
        found: list[tuple[int, int]] = []
        tried: list[ConstraintListState] = []
        for beam, state in enumerate(states):
            for token, ahead in _ahead(state, totals.shape[1]):
                if (texts[beam], token) not in seen:
                    seen.add((texts[beam], token))
                    found.append((beam, token))
                    tried.append(ahead)
        if found:
            beams, tokens = zip(*found, strict=True)
            scores = totals[list(beams), list(tokens)].tolist()
            picks = picks + [Pick(score, token, beam) for score, (beam, token) in zip(scores, found, strict=True)]
            banks += [state.get_bank() for state in tried]
            order = _in_turn(banks, [pick.score for pick in picks])[: len(after)]
            after = [after[i] if i < len(after) else states[picks[i].beam].followed(picks[i].token) for i in order]
            picks = [picks[i] for i in order]
        self._states[prompt] = after
        self._texts[prompt] = [
            self._numbers.setdefault((texts[pick.beam], pick.token), len(self._numbers)) for pick in picks
        ]
        return picks


def read_constraints(constraints: Any, force_words_ids: Any, vocab: int) -> list[Constraint]:
    """The constraints that `constraints` and `force_words_ids` name together.

    Args:
        constraints: a list of `Constraint`, or of anything with its methods; or `None`.
        force_words_ids: a list of phrases (lists of ids) and of alternatives (lists of phrases); or `None`.
        vocab: the model's vocabulary size.

    Raises:
        TypeError, ValueError: they are something else, or name a token that the model does not have.
    """
    found: list[Constraint] = []
    if constraints is not None:
        if not isinstance(constraints, list | tuple) or not constraints:
            raise ValueError(f"constraints must be a list of at least one Constraint, not {constraints!r}")
        for one in constraints:
            missing = [name for name in (*sorted(Constraint.__abstractmethods__), "seqlen") if not hasattr(one, name)]
            if missing:
                raise TypeError(
                    f"constraints must hold Constraint objects, not {type(one).__name__}, which has no {missing[0]}"
                )
        found += constraints
    if force_words_ids is not None:
        if not isinstance(force_words_ids, list) or not force_words_ids:
            raise ValueError(f"force_words_ids must be a list of at least one phrase, not {force_words_ids!r}")
        for words in force_words_ids:
            nested = isinstance(words, list) and bool(words) and isinstance(words[0], list)
            for phrase in words if nested else [words]:
                _check_phrase("each phrase in force_words_ids", phrase)
            found.append(DisjunctiveConstraint(words) if nested else PhrasalConstraint(words))
    for one in found:
        if isinstance(one, PhrasalConstraint | DisjunctiveConstraint):
            phrases = [one.token_ids] if isinstance(one, PhrasalConstraint) else one.token_ids
            for token in (token for phrase in phrases for token in phrase):
                _check_known(token, vocab)
    return found


def _ahead(state: ConstraintListState, vocab: int) -> list[tuple[int, ConstraintListState]]:
    """The tokens that would bring a row on, each with the state after it."""
    if state.completed:
        return []
    base = copy(state)
    # Copies of one state may share what a constraint shares (see `DisjunctiveConstraint.copy`), but not with `state`.
    base.inprogress_constraint = deepcopy(state.inprogress_constraint)
    found = []
    for token in base.advance() or ():
        _check_known(token, vocab)
        ahead = base.copy(stateful=True)
        ahead.add(token)
        found.append((token, ahead))
    return found


def _in_turn(banks: list[int], scores: list[float]) -> list[int]:
    """Places in the order to take: the best of every bank, the highest bank first, then the second best, and so on."""
    every = torch.tensor(scores, dtype=torch.float32, device="cpu")
    order = (every.new_tensor(banks) * 100 + every).sort(descending=True)[1].tolist()
    ranks: list[int] = []
    for i, place in enumerate(order):
        again = i > 0 and banks[place] == banks[order[i - 1]]
        ranks.append(ranks[-1] + 1 if again else 0)
    return [order[i] for i in sorted(range(len(order)), key=ranks.__getitem__)]


def _check_phrase(name: str, phrase: Any) -> None:
    fine = isinstance(phrase, list) and bool(phrase)
    if not fine or not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in phrase):
        raise ValueError(f"{name} must be a list of at least one token id (non-negative ints), not {phrase!r}")


def _check_token(token_id: Any) -> None:
    if not isinstance(token_id, int):
        raise TypeError(f"a token id must be an int, not {token_id!r} ({type(token_id).__name__})")


def _check_known(token: int, vocab: int) -> None:
    if not 0 <= token < vocab:
        raise ValueError(
            f"a constraint asks for token id {token}, outside the model's vocabulary of {vocab}; "
            "make its ids with the model's own tokenizer"
        )
