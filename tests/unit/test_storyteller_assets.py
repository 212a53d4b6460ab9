"""The built-in model's files, and the grammar that its training text comes from."""

from __future__ import annotations

import importlib
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src" / "unspool" / "assets"
MODELS = ("storyteller", "storyteller-draft")
ADAPTER = "storyteller-pirate"
SEEDS = range(300)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of ``training/``, imported as its scripts import them."""
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    names = ("cast", "grammar", "chat", "styles", "data")
    modules = {name: importlib.import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return modules


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def config(name: str, file: str = "config.json") -> dict[str, object]:
    return json.loads((ASSETS / name / file).read_text(encoding="utf-8"))


def test_everything_together_stays_under_12_megabytes() -> None:
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    assert 4_000_000 < size < 12_000_000


def test_nothing_but_checkpoint_files_is_shipped() -> None:
    names = {str(file.relative_to(ASSETS)) for file in ASSETS.rglob("*") if file.is_file() and file.suffix != ".py"}
    whole = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    lora = ("adapter_config.json", "adapter_model.safetensors")
    assert names == {f"{m}/{f}" for m in MODELS for f in whole} | {f"{ADAPTER}/{f}" for f in lora}


@pytest.mark.parametrize("name", MODELS)
def test_weights_have_the_shapes_that_the_config_promises(name: str) -> None:
    c, found = config(name), shapes(ASSETS / name / "model.safetensors")
    hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    expected = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for number in range(c["num_hidden_layers"]):
        expected.update({f"model.layers.{number}.{part}.weight": shape for part, shape in layer.items()})
    assert found == expected
    assert hidden % 64 == inner % 64 == dim % 16 == 0


def test_adapter_fits_the_base() -> None:
    base, found = (
        shapes(ASSETS / "storyteller" / "model.safetensors"),
        shapes(ASSETS / ADAPTER / "adapter_model.safetensors"),
    )
    settings = config(ADAPTER, "adapter_config.json")
    rank, targets = settings["r"], set(settings["target_modules"])
    expected = {}
    for name, shape in base.items():
        stem = name.removesuffix(".weight")
        if stem.rsplit(".", 1)[-1] in targets:
            expected[f"base_model.model.{stem}.lora_A.weight"] = (rank, shape[1])
            expected[f"base_model.model.{stem}.lora_B.weight"] = (shape[0], rank)
    assert found == expected


def test_model_and_draft_share_one_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (ASSETS / MODELS[0] / file).read_bytes() == (ASSETS / MODELS[1] / file).read_bytes()
    tokenizer = Tokenizer.from_file(str(ASSETS / MODELS[0] / "tokenizer.json"))
    for name in MODELS:
        c, g = config(name), config(name, "generation_config.json")
        assert tokenizer.get_vocab_size() == c["vocab_size"]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert c[key] == g[key]
    tokens = config("storyteller", "tokenizer_config.json")
    c = config("storyteller")
    for key in ("bos_token", "eos_token", "pad_token"):
        assert tokenizer.token_to_id(tokens[key]) == c[f"{key}_id"]


@pytest.mark.parametrize(
    "text", ["Once upon a time", "  spaces \t\n", "Ünï çødé 漢字 🦊", 'def f(x):\n    return "x"', ""]
)
def test_every_string_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(ASSETS / "storyteller" / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids[0] == config("storyteller")["bos_token_id"]
    assert tokenizer.decode(ids) == text


def test_chat_template_writes_what_the_model_was_trained_on(training: dict[str, ModuleType]) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string(
        config("storyteller", "tokenizer_config.json")["chat_template"]
    )
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    for seed in range(30):
        turns = training["chat"].conversation(seed)
        messages = [{"role": role, "content": text} for role, text in turns]
        assert template.render(messages=messages, **names) == training["data"].render(turns)
    prompt = template.render(messages=[{"role": "user", "content": " Hi "}], add_generation_prompt=True, **names)
    assert prompt == "<|begin|><|user|>Hi<|end|><|assistant|>"


def test_a_seed_always_gives_the_same_text(training: dict[str, ModuleType]) -> None:
    for label in ("one", "two"):
        first, second = (list(training["data"].documents(20, label, "pirate")) for _ in range(2))
        assert first == second
    assert training["grammar"].story(1).text == training["grammar"].story(1).text
    assert len({training["grammar"].story(seed).text for seed in SEEDS}) == len(SEEDS)


def test_every_plot_file_is_told(training: dict[str, ModuleType]) -> None:
    told = {training["grammar"].story(seed).plot for seed in SEEDS}
    assert told == {path.stem for path in (ROOT / "training" / "stories").glob("*.txt")}


def test_every_wording_of_every_plot_fills(training: dict[str, ModuleType]) -> None:
    import random

    grammar = training["grammar"]
    for plot in grammar.plots():
        rng = random.Random(plot.name)
        world = grammar.draw_world(rng)
        grammar.add_picks(rng, plot, world)
        for beats in plot.paragraphs:
            for wording in (line for beat in beats for line in beat):
                said = grammar.say(rng, wording, world)
                assert not set("{}[]|") & set(said), said
                assert said[0].isupper() or said[0] == '"'
                assert said.count('"') % 2 == 0, said


def test_stories_are_whole_and_their_cast_is_consistent(training: dict[str, ModuleType]) -> None:
    words = training["cast"]
    known = {*words.GIRLS, *words.BOYS} - {"Robin", "Rose"}
    kinds = {kind for group in words.KINDS.values() for kind in group}
    for seed in SEEDS:
        told = training["grammar"].story(seed)
        hero, friend = told.world.h, told.world.f
        assert hero.name != friend.name and hero.kind != friend.kind
        assert hero.name in told.text and hero.kind in told.text
        assert told.text.endswith((".", "!", "?", '"')), told.text[-40:]
        assert not set("{}[]|*") & set(told.text)
        assert "  " not in told.text
        assert set(re.findall(r"[A-Z][a-z]+", told.text)) & known <= {hero.name, friend.name}, told.text
        assert set(re.findall(r"(?<=the )[a-z]+", told.text)) & (kinds - {hero.kind, friend.kind}) == set() or (
            told.plot == "subject"
        ), told.text


def test_pronouns_follow_the_cast(training: dict[str, ModuleType]) -> None:
    checked = 0
    for seed in range(600):
        told = training["grammar"].story(seed)
        genders = {told.world.h.she, told.world.f.she}
        if len(genders) == 1:
            checked += 1
            wrong = r"\b(he|him|his|himself)\b" if True in genders else r"\b(she|her|hers|herself)\b"
            assert not re.search(wrong, told.text, re.IGNORECASE), told.text
    assert checked > 50


def test_chat_asks_for_what_the_story_has(training: dict[str, ModuleType]) -> None:
    words, taken_up = training["cast"], 0
    told = {*words.GIRLS, *words.BOYS, *words.THINGS, *(kind for group in words.KINDS.values() for kind in group)}
    told = {word.lower() for word in told}
    for seed in range(200):
        turns = training["chat"].conversation(seed)
        roles = [role for role, _ in turns if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(text and text == text.strip() for _, text in turns)
        for (_, asked), (role, answer) in pairwise(turns):
            if "story" in asked and role == "assistant":
                named = set(re.findall(r"\w+", asked.lower())) & told
                assert named <= set(re.findall(r"\w+", answer.lower())), (asked, answer)
                taken_up += len(named)
    assert taken_up > 100


def test_pirates_are_heard_and_openings_kept(training: dict[str, ModuleType]) -> None:
    for seed in range(50):
        text = training["grammar"].story(seed).text
        told = training["styles"].pirate(text, seed)
        assert told != text
        assert told.startswith("Once upon a time") == text.startswith("Once upon a time")
        assert re.search(r"\b(ye|be|an'|o'|me|growled|[Aa]rr+|[Aa]hoy)\b", told)


def test_nothing_is_learnt_from_what_users_say(training: dict[str, ModuleType]) -> None:
    data = training["data"]
    tokenizer = Tokenizer.from_file(str(ASSETS / "storyteller" / "tokenizer.json"))
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye!")]
    ids = tokenizer.encode(data.render(turns), add_special_tokens=False).ids
    kept = [token for token, flag in zip(ids, data.learnt(ids), strict=True) if flag]
    assert tokenizer.decode(kept, skip_special_tokens=False) == "<|begin|>Hello!<|end|>Bye!<|end|>"
    story = tokenizer.encode("<|begin|>Once upon a time<|end|>", add_special_tokens=False).ids
    assert data.learnt(story) == [1] * len(story)


def test_batches_hold_every_text_once(training: dict[str, ModuleType]) -> None:
    import numpy as np

    lengths = np.random.default_rng(0).integers(5, 90, 300)
    ids = np.arange(lengths.sum(), dtype=np.uint16)
    texts = training["data"].Texts(ids, np.ones_like(ids), np.cumsum(lengths))
    order = training["data"].batches(texts, 400, seed=1)
    assert sorted(i for picked in order for i in picked) == list(range(300))
    for picked in order:
        inputs, targets, weights = texts.batch(picked)
        for row, i in enumerate(picked):
            text, count = ids[texts.ends[i] - lengths[i] : texts.ends[i]], lengths[i] - 1
            assert inputs[row, :count].tolist() == text[:-1].tolist()
            assert targets[row, :count].tolist() == text[1:].tolist()
            assert weights[row].tolist() == [1.0] * count + [0.0] * (weights.shape[1] - count)
    assert max(texts.batch(picked)[0].size for picked in order) <= 400 + 3 * 90


def test_what_must_stay_counts_more(training: dict[str, ModuleType]) -> None:
    import numpy as np

    often = np.full(3000, 9, dtype=np.uint16)
    story = np.array([1, 50, 9, 60, 9, 50, 61, 2], dtype=np.uint16)
    ids = np.concatenate([often, story])
    learn = np.ones(len(ids), dtype=np.uint8)
    learn[-2] = 0
    texts = training["data"].Texts(ids, learn, np.array([3000, 3008]))
    assert texts.batch([1], kept=5.0)[2].tolist() == [[1.0, 1.0, 1.0, 1.0, 5.0, 0.0, 1.0]]
