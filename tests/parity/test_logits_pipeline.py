"""build_processors and build_criteria against transformers' own assembly, for random settings together."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

import unspool.logits as ours
from unspool.config import GenerationConfig, warn_once
from unspool.errors import Unsupported
from unspool.stopping import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    build_criteria,
)

VOCAB = 1200

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "do_sample": st.booleans(),
    "num_beams": st.sampled_from([1, 1, 2]),
    "temperature": st.sampled_from([1.0, 0.6, 1.9]),
    "top_k": st.sampled_from([0, 1, 20, 50, 1500]),
    "top_p": st.sampled_from([1.0, 0.9, 0.3]),
    "top_h": st.sampled_from([None, 0.4]),
    "min_p": st.sampled_from([None, 0.05]),
    "typical_p": st.sampled_from([1.0, 0.8]),
    "epsilon_cutoff": st.sampled_from([0.0, 1e-3]),
    "eta_cutoff": st.sampled_from([0.0, 1e-3]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
    "encoder_repetition_penalty": st.sampled_from([1.0, 1.3]),
    "no_repeat_ngram_size": st.sampled_from([0, 2]),
    "encoder_no_repeat_ngram_size": st.sampled_from([0, 2]),
    "bad_words_ids": st.sampled_from([None, [[2], [3, 4], [7]]]),
    "sequence_bias": st.sampled_from([None, [[[1, 2], -3.0], [[5], 2.0]]]),
    "min_length": st.sampled_from([0, 12]),
    "min_new_tokens": st.sampled_from([None, 3]),
    "forced_bos_token_id": st.sampled_from([None, 3]),
    "forced_eos_token_id": st.sampled_from([None, 7]),
    "remove_invalid_values": st.booleans(),
    "exponential_decay_length_penalty": st.sampled_from([None, (1, 1.2)]),
    "suppress_tokens": st.sampled_from([None, [4, 9]]),
    "begin_suppress_tokens": st.sampled_from([None, [6]]),
    "watermarking_config": st.sampled_from([None, {"bias": 3.0}, {"seeding_scheme": "selfhash", "context_width": 2}]),
    "renormalize_logits": st.booleans(),
}


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def configs(chosen: dict[str, Any], **more: Any) -> tuple[GenerationConfig, Any]:
    """The same settings as our config and as transformers' with its tensor of eos ids."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = GenerationConfig(**chosen, **more)
        theirs = transformers.GenerationConfig(**chosen, **more)
    eos = theirs.eos_token_id
    theirs._eos_token_tensor = None if eos is None else torch.tensor([eos] if isinstance(eos, int) else eos)
    return mine, theirs


def draw_step(seed: int, width: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (2, width), generator=random)
    scores = torch.randn(2, VOCAB, generator=random) * 3
    return ids, scores.bfloat16().float() if seed % 2 else scores


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.fixed_dictionaries({}, optional=SETTINGS), eos=st.sampled_from([2, [2, 7]]), seed=st.integers(0, 9999))
def test_same_scores_in_any_combination(model: Any, chosen: dict[str, Any], eos: Any, seed: int) -> None:
    prompt = 1 + seed % 6
    if chosen.get("exponential_decay_length_penalty"):
        # A banned eos that was made finite again grows past the range of floats: inf there, capped here.
        chosen = {**chosen, "remove_invalid_values": False}
    mine, theirs = configs(chosen, eos_token_id=eos, max_length=12)
    source = torch.randint(0, 9, (2, prompt), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(prompt) >= torch.tensor([[0], [prompt - 1]])).long()
    wanted = model._get_logits_processor(
        theirs,
        input_ids_seq_length=prompt,
        encoder_input_ids=source,
        logits_processor=[],
        device="cpu",
        model_kwargs={"attention_mask": mask},
    )
    found = ours.build_processors(
        mine,
        prompt_length=prompt,
        eos_token_id=theirs._eos_token_tensor,
        device="cpu",
        encoder_input_ids=source,
        padding_lengths=(mask != 0).int().argmax(dim=1),
        vocab_size=VOCAB,
    )
    names = [type(processor).__name__ for processor in wanted]
    together = ["TopKLogitsWarper", "TopPLogitsWarper"]
    mine_names = []
    for processor in found:
        name = type(processor).__name__
        mine_names += together if name == "TopKTopPLogitsWarper" else [name]
    assert mine_names == names
    for width in (prompt, prompt + 2, 11):
        ids, scores = draw_step(seed, width)
        torch.testing.assert_close(
            found(ids, scores), wanted(ids.clone(), scores.clone()), rtol=0, atol=0, equal_nan=True
        )


def build(config: GenerationConfig, **more: Any) -> ours.LogitsProcessorList:
    return ours.build_processors(config, **{"prompt_length": 3, "eos_token_id": None, "device": "cpu", **more})


def test_settings_without_effect_add_nothing() -> None:
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0, min_length=5
    )
    assert build(config) == []  # min_length needs an eos


def test_own_processor_replaces_the_configured_one(caplog: pytest.LogCaptureFixture) -> None:
    config = GenerationConfig(no_repeat_ngram_size=2, suppress_tokens=[1], do_sample=True, top_k=5)
    mine, extra = ours.NoRepeatNGramLogitsProcessor(3), ours.LogitNormalization()
    with caplog.at_level(logging.WARNING):
        built = build(config, custom=[extra, mine])
    assert built[0] is mine
    assert built[2] is extra
    assert [type(p).__name__ for p in built] == [
        "NoRepeatNGramLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "LogitNormalization",
        "TopKLogitsWarper",
    ]
    assert len(caplog.records) == 1
    theirs = transformers.NoRepeatNGramLogitsProcessor(3)
    assert build(config, custom=[theirs])[0] is theirs


def test_processors_work_inside_transformers(model: Any) -> None:
    torch.manual_seed(0)
    prompt = torch.randint(3, 50, (2, 4))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    texts = []
    for source in (ours, transformers):
        processors = [
            source.RepetitionPenaltyLogitsProcessor(1.5),
            source.NoRepeatNGramLogitsProcessor(2),
            source.SequenceBiasLogitsProcessor({(5,): 2.0, (5, 6): 9.0}),
        ]
        texts.append(model.generate(prompt, logits_processor=processors, **options))
    assert torch.equal(*texts)


def test_refused_combinations(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="eos_token_id"):
        build(GenerationConfig(exponential_decay_length_penalty=(2, 1.5)))
    with pytest.raises(ValueError, match="max_length"):
        build(GenerationConfig(forced_eos_token_id=2))
    with pytest.raises(Unsupported, match="guidance_scale"):
        build(GenerationConfig(guidance_scale=2.0))
    with pytest.raises(ValueError, match="vocab_size"):
        build(GenerationConfig(watermarking_config={"bias": 1.0}))
    warn_once.cache_clear()
    build(GenerationConfig(encoder_repetition_penalty=2.0))
    assert "encoder_repetition_penalty" in caplog.text
    build(GenerationConfig(repetition_penalty=2.0), prompt_length=0)
    assert "new tokens only" in caplog.text


def test_criteria_in_order(model: Any) -> None:
    class Tokens:
        def batch_decode(self, sequences: list[list[int]], **_: Any) -> list[str]:
            return ["".join(map(chr, ids)) for ids in sequences]

    config = GenerationConfig(
        max_length=9,
        max_time=5.0,
        stop_strings=["x"],
        is_assistant=True,
        assistant_confidence_threshold=0.3,
        output_scores=True,
        return_dict_in_generate=True,
    )
    own = MaxTimeCriteria(1.0)
    with pytest.raises(ValueError, match="tokenizer"):
        build_criteria(config)
    built = build_criteria(config, tokenizer=Tokens(), eos_token_id=[1, 2], custom=[own], max_position_embeddings=64)
    kinds = ["MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria", "ConfidenceCriteria"]
    assert [type(criterion).__name__ for criterion in built] == kinds
    assert built[1] is own
    assert built.max_length == 9
    assert built.row_independent
    assert build_criteria(GenerationConfig()) == []


def test_criteria_agree_with_transformers() -> None:
    from transformers.generation import stopping_criteria as oracle

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    scores = (torch.randn(2, 8),)
    for mine, theirs in (
        (MaxLengthCriteria(3), oracle.MaxLengthCriteria(3)),
        (MaxLengthCriteria(4), oracle.MaxLengthCriteria(4)),
        (MaxTimeCriteria(10.0), oracle.MaxTimeCriteria(10.0)),
        (MaxTimeCriteria(10.0, 0.0), oracle.MaxTimeCriteria(10.0, 0.0)),
        (EosTokenCriteria([6, 2]), oracle.EosTokenCriteria([6, 2])),
        (EosTokenCriteria(3), oracle.EosTokenCriteria(3)),
    ):
        assert torch.equal(mine(ids, None), theirs(ids, None))
    assert EosTokenCriteria(5)(ids, None, new_token_length=2).tolist() == [False, True]
    confident = scores[0].softmax(-1)[:, [3, 6]].diagonal()
    for threshold in (0.05, 0.2, 0.5):
        found = ConfidenceCriteria(threshold)(ids, scores)
        assert found.tolist() == (confident < threshold).tolist()
        assert bool(found[0]) == oracle.ConfidenceCriteria(threshold)(ids, scores)
