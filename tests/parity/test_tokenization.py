"""The tokenizer against transformers' on folders that transformers itself saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import unspool.tokenization as ours

CORPUS = [
    "Once upon a time, there was a fox who didn't sleep. Élan vital; 你好世界, 😀! The end .\n\n  Tabs\tand    spaces"
] * 4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def gpt2_like() -> Any:
    """Byte-level BPE without tokens around a text, with chat tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
        model_max_length=64,
        chat_template=TEMPLATE,
    )


def llama3_like() -> Any:
    """Byte-level BPE with a bos token from a template, and an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin|> $A", pair="<|begin|> $A <|begin|>:1 $B:1", special_tokens=[("<|begin|>", 0)]
            ),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="right",
        truncation_side="left",
        clean_up_tokenization_spaces=True,
        chat_template={"default": TEMPLATE, "tool_use": "{{ bos_token }}{{ tools | tojson }}" + TEMPLATE},
    )


def llama2_like() -> Any:
    """Metaspace BPE with byte fallback, as SentencePiece models are converted."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=330, special_tokens=special))
    # The trainer marks byte tokens as special; in a converted model they are ordinary.
    data = json.loads(backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(data))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def bert_like() -> Any:
    """WordPiece, the kind whose decoded text is cleaned up."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


KINDS = {"gpt2": gpt2_like, "llama3": llama3_like, "llama2": llama2_like, "bert": bert_like}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ours.Tokenizer]:
    """transformers' tokenizer as loaded from a folder, and ours from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save_pretrained(folder)
    theirs, mine = transformers.AutoTokenizer.from_pretrained(folder), ours.Tokenizer.from_pretrained(folder)
    if theirs.pad_token is None:
        theirs.pad_token = mine.pad_token = "</s>"
    mine.padding_side = theirs.padding_side  # where the file is silent, ours is "left"
    return theirs, mine


def same(theirs: Any, mine: Any) -> None:
    assert isinstance(mine, ours.BatchEncoding)
    assert list(mine) == [name for name in theirs if name != "token_type_ids"]
    for name, value in mine.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.long
            assert torch.equal(value, theirs[name])
        elif isinstance(value, np.ndarray):
            assert value.dtype == np.int64
            assert np.array_equal(value, theirs[name])
        else:
            assert value == theirs[name]


def test_special_tokens_and_sizes(pair: tuple[Any, ours.Tokenizer]) -> None:
    theirs, mine = pair
    for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
        assert getattr(mine, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(mine, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    for name in (
        "all_special_tokens",
        "all_special_ids",
        "special_tokens_map",
        "vocab_size",
        "model_max_length",
        "chat_template",
    ):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert len(mine) == len(theirs)
    assert mine.get_vocab() == theirs.get_vocab()
    assert mine.get_added_vocab() == theirs.get_added_vocab()
    assert mine.truncation_side == theirs.truncation_side
    assert mine.clean_up_tokenization_spaces == theirs.clean_up_tokenization_spaces


TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        "",
        " ",
        "Once upon a time",
        "  two  spaces ",
        "<|im_start|>user\n",
        "</s> x <s>",
        "😀",
        "a<tool>b",
        "it 's n't . !",
        "\n\n",
    ]
)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), special=st.booleans())
def test_encoding_and_decoding(pair: tuple[Any, ours.Tokenizer], texts: list[str], special: bool) -> None:
    theirs, mine = pair
    same(theirs(texts, add_special_tokens=special), mine(texts, add_special_tokens=special))
    same(theirs(texts[0], add_special_tokens=special), mine(texts[0], add_special_tokens=special))
    assert mine.encode(texts[0]) == theirs.encode(texts[0])
    assert mine.tokenize(texts[0]) == theirs.tokenize(texts[0])
    ids = theirs(texts)["input_ids"]
    for skip in (False, True):
        for clean in (False, True, None):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            assert mine.decode(ids, **options) == theirs.decode(ids, **options)
            assert mine.batch_decode(ids, **options) == theirs.batch_decode(ids, **options)
        assert mine.convert_ids_to_tokens(ids[0], skip) == theirs.convert_ids_to_tokens(ids[0], skip)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    padding=st.sampled_from([True, "longest", "max_length"]),
    truncation=st.sampled_from([True, False, "longest_first", "only_first"]),
    max_length=st.sampled_from([4, 8, 16]),
    multiple=st.sampled_from([None, 4]),
    side=st.sampled_from([None, "left", "right"]),
    kind=st.sampled_from([None, "np"]),
)
def test_padding_and_truncation(
    pair: tuple[Any, ours.Tokenizer],
    texts: list[str],
    padding: bool | str,
    truncation: bool | str,
    max_length: int,
    multiple: int | None,
    side: Any,
    kind: Any,
) -> None:
    theirs, mine = pair
    options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": max_length}
    options |= {"pad_to_multiple_of": multiple, "padding_side": side}
    if truncation is not False or padding != "max_length":
        options["return_tensors"] = kind
    same(theirs(texts, **options), mine(texts, **options))


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
    strategy=st.sampled_from([None, True, "longest_first"]),
    max_length=st.sampled_from([5, 8, 13]),
)
def test_pairs(pair: tuple[Any, ours.Tokenizer], pairs: list[tuple[str, str]], strategy: Any, max_length: int) -> None:
    theirs, mine = pair
    first, second = map(list, zip(*pairs, strict=True))
    options = {"max_length": max_length, "truncation": strategy} if strategy else {}
    expected = theirs(first, second, return_token_type_ids=True, **options)
    result = mine(first, second, return_token_type_ids=True, **options)
    assert result.input_ids == expected["input_ids"]
    assert result.token_type_ids == expected["token_type_ids"]


def test_only_one_of_a_pair_is_cut(pair: tuple[Any, ours.Tokenizer]) -> None:
    theirs, mine = pair
    for strategy in ("only_first", "only_second"):
        options: dict[str, Any] = {"truncation": strategy, "max_length": 14}
        texts = (
            ("Once upon a time there was a fox", "fox")
            if strategy == "only_first"
            else ("fox", "Once upon a time there was")
        )
        assert mine(*texts, **options).input_ids == theirs(*texts, **options)["input_ids"]


def test_tensors_and_defaults(pair: tuple[Any, ours.Tokenizer]) -> None:
    theirs, mine = pair
    same(theirs("Once upon", return_tensors="pt"), mine("Once upon", return_tensors="pt"))
    texts = ["Once upon a time", "fox"]
    same(theirs(texts, padding=True, return_tensors="pt"), mine(texts, padding=True, return_tensors="pt"))
    same(theirs("Once upon a time", max_length=3), mine("Once upon a time", max_length=3))
    same(theirs("fox", return_attention_mask=False), mine("fox", return_attention_mask=False))
    ids = mine(texts, padding=True, return_tensors="pt").input_ids
    assert mine.decode(ids) == theirs.decode(ids)
    assert mine.decode(ids[0]) == theirs.decode(ids[0])
    assert mine.decode(ids.numpy()) == theirs.decode(ids.numpy())
    assert mine.decode(5) == theirs.decode(5)
    assert mine.decode([]) == theirs.decode([])
    assert mine.batch_decode(ids[0]) == theirs.batch_decode(ids[0])


def test_pad(pair: tuple[Any, ours.Tokenizer]) -> None:
    theirs, mine = pair
    rows = [theirs("Once upon a time"), theirs("fox")]
    plain = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    same(theirs.pad(plain, return_tensors="pt"), mine.pad(plain, return_tensors="pt"))
    same(
        theirs.pad({"input_ids": [[5, 6], [7]]}, padding="max_length", max_length=4, padding_side="right"),
        mine.pad({"input_ids": [[5, 6], [7]]}, padding="max_length", max_length=4, padding_side="right"),
    )


def test_tokens_and_ids(pair: tuple[Any, ours.Tokenizer]) -> None:
    theirs, mine = pair
    tokens = theirs.tokenize("Once upon a 你 time")
    for value in (tokens, tokens[0], "no such token", ["no such token"]):
        assert mine.convert_tokens_to_ids(value) == theirs.convert_tokens_to_ids(value)
    for ids in (7, [7, 8], 10**6):
        assert mine.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert mine.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)


def test_saved_here_and_loaded_there(pair: tuple[Any, ours.Tokenizer], tmp_path: Path) -> None:
    theirs, mine = pair
    mine.save_pretrained(tmp_path / "saved")
    again, there = (
        ours.Tokenizer.from_pretrained(tmp_path / "saved"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    text = "Once upon a time, 你好 😀 <|im_start|> didn't"
    for loaded in (again, there):
        assert loaded(text)["input_ids"] == theirs(text)["input_ids"]
        assert loaded.decode(loaded.encode(text)) == theirs.decode(theirs.encode(text))
        for name in (
            "special_tokens_map",
            "all_special_ids",
            "chat_template",
            "padding_side",
            "truncation_side",
            "model_max_length",
        ):
            assert getattr(loaded, name) == getattr(mine, name), name
    assert not [path for path in (tmp_path / "saved").rglob(".*") if path.is_file()]


CHAT = [
    {"role": "system", "content": "Be  brief. "},
    {"role": "user", "content": "Hello <|im_end|> 你好", "name": None},
    {"role": "assistant", "content": "Hi there "},
]


@pytest.fixture(scope="module", params=["gpt2", "llama3"])
def chatting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ours.Tokenizer]:
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder), ours.Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenize": False},
        {"add_generation_prompt": True, "return_dict": False},
        {"continue_final_message": True, "tokenize": False},
        {"continue_final_message": "content", "tokenize": False},
        {"return_tensors": "pt", "add_generation_prompt": True},
        {"truncation": True, "max_length": 9},
        {
            "chat_template": "{{ messages[0].content }}|{{ eos_token }}|{{ extra }}",
            "extra": [1, "b"],
            "tokenize": False,
        },
        {"tools": [{"type": "function", "function": {"name": "<f>", "parameters": {}}}], "tokenize": False},
        {
            "documents": [{"title": "t", "text": "x"}],
            "chat_template": "{{ documents | tojson(indent=2) }}",
            "tokenize": False,
        },
        {"tokenizer_kwargs": {"return_attention_mask": False}},
    ],
)
def test_chat(chatting: tuple[Any, ours.Tokenizer], options: dict[str, Any]) -> None:
    theirs, mine = chatting
    for conversation in (CHAT, [CHAT, CHAT[:2], CHAT[1:]]):
        settings = {**options, "padding": True} if "return_tensors" in options else options
        expected, result = (
            theirs.apply_chat_template(conversation, **settings),
            mine.apply_chat_template(conversation, **settings),
        )
        if isinstance(result, ours.BatchEncoding):
            same(expected, result)
        else:
            assert result == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}/{{ loop.length }}{{ m.content }}"
        "{% if not loop.last %},{% endif %}{% endfor %}",
        "{%- set ns = namespace(found=false) -%}{%- for m in messages -%}{%- if m['role'] == 'user' -%}"
        "{%- set ns.found = true -%}{%- break -%}{%- endif -%}{%- endfor -%}{{ ns.found }}",
        "{% macro say(x, y=1) %}[{{ x ~ '-' ~ y }}]{% endmacro %}{% for m in messages %}{{ say(m.role) }}"
        "{{ say(m.content, y=2) }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') |"
        " list | length }}",
        "{{ messages[0] | tojson }} {{ messages[::-1][0].role }} {{ 'x' * 3 + 'y' }} {{ '%s' % 5 }} {{"
        " messages[-1]['content'].split(' ')[0] | upper }}",
        "{% set text %}  {{ messages[0].content }}{% endset %}"
        "{{ text | trim | indent(2, true) }} {{ none }} {{ missing }} {{ missing is defined }}",
        "{{ strftime_now('%Y') }} {{ dict(a=1) }} {{ range(3) | list }} {% for k, v in messages[0].items() %}"
        "{{ k }}={{ v }};{% endfor %}",
    ],
)
def test_templates_render_alike(chatting: tuple[Any, ours.Tokenizer], template: str) -> None:
    theirs, mine = chatting
    options: dict[str, Any] = {"chat_template": template, "tokenize": False}
    assert mine.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(CHAT, **options)


def weather(
    city: str, days: int | None = None, unit: list[str] | str = "C", deep: dict[str, float] | None = None
) -> str:
    """Tell the weather.

    Of a city.

    Args:
        city: Which one,
            by name.
        days: How many days ahead.
        unit: Of the temperature. (choices: ["C", "F"])
        deep: Anything.

    Returns:
        The weather.
    """
    return f"{city} {days} {unit} {deep}"


def test_functions_as_tools(chatting: tuple[Any, ours.Tokenizer]) -> None:
    theirs, mine = chatting
    options: dict[str, Any] = {"chat_template": "{{ tools | tojson }}", "tools": [weather], "tokenize": False}
    assert mine.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(CHAT, **options)


@pytest.mark.parametrize("form", ["decoder", "map", "strings"])
def test_older_files(tmp_path: Path, form: str) -> None:
    """Special tokens in the forms that transformers 4 wrote, with tokens that tokenizer.json lacks."""
    llama2_like().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": False, "add_eos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    fields = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    if form == "decoder":
        config["pad_token"] = {"__type": "AddedToken", "content": "<pad>", **fields}
        config["added_tokens_decoder"] = {str(len(llama2_like())): {"content": "<pad>", "special": True, **fields}}
        config["added_tokens_decoder"]["2"] = {"content": "</s>", "special": True, **fields}
    elif form == "map":
        special = {"pad_token": {"content": "<pad>", **fields}, "additional_special_tokens": ["<x>", "<y>"]}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    else:
        config |= {"pad_token": "<pad>", "additional_special_tokens": ["<x>"], "image_token": "<img>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, mine = transformers.AutoTokenizer.from_pretrained(tmp_path), ours.Tokenizer.from_pretrained(tmp_path)
    text = "fox </s> a <pad> b <x> c <img>"
    assert mine.get_added_vocab() == theirs.get_added_vocab()
    assert mine.encode(text) == theirs.encode(text)
    assert mine.special_tokens_map == theirs.special_tokens_map
    assert mine.all_special_tokens == theirs.all_special_tokens
    assert mine.decode(mine.encode(text), skip_special_tokens=True) == theirs.decode(
        theirs.encode(text), skip_special_tokens=True
    )


@pytest.mark.parametrize(
    "options", [{"add_eos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}]
)
def test_tokens_around_a_text_on_request(tmp_path: Path, options: dict[str, bool]) -> None:
    llama2_like().save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, **options)
    mine = ours.Tokenizer.from_pretrained(tmp_path, **options)
    assert mine.encode("a fox") == theirs.encode("a fox")
    assert mine.encode("a fox", "b") == theirs.encode("a fox", "b")
