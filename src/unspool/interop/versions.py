"""Which transformers goes with unspool."""

from __future__ import annotations

import re
import sys

from unspool.errors import Unsupported

__all__ = ["OLDEST", "check_version"]

OLDEST = (5, 2)


def check_version() -> None:
    """Refuse a transformers, if one is loaded, whose models call otherwise than ours can.

    Raises:
        Unsupported: it is older than `OLDEST`.
    """
    version = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is not None and (int(parts[1]), int(parts[2])) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise Unsupported(
            f"transformers {version} is installed; its models are decoded from {least} on: "
            f"pip install --upgrade 'transformers>={least}'"
        )
