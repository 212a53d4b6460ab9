"""Prompts as embeddings, healed prompts and generation methods of one's own, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_checkpoint

import unspool

PROMPTS = torch.tensor([[5, 9, 11, 3, 8], [0, 0, 17, 4, 9], [0, 23, 31, 31, 60]])
MASK = (PROMPTS != 0).long()
Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=["llama", "granite", "gpt2", "llama-rope-dynamic"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_checkpoint(request.param, folder)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), theirs


def both(pair: Pair, **kwargs: Any) -> tuple[list[list[int]], list[list[int]]]:
    results = []
    for model in pair:
        torch.manual_seed(3)
        results.append(model.generate(**{"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None} | kwargs))
    return results[0].tolist(), results[1].tolist()


WAYS: list[dict[str, Any]] = [
    {"do_sample": False, "suppress_tokens": [7, 8, 9], "no_repeat_ngram_size": 2},
    {"do_sample": True, "num_return_sequences": 2, "top_k": 12},
    {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    {"do_sample": False, "max_new_tokens": None, "max_length": 14, "min_length": 9},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_embeddings_give_the_text_of_their_tokens(pair: Pair, way: dict[str, Any]) -> None:
    table = pair[1].get_input_embeddings().weight.detach()
    rows = 1 if pair[0].spec.needs_extents else 3
    ids, mask = PROMPTS[:rows], MASK[:rows]
    embeds = {"inputs_embeds": table[ids], "attention_mask": mask}
    ours, theirs = both(pair, **embeds, **way)
    assert ours == theirs, "new tokens alone"
    ours, theirs = both(pair, input_ids=ids, **embeds, **way)
    assert ours == theirs, "with the ids they stand for"
    assert ours == both(pair, input_ids=ids, attention_mask=mask, **way)[0]


def test_embeddings_that_are_no_tokens_in_chunks_and_in_company(pair: Pair) -> None:
    model = pair[0]
    hidden = model.spec.hidden_size
    embeds = torch.randn(3, 7, hidden, generator=torch.Generator().manual_seed(0)) * 0.2
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    whole = model.generate(inputs_embeds=embeds, **kwargs)
    assert whole.shape == (3, 8)
    assert model.generate(inputs_embeds=embeds, prefill_chunk_size=3, **kwargs).tolist() == whole.tolist()
    for row in range(3):
        assert model.generate(inputs_embeds=embeds[row : row + 1], **kwargs)[0].tolist() == whole[row].tolist()
    assert len({tuple(row) for row in whole.tolist()}) == 3, "the embeddings matter"


def test_wrong_embeddings_are_refused(pair: Pair) -> None:
    model = pair[0]
    hidden = model.spec.hidden_size
    with pytest.raises(ValueError, match="inputs_embeds must be"):
        model.generate(inputs_embeds=torch.zeros(1, 2, hidden + 1))
    with pytest.raises(TypeError, match="inputs_embeds must be"):
        model.generate(inputs_embeds=torch.zeros(1, 2, hidden, dtype=torch.int64))
    with pytest.raises(ValueError, match="must agree in rows"):
        model.generate(PROMPTS, inputs_embeds=torch.zeros(1, 2, hidden))
    with pytest.raises(ValueError, match="keeps"):
        model.generate(inputs_embeds=torch.zeros(1, 2, hidden), attention_mask=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(unspool.errors.Unsupported, match="drafts"):
        model.generate(inputs_embeds=torch.zeros(1, 2, hidden), prompt_lookup_num_tokens=2)


@pytest.fixture(scope="module")
def storyteller() -> tuple[Any, Any]:
    model, tokenizer = unspool.load("storyteller", dtype="float32")
    return model, tokenizer


def test_healing_is_transformers(storyteller: tuple[Any, Any]) -> None:
    import transformers

    model, tokenizer = storyteller
    folder = Path(unspool.__file__).parent / "assets" / "storyteller"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config = transformers.GenerationConfig()
    whole = transformers.AutoTokenizer.from_pretrained(folder)

    class Reference:  # transformers would heal after a first token that it makes a pad
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return whole(*args, add_special_tokens=False, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

    reference = Reference()
    kwargs: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 5, "do_sample": False}
    changed = 0
    for text in ("The little ca", "A wonderf", "He said: hap", "Once upon a time there w", "B"):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        healed = theirs.heal_tokens(ids, reference)
        ours = model.generate(ids, token_healing=True, **kwargs)
        if tokenizer.decode(ids[0, -1:]).startswith(" "):  # transformers finds no extension of these here
            assert healed.tolist() == ids.tolist()
            assert tokenizer.decode(ours[0, : ids.shape[1]]).startswith(tokenizer.decode(ids[0]))
            continue
        assert ours[:, : ids.shape[1]].tolist() == healed.tolist()
        assert ours.tolist() == model.generate(healed, **kwargs).tolist()
        changed += healed.tolist() != ids.tolist()
    assert changed >= 1, "some prompts were healed"
    ids = tokenizer("One day the fo", add_special_tokens=False, return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, token_healing=True, **kwargs)[0]).startswith("One day the fo")
    rows = [
        tokenizer(text, add_special_tokens=False).input_ids for text in ("The little ca", "A", "They were very hap")
    ]
    batch = model.generate(rows, token_healing=True, **kwargs)
    width = max(map(len, rows))
    for row, prompt in zip(batch.tolist(), rows, strict=True):
        alone = model.generate([prompt], token_healing=True, **kwargs)
        assert row[width - len(prompt) :] == alone[0].tolist()
    with pytest.raises(ValueError, match="pass tokenizer="):
        model.generate(rows, token_healing=True)


def greedy(
    model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
    left: int = 2, attention_mask: Any = None,
) -> torch.Tensor:  # fmt: skip
    """The simplest loop: full forward passes, greedy, `left` tokens short of the limit."""
    limit = generation_config.max_length - left
    while input_ids.shape[1] < limit and not bool(stopping_criteria(input_ids, None).all()):
        logits = model(input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, -1]
        scores = logits_processor(input_ids, logits)
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
    return input_ids


def test_a_function_of_ones_own_decodes(pair: Pair) -> None:
    model = pair[0]
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.2}
    plain = model.generate(PROMPTS[:1], **kwargs)
    assert model.generate(PROMPTS[:1], custom_generate=greedy, left=0, **kwargs).tolist() == plain.tolist()
    assert model.generate(PROMPTS[:1], custom_generate=greedy, **kwargs).tolist() == plain[:, :-2].tolist()
    with pytest.raises(ValueError, match="no use for: unknown"):
        model.generate(PROMPTS[:1], custom_generate=greedy, unknown=1, **kwargs)


def test_a_folder_runs_and_a_repository_only_when_trusted(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair[0]
    folder = tmp_path / "custom_generate"
    folder.mkdir()
    (folder / "words.py").write_text("EXTRA = 3\n")
    (folder / "generate.py").write_text(
        "from .words import EXTRA\n"
        "RAN = []\n"
        "def generate(model, inputs=None, extra=0, nested=None, **kwargs):\n"
        "    RAN.append(1)\n"
        "    if nested is not None:\n"
        "        return model.generate(inputs, custom_generate=nested)\n"
        "    return model.generate(inputs, max_new_tokens=EXTRA + extra, do_sample=False, eos_token_id=None)\n"
    )
    asked: list[str] = []

    def downloaded(name: str, **kwargs: Any) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    for refused in ({}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            model.generate(PROMPTS[:1], custom_generate="someone/elses", **refused)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        model.generate(PROMPTS[:1], custom_generate=str(tmp_path), trust_remote_code=False)
    assert model.generate(PROMPTS[:1], custom_generate=tmp_path, extra=2).shape == (1, 10)
    assert not asked
    trusted: dict[str, Any] = {"custom_generate": "someone/elses", "trust_remote_code": True}
    assert model.generate(PROMPTS[:1], **trusted).shape == (1, 8)
    assert asked == ["someone/elses"]
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # trust is not handed on
        model.generate(PROMPTS[:1], **trusted, nested="someone/others")
    assert asked == ["someone/elses"] * 2
    with pytest.raises(FileNotFoundError, match="has no custom_generate"):
        model.generate(PROMPTS[:1], custom_generate=tmp_path / "custom_generate", trust_remote_code=True)
    (folder / "requirements.txt").write_text("torch>=2\nno-such-package-at-all>=1  # comment\n")
    with pytest.raises(ImportError, match="no-such-package-at-all"):
        model.generate(PROMPTS[:1], custom_generate=tmp_path, trust_remote_code=True)
    (folder / "requirements.txt").write_text("torch>=99\n")
    with pytest.raises(ImportError, match="torch>=99"):
        model.generate(PROMPTS[:1], custom_generate=tmp_path, trust_remote_code=True)
