"""Drafts from a model with another tokenizer: the text of plain decoding, and the distribution of plain sampling."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from families import make_checkpoint
from safetensors.torch import load_file, save_file

import unspool

ASSETS = Path(unspool.__file__).parent / "assets"
TEXTS = ["Once upon a time there was a small", "The cat said, \u201cI am", "Tom and his friend went to the"]
CONFIDENT: dict[str, Any] = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5}


def other_words(folder: Path, dropped: int) -> Path:
    """The built-in draft model with its tokens numbered otherwise, and without the last `dropped` of them."""
    source = ASSETS / "storyteller-draft"
    kind = json.loads((source / "tokenizer.json").read_text())
    count = len(kind["model"]["vocab"]) - dropped
    names = [name for name, token in kind["model"]["vocab"].items() if token < count]
    special = {token["id"] for token in kind["added_tokens"]}
    order = [token for token in range(count) if token not in special]
    random.Random(0).shuffle(order)
    new = {token: place for place, token in enumerate([*order, *sorted(special)])}
    kind["model"]["vocab"] = {name: new[kind["model"]["vocab"][name]] for name in names}
    kind["model"]["merges"] = [pair for pair in kind["model"]["merges"] if "".join(pair) in kind["model"]["vocab"]]
    for token in kind["added_tokens"]:
        token["id"] = new[token["id"]]
    for token in kind["post_processor"]["special_tokens"].values():
        token["ids"] = [new[number] for number in token["ids"]]
    weights = load_file(source / "model.safetensors")
    kept = torch.tensor(sorted(new, key=lambda token: new[token]))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][kept].contiguous()
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(kind))
    (folder / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": count}
    settings = json.loads((source / "generation_config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = settings[name] = new[settings[name]]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def story() -> tuple[Any, Any]:
    load = unspool.AutoModelForCausalLM.from_pretrained
    return load("storyteller", dtype="float32"), unspool.AutoTokenizer.from_pretrained("storyteller")


@pytest.fixture(scope="module", params=[0, 400], ids=["all", "most"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = other_words(tmp_path_factory.mktemp("other"), request.param)
    load = unspool.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype="float32"), unspool.AutoTokenizer.from_pretrained(folder), folder


def test_greedy_and_seeded_texts_are_those_of_plain_decoding(
    story: tuple[Any, Any], other: tuple[Any, Any, Path]
) -> None:
    model, tokenizer = story
    draft, draft_tokenizer, folder = other
    prompts = tokenizer(TEXTS, return_tensors="pt", padding=True)
    theirs = transformers.AutoTokenizer.from_pretrained
    pairs = [(tokenizer, draft_tokenizer), (theirs(ASSETS / "storyteller"), theirs(folder))]
    samplings: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "assistant_lookbehind": 0, "target_lookbehind": 3, "repetition_penalty": 1.1},
        {"do_sample": True, "seed": 4, "num_return_sequences": 2},
    ]
    for sampling in samplings:
        plain = model.generate(**prompts, max_new_tokens=30, **sampling)
        for ours, its in pairs if sampling is samplings[0] else pairs[:1]:
            out = model.generate(**prompts, max_new_tokens=30, assistant_model=draft, tokenizer=ours,
                                 assistant_tokenizer=its, return_dict_in_generate=True, **sampling,
                                 **CONFIDENT)  # fmt: skip
            assert out.sequences.tolist() == plain.tolist(), sampling
            assert out.acceptance_rate > 0.1, "the drafts say something"


def test_foreign_models_take_part(story: tuple[Any, Any], other: tuple[Any, Any, Path]) -> None:
    model, tokenizer = story
    draft, draft_tokenizer, folder = other
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, their_draft = load(ASSETS / "storyteller", dtype=torch.float32), load(folder, dtype=torch.float32)
    prompts = tokenizer(TEXTS, return_tensors="pt", padding=True)
    kwargs: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "seed": 4}
    for target, its in ((model, their_draft), (unspool.wrap(theirs), draft), (unspool.wrap(theirs), their_draft)):
        for sampling in ({"do_sample": False}, {"seed": 4}):
            plain = model.generate(**prompts, **kwargs | sampling).tolist()
            out = target.generate(**prompts, assistant_model=its, tokenizer=tokenizer, return_dict_in_generate=True,
                                  assistant_tokenizer=draft_tokenizer, **kwargs | sampling, **CONFIDENT)  # fmt: skip
            assert out.sequences.tolist() == plain
            assert out.acceptance_rate > 0.1


def words(names: list[str]) -> Any:
    """A tokenizer of whole words."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return unspool.Tokenizer(backend)


def test_sampled_drafts_keep_the_distribution(tmp_path: Path) -> None:
    """Chi-square of the second new token against its exact distribution; the draft model has two thirds of the tokens.

    4,000 draws in cells of expectation >= 30; at 1e-4 false alarms, taking the draft model's distribution instead, as
    accepting every draft would, is found with a power above 0.999 (it is also tested).
    """
    make_checkpoint("llama", tmp_path / "whole")
    make_checkpoint("llama", tmp_path / "part", seed=3, vocab_size=80)
    load = unspool.AutoModelForCausalLM.from_pretrained
    model, draft = (load(tmp_path / name, dtype="float32") for name in ("whole", "part"))
    names = [f"w{i}" for i in range(97)]
    others = [*reversed(names[:64]), *(f"x{i}" for i in range(16))]
    prompt, number = [23, 31, 31, 9, 60], 4000
    kwargs: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 2.0, "eos_token_id": None}
    torch.manual_seed(0)
    out = model.generate([prompt] * number, max_new_tokens=3, assistant_model=draft, tokenizer=words(names),
                         assistant_tokenizer=words(others), return_dict_in_generate=True, **CONFIDENT,
                         **kwargs)  # fmt: skip
    assert 0.1 < out.acceptance_rate < 1.0
    counts = torch.bincount(out.sequences[:, len(prompt) + 1], minlength=97).double()

    def second(each: Any, ids: list[int], translate: torch.Tensor) -> torch.Tensor:
        """The second token's distribution, over the words of `translate`."""
        first = (each(torch.tensor([ids])).logits[0, -1, translate] / 2.0).softmax(-1)
        rows = torch.cat([torch.tensor([ids]).expand(len(translate), -1), translate[:, None]], dim=1)
        return (first[:, None] * (each(rows).logits[:, -1, translate] / 2.0).softmax(-1)).sum(0)

    exact = second(model, prompt, torch.arange(97))
    drafted = torch.zeros(97)
    drafted[:64] = second(draft, [63 - token for token in prompt], torch.arange(63, -1, -1))

    def distance(p: torch.Tensor) -> float:
        expected = p.double() * number
        cells = expected >= 30
        seen = torch.cat([counts[cells], counts[~cells].sum()[None]])
        hoped = torch.cat([expected[cells], expected[~cells].sum()[None].clamp_min(1)])
        freedom = len(seen) - 1
        value = ((seen - hoped) ** 2 / hoped).sum()
        return float((value - freedom) / (2 * freedom) ** 0.5)  # nearly normal

    assert distance(exact) < 3.8
    assert distance(drafted) > 20


def test_wrong_tokenizers_are_refused(story: tuple[Any, Any], other: tuple[Any, Any, Path]) -> None:
    model, tokenizer = story
    draft, draft_tokenizer, _ = other
    ids = [[5, 6, 7]]
    strangers = words([f"w{i}" for i in range(9)])
    if draft.spec.vocab_size != model.spec.vocab_size:
        with pytest.raises(ValueError, match="pass both: tokenizer= and assistant_tokenizer="):
            model.generate(ids, assistant_model=draft)
    with pytest.raises(ValueError, match="pass tokenizer= too"):
        model.generate(ids, assistant_model=draft, assistant_tokenizer=draft_tokenizer)
    with pytest.raises(ValueError, match="belongs to an assistant_model"):
        model.generate(ids, assistant_tokenizer=draft_tokenizer)
    with pytest.raises(ValueError, match="no token in common"):
        model.generate(ids, assistant_model=draft, tokenizer=tokenizer, assistant_tokenizer=strangers, do_sample=True)


@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "seed": 4}], ids=["greedy", "seeded"])
def test_requests_of_one_batch(drawn: dict[str, Any], story: tuple[Any, Any], other: tuple[Any, Any, Path]) -> None:
    (model, tokenizer), (draft, words, _) = story, other
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    settings = {"max_new_tokens": 24, "do_sample": False, **CONFIDENT} | drawn
    plain = model.generate_batch(prompts, **settings)
    outputs = model.generate_batch(
        prompts, assistant_model=draft, tokenizer=tokenizer, assistant_tokenizer=words, **settings
    )
    assert [one.error for one in outputs.values()] == [None] * len(prompts)
    for output, wanted in zip(outputs.values(), plain.values(), strict=True):
        assert output.generated_tokens == wanted.generated_tokens
    assert sum(one.usage.accepted_tokens for one in outputs.values()) > 0
