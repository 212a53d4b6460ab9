"""The `unspool` command: `generate`, `chat`, `inspect`, `bench` and `info`.

Here are arguments, terminals and exit codes; what the commands do is the library's. Everything heavy is imported when a
command needs it, so that `unspool --help` answers at once.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit with its code."""
    import warnings

    from unspool.cli.run import run, show_warning

    warnings.showwarning = show_warning
    sys.exit(run(sys.argv[1:]))
