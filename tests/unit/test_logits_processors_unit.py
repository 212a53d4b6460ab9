"""Processor classes by themselves: what they refuse, what they declare, and how the list calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unspool.logits as logits
from unspool.logits.ops import greatest
from unspool.logits.warpers import TopKTopPLogitsWarper

IDS = torch.tensor([[1, 2]])
SCORES = torch.arange(6.0)[None]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("TemperatureLogitsWarper", {"temperature": 0.0}),
        ("TemperatureLogitsWarper", {"temperature": -1.0}),
        ("TemperatureLogitsWarper", {"temperature": "hot"}),
        ("TopKLogitsWarper", {"top_k": 0}),
        ("TopKLogitsWarper", {"top_k": 2.5}),
        ("TopPLogitsWarper", {"top_p": 1.1}),
        ("TopPLogitsWarper", {"top_p": 0.5, "min_tokens_to_keep": 0}),
        ("MinPLogitsWarper", {"min_p": -0.1}),
        ("TopHLogitsWarper", {"top_h": 0.0}),
        ("TypicalLogitsWarper", {"mass": 1.0}),
        ("EpsilonLogitsWarper", {"epsilon": 0.0}),
        ("EtaLogitsWarper", {"epsilon": 1.0}),
        ("RepetitionPenaltyLogitsProcessor", {"penalty": 0.0}),
        ("RepetitionPenaltyLogitsProcessor", {"penalty": 1.2, "prompt_ignore_length": -1}),
        ("RepetitionPenaltyLogitsProcessor", {"penalty": 1.2, "prompt_ignore_length": torch.ones(1, 1)}),
        ("EncoderRepetitionPenaltyLogitsProcessor", {"penalty": -1.0, "encoder_input_ids": IDS}),
        ("NoRepeatNGramLogitsProcessor", {"ngram_size": 0}),
        ("EncoderNoRepeatNGramLogitsProcessor", {"encoder_ngram_size": 0, "encoder_input_ids": IDS}),
        ("SequenceBiasLogitsProcessor", {"sequence_bias": {}}),
        ("SequenceBiasLogitsProcessor", {"sequence_bias": {(1,): 2}}),
        ("SequenceBiasLogitsProcessor", {"sequence_bias": {(): 2.0}}),
        ("SequenceBiasLogitsProcessor", {"sequence_bias": {(-1,): 2.0}}),
        ("SequenceBiasLogitsProcessor", {"sequence_bias": [[(1,), 2.0]]}),
        ("SequenceBiasLogitsProcessor", {"sequence_bias": [3]}),
        ("NoBadWordsLogitsProcessor", {"bad_words_ids": []}),
        ("NoBadWordsLogitsProcessor", {"bad_words_ids": [3]}),
        ("NoBadWordsLogitsProcessor", {"bad_words_ids": [[-3]]}),
        ("MinLengthLogitsProcessor", {"min_length": -1, "eos_token_id": 1}),
        ("MinLengthLogitsProcessor", {"min_length": 1, "eos_token_id": 1.5}),
        ("MinNewTokensLengthLogitsProcessor", {"prompt_length_to_skip": 1, "min_new_tokens": -1, "eos_token_id": 1}),
        ("ForcedEOSTokenLogitsProcessor", {"max_length": 5, "eos_token_id": -1}),
        (
            "ExponentialDecayLengthPenalty",
            {"exponential_decay_length_penalty": (1, 2.0), "eos_token_id": [-1], "input_ids_seq_length": 0},
        ),
    ],
)
def test_refused_arguments(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="`"):
        getattr(logits, name)(**arguments)


def test_refused_when_called() -> None:
    with pytest.raises(ValueError, match=r"\[9\]"):
        logits.NoBadWordsLogitsProcessor([[1, 9]])(IDS, SCORES)
    with pytest.raises(ValueError, match="one value for each row"):
        logits.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([0, 0]))(IDS, SCORES)
    with pytest.raises(ValueError, match="entry 0"):
        logits.PrefixConstrainedLogitsProcessor(lambda entry, ids: [], 1)(IDS, SCORES)
    with pytest.raises(ValueError, match="do not divide"):
        logits.EncoderNoRepeatNGramLogitsProcessor(1, torch.ones(2, 2, dtype=torch.long))(IDS, SCORES)
    with pytest.raises(NotImplementedError):
        logits.LogitsProcessor()(IDS, SCORES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_greatest_score_is_the_first_of_equal_ones(dtype: torch.dtype) -> None:
    scores = torch.randint(0, 9, (64, 300), generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[3, :-1] = -torch.inf
    assert greatest(scores).tolist() == [row.index(max(row)) for row in scores.tolist()]
    scores[5, 7], scores[9], scores[11] = torch.nan, torch.nan, -torch.inf
    assert [i for i, place in enumerate(greatest(scores).tolist()) if place < 0] == [5, 9, 11]


def test_temperature_zero_names_the_way_out() -> None:
    with pytest.raises(ValueError, match="do_sample=False"):
        logits.TemperatureLogitsWarper(0.0)


def test_declarations() -> None:
    base = logits.LogitsProcessor
    assert (base.reads_history, base.row_independent) == (True, False)
    assert logits.NoRepeatNGramLogitsProcessor(2).row_independent
    assert logits.NoRepeatNGramLogitsProcessor(2).reads_history
    assert not logits.PrefixConstrainedLogitsProcessor(lambda entry, ids: [1], 1).row_independent
    assert logits.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([0])).row_independent
    assert not logits.SequenceBiasLogitsProcessor({(1,): 1.0}).reads_history
    assert logits.SequenceBiasLogitsProcessor({(1, 2): 1.0}).reads_history
    light = logits.LogitsProcessorList([TopKTopPLogitsWarper(5, 0.9), logits.MinLengthLogitsProcessor(3, 1)])
    assert light.row_independent
    assert not light.reads_history
    foreign = logits.LogitsProcessorList([*light, lambda ids, scores: scores])
    assert not foreign.row_independent
    assert foreign.reads_history


def test_list_runs_in_order_and_accepts_functions() -> None:
    processors = logits.LogitsProcessorList([lambda ids, scores: scores + 1])
    processors.append(logits.TemperatureLogitsWarper(2.0))
    assert torch.equal(processors(IDS, SCORES), (SCORES + 1) / 2)
    assert logits.LogitsProcessorList()(IDS, SCORES) is SCORES


def test_list_hands_arguments_to_those_that_name_them() -> None:
    class Shift(logits.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, by: float, times: int = 1) -> Tensor:
            return scores + by * times

    class Anything(logits.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return scores * len(kwargs)

    processors = logits.LogitsProcessorList([Shift(), logits.LogitNormalization(), Anything()])
    assert torch.equal(processors(IDS, SCORES, by=2.0, other=1), (SCORES + 2).log_softmax(-1) * 2)
    with pytest.raises(ValueError, match="Shift needs the argument"):
        processors(IDS, SCORES, times=2)


def test_ids_outside_the_vocabulary_are_left_out() -> None:
    found = logits.SuppressTokensLogitsProcessor([1, 99, -1])(IDS, SCORES)
    assert found.isneginf().tolist() == [[False, True, False, False, False, False]]


def test_one_processor_serves_several_vocabularies() -> None:
    bans = logits.NoBadWordsLogitsProcessor([[3], [2, 4]])
    for vocab in (6, 9, 6):
        assert bans(IDS, torch.zeros(1, vocab)).isneginf().nonzero().tolist() == [[0, 3], [0, 4]]


def test_growing_penalty_ends_a_long_row() -> None:
    decay = logits.ExponentialDecayLengthPenalty((0, 2.0), 1, 0)
    found = decay(torch.zeros(1, 3000, dtype=torch.long), SCORES)
    assert found.isfinite().all()
    assert found.argmax() == 1


def test_a_penalty_with_a_number_per_row_knows_which_rows_are_left() -> None:
    processor = logits.RepetitionPenaltyLogitsProcessor(2.0, torch.tensor([0, 1, 2]))
    ids, scores = torch.tensor([[1, 2, 3]] * 3), torch.ones(3, 5)
    left = torch.tensor([0, 2])
    together = logits.LogitsProcessorList([processor])
    assert together.on_rows(ids[left], scores[left], left).equal(together(ids, scores)[left])
