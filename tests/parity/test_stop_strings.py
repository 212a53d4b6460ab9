"""Stop strings against transformers' criterion, on byte-level and sentencepiece-like tokenizers, step by step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.generation import stopping_criteria as oracle

from unspool.stopping import StopStringCriteria

CORPUS = [
    "stop the stopper, please stop it. The stopping stops here; stoppage!\n\nUser: stop\n",
    "über café naïve 日本語 text, stop。 日本 stop 🙂🙂 end of turn </s> and then some more words",
    "one two three\nfour five six\n\nObservation: none\nAnswer: 42",
] * 3


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama-like: metaspace words with `<0xNN>` tokens below."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted(set("".join(CORPUS).replace(" ", "▁")) - set("日本語🙂"))
    extra = ["▁s", "st", "▁st", "to", "op", "top", "sto", "pp", "er", "▁the"]
    for piece in [*letters, *extra]:
        pieces.setdefault(piece, len(pieces))
    merges = [
        ("▁", "s"),
        ("s", "t"),
        ("▁s", "t"),
        ("t", "o"),
        ("o", "p"),
        ("t", "op"),
        ("st", "o"),
        ("p", "p"),
        ("e", "r"),
    ]
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}

STOPS = [
    "stop",
    "top",
    "p",
    "\n\n",
    "User:",
    "é",
    "日本",
    "🙂",
    " stop it",
    "</s>",
    "<|end|>",
    "The stopping stops",
    "é n",
]


def steps(criterion: Any, ids: torch.Tensor, first: int) -> list[list[bool]]:
    return [criterion(ids[:, :width], None).tolist() for width in range(first, ids.shape[1] + 1)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_same_step_as_transformers_on_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]

    @settings(max_examples=60, deadline=None)
    @given(
        text=st.lists(st.sampled_from([*" ".join(CORPUS[:3]).split(" "), *STOPS, "\n\n"]), min_size=2, max_size=30),
        stops=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3, unique=True),
        first=st.integers(1, 4),
    )
    def check(text: list[str], stops: list[str], first: int) -> None:
        ids = torch.tensor([tokenizer(" ".join(text), add_special_tokens=False)["input_ids"]])
        mine = steps(StopStringCriteria(tokenizer, stops), ids, first)
        assert mine == steps(oracle.StopStringCriteria(tokenizer, stops), ids, first)

    check()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    stops=st.lists(st.sampled_from(["s", "to", "op", "é", "st"]), min_size=1, max_size=2),
)
def test_same_step_as_transformers_on_random_tokens(seed: int, rows: int, stops: list[str]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    draw = random.Random(seed)
    favoured = tokenizer("stop über café stopper to st op s t o p", add_special_tokens=False)["input_ids"]
    anything = range(len(tokenizer))  # halves of characters too
    ids = torch.tensor(
        [[draw.choice(favoured if draw.random() < 0.5 else anything) for _ in range(40)] for _ in range(rows)]
    )
    mine = steps(StopStringCriteria(tokenizer, stops), ids, 1)
    assert mine == steps(oracle.StopStringCriteria(tokenizer, stops), ids, 1)


def test_text_in_the_prompt_is_not_completed_by_the_next_character() -> None:
    """While its bytes arrive, the decoder shows those of the characters before as unknown too."""
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = torch.tensor([tokenizer("日本語", add_special_tokens=False)["input_ids"]])
    assert tokenizer.decode(ids[0, :-1]) != "日本"
    for stops in (["日本"], ["本"], ["語"], ["本語"]):
        mine = steps(StopStringCriteria(tokenizer, stops), ids, 1)
        assert mine == steps(oracle.StopStringCriteria(tokenizer, stops), ids, 1)
        assert sum(done for (done,) in mine) == 1


def test_text_that_is_none_is_matched_as_it_is_shown() -> None:
    """Bytes that are no text show as U+FFFD, and count as what is shown; transformers counts each token's own text."""
    tokenizer = TOKENIZERS["byte_fallback"]
    broken = torch.tensor([tokenizer.convert_tokens_to_ids(["st", "<0xE6>", "<0x73>"])])
    assert tokenizer.decode(broken[0]) == "st��"
    assert StopStringCriteria(tokenizer, ["s"])(broken, None).tolist() == [False]
    assert oracle.StopStringCriteria(tokenizer, ["s"])(broken, None).tolist() == [True]
    broken = broken[:, :2]
    assert StopStringCriteria(tokenizer, ["�"])(broken, None).tolist() == [True]
    assert oracle.StopStringCriteria(tokenizer, ["�"])(broken, None).tolist() == [False]
