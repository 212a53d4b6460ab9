"""Diverse and constrained beam search: what transformers 4.49 gave (see `make_beams_v4.py`), and what is ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings, strategies as st

import unspool
from unspool.config import warn_once
from unspool.errors import NonFiniteLogits

STORED = json.loads((Path(__file__).parent / "fixtures" / "beams_v4.json").read_text())
PROMPTS = [[5, 9, 11, 3, 8], [17, 4], [23, 31, 31]]
GROUPS: dict[str, Any] = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0}
WORDS: dict[str, Any] = {"num_beams": 4, "force_words_ids": [[40, 41], [[7, 8, 9], [7, 12]]]}


def make_model(folder: Path) -> Any:
    tiny.save(folder)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose logits are looked up."""
    made = make_model(tmp_path_factory.mktemp("table"))

    def step(batch: Any) -> torch.Tensor:
        logits = tiny.look_up(batch.tokens, batch.positions)
        return logits if batch.keep is None else logits[batch.keep]

    made.step = step
    return made


def generate(model: Any, call: dict[str, Any], **more: Any) -> Any:
    kwargs = tiny.arguments({name: value for name, value in call.items() if name != "model"}, unspool)
    return model.generate(**{"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8, **kwargs, **more})


@pytest.mark.parametrize("number", range(len(STORED)))
def test_what_transformers_4_gave(model: Any, table: Any, number: int) -> None:
    call, wanted = STORED[number]["call"], STORED[number]["result"]
    used = table if call["model"] == "table" else model
    out = generate(used, call, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.tolist() == wanted["sequences"]
    assert generate(used, call).tolist() == wanted["sequences"], "prompts that are settled may leave"
    if "sequences_scores" in wanted:
        torch.testing.assert_close(out.sequences_scores, torch.tensor(wanted["sequences_scores"]), rtol=1e-4, atol=1e-4)
    steps = (out.beam_indices >= 0).sum(1)
    made = used.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    if isinstance(call["eos_token_id"], int | None):  # of several, the first stands for whichever was chosen
        lengths = steps ** call["length_penalty"]
        torch.testing.assert_close(made.sum(1) / lengths, out.sequences_scores, rtol=1e-3, atol=1e-3)
    filled = out.beam_indices.shape[1] > int(steps.max())  # version 4 then takes the wrong columns
    if "totals" in wanted and not filled:  # scores of steps here, running totals there
        width = made.shape[1]
        assert out.beam_indices.tolist() == [row[: out.beam_indices.shape[1]] for row in wanted["beam_indices"]]
        totals = made.cumsum(1) * (out.beam_indices[:, :width] >= 0)
        torch.testing.assert_close(totals, torch.tensor(wanted["totals"])[:, :width], rtol=1e-3, atol=1e-3)


def test_scores_of_an_output_that_was_cut_short(model: Any) -> None:
    """The end token that is put behind it has no score, and moves no other."""

    def enough(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] == 9)

    for mode in (GROUPS, WORDS):
        call = {"prompts": PROMPTS[:1], **mode, "eos_token_id": 13, "stopping_criteria": [enough]}
        out = generate(model, call, return_dict_in_generate=True, output_scores=True)
        assert (out.beam_indices[0] >= 0).tolist() == [True] * 4 + [False]
        assert out.sequences.shape[1] == 10
        assert out.sequences[0, -1] == 13
        made = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        torch.testing.assert_close(made.sum(1) / 4, out.sequences_scores)


@pytest.mark.parametrize("mode", [GROUPS, WORDS], ids=["groups", "words"])
def test_outputs_that_were_cut_short_are_the_same_in_a_continuous_batch(model: Any, mode: dict[str, Any]) -> None:
    """With the end token behind them, and a log-probability for each token; one at full length has none."""

    def enough(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] == 9)

    call = {**mode, "eos_token_id": 13, "num_return_sequences": 2}
    for more in ({"stopping_criteria": [enough], "max_new_tokens": 8}, {"max_new_tokens": 4}):
        rows = generate(model, {"prompts": PROMPTS[:1], **call, **more})[:, 5:].tolist()
        outputs = list(model.generate_batch(PROMPTS[:1], progress_bar=False, top_logprobs=1, **call, **more).values())
        assert [output.generated_tokens for output in outputs] == rows
        assert (13 in rows[0]) == ("stopping_criteria" in more)
        for output in outputs:
            assert len(output.logprobs) == len(output.top_logprobs) == len(output.generated_tokens)
            assert (output.finish_reason, output.stop) == (
                ("stop", "criterion") if "stopping_criteria" in more else ("length", None)
            )


def test_the_stored_calls_are_worth_it() -> None:
    """Each habit of transformers 4 that is kept stands in some stored call."""
    calls = [(one["call"], one["result"]) for one in STORED]
    assert sum("num_beam_groups" in call for call, _ in calls) >= 30
    assert any("sequences_scores" not in result for _, result in calls), "outputs that lack a constraint"
    assert sum(isinstance(call["eos_token_id"], list) and len(call["eos_token_id"]) > 3 for call, _ in calls) > 8
    assert any("sevens" in str(call) for call, _ in calls)


@pytest.mark.parametrize("mode", [GROUPS, WORDS], ids=["groups", "words"])
def test_a_prompt_gets_the_same_in_any_company(model: Any, mode: dict[str, Any]) -> None:
    mode = mode | {"eos_token_id": [13, 30], "early_stopping": True, "max_new_tokens": 12, "pad_token_id": 60}
    whole = generate(model, {"prompts": PROMPTS, **mode})
    chunked = generate(model, {"prompts": PROMPTS, **mode}, prefill_chunk_size=2)
    assert whole.tolist() == chunked.tolist()
    for prompt, row in zip(PROMPTS, whole.tolist(), strict=True):
        alone = generate(model, {"prompts": [prompt], **mode})[0].tolist()
        assert row[5 - len(prompt) :][: len(alone)] == alone
        assert set(row[5 - len(prompt) + len(alone) :]) <= {60}


def test_groups_differ(model: Any) -> None:
    plain = generate(model, {"prompts": PROMPTS[:1], "num_beams": 6, "num_return_sequences": 6})
    apart = generate(model, {"prompts": PROMPTS[:1], **GROUPS, "diversity_penalty": 50.0, "num_return_sequences": 6})
    assert len({row[5] for row in apart.tolist()}) > len({row[5] for row in plain.tolist()})
    assert len({row[6] for row in apart.tolist()}) >= 3


def test_words_are_said(model: Any) -> None:
    out = generate(model, {"prompts": PROMPTS, **WORDS, "max_new_tokens": 14}).tolist()
    plain = generate(model, {"prompts": PROMPTS, "num_beams": 4, "max_new_tokens": 14}).tolist()

    def says(row: list[int], *words: list[int]) -> bool:
        return any(row[i : i + len(word)] == word for word in words for i in range(len(row)))

    assert not any(says(row, [40, 41]) for row in plain)
    assert all(says(row, [40, 41]) and says(row, [7, 8, 9], [7, 12]) for row in out)


def test_everything_recorded(model: Any) -> None:
    for mode in (GROUPS, WORDS):
        rows = 3 * mode["num_beams"]
        out = generate(
            model, {"prompts": PROMPTS, **mode}, max_new_tokens=4, return_dict_in_generate=True,
            output_scores=True, output_logits=True, output_attentions=True, output_hidden_states=True,
        )  # fmt: skip
        assert isinstance(out, unspool.GenerateBeamDecoderOnlyOutput)
        assert [score.shape for score in out.scores] == [(rows, 61)] * 4
        if mode is WORDS:
            for score, logits in zip(out.scores, out.logits, strict=True):
                torch.testing.assert_close(score, logits.log_softmax(-1))
        assert [len(layers) for layers in out.hidden_states] == [3] * 4
        assert out.attentions[1][0].shape == (rows, 4, 1, 6)
        assert out.finish_reasons == ["length"] * 3
        assert out.beam_indices.shape == (3, 4)
        for prompt, indices in enumerate(out.beam_indices.tolist()):
            assert all(i // mode["num_beams"] == prompt for i in indices)


class Pieces:
    """A streamer that knows rows and keeps what it gets."""

    row_aware = True

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.sizes: list[int] = []

    def put(self, value: Any, live: Any = None, mask: Any = None) -> None:
        if mask is not None:
            self.rows = [[] for _ in value.tolist()]
            return
        for row, new in zip(self.rows, value, strict=True):
            row += new
        self.sizes.append(sum(map(len, value)))

    def end(self) -> None:
        self.sizes.append(0)


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=3),
    eos=st.lists(st.integers(13, 39), max_size=12, unique=True),
    early=st.sampled_from([False, True, "never"]),
    mode=st.sampled_from([GROUPS, WORDS]),
)
def test_streams_are_the_best_outputs(
    model: Any, prompts: list[list[int]], eos: list[int], early: Any, mode: dict[str, Any]
) -> None:
    call = {"prompts": prompts, **mode, "eos_token_id": eos or None, "early_stopping": early, "max_new_tokens": 12}
    out = generate(model, call, return_dict_in_generate=True)
    width = max(map(len, prompts))
    steps = (out.beam_indices >= 0).sum(1).tolist()
    streamer = Pieces()
    again = generate(model, call, streamer=streamer)
    assert again.tolist() == out.sequences.tolist()
    assert streamer.rows == [row[width : width + n] for row, n in zip(again.tolist(), steps, strict=True)]


def test_streams_give_what_is_agreed_before_the_end(model: Any) -> None:
    streamer = Pieces()
    call = {"prompts": PROMPTS[:1], "num_beams": 2, "force_words_ids": [[40]], "max_new_tokens": 40}
    generate(model, call, streamer=streamer)
    assert len(streamer.rows[0]) == 40
    assert len(streamer.sizes) > 4


@pytest.mark.parametrize(("words", "tokens", "met"), [([[40, 41, 42]], 2, False), ([[40, 41, 42]], 6, True)])
def test_words_that_do_not_fit_are_told(
    model: Any, words: list[Any], tokens: int, met: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    call = {"prompts": PROMPTS[:1], "num_beams": 4, "force_words_ids": words, "max_new_tokens": tokens}
    made = generate(model, call)[0, len(PROMPTS[0]) :].tolist()
    assert (made[-3:] == words[0] or str(words[0])[1:-1] in str(made)) == met
    assert ("force_words_ids were not met" in caplog.text) != met


def test_the_prompt_is_stored_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from unspool.decode.runner import PagedRunner

    peaks: list[int] = []
    original = PagedRunner.run

    def watched(self: Any, work: Any, watch: bool) -> Any:
        output = original(self, work, watch)
        peaks.append(self.store.blocks[0].count - self.store.blocks[0].free)
        return output

    monkeypatch.setattr(PagedRunner, "run", watched)
    prompt = [3 + i % 50 for i in range(100)]  # 6 blocks and a part
    for mode in (GROUPS, WORDS):
        peaks.clear()
        generate(model, {"prompts": [prompt], **mode}, max_new_tokens=8)
        assert max(peaks) == 6 + mode["num_beams"]


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({**GROUPS, "num_beams": 4}, ValueError, r"num_beams \(4\).*num_beam_groups \(3\)"),
        ({**GROUPS, "num_beam_groups": 12}, ValueError, r"num_beams \(6\).*num_beam_groups \(12\)"),
        ({**GROUPS, "diversity_penalty": 0.0}, ValueError, "diversity_penalty above 0"),
        ({**GROUPS, "diversity_penalty": -1.0}, ValueError, "diversity_penalty"),
        ({**GROUPS, "do_sample": True}, ValueError, "num_beam_groups.*do_sample"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, ValueError, "diversity_penalty=1.0 needs num_beam_groups"),
        ({**GROUPS, "force_words_ids": [[5]]}, ValueError, "force_words_ids need num_beam_groups to be 1"),
        ({**WORDS, "do_sample": True}, ValueError, "force_words_ids need do_sample to be False"),
        ({**WORDS, "num_beams": 1}, ValueError, "force_words_ids need num_beams to be at least 2"),
        ({**WORDS, "force_words_ids": []}, ValueError, "force_words_ids must be a list"),
        ({**WORDS, "force_words_ids": [5]}, ValueError, "each phrase in force_words_ids.*5"),
        ({**WORDS, "force_words_ids": [[[5], [-1]]]}, ValueError, r"each phrase in force_words_ids.*\[-1\]"),
        ({**WORDS, "force_words_ids": [[[5], [5, 6]]]}, ValueError, "begin with another"),
        ({**WORDS, "force_words_ids": [[61]]}, ValueError, "token id 61.*vocabulary of 61"),
        ({"num_beams": 2, "constraints": []}, ValueError, "constraints must be a list"),
        ({"num_beams": 2, "constraints": [[5, 6]]}, TypeError, "constraints must hold Constraint objects, not list"),
    ],
)
def test_mistakes(model: Any, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], kind: Any, text: str) -> None:
    monkeypatch.setattr(model, "step", None, raising=False)  # nothing may be computed
    with pytest.raises(kind, match=text):
        model.generate(PROMPTS, max_new_tokens=3, **wrong)


def test_nothing_to_choose_is_said(tmp_path: Path) -> None:
    broken = make_model(tmp_path)
    broken.layers[1].mlp_norm.weight.data[3] = float("nan")
    for mode in (GROUPS, WORDS):
        with pytest.raises(NonFiniteLogits, match=r"row 0.*layer 1"):
            generate(broken, {"prompts": PROMPTS, **mode})


def test_a_constraint_that_cannot_be_followed_is_refused() -> None:
    class Never(tiny.some_sevens(unspool.Constraint)):  # type: ignore[misc]
        def does_advance(self, token_id: int) -> bool:
            return False

    with pytest.raises(ValueError, match=r"Never.does_advance\(\) must be true of what advance\(\) returns, here 7"):
        Never(2)


def test_states_of_a_list_of_constraints() -> None:
    state = unspool.ConstraintListState(
        [unspool.PhrasalConstraint([5, 6]), unspool.DisjunctiveConstraint([[7], [8, 9, 10]])]
    )
    assert state.advance() == [5, 7, 8]
    banks = []
    for token in (5, 5, 6, 8, 9, 3, 5, 6, 7):
        state.add(token)
        banks.append(state.get_bank())
    # a second 5 breaks the phrase and does not begin it anew
    assert banks == [2, 0, 0, 1, 2, 0, 2, 3, 6]
    assert state.completed
    fresh = state.copy(stateful=False)
    assert fresh.advance() == [5, 7, 8]
    fresh.reset([5, 6, 7, 1])
    assert fresh.completed
    assert fresh.add(4) == (True, False)


def test_diversity_is_counted_by_prompt() -> None:
    process = unspool.HammingDiversityLogitsProcessor(0.5, num_beams=4, num_beam_groups=2)
    scores = torch.zeros(4, 6)
    chosen = torch.tensor([1, 1, 0, 0, 2, 3, 0, 0])
    assert process(torch.empty(4, 0), scores, current_tokens=chosen, beam_group_idx=0).eq(0).all()
    second = process(torch.empty(4, 0), scores, current_tokens=chosen, beam_group_idx=1)
    assert second.tolist() == [[0, -1, 0, 0, 0, 0]] * 2 + [[0, 0, -0.5, -0.5, 0, 0]] * 2
    for wrong in ((0.0, 4, 2), (1.0, 4, 1), (1.0, 5, 2), (1.0, 2, 4)):
        with pytest.raises(ValueError, match="has to be"):
            unspool.HammingDiversityLogitsProcessor(*wrong)
