"""`generate_batch` and the manager against `generate()`, token for token in fp32, however requests arrive."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accounts import check_all_given_back
from families import FAMILIES, make_checkpoint
from hypothesis import given, settings, strategies as st

import unspool
from unspool import ContinuousBatchingConfig, LogitsProcessor, StoppingCriteria

PROMPTS = [
    [5, 9, 11, 3, 8, 2, 7, 44, 51, 60, 23],
    [17, 4],
    [23, 31, 31, 9, 60] * 8,
    [1],
    [5, 9, 11, 3, 8, 2, 7, 44, 51, 60, 23, 90, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    [23, 31, 31, 9, 60] * 7 + [8, 8],
]
TOP = 2
NEVER = {"eos_token_id": None, "pad_token_id": 0}


class Shift(LogitsProcessor):
    """Depends on the whole history, so that a wrong one shows."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(int(input_ids.sum()) % 5, dims=-1)


class EndsAt(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 3


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy with an end": {"do_sample": False, "eos_token_id": [8, 44, 60, 92]},
    "sampled": {"do_sample": True, "seed": 1},
    "cold": {"do_sample": True, "seed": 1, "temperature": 0.6, "top_k": 0, "top_p": 0.8},
    "warm": {"do_sample": True, "seed": 2, "temperature": 1.3, "top_k": 30, "top_p": 0.95},
    "min p": {"do_sample": True, "seed": 3, "min_p": 0.1, "top_k": 0},
    "rare warpers": {"do_sample": True, "seed": 4, "typical_p": 0.8, "eta_cutoff": 0.01, "top_h": 0.7},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "other penalties": {"do_sample": True, "seed": 5, "repetition_penalty": 1.1, "renormalize_logits": True},
    "lengths": {"do_sample": False, "min_new_tokens": 7, "eos_token_id": [12, 47, 92, 14], "max_new_tokens": 9},
    "bans": {"do_sample": False, "bad_words_ids": [[92], [47, 47]], "suppress_tokens": [3, 12]},
    "forced": {"do_sample": False, "forced_eos_token_id": 9, "eos_token_id": 9},
    "several": {"do_sample": True, "seed": 6, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": [92, 44, 12]},
    "sampled beams": {"do_sample": True, "seed": 7, "num_beams": 2, "top_k": 20, "length_penalty": 0.5},
    "patient beams": {"do_sample": False, "num_beams": 4, "early_stopping": "never", "repetition_penalty": 1.3},
    "groups of beams": {"do_sample": False, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.8},
    "beams with words": {"do_sample": False, "num_beams": 3, "force_words_ids": [[7, 9]]},
    "looked up": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "looked up and drawn": {"do_sample": True, "seed": 8, "prompt_lookup_num_tokens": 3, "num_return_sequences": 2},
    "early exit": {"do_sample": False, "assistant_early_exit": 1, "repetition_penalty": 1.2},
    "assisted": {"do_sample": False, "assistant_model": "itself", "eos_token_id": [8, 44]},
    "guided": {"do_sample": False, "guidance_scale": 2.5, "negative_prompt_ids": [[7, 9, 30]]},
    "guided by a long text": {"do_sample": True, "seed": 9, "guidance_scale": 1.8, "negative_prompt_ids": [PROMPTS[2]]},
    "guided by its end": {"do_sample": True, "seed": 9, "guidance_scale": 0.5, "num_return_sequences": 2},
    "guided beams": {"do_sample": False, "num_beams": 3, "guidance_scale": 1.7, "repetition_penalty": 1.2},
    "guided and looked up": {"do_sample": False, "guidance_scale": 1.6, "prompt_lookup_num_tokens": 4},
    "guided and drafted": {"do_sample": True, "seed": 12, "guidance_scale": 1.6, "assistant_early_exit": 1},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": [8, 44, 60, 92]},
    "contrastive and penalised": {"penalty_alpha": 0.4, "top_k": 3, "no_repeat_ngram_size": 2},
    "contrastive and guided": {"penalty_alpha": 0.5, "top_k": 2, "guidance_scale": 1.5, "negative_prompt_ids": [[5]]},
    "layers": {"do_sample": False, "dola_layers": "high", "repetition_penalty": 1.2},
    "layers, drawn": {"do_sample": True, "seed": 10, "dola_layers": "low", "repetition_penalty": 1.2, "top_p": 0.9},
    "layers, guided": {"dola_layers": [0, 1], "repetition_penalty": 1.2, "guidance_scale": 2.0},
    "watermark": {"do_sample": True, "seed": 11, "watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}},
    "prompt told": {"do_sample": False, "prompt_logprobs": 3},
    "prompt told to beams": {"do_sample": False, "num_beams": 2, "prompt_logprobs": 0},
    "own processor": {"do_sample": False, "logits_processor": [Shift()]},
    "own criterion": {"do_sample": False, "stopping_criteria": [EndsAt()]},
    "allowed tokens": {"do_sample": False, "prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 90 + 1, 7, 9]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


_models: dict[str, Any] = {}


def of(name: str) -> dict[str, Any]:
    settings = NEVER | {"max_new_tokens": 14} | SETTINGS[name]
    return settings | ({"assistant_model": _models["llama"]} if "assistant_model" in settings else {})


class Expected(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    top: list[list[float]]


@cache
def expected(prompt: int, name: str) -> list[Expected]:
    """What `generate()` makes of the prompt alone; the filler behind an end is left out."""
    settings = of(name)
    settings.pop("prompt_logprobs", None)
    if "negative_prompt_ids" in settings:
        settings["negative_prompt_ids"] = torch.tensor(settings["negative_prompt_ids"])
    settings |= {"return_dict_in_generate": True, "output_top_logprobs": TOP}
    rows = _models["llama"].generate(torch.tensor([PROMPTS[prompt]]), **settings)
    ends = settings["eos_token_id"] or []
    made = []
    for i, (row, reason) in enumerate(
        zip(rows.sequences[:, len(PROMPTS[prompt]) :].tolist(), rows.finish_reasons, strict=True)
    ):
        end = next((i for i, t in enumerate(row) if t in ([ends] if isinstance(ends, int) else ends)), len(row) - 1)
        end = end if reason == "stop" and name != "own criterion" else len(row) - 1
        values = rows.top_logprobs.values[i, : end + 1].tolist()
        made.append(Expected(row[: end + 1], rows.token_logprobs[i, : end + 1].tolist(), values))
    return made


@cache
def told(prompt: int) -> list[float]:
    """What the model says of each token of the prompt but the first."""
    ids = torch.tensor([PROMPTS[prompt]])
    logprobs = _models["llama"](ids).logits[0].log_softmax(dim=-1)
    found: list[float] = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


requests = st.lists(
    st.tuples(st.integers(0, len(PROMPTS) - 1), st.sampled_from(sorted(SETTINGS)), st.integers(0, 6)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=40, deadline=None)
@given(
    arrivals=requests,
    budget=st.sampled_from([6, 9, 33, 1024]),
    blocks=st.sampled_from([16, 20, 200]),
    sharing=st.booleans(),
    scheduler=st.sampled_from(["fifo", "prefill_first"]),
    space=st.sampled_from([0.0, 0.0003, 0.01]),
)
def test_any_mixture_however_it_arrives(
    model: Any,
    arrivals: list[tuple[int, str, int]],
    budget: int,
    blocks: int,
    sharing: bool,
    scheduler: str,
    space: float,
) -> None:
    _models["llama"] = model
    manager = model.init_continuous_batching(
        NEVER,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=blocks,
            page_size=16,
            max_batch_tokens=budget,
            allow_block_sharing=sharing,
            scheduler_type=scheduler,
            cpu_offload_space=space,
            max_requests_per_batch=5,
        ),
    )
    names = []
    for prompt, name, steps in arrivals:
        names.append(manager.add_request(PROMPTS[prompt], top_logprobs=TOP, **of(name)))
        for _ in range(steps):
            manager.step()
    while manager.step():
        pass
    for request, (prompt, name, _) in zip(names, arrivals, strict=True):
        wanted = expected(prompt, name)
        children = [f"{request}__child#{i}" for i in range(len(wanted) - 1)]
        got = [manager.get_result(one) for one in [request, *children]]
        assert [one.error for one in got] == [None] * len(wanted)
        assert [one.generated_tokens for one in got] == [one.tokens for one in wanted], name
        for output, one in zip(got, wanted, strict=True):
            assert output.logprobs == pytest.approx(one.logprobs, abs=2e-4), name
            for best, values in zip(output.top_logprobs, one.top, strict=True):
                assert list(best.values()) == pytest.approx(values, abs=2e-4), name
            if "prompt_logprobs" in SETTINGS[name]:
                assert output.prompt_logprobs[0] is None
                assert output.prompt_logprobs[1:] == pytest.approx(told(prompt), abs=2e-4)
    assert manager.metrics.running == manager.metrics.waiting == 0
    check_all_given_back(manager._engine.room)


@pytest.mark.parametrize(
    "name", ["greedy with an end", "penalties", "warm", "several", "looked up", "guided", "contrastive", "layers"]
)
def test_whole_distributions(model: Any, name: str) -> None:
    """Scores and logits of every token, of those that ask; chunks and company change nothing."""
    _models["llama"] = model
    wanted = of(name) | {"output_scores": True, "output_logits": True}
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=9))
    other = manager.add_request(PROMPTS[1], **of("greedy"))
    request = manager.add_request(PROMPTS[2], **wanted)
    while manager.step():
        pass
    assert manager.get_result(other).scores is None
    if "negative_prompt_ids" in wanted:
        wanted["negative_prompt_ids"] = torch.tensor(wanted["negative_prompt_ids"])
    theirs = model.generate(torch.tensor([PROMPTS[2]]), return_dict_in_generate=True, **wanted)
    for i in range(theirs.sequences.shape[0]):
        output = manager.get_result(request if i == 0 else f"{request}__child#{i - 1}")
        count = len(output.generated_tokens)
        assert output.generated_tokens == theirs.sequences[i, len(PROMPTS[2]) :][:count].tolist()
        torch.testing.assert_close(output.scores, torch.stack(theirs.scores)[:count, i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.logits, torch.stack(theirs.logits)[:count, i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["beams", "sampled beams", "patient beams", "groups of beams", "beams with words", "guided beams"]
)
def test_whole_distributions_of_beams(model: Any, name: str) -> None:
    """Those of all beams in every step, and which of them each token was chosen for, as `generate()` gives them."""
    wanted = of(name) | {"output_scores": True, "output_logits": True}
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=9))
    request = manager.add_request(PROMPTS[2], **wanted)
    other = manager.add_request(PROMPTS[1], **of(name))
    while manager.step():
        pass
    plain = manager.get_result(other)
    assert plain.scores is None
    assert plain.logits is None
    theirs = model.generate(torch.tensor([PROMPTS[2]]), return_dict_in_generate=True, **wanted)
    for i in range(theirs.sequences.shape[0]):
        output = manager.get_result(request if i == 0 else f"{request}__child#{i - 1}")
        origins = [place for place in theirs.beam_indices[i].tolist() if place >= 0]
        assert output.beam_indices == origins
        assert output.score == pytest.approx(float(theirs.sequences_scores[i]))
        torch.testing.assert_close(output.scores, torch.stack(theirs.scores), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.logits, torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
        assert output.scores.shape == (len(theirs.scores), wanted["num_beams"], model.spec.vocab_size)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_like_transformers(family: str, tmp_path: Path) -> None:
    theirs = make_checkpoint(family, tmp_path)
    ours = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    settings = {"max_new_tokens": 20, "do_sample": False, **NEVER}
    # rows whose angles depend on their length are not computed again to the same bits
    small = {} if ours.spec.needs_extents else {"num_blocks": 7, "page_size": 16}
    config = ContinuousBatchingConfig(max_batch_tokens=16, **small)
    outputs = ours.generate_batch(PROMPTS[:4], **settings, continuous_batching_config=config)
    for prompt, output in zip(PROMPTS, outputs.values(), strict=False):
        assert output.generated_tokens == theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["phi3-longrope", "llama-rope-dynamic"])
def test_rows_that_are_computed_anew_with_length(family: str, tmp_path: Path) -> None:
    """Rows decided together too, of which some pass the length before others."""
    make_checkpoint(family, tmp_path)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    manager = model.init_continuous_batching(
        NEVER | {"max_new_tokens": 24}, continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=29)
    )
    modes = ["greedy", "beams", "looked up", "guided", "guided beams", "guided and looked up", "contrastive and guided"]
    asked = [(PROMPTS[prompt], SETTINGS[mode]) for prompt in (0, 2, 4) for mode in modes]
    names = [manager.add_request(prompt, **mode) for prompt, mode in asked]
    while manager.step():
        pass
    for name, (prompt, mode) in zip(names, asked, strict=True):
        call = NEVER | {"max_new_tokens": 24} | mode
        if "negative_prompt_ids" in call:
            call["negative_prompt_ids"] = torch.tensor(call["negative_prompt_ids"])
        wanted = model.generate(torch.tensor([prompt]), **call)[0, len(prompt) :].tolist()
        made = manager.get_result(name).generated_tokens
        assert made == wanted[: len(made)] and len(made) > 0


def test_stop_strings(tiny_llama_dir: Path) -> None:
    model, tokenizer = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "The fox", "river")]
    plain = [
        model.generate(torch.tensor([p]), max_new_tokens=12, eos_token_id=None, do_sample=False)[0] for p in prompts
    ]
    stops = [tokenizer.decode(row[len(p) + 4 : len(p) + 6]) for p, row in zip(prompts, plain, strict=True)]
    with model.init_continuous_batching(tokenizer=tokenizer) as manager:
        for prompt, stop in zip(prompts, stops, strict=True):
            settings = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False, "stop_strings": [stop, "never"]}
            wanted = model.generate(torch.tensor([prompt]), tokenizer=tokenizer, **settings)[0, len(prompt) :].tolist()
            output = manager.get_result(manager.add_request(prompt, **settings))
            assert output.generated_tokens == wanted
            assert (output.finish_reason, output.stop) == ("stop", stop)


ENDINGS: dict[str, dict[str, Any]] = {
    "stop strings": {"stop_strings": ["e", "th", "."], "eos_token_id": None},
    "expression": {"regex": r"[a-z]{2,5}( [a-z]{1,3}){1,3}\."},
    "schema": {"json_schema": {"type": "object", "properties": {"a": {"enum": ["x", 12]}}, "required": ["a"]}},
    "criterion": {"stopping_criteria": [EndsAt()], "min_new_tokens": 2},
    "grammar and stop": {"regex": r"[a-z ]{12,16}", "stop_strings": ["ab", "s", " "]},
}
ENDED = ["greedy", "cold", "other penalties", "bans", "beams", "sampled beams", "groups of beams", "looked up"]
ENDED += ["looked up and drawn", "early exit", "assisted", "guided", "guided beams", "guided and looked up"]
ENDED += ["contrastive", "contrastive and guided", "layers", "layers, guided", "beams with words"]


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(["Once upon a time", "The fox", "river " * 5]),
            st.sampled_from(ENDED),
            st.sampled_from(sorted(ENDINGS)),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_mode_with_every_ending(tiny_llama_dir: Path, asked: list[tuple[str, str, str, int]]) -> None:
    """Stop strings, grammars and criteria in requests of every mode; what `generate()` refuses is refused alike."""
    model, tokenizer = _loaded(tiny_llama_dir)
    manager = model.init_continuous_batching(tokenizer=tokenizer)
    names: list[tuple[str, list[int]]] = []
    for text, mode, ending, steps in asked:
        prompt = tokenizer(text).input_ids
        call = {"max_new_tokens": 12} | SETTINGS[mode] | ENDINGS[ending] | {"num_return_sequences": 1}
        if "assistant_model" in call:
            call["assistant_model"] = model
        theirs = dict(call)
        if "negative_prompt_ids" in call:
            theirs["negative_prompt_ids"] = torch.tensor(call["negative_prompt_ids"])
        try:
            row = model.generate(torch.tensor([prompt]), tokenizer=tokenizer, **theirs)[0, len(prompt) :].tolist()
        except (ValueError, unspool.Unsupported) as error:
            with pytest.raises(type(error)):
                manager.add_request(prompt, **call)
            continue
        names.append((manager.add_request(prompt, **call), row))
        for _ in range(steps):
            manager.step()
    while manager.step():
        pass
    for name, row in names:
        output = manager.get_result(name)
        assert output.error is None
        assert output.generated_tokens == row
    check_all_given_back(manager._engine.room)


@cache
def _loaded(folder: Path) -> tuple[Any, Any]:
    return unspool.load(folder, dtype="float32", device="cpu")
