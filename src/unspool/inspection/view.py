"""The public function and what it returns."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unspool.inspection.reading import read
from unspool.inspection.report import Report
from unspool.types import FileName

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Inspection", "inspect"]


def inspect(
    output: Any,
    tokenizer: Any,
    *,
    top: int = 5,
    eos_token_id: int | Iterable[int] | None = None,
    title: str = "unspool inspect",
) -> Inspection:
    """Show what a call of `generate()` did: probabilities, alternatives, beams, drafts and masks.

    Args:
        output: what `generate(..., return_dict_in_generate=True, output_scores=True)` returned, of native models, of
            others, or of transformers itself. With `output_logits=True` it also shows what processors changed; with
            `output_top_logprobs=k` instead of scores, probabilities and alternatives alone.
        tokenizer: of the model.
        top: alternatives to show of each step.
        eos_token_id: what ends a row, where that is not the tokenizer's own end token.
        title: of the page.

    Raises:
        TypeError: `output` is not an output object, or `tokenizer` cannot decode.
        ValueError: the output kept neither scores nor logits nor `top_logprobs`, is not `[rows, columns]`, or `top` is
            less than 1.
    """
    if not hasattr(output, "sequences"):
        raise TypeError(
            f"output is a {type(output).__name__} and holds tokens alone; generate with return_dict_in_generate=True "
            "and output_scores=True"
        )
    if not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__} without `decode`; pass the model's tokenizer")
    if top < 1:
        raise ValueError(f"top is {top}; at least 1 alternative must be shown")
    return Inspection(read(output, tokenizer, top=top, eos_token_id=eos_token_id), title)


class Inspection:
    """What `inspect` found, as a page (`html`, `save`), in notebooks, and in terminals (`rich.print` or `print`).

    Attributes:
        report: the same as data.
        title: of the page.
    """

    def __init__(self, report: Report, title: str) -> None:
        self.report = report
        self.title = title
        self._html: str | None = None

    @property
    def html(self) -> str:
        """A page of its own: it loads nothing, and works without a network."""
        if self._html is None:
            from unspool.inspection.page import page

            self._html = page(self.report, self.title)
        return self._html

    def save(self, path: FileName) -> Path:
        """Write the page; the file appears whole or not at all."""
        target = Path(path)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            draft.write_text(self.html, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return target

    def terminal(self, *, every: bool = False) -> RenderableType:
        """What to print with rich; with `every`, a line for each token."""
        from unspool.inspection.terminal import view

        return view(self.report, every=every)

    def __rich__(self) -> RenderableType:
        return self.terminal()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(color_system=None)
        with console.capture() as capture:
            console.print(self.terminal())
        return capture.get()

    def __repr__(self) -> str:
        tokens = sum(len(row.steps) for row in self.report.rows)
        return f"Inspection({len(self.report.rows)} rows, {tokens} tokens)"

    def _repr_html_(self) -> str:
        # A frame of its own, so that neither styles nor scripts meet the notebook's.
        return (
            f'<iframe sandbox="allow-scripts" title="{html.escape(self.title)}" srcdoc="{html.escape(self.html)}" '
            'style="width:100%;height:640px;border:1px solid #8884;border-radius:8px"></iframe>'
        )
