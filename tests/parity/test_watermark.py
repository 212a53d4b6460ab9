"""Watermarks against transformers: the same scores, texts and verdicts, and marks that the detectors find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as theirs
from families import VOCAB, make_checkpoint
from hypothesis import given, settings, strategies as st
from torch import Tensor

import unspool as ours
from unspool.errors import CheckpointError

GREEN = st.fixed_dictionaries(
    {},
    optional={
        "greenlist_ratio": st.sampled_from([0.1, 0.25, 0.7]),
        "bias": st.sampled_from([-1.0, 2.0, 6.5]),
        "hashing_key": st.sampled_from([7, 15485863, 2**40 + 1]),
        "seeding_scheme": st.sampled_from(["lefthash", "selfhash"]),
        "context_width": st.integers(1, 4),
    },
)
SYNTHID = st.fixed_dictionaries(
    {
        "ngram_len": st.integers(2, 5),
        "keys": st.lists(st.integers(-(2**31), 2**40), min_size=1, max_size=6),
        "sampling_table_size": st.sampled_from([1, 37, 1024, 2**16]),
        "sampling_table_seed": st.integers(0, 9),
        "context_history_size": st.sampled_from([1, 3, 1024]),
    },
    optional={"skip_first_ngram_calls": st.booleans(), "debug_mode": st.booleans()},
)
KEYS = [654, 400, 836, 123, 340, 443, 597, 160, 57]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@st.composite
def walks(draw: st.DrawFn) -> tuple[int, Tensor, Tensor]:
    """A prompt's width, the tokens of a walk from there and the scores of each step, with ties and -inf."""
    rows, vocab, steps = draw(st.integers(1, 3)), draw(st.integers(5, 70)), draw(st.integers(1, 12))
    begin = draw(st.integers(1, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.randint(0, draw(st.integers(2, vocab)), (rows, begin + steps), generator=random)
    scores = torch.randn(steps, rows, vocab, generator=random) * 3
    if draw(st.booleans()):
        scores = scores.round()
    return begin, ids, scores.masked_fill(torch.rand(scores.shape, generator=random) < 0.2, -torch.inf)


@settings(max_examples=50, deadline=None)
@given(arguments=GREEN, walk=walks())
def test_green_list_scores(arguments: dict[str, Any], walk: tuple[int, Tensor, Tensor]) -> None:
    begin, ids, scores = walk
    vocab = scores.shape[2]
    if arguments.get("seeding_scheme") == "selfhash" and vocab < 40:
        scores, vocab = torch.nn.functional.pad(scores, (0, 40), value=-3.0), vocab + 40  # transformers tries 40
    mine = ours.WatermarkLogitsProcessor(vocab, "cpu", **arguments)
    other = theirs.WatermarkLogitsProcessor(vocab, "cpu", **arguments)
    for step, score in enumerate(scores):
        before = score.clone()
        same(mine(ids[:, : begin + step], score), other(ids[:, : begin + step], score))
        same(score, before)


@settings(max_examples=50, deadline=None)
@given(arguments=SYNTHID, walk=walks())
def test_synthid_scores(arguments: dict[str, Any], walk: tuple[int, Tensor, Tensor]) -> None:
    begin, ids, scores = walk
    mine = ours.SynthIDTextWatermarkLogitsProcessor(device="cpu", **arguments)
    known = ours.SynthIDTextWatermarkLogitsProcessor(device="cpu", prompt_length=begin, **arguments)
    other = theirs.SynthIDTextWatermarkLogitsProcessor(device="cpu", **arguments)
    wanted = [other(ids[:, : begin + step], score) for step, score in enumerate(scores)]
    for step, score in enumerate(scores):
        same(mine(ids[:, : begin + step], score), wanted[step])
    for step in torch.randperm(len(scores)).tolist():  # in any order, for any rows
        same(known(ids[-1:, : begin + step], scores[step][-1:]), wanted[step][-1:])
    for step, score in enumerate(scores):  # a new text begins
        same(mine(ids[:, : begin + step], score), wanted[step])


@settings(max_examples=40, deadline=None)
@given(arguments=SYNTHID, seed=st.integers(0, 9999), rows=st.integers(1, 3), spread=st.integers(2, 50))
def test_what_synthid_detectors_read(arguments: dict[str, Any], seed: int, rows: int, spread: int) -> None:
    ids = torch.randint(0, spread, (rows, 25), generator=torch.Generator().manual_seed(seed))
    mine = ours.SynthIDTextWatermarkLogitsProcessor(device="cpu", **arguments)
    other = theirs.SynthIDTextWatermarkLogitsProcessor(device="cpu", **arguments)
    same(mine.compute_g_values(ids), other.compute_g_values(ids))
    same(mine.compute_context_repetition_mask(ids), other.compute_context_repetition_mask(ids))
    same(mine.compute_eos_token_mask(ids, 1), other.compute_eos_token_mask(ids, 1))
    assert mine.expected_mean_g_value(97, 0.4) == other.expected_mean_g_value(97, 0.4)
    scores = torch.randn(rows, 7)
    bits = torch.randint(0, 2, (rows, 7, 3))
    same(mine.update_scores(scores, bits), other.update_scores(scores, bits))


@settings(max_examples=50, deadline=None)
@given(
    arguments=GREEN,
    seed=st.integers(0, 9999),
    rows=st.integers(1, 3),
    bos=st.booleans(),
    once=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.5, 3.0]),
)
def test_verdicts_on_the_green_list(
    arguments: dict[str, Any], seed: int, rows: int, bos: bool, once: bool, threshold: float
) -> None:
    ids = torch.randint(2, 12, (rows, 30), generator=torch.Generator().manual_seed(seed))
    if bos:
        ids[:, 0] = 1
    config = theirs.LlamaConfig(vocab_size=VOCAB, bos_token_id=1)
    wanted = theirs.WatermarkDetector(config, "cpu", theirs.WatermarkingConfig(**arguments), once)
    expected = wanted(ids, z_threshold=threshold, return_dict=True)
    for model, mark in (
        (config, ours.WatermarkingConfig(**arguments)),
        ({"vocab_size": VOCAB, "bos_token_id": 1}, arguments),
    ):
        detector = ours.WatermarkDetector(model, "cpu", mark, ignore_repeated_ngrams=once, max_cache_size=3)
        found = detector(ids, z_threshold=threshold, return_dict=True)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value, strict=True)
        np.testing.assert_array_equal(detector(ids, z_threshold=threshold), expected.prediction, strict=True)


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(3)
    config = theirs.BayesianDetectorConfig(watermarking_depth=len(KEYS), base_rate=0.3)
    config.set_detector_information("some/model", {"ngram_len": 5, "keys": KEYS})
    other = theirs.BayesianDetectorModel(config)
    with torch.no_grad():
        other.likelihood_model_watermarked.delta.normal_()
    other.save_pretrained(folder)
    return ours.BayesianDetectorModel.from_pretrained(folder), other, folder


def test_bayesian_detector(detectors: tuple[Any, Any, Path]) -> None:
    mine, other, _ = detectors
    assert mine.config.model_name == "some/model"
    assert mine.config.watermarking_config == {"ngram_len": 5, "keys": KEYS}
    assert mine.base_rate == other.base_rate == 0.3
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (6, 20, len(KEYS)), generator=random)
    mask, labels = torch.rand(6, 20, generator=random) < 0.8, torch.tensor([1.0, 0, 1, 0, 1, 0])
    found, wanted = mine(bits, mask, labels, 0.5, return_dict=True), other(bits, mask, labels, 0.5, return_dict=True)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found["posterior_probabilities"], wanted["posterior_probabilities"])
    assert found[1] is found.posterior_probabilities
    torch.testing.assert_close(mine(bits, mask), other(bits, mask))
    torch.testing.assert_close(mine(bits, mask, labels), other(bits, mask, labels))
    for model, loss in ((mine, found.loss), (other, wanted.loss)):
        model.zero_grad()
        loss.backward()
    for (name, value), (_, expected) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad, msg=name)


def test_synthid_detector(detectors: tuple[Any, Any, Path]) -> None:
    mine, other, _ = detectors
    tokenizer = type("Ends", (), {"eos_token_id": 2})()
    settings_ = ours.SynthIDTextWatermarkingConfig(5, KEYS).to_dict()
    ids = torch.randint(0, 40, (4, 30), generator=torch.Generator().manual_seed(1))
    results = []
    for module, detector in ((ours, mine), (theirs, other)):
        processor = module.SynthIDTextWatermarkLogitsProcessor(device="cpu", **settings_)
        results.append(module.SynthIDTextWatermarkDetector(detector, processor, tokenizer)(ids)[0])
    torch.testing.assert_close(*results)


def test_saved_detectors_are_read_by_both(detectors: tuple[Any, Any, Path], tmp_path: Path) -> None:
    mine = detectors[0]
    mine.save_pretrained(tmp_path / "saved")
    back = ours.BayesianDetectorModel.from_pretrained(tmp_path / "saved")
    other = theirs.BayesianDetectorModel.from_pretrained(tmp_path / "saved")
    assert back.config == mine.config
    assert (other.config.model_name, other.config.watermarking_depth) == ("some/model", len(KEYS))
    for name, value in mine.state_dict().items():
        same(back.state_dict()[name], value)
        same(other.state_dict()[name], value)
    (tmp_path / "saved" / "config.json").write_text('{"watermarking_depth": 3}')
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        ours.BayesianDetectorModel.from_pretrained(tmp_path / "saved")
    with pytest.raises(FileNotFoundError):
        ours.BayesianDetectorModel.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("llama")
    other = make_checkpoint("llama", folder, seed=5)
    return ours.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), other


PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [0, 0, 0, 0, 13]])
MARKS: dict[str, tuple[Any, Any]] = {
    "lefthash": (ours.WatermarkingConfig(bias=4.0), theirs.WatermarkingConfig(bias=4.0)),
    "selfhash": (
        ours.WatermarkingConfig(seeding_scheme="selfhash", context_width=2),
        theirs.WatermarkingConfig(seeding_scheme="selfhash", context_width=2),
    ),
    "synthid": (ours.SynthIDTextWatermarkingConfig(4, KEYS), theirs.SynthIDTextWatermarkingConfig(4, KEYS)),
    "synthid-later": (
        ours.SynthIDTextWatermarkingConfig(3, KEYS[:3], context_history_size=4, skip_first_ngram_calls=True),
        theirs.SynthIDTextWatermarkingConfig(3, KEYS[:3], context_history_size=4, skip_first_ngram_calls=True),
    ),
}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 0, "renormalize_logits": True},
    ],
    ids=["greedy", "sampling", "normalised"],
)
def test_same_text_and_scores_as_transformers(pair: tuple[Any, Any], mark: str, mode: dict[str, Any]) -> None:
    kwargs = {
        "attention_mask": (PROMPTS != 0).long(),
        "max_new_tokens": 24,
        "pad_token_id": 0,
        "eos_token_id": list(range(60, 66)),
        **mode,
    }
    for detailed in (False, True):
        results = []
        for model, config in zip(pair, MARKS[mark], strict=True):
            torch.manual_seed(11)
            output = {"return_dict_in_generate": detailed, "output_scores": detailed}
            results.append(model.generate(PROMPTS, watermarking_config=config, **kwargs, **output))
        if detailed:
            same(results[0].sequences, results[1].sequences)
            for found, wanted in zip(results[0].scores, results[1].scores, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        else:
            same(*results)


@pytest.mark.parametrize("mark", ["lefthash", "selfhash"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_beams_with_a_green_list(pair: tuple[Any, Any], mark: str, do_sample: bool) -> None:
    results = []
    for model, config in zip(pair, MARKS[mark], strict=True):
        torch.manual_seed(2)
        results.append(
            model.generate(
                PROMPTS,
                attention_mask=(PROMPTS != 0).long(),
                watermarking_config=config,
                num_beams=3,
                num_return_sequences=2,
                max_new_tokens=15,
                do_sample=do_sample,
                pad_token_id=0,
                eos_token_id=60,
            )
        )
    same(*results)


def test_dicts_and_files_carry_the_watermark(pair: tuple[Any, Any]) -> None:
    for name in ("lefthash", "synthid"):
        config = MARKS[name][0]
        plain = pair[0].generate(PROMPTS, max_new_tokens=12, pad_token_id=0, watermarking_config=config)
        same(pair[0].generate(PROMPTS, max_new_tokens=12, pad_token_id=0, watermarking_config=config.to_dict()), plain)
        whole = ours.GenerationConfig(max_new_tokens=12, pad_token_id=0, watermarking_config=config)
        same(pair[0].generate(PROMPTS, whole), plain)
        assert not torch.equal(pair[0].generate(PROMPTS, max_new_tokens=12, pad_token_id=0), plain)


def stories(model: Any, ids: Tensor, rows: int, **kwargs: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = ids.repeat(rows, 1)
    kwargs = {"do_sample": True, "top_p": 1.0, "temperature": 1.3, **kwargs}  # room to choose, room for a mark
    out: Tensor = model.generate(inputs, max_new_tokens=100, min_new_tokens=100, **kwargs)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_the_mark_is_found_in_stories_and_only_there(scheme: str) -> None:
    model, tokenizer = ours.load("storyteller")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    config = ours.WatermarkingConfig(bias=8.0, seeding_scheme=scheme)
    detector = ours.WatermarkDetector(model.config, "cpu", config, ignore_repeated_ngrams=True)
    marked = detector(stories(model, ids, 6, watermarking_config=config), return_dict=True)
    unmarked = detector(stories(model, ids, 6), return_dict=True)
    assert isinstance(marked, ours.WatermarkDetectorOutput)
    assert isinstance(unmarked, ours.WatermarkDetectorOutput)
    assert marked.prediction is not None
    assert unmarked.prediction is not None
    assert marked.prediction.mean() > 0.8
    assert not unmarked.prediction.any()


def mean_bit(text: Tensor, config: Any) -> float:
    """Mean g-value where the mark may be; 0.5 in text without it."""
    mark = ours.SynthIDTextWatermarkLogitsProcessor(device="cpu", **config.to_dict())
    mask = mark.compute_context_repetition_mask(text) & mark.compute_eos_token_mask(text, 2)[:, mark.ngram_len - 1 :]
    return float(mark.compute_g_values(text)[mask].float().mean())


def test_synthid_marks_stories() -> None:
    model, tokenizer = ours.load("storyteller")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    config = ours.SynthIDTextWatermarkingConfig(5, KEYS)
    marked = mean_bit(stories(model, ids, 16, watermarking_config=config), config)
    unmarked = mean_bit(stories(model, ids, 16), config)
    assert abs(unmarked - 0.5) < 0.02
    assert marked > unmarked + 0.02


def test_synthid_follows_beams(pair: tuple[Any, Any]) -> None:
    """A context is made of a beam's own tokens, so the mark can be found.

    transformers keeps the last tokens of each row of the rectangle, whichever beams stood there: its scores are others.
    """
    config = MARKS["synthid"][0]
    kwargs = {"num_beams": 3, "max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    detailed = {"return_dict_in_generate": True, "output_scores": True}
    prompt = PROMPTS[1:2]
    out = pair[0].generate(prompt, watermarking_config=config, **kwargs, **detailed)
    mark = theirs.SynthIDTextWatermarkLogitsProcessor(device="cpu", **config.to_dict())
    with torch.no_grad():
        logits = pair[1](out.sequences).logits
    begin = prompt.shape[1]
    rows = out.beam_indices[0].tolist()
    assert len(set(rows)) > 1, "the best beam changed its row"
    for step, row in enumerate(rows):
        width = begin + step
        wanted = mark(out.sequences[:, :width], logits[:, width - 1].log_softmax(-1))[0]
        torch.testing.assert_close(out.scores[step][row], wanted, rtol=1e-4, atol=1e-4)
    other = pair[1].generate(prompt, watermarking_config=MARKS["synthid"][1], **kwargs)
    assert other.tolist() != out.sequences.tolist()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ours.WatermarkLogitsProcessor(10, "cpu", seeding_scheme="x"), "seeding_scheme"),
        (lambda: ours.WatermarkLogitsProcessor(10, "cpu", greenlist_ratio=1.0), "greenlist_ratio"),
        (lambda: ours.WatermarkLogitsProcessor(10, "cpu", context_width=0), "context_width"),
        (lambda: ours.SynthIDTextWatermarkLogitsProcessor(1, [1], 4, 0, 4, "cpu"), "ngram_len"),
        (lambda: ours.SynthIDTextWatermarkLogitsProcessor(3, [], 4, 0, 4, "cpu"), "keys"),
        (lambda: ours.BayesianDetectorModel(ours.BayesianDetectorConfig()), "watermarking_depth"),
        (lambda: ours.BayesianDetectorModel(ours.BayesianDetectorConfig(3, 1.5)), "base_rate"),
        (lambda: ours.WatermarkDetector({"vocab_size": 9}, "cpu", {"colour": 1}), "colour"),
        (lambda: ours.WatermarkLogitsProcessor(10, "cpu")(torch.ones(1, 3).long(), torch.ones(1, 4)), "vocab_size"),
    ],
)
def test_settings_out_of_range(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_texts_that_cannot_be_judged() -> None:
    detector = ours.WatermarkDetector({"vocab_size": 50, "bos_token_id": 1}, "cpu", {"context_width": 3})
    with pytest.raises(ValueError, match="at least 4 tokens"):
        detector(torch.tensor([[1, 5, 6, 7]]))
    with pytest.raises(ValueError, match="beginning-of-text"):
        detector(torch.tensor([[1, 5, 6, 7, 8], [5, 5, 6, 7, 8]]))
