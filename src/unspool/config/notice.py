"""Remarks to the user.

They go to the `unspool` logger at WARNING and not through `warnings`, so that a program that turns warnings into errors
keeps running: a remark is never a reason to stop. Each is made once in a process.
"""

from __future__ import annotations

import logging
from functools import lru_cache

__all__ = ["logger", "warn_once"]

logger = logging.getLogger("unspool")


@lru_cache(maxsize=1024)  # bounded: some messages quote numbers
def warn_once(message: str) -> None:
    """Log `message` at WARNING, the first time only. `warn_once.cache_clear()` forgets what has been said."""
    logger.warning(message)
