"""Streamers against transformers': same joined text, with its tokenizers and inside its own `generate`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import unspool.streaming as ours


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["Once upon a time, there was a fox. Élan vital 你好世界 😀\n"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def played(streamer: Any, prompt: list[int], tokens: list[int]) -> str:
    streamer.put(torch.tensor([prompt]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return "".join(streamer)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip_prompt=st.booleans(), skip_special_tokens=st.booleans())
def test_joined_text_is_that_of_transformers(
    tokenizer: Any, data: st.DataObject, skip_prompt: bool, skip_special_tokens: bool
) -> None:
    text = st.text(max_size=20).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    ids = text | st.lists(st.integers(0, len(tokenizer) - 1), max_size=20)
    prompt, tokens = data.draw(ids), data.draw(ids)
    settings = {"skip_prompt": skip_prompt, "skip_special_tokens": skip_special_tokens}
    mine = played(ours.TextIteratorStreamer(tokenizer, **settings), prompt, tokens)
    theirs = played(transformers.TextIteratorStreamer(tokenizer, **settings), prompt, tokens)
    assert mine == theirs
    shown = tokens if skip_prompt else prompt + tokens
    assert mine == tokenizer.decode(shown, skip_special_tokens=skip_special_tokens)


def test_printed_text_is_that_of_transformers(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokenizer.encode("Once upon 你好, élan\n and 😀 done")
    for streamer in (transformers.TextStreamer(tokenizer), ours.TextStreamer(tokenizer)):
        streamer.put(torch.tensor([ids[:3]]))
        for token in ids[3:]:
            streamer.put(torch.tensor([token]))
        streamer.end()
    mine, theirs = capsys.readouterr().out.split("done\n")[:2]
    assert mine == theirs


def test_inside_transformers_generate(tokenizer: Any, model: Any) -> None:
    inputs = tokenizer("Once upon", return_tensors="pt")
    streamer = ours.TextIteratorStreamer(tokenizer, timeout=60)
    streamer.start(model.generate, **inputs, max_new_tokens=12, do_sample=False)
    text = "".join(streamer)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert text == tokenizer.decode(expected[0])


def test_a_batch_inside_transformers_generate(tokenizer: Any, model: Any) -> None:
    inputs = tokenizer(["Once upon a time", "fox"], return_tensors="pt", padding=True)
    streamer = ours.TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
    streamer.start(model.generate, **inputs, max_new_tokens=12, do_sample=False)
    rows = ["".join(row) for row in zip(*streamer, strict=True)]
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert rows == tokenizer.decode(expected, skip_special_tokens=True)


def test_an_error_in_transformers_generate_reaches_the_reader(tokenizer: Any, model: Any) -> None:
    streamer = ours.TextIteratorStreamer(tokenizer, timeout=60)
    streamer.start(model.generate, torch.tensor([[1]]), max_new_tokens=-1)
    with pytest.raises(ValueError):
        list(streamer)


def test_the_asynchronous_one_inside_transformers_generate(tokenizer: Any, model: Any) -> None:
    inputs = tokenizer("Once upon", return_tensors="pt")

    async def main() -> str:
        streamer = ours.AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        streamer.start(model.generate, **inputs, max_new_tokens=12, do_sample=False)
        return "".join([piece async for piece in streamer])

    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert asyncio.run(main()) == tokenizer.decode(expected[0, inputs.input_ids.shape[1] :])
