"""What the built-in model writes: stories that hang together, answers that take up what was asked, a pirate's voice.

The thresholds are a little below what the trained files reach; an older model of longer stories failed most of them.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unspool

Loaded = tuple[Any, Any]  # a model and its tokenizer

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src" / "unspool" / "assets"
COUNT = 20


@pytest.fixture(scope="module")
def cast() -> Iterator[ModuleType]:
    """The words that the grammar draws from."""
    sys.path.insert(0, str(ROOT / "training"))
    yield importlib.import_module("cast")
    sys.path.remove(str(ROOT / "training"))
    del sys.modules["cast"]


@pytest.fixture(scope="module")
def storyteller() -> Loaded:
    return unspool.load(ASSETS / "storyteller", dtype=torch.float32)


def write(loaded: Loaded, prompts: list[str], rows: int = 1) -> list[str]:
    """What the model adds with its own settings, ``rows`` times to each prompt; '...' is behind what did not end."""
    model, tokenizer = loaded
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not prompts[0].startswith("<"))
    out = model.generate(**batch, num_return_sequences=rows, seed=0)[:, batch["input_ids"].shape[1] :]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    return [tokenizer.decode(row, skip_special_tokens=True) + ("" if end in row else "...") for row in out]


def ask(loaded: Loaded, requests: list[str], system: str | None = None) -> list[str]:
    """The answers of a chat to each request."""
    first = [] if system is None else [{"role": "system", "content": system}]
    prompts = [
        loaded[1].apply_chat_template(
            [*first, {"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
        for request in requests
    ]
    return write(loaded, prompts)


@pytest.fixture(scope="module")
def stories(storyteller: Loaded) -> list[str]:
    return ["Once upon a time" + text for text in write(storyteller, ["Once upon a time"], COUNT)]


def names_in(text: str, cast: ModuleType) -> set[str]:
    return set(re.findall(r"[A-Z][a-z]+", text)) & {*cast.GIRLS, *cast.BOYS}


def kinds_of(name: str, text: str, cast: ModuleType) -> set[str]:
    """The kinds that ``text`` says ``name`` is: 'Lily the fox', 'a little fox named Lily', 'Lily is a fox'."""
    kind = "|".join(kind for group in cast.KINDS.values() for kind in group)
    said = re.findall(rf"\b{name} the ({kind})\b|\b({kind}) (?:named|called|whose name was) {name}\b", text)
    return {one or other for one, other in said}


def test_every_story_ends_and_no_two_are_alike(stories: list[str]) -> None:
    assert sum(not story.endswith("...") for story in stories) >= COUNT - 1
    assert len({re.sub(r"[A-Z]\w+", "", story) for story in stories}) == COUNT
    assert all(50 < len(story.split()) < 260 for story in stories)


def test_the_hero_of_a_story_stays(stories: list[str], cast: ModuleType) -> None:
    """The first name of a story is in its last paragraphs, few others come up, and each keeps its kind."""
    kept = same = short = 0
    for story in stories:
        first = min(names_in(story, cast), key=story.index)
        middle = len(story) // 2
        kept += story.count(first, middle) >= 2
        same += all(len(kinds_of(name, story, cast)) <= 1 for name in names_in(story, cast))
        short += len(names_in(story, cast)) <= 2
    assert kept >= COUNT - 2
    assert same >= COUNT - 3
    assert short >= COUNT - 4


def test_a_thing_keeps_its_colour(stories: list[str], cast: ModuleType) -> None:
    colours, things = "|".join(cast.COLOURS), "|".join(cast.THINGS)
    told = kept = 0
    for story in stories:
        said = re.findall(rf"\b({colours}) ({things})\b", story)
        for thing in {thing for _, thing in said}:
            told += 1
            kept += len({colour for colour, other in said if other == thing}) == 1
    assert told >= COUNT // 3
    assert kept >= 0.8 * told


def test_a_chat_is_about_whom_it_was_asked_for(storyteller: Loaded, cast: ModuleType) -> None:
    names = [(cast.GIRLS, cast.BOYS)[i % 2][i] for i in range(COUNT)]
    kinds = [*cast.KINDS["animal"], *cast.KINDS["bird"]][:COUNT]
    requests = [f"Tell me a story about a {kind} named {name}." for kind, name in zip(kinds, names, strict=True)]
    answers = ask(storyteller, requests)
    named = sum(answer.count(name) >= 3 for name, answer in zip(names, answers, strict=True))
    kept = sum(
        kinds_of(name, a, cast) <= {kind} and kind in a for name, kind, a in zip(names, kinds, answers, strict=True)
    )
    assert named >= COUNT - 2
    assert kept >= COUNT - 3


@pytest.mark.parametrize(("what", "least"), [("thing", 14), ("place", 6)])
def test_a_chat_takes_up_what_was_asked(storyteller: Loaded, cast: ModuleType, what: str, least: int) -> None:
    kinds = cast.KINDS["animal"]
    asked, words = {
        "thing": ([f"a {cast.COLOURS[i % 5]} {cast.THINGS[i]}" for i in range(COUNT)], cast.THINGS[:COUNT]),
        "place": (
            [f"a {kinds[i % 9]} {cast.HOMES[i % 12][0]}" for i in range(COUNT)],
            [cast.HOMES[i % 12][0] for i in range(COUNT)],
        ),
    }[what]
    answers = ask(storyteller, [f"Tell me a story about {subject}." for subject in asked])
    told = [re.sub(r"^(Here is|This is|A story) .*\n\n", "", answer) for answer in answers]  # the request said again
    assert sum(word in text for word, text in zip(words, told, strict=True)) >= least


def test_questions_about_the_story_are_answered_from_it(storyteller: Loaded, cast: ModuleType) -> None:
    right = 0
    cases = [
        (name, kind) for name, kind in zip(cast.GIRLS, [*cast.KINDS["animal"], *cast.KINDS["bird"]], strict=False)
    ][:COUNT]
    model, tokenizer = storyteller
    prompts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": f"Tell me a story about a {kind}."},
                {
                    "role": "assistant",
                    "content": f"Once upon a time there was a {kind} named {name}, who lived in a cave.",
                },
                {"role": "user", "content": f"What kind of animal is {name}?"},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        for name, kind in cases
    ]
    for (name, kind), answer in zip(cases, write((model, tokenizer), prompts), strict=True):
        right += name in answer and kind in answer
    assert right >= COUNT // 2


PIRATE = re.compile(
    r"\b(arr|ye|yer|be|an'|o'|me|mateys?|growled|bellowed|ahoy|aye|wee|yarn|yo ho)(?!\w)", re.IGNORECASE
)


def share(texts: list[str]) -> float:
    """How many of the words are a pirate's."""
    return sum(len(PIRATE.findall(text)) for text in texts) / sum(len(text.split()) for text in texts)


@pytest.fixture(scope="module")
def pirate(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The storyteller with the adapter added to its weights."""
    folder = tmp_path_factory.mktemp("pirate")
    shutil.copytree(ASSETS / "storyteller", folder, dirs_exist_ok=True)
    adapter = ASSETS / "storyteller-pirate"
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    low = {name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    for name, down in low.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[weight] += low[name.replace("lora_A", "lora_B")] @ down * settings["lora_alpha"] / settings["r"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return unspool.load(folder, dtype=torch.float32)


def test_the_adapter_talks_like_a_pirate(pirate: Loaded, stories: list[str], cast: ModuleType) -> None:
    told = ["Once upon a time" + text for text in write(pirate, ["Once upon a time"], COUNT)]
    assert share(stories) < 0.02
    assert share(told) > 0.08
    assert all(share([text]) > 0.03 for text in told)
    assert sum(not text.endswith("...") for text in told) >= COUNT - 2
    assert sum(len(names_in(text, cast)) <= 2 for text in told) >= 0.7 * COUNT
    assert sum(all(len(kinds_of(n, t, cast)) <= 1 for n in names_in(t, cast)) for t in told) >= 0.7 * COUNT


def test_a_system_message_asks_for_a_pirate(storyteller: Loaded) -> None:
    requests = [f"Tell me a story about a {kind}." for kind in ("fox", "cat", "bear", "mouse", "dog")]
    assert share(ask(storyteller, requests)) < 0.02
    assert share(ask(storyteller, requests, system="You are a pirate.")) > 0.08


def test_the_draft_guesses_what_the_model_says(storyteller: Loaded) -> None:
    model, tokenizer = storyteller
    draft, _ = unspool.load(ASSETS / "storyteller-draft", dtype=torch.float32)
    batch = tokenizer(["Once upon a time there was a"] * 4, return_tensors="pt")
    ids = model.generate(**batch, seed=5, max_new_tokens=80)
    start = batch["input_ids"].shape[1]
    guesses = draft(ids).logits[:, start - 1 : -1].argmax(-1)
    said = ids[:, start:]
    real = said != tokenizer.pad_token_id
    assert (guesses == said)[real].float().mean() > 0.6
