"""A manager's numbers in a terminal, live. Drawn with rich, which is imported where it is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from unspool.continuous.metrics import Metrics

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Watch"]

_BARS = " ▁▂▃▄▅▆▇█"
_KEPT = 40  # readings of the rate that are drawn
_WIDTH = 30  # columns of the cache's bar


class Watch:
    """Shows numbers while its context is open, drawn anew every `every` seconds in a thread of its own.

    Args:
        metrics: gives them; called from that thread.
        console: of rich; stderr if not given.
        every: seconds.
        above: drawn over them, or `None`.
        clear: take it away at the end instead of leaving the last one.
    """

    def __init__(
        self,
        metrics: Callable[[], Metrics],
        *,
        console: Console | None = None,
        every: float = 0.5,
        above: RenderableType | None = None,
        clear: bool = False,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._metrics = metrics
        self._above = above
        self._every = every
        self._rates: deque[float] = deque(maxlen=_KEPT)
        self._read = -every
        self._live: Any = Live(
            get_renderable=self.draw,
            console=console or Console(stderr=True),
            refresh_per_second=1 / every,
            transient=clear,
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def draw(self) -> RenderableType:
        """What the terminal shows now."""
        from rich.console import Group
        from rich.table import Table

        numbers, now = self._metrics(), monotonic()
        if now - self._read >= self._every * 0.9:  # it is also drawn when somebody prints
            self._read = now
            self._rates.append(numbers.tokens_per_second)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in lines(numbers, list(self._rates)):
            table.add_row(name, text)
        return table if self._above is None else Group(self._above, table)


def lines(numbers: Metrics, rates: list[float]) -> list[tuple[str, str]]:
    """What is shown, by name; `rates` are tokens a second in the past, oldest first."""
    ended = ", ".join(f"{count:,} {reason}" for reason, count in sorted(numbers.finished.items()))
    shown = [
        ("requests", f"{numbers.running:,} running, {numbers.waiting:,} waiting" + (f"; {ended}" if ended else "")),
        ("tokens/s", f"{numbers.tokens_per_second:,.1f}  {_curve(rates)}".rstrip()),
        ("tokens", f"{numbers.tokens_made:,} made, {numbers.tokens_fed:,} computed in {numbers.steps:,} steps"),
        ("first token", _seconds(numbers.time_to_first_token)),
        ("per token", _seconds(numbers.time_per_token)),
        ("cache", f"{_bar(numbers)} {numbers.cache_use:.0%} in use, {numbers.cache_kept:.0%} kept"),
        ("prefix hits", _share(numbers.prefix_hits) + f"{numbers.cached_tokens:,} tokens"),
        ("preemptions", f"{numbers.preemptions:,}" + (f", {numbers.swaps:,} swapped" if numbers.swaps else "")),
    ]
    if numbers.past_bytes:
        shown.append(("pasts", f"{numbers.past_bytes / 2**20:,.1f} MiB of the module's own"))
    if numbers.acceptance is not None:
        drafts = f"{numbers.accepted_tokens:,} of {numbers.drafted_tokens:,} drafted tokens"
        shown.append(("acceptance", _share(numbers.acceptance) + drafts))
    if numbers.last_token is not None and numbers.running:
        shown.append(("last token", f"{numbers.last_token:.1f} s ago"))
    return shown


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s on average" if value >= 1 else f"{1000 * value:.1f} ms on average"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}, "


def _curve(values: list[float]) -> str:
    """One character a value, as high as it is beside the highest."""
    most = max(values, default=0.0) or 1.0
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)


def _bar(numbers: Metrics) -> str:
    """The cache: in use, kept, free."""
    used = round(numbers.cache_use * _WIDTH)
    kept = min(round(numbers.cache_kept * _WIDTH), _WIDTH - used)
    return "█" * used + "▒" * kept + "░" * (_WIDTH - used - kept)
