"""How the forward pass is compiled. Data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Self

__all__ = ["CompileConfig"]


_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass
class CompileConfig:
    """Arguments of `torch.compile` for a generation call, as transformers has them.

    They are checked and kept, and nothing is compiled: native models have compiled kernels of their own, and other
    modules run as they are. A module that its owner compiled stays compiled.
    """

    fullgraph: bool = False
    """Fail when the whole function cannot become one graph."""
    dynamic: bool | None = None
    """Compile for changing shapes: `True`, `False`, or `None` to find out."""
    backend: str | Callable[..., Any] = "inductor"
    """Compiler."""
    mode: str | None = "reduce-overhead"
    """Balance of compile time and speed; `None` with `options` of one's own."""
    options: dict[str, Any] | None = None
    """Options for the backend."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            TypeError, ValueError: one is of the wrong type, or no mode of `torch.compile`.
        """
        if not isinstance(self.fullgraph, bool):
            raise TypeError(f"compile_config.fullgraph must be True or False, not {self.fullgraph!r}")
        if self.dynamic is not None and not isinstance(self.dynamic, bool):
            raise TypeError(f"compile_config.dynamic must be True, False or None, not {self.dynamic!r}")
        if not isinstance(self.backend, str) and not callable(self.backend):
            raise TypeError(f"compile_config.backend must be a name or a function, not {self.backend!r}")
        if self.mode is not None and self.mode not in _MODES:
            raise ValueError(f"compile_config.mode must be one of {_MODES} or None, not {self.mode!r}")
        if self.options is not None and not isinstance(self.options, Mapping):
            raise TypeError(f"compile_config.options must be a dict or None, not {self.options!r}")

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
