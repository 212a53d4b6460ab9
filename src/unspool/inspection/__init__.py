"""What a call of `generate()` did, to look at: how sure each token was, what else was likely, how beams went.

`reading` makes a `report` (plain data) of an output, with `spelling` for the texts of tokens and `tree` for beams;
`page` and `terminal` draw it. Nothing here computes text, and nothing else knows of this room but the command line.
"""

from unspool.inspection.view import Inspection, inspect

__all__ = ["Inspection", "inspect"]
