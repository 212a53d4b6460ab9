"""Small type aliases shared by all rooms. No code, no torch."""

from __future__ import annotations

import os
from typing import TypeAlias

__all__ = ["JSON", "FileName"]

FileName: TypeAlias = str | os.PathLike[str]
"""A path as callers pass it."""

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None
"""What a JSON document can hold."""
