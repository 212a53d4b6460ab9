"""`python -m unspool.cli` is the `unspool` command."""

from unspool.cli import main

main()
