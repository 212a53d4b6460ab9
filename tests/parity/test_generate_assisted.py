"""Assisted decoding: the text of plain decoding, and of transformers' own assisted decoding, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_checkpoint, make_model

import unspool

PROMPTS = [[5, 9, 11, 3, 8, 9, 11, 44, 51, 9, 11], [17, 4], [23, 31, 31, 9, 60]]
NAMES = ["llama", "mistral", "gpt2", "qwen3", "phi3-longrope", "llama-rope-dynamic"]
Four = tuple[Any, Any, Any, Any]


def near(name: str, folder: Path) -> Any:
    """A checkpoint whose choices mostly agree with the family's own: its weights, a little disturbed."""
    model = make_model(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.002)
    model.save_pretrained(folder)
    return model


def quartet(name: str, factory: pytest.TempPathFactory) -> Four:
    """Ours, our draft model, theirs, their draft model."""
    whole, small = factory.mktemp(name), factory.mktemp(f"{name}-draft")
    theirs, their_draft = make_checkpoint(name, whole), near(name, small)
    load = unspool.AutoModelForCausalLM.from_pretrained
    return load(whole, dtype="float32"), load(small, dtype="float32"), theirs, their_draft


@pytest.fixture(scope="module", params=NAMES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Four:
    return quartet(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Four:
    return quartet("llama", tmp_path_factory)


def ways(draft: Any) -> list[dict[str, Any]]:
    return [
        {"assistant_model": draft, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic"},
        {"assistant_model": draft, "num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        {"assistant_early_exit": 2, "num_assistant_tokens": 3},
    ]


def test_greedy_is_plain_greedy_for_any_batch(models: Four) -> None:
    model, draft, _, _ = models
    kwargs: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(PROMPTS, eos_token_id=None, **kwargs)
    ends = [plain[0, 20].item(), plain[1, 17].item()]
    settings: list[dict[str, Any]] = [
        {"eos_token_id": None},
        {"eos_token_id": ends},
        {"eos_token_id": None, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"eos_token_id": ends, "bad_words_ids": [[7], [5, 9]], "min_length": 20, "prefill_chunk_size": 4},
    ]
    for setting in settings:
        plain = model.generate(PROMPTS, **kwargs, **setting)
        for way in ways(draft):
            out = model.generate(PROMPTS, return_dict_in_generate=True, **kwargs, **setting, **way)
            assert out.sequences.tolist() == plain.tolist(), (setting, way)
            assert 0 <= out.acceptance_rate <= 1
    with_draft = model.generate(PROMPTS[:1], return_dict_in_generate=True, eos_token_id=None, assistant_model=draft,
                                assistant_confidence_threshold=0.0, **kwargs)  # fmt: skip
    assert sum(draft.accepted for draft in with_draft.drafts[0]) > 5, "the drafts are worth checking"
    assert len(with_draft.drafts[0]) < 20, "several tokens a step"


def test_drafts_of_many_rows_are_shorter_unless_the_call_says_how_long(llama: Four) -> None:
    model, draft, _, _ = llama
    draft.generation_config.assistant_confidence_threshold = 0.0
    prompts = [[5, 9, 11 + row] for row in range(16)]
    kwargs: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    kwargs |= {"assistant_model": draft, "return_dict_in_generate": True}
    default = model.generate(prompts, **kwargs)
    asked = model.generate(prompts, num_assistant_tokens=7, **kwargs)
    assert default.sequences.tolist() == asked.sequences.tolist()
    assert len(default.drafts[0][0].tokens) == 1
    assert len(asked.drafts[0][0].tokens) == 7


def test_drafts_of_several_rows_are_likely_as_a_whole(llama: Four) -> None:
    model, draft, _, _ = llama
    threshold = 2e-3
    draft.generation_config.assistant_confidence_threshold = threshold
    prompts = [[5, 9, 11 + row] for row in range(3)]
    kwargs: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    kwargs |= {"assistant_model": draft, "num_assistant_tokens": 7, "return_dict_in_generate": True}
    together = model.generate(prompts, **kwargs)
    lengths = set()
    for text, drafts in zip(together.sequences.tolist(), together.drafts, strict=True):
        for known, tokens, _ in drafts:
            logits = draft(torch.tensor([text[:known] + tokens])).logits[0, known - 1 : -1].float()
            likely = logits.softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None]).prod()
            assert float(likely) >= threshold * (1 - 1e-4)
            lengths.add(len(tokens))
    assert len(lengths) > 1
    # of one row, each token alone; all have more than that here
    alone = model.generate(prompts[:1], **kwargs)
    assert alone.sequences.tolist() == together.sequences[:1].tolist()
    assert len(alone.drafts[0][0].tokens) == 7


def test_transformers_gives_the_same_text(models: Four) -> None:
    model, draft, theirs, their_draft = models
    if model.spec.needs_extents:
        pytest.skip("there, transformers' angles depend on what else is in the step")
    ids = torch.tensor(PROMPTS[:1])
    # transformers' draft model would take generated pads for padding
    kwargs: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [0]}
    samplings: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95},
        {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2},
    ]
    for sampling in samplings:
        for ours, other in (
            ({"assistant_model": draft}, {"assistant_model": their_draft}),
            ({"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 4}),
        ):
            results = []
            for each, extra in ((model, ours), (theirs, other)):
                torch.manual_seed(5)
                results.append(each.generate(ids, **kwargs, **sampling, **extra).tolist())
            assert results[0] == results[1], (sampling, ours)


def test_with_a_seed_the_text_is_that_of_plain_sampling(models: Four) -> None:
    model, draft, _, _ = models
    kwargs: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "seed": 11, "eos_token_id": None}
    plain = model.generate(PROMPTS, num_return_sequences=2, **kwargs)
    for way in ways(draft):
        assert model.generate(PROMPTS, num_return_sequences=2, **kwargs, **way).tolist() == plain.tolist(), way


def test_scores_logits_stop_strings_and_streaming_are_those_of_plain_decoding(llama: Four) -> None:
    model, draft, _, _ = llama
    kwargs: dict[str, Any] = {
        "max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.2,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    plain = model.generate(PROMPTS, **kwargs)
    out = model.generate(PROMPTS, assistant_model=draft, **kwargs)
    for name in ("scores", "logits"):
        assert len(out[name]) == len(plain[name]) == 16
        for mine, other in zip(out[name], plain[name], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert out.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    more = [row.tolist()[-10:] + [3, 4] for row in out.sequences]
    follow = model.generate(more, max_new_tokens=5, do_sample=False, past_key_values=out.past_key_values)
    assert follow.tolist() == model.generate(more, max_new_tokens=5, do_sample=False).tolist()

    class Take:
        def __init__(self) -> None:
            self.columns: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.columns.append(value.reshape(-1).tolist())

        def end(self) -> None:
            self.columns.append([-1])

    take = Take()
    out = model.generate(PROMPTS, max_new_tokens=9, do_sample=False, assistant_model=draft, streamer=take,
                         eos_token_id=None)  # fmt: skip
    assert [list(column) for column in zip(*take.columns[1:-1], strict=True)] == out[:, 11:].tolist()

    def third(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        assert ids.shape[0] == 1, "rows are asked one by one"
        return torch.tensor([ids[0, -1].item() % 3 == 0])

    out = model.generate(PROMPTS[:1], max_new_tokens=30, do_sample=False, assistant_model=draft, eos_token_id=None,
                         stopping_criteria=[third])  # fmt: skip
    plain_ids = model.generate(PROMPTS[:1], max_new_tokens=30, do_sample=False, eos_token_id=None,
                               stopping_criteria=[third])  # fmt: skip
    assert out.tolist() == plain_ids.tolist()


def test_attentions_and_hidden_states_are_those_of_plain_decoding(models: Four) -> None:
    model, draft, _, _ = models
    kwargs: dict[str, Any] = {
        "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True,
        "output_attentions": True, "output_hidden_states": True,
    }  # fmt: skip
    settings: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "prefill_chunk_size": 4},
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    ]
    for setting in settings:
        plain = model.generate(PROMPTS, **kwargs, **setting)
        for way in ways(draft):
            out = model.generate(PROMPTS, **kwargs, **setting, **way)
            assert out.sequences.tolist() == plain.sequences.tolist()
            assert_traces_alike(out, plain)
    whole, parts = (model.generate(PROMPTS, **kwargs, **setting) for setting in settings[:2])
    assert_traces_alike(parts, whole)
    assert all(step[0].shape[2] == 1 for step in whole.attentions[1:]), "also where a row is computed anew"
    ends = whole.sequences[0, 20].item()
    out = model.generate(PROMPTS, assistant_model=draft, do_sample=False, **kwargs | {"eos_token_id": ends})
    width = out.sequences.shape[1] - 11
    assert len(out.hidden_states) == len(out.attentions) == width
    for row, tokens in enumerate(out.sequences[:, 11:].tolist()):
        length = tokens.index(ends) + 1 if ends in tokens else width
        assert all(out.hidden_states[step][-1][row].any() for step in range(length))
        assert not any(out.hidden_states[step][-1][row].any() for step in range(length, width))


def assert_traces_alike(out: Any, plain: Any) -> None:
    """Two outputs' attentions and hidden states are the same."""
    for name in ("attentions", "hidden_states"):
        assert len(out[name]) == len(plain[name])
        for mine, other in zip(out[name], plain[name], strict=True):
            for a, b in zip(mine, other, strict=True):
                assert a.shape == b.shape
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_transformers_traces_of_drafts(llama: Four) -> None:
    """Shapes are transformers' throughout, and contents are where its first step has no draft."""
    model, draft, theirs, their_draft = llama
    theirs.set_attn_implementation("eager")
    kwargs: dict[str, Any] = {
        "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True,
        "output_attentions": True, "output_hidden_states": True, "do_sample": False, "suppress_tokens": [0],
    }  # fmt: skip
    repeats = {"prompt_lookup_num_tokens": 3, "repetition_penalty": 0.2}
    ours, other = (each.generate(torch.tensor([[17, 4]]), **kwargs, **repeats) for each in (model, theirs))
    assert ours.sequences.tolist() == other.sequences.tolist()
    assert ours.drafts[0][0].position > 2 and sum(one.accepted for one in ours.drafts[0]) > 2
    assert_traces_alike(ours, other)
    ids = torch.tensor(PROMPTS[:1])
    ours = model.generate(ids, assistant_model=draft, **kwargs)
    other = theirs.generate(ids, assistant_model=their_draft, **kwargs)
    for name in ("attentions", "hidden_states"):
        shapes = [[[layer.shape for layer in step] for step in out[name]] for out in (ours, other)]
        assert shapes[0] == shapes[1]


def test_sampled_drafts_keep_the_distribution(llama: Four, tmp_path: Path) -> None:
    """Chi-square of the second new token against its exact distribution.

    4,000 draws in cells of expectation >= 30; at 1e-4 false alarms, taking the draft model's distribution instead, as
    accepting every draft would, is found with a power above 0.999 (it is also tested).
    """
    model = llama[0]
    make_checkpoint("llama", tmp_path, seed=3)
    draft = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    prompt, number = PROMPTS[2], 4000
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 2.0, "eos_token_id": None}
    exact = {}
    for name, each in (("model", model), ("draft", draft)):
        step = each(torch.tensor([prompt])).logits[0, -1] / 2.0
        first = step.softmax(-1)
        likely = first.topk(97).indices
        rows = torch.cat([torch.tensor([prompt]).expand(97, -1), likely[:, None]], dim=1)
        second = (each(rows).logits[:, -1] / 2.0).softmax(-1)
        exact[name] = (first[likely, None] * second).sum(0) / first[likely].sum()
    out = model.generate(
        [prompt] * number, max_new_tokens=3, assistant_model=draft, assistant_confidence_threshold=0.0, **kwargs
    )
    counts = torch.bincount(out[:, len(prompt) + 1], minlength=97).double()

    def distance(p: torch.Tensor) -> float:
        expected = p.double() * number
        cells = expected >= 30
        seen = torch.cat([counts[cells], counts[~cells].sum()[None]])
        hoped = torch.cat([expected[cells], expected[~cells].sum()[None]])
        freedom = len(seen) - 1
        value = ((seen - hoped) ** 2 / hoped).sum()
        return float((value - freedom) / (2 * freedom) ** 0.5)  # nearly normal

    assert distance(exact["model"]) < 3.8
    assert distance(exact["draft"]) > 20


def test_wrong_drafting_is_refused(llama: Four, tmp_path: Path) -> None:
    model = llama[0]
    make_checkpoint("llama", tmp_path, vocab_size=50)
    other = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    with pytest.raises(ValueError, match="vocabulary of 50"):
        model.generate(PROMPTS, assistant_model=other)
    with pytest.raises(TypeError, match="assistant_model must be a model, not str"):
        model.generate(PROMPTS, assistant_model="draft")
    with pytest.raises(ValueError, match="assistant_early_exit=3"):
        model.generate(PROMPTS, assistant_early_exit=3, do_sample=False)
    assert model.generate(PROMPTS[:1], max_new_tokens=2, do_sample=False).shape == (1, 13)
