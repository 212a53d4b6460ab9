"""Guidance against negative prompts: rows beside the rows natively, transformers' text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_checkpoint

import unspool

PROMPTS = torch.tensor([[5, 9, 11, 3, 8], [0, 0, 17, 4, 9], [0, 23, 31, 31, 60]])
MASK = (PROMPTS != 0).long()
NEGATIVE = torch.tensor([[44, 51, 7], [0, 8, 13], [21, 2, 60]])
NEGATIVE_MASK = (NEGATIVE != 0).long()
Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_checkpoint(request.param, folder)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), theirs


def both(pair: Pair, **kwargs: Any) -> tuple[Any, Any]:
    results = []
    for model in pair:
        torch.manual_seed(3)
        results.append(model.generate(**{"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None} | kwargs))
    return results[0], results[1]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.7, 0.4])
def test_transformers_gives_the_same_text(pair: Pair, do_sample: bool, scale: float) -> None:
    kwargs: dict[str, Any] = {"do_sample": do_sample, "guidance_scale": scale, "repetition_penalty": 1.1}
    prompts: dict[str, Any] = {"input_ids": PROMPTS, "attention_mask": MASK}
    ours, theirs = both(pair, **kwargs, **prompts)
    assert ours.tolist() == theirs.tolist()
    # transformers counts the pads of a negative prompt as positions, so one length for all; rows may differ in theirs
    negative = {"negative_prompt_ids": NEGATIVE[[0, 2, 2]]}
    ours, theirs = both(pair, **kwargs, **prompts, **negative, return_dict_in_generate=True, output_scores=True)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_a_row_is_guided_alone_as_in_company_also_where_rows_end(pair: Pair) -> None:
    model = pair[0]
    kwargs: dict[str, Any] = {"max_new_tokens": 14, "do_sample": True, "seed": 8, "guidance_scale": 1.5}
    kwargs["pad_token_id"] = 0
    negative = {"negative_prompt_ids": NEGATIVE, "negative_prompt_attention_mask": NEGATIVE_MASK}
    batch = {"inputs": PROMPTS, "attention_mask": MASK}
    free = model.generate(eos_token_id=None, **batch, **negative, **kwargs)
    ends = [free[0, 9].item(), free[1, 12].item()]
    out = model.generate(eos_token_id=ends, num_return_sequences=2, **batch, **negative, **kwargs)
    for i in range(3):
        own = {"negative_prompt_ids": NEGATIVE[i][NEGATIVE_MASK[i].bool()][None]}
        alone = model.generate(
            PROMPTS[i][MASK[i].bool()][None], num_return_sequences=2, eos_token_id=ends, **own, **kwargs
        )
        news = alone[:, int(MASK[i].sum()) :]
        for row, new in zip(out[2 * i : 2 * i + 2, 5:].tolist(), news.tolist(), strict=True):
            assert row[: len(new)] == new
            assert not any(row[len(new) :])


def test_against_a_naive_loop_with_beams_and_one_negative_prompt_for_all(pair: Pair) -> None:
    """Two beams over log probabilities that full forward passes give."""
    model, theirs = pair
    kwargs: dict[str, Any] = {"num_beams": 2, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    out = model.generate(PROMPTS[:1], negative_prompt_ids=NEGATIVE[:1], guidance_scale=1.6, **kwargs)

    def guided(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            own = theirs(torch.tensor([PROMPTS[0].tolist() + tokens])).logits[0, -1].log_softmax(-1)
            other = theirs(torch.tensor([NEGATIVE[0].tolist() + tokens])).logits[0, -1].log_softmax(-1)
        return 1.6 * (own - other) + other

    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(6):
        grown = [
            (score + float(value), [*tokens, token])
            for score, tokens in beams
            for token, value in enumerate(guided(tokens))
        ]
        beams = sorted(grown, reverse=True)[:2]
    assert out[0, 5:].tolist() == beams[0][1]


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "seed": 4, "num_return_sequences": 2}])
def test_drafts_give_the_guided_text_without_them(pair: Pair, sampling: dict[str, Any]) -> None:
    model = pair[0]
    kwargs: dict[str, Any] = {
        "attention_mask": MASK, "negative_prompt_ids": NEGATIVE, "negative_prompt_attention_mask": NEGATIVE_MASK,
        "guidance_scale": 1.6, "repetition_penalty": 1.2, "min_new_tokens": 3, "max_new_tokens": 14, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, **sampling,
    }  # fmt: skip
    free = model.generate(PROMPTS, eos_token_id=None, **kwargs).sequences
    ends = [free[0, 12].item(), free[-1, 15].item()]
    plain = model.generate(PROMPTS, eos_token_id=ends, **kwargs)
    for way in (
        {"assistant_model": model, "assistant_confidence_threshold": 0.0, "num_assistant_tokens": 4},
        {"assistant_early_exit": 2, "num_assistant_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    ):
        out = model.generate(PROMPTS, eos_token_id=ends, **kwargs, **way)
        assert out.sequences.tolist() == plain.sequences.tolist(), way
        if "assistant_model" in way:
            assert sum(draft.accepted for row in out.drafts for draft in row) > 5, "the drafts are worth checking"
        for row, reason in enumerate(out.finish_reasons):
            assert reason == plain.finish_reasons[row]
        for name in ("scores", "logits"):
            torch.testing.assert_close(out[name][0], plain[name][0], atol=1e-4, rtol=1e-4)


def test_drawn_drafts_are_checked_against_the_guided_distribution(pair: Pair) -> None:
    """Chi-square of two tokens, the second drafted without guidance, against their exact guided distribution.

    Nine cells, so eight degrees of freedom: 31.8 is passed once in ten thousand. The distribution that accepting every
    draft would give is tested to be found.
    """
    model, theirs = pair
    draws = 2000
    kwargs: dict[str, Any] = {"do_sample": True, "top_k": 3, "guidance_scale": 2.0, "negative_prompt_ids": NEGATIVE[:1]}
    kwargs |= {"max_new_tokens": 3, "eos_token_id": None, "num_return_sequences": draws, "pad_token_id": 0}
    torch.manual_seed(1)
    out = model.generate(PROMPTS[:1], assistant_early_exit=2, num_assistant_tokens=1, **kwargs)
    found = [tuple(tokens) for tokens in out[:, 5:7].tolist()]

    def shares(tokens: list[int], scale: float) -> torch.Tensor:
        with torch.no_grad():
            own = theirs(torch.tensor([PROMPTS[0].tolist() + tokens])).logits[0, -1].log_softmax(-1)
            other = theirs(torch.tensor([NEGATIVE[0].tolist() + tokens])).logits[0, -1].log_softmax(-1)
        scores = scale * (own - other) + other
        return scores.masked_fill(scores < scores.topk(3).values[-1], -torch.inf).softmax(-1)

    def statistic(second_scale: float) -> float:
        first = shares([], 2.0)
        cells = {
            (a, b): draws * float(first[a] * second[b])
            for a in first.nonzero().flatten().tolist()
            for second in [shares([a], second_scale)]
            for b in second.nonzero().flatten().tolist()
        }
        missed = sum(one not in cells for one in found)
        return missed + sum((found.count(cell) - hoped) ** 2 / max(hoped, 1.0) for cell, hoped in cells.items())

    assert statistic(2.0) < 31.8
    assert statistic(1.0) > 100


def test_mistakes_are_refused(pair: Pair) -> None:
    model = pair[0]
    kwargs: dict[str, Any] = {"guidance_scale": 2.0, "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match="negative_prompt_ids has 2 rows for 3 prompts"):
        model.generate(PROMPTS, negative_prompt_ids=NEGATIVE[:2], **kwargs)
    with pytest.raises(ValueError, match="negative_prompt_attention_mask is"):
        model.generate(
            PROMPTS, negative_prompt_ids=NEGATIVE, negative_prompt_attention_mask=NEGATIVE_MASK[:, :2], **kwargs
        )
    with pytest.raises(ValueError, match="keeps"):
        model.generate(
            PROMPTS, negative_prompt_ids=NEGATIVE, negative_prompt_attention_mask=0 * NEGATIVE_MASK, **kwargs
        )
    with pytest.raises(unspool.errors.Unsupported, match="guidance_scale and drafts"):
        unspool.wrap(pair[1]).generate(PROMPTS, prompt_lookup_num_tokens=3, cache_implementation="dynamic", **kwargs)
    with pytest.raises(ValueError, match="at least one column"):
        model.generate(PROMPTS, negative_prompt_ids="no", **kwargs)
    assert model.generate(PROMPTS, **kwargs).shape == (3, 8)
