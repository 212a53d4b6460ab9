"""Every kind of cache on a trained model: the text does not depend on where keys and values are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_checkpoint

import unspool
from unspool.cache import PagedStore
from unspool.cache.compact import decode, encode

PROMPTS = ("Once upon a time", "The little fox", "One day, a girl", "In a village by the sea")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    import transformers

    folder = Path(unspool.__file__).parent / "assets" / "storyteller"
    model, tokenizer = unspool.load(folder, dtype="float32")
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[PagedStore]:
    """Every store that is made."""
    made: list[PagedStore] = []
    original = PagedStore.__init__

    def watched(self: PagedStore, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(PagedStore, "__init__", watched)
    return made


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded", "offloaded_static", "paged"])
def test_the_text_is_that_of_transformers(pair: tuple[Any, Any, Any], kind: str) -> None:
    model, theirs, tokenizer = pair
    kwargs: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.1}
    batch = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    ours = model.generate(**batch, cache_implementation=kind, **kwargs)
    their_kind = kind if kind in ("dynamic", "static") else None  # the others need an accelerator there
    expected = theirs.generate(**batch, cache_implementation=their_kind, disable_compile=True, **kwargs)
    assert ours.tolist() == expected.tolist()


def test_eight_bits_keep_the_text_in_a_third_of_the_memory(pair: tuple[Any, Any, Any], stores: list[Any]) -> None:
    model, _, tokenizer = pair
    same = total = 0
    for way in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 5}):
        for prompt in PROMPTS[:2]:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            kwargs: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **way}
            plain = model.generate(ids, **kwargs)
            quantized = model.generate(ids, cache_implementation="quantized", cache_config={"nbits": 8}, **kwargs)
            agree = (plain == quantized)[0, ids.shape[1] :].int().cumprod(0).sum()
            same, total = same + int(agree), total + 40
    assert same / total > 0.6, "greedy texts part where two tokens are nearly as likely, and stay apart"
    plain, quantized = stores[0], stores[1]
    assert quantized.quantized and not plain.quantized
    dim = model.spec.groups[0].head_dim
    sizes = [
        sum(pool.nbytes for pool in (*store.keys.values(), *store.values.values())) for store in (plain, quantized)
    ]
    assert sizes[1] * 4 * dim == sizes[0] * (dim + 4)


def test_eight_bits_change_the_logits_little(pair: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = pair
    ids = tokenizer("Once upon a time there was a little fox who lived in a", return_tensors="pt").input_ids
    kwargs: dict[str, Any] = {
        "max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    plain = model.generate(ids, **kwargs)
    quantized = model.generate(ids, cache_implementation="quantized", **kwargs)
    a, b = plain.logits[0].log_softmax(-1), quantized.logits[0].log_softmax(-1)
    divergence = float((a.exp() * (a - b)).sum())
    assert 0 <= divergence < 2e-3
    more = torch.cat([quantized.sequences, torch.tensor([[5, 6]])], dim=1)
    follow = model.generate(more, past_key_values=quantized.past_key_values, cache_implementation="quantized",
                            max_new_tokens=8, do_sample=False)  # fmt: skip
    assert follow.tolist() == model.generate(more, cache_implementation="quantized", max_new_tokens=8,
                                             do_sample=False).tolist()  # fmt: skip
    other = model.generate(more, past_key_values=quantized.past_key_values, max_new_tokens=8, do_sample=False)
    assert other.tolist() == model.generate(more, max_new_tokens=8, do_sample=False).tolist(), "computed anew"


@pytest.mark.parametrize("family", ["mistral", "gpt2", "phi3-longrope"])
def test_eight_bits_with_windows_and_without_rotation(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    prompts = [[5, 9, 11, 3, 8, 2, 7, 44, 51, 60, 23], [17, 4], [23, 31, 31, 9, 60]]
    kwargs: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    batch = model.generate(prompts, cache_implementation="quantized", **kwargs)
    for row, prompt in zip(batch.tolist(), prompts, strict=True):
        alone = model.generate([prompt], cache_implementation="quantized", **kwargs)[0].tolist()
        assert row[11 - len(prompt) :] == alone


def test_what_the_store_does_not_have_is_refused(pair: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = pair
    ids = tokenizer("Once", return_tensors="pt").input_ids
    for config in ({"nbits": 4}, {"nbits": 8, "axis_key": 0}):
        with pytest.raises(unspool.errors.Unsupported, match="8 bits and one scale"):
            model.generate(ids, cache_implementation="quantized", cache_config=config)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation="nowhere")


def test_bytes_and_back() -> None:
    x = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 300.0])[:, None]
    x[0, 0] = 0
    back = decode(encode(x), torch.float32)
    assert back.shape == x.shape
    assert bool(((back - x).abs() <= x.abs().amax(-1, keepdim=True) / 253).all())
    assert not back[0, 0].any()
