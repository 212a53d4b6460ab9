"""transformers' streamers forget what came before a newline; ours print what `decode` gives."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models

import unspool.streaming as ours


def streamed(streamer: Any, ids: list[int]) -> str:
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return "".join(streamer)


def test_the_space_after_a_newline_is_kept() -> None:
    backend = Tokenizer(models.BPE(vocab={"▁a": 0, "\n": 1, "▁b": 2}, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [0, 1, 2]
    assert tokenizer.decode(ids) == "a\n b"
    assert streamed(ours.TextIteratorStreamer(tokenizer), ids) == "a\n b"
    assert streamed(transformers.TextIteratorStreamer(tokenizer), ids) == "a\nb"
