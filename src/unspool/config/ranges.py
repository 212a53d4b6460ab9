"""One check for every numeric setting: its type and the interval it must lie in."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import inf
from typing import Any, NamedTuple

__all__ = ["Check", "check_number", "check_ranges"]


class Check(NamedTuple):
    """What a number must be. Infinite ends are never included, NaN never passes."""

    kind: type[int] | type[float]
    low: float = -inf
    high: float = inf
    open_low: bool = False
    open_high: bool = False
    hint: str = ""
    """The way out, added to the message."""

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low == -inf and self.high == inf:
            return "finite"
        if self.high == inf:
            return f"greater than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the interval."""
        above = self.low < value if self.open_low or self.low == -inf else self.low <= value
        below = value < self.high if self.open_high or self.high == inf else value <= self.high
        return above and below


def check_number(name: str, value: Any, check: Check) -> None:
    """Check one setting.

    Raises:
        TypeError: `value` is not a number of that kind. A bool never is, a float is no int.
        ValueError: `value` is outside the interval.
    """
    if not _is_number(value, check.kind):
        raise TypeError(f"{name} must be {_ARTICLE[check.kind]}, not {value!r} ({type(value).__name__})")
    if not check.holds(value):
        hint = f"; {check.hint}" if check.hint else ""
        raise ValueError(f"{name} must be {check.interval}, not {value}{hint}")


def check_ranges(settings: object, table: Mapping[str, Check]) -> None:
    """Check every attribute that `table` names; `None` passes.

    Raises:
        TypeError, ValueError: as `check_number`.
    """
    for name, check in table.items():
        value = getattr(settings, name)
        if value is not None:
            check_number(name, value, check)


_ARTICLE: dict[type, str] = {int: "an int", float: "a number"}


def _is_number(value: Any, kind: type) -> bool:
    """Whether `value` is usable as `kind`; NumPy and PyTorch scalars are, bools and text are not."""
    if isinstance(value, bool | str | bytes):
        return False
    if kind is float:
        return isinstance(value, int | float) or (hasattr(value, "__float__") and getattr(value, "ndim", 1) == 0)
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
