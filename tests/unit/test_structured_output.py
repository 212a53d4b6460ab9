"""Structured output: every text follows its schema, expression or grammar, in every mode; what cannot work says so."""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import unspool
from unspool import GenerationConfig
from unspool.errors import RequestFailed
from unspool.logits import GrammarLogitsProcessor
from unspool.logits.grammar import compile_structure
from unspool.logits.grammar.matching import Matching
from unspool.logits.grammar.vocabulary import Recent, token_table

ANSWER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain", "café"]}, "maxItems": 3},
        "home": {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]},
    },
    "required": ["name", "age", "likes", "home"],
    "additionalProperties": False,
}
ANSWER["properties"]["home"]["additionalProperties"] = False
PROMPTS = ["Once upon a time there was a fox, and", "The owl"]


@pytest.fixture(scope="module")
def storyteller() -> tuple[Any, Any]:
    return unspool.load("storyteller", dtype=torch.float32)


def texts_of(storyteller: tuple[Any, Any], prompts: list[str] = PROMPTS, **settings: Any) -> list[str]:
    """Each row's new text, all of which must have ended by themselves."""
    model, tokenizer = storyteller
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 120, "do_sample": False, **settings}
    out = model.generate(**inputs, **settings, tokenizer=tokenizer, return_dict_in_generate=True)
    assert set(out.finish_reasons) == {"stop"}
    return tokenizer.batch_decode(out.sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def check(text: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


# Schemas, expressions and grammars

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 5, "num_return_sequences": 3},
    "hot sampling": {"do_sample": True, "seed": 6, "temperature": 5.0, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "seed": 1},
    "beams in groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "scores kept": {"output_scores": True},
    "chunked prompt": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_schema_in_every_mode(storyteller: tuple[Any, Any], mode: str) -> None:
    texts = texts_of(storyteller, json_schema=ANSWER, **MODES[mode])
    assert len(texts) == 2 * MODES[mode].get("num_return_sequences", 1)
    for text in texts:
        check(text, ANSWER)


NAMES = ("a", "name", "größe", "x y")


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 60))
    return st.one_of(
        st.integers(0, 8).map(lambda n: {"type": "string", "maxLength": n}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}),
        bounds.map(lambda b: {"type": "number", "minimum": b[0], "maximum": b[0] + b[1]}),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": 3}, {"type": ["boolean", "null"]}]),
        st.lists(st.sampled_from(["red", 'say "no"', 7, None, "日本"]), min_size=1, unique=True).map(
            lambda values: {"enum": values}
        ),
    )


def bigger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.lists(st.sampled_from(NAMES), unique=True, max_size=3).flatmap(
        lambda names: st.tuples(st.fixed_dictionaries(dict.fromkeys(names, inner)), st.sets(st.sampled_from(NAMES)))
    )
    return st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[1] + a[2]}
        ),
        objects.map(
            lambda o: {
                "type": "object",
                "properties": o[0],
                "required": sorted(o[1] & o[0].keys()),
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(leaves(), bigger, max_leaves=5), seed=st.integers(0, 2**32))
def test_drawn_schemas_are_met(storyteller: tuple[Any, Any], schema: dict[str, Any], seed: int) -> None:
    model, tokenizer = storyteller
    ids = tokenizer("Well", return_tensors="pt").input_ids
    # top_k bounds how long a number's fraction may become before a likelier token ends it
    out = model.generate(
        ids, json_schema=schema, tokenizer=tokenizer, do_sample=True, seed=seed, max_new_tokens=250,
        return_dict_in_generate=True,
    )  # fmt: skip
    text = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    if out.finish_reasons == ["stop"]:
        check(text, schema)
    else:  # the fraction of a number may have any length
        assert re.search(r"\d{9}$", text), (schema, text)


EXPRESSIONS = [
    "(yes|no|maybe [a-z]{3,5})",
    r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])",
    "[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){0,2}[.!?]",
    "[日本語]{2,4}🦊?(é|ß|\u0301){1,3}",
    "",
]


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "beam sampling"])
@pytest.mark.parametrize("regex", EXPRESSIONS)
def test_an_expression_in_every_mode(storyteller: tuple[Any, Any], regex: str, mode: str) -> None:
    for text in texts_of(storyteller, regex=regex, **MODES[mode]):
        assert re.fullmatch(regex, text), text


SUM = """
start: sum
sum: product (("+" | "-") product)~0..2
product: atom ("*" atom)~0..1
atom: /[1-9][0-9]?/ | "(" /[1-9]/ "+" /[1-9]/ ")"
"""


@pytest.mark.parametrize("mode", ["greedy", "sampling", "hot sampling", "beams"])
def test_a_grammar(storyteller: tuple[Any, Any], mode: str) -> None:
    for text in texts_of(storyteller, grammar=SUM, **MODES[mode]):
        assert re.fullmatch(r"[0-9+*()-]+", text)
        assert isinstance(eval(text), int)


def test_a_pydantic_class(storyteller: tuple[Any, Any]) -> None:
    from pydantic import BaseModel, Field

    class Animal(BaseModel):
        name: str = Field(max_length=10)
        legs: int = Field(ge=0, le=8)

    (text,) = texts_of(storyteller, PROMPTS[:1], json_schema=Animal, do_sample=True, seed=0)
    assert set(json.loads(text)) == {"name", "legs"}
    assert Animal.model_validate_json(text).legs <= 8


def test_the_layout_is_that_of_json_dumps_or_as_asked(storyteller: tuple[Any, Any]) -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    assert texts_of(storyteller, PROMPTS[:1], json_schema=schema) == ["[1, 1]"]
    narrow = {**schema, "x-guidance": {"item_separator": ",", "whitespace_flexible": False}}
    assert texts_of(storyteller, PROMPTS[:1], json_schema=narrow) == ["[1,1]"]


# Rows, company and other settings


@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "seed": 11}, {"num_beams": 3}])
def test_a_row_writes_the_same_alone_and_in_company(storyteller: tuple[Any, Any], mode: dict[str, Any]) -> None:
    together = texts_of(storyteller, [*PROMPTS, "Hello, said the"], json_schema=ANSWER, **mode)
    alone = [texts_of(storyteller, [prompt], json_schema=ANSWER, **mode)[0] for prompt in [*PROMPTS, "Hello, said the"]]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 4}])
def test_drafts_change_nothing(storyteller: tuple[Any, Any], sampling: dict[str, Any]) -> None:
    plain = texts_of(storyteller, json_schema=ANSWER, **sampling)
    assert texts_of(storyteller, json_schema=ANSWER, prompt_lookup_num_tokens=3, **sampling) == plain
    draft, _ = unspool.load("storyteller-draft", dtype=torch.float32)
    assert texts_of(storyteller, json_schema=ANSWER, assistant_model=draft, **sampling) == plain


def test_special_tokens_are_not_text(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    ids = tokenizer("Well", return_tensors="pt").input_ids
    out = model.generate(
        ids, regex=".{40,60}", tokenizer=tokenizer, do_sample=True, seed=1, temperature=50.0, top_k=0, top_p=1.0,
        max_new_tokens=100,
    )  # fmt: skip
    *text, end = out[0, ids.shape[1] :].tolist()
    assert end == tokenizer.eos_token_id
    assert not set(text) & set(tokenizer.all_special_ids)
    assert 40 <= len(tokenizer.decode(text)) <= 60


WARPERS: list[dict[str, Any]] = [
    {"temperature": 0.01}, {"temperature": 100.0}, {"top_k": 1}, {"top_k": 2, "top_p": 0.5}, {"top_p": 0.01},
    {"min_p": 1.0}, {"top_h": 0.1}, {"typical_p": 0.1}, {"epsilon_cutoff": 0.9}, {"eta_cutoff": 0.9},
    {"renormalize_logits": True}, {"remove_invalid_values": True}, {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1}, {"min_new_tokens": 30}, {"min_length": 60}, {"forced_eos_token_id": 2},
    {"suppress_tokens": list(range(60, 3072))}, {"bad_words_ids": [[4]]},
    {"exponential_decay_length_penalty": (1, 5.0)}, {"sequence_bias": {(83,): -50.0}},
]  # fmt: skip


@pytest.mark.parametrize("setting", WARPERS, ids=lambda setting: ",".join(setting))
@pytest.mark.parametrize("beams", [1, 3])
def test_no_other_setting_lets_a_masked_token_through(
    storyteller: tuple[Any, Any], setting: dict[str, Any], beams: int
) -> None:
    regex = "(left|right|no, (thank|bless) you{0,3})"
    for text in texts_of(storyteller, regex=regex, do_sample=True, seed=2, num_beams=beams, **setting):
        assert re.fullmatch(regex, text), text


def test_min_new_tokens_holds_while_the_grammar_can_go_on(storyteller: tuple[Any, Any]) -> None:
    _, tokenizer = storyteller
    for text in texts_of(storyteller, regex="[a-z ]{0,90}", min_new_tokens=20, do_sample=True, seed=0):
        assert re.fullmatch("[a-z ]{0,90}", text)
        assert len(tokenizer.encode(text)) >= 15
    for text in texts_of(storyteller, regex="[a-z]{3}", min_new_tokens=20, max_new_tokens=40):
        assert re.fullmatch("[a-z]{3}", text)


@pytest.mark.parametrize("beams", [1, 2])
def test_the_mask_comes_after_the_callers_processors(storyteller: tuple[Any, Any], beams: int) -> None:
    def only_the(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wish = torch.full_like(scores, -torch.inf)
        wish[:, 300:310] = 1000.0
        return wish

    for text in texts_of(storyteller, regex="(ja|nein)", logits_processor=[only_the], num_beams=beams):
        assert text in ("ja", "nein")


def test_fewer_texts_than_beams(storyteller: tuple[Any, Any]) -> None:
    for early in (True, False, "never"):
        texts = texts_of(storyteller, regex="(yes|no)", num_beams=4, num_return_sequences=2, early_stopping=early)
        assert len(texts) == 4
        assert set(texts) <= {"no", "yes"}  # the same text may come of different tokens


def test_a_text_cut_by_the_limit_is_a_beginning(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    ids = tokenizer("Well", return_tensors="pt").input_ids
    out = model.generate(
        ids, json_schema=ANSWER, tokenizer=tokenizer, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert out.finish_reasons == ["length"]
    assert tokenizer.decode(out.sequences[0, ids.shape[1] :]) == '{"name'


def test_a_streamer_gets_the_text(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    heard: list[str] = []

    class Listener:
        def put(self, value: torch.Tensor) -> None:
            heard.extend(map(str, value.flatten().tolist()))

        def end(self) -> None:
            heard.append("end")

    out = model.generate([[1, 50]], regex="a[bc]", tokenizer=tokenizer, streamer=Listener(), max_new_tokens=9)
    assert heard == [*map(str, out[0].tolist()), "end"]


def test_settings_of_the_model(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    config = GenerationConfig(regex="[xy]{3}", max_new_tokens=8, do_sample=False)
    out = model.generate([[1, 50]], generation_config=config, tokenizer=tokenizer)
    assert re.fullmatch("[xy]{3}", tokenizer.decode(out[0, 2:], skip_special_tokens=True))
    free = model.generate([[1, 50]], generation_config=config, regex=None)
    assert torch.equal(free, model.generate([[1, 50]], max_new_tokens=8, do_sample=False))


# Tokenizers


def test_any_fast_tokenizer_serves(tiny_llama_dir: Any) -> None:
    from transformers import AutoTokenizer

    model, ours = unspool.load(str(tiny_llama_dir))
    theirs = AutoTokenizer.from_pretrained(tiny_llama_dir)
    theirs(["a b", "c"], padding=True, truncation=True, max_length=3)  # leaves these settings in its backend
    results = [
        model.generate([[5, 6]], json_schema=ANSWER, tokenizer=tokenizer, max_new_tokens=200).tolist()
        for tokenizer in (ours, theirs, ours.backend_tokenizer)
    ]
    assert results[0] == results[1] == results[2]
    check(ours.decode(results[0][0][2:], skip_special_tokens=True), ANSWER)


def word_tokenizer(*words: str) -> Any:
    """A tokenizer that knows these words and nothing else."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([words[0]])
    return unspool.Tokenizer(backend, eos_token=words[0])


def allowed(processor: GrammarLogitsProcessor, ids: list[list[int]], vocab: int = 8) -> list[list[int]]:
    scores = processor(torch.tensor(ids, dtype=torch.int64).view(len(ids), -1), torch.zeros(len(ids), vocab))
    return [row.isfinite().nonzero()[:, 0].tolist() for row in scores]


def test_a_row_ends_where_the_tokenizer_has_no_way_on(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer("</s>", "a", "b", "ac")
    grammar = compile_structure("regex", "a(x|y)|bb", tokenizer=tokenizer, eos=[0], vocab_size=8)
    processor = GrammarLogitsProcessor(grammar, 0)
    assert allowed(processor, [[], []]) == [[1, 2], [1, 2]]
    with caplog.at_level(logging.WARNING, "unspool"):
        assert allowed(processor, [[1], [2]]) == [[0], [2]]
    assert "cannot go on after 1 tokens" in caplog.text
    assert allowed(processor, [[1, 0], [2, 2]]) == [[0], [0]]


def test_an_end_token_that_is_text_too() -> None:
    tokenizer = word_tokenizer("</s>", "a", "b", "c")
    grammar = compile_structure("regex", "[ab]{2}c*", tokenizer=tokenizer, eos=[0, 2], vocab_size=8)
    processor = GrammarLogitsProcessor(grammar, 1)
    assert allowed(processor, [[7]]) == [[1]]
    assert allowed(processor, [[7, 1]]) == [[1]]
    assert allowed(processor, [[7, 1, 1]]) == [[0, 2, 3]]


def test_scores_wider_than_the_tokenizer(storyteller: tuple[Any, Any]) -> None:
    _, tokenizer = storyteller
    grammar = compile_structure("regex", ".*", tokenizer=tokenizer, eos=[2], vocab_size=3200)
    (ids,) = allowed(GrammarLogitsProcessor(grammar, 0), [[]], 3200)
    assert 2 in ids
    assert max(ids) < len(tokenizer)


# Following rows


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_found_again_whatever_becomes_of_them(storyteller: tuple[Any, Any], data: st.DataObject) -> None:
    """Rows that grow, fork, leave, end, go wrong and take tokens back have the masks of fresh ones."""
    _, tokenizer = storyteller
    grammar = compile_structure("json_schema", ANSWER, tokenizer=tokenizer, eos=[2])
    matching = Matching(grammar)
    rows: list[list[int]] = [[] for _ in range(data.draw(st.integers(1, 4)))]
    matching.follow(rows)
    for _ in range(data.draw(st.integers(1, 12))):
        bits = matching.masks().clone()
        fresh = Matching(grammar)
        fresh.follow(rows)
        assert torch.equal(bits, fresh.masks())
        may = [[i for i in range(len(tokenizer)) if row[i // 32] >> i % 32 & 1] for row in bits.tolist()]
        for row, choice in zip(rows, may, strict=True):
            row.append(
                data.draw(st.sampled_from(choice or [2])) if data.draw(st.integers(0, 9)) else len(tokenizer) - 1
            )
        if data.draw(st.booleans()):
            matching.grow([row[-1:] for row in rows])
            continue
        rows = [list(row) for row in data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=5))]
        cut = data.draw(st.integers(0, 2))
        rows = [row[: max(0, len(row) - cut)] for row in rows]
        matching.follow(rows)


# What cannot work

CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(12_000)) + '\nr12000: "a"'
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"json_schema": {"type": "integer", "minimum": 7, "maximum": 3}}, ValueError, "json_schema cannot be used.*minim"),
    ({"json_schema": {"type": "foo"}}, ValueError, "json_schema cannot be used: Invalid type: foo"),
    ({"json_schema": {"not": {}}}, ValueError, "json_schema cannot be used: Unimplemented keys"),
    (
        {"json_schema": {"type": "object", "x-guidance": {"no_such_option": 3}}},
        ValueError,
        "json_schema cannot be used",
    ),
    ({"json_schema": {"$ref": "#/no"}}, ValueError, "json_schema cannot be used"),
    ({"json_schema": '{"type":'}, ValueError, "json_schema is not valid JSON"),
    ({"json_schema": True}, TypeError, "json_schema must be a dict"),
    ({"json_schema": {"enum": [{1, 2}]}}, TypeError, "json_schema holds what JSON cannot hold"),
    ({"json_schema": {"enum": ["x" * 300_000]}}, ValueError, "json_schema has 300014 characters; 262144 is the most"),
    ({"json_schema": {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}}, ValueError, "max is 2000"),
    ({"regex": "[a-"}, ValueError, "regex cannot be used.*unclosed character class"),
    ({"regex": r"[^\s\S]"}, ValueError, "regex cannot be used: no text that this tokenizer can write meets it"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, ValueError, "regex cannot be used"),
    ({"regex": 5}, TypeError, "regex must be a str"),
    ({"grammar": "start: nothing"}, ValueError, 'grammar cannot be used.*unknown name: "nothing"'),
    ({"grammar": "start: a\na: b\nb: a"}, ValueError, "grammar cannot be used: no text"),
    ({"grammar": "  "}, ValueError, "grammar is empty"),
    ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, ValueError, "too deeply nested"),
    ({"regex": "a", "grammar": "start: x"}, ValueError, "regex and grammar are both set"),
    ({"regex": "a", "tokenizer": None}, ValueError, "`regex` is set and needs the model's tokenizer"),
    ({"regex": "a", "tokenizer": "gpt2"}, TypeError, "tokenizer must be a tokenizer"),
    ({"regex": "a", "eos_token_id": None}, ValueError, "`regex` needs a token to end the text"),
    ({"regex": "a", "eos_token_id": 99_999}, ValueError, "outside the vocabulary"),
]


@pytest.mark.parametrize(("settings", "kind", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_said_before_any_work(
    storyteller: tuple[Any, Any],
    settings: dict[str, Any],
    kind: type[Exception],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = storyteller
    monkeypatch.setattr(type(model), "step", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(kind, match=says) as caught:
        model.generate([[1, 50]], max_new_tokens=8, **{"tokenizer": tokenizer, **settings})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_long_chain_of_rules_does_not_overflow_the_stack(storyteller: tuple[Any, Any]) -> None:
    assert texts_of(storyteller, PROMPTS[:1], grammar=CHAIN) == ["a"]


def test_too_complex_on_the_way_fails_the_call_alone(storyteller: tuple[Any, Any]) -> None:
    model, tokenizer = storyteller
    before = model.generate([[1, 50]], max_new_tokens=8, do_sample=False)
    schema = {"type": "string", "pattern": "^(([a-z]{1,50}){1,50}){1,50}$"}
    with pytest.raises(RequestFailed, match="row 0: the grammar is too complex to follow further: lexer error"):
        model.generate([[1, 50]], json_schema=schema, tokenizer=tokenizer, max_new_tokens=50, do_sample=False)
    assert torch.equal(model.generate([[1, 50]], max_new_tokens=8, do_sample=False), before)


def test_a_compilation_that_takes_too_long(storyteller: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from unspool.logits.grammar import compiling

    done = threading.Event()
    monkeypatch.setattr(compiling, "_compile", lambda *_: done.wait(60))
    monkeypatch.setattr(compiling, "MOST_SECONDS", 0.01)
    try:
        with pytest.raises(ValueError, match=r"regex takes more than 0\.01 seconds to compile"):
            compile_structure("regex", "slow|slower", tokenizer=storyteller[1], eos=[2])
    finally:
        done.set()


def test_without_the_library(storyteller: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = storyteller
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = word_tokenizer("</s>", "a")
    with pytest.raises(ImportError, match=r"pip install 'unspool\[structured\]'"):
        model.generate([[1, 50]], regex="a", tokenizer=tokenizer)
    model.generate([[1, 50]], max_new_tokens=2)


# What is kept


def test_compiled_grammars_are_kept_and_go_with_their_tokenizer(storyteller: tuple[Any, Any]) -> None:
    tokenizer = word_tokenizer("</s>", "a", "b")
    first = compile_structure("regex", "a|b", tokenizer=tokenizer, eos=[0])
    assert compile_structure("regex", "a|b", tokenizer=tokenizer, eos=[0]) is first
    assert compile_structure("grammar", 'start: "a" | "b"', tokenizer=tokenizer, eos=[0]).table is first.table
    assert compile_structure("regex", "a|b", tokenizer=storyteller[1], eos=[2]) is not first
    tokenizer.add_tokens(["c"])
    assert compile_structure("regex", "a|b", tokenizer=tokenizer, eos=[0]).table.size == 4
    alive = weakref.ref(token_table(tokenizer, [0]))
    del tokenizer, first
    gc.collect()
    assert alive() is None


def test_few_entries_are_kept() -> None:
    recent: Recent[str] = Recent(2)
    for key in ("a", "b", "a", "c"):
        recent.find(key) or recent.keep(key, key)
    assert list(recent) == ["a", "c"]


def test_threads_with_different_structures(storyteller: tuple[Any, Any]) -> None:
    jobs: list[dict[str, Any]] = [{"json_schema": ANSWER}, {"regex": "[a-z]{20,30}"}, {"grammar": SUM}]
    jobs = [{**job, "do_sample": True, "seed": seed} for seed in (1, 2) for job in jobs]
    alone = [texts_of(storyteller, **job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: texts_of(storyteller, **job), jobs))
    assert together == alone


# As settings


def test_a_schema_becomes_plain_data_of_its_own() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = GenerationConfig(json_schema=schema)
    schema["properties"]["a"] = {"type": "string"}
    assert config.json_schema == {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert GenerationConfig(json_schema=json.dumps(config.json_schema)) == config


def test_files_with_and_without_structures(tmp_path: Any) -> None:
    from transformers import GenerationConfig as Theirs

    plain = GenerationConfig(max_new_tokens=5)
    assert plain.to_diff_dict() == {"max_new_tokens": 5}
    for config in (
        plain,
        GenerationConfig(json_schema=ANSWER),
        GenerationConfig(regex="a+"),
        GenerationConfig(grammar=SUM),
    ):
        config.save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path) == config
        assert Theirs.from_pretrained(tmp_path).max_new_tokens == config.max_new_tokens
