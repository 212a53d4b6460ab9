"""How the forward pass is compiled. Data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Self

__all__ = ["CompileConfig"]


@dataclass
class CompileConfig:
    """Arguments of `torch.compile` for a generation call."""

    fullgraph: bool = False
    """Fail when the whole function cannot become one graph."""
    dynamic: bool | None = None
    """Compile for changing shapes: `True`, `False`, or `None` to find out."""
    backend: str | Callable[..., Any] = "inductor"
    """Compiler."""
    mode: str = "reduce-overhead"
    """Balance of compile time and speed."""
    options: dict[str, Any] | None = None
    """Options for the backend."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the settings from a dict.

        Raises:
            ValueError: `values` has a key that is no setting.
        """
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"compile_config has no setting {unknown[0]!r}; it has {names}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dict of their own."""
        return deepcopy(self.__dict__)
