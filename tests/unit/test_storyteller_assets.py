"""The built-in model's files, and the grammar that its training text comes from."""

from __future__ import annotations

import importlib
import json
import re
import sys
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
    known = {*words.GIRLS, *words.BOYS}
    for seed in SEEDS:
        told = training["grammar"].story(seed)
        world = told.world
        people = (world.h, world.f, world.e, world.g)
        names = {being.name for being in people}
        assert len(names) == len({being.kind for being in people}) == 4
        assert world.h.name in told.text
        assert told.text.endswith((".", "!", "?", '"')), told.text[-40:]
        assert not set("{}[]|*") & set(told.text)
        assert "  " not in told.text
        # No stranger's name: what is a name elsewhere and not a word at a sentence's start here belongs to the cast.
        inside = set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", told.text))
        place = set(re.findall(r"[A-Z][a-z]+", f"{world.home.at} {world.land} {world.o.Cap}"))
        assert inside & known <= names | place | {"Will", "Pearl", "Wren", "Robin"}, told.text


def test_pronouns_follow_the_cast(training: dict[str, ModuleType]) -> None:
    checked = 0
    for seed in range(1500):
        told = training["grammar"].story(seed)
        genders = {being.she for being in vars(told.world).values() if hasattr(being, "she")}
        if len(genders) == 1:
            checked += 1
            wrong = r"\b(he|him|his|himself)\b" if True in genders else r"\b(she|her|hers|herself)\b"
            said = told.text.replace("her way", "")
            assert not re.search(wrong, said, re.IGNORECASE), told.text
    assert checked > 50


def test_chat_asks_for_what_the_story_has(training: dict[str, ModuleType]) -> None:
    for seed in range(200):
        turns = training["chat"].conversation(seed)
        roles = [role for role, _ in turns if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(text and text == text.strip() for _, text in turns)


def test_pirates_are_heard_and_openings_kept(training: dict[str, ModuleType]) -> None:
    for seed in range(50):
        text = training["grammar"].story(seed).text
        told = training["styles"].pirate(text, seed)
        assert told != text
        assert told.split()[:3] == text.split()[:3]
        assert re.search(r"\b(ye|be|an'|o'|t'|me|growled|[Aa]rr+|[Aa]hoy)\b", told)
