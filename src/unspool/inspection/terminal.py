"""The report for a terminal, with rich: coloured text, where the model hesitated, and the beams."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Branches

from unspool.inspection.page import SHADES, broken, facts, line, overruled, percent, single
from unspool.inspection.report import Report, Row, Step, Tree

__all__ = ["view"]

# Backgrounds by `SHADES`, readable below black and on dark and light terminals.
_COLOURS = ("#bfe5d2", "#cfe8bd", "#e0e8a0", "#f5e388", "#f9cb72", "#f5ab68", "#ee8c6c", "#e3706e")

_HESITATIONS = 8
"""Tokens listed of each row when not every one is."""

_MASKED = 2
"""Masked tokens listed of each step."""


def view(report: Report, *, every: bool = False) -> RenderableType:
    """What to print; with `every`, a line for each token."""
    parts: list[RenderableType] = [_legend(report)]
    parts += [Text(note, style="dim") for note in report.notes]
    for number, row in enumerate(report.rows):
        parts += [_text(number, row), Text("  " + " · ".join(facts(row)), "dim"), _steps(row, every)]
    parts += [_branches(tree) for tree in report.trees]
    return Group(*parts)


def _shade(p: float | None) -> str:
    if p is None:
        return ""
    return f"black on {_COLOURS[next((i for i, least in enumerate(SHADES) if p >= least), len(SHADES))]}"


def _legend(report: Report) -> Text:
    legend = Text("probability ")
    for least in (*SHADES, 0.0):
        legend.append(f" {100 * least:g}% " if least else " less ", _shade(least))
    steps = [step for row in report.rows for step in row.steps]
    if any(step.drafted for step in steps):
        legend.append("  ").append("drafted", "underline").append(" and accepted")
    if any(step.refused for step in steps):
        legend.append("  ").append(_refused("drafted"), "strike red").append(" and refused")
    return legend


def _text(number: int, row: Row) -> Panel:
    """A row's text, coloured."""
    shown = Text.assemble((broken(row.prompt), "dim"))
    for step in row.steps:
        if step.refused:
            shown.append(_refused(line("".join(step.refused))), "strike red")
        shown.append(broken(step.text), _shade(step.p) + (" underline" if step.drafted else ""))
    return Panel(
        shown,
        title=f"output {number + 1}",
        title_align="left",
        box=box.ROUNDED,
    )


def _refused(text: str) -> str:
    """Marked as word diffs do it, for where nothing can be struck through."""
    return f"[-{text}-]"


def _steps(row: Row, every: bool) -> RenderableType:
    """A table of a row's tokens, or of those that were least likely."""
    order = [(step.p if step.p is not None else 2.0, i) for i, step in enumerate(row.steps)]
    places = list(range(len(order))) if every else sorted(i for p, i in sorted(order)[:_HESITATIONS] if p < 0.9)
    if not places:
        return Text()
    masks = any(_masked(step) for step in row.steps)
    table = Table(
        title="every token" if every else f"the {len(places)} least likely" if len(places) > 1 else "the least likely",
        title_justify="left",
        title_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("#", justify="right")
    table.add_column("token", no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("rank", justify="right")
    if masks:
        table.add_column("allowed", justify="right")
    table.add_column("likeliest instead", ratio=1)
    for i in places:
        step = row.steps[i]
        cells = [
            Text(str(i + 1), "dim"),
            Text(single(step.name), _shade(step.p)),
            Text(percent(step.p)),
            Text("" if step.rank is None else str(step.rank)),
        ]
        table.add_row(
            *cells, *([Text("" if step.allowed is None else f"{step.allowed:,}")] if masks else []), _others(step)
        )
    return table


def _masked(step: Step) -> bool:
    return overruled(step) or step.allowed == 1


def _others(step: Step) -> Text:
    """Alternatives in one line; of what was masked, the likeliest, struck through."""
    text = Text()
    possible = [other for other in step.others if other.p and (other.text, other.p) != (step.name, step.p)]
    masked = [other for other in step.others if not other.p]
    for other in [*possible, *masked[:_MASKED]]:
        text.append("  " if text else "")
        if other.p == 0:
            text.append(single(other.text), "strike red").append(f" masked, {percent(other.own)}", "dim")
        else:
            text.append(single(other.text)).append(f" {percent(other.p)}", "dim")
    return text


def _branches(tree: Tree) -> RenderableType:
    """The best output's line, and what left it, each with what became of it."""
    behind: dict[int, list[list[int]]] = {}
    for chain in tree.chains:
        behind.setdefault(tree.nodes[chain[0]].parent, []).append(chain)
    top = Branches(Text("beams", "bold"), guide_style="dim")
    waiting = [(top, chain) for chain in reversed(behind.get(-1, []))]
    while waiting:
        branch, chain = waiting.pop()
        added = branch.add(_chain(tree, chain))
        leaving = [other for place in chain for other in behind.get(place, [])]
        waiting += [(added, other) for other in reversed(leaving)]
    return top


def _chain(tree: Tree, chain: list[int]) -> Text:
    nodes = [tree.nodes[place] for place in chain]
    text = Text(f"{nodes[0].step + 1:>3} ", "dim")
    for node in nodes:
        text.append(line(node.text), _shade(node.p))
    last = nodes[-1]
    total = "" if last.total is None else f" {last.total:.2f}"
    if last.fate == "returned":
        text.append(f" ✓ output {', '.join(str(output + 1) for output in last.outputs)}{total}", "bold green")
    elif last.fate == "pruned":
        text.append(f" ✕ pruned in step {(last.until or 0) + 1}{total}", "red")
    else:
        text.append(f" … still ran at the end{total}", "dim")
    return text
