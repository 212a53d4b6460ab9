"""What a caller meets around the tokens: mistakes, faults, streams, seeds, threads, memory, synchronisations."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Refusal, faults

import unspool
from unspool.cache import PagedStore
from unspool.config.notice import warn_once
from unspool.logits import ops

Case = tuple[dict[str, Any], type[Exception], str]


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir: Path) -> tuple[Any, Any]:
    return unspool.load(tiny_llama_dir, dtype="float32", device="cpu")


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


IDS = torch.tensor([[5, 6, 7, 8]])
TWO = torch.tensor([[5, 6, 7], [8, 9, 10]])

MISTAKES: dict[str, Case] = {
    "id outside the vocabulary": ({"input_ids": torch.tensor([[5, 10**6]])}, ValueError, "1000000"),
    "negative id": ({"input_ids": torch.tensor([[5, -1]])}, ValueError, "-1"),
    "one dimension": ({"input_ids": torch.tensor([5, 6])}, ValueError, r"input_ids\[None\]"),
    "no rows": ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, ValueError, "at least one row"),
    "floats": ({"input_ids": torch.tensor([[5.0]])}, TypeError, "integer"),
    "text": ({"input_ids": "once"}, TypeError, "tokenizer"),
    "both names": ({"inputs": IDS, "input_ids": IDS}, ValueError, "not both"),
    "mask of another shape": ({"attention_mask": torch.ones(1, 3)}, ValueError, r"\[1, 3\]"),
    "mask with other values": ({"attention_mask": torch.full((1, 4), 2)}, ValueError, "0 .* and 1"),
    "mask of nothing": ({"attention_mask": torch.zeros(1, 4)}, ValueError, "row 0 is empty"),
    "list with an empty prompt": ({"input_ids": [[5], []]}, ValueError, "non-empty"),
    "misspelt setting": ({"temprature": 2.0}, ValueError, "temprature"),
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    "negative length": ({"max_new_tokens": -3}, ValueError, "max_new_tokens"),
    "length of another type": ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens"),
    "length below the prompt": ({"max_length": 3}, ValueError, "max_length"),
    "absurd length": ({"max_new_tokens": 10**12}, ValueError, "max_new_tokens"),
    "prompt beyond the positions": ({"input_ids": torch.full((1, 600), 5)}, ValueError, "512"),
    "greedy with several results": (
        {"num_return_sequences": 2, "do_sample": False},
        ValueError,
        "num_return_sequences",
    ),
    "negative temperature": ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
    "stop strings without a tokenizer": ({"stop_strings": ["x"]}, ValueError, "tokenizer"),
    "a past that is none": ({"past_key_values": [1]}, TypeError, "past_key_values"),
    "more results than beams": ({"num_beams": 2, "num_return_sequences": 3}, ValueError, r"num_beams \(2\)"),
    "groups that do not divide the beams": (
        {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 0.5},
        ValueError,
        "num_beam_groups",
    ),
    "an assistant": ({"assistant_model": object()}, TypeError, "assistant_model"),
    "processors in no list": ({"logits_processor": 3}, TypeError, "logits_processor must be a list"),
    "a processor in no list": ({"logits_processor": len}, TypeError, r"pass logits_processor=\[...\]"),
    "a processor that is none": ({"logits_processor": [3]}, TypeError, "logits_processor holds 3"),
    "a criterion that is none": ({"stopping_criteria": [3]}, TypeError, "stopping_criteria holds 3"),
    "a prefix function that is none": (
        {"prefix_allowed_tokens_fn": 3},
        TypeError,
        "prefix_allowed_tokens_fn must be a function",
    ),
    "a streamer that is none": ({"streamer": 3}, TypeError, "streamer must have the methods"),
    "layers for drafts": ({"use_mtp": True}, unspool.errors.Unsupported, "use_mtp=True"),
    "a kind of drafts": (
        {"prompt_lookup_num_tokens": 2, "speculation_type": "x"},
        unspool.errors.Unsupported,
        "speculation_type='x'",
    ),
    "an ensemble of one": (
        {"prompt_lookup_num_tokens": 2, "assistant_ensemble_weight": 0.5},
        ValueError,
        "assistant_ensemble_weight=0.5 .* leave one of them out",
    ),
    "an assistant without scores": (
        {"is_assistant": True},
        ValueError,
        "is_assistant=True .* needs output_scores=True",
    ),
    "a mask without its prompt": (
        {"guidance_scale": 2.0, "negative_prompt_attention_mask": IDS},
        ValueError,
        "pass both",
    ),
    "an empty bad word": ({"bad_words_ids": [[]]}, ValueError, "non-empty lists"),
    "a decay that is no pair": ({"exponential_decay_length_penalty": 3}, ValueError, "a pair"),
    "a compile mode": ({"compile_config": {"mode": "fast"}}, ValueError, "compile_config.mode must be one of"),
    "a compile flag": ({"compile_config": {"dynamic": 1}}, TypeError, "compile_config.dynamic"),
    "fullgraph": ({"compile_config": {"fullgraph": 1}}, TypeError, "compile_config.fullgraph"),
    "a compiler": ({"compile_config": {"backend": 1}}, TypeError, "compile_config.backend"),
    "options of a compiler": ({"compile_config": {"options": 1}}, TypeError, "compile_config.options"),
    "more outputs than memory": (
        {"do_sample": True, "num_return_sequences": 10**10},
        unspool.errors.OutOfMemory,
        "copies need",
    ),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_one_clear_error_and_harms_nothing(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs, kind, text = MISTAKES[name]
    before = model.generate(IDS, max_new_tokens=3).tolist()
    given = kwargs if {"inputs", "input_ids"} & set(kwargs) else {"input_ids": IDS, **kwargs}
    monkeypatch.setattr(type(model), "step", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(kind, match=text) as caught:
        model.generate(**given)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert model.generate(IDS, max_new_tokens=3).tolist() == before


def test_no_prompt_starts_from_bos_or_says_that_there_is_none(model: Any) -> None:
    bos = model.generation_config.bos_token_id
    assert model.generate(max_new_tokens=2)[0, 0] == bos
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(max_new_tokens=2, generation_config=unspool.GenerationConfig(), bos_token_id=None)


def test_padding_is_inferred_only_where_it_is_unambiguous(model: Any) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
    alone = model.generate(IDS, **kwargs)[0, 4:].tolist()
    for ids in (torch.tensor([[2, 2, 5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 8, 2, 2]])):
        assert model.generate(ids, pad_token_id=2, **kwargs)[0, 6:].tolist() == alone
    as_text = model.generate(torch.tensor([[2, 2, 5, 6, 7, 8]]), pad_token_id=2, max_new_tokens=6, eos_token_id=2)
    masked = model.generate(
        torch.tensor([[2, 2, 5, 6, 7, 8]]), attention_mask=torch.ones(1, 6), max_new_tokens=6, eos_token_id=2
    )
    assert as_text.tolist() == masked.tolist(), "a pad that is an end token may be part of the prompt"


class TestNaN:
    def test_names_row_and_layer(self, tiny_llama_dir: Path) -> None:
        model, _ = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")
        model.layers[1].mlp_norm.weight.data[3] = float("nan")
        for do_sample in (False, True):
            with pytest.raises(unspool.errors.NonFiniteLogits, match=r"row 0.*layer 1") as caught:
                model.generate(IDS, do_sample=do_sample, max_new_tokens=4)
            assert caught.value.row == 0

    def test_names_embedding_and_head(self, tiny_llama_dir: Path) -> None:
        model, _ = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")
        model.embedding.weight.data[5] = float("inf")
        with pytest.raises(unspool.errors.NonFiniteLogits, match="embedding"):
            model.generate(IDS, max_new_tokens=4)

    def test_a_processor_that_leaves_nothing(self, model: Any) -> None:
        def nothing(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * float("nan")

        with pytest.raises(unspool.errors.NonFiniteLogits, match="processor"):
            model.generate(IDS, logits_processor=[nothing], max_new_tokens=4)


class TestSeeds:
    def test_a_row_is_the_same_in_any_company(self, model: Any) -> None:
        kwargs: dict[str, Any] = {"do_sample": True, "seed": 7, "max_new_tokens": 12, "top_k": 0, "eos_token_id": None}
        alone = model.generate([[5, 6, 7]], **kwargs)[0, 3:].tolist()
        torch.manual_seed(99)
        together = model.generate([[8, 9, 10, 11, 12], [5, 6, 7], [13]], **kwargs)
        assert together[1, 5:].tolist() == alone

    def test_samples_differ_and_seeds_differ(self, model: Any) -> None:
        kwargs: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "top_k": 0, "num_return_sequences": 4}
        rows = model.generate(IDS, seed=7, **kwargs).tolist()
        assert len({tuple(row) for row in rows}) == 4
        assert rows != model.generate(IDS, seed=8, **kwargs).tolist()
        assert rows == model.generate(IDS, seed=7, **kwargs).tolist()

    def test_the_global_generator_is_left_alone(self, model: Any) -> None:
        torch.manual_seed(3)
        state = torch.get_rng_state()
        model.generate(IDS, do_sample=True, seed=1, max_new_tokens=5)
        model.generate(IDS, do_sample=False, max_new_tokens=5)
        assert torch.get_rng_state().equal(state)

    def test_frequencies_follow_the_distribution(self, model: Any) -> None:
        """First tokens of 4,000 seeded rows against the model's own probabilities, chi-squared over the likely ones."""
        with torch.no_grad():
            p = model(IDS).logits[0, -1].softmax(-1)
        kwargs: dict[str, Any] = {"do_sample": True, "max_new_tokens": 1, "top_k": 0}
        first = model.generate(IDS, seed=5, num_return_sequences=4000, **kwargs)[:, -1]
        counts = torch.bincount(first, minlength=len(p)).double()
        likely = p * 4000 >= 5
        expected = torch.cat([p[likely], p[~likely].sum()[None]]).double() * 4000
        seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
        degrees = len(expected) - 1
        statistic = float(((seen - expected) ** 2 / expected).sum())
        assert statistic < degrees + 4 * (2 * degrees) ** 0.5, "four deviations of chi-squared"


class TestStreams:
    def test_text_is_the_decoded_output(self, loaded: tuple[Any, Any]) -> None:
        model, tokenizer = loaded
        ids = tokenizer("Once upon", return_tensors="pt").input_ids
        streamer = unspool.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.start(model.generate, ids, max_new_tokens=20, do_sample=False)
        text = "".join(streamer)
        out = model.generate(ids, max_new_tokens=20, do_sample=False)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def test_batches_stream_row_by_row(self, loaded: tuple[Any, Any]) -> None:
        model, tokenizer = loaded
        prompts = [tokenizer("Once upon").input_ids, tokenizer("The fox met an owl, and").input_ids]
        streamer = unspool.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.start(model.generate, prompts, max_new_tokens=16, do_sample=False)
        pieces = list(streamer)
        out = model.generate(prompts, max_new_tokens=16, do_sample=False)
        width = max(map(len, prompts))
        for row in range(2):
            text = tokenizer.decode(out[row, width:], skip_special_tokens=True)
            assert "".join(piece[row] for piece in pieces) == text

    def test_a_failure_ends_the_stream_with_its_exception(self, loaded: tuple[Any, Any]) -> None:
        model, tokenizer = loaded

        def fails(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 6:
                raise RuntimeError("on purpose")
            return scores

        streamer = unspool.TextIteratorStreamer(tokenizer)
        thread = threading.Thread(target=_quietly, args=(model, streamer, fails))
        thread.start()
        with pytest.raises(RuntimeError, match="on purpose"):
            list(streamer)
        thread.join()

    def test_a_plain_streamer_gets_what_transformers_gives(self, model: Any) -> None:
        got: list[list[Any]] = []

        class Plain:
            def put(self, value: torch.Tensor) -> None:
                got.append(value.tolist())

            def end(self) -> None:
                got.append([])

        out = model.generate(IDS, streamer=Plain(), max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert got == [IDS.tolist(), *[[token] for token in out[0, 4:].tolist()], []]


def _quietly(model: Any, streamer: Any, processor: Any) -> None:
    with pytest.raises(RuntimeError):
        model.generate(IDS, streamer=streamer, logits_processor=[processor], max_new_tokens=20)


def test_stop_strings_say_why_a_row_ended(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    free = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    stop = tokenizer.decode(free[0, 6:8])
    out = model.generate(
        [IDS[0].tolist(), [9, 10]], max_new_tokens=12, do_sample=False, eos_token_id=None, stop_strings=[stop],
        tokenizer=tokenizer, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.finish_reasons[0] == "stop"
    assert tokenizer.decode(out.sequences[0, 4:]).count(stop) >= 1
    assert out.finish_reasons[1] in ("stop", "length")
    assert out.sequences.shape[1] <= 16


def test_max_time_ends_every_row(model: Any) -> None:
    out = model.generate(IDS, max_new_tokens=400, max_time=1e-9, eos_token_id=None)
    assert out.shape == (1, 5)


def test_outputs_are_tuples_and_dictionaries_too(model: Any) -> None:
    out = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, eos_token_id=None)
    assert isinstance(out, unspool.GenerateDecoderOnlyOutput)
    assert out[0] is out.sequences is out["sequences"]
    assert out[1] is out.scores
    assert list(out) == ["sequences", "scores", "past_key_values", "finish_reasons"]
    assert len(out.to_tuple()) == 4
    assert out.logits is None
    assert model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, use_cache=False).past_key_values is None
    (out.sequences + 1).add_(1)  # ordinary tensors: the caller may compute with them
    out.sequences.add_(1)
    assert not out.scores[0].is_inference()


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=["one", "beams", "drafts"]
)
def test_outputs_can_be_copied_and_pickled(model: Any, mode: dict[str, Any]) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    out = model.generate(IDS, return_dict_in_generate=True, output_scores=True, output_top_logprobs=2, **kwargs, **mode)
    for again in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out), copy.copy(out)):
        assert type(again) is type(out)
        assert list(again) == list(out)
        assert again[0] is again.sequences
        assert again.sequences.tolist() == out.sequences.tolist()
        assert torch.equal(again.scores[1], out.scores[1])
        assert torch.equal(again.top_logprobs.ids, out.top_logprobs.ids)
        follow = model.generate(out.sequences, past_key_values=again.past_key_values, **kwargs)
        assert follow.tolist() == model.generate(out.sequences, **kwargs).tolist()


def test_a_past_can_be_cropped(model: Any) -> None:
    first = model.generate(IDS, max_new_tokens=6, return_dict_in_generate=True, do_sample=False, eos_token_id=None)
    first.past_key_values.crop(-3)
    assert first.past_key_values.get_seq_length() == 6
    again = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert (
        again.tolist() == model.generate(first.sequences, max_new_tokens=4, do_sample=False, eos_token_id=None).tolist()
    )
    with pytest.raises(ValueError, match="crop"):
        first.past_key_values.crop(100)


def test_calls_in_threads_do_not_disturb_each_other(model: Any) -> None:
    prompts = [[5 + i, 6 + i, 7 + i] for i in range(6)]
    expected = [model.generate([p], max_new_tokens=15, do_sample=False)[0].tolist() for p in prompts]
    got: dict[int, list[int]] = {}

    def call(i: int) -> None:
        got[i] = model.generate([prompts[i]], max_new_tokens=15, do_sample=False)[0].tolist()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(6)] == expected


def test_keys_and_values_go_with_the_call(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[weakref.ref[PagedStore]] = []
    original = PagedStore.__init__

    def watched(self: PagedStore, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        stores.append(weakref.ref(self))

    monkeypatch.setattr(PagedStore, "__init__", watched)
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    model.generate([[5, 6], [7, 8, 9]], max_new_tokens=30, do_sample=True)
    gc.collect()
    assert stores
    assert all(store() is None for store in stores)
    assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) <= tensors


def test_the_device_is_asked_nothing_but_the_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the calls that would wait for a device: one `tolist` of the tokens a step, and nothing else."""
    asked: list[str] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counting(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
            asked.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    kwargs: dict[str, Any] = {
        "do_sample": True,
        "top_k": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "eos_token_id": None,
    }
    model.generate([[5, 6, 7], [8, 9]], max_new_tokens=4, **kwargs)
    few = list(asked)
    asked.clear()
    model.generate([[5, 6, 7], [8, 9]], max_new_tokens=24, **kwargs)
    assert len(asked) - len(few) == 20
    assert asked.count("tolist") - few.count("tolist") == 20


def test_logits_are_computed_only_for_rows_that_choose(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    fed: list[int] = []
    original = type(model).step

    def watched(self: Any, batch: Any) -> torch.Tensor:
        logits = original(self, batch)
        rows.append(len(logits))
        fed.append(len(batch.tokens))
        return logits

    monkeypatch.setattr(type(model), "step", watched)
    free = model.generate([[5, 6, 7], [8, 9], [4]], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert rows == [3] * 6
    assert fed == [6] + [3] * 5
    rows.clear()
    fed.clear()
    ends = [free[row, 4].item() for row in (0, 1)]  # the second new token of two rows ends them
    model.generate([[5, 6, 7], [8, 9], [4]], max_new_tokens=6, do_sample=False, eos_token_id=ends)
    assert fed[2:] == [1] * len(fed[2:])
    rows.clear()
    fed.clear()
    model.generate([[5, 6, 7]], max_new_tokens=2, do_sample=True, num_return_sequences=5, eos_token_id=None)
    assert fed == [3, 5], "a shared prompt is computed once"
    rows.clear()
    model.generate([[5, 6, 7, 8, 9]], max_new_tokens=2, prefill_chunk_size=2, do_sample=False, eos_token_id=None)
    assert rows == [0, 0, 1, 1]


def test_a_plan_one_step_behind_gives_the_same_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the host commits the step before; the same order of work, here on the CPU."""
    import unspool.decode.loop as loop

    prompts = [[5, 6, 7], [8, 9], [4]]
    free = model.generate(prompts, max_new_tokens=10, do_sample=False, eos_token_id=None)
    ends = [free[0, 6].item(), free[2, 5].item()]
    kwargs: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": ends, "pad_token_id": 2}
    settings: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "seed": 4, "num_return_sequences": 2}]
    expected = [model.generate(prompts, **kwargs, **setting).tolist() for setting in settings]
    original = loop.Loop.__init__

    def behind(self: Any, *args: Any, **kw: Any) -> None:
        original(self, *args, **kw)
        self.in_step = False

    monkeypatch.setattr(loop.Loop, "__init__", behind)
    assert [model.generate(prompts, **kwargs, **setting).tolist() for setting in settings] == expected


def test_memory_that_is_not_there_is_said_before_it_is_taken(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else real(name))
    with pytest.raises(unspool.errors.OutOfMemory, match="max_new_tokens"):
        model.generate(IDS, max_new_tokens=100)
    monkeypatch.undo()
    assert model.generate(IDS, max_new_tokens=3).shape == (1, 7)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True},
    "beams": {"num_beams": 2},
    "groups": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained": {"num_beams": 2, "force_words_ids": [[5]]},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "early exit": {"assistant_early_exit": 1},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "dola": {"dola_layers": "high", "repetition_penalty": 1.2},
    "guided": {"guidance_scale": 1.5},
    "guided drafts": {"guidance_scale": 1.5, "assistant_early_exit": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fault_of_the_callers_says_in_which_step(model: Any, way: str) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **WAYS[way]}
    torch.manual_seed(0)
    before = model.generate(IDS, **kwargs).tolist()
    stores = _stores()
    for fault in faults():
        with pytest.raises(Refusal, match="no") as caught:
            model.generate(IDS, **kwargs, **fault)
        assert any("raised in step" in note for note in caught.value.__notes__), fault
        del caught
    assert _stores() <= stores, "keys and values of calls that failed are let go"
    torch.manual_seed(0)
    assert model.generate(IDS, **kwargs).tolist() == before


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_model_says_in_which_step(model: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, calls = type(model).body, iter(range(100))

    def fail(self: Any, batch: Any) -> Any:
        if next(calls) == 2:
            raise Refusal("the third time")
        return inner(self, batch)

    monkeypatch.setattr(type(model), "body", fail)
    monkeypatch.setattr(type(model), "go_on", lambda *args: None)  # so that drafts go through there too
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **WAYS[way]}
    with pytest.raises(Refusal, match="the third time") as caught:
        model.generate(IDS, **kwargs)
    assert [note for note in caught.value.__notes__ if note.startswith("raised in step")]


def test_processors_and_criteria_may_come_from_an_iterator(model: Any) -> None:
    def ban(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([free]), float("-inf"))

    free = int(model.generate(IDS, max_new_tokens=1)[0, -1])
    assert int(model.generate(IDS, max_new_tokens=1, logits_processor=(one for one in [ban]))[0, -1]) != free
    stopped = model.generate(IDS, max_new_tokens=9, stopping_criteria=(one for one in [lambda ids, scores: True]))
    assert stopped.shape[1] == IDS.shape[1] + 1


@pytest.mark.parametrize("way", [*WAYS, "bans", "requests"])
def test_torchs_default_device_changes_nothing(model: Any, way: str) -> None:
    """Not even where nothing can be computed on it."""
    more = {"bad_words_ids": [[5], [6, 7]], "sequence_bias": {(9,): 1.0}} if way == "bans" else WAYS.get(way, {})
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": way == "sample", **more}

    def tokens() -> list[Any]:
        torch.manual_seed(0)
        if way != "requests":
            return list(model.generate(IDS, **kwargs).tolist())
        outputs = model.generate_batch(IDS.tolist(), progress_bar=False, **kwargs | {"do_sample": True})
        return [output.generated_tokens for output in outputs.values()]

    expected = tokens()
    with torch.device("meta"):
        assert tokens() == expected


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def another_default_dtype(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What sets torch's default dtype, which is as it was afterwards."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("way", [*WAYS, "seed"])
def test_torchs_default_dtype_changes_nothing(model: Any, way: str, another_default_dtype: Any) -> None:
    more = {"do_sample": True, "seed": 3} if way == "seed" else WAYS[way]
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **more}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_top_logprobs": 2}
    told = []
    for prepare in (lambda: None, another_default_dtype):
        prepare()
        torch.manual_seed(0)
        out = model.generate(IDS, **kwargs)
        told.append(out)
    ours, theirs = told
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("sequences_scores", "token_logprobs"):
        if getattr(ours, name, None) is not None:
            assert getattr(theirs, name).dtype == torch.float32
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(
    "options", [{"quantize": one} for one in ("int8", "int4", "nf4")] + [{"adapter": True}], ids=str
)
def test_torchs_default_dtype_changes_nothing_of_what_is_loaded(
    options: dict[str, Any], another_default_dtype: Any
) -> None:
    told = []
    for prepare in (lambda: None, another_default_dtype):
        prepare()
        model, _ = unspool.load("storyteller", quantize=options.get("quantize"))
        if "adapter" in options:
            model.load_adapter("storyteller-pirate")
        told.append(model.generate(IDS, max_new_tokens=6, do_sample=False).tolist())
    assert told[0] == told[1]


@pytest.mark.parametrize("rows", [1, 5])
def test_torchs_default_dtype_and_how_sure_a_draft_is(rows: int, another_default_dtype: Any) -> None:
    scores = torch.randn(rows, 1000, generator=torch.Generator().manual_seed(1))
    tokens = ops.greatest(scores)
    expected = ops.sureness(scores, tokens)
    another_default_dtype()
    with torch.no_grad():
        assert ops.sureness(scores, tokens) == pytest.approx(expected)


def _stores() -> int:
    gc.collect()
    return sum(type(one).__name__ == "PagedStore" for one in gc.get_objects())


def test_rows_that_ended_are_never_fed_a_token_that_is_none(model: Any) -> None:
    free = model.generate(TWO, max_new_tokens=6, do_sample=False, eos_token_id=None)
    end = free[0, TWO.shape[1] + 1].item()
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": end, "pad_token_id": 10**6}
    out = model.generate(TWO, **kwargs)
    assert out[0, TWO.shape[1] + 2 :].eq(10**6).all()
    with pytest.raises(ValueError, match="pad_token_id=1000000 is none of the model's"):
        model.generate(TWO, return_dict_in_generate=True, output_scores=True, **kwargs)
    assert model.generate(TWO[:1], return_dict_in_generate=True, output_scores=True, **kwargs).sequences.shape[0] == 1


def test_settings_without_effect_are_mentioned(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    for idle, said in (
        ({"cache_config": {"nbits": 8}}, "cache_config has no effect"),
        ({"compile_config": {"mode": "default"}}, "nothing is compiled"),
        ({"negative_prompt_ids": IDS}, "no effect without guidance_scale"),
        ({"assistant_model": model, "prompt_lookup_num_tokens": 2}, "assistant_model has no effect beside"),
    ):
        warn_once.cache_clear()
        model.generate(IDS, max_new_tokens=2, do_sample=False, **idle)
        assert said in caplog.text


def test_a_misspelt_setting_names_the_nearest(model: Any) -> None:
    with pytest.raises(ValueError, match=r"max_new_token \(did you mean max_new_tokens\?\)"):
        model.generate(IDS, max_new_token=3)
    with pytest.raises(ValueError, match=r"temprature, top_kk .did you mean temperature, top_k"):
        model.generate(IDS, temprature=0.5, top_kk=3)


def test_texts_and_encodings_in_place_of_ids_are_refused_with_the_way_out() -> None:
    model, tokenizer = unspool.load("storyteller", device="cpu")
    encoded = tokenizer(["Once"], return_tensors="pt")
    with pytest.raises(TypeError, match=r"not BatchEncoding; .*generate\(\*\*inputs\)"):
        model.generate(encoded)
    with pytest.raises(ValueError, match="texts are encoded by the tokenizer"):
        model.generate(["Once"])
    for given in (encoded, "Once", ["Once", "Twice"]):
        with pytest.raises(TypeError, match=r"pass tokenizer\(texts\).input_ids"):
            model.generate_batch(given)
    with pytest.raises(ValueError, match="did you mean max_new_tokens"):
        model.generate_batch([[5]], max_new_token=3)
    (output,) = model.generate_batch(encoded.input_ids, max_new_tokens=2, priority=1, do_sample=False).values()
    assert output.generated_tokens == model.generate(**encoded, max_new_tokens=2, do_sample=False)[0, -2:].tolist()


def test_a_text_for_a_module_is_refused_with_the_way_out() -> None:
    class Counter(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(input_ids, 11).float()

    with pytest.raises(TypeError, match=r"not str; .*generate\(\*\*inputs\)"):
        unspool.wrap(Counter()).generate("Once")
