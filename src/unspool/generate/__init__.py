"""`generate()`: the front end for rows that start together.

`mixin` is the public method, `inputs` reads what the caller passed, `static` puts the core's objects together and runs
them, `recorder` takes the tokens and `beams` those of beams, `stream` hands them to a streamer, `outputs` are results,
`scores` recomputes transition scores, `fault` explains NaN. How tokens are decided and in which order rows are fed is
the core's business (`unspool.decode`).
"""

from unspool.generate.mixin import GenerationMixin
from unspool.generate.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerateOutput,
    ModelOutput,
)

__all__ = [
    "GenerateBeamDecoderOnlyOutput",
    "GenerateDecoderOnlyOutput",
    "GenerateOutput",
    "GenerationMixin",
    "ModelOutput",
]
