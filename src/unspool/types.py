"""Small type aliases shared by all rooms. No code, no torch."""

from __future__ import annotations

import os
from typing import TypeAlias

__all__ = ["JSON", "FileName", "RowId", "TokenId"]

TokenId: TypeAlias = int
"""An index into the vocabulary, at least 0."""

RowId: TypeAlias = int
"""A row of the device table: one sequence being decoded."""

FileName: TypeAlias = str | os.PathLike[str]
"""A path as callers pass it."""

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None
"""What a JSON document can hold."""
