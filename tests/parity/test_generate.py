"""`generate()` against transformers' own, on checkpoints it wrote itself: fp32, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, make_checkpoint

import unspool

PROMPTS = [[5, 9, 11, 3, 8, 2, 7, 44, 51, 60, 23], [17, 4], [23, 31, 31, 9, 60]]
PAD = 0


def padded(prompts: list[list[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    left = side == "left"
    ids = [[PAD] * (width - len(p)) * left + p + [PAD] * (width - len(p)) * (not left) for p in prompts]
    mask = [[0] * (width - len(p)) * left + [1] * len(p) + [0] * (width - len(p)) * (not left) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_checkpoint(request.param, folder)
    ours = unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return ours, theirs


def prompts_for(model: Any) -> list[list[int]]:
    """One prompt where transformers' angles depend on the batch's longest row (ours on each row's own)."""
    return PROMPTS[:1] if model.spec.needs_extents else PROMPTS


def both(pair: tuple[Any, Any], ids: torch.Tensor, seed: int | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """The same call on both sides, with the same state of the global generator."""
    results = []
    for model in pair:
        if seed is not None:
            torch.manual_seed(seed)
        results.append(model.generate(ids, **({"eos_token_id": None, "pad_token_id": PAD} | kwargs)))
    return results[0], results[1]


def test_greedy_alone_and_padded(pair: tuple[Any, Any]) -> None:
    for prompt in PROMPTS:
        ours, theirs = both(pair, torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert ours.tolist() == theirs.tolist()
        assert len(set(ours[0].tolist())) > 4, "a text that never changes proves little"
    ids, mask = padded(prompts_for(pair[0]))
    ours, theirs = both(pair, ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert ours.tolist() == theirs.tolist()


def test_a_row_is_the_same_alone_and_in_company_on_either_side_of_padding(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    kwargs: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    alone = [model.generate(torch.tensor([p]), **kwargs)[0, len(p) :].tolist() for p in PROMPTS]
    for side in ("left", "right"):
        ids, mask = padded(PROMPTS, side)
        assert model.generate(ids, attention_mask=mask, **kwargs)[:, ids.shape[1] :].tolist() == alone
    assert model.generate(PROMPTS, **kwargs)[:, ids.shape[1] :].tolist() == alone
    assert model.generate(PROMPTS, prefill_chunk_size=3, **kwargs)[:, ids.shape[1] :].tolist() == alone


def test_sampling_under_one_seed(pair: tuple[Any, Any]) -> None:
    ids, mask = padded(prompts_for(pair[0]))
    settings: dict[str, Any]
    for settings in (
        {},
        {"temperature": 0.7, "top_k": 20},
        {"top_k": 0, "top_p": 0.9},
        {"num_return_sequences": 3, "top_p": 0.95, "top_k": 40},
    ):
        kwargs = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": True} | settings
        ours, theirs = both(pair, ids, seed=11, **kwargs)
        assert ours.tolist() == theirs.tolist()


def test_rows_that_end_leave_the_others_alone(pair: tuple[Any, Any]) -> None:
    ids, mask = padded(prompts_for(pair[0]))
    free, _ = both(pair, ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    eos = free[-1, ids.shape[1] + 5].item()  # ends the last row early
    for do_sample in (False, True):
        kwargs = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": do_sample, "eos_token_id": [eos, 61]}
        ours, theirs = both(pair, ids, seed=3, **kwargs)
        assert ours.tolist() == theirs.tolist()


def test_everything_recorded(pair: tuple[Any, Any]) -> None:
    ids, mask = padded(prompts_for(pair[0]))
    pair[1].set_attn_implementation("eager")
    ours, theirs = both(
        pair, ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_scores=True, output_logits=True, output_attentions=True, output_hidden_states=True,
        repetition_penalty=1.3,
    )  # fmt: skip
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name]) == 6
        for mine, other in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    real = mask.bool()
    for step, (mine, other) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a[real] if step == 0 else a, b[real] if step == 0 else b, atol=5e-5, rtol=5e-5)
    for step, (mine, other) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        for a, b in zip(mine, other, strict=True):
            assert a.shape == b.shape
            if step == 0:
                a, b = a.transpose(1, 2)[real], b.transpose(1, 2)[real]
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    for normalize in (False, True):
        torch.testing.assert_close(
            pair[0].compute_transition_scores(ours.sequences, ours.scores, normalize_logits=normalize),
            pair[1].compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=normalize),
            atol=2e-5,
            rtol=2e-5,
        )


def test_a_follow_up_turn_computes_only_what_is_new(pair: tuple[Any, Any]) -> None:
    ids, mask = padded(prompts_for(pair[0]))
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    model = pair[0]
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **kwargs)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, torch.tensor([[7, 8], [9, 10], [11, 12]])[: len(ids)]], 1)
    mask = torch.cat([mask, torch.ones(len(ids), 10, dtype=torch.long)], 1)
    fed: list[int] = []
    original = type(model).step

    def counting(self: Any, batch: Any) -> torch.Tensor:
        fed.append(batch.tokens.numel())
        return original(self, batch)

    type(model).step = counting
    try:
        again = model.generate(longer, attention_mask=mask, past_key_values=first.past_key_values, **kwargs)
    finally:
        type(model).step = original
    assert fed[0] == 3 * len(ids), "two new tokens and the one that was chosen last, for each row"
    assert again.tolist() == model.generate(longer, attention_mask=mask, **kwargs).tolist()
    edited = longer.clone()
    edited[0, 3] = 33
    assert (
        model.generate(edited, attention_mask=mask, past_key_values=first.past_key_values, **kwargs).tolist()
        == model.generate(edited, attention_mask=mask, **kwargs).tolist()
    )


def test_past_the_sliding_window_and_the_first_room(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.generate.paged._FIRST_ROOM", 3)
    ids, mask = padded(prompts_for(pair[0]))
    ours, theirs = both(pair, ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    assert ours.tolist() == theirs.tolist()


def test_the_naive_loop_agrees(pair: tuple[Any, Any]) -> None:
    """A full forward of all tokens for every new one, by the plain call."""
    model = pair[0]
    tokens = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(16):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    out = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert out[0].tolist() == tokens


def test_the_model_is_left_as_it_was(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model = pair[0]
    before = set(vars(model)), {name: p.data_ptr() for name, p in model.named_parameters()}
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3)
    assert (set(vars(model)), {name: p.data_ptr() for name, p in model.named_parameters()}) == before
    assert model.spec.vocab_size == VOCAB
