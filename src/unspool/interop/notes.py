"""What was left to transformers, and why: said once in the log."""

from __future__ import annotations

import logging

__all__ = ["note"]

_log = logging.getLogger("unspool")
_said: set[tuple[str, str]] = set()


def note(model: str, reason: str) -> None:
    """Log, once, that a model's call is decoded by transformers itself."""
    if (model, reason) not in _said:
        _said.add((model, reason))
        _log.info("%s: decoded by transformers' own loop, because %s", model, reason)
