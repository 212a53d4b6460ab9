"""Where keys and values live: block ids and references (`blocks`), layer groups and their sizes (`layout`),
the paged store (`paged`) and what `generate()` hands back for a follow-up turn (`past`); and, for modules that keep
their own past, caches under transformers' protocol (`kinds`, of `layers`, `quantized` and `recurrent`).

How attention reads them is the attention room's business; who gets them is the scheduler's.
"""

from unspool.cache.blocks import Blocks
from unspool.cache.encoder_decoder import EncoderDecoderCache
from unspool.cache.kinds import (
    Cache,
    DynamicCache,
    OffloadedCache,
    OffloadedStaticCache,
    QuantizedCache,
    StaticCache,
)
from unspool.cache.layout import LayerGroup
from unspool.cache.paged import PagedStore
from unspool.cache.past import PastKeyValues

__all__ = [
    "Blocks",
    "Cache",
    "DynamicCache",
    "EncoderDecoderCache",
    "LayerGroup",
    "OffloadedCache",
    "OffloadedStaticCache",
    "PagedStore",
    "PastKeyValues",
    "QuantizedCache",
    "StaticCache",
]
