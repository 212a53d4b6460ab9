"""The page: a report as HTML that loads nothing.

Tokens' texts reach the page in two ways: through jinja, which escapes them, and as JSON, in which no character is left
that could end its script element. The script writes them as text, never as HTML.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from unspool.inspection.report import Node, Report, Row, Step, Tree

__all__ = ["page"]

# Least probability of each shade, the surest first; what is below all of them is the last shade.
SHADES = (0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01)

COLUMN, LANE, NODE, TOP = 104, 44, 84, 26
"""Sizes of a drawn tree in pixels: of a step, of a lane, of a token's box, and of the line of numbers above."""


def page(report: Report, title: str) -> str:
    """The whole page."""
    texts = _Texts()
    data = {
        "vocab": report.vocab,
        "rows": [[_step(step, texts) for step in row.steps] for row in report.rows],
        "trees": [[_node(node, texts) for node in tree.nodes] for tree in report.trees],
        "texts": texts.items,
    }
    html: str = _template().render(
        title=title,
        report=report,
        shades=[f"{100 * least:g}%" for least in SHADES],
        data=_script(data),
        style=_asset("page.css"),
        script=_asset("page.js"),
        drawings=[_drawing(tree) for tree in report.trees],
        marks=_marks(report),
    )
    return html


class _Texts:
    """A table of texts, each in it once."""

    def __init__(self) -> None:
        self.items: list[str] = []
        self._places: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        place = self._places.setdefault(text, len(self.items))
        if place == len(self.items):
            self.items.append(text)
        return place


def _step(step: Step, texts: _Texts) -> list[Any]:
    """A token as the script reads it."""
    others = [[texts(other.text), _short(other.p), _short(other.own)] for other in step.others]
    refused = [texts(text) for text in step.refused]
    mark = 1 if step.drafted else 0
    return [texts(step.name), step.id, _short(step.p), _short(step.own), step.rank, step.allowed, mark, others, refused]


def _node(node: Node, texts: _Texts) -> list[Any]:
    outputs = [output + 1 for output in node.outputs]
    return [texts(node.text), node.step + 1, _short(node.p), _short(node.total), node.fate, node.until, outputs]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _script(data: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def shade(p: float | None) -> str:
    """The class of a probability's colour."""
    if p is None:
        return ""
    return f"p{next((i for i, least in enumerate(SHADES) if p >= least), len(SHADES))}"


def classes(step: Step) -> str:
    """Classes of a token in the running text."""
    names = ["t", shade(step.p), "d" if step.drafted else "", "o" if step.allowed == 1 else ""]
    return " ".join(filter(None, [*names, "m" if overruled(step) else ""]))


def overruled(step: Step) -> bool:
    """Whether the model itself would rather have had a token that was masked out."""
    return any(other.p == 0 and (other.own or 0) > (step.own or 0) for other in step.others)


def node_classes(node: Node) -> str:
    """Classes of a token in a tree."""
    fates = {"pruned": "x", "returned": "w", "left": "l"}
    return " ".join(filter(None, ["t", "n", shade(node.p), fates.get(node.fate, ""), "" if node.wins else "a"]))


def percent(p: float | None) -> str:
    """A probability to read."""
    if p is None:
        return "unknown"
    if p >= 0.9995 or p == 0:
        return "100%" if p else "0%"
    return f"{100 * p:.3g}%" if p >= 1e-4 else "< 0.01%"


def broken(text: str) -> str:
    """Text with its line breaks marked."""
    return text.replace("\n", "⏎\n")


def line(text: str) -> str:
    """Text in one line."""
    return text.replace("\n", "⏎")


def single(text: str) -> str:
    """Text in one line, with the spaces at its ends marked."""
    text = line(text)
    left, right = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return "␣" * len(text) if left == len(text) else "␣" * left + text.strip(" ") + "␣" * right


def facts(row: Row) -> list[str]:
    """What the line below a row's heading says."""
    number = len(row.steps)
    said = [f"{number} token{'s' * (number != 1)}"]
    reasons = {"stop": "ended by itself (stop)", "length": "cut at the limit of tokens (length)"}
    if row.finish is not None:
        said.append(reasons.get(row.finish, row.finish))
    mean = row.mean_probability
    if mean is not None:
        said.append(f"mean probability {percent(mean)} (geometric), perplexity {1 / mean:.3g}")
    if row.score is not None:
        said.append(f"score {row.score:.4g}")
    if row.drafted is not None:
        said.append(f"{row.accepted} of {row.drafted} drafted tokens accepted in {row.rounds} drafts")
    return said


def _marks(report: Report) -> dict[str, bool]:
    """Which marks of the legend are in use."""
    steps = [step for row in report.rows for step in row.steps]
    return {
        "drafted": any(step.drafted for step in steps),
        "refused": any(step.refused for step in steps),
        "only": any(step.allowed == 1 for step in steps),
        "overruled": any(overruled(step) for step in steps),
    }


def _drawing(tree: Tree) -> dict[str, Any]:
    """A tree's boxes line by line, the lines between them, and the size of it all."""
    steps = 1 + max(node.step for node in tree.nodes)
    edges = {True: [], False: []}  # type: dict[bool, list[str]]
    for node in tree.nodes:
        if node.parent < 0:
            continue
        before = tree.nodes[node.parent]
        x, y = before.step * COLUMN + NODE, TOP + before.lane * LANE + LANE // 2
        to, down = node.step * COLUMN, TOP + node.lane * LANE + LANE // 2
        bend = (x + to) // 2
        edges[node.wins].append(f"M{x} {y}" + (f"H{to}" if y == down else f"C{bend} {y} {bend} {down} {to} {down}"))
    return {
        "steps": steps,
        "width": steps * COLUMN,
        "height": TOP + tree.lanes * LANE,
        "places": [place for chain in tree.chains for place in chain],
        "wins": "".join(edges[True]),
        "others": "".join(edges[False]),
    }


def _asset(name: str) -> str:
    return files("unspool.inspection").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent,
        broken=broken,
        single_line=line,
        single=single,
        facts=facts,
        classes=classes,
        node_classes=node_classes,
    )
    return environment.from_string(_asset("page.html"))
