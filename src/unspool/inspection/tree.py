"""The trees that beams made, from what a search recorded, and where their branches stand in a drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from unspool.generate.outputs import BeamStep
from unspool.inspection.report import Node, Tree

# Step, beam row and token to probability and score; `None` where they were not recorded.
Scores = Callable[[int, int, int], tuple[float, float] | None]


class Path(NamedTuple):
    """A returned output: its tokens, and the beam row that each was chosen for."""

    tokens: list[int]
    origins: list[int]


class _Grower:
    """Nodes found so far, one for each way to get there."""

    def __init__(self, scores: Scores, name: Callable[[int], str]) -> None:
        self.nodes: list[Node] = []
        self.roots: list[int] = []  # beam row that each node's first one was chosen for
        self._scores = scores
        self._name = name
        self._places: dict[tuple[int, int, int], int] = {}

    def child(self, parent: int, row: int, step: int, token: int) -> int:
        """Place of the node of `token`, chosen for the beam row `row`, behind the node `parent` (-1: the prompt)."""
        root = row if parent < 0 else self.roots[parent]
        place = self._places.setdefault((parent, root, token), len(self.nodes))
        if place == len(self.nodes):
            before = self.nodes[parent].total if parent >= 0 else 0.0
            found = self._scores(step, row, token)
            p, total = (None, None) if found is None or before is None else (found[0], before + found[1])
            self.nodes.append(Node(step, parent, self._name(token), p, total))
            self.roots.append(root)
        return place


def grow(
    steps: Sequence[BeamStep] | None, paths: Sequence[Path], scores: Scores, name: Callable[[int], str]
) -> list[Tree]:
    """The trees of all prompts.

    Args:
        steps: how the beams went; `None` where only the returned outputs are known.
        paths: of the returned outputs.
        scores: see `Scores`.
        name: how a token reads.
    """
    grower = _Grower(scores, name)
    last: dict[int, int] = {}  # beam row -> its node
    ran: list[set[int]] = []  # per step, beam rows that prompts of began with and that still ran
    for number, step in enumerate(steps or ()):
        last = {
            row: grower.child(last.get(parent, -1), parent, number, token)
            for row, parent, token in zip(step.rows, step.parents, step.tokens, strict=True)
        }
        ran.append({grower.roots[place] for place in last.values()})
    for output, path in enumerate(paths):
        place = -1
        for number, (token, origin) in enumerate(zip(path.tokens, path.origins, strict=True)):
            place = grower.child(place, origin, number, token)
            grower.nodes[place].wins = True
        if place >= 0:
            grower.nodes[place].outputs.append(output)
    _decide(grower, ran)
    return [_tree(grower, root, steps is not None) for root in sorted(set(grower.roots))]


def _decide(grower: _Grower, ran: list[set[int]]) -> None:
    """Say of each node what became of it."""
    parents = {node.parent for node in grower.nodes}
    for place, node in enumerate(grower.nodes):
        if node.outputs:
            node.fate = "returned"
        elif place not in parents:
            pruned = node.step + 1 < len(ran) and grower.roots[place] in ran[node.step + 1]
            node.fate = "pruned" if pruned else "left"
            node.until = node.step + 1 if pruned else None


def _tree(grower: _Grower, root: int, whole: bool) -> Tree:
    places = [place for place, own in enumerate(grower.roots) if own == root]
    new = {place: i for i, place in enumerate(places)}
    nodes = [grower.nodes[place] for place in places]
    for node in nodes:
        node.parent = new.get(node.parent, -1)
    chains = _chains(nodes)
    return Tree(nodes, chains, _lay_out(nodes, chains), whole)


def _chains(nodes: list[Node]) -> list[list[int]]:
    """The tree cut into lines: the best output's path first, then what leaves lines that are there, by its beginning.

    Where a line divides, it goes on to the best output; else to what ran longest, and of equals to what scored best.
    """
    children: list[list[int]] = [[] for _ in nodes]
    starts: list[int] = []
    worth: list[tuple[float, int, float]] = [(0.0, 0, 0.0)] * len(nodes)
    for place in range(len(nodes) - 1, -1, -1):  # children before parents
        node = nodes[place]
        own = (-min(node.outputs, default=len(nodes)), node.step, float("-inf") if node.total is None else node.total)
        worth[place] = max([own, *(worth[child] for child in children[place])])
        children[place].sort(key=lambda child: worth[child], reverse=True)
        (children[node.parent] if node.parent >= 0 else starts).append(place)
    starts.sort(key=lambda place: worth[place], reverse=True)
    chains = []
    for start in starts:  # grows while it is walked
        chain = [start]
        while children[chain[-1]]:
            first, *others = children[chain[-1]]
            starts += others
            chain.append(first)
        chains.append(chain)
    return [chains[0], *sorted(chains[1:], key=lambda chain: (nodes[chain[0]].step, chain[0]))]


def _lay_out(nodes: list[Node], chains: list[list[int]]) -> int:
    """Give each line the first lane that is free for it; returns how many lanes there are."""
    taken: list[int] = []  # per lane, the last step that is taken
    for chain in chains:
        begin, end = nodes[chain[0]].step, nodes[chain[-1]].step
        lane = next((lane for lane, until in enumerate(taken) if until < begin), len(taken))
        taken[lane : lane + 1] = [end]
        for place in chain:
            nodes[place].lane = lane
    return len(taken)
