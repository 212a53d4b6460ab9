"""Every processor against transformers' class of the same name: the same numbers, bit for bit, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.generation.logits_process as oracle
from hypothesis import given, settings, strategies as st
from torch import Tensor

import unspool.logits as ours

INF = float("inf")

filters = st.fixed_dictionaries(
    {},
    optional={"filter_value": st.sampled_from([-INF, -1e4]), "min_tokens_to_keep": st.integers(1, 4)},
)


def with_filter(**own: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda a, b: {**a, **b}, st.fixed_dictionaries(own), filters)


unit = st.floats(0.01, 0.99)
eos = st.one_of(st.integers(0, 4), st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
words = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6)
biases = st.dictionaries(
    st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), st.floats(-5, 5), min_size=1, max_size=8
)

CASES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "TemperatureLogitsWarper": st.fixed_dictionaries({"temperature": st.floats(0.05, 20)}),
    "TopKLogitsWarper": with_filter(top_k=st.integers(1, 60)),
    "TopPLogitsWarper": with_filter(top_p=st.floats(0, 1)),
    "MinPLogitsWarper": with_filter(min_p=st.floats(0, 1)),
    "TopHLogitsWarper": st.fixed_dictionaries({"top_h": st.floats(0.01, 1)}),
    "TypicalLogitsWarper": with_filter(mass=unit),
    "EpsilonLogitsWarper": with_filter(epsilon=unit),
    "EtaLogitsWarper": with_filter(epsilon=unit),
    "RepetitionPenaltyLogitsProcessor": st.fixed_dictionaries(
        {"penalty": st.floats(0.1, 5)}, optional={"prompt_ignore_length": st.integers(0, 30)}
    ),
    "NoRepeatNGramLogitsProcessor": st.fixed_dictionaries({"ngram_size": st.integers(1, 5)}),
    "SequenceBiasLogitsProcessor": st.fixed_dictionaries({"sequence_bias": biases}),
    "NoBadWordsLogitsProcessor": st.fixed_dictionaries(
        {"bad_words_ids": words}, optional={"eos_token_id": st.one_of(eos, st.just(torch.tensor([1, 3])))}
    ),
    "MinLengthLogitsProcessor": st.fixed_dictionaries({"min_length": st.integers(0, 30), "eos_token_id": eos}),
    "MinNewTokensLengthLogitsProcessor": st.fixed_dictionaries(
        {"prompt_length_to_skip": st.integers(0, 10), "min_new_tokens": st.integers(0, 20), "eos_token_id": eos}
    ),
    "ForcedBOSTokenLogitsProcessor": st.fixed_dictionaries({"bos_token_id": st.integers(0, 4)}),
    "ForcedEOSTokenLogitsProcessor": st.fixed_dictionaries({"max_length": st.integers(1, 30), "eos_token_id": eos}),
    "SuppressTokensLogitsProcessor": st.fixed_dictionaries(
        {"suppress_tokens": st.lists(st.integers(0, 99), min_size=1, max_size=5)}
    ),
    "SuppressTokensAtBeginLogitsProcessor": st.fixed_dictionaries(
        {
            "begin_suppress_tokens": st.lists(st.integers(0, 99), min_size=1, max_size=5),
            "begin_index": st.integers(1, 6),
        }
    ),
    "ExponentialDecayLengthPenalty": st.fixed_dictionaries(
        {
            "exponential_decay_length_penalty": st.tuples(st.integers(0, 8), st.floats(0.5, 3)),
            "eos_token_id": eos,
            "input_ids_seq_length": st.integers(0, 6),
        }
    ),
    "AlternatingCodebooksLogitsProcessor": st.fixed_dictionaries(
        {"input_start_len": st.integers(0, 6), "semantic_vocab_size": st.integers(0, 3), "codebook_size": st.just(2)}
    ),
    "BarkEosPrioritizerLogitsProcessor": st.fixed_dictionaries(
        {"eos_token_id": eos, "min_eos_p": st.one_of(st.none(), unit)}
    ),
    "InfNanRemoveLogitsProcessor": st.just({}),
    "LogitNormalization": st.just({}),
}


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """`input_ids` `[rows, width]` with many repeats and `scores` `[rows, vocab]` with ties and -inf."""
    rows, vocab, width = draw(st.integers(1, 4)), draw(st.integers(5, 50)), draw(st.integers(1, 25))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.randint(0, draw(st.integers(2, 5)), (rows, width), generator=random)
    scores = torch.randn(rows, vocab, generator=random) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    if draw(st.booleans()):
        scores = (scores * 2).round() / 2
    banned = torch.rand(rows, vocab, generator=random) < draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    banned[:, 0] = False
    return ids, scores.masked_fill(banned, -INF)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def untouched(process: Callable[[Tensor, Tensor], Tensor], ids: Tensor, scores: Tensor) -> Tensor:
    before = ids.clone(), scores.clone()
    result = process(ids, scores)
    same(ids, before[0])
    same(scores, before[1])
    return result


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_transformers(name: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(arguments=CASES[name], data=inputs())
    def check(arguments: dict[str, Any], data: tuple[Tensor, Tensor]) -> None:
        ids, scores = data
        processor = getattr(ours, name)(**arguments)
        wanted = getattr(oracle, name)(**arguments)(ids.clone(), scores.clone())
        same(untouched(processor, ids, scores), wanted)
        same(processor(ids, scores), wanted)  # what it keeps between calls changes nothing

    check()


@settings(max_examples=60, deadline=None)
@given(penalty=st.floats(0.1, 5), data=inputs(), seed=st.integers(0, 1000))
def test_repetition_penalty_skips_padding_and_foreign_ids(penalty: float, data: Any, seed: int) -> None:
    ids, scores = data
    random = torch.Generator().manual_seed(seed)
    ids = torch.where(torch.rand(ids.shape, generator=random) < 0.2, 10_000, ids)
    padding = torch.randint(0, ids.shape[1] + 1, (ids.shape[0],), generator=random)
    for ignore in (None, padding):
        wanted = oracle.RepetitionPenaltyLogitsProcessor(penalty, ignore)(ids, scores)
        same(untouched(ours.RepetitionPenaltyLogitsProcessor(penalty, ignore), ids, scores), wanted)


@settings(max_examples=80, deadline=None)
@given(
    data=inputs(), size=st.integers(1, 5), copies=st.integers(1, 3), length=st.integers(1, 12), seed=st.integers(0, 99)
)
def test_encoder_processors(data: Any, size: int, copies: int, length: int, seed: int) -> None:
    ids, scores = data[0].repeat_interleave(copies, 0), data[1].repeat_interleave(copies, 0)
    source = torch.randint(0, 4, (data[0].shape[0], length), generator=torch.Generator().manual_seed(seed))
    for name, value in (
        ("EncoderNoRepeatNGramLogitsProcessor", size),
        ("EncoderRepetitionPenaltyLogitsProcessor", 1.7),
    ):
        wanted = getattr(oracle, name)(value, source)(ids, scores)
        same(untouched(getattr(ours, name)(value, source), ids, scores), wanted)


@settings(max_examples=60, deadline=None)
@given(data=inputs(), beams=st.integers(1, 3), modulus=st.integers(2, 7))
def test_prefix_constrained(data: Any, beams: int, modulus: int) -> None:
    ids, scores = data[0].repeat_interleave(beams, 0), data[1].repeat_interleave(beams, 0)

    def allowed(entry: int, tokens: Tensor) -> list[int]:
        first = (entry + int(tokens.sum())) % modulus % scores.shape[1]
        return list(range(first, scores.shape[1], modulus))

    wanted = oracle.PrefixConstrainedLogitsProcessor(allowed, beams)(ids, scores)
    same(untouched(ours.PrefixConstrainedLogitsProcessor(allowed, beams), ids, scores), wanted)


@settings(max_examples=50, deadline=None)
@given(
    data=inputs(),
    scale=st.floats(1.01, 9),
    top=st.one_of(st.none(), st.integers(1, 5)),
    channels=st.integers(1, 4),
    end=st.integers(1, 4),
)
def test_guidance_and_channels_of_codec_models(
    data: Any, scale: float, top: int | None, channels: int, end: int
) -> None:
    ids, scores = data
    both = torch.cat([scores, scores.flip(1)])
    for name, arguments in (
        ("ClassifierFreeGuidanceLogitsProcessor", (scale,)),
        ("DiaClassifierFreeGuidanceLogitsProcessor", (scale, top)),
    ):
        same(untouched(getattr(ours, name)(*arguments), ids, both), getattr(oracle, name)(*arguments)(ids, both))
    many = scores.repeat_interleave(channels, 0).roll(1, 1)
    wanted = oracle.DiaEOSChannelFilterLogitsProcessor(channels, end)(ids, many.clone())
    same(untouched(ours.DiaEOSChannelFilterLogitsProcessor(channels, end), ids, many), wanted)


@settings(max_examples=50, deadline=None)
@given(
    delays=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    texts=st.integers(1, 3),
    longest=st.integers(6, 14),
    seed=st.integers(0, 999),
)
def test_delayed_ends_of_dia(delays: list[int], texts: int, longest: int, seed: int) -> None:
    random, end = torch.Generator().manual_seed(seed), 3
    mine = ours.DiaEOSDelayPatternLogitsProcessor(delays, end, longest)
    other = oracle.DiaEOSDelayPatternLogitsProcessor(delays, end, longest)
    for width in range(1, longest):
        ids = torch.zeros(texts, width, dtype=torch.long)
        scores = torch.randn(texts * len(delays), 5, generator=random)
        scores[:, end] -= 1
        same(untouched(mine, ids, scores), other(ids, scores.clone()))


class WhisperSettings:
    """The part of Whisper's generation config that its processors read."""

    no_timestamps_token_id = 30
    eos_token_id = 28
    bos_token_id = 28
    max_initial_timestamp_index: int | None = None


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.integers(2, 9),
    begin=st.integers(1, 3),
    latest=st.sampled_from([None, 0, 3]),
    detect=st.sampled_from([None, True, False]),
    seed=st.integers(0, 9999),
)
def test_whisper_timestamps(
    rows: int, width: int, begin: int, latest: int | None, detect: bool | None, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 28, (rows, width), generator=random)
    stamps = torch.randint(31, 45, (rows, width), generator=random)
    ids = torch.where(torch.rand(rows, width, generator=random) < 0.5, stamps, ids)
    scores = torch.randn(rows, 50, generator=random) * 3
    config = WhisperSettings()
    config.max_initial_timestamp_index = latest
    for at in (begin, width):
        arguments = (config, at, detect)
        wanted = oracle.WhisperTimeStampLogitsProcessor(*arguments)(ids, scores)
        same(untouched(ours.WhisperTimeStampLogitsProcessor(*arguments), ids, scores), wanted)
        moved = ours.WhisperTimeStampLogitsProcessor(config, 99, detect)
        moved.set_begin_index(at)
        same(moved(ids, scores), wanted)


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("begin", [1, 3])
def test_whisper_silence(begin: int, logs: bool) -> None:
    class Speech:
        """A model that gives the same logits for a prompt of five tokens whatever it hears."""

        def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Any:
            raise AssertionError

        def prepare_inputs_for_generation(self, **inputs: Any) -> dict[str, Any]:
            return {"decoder_input_ids": inputs["decoder_input_ids"], "input_ids": torch.zeros(1)}

        def __call__(self, input_features: Tensor, decoder_input_ids: Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1)))

    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    found = []
    for module in (ours, oracle):
        detector = module.WhisperNoSpeechDetection(4, begin, logs)
        detector.set_model(Speech())
        detector.set_inputs({"inputs": torch.zeros(1), "decoder_input_ids": torch.zeros(2, 5)})
        assert detector.no_speech_prob == [0.0]
        detector.set_begin_index(begin + 1)
        same(detector(torch.zeros(2, begin, dtype=torch.long), scores), scores)
        assert detector.no_speech_prob == [0.0]
        same(detector(torch.zeros(2, begin + 1, dtype=torch.long), scores), scores)
        found.append(detector.no_speech_prob)
    same(*found)


def test_every_processor_of_transformers_is_here() -> None:
    left_out = {"UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkState"}
    theirs = {name for name, value in vars(oracle).items() if getattr(value, "__module__", "") == oracle.__name__}
    classes = {name for name in theirs if name[0].isupper() and isinstance(getattr(oracle, name), type)}
    assert classes - set(ours.__all__) <= left_out


def test_sequence_bias_in_the_form_of_json() -> None:
    bias = [[[1, 2], -3.5], [[4], 2.0], [[3, 1, 2], 1.25]]
    ids, scores = torch.tensor([[3, 1], [0, 1]]), torch.zeros(2, 6)
    wanted = oracle.SequenceBiasLogitsProcessor([*bias])(ids, scores)
    same(ours.SequenceBiasLogitsProcessor([*bias])(ids, scores), wanted)


def test_repair_of_nan_and_infinities() -> None:
    scores = torch.tensor([[float("nan"), INF, -INF, 1.0]])
    ids = torch.tensor([[0]])
    same(ours.InfNanRemoveLogitsProcessor()(ids, scores), oracle.InfNanRemoveLogitsProcessor()(ids, scores))
