"""`python -m unspool` is the `unspool` command."""

from unspool.cli import main

main()
