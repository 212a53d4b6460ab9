"""Text to tokens and back, on the `tokenizers` library: one class for every checkpoint that has a tokenizer.json.

Here: `Tokenizer` (`tokenizer.py`) and what it returns (`encoding.py`), special tokens (`special.py`), the files
    (`files.py`),
conversations (`chat.py`, the sandbox for templates in `sandbox.py`, functions as tools in `tools.py`).

Not here: decoding a stream of tokens (`unspool.streaming`), vocabularies of other formats (SentencePiece and tiktoken
files are converted once, by transformers).
"""

from unspool.tokenization.encoding import BatchEncoding
from unspool.tokenization.tokenizer import Tokenizer

__all__ = ["BatchEncoding", "Tokenizer"]
