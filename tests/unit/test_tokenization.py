"""The tokenizer's own contract: defaults, errors, files, and templates that may do nothing but write text."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors

from unspool.errors import CheckpointError
from unspool.tokenization import BatchEncoding, Tokenizer
from unspool.tokenization.tools import function_schema


def make(**config: Any) -> Tokenizer:
    """Words split at spaces, with a bos token in front."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "c", "d", "."]
    backend = tokenizers.Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    return Tokenizer(backend, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config})


def chat(template: str, content: Any = "hi", **variables: Any) -> str:
    text = make().apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, **variables
    )
    assert isinstance(text, str)
    return text


def test_padding_is_on_the_left_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    tokenizer = make(pad_token="<pad>")
    encoding = tokenizer(["a b", "c"], padding=True)
    assert encoding == {"input_ids": [[1, 4, 5], [3, 1, 6]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    make(pad_token="<pad>", padding_side="right").save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded(["a b", "c"], padding=True).input_ids == [[1, 4, 5], [1, 6, 3]]
    assert loaded(["a b", "c"], padding=True, padding_side="left").input_ids == [[1, 4, 5], [3, 1, 6]]
    assert Tokenizer.from_pretrained(tmp_path, padding_side="left").padding_side == "left"


def test_padding_without_a_padding_token_says_what_to_do() -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        tokenizer(["a", "a b"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == 2
    assert tokenizer(["a", "a b"], padding=True).input_ids == [[2, 1, 4], [1, 4, 5]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5,), TypeError, "text is a int"),
        (([],), ValueError, "text is empty"),
        ((["a", 3],), TypeError, r"text\[1\] is a int"),
        (("\ud800",), ValueError, "half a surrogate pair at character 0"),
        ((["a", "b"], ["c"]), ValueError, "text has 2 texts and text_pair 1"),
        ((["a"], "c"), ValueError, "each needs its own"),
    ],
)
def test_what_is_no_text_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_tensors": "pt"}, "rows of 2 to 3 tokens.*padding=True"),
        ({"return_tensors": "tf"}, "'pt', 'np' or None"),
        ({"padding": "both"}, "padding is 'both'"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": True, "padding_side": "middle"}, "padding_side is 'middle'"),
        ({"truncation": "some"}, "truncation is 'some'"),
        ({"truncation": "only_second", "max_length": 2}, "there is no text_pair"),
        ({"max_length": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(pad_token="<pad>")(["a", "a b"], **options)


def test_a_limit_below_the_special_tokens_is_refused() -> None:
    tokenizer = make(add_bos_token=True, add_eos_token=True)
    assert tokenizer("a b c", max_length=3).input_ids == [1, 4, 2]
    with pytest.raises(ValueError, match="special tokens alone are 2"):
        tokenizer("a b c", max_length=1)
    with pytest.raises(ValueError, match="the other text alone has 3 tokens"):
        make()("a b c", "d", truncation="only_second", max_length=3)


def test_asking_for_a_token_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="add_eos_token=True, but this tokenizer has no eos_token"):
        make(eos_token=None, add_eos_token=True)


def test_special_tokens_can_be_set_and_added() -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match="add_special_tokens"):
        tokenizer.pad_token = "[PAD]"
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<x>"]}) == 2
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("[PAD]", 9, 11)
    assert tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>", "[PAD]", "<x>"]
    assert tokenizer.decode(tokenizer.encode("a <x> b [PAD]"), skip_special_tokens=True) == "a b"
    tokenizer.eos_token_id = 3
    assert tokenizer.eos_token == "<pad>"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    with pytest.raises(ValueError, match="vocabulary has 11 tokens"):
        tokenizer.eos_token_id = 99
    with pytest.raises(TypeError, match="eos_token_id takes its id"):
        tokenizer.eos_token = 3  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'end_token' is no special token"):
        tokenizer.add_special_tokens({"end_token": "x"})


def test_negative_ids_are_refused() -> None:
    for ids in ([4, -100], torch.tensor([[4, -100]]), -1):
        with pytest.raises(ValueError, match="negative"):
            make().decode(ids)
    with pytest.raises(ValueError, match="negative"):
        make().convert_ids_to_tokens([-1])


@pytest.mark.parametrize("wrong", ["abc", None, [1.5], ["a"], [[1, "b"]], torch.tensor([1.0])])
def test_what_is_no_id_is_refused_with_the_way_out(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"takes token ids .* texts are encoded by calling the tokenizer"):
        make().decode(wrong)


def test_an_encoding_is_a_dictionary_with_attributes() -> None:
    encoding = make()("a", return_tensors="np")
    assert isinstance(encoding, dict)
    assert isinstance(encoding.input_ids, np.ndarray)
    assert set({**encoding}) == {"input_ids", "attention_mask"}
    with pytest.raises(AttributeError, match="no 'labels', only"):
        _ = encoding.labels
    assert not hasattr(encoding, "shape")
    moved = make()("a", return_tensors="pt")
    assert moved.to("cpu") is moved
    assert moved.to("meta").input_ids.device.type == "meta"
    assert make()("", add_special_tokens=False, return_tensors="pt").input_ids.shape == (1, 0)
    assert isinstance(copy.deepcopy(encoding), BatchEncoding)


def test_settings_in_the_backend_do_not_cut_or_pad() -> None:
    backend = make().backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=8, pad_token="<pad>", pad_id=3, direction="right")
    tokenizer = Tokenizer(backend)
    assert tokenizer("a b c").input_ids == [1, 4, 5, 6]
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<pad>", "right")


def test_threads_can_share_a_tokenizer() -> None:
    tokenizer = make(pad_token="<pad>")
    texts = [["a b c d", "a"], ["d c"]] * 50
    expected = [tokenizer(text, padding=True, truncation=True, max_length=3 + at % 2) for at, text in enumerate(texts)]
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(
                lambda job: tokenizer(job[1], padding=True, truncation=True, max_length=3 + job[0] % 2),
                enumerate(texts),
            )
        )
    assert results == expected


# Files


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json.*AutoTokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer_config.json", "{'", "not valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", '{"eos_token": {"text": "x"}}', "does not describe a token"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder '/no/such/folder'"):
        Tokenizer.from_pretrained("/no/such/folder")
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="pass the folder it is in"):
        Tokenizer.from_pretrained(file)
    with pytest.raises(ValueError, match="is a file"):
        make().save_pretrained(file)


def test_only_tokenizer_files_are_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "sub")
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    tokenizer = Tokenizer.from_pretrained("someone/model", revision="v1", subfolder="sub", local_files_only=True)
    assert tokenizer.name_or_path == "someone/model"
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("someone/model", "v1", True)
    assert "sub/tokenizer.json" in asked["allow_patterns"]
    assert not any("safetensors" in pattern or pattern == "*" for pattern in asked["allow_patterns"])

    def unreachable(name: str, **options: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="could not be fetched: offline"):
        Tokenizer.from_pretrained("someone/model")


def test_template_files_win_over_the_configuration(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": [{"name": "default", "template": "old"}]}))
    assert Tokenizer.from_pretrained(tmp_path).chat_template == {"default": "old"}
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_pretrained(tmp_path).chat_template == "new"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == {"default": "new", "rag": "{{ documents }}"}
    loaded.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").chat_template == loaded.chat_template
    assert loaded.get_chat_template("rag") == "{{ documents }}"


def test_saving_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer.json").read_text()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(pad_token="[NEW]").save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_template_cannot_be_saved_outside_the_folder(tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.chat_template = {"default": "x", "../evil": "y"}
    with pytest.raises(ValueError, match="no file name"):
        tokenizer.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# Conversations


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{% include 'x' %}",
        "{{ lipsum.__globals__ }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
    ],
)
def test_templates_reach_nothing_but_their_data(template: str) -> None:
    with pytest.raises(ValueError, match="chat template failed"):
        chat(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ [0] * 10 ** 12 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '%*d' % (1000000000, 3) }}",
        "{{ '{:1000000000}'.format(3) }}",
        "{{ '{:{}}'.format(3, 1000000000) }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s=3) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = x %}{% endfor %}",
        "{% set s = 'a' * 99999 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    ],
)
def test_runaway_templates_end_in_an_error(template: str) -> None:
    with pytest.raises(ValueError, match="chat template failed"):
        chat(template)


def test_a_slow_template_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.tokenization.sandbox.MAX_SECONDS", -1.0)
    with pytest.raises(ValueError, match="longer than"):
        chat("{% for m in messages %}{% endfor %}")


def test_long_conversations_fit_the_budget() -> None:
    messages = [{"role": "user", "content": "x" * 1000}] * 5000
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim }}\n{% endfor %}"
    text = make().apply_chat_template(messages, chat_template=template, tokenize=False)
    assert len(text) == 5000 * 1007


def test_what_a_template_refuses_is_told() -> None:
    with pytest.raises(ValueError, match="roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"not valid Jinja \(line 2\)"):
        chat("\n{% if %}")
    with pytest.raises(ValueError, match="failed on this conversation"):
        chat("{{ 1 / 0 }}")


def test_objects_of_the_caller_are_out_of_reach() -> None:
    class Image:
        def save(self) -> str:
            raise AssertionError("a template called a method")

    content = [{"type": "image", "image": Image()}, {"type": "text", "text": "hi"}]
    assert chat("{{ messages[0].content[0].image }}", content) == "<Image>"
    with pytest.raises(ValueError, match="chat template failed"):
        chat("{{ messages[0].content[0].image.save() }}", content)


@pytest.mark.parametrize(
    ("conversation", "error", "message"),
    [
        ("hello", TypeError, "conversation is a str"),
        ({"role": "user", "content": "x"}, TypeError, "conversation is a dict"),
        ([], ValueError, "conversation is empty"),
        (["hello"], TypeError, "a message is 'hello'"),
    ],
)
def test_what_is_no_conversation_is_refused(conversation: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(chat_template="x").apply_chat_template(conversation)


def test_templates_that_are_not_there() -> None:
    tokenizer = make()
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.apply_chat_template(messages)
    tokenizer.chat_template = {"one": "1", "two": "2"}
    with pytest.raises(ValueError, match=r"\['one', 'two'\] and no default"):
        tokenizer.apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages, chat_template="two", tokenize=False) == "2"


def test_going_on_with_the_last_message() -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert chat(template, "so far ", continue_final_message=True) == "<so far "
    assert chat(template.replace("m.content", "m.content | trim"), "so far ", continue_final_message=True) == "<so far"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    shown = "{% for p in messages[0].content if p.text is defined %}{{ p.text }},{% endfor %}"
    assert chat(shown, parts, continue_final_message=True) == "a,b"
    with pytest.raises(ValueError, match="does not show the end"):
        chat("nothing", continue_final_message=True)
    with pytest.raises(ValueError, match="no text in 'thoughts'"):
        chat(template, continue_final_message="thoughts")
    with pytest.raises(ValueError, match="pass one of them"):
        chat(template, continue_final_message=True, add_generation_prompt=True)


def test_template_variables_cannot_replace_the_messages() -> None:
    with pytest.raises(ValueError, match="'messages'"):
        chat("{{ messages }}", messages=[])


@pytest.mark.parametrize(
    ("tool", "error", "message"),
    [
        (3, TypeError, "a tool is 3"),
        (lambda x: x, ValueError, "no docstring"),
    ],
)
def test_tools_that_cannot_be_described(tool: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function_schema(tool)


def test_a_tool_must_have_hints_and_descriptions() -> None:
    def unhinted(x):  # type: ignore[no-untyped-def]
        """Do.

        Args:
            x: It.
        """

    def undescribed(x: int) -> None:
        """Do."""

    def odd(x: Path) -> None:
        """Do.

        Args:
            x: It.
        """

    with pytest.raises(ValueError, match="'x' has no type hint"):
        function_schema(unhinted)
    with pytest.raises(ValueError, match="'x' is not described"):
        function_schema(undescribed)
    with pytest.raises(TypeError, match="no JSON schema"):
        function_schema(odd)
