"""The table that tells where each setting came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unspool.config.defaults import default_generation_params
from unspool.config.fields import FIELDS

__all__ = ["SOURCES", "explanation"]

SOURCES: dict[str, str] = {
    "call": "the call",
    "object": "the GenerationConfig object",
    "model": "the model's generation_config",
    "default": "the default",
}
"""The origins of a value, the strongest first, in words."""


def explanation(config: Any, sources: Mapping[str, str] | None) -> str:
    """A table of every effective value and its origin, then the names of the fields that are off.

    Args:
        config: The configuration.
        sources: The origin of each value of a resolved configuration. `None`: what is set counts as the object's, and
            the rest is filled with the defaults.
    """
    rows = _rows(config, sources)
    shown = [(name, _short(value), SOURCES[source]) for name, (value, source) in rows.items() if value is not None]
    off = [name for name, (value, _) in rows.items() if value is None]
    widths = [max((len(row[i]) for row in [("setting", "value", ""), *shown]), default=0) for i in range(2)]
    lines = [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in shown]
    head = f"{'setting':<{widths[0]}}  {'value':<{widths[1]}}  from"
    return "\n".join([head, *lines, "", "off: " + ", ".join(off)])


def _rows(config: Any, sources: Mapping[str, str] | None) -> dict[str, tuple[Any, str]]:
    extras = [key for key in vars(config) if key not in FIELDS and not key.startswith("_")]
    names = [*FIELDS, *(key for key in extras if key != "transformers_version")]
    if sources is not None:
        return {name: (getattr(config, name), sources.get(name, "object")) for name in names}
    defaults = default_generation_params()
    return {
        name: (value, "object") if (value := getattr(config, name)) is not None else (defaults.get(name), "default")
        for name in names
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."
