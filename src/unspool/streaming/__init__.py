"""Text as it is made: streamers, and the incremental detokeniser under them.

Here: `BaseStreamer` and the three text streamers under transformers' names (`streamers.py`, `iterators.py`), the
detokeniser (`detokenize.py`) and the tidying of spaces in a stream (`cleanup.py`). They work with any tokenizer that
has `decode`, with unspool's decoding core and inside transformers' own `generate`.

Not here: tokenizers (`unspool.tokenization`) and the loop that calls a streamer (`unspool.decode`).
"""

from unspool.streaming.detokenize import Decoder, IncrementalDetokenizer, TokenKinds
from unspool.streaming.iterators import AsyncTextIteratorStreamer, TextIteratorStreamer
from unspool.streaming.streamers import BaseStreamer, TextStreamer

__all__ = [
    "AsyncTextIteratorStreamer",
    "BaseStreamer",
    "Decoder",
    "IncrementalDetokenizer",
    "TextIteratorStreamer",
    "TextStreamer",
    "TokenKinds",
]
