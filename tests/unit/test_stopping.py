"""Stop strings and criteria lists by themselves, with a tokenizer of one byte for each token."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from unspool.stopping import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)


class Bytes:
    """Token ids are bytes of UTF-8. Counts the tokens it turns into text."""

    def __init__(self) -> None:
        self.decoded = 0

    def batch_decode(self, sequences: list[list[int]], **_: Any) -> list[str]:
        self.decoded += sum(map(len, sequences))
        return [bytes(ids).decode("utf-8", "replace") for ids in sequences]


def encode(*texts: str) -> torch.Tensor:
    rows = [list(text.encode()) for text in texts]
    width = max(map(len, rows))
    return torch.tensor([[32] * (width - len(row)) + row for row in rows])


def stops_at(text: str, stops: list[str], first: int = 1) -> list[int]:
    """Widths at which the criterion answers True."""
    criterion, ids = StopStringCriteria(Bytes(), stops), encode(text)
    return [width for width in range(first, ids.shape[1] + 1) if criterion(ids[:, :width], None)[0]]


def test_found_when_completed_and_not_after() -> None:
    assert stops_at("do stop at", ["stop"]) == [7]
    assert stops_at("aaaa", ["aa"]) == [2, 3, 4]


def test_character_split_over_tokens() -> None:
    assert stops_at("caféé!", ["é"]) == [5, 7]
    assert stops_at("日本", ["日本"]) == [6]


def test_prompt_alone_does_not_stop_but_its_end_counts() -> None:
    assert stops_at("a stop in the prompt", ["stop"], first=8) == []
    assert stops_at("prompt sto" + "p", ["stop"], first=11) == [11]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab é\n", min_size=1, max_size=150),
    stops=st.lists(st.text(alphabet="ab é\n", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_same_as_searching_the_whole_text(text: str, stops: list[str]) -> None:
    ends = {
        len(text[: at + len(stop)].encode()) for stop in stops for at in range(len(text)) if text.startswith(stop, at)
    }
    assert stops_at(text, stops) == sorted(ends)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4))
def test_rows_that_change_places_or_leave(data: st.DataObject, rows: int) -> None:
    """Whatever the order of calls, the answer is that of a criterion which has seen nothing before."""
    criterion = StopStringCriteria(Bytes(), ["abba", "a é"])
    ids = encode(*(data.draw(st.text(alphabet="ab é", min_size=60, max_size=60)) for _ in range(rows)))
    for _ in range(25):
        order = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
        width = data.draw(st.integers(1, ids.shape[1]))
        fresh = StopStringCriteria(Bytes(), ["abba", "a é"])
        part = ids[order, :width]
        assert torch.equal(criterion(part, None), fresh(part, None))
        pairs = zip(criterion.matched, fresh.matched, strict=True)
        assert all(reported == hit for reported, hit in pairs if hit)


def test_reports_which_string_fired() -> None:
    criterion = StopStringCriteria(Bytes(), ["xyz", "END", "ND"])
    ids = encode("no xyz..", "....END.", "........")
    for width in range(1, 9):
        criterion(ids[:, :width], None)
    assert criterion.matched == ["xyz", "END", None]
    criterion(encode("another call"), None)
    assert criterion.matched == [None]


def test_several_new_tokens() -> None:
    criterion = StopStringCriteria(Bytes(), "stop")
    ids = encode("now stop it")
    assert criterion(ids, None).tolist() == [False]
    assert criterion(ids, None, new_token_length=4).tolist() == [True]
    assert criterion(ids, None, new_token_length=3).tolist() == [False]


def test_cost_of_a_step_does_not_grow() -> None:
    tokenizer = Bytes()
    criterion = StopStringCriteria(tokenizer, ["stop"])
    ids = encode("abcdefg " * 500)
    costs = []
    for width in range(1000, ids.shape[1]):
        before = tokenizer.decoded
        criterion(ids[:, :width], None)
        costs.append(tokenizer.decoded - before)
    assert max(costs) <= 50  # the window, twice where it moves
    assert sum(costs) / len(costs) <= 25


def test_filler_of_beams_is_not_decoded() -> None:
    ids = torch.tensor([[ord("a"), ord("b"), -1]])
    assert StopStringCriteria(Bytes(), "ab")(ids, None).tolist() == [False]


@pytest.mark.parametrize("stops", [[], "", ["a", ""], [3]])
def test_refused_stop_strings(stops: Any) -> None:
    with pytest.raises(ValueError, match="stop_strings"):
        StopStringCriteria(Bytes(), stops)


def test_list_joins_answers() -> None:
    class Second(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([False, True])

    ids = torch.tensor([[1, 9], [1, 2]])
    criteria = StoppingCriteriaList([EosTokenCriteria(9)])
    assert criteria.row_independent
    assert criteria(ids, None).tolist() == [True, False]
    criteria.append(Second())
    assert criteria(ids, None).tolist() == [True, True]
    assert not criteria.row_independent
    assert StoppingCriteriaList([lambda ids, scores: True])(ids, None).tolist() == [True, True]
    assert StoppingCriteriaList()(ids, None).tolist() == [False, False]
    assert StoppingCriteriaList().max_length is None
    with pytest.raises(NotImplementedError):
        StoppingCriteria()(ids, None)


def test_length_past_the_model_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    criterion = MaxLengthCriteria(100, max_position_embeddings=3)
    with caplog.at_level(logging.WARNING):
        for width in (3, 4, 5):
            assert not criterion(torch.zeros(2, width, dtype=torch.long), None).any()
    assert len(caplog.records) == 1


def test_refused_criteria() -> None:
    with pytest.raises(ValueError, match="eos_token_id"):
        EosTokenCriteria([1.5])
    with pytest.raises(ValueError, match="output_scores"):
        ConfidenceCriteria(0.5)(torch.zeros(1, 1, dtype=torch.long), None)
