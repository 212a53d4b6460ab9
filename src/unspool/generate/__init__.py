"""`generate()`: the front end for rows that start together.

`mixin` is the public method, `inputs` reads what the caller passed, `call` is what they come to. A mode sets up how a
call is decoded (`sampling`, `beams`, `assisted`), a backend computes it (`native`, `foreign`), and `static` runs it in
the core's loop. `recorder` takes the tokens, `stream` hands them to a streamer, `outputs` are results, `scores`
recomputes transition scores. How tokens are decided and in which order rows are fed is the core's business
(`unspool.decode`).
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
