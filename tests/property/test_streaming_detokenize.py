"""The pieces of an incremental detokeniser join to the one-shot decode, for every tokenizer kind, text and split."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import unspool.tokenization
from unspool.streaming import IncrementalDetokenizer
from unspool.streaming.cleanup import CLEAN_UP_RULES, CleanUp, clean_up

_BYTES_TO_UNICODE = sorted(pre_tokenizers.ByteLevel.alphabet())


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Every byte, a few words, and tokens that end inside one character and begin inside the next."""
    names = _byte_names()
    vocab = {name: index for index, name in enumerate(names)}
    for raw in (
        b"hello",
        b" world",
        b" .",
        b"\xa0\xe4\xbd",
        b"\xf0\x9f",
        b"\x98\x80\xf0",
        b"\xef\xbf\xbd",
        b"\x80\x80",
        b"\n",
    ):
        vocab.setdefault("".join(names[byte] for byte in raw), len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<plain>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _byte_names() -> list[str]:
    """GPT-2's printable name of each byte."""
    decode = decoders.ByteLevel()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            names[byte] = chr(byte)
        else:
            names[byte], extra = chr(256 + extra), extra + 1
    assert sorted(names.values()) == _BYTES_TO_UNICODE
    assert decode.decode([names[0xE4], names[0xBD], names[0xA0]]) == "你"
    return [names[byte] for byte in range(256)]


def _fallback_vocab() -> dict[str, int]:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁▁", "▁hello", "world", "▁.", ",", "n't", "▁n", "é", "你", "😀", "\ufffd", "<0xZZ>", "a"]
    return {word: index for index, word in enumerate(words)}


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """The Llama 2 kind: byte tokens in runs, a leading space that is stripped."""
    backend = Tokenizer(
        models.BPE(vocab=_fallback_vocab(), merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A Metaspace decoder: the first token loses its spaces."""
    backend = Tokenizer(models.BPE(vocab=_fallback_vocab(), merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """The BERT kind, the one whose text is cleaned up."""
    words = [
        "[UNK]",
        "[SEP]",
        "a",
        "##b",
        ".",
        "?",
        "!",
        ",",
        "'",
        "n't",
        "'m",
        "'s",
        "'ve",
        "'re",
        "n",
        "t",
        "m",
        "s",
        "' '",
    ]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens([AddedToken("[SEP]", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", unk_token="[UNK]")


@cache
def own() -> unspool.tokenization.Tokenizer:
    """unspool's tokenizer around the cleaned-up kind."""
    return unspool.tokenization.Tokenizer(
        Tokenizer.from_str(wordpiece().backend_tokenizer.to_str()), sep_token="[SEP]", unk_token="[UNK]"
    )


KINDS: list[Callable[[], Any]] = [byte_level, byte_fallback, metaspace, wordpiece, own]


class Counting:
    """A tokenizer that counts the ids it is asked to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: Any, **kwargs: Any) -> Any:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Any, list[list[int]]]:
    """A tokenizer and ids of it, cut at random places: random ids, bytes, or a small set over and over."""
    tokenizer = draw(st.sampled_from(KINDS))()
    any_id = st.integers(0, len(tokenizer) - 1)
    few = draw(st.lists(any_id, min_size=1, max_size=3))
    token_lists = st.lists(any_id, max_size=60) | st.lists(st.sampled_from(few), max_size=80)
    if tokenizer is byte_level():
        token_lists |= st.text(max_size=25).map(lambda text: list(text.encode()))
        token_lists |= st.binary(max_size=60).map(list)
        token_lists |= st.lists(st.integers(256, len(tokenizer) - 1), max_size=60)
    if tokenizer is byte_fallback():
        text_bytes = st.text(max_size=12).map(lambda text: [3 + byte for byte in text.encode()])
        mixed = st.lists(text_bytes | st.lists(any_id, max_size=3), max_size=12)
        token_lists |= mixed.map(lambda parts: [token for part in parts for token in part])
    ids = draw(token_lists)
    cuts = sorted(
        draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))) if draw(st.booleans()) else range(len(ids))
    )
    edges = [0, *cuts, len(ids)]
    return tokenizer, [ids[start:end] for start, end in pairwise(edges)]


@settings(max_examples=400, deadline=None)
@given(streams(), st.booleans())
def test_pieces_join_to_the_one_shot_decode(stream: tuple[Any, list[list[int]]], skip_special_tokens: bool) -> None:
    tokenizer, pushes = stream
    ids = [token for push in pushes for token in push]
    expected = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    text = ""
    for push in pushes:
        text += detokenizer.push(push)
        assert expected.startswith(text)
    assert text + detokenizer.finish() == expected


@settings(max_examples=150, deadline=None)
@given(streams())
def test_pieces_join_when_spaces_are_cleaned_up(stream: tuple[Any, list[list[int]]]) -> None:
    tokenizer, pushes = stream
    ids = [token for push in pushes for token in push]
    detokenizer = IncrementalDetokenizer(tokenizer, clean_up_tokenization_spaces=True)
    pieces = [detokenizer.push(push) for push in pushes]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids, clean_up_tokenization_spaces=True)


@settings(max_examples=150, deadline=None)
@given(streams(), st.integers(0, 60))
def test_a_prompt_is_context_and_not_text(stream: tuple[Any, list[list[int]]], cut: int) -> None:
    tokenizer, pushes = stream
    ids = [token for push in pushes for token in push]
    whole = IncrementalDetokenizer(tokenizer)
    whole.push(ids[:cut])
    expected = whole.push(ids[cut:]) + whole.finish()
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=ids[:cut])
    pieces = [detokenizer.push([token]) for token in ids[cut:]]
    assert "".join(pieces) + detokenizer.finish() == expected
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).endswith(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet=" .?!,'ntmsverx", max_size=6), max_size=30))
def test_cleaning_up_in_pieces_is_cleaning_up_the_whole(pieces: list[str]) -> None:
    stages = CleanUp()
    assert "".join(stages.push(piece) for piece in pieces) + stages.finish() == clean_up("".join(pieces))


def test_the_rules_are_those_of_transformers() -> None:
    text = " ".join(f"x{old}y" for old, _ in CLEAN_UP_RULES)
    assert clean_up(text) == wordpiece().clean_up_tokenization(text) == own().clean_up_tokenization(text)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("pattern", ["bytes", "invalid", "special", "text", "lead", "straddle"])
def test_every_id_is_decoded_a_bounded_number_of_times(kind: Callable[[], Any], pattern: str) -> None:
    counting = Counting(kind())
    size = len(counting.tokenizer)
    offset = 3 if kind is byte_fallback else 0
    ids = {
        "bytes": [offset + byte for byte in "你😀".encode()],
        "invalid": [offset + 0xFF],
        "special": [size - 1],
        "text": list(range(size)),
        "lead": [offset + 0xE4],
        "straddle": [offset + 0xA0, offset + 0xE4, offset + 0xBD],
    }[pattern]
    ids = [token % size for token in ids] * (3000 // len(ids))
    detokenizer = IncrementalDetokenizer(counting)
    text = "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish()
    assert text == counting.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert counting.decoded <= 16 * len(ids) + 64


@pytest.mark.parametrize("kind", [byte_level, byte_fallback], ids=lambda kind: kind.__name__)
def test_invalid_bytes_are_given_out_once_they_cannot_change(kind: Callable[[], Any]) -> None:
    detokenizer = IncrementalDetokenizer(kind())
    bad = 0xFF + (3 if kind is byte_fallback else 0)
    text = "".join(detokenizer.push([bad]) for _ in range(100))
    assert 99 <= len(text) <= 100
    assert set(text) == {"\ufffd"}


def test_a_character_is_given_out_with_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(byte_level())
    assert [detokenizer.push([byte]) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert detokenizer.finish() == ""
