"""Contradictions that the pages of the API name and that users met: each one clear error before any computation.

What a file of the model says is never held against the caller, and what changes no text (an option for drafts in a call
without any) is a remark. Mistakes of one argument are in `unit/test_generate_call.py`.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Refusal, faults
from torch import Tensor, nn

import unspool
from unspool.config.notice import warn_once

IDS = torch.tensor([[5, 6, 7, 8]])
ROWS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir: Path) -> tuple[Any, Any]:
    return unspool.load(tiny_llama_dir, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs(tiny_llama_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    unspool.wrap(model).generate(IDS, max_new_tokens=1)  # it is looked at once, by running it
    return model


@pytest.fixture
def steps(loaded: tuple[Any, Any], theirs: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that either model ran."""
    counted: list[int] = []
    for kind, name in ((type(loaded[0]), "step"), (type(theirs), "forward")):
        original = getattr(kind, name)

        def counting(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            counted.append(1)
            return _original(*args, **kwargs)

        monkeypatch.setattr(kind, name, counting)
    return counted


def keep(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores


def past(kind: Any) -> Any:
    """Stands for the keys and values of an earlier call on the native model, made when the test runs."""
    return lambda model: (
        model.generate(
            IDS[:, :2], max_new_tokens=1, return_dict_in_generate=True, cache_implementation=kind
        ).past_key_values
    )


# settings of a call; what the error must say (all of it)
CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # the pages: "if a logit processor (stopping criterion) is passed that is already created ... an error is thrown"
    "a processor twice": (
        {"repetition_penalty": 1.2, "logits_processor": [unspool.RepetitionPenaltyLogitsProcessor(1.5)]},
        ("repetition_penalty=1.2", "RepetitionPenaltyLogitsProcessor in logits_processor", "leave one of them out"),
    ),
    "a warper twice": (
        {"do_sample": True, "temperature": 0.5, "logits_processor": [unspool.TemperatureLogitsWarper(0.7)]},
        ("temperature=0.5", "TemperatureLogitsWarper in logits_processor", "leave one of them out"),
    ),
    "a processor twice, by an object": (
        {
            "generation_config": unspool.GenerationConfig(bad_words_ids=[[5]]),
            "logits_processor": [unspool.NoBadWordsLogitsProcessor([[6]])],
        },
        ("bad_words_ids=[[5]]", "NoBadWordsLogitsProcessor", "leave one of them out"),
    ),
    "a prefix function twice": (
        {
            "prefix_allowed_tokens_fn": lambda row, ids: [5],
            "logits_processor": [unspool.PrefixConstrainedLogitsProcessor(lambda row, ids: [6], 1)],
        },
        ("prefix_allowed_tokens_fn=", "PrefixConstrainedLogitsProcessor", "leave one of them out"),
    ),
    "a length twice": (
        {"max_new_tokens": 9, "stopping_criteria": [unspool.MaxLengthCriteria(6)]},
        ("max_new_tokens=9", "MaxLengthCriteria in stopping_criteria", "leave one of them out"),
    ),
    "a time twice": (
        {"max_time": 9.0, "stopping_criteria": [unspool.MaxTimeCriteria(6.0)]},
        ("max_time=9.0", "MaxTimeCriteria in stopping_criteria", "leave one of them out"),
    ),
    "an end twice": (
        {"eos_token_id": 9, "stopping_criteria": [unspool.EosTokenCriteria(6)]},
        ("eos_token_id=9", "EosTokenCriteria in stopping_criteria", "leave one of them out"),
    ),
    # beams
    "more results than beams": (
        {"num_beams": 2, "num_return_sequences": 3},
        ("num_return_sequences (3)", "num_beams (2)"),
    ),
    "greedy with several results": (
        {"num_return_sequences": 2, "do_sample": False},
        ("num_return_sequences=2", "do_sample=True", "num_beams"),
    ),
    "groups that do not divide": (
        {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 0.5},
        ("num_beams (4)", "num_beam_groups (3)", "multiple"),
    ),
    "groups without beams": (
        {"num_beam_groups": 2, "diversity_penalty": 0.5},
        ("num_beams (1)", "num_beam_groups (2)", "multiple"),
    ),
    "groups that are alike": ({"num_beams": 4, "num_beam_groups": 2}, ("num_beam_groups", "diversity_penalty above 0")),
    "groups that sample": (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": True},
        ("num_beam_groups > 1", "do_sample=True", "leave one of them out"),
    ),
    "diversity of one group": (
        {"num_beams": 4, "diversity_penalty": 0.5},
        ("diversity_penalty=0.5", "num_beam_groups of at least 2"),
    ),
    "words without beams": ({"force_words_ids": [[5]]}, ("force_words_ids", "num_beams to be at least 2")),
    "words by sampling": (
        {"force_words_ids": [[5]], "num_beams": 2, "do_sample": True},
        ("force_words_ids", "do_sample to be False"),
    ),
    "words in groups": (
        {"force_words_ids": [[5]], "num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
        ("force_words_ids", "num_beam_groups to be 1"),
    ),
    # strategies beside each other
    "contrast with beams": (
        {"penalty_alpha": 0.6, "top_k": 4, "num_beams": 2},
        ("penalty_alpha=0.6", "num_beams=2", "leave one of them out"),
    ),
    "contrast that samples": (
        {"penalty_alpha": 0.6, "top_k": 4, "do_sample": True},
        ("penalty_alpha=0.6", "do_sample=True", "leave one of them out"),
    ),
    "contrast of one candidate": (
        {"penalty_alpha": 0.6, "top_k": 1},
        ("penalty_alpha=0.6", "top_k is 1", "at least 2"),
    ),
    "contrast with layers": (
        {"penalty_alpha": 0.6, "top_k": 4, "dola_layers": "low"},
        ("penalty_alpha=0.6", "dola_layers='low'", "leave one of them out"),
    ),
    "contrast with drafts": (
        {"penalty_alpha": 0.6, "top_k": 4, "prompt_lookup_num_tokens": 2},
        ("penalty_alpha=0.6", "prompt_lookup_num_tokens=2", "leave one of them out"),
    ),
    "layers with beams": (
        {"dola_layers": "low", "num_beams": 2},
        ("dola_layers='low'", "num_beams=2", "leave one of them out"),
    ),
    "layers with drafts": (
        {"dola_layers": "low", "assistant_early_exit": 1},
        ("dola_layers='low'", "assistant_early_exit=1", "leave one of them out"),
    ),
    # drafts
    "half an ensemble": (
        {"prompt_lookup_num_tokens": 2, "assistant_ensemble_weight": 0.5},
        ("assistant_ensemble_weight=0.5", "prompt_lookup_num_tokens", "leave one of them out"),
    ),
    "an assistant without scores": (
        {"is_assistant": True, "assistant_confidence_threshold": 0.3},
        ("is_assistant=True", "assistant_confidence_threshold=0.3", "output_scores=True"),
    ),
    # texts
    "two structures": (
        {"regex": "a", "json_schema": {"type": "integer"}},
        ("json_schema and regex", "set one to None"),
    ),
    "a structure without its tokenizer": (
        {"json_schema": {"type": "integer"}, "tokenizer": None},
        ("json_schema", "pass `tokenizer=`"),
    ),
    "a structure without an end": ({"regex": "a", "eos_token_id": None}, ("regex", "pass `eos_token_id=`")),
    "stop strings without a tokenizer": ({"stop_strings": "x", "tokenizer": None}, ("stop_strings", "`tokenizer=`")),
    "healing without a tokenizer": ({"token_healing": True, "tokenizer": None}, ("token_healing", "tokenizer=")),
    "a name for a tokenizer": ({"stop_strings": "x", "tokenizer": "gpt2"}, ("tokenizer must be", "'gpt2'")),
    # tokens
    "an end that is suppressed": (
        {"forced_eos_token_id": 5, "suppress_tokens": [5]},
        ("forced_eos_token_id=5", "suppress_tokens", "drop one of them"),
    ),
    "a decay without an end": (
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": None},
        ("exponential_decay_length_penalty", "set `eos_token_id` too"),
    ),
    "a forced token that is none": ({"forced_eos_token_id": 9999}, ("forced_eos_token_id", "9999", "tokenizer")),
    "a banned token that is none": ({"bad_words_ids": [[5, 9999]]}, ("bad_words_ids", "9999", "tokenizer")),
    "a biased token that is none": ({"sequence_bias": {(9999,): 1.0}}, ("sequence_bias", "9999", "tokenizer")),
    "a bias that is none": ({"sequence_bias": {(5,): float("nan")}}, ("sequence_bias", "nan")),
    "a prompt of another vocabulary": ({"input_ids": torch.tensor([[5, 9999]])}, ("9999", "tokenizer")),
    # guidance
    "guidance of other rows": (
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[5], [6], [7]]), "input_ids": ROWS},
        ("negative_prompt_ids has 3 rows for 2 prompts", "pass one for each"),
    ),
    "guidance by tokens that are none": (
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[9999]])},
        ("negative_prompt_ids", "vocabulary", "tokenizer"),
    ),
    "a mask without its prompt": (
        {"guidance_scale": 2.0, "negative_prompt_attention_mask": IDS},
        ("negative_prompt_attention_mask", "negative_prompt_ids", "pass both"),
    ),
    # lengths
    "no room": (
        {"max_length": 3, "max_new_tokens": None},
        ("the prompt has 4 tokens", "max_length is 3", "max_new_tokens"),
    ),
    "zero to sample": ({"do_sample": True, "temperature": 0.0}, ("temperature", "do_sample=False")),
    # several processes
    "in step with nobody": ({"synced_gpus": True}, ("synced_gpus=True", "torch.distributed", "leave it out")),
    # names
    "a misspelt setting": ({"max_new_token": 3}, ("max_new_token", "did you mean max_new_tokens?")),
    "a misspelt input": ({"atention_mask": IDS}, ("atention_mask", "did you mean attention_mask?")),
    "a name of another library": ({"response_format": {}}, ("response_format", "did you mean json_schema?")),
    "a generator of torch": ({"generator": torch.Generator()}, ("generator", "did you mean seed?")),
    # objects
    "a class for an object": (
        {"logits_processor": [unspool.TemperatureLogitsWarper]},
        ("TemperatureLogitsWarper", "make an object of it"),
    ),
    "a streamer's class": ({"streamer": unspool.TextStreamer}, ("TextStreamer", "make an object of it")),
    "no function": ({"custom_generate": 3}, ("custom_generate must be a function, a folder", "3")),
    "code of strangers": (
        {"custom_generate": "someone/elses"},
        ("custom_generate='someone/elses'", "trust_remote_code=True"),
    ),
}

# what only native models, or only modules, can meet
NATIVE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a cache of another kind": (
        {"cache_implementation": "quantized", "past_key_values": past(None)},
        ("cache_implementation='quantized'", "past_key_values", "leave one of them out"),
    ),
    "a past of other rows": (
        {"past_key_values": past(None), "input_ids": ROWS},
        ("past_key_values holds 1 rows", "input_ids 2"),
    ),
    "a past that contrast cannot read": (
        {"past_key_values": past(None), "penalty_alpha": 0.6, "top_k": 3},
        ("penalty_alpha", "past_key_values", "leave it out"),
    ),
    "embeddings with a past": (
        {"inputs_embeds": torch.zeros(1, 3, 32), "input_ids": None, "past_key_values": past(None)},
        ("inputs_embeds and past_key_values", "pass input_ids"),
    ),
    "embeddings with drafts": (
        {"inputs_embeds": torch.zeros(1, 3, 32), "input_ids": None, "prompt_lookup_num_tokens": 2},
        ("inputs_embeds and drafts", "pass input_ids"),
    ),
    "embeddings with healing": (
        {"inputs_embeds": torch.zeros(1, 3, 32), "input_ids": None, "token_healing": True},
        ("token_healing needs input_ids", "inputs_embeds"),
    ),
    "bits that the cache has not": (
        {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
        ("cache_config", "8 bits", "leave it out"),
    ),
    "more layers than there are": ({"assistant_early_exit": 2}, ("assistant_early_exit=2", "2 layers", "choose fewer")),
    "an adapter nobody loaded": ({"adapter_names": ["mine"]}, ("'mine'", "load_adapter()")),
}

WRAPPED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a past of a native model": ({"past_key_values": past(None)}, ("past_key_values", "native model", "leave it out")),
    "two caches": (
        {"cache_implementation": "static", "past_key_values": unspool.DynamicCache()},
        ("cache_implementation='static'", "past_key_values", "pass one"),
    ),
    "drafts without a cache": (
        {"prompt_lookup_num_tokens": 2, "use_cache": False},
        ("use_cache=False", "prompt_lookup_num_tokens", "leave one out"),
    ),
    "drafts in a static cache": (
        {"prompt_lookup_num_tokens": 2, "cache_implementation": "static"},
        ("cache_implementation='static'", "prompt_lookup_num_tokens", "leave one out"),
    ),
    "drafts with guidance": (
        {"prompt_lookup_num_tokens": 2, "guidance_scale": 2.0},
        ("guidance_scale", "prompt_lookup_num_tokens", "leave one out"),
    ),
    "an option that no cache has": (
        {"cache_implementation": "quantized", "cache_config": {"bits": 4}},
        ("cache_config", "bits", "did you mean nbits?"),
    ),
    "contrast": ({"penalty_alpha": 0.6, "top_k": 3}, ("penalty_alpha", "native model", "leave them out")),
}

CASES = [
    *(pytest.param("native", case, id=f"native: {name}") for name, case in {**CONTRADICTIONS, **NATIVE}.items()),
    *(pytest.param("wrapped", case, id=f"wrapped: {name}") for name, case in {**CONTRADICTIONS, **WRAPPED}.items()),
]


@pytest.mark.parametrize(("tier", "case"), CASES)
def test_a_contradiction_is_one_clear_error_before_any_computation(
    loaded: tuple[Any, Any], theirs: Any, steps: list[int], tier: str, case: tuple[dict[str, Any], tuple[str, ...]]
) -> None:
    native, tokenizer = loaded
    model = native if tier == "native" else unspool.wrap(theirs)
    settings, words = case
    given: dict[str, Any] = {"input_ids": IDS, "tokenizer": tokenizer, **settings}
    if callable(given.get("past_key_values")):
        given["past_key_values"] = given["past_key_values"](native)
    given = {name: value for name, value in given.items() if value is not None or name != "input_ids"}
    before = dict(vars(model.generation_config))
    steps.clear()
    with pytest.raises((ValueError, TypeError, unspool.Unsupported)) as caught:
        model.generate(**given)
    assert not steps, "the model ran"
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said
    assert len(said) < 400
    assert vars(model.generation_config) == before


IDLE: dict[str, tuple[dict[str, Any], str]] = {
    "drafts of none": ({"num_assistant_tokens": 3}, "num_assistant_tokens has no effect without drafts"),
    "a threshold of none": ({"assistant_confidence_threshold": 0.3}, "assistant_confidence_threshold has no effect"),
    "n-grams of none": ({"max_matching_ngram_size": 3}, "max_matching_ngram_size has no effect without drafts"),
    "two ways to draft": (
        {"assistant_early_exit": 1, "prompt_lookup_num_tokens": 2},
        "prompt_lookup_num_tokens has no effect beside assistant_early_exit",
    ),
    "drafts for beams": ({"prompt_lookup_num_tokens": 2, "num_beams": 2}, "this call is beam_search"),
    "temperature for greedy": ({"do_sample": False, "temperature": 0.5}, "temperature has no effect without do_sample"),
    "length penalty for one beam": ({"length_penalty": 2.0}, "length_penalty has no effect with num_beams=1"),
    "scores nobody gets": ({"output_scores": True}, "output_scores has no effect without return_dict_in_generate"),
    "two lengths": ({"max_length": 9, "max_new_tokens": 2}, "max_new_tokens=2 wins over max_length=9"),
    "a misspelt entry": ({"generation_config": {"temperatur": 0.5}}, "did you mean temperature?"),
    "a cache that is off": (
        {"use_cache": False, "cache_implementation": "static"},
        "cache_implementation has no effect",
    ),
    "pads that are ends": (
        {"input_ids": torch.tensor([[1, 1, 5, 6], [5, 6, 7, 8]]), "pad_token_id": 1, "eos_token_id": 1},
        "pass attention_mask",
    ),
}


@pytest.mark.parametrize("name", IDLE)
def test_what_changes_no_text_is_a_remark(loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture, name: str) -> None:
    settings, said = IDLE[name]
    warn_once.cache_clear()
    loaded[0].generate(**{"input_ids": IDS, "max_new_tokens": 2, **settings})
    assert said in caplog.text


def test_what_the_models_file_says_is_not_held_against_the_caller(
    loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor of one's own takes the place of the file's; idle settings in a file are nobody's mistake."""
    model = loaded[0]
    own = [unspool.RepetitionPenaltyLogitsProcessor(3.0)]
    expected = model.generate(IDS, max_new_tokens=9, do_sample=False, repetition_penalty=3.0)
    file = unspool.GenerationConfig(
        repetition_penalty=1.1, temperature=0.6, top_p=0.9, num_assistant_tokens=4, length_penalty=2.0, eos_token_id=1
    )
    monkeypatch.setattr(model, "generation_config", file)
    warn_once.cache_clear()
    found = model.generate(IDS, max_new_tokens=9, do_sample=False, logits_processor=own)
    assert found.tolist() == expected.tolist()
    assert "no effect" not in caplog.text


WRONG_ANSWERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no scores": ({"logits_processor": [lambda ids, scores: None]}, TypeError, "must return scores of shape"),
    "fewer scores": ({"logits_processor": [lambda ids, scores: scores[:, :9]]}, ValueError, r"returned .*\[1, 9\]"),
    "no verdict": ({"stopping_criteria": [lambda ids, scores, **_: None]}, TypeError, "must return a bool"),
    "verdicts for others": (
        {"stopping_criteria": [lambda ids, scores, **_: torch.ones(3, dtype=torch.bool)]},
        ValueError,
        "tensor of 1 bools",
    ),
    "no ids": ({"prefix_allowed_tokens_fn": lambda row, ids: None}, TypeError, "has to return a list of token ids"),
    "nothing allowed": ({"prefix_allowed_tokens_fn": lambda row, ids: []}, ValueError, "allowed no token"),
    "ids that are none": ({"prefix_allowed_tokens_fn": lambda row, ids: [9999]}, ValueError, r"\[9999\]"),
    "everything banned": (
        {"suppress_tokens": list(range(400))},
        unspool.NonFiniteLogits,
        r"^row 0: no token can be chosen at position 4; .* left no token to choose",
    ),
    "allowed and banned": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [5], "suppress_tokens": [5]},
        unspool.NonFiniteLogits,
        "left no token to choose",
    ),
}


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=["one", "beams", "drafts"])
@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_a_wrong_answer_of_the_callers_function_is_named(
    loaded: tuple[Any, Any], name: str, way: dict[str, Any]
) -> None:
    """Not taken for an answer, and with the step: transformers takes token 0 where nothing is left to choose."""
    settings, kind, said = WRONG_ANSWERS[name]
    if "verdicts" in name and "num_beams" in way:
        said = "tensor of 4 bools"  # of the candidates
    if "fewer" in name and "num_beams" in way:
        said = r"returned .*\[2, 9\]"
    with pytest.raises(kind, match=said) as caught:
        loaded[0].generate(IDS, max_new_tokens=4, do_sample=False, **settings, **way)
    assert any("raised in step" in note for note in caught.value.__notes__)


def test_a_request_that_has_nothing_to_choose_fails_alone(loaded: tuple[Any, Any]) -> None:
    banned = {"suppress_tokens": list(range(400)), "max_new_tokens": 3}
    failed = loaded[0].generate_batch([[5, 6]], do_sample=False, **banned)
    assert all("left no token to choose" in str(output.error) for output in failed.values())
    assert len(failed) == 1


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "drafts": {"prompt_lookup_num_tokens": 2},
    "its own cache": {"return_dict_in_generate": True},
    "a static cache": {"cache_implementation": "static"},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fault_on_a_wrapped_model_says_in_which_step_and_leaves_nothing(theirs: Any, way: str) -> None:
    """On native ones: `unit/test_generate_call.py`."""
    model = unspool.wrap(theirs)
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **WAYS[way]}

    def tokens() -> Any:
        out = model.generate(IDS, **kwargs)
        return (out if isinstance(out, Tensor) else out.sequences).tolist()

    def caches() -> int:
        gc.collect()
        return sum(type(one).__name__ in ("PagedStore", "DynamicLayer", "StaticLayer") for one in gc.get_objects())

    before, attributes, stored = tokens(), set(vars(theirs)), caches()
    for fault in faults():
        with pytest.raises(Refusal, match="no") as caught:
            model.generate(IDS, **kwargs, **fault)
        assert any("raised in step" in note for note in caught.value.__notes__), fault
        del caught
    assert caches() <= stored, "keys and values of calls that failed are let go"
    assert set(vars(theirs)) == attributes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in theirs.modules())
    assert tokens() == before


def test_a_criterion_without_scores_is_told_how_to_get_them(loaded: tuple[Any, Any]) -> None:
    """The pages: "if your stopping criteria depends on the `scores` input, make sure you pass ..."."""

    def sure(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return scores[-1].amax(-1) > 1e9

    with pytest.raises(TypeError) as caught:
        loaded[0].generate(IDS, stopping_criteria=[sure])
    assert any("output_scores=True" in note for note in caught.value.__notes__)
    kwargs: dict[str, Any] = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True}
    assert len(loaded[0].generate(IDS, stopping_criteria=[sure], **kwargs).scores) == 3


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0, "do_sample": True}, {"max_new_token": 3}, {"stop_strings": "x"}, {"tokenizer": 3}]
)
def test_a_reader_of_a_stream_hears_of_a_call_that_cannot_begin(loaded: tuple[Any, Any], wrong: dict[str, Any]) -> None:
    """In transformers it would wait for ever."""
    model, tokenizer = loaded
    streamer = unspool.TextIteratorStreamer(tokenizer, timeout=60)

    def call() -> None:
        with pytest.raises((ValueError, TypeError)):
            model.generate(IDS, streamer=streamer, **wrong)

    thread = threading.Thread(target=call)
    thread.start()
    with pytest.raises((ValueError, TypeError)):
        list(streamer)
    thread.join()


def test_a_module_of_ones_own_is_told_the_same(steps: list[int]) -> None:
    ran: list[int] = []

    class Counter(nn.Module, unspool.GenerationMixin):
        def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
            ran.append(1)
            return torch.nn.functional.one_hot((input_ids + 1) % 11, 11).float()

    model = Counter()
    assert model.generate(torch.tensor([[3]]), max_new_tokens=3).tolist() == [[3, 4, 5, 6]]
    ran.clear()
    for settings, said in (
        ({"num_beams": 2, "num_return_sequences": 3}, "num_beams"),
        ({"atention_mask": IDS}, "did you mean attention_mask"),
        ({"max_new_token": 3}, "did you mean max_new_tokens"),
        ({"repetition_penalty": 1.2, "logits_processor": [unspool.RepetitionPenaltyLogitsProcessor(2.0)]}, "leave one"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "integers"),
        ({"stop_strings": "x"}, "tokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(**{"input_ids": torch.tensor([[3]]), **settings})
    assert not ran


def test_healing_on_wrapped_models_is_that_of_native_ones(loaded: tuple[Any, Any], theirs: Any) -> None:
    model, tokenizer = loaded
    kwargs: dict[str, Any] = {"token_healing": True, "tokenizer": tokenizer, "max_new_tokens": 5, "do_sample": False}
    changed = 0
    for text in ("Once upon a t", "The fo", "what are yo", "the w"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        found = unspool.wrap(theirs).generate(ids, **kwargs)
        assert found.tolist() == model.generate(ids, **kwargs).tolist()
        changed += found[0, : ids.shape[1]].tolist() != ids[0].tolist()
    assert changed, "some prompts were healed"
    with pytest.raises(unspool.Unsupported, match="token_healing needs a decoder's input_ids"):
        unspool.wrap(theirs).generate(inputs_embeds=torch.zeros(1, 3, 32), **kwargs)
