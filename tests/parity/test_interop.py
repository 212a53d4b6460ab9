"""`unspool.wrap` and `unspool.enable`: code written for transformers, decoded by our loop, and nothing left behind."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import make_model
from torch import Tensor
from transformers.generation import utils as theirs

import unspool
from unspool.bridge.drafts import DraftRows

ORIGINALS = {name: vars(theirs.GenerationMixin)[name] for name in ("generate", "_sample", "_beam_search")}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def prompts(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (rows, 6), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def patched() -> list[bool]:
    return [vars(theirs.GenerationMixin)[name] is not original for name, original in ORIGINALS.items()]


def test_wrapping_shows_the_module_and_changes_nothing(model: Any) -> None:
    before = dict(vars(model))
    wrapped = unspool.wrap(model)
    assert unspool.wrap(wrapped) is wrapped
    assert wrapped.config is model.config
    assert wrapped.device == model.device
    assert torch.equal(wrapped(**prompts()).logits, model(**prompts()).logits)
    wrapped.generate(**prompts(), max_new_tokens=3, num_beams=2)
    assert vars(model) == before
    assert "forward" in dir(wrapped)
    wrapped.favourite = 3
    assert model.favourite == 3
    del wrapped.favourite
    assert not hasattr(model, "favourite")
    assert wrapped.eval() is wrapped
    assert isinstance(copy.deepcopy(wrapped), unspool.interop.Wrapped)
    with pytest.raises(TypeError, match=r"torch.nn.Module, not str"):
        unspool.wrap("gpt2")  # type: ignore[arg-type]


def test_enabling_and_disabling(model: Any, steps: list[int]) -> None:
    expected = model.generate(**prompts(), max_new_tokens=4)
    with unspool.enabled():
        assert all(patched())
        assert torch.equal(model.generate(**prompts(), max_new_tokens=4), expected)
        assert len(steps) == 4
        with unspool.enabled():
            pass
        assert all(patched())
    assert not any(patched())
    unspool.enable()
    unspool.enable()
    model.generate(**prompts(), max_new_tokens=4)
    assert len(steps) == 8
    unspool.disable()
    unspool.disable()
    assert not any(patched())
    model.generate(**prompts(), max_new_tokens=4)
    assert len(steps) == 8


def test_every_model_tells_how_it_runs(model: Any) -> None:
    """A wrapped module, one of transformers' while we decode it, one of your own, and a native one."""
    assert str(unspool.wrap(model).unspool_report()) == "LlamaForCausalLM: ragged"
    with unspool.enabled():
        assert model.unspool_report().tier == "ragged"
        bloom = transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=97, n_layer=1, n_head=2, hidden_size=8)
        )
        assert bloom.unspool_report().reason == "its forward takes no position_ids"
    assert not hasattr(model, "unspool_report")

    class Own(torch.nn.Module, unspool.GenerationMixin):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(input_ids, 11).float()

    assert Own().unspool_report().tier == "rows"
    native, _ = unspool.load("storyteller-draft")
    assert native.unspool_report().tier == "native"


def test_an_error_inside_restores_too(model: Any) -> None:
    with pytest.raises(ValueError, match="num_beams"), unspool.enabled():
        model.generate(**prompts(), num_beams=0)
    assert not any(patched())


def test_wrapping_is_felt_by_no_other_thread(steps: list[int]) -> None:
    """A wrapped model with a generate() of its own patches transformers for its call, and for its thread alone."""
    other = make_model("gpt2")
    seen: list[bool] = []

    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            before = len(steps)
            thread = threading.Thread(target=lambda: other.generate(**prompts(), max_new_tokens=3))
            thread.start()
            thread.join()
            seen.append(len(steps) == before)
            return super().generate(*args, **kwargs)

    base = make_model("llama")
    own = Own(base.config).eval()
    own.load_state_dict(base.state_dict())
    own.generation_config = base.generation_config
    found = unspool.wrap(own).generate(**prompts(), max_new_tokens=3)
    assert torch.equal(found, base.generate(**prompts(), max_new_tokens=3))
    assert seen == [True]
    assert len(steps) == 3
    assert not any(patched())


def test_their_objects_are_taken(model: Any, steps: list[int]) -> None:
    """transformers' own settings, processors, criteria, streamers and caches; results are of its classes."""

    class Heard(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ends = 0

        def put(self, value: Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ends += 1

    def arguments() -> dict[str, Any]:
        return {
            **prompts(1),
            "generation_config": transformers.GenerationConfig(
                do_sample=True, top_k=40, return_dict_in_generate=True, output_scores=True
            ),
            "logits_processor": transformers.LogitsProcessorList(
                [transformers.MinLengthLogitsProcessor(9, eos_token_id=7)]
            ),
            "stopping_criteria": transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(max_length=15)]),
            "past_key_values": transformers.DynamicCache(config=model.config),
        }

    heard = [Heard(), Heard()]
    torch.manual_seed(1)
    expected = model.generate(**arguments(), streamer=heard[0])
    with unspool.enabled():
        torch.manual_seed(1)
        found = model.generate(**arguments(), streamer=heard[1])
    assert steps
    assert isinstance(found, transformers.generation.GenerateDecoderOnlyOutput)
    assert isinstance(found, transformers.utils.ModelOutput)
    assert isinstance(found.past_key_values, transformers.DynamicCache)
    assert found.keys() == expected.keys()
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert heard[0].parts == heard[1].parts
    assert heard[0].ends == heard[1].ends == 1


def test_pipeline(tiny_llama_dir: Any, steps: list[int]) -> None:
    pipe = transformers.pipeline("text-generation", model=str(tiny_llama_dir), device="cpu")
    texts = ["Once upon a time", "The fox"]
    expected = pipe(texts, max_new_tokens=6, do_sample=False, batch_size=2)
    with unspool.enabled():
        assert pipe(texts, max_new_tokens=6, do_sample=False, batch_size=2) == expected
    assert steps


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's, in both calls
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prefix", "prompt"])
@pytest.mark.parametrize("beams", [1, 3])
def test_peft(kind: str, beams: int, steps: list[int]) -> None:
    import peft

    torch.manual_seed(0)
    config: Any = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
        "ia3": lambda: peft.IA3Config(
            target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]()
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(make_model("llama"), config).eval()
    arguments = {**prompts(), "max_new_tokens": 5, "num_beams": beams}
    expected = model.generate(**arguments)
    assert torch.equal(unspool.wrap(model).generate(**arguments), expected)
    wrapped = len(steps)
    assert wrapped
    with unspool.enabled():
        assert torch.equal(model.generate(**arguments), expected)
    assert len(steps) == 2 * wrapped
    if kind in ("lora", "dora", "ia3"):
        ids = arguments["input_ids"]
        assert torch.equal(unspool.wrap(model).generate(ids, max_new_tokens=5, num_beams=beams), expected)
        with model.disable_adapter():
            base = unspool.wrap(model).generate(**arguments)
        assert not torch.equal(base, expected)
        merged = model.merge_and_unload()
        assert torch.equal(unspool.wrap(merged).generate(**arguments), merged.generate(**arguments))


def test_adapter_names_by_row(steps: list[int]) -> None:
    import peft

    torch.manual_seed(0)
    made = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("llama"), made).eval()
    model.add_adapter("other", made)
    arguments = {**prompts(3), "max_new_tokens": 5, "adapter_names": ["default", "other", "__base__"]}
    expected = model.generate(**arguments)
    assert torch.equal(unspool.wrap(model).generate(**arguments), expected)
    assert steps


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("recorded", [{}, {"output_scores": True, "output_logits": True}])
def test_several_codebooks(guidance: float | None, recorded: dict[str, bool], steps: list[int]) -> None:
    """MusicGen brings a generate() of its own, whose rows are codebooks; our loop decodes inside."""
    torch.manual_seed(0)
    text = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    decoder = transformers.models.musicgen.MusicgenDecoderConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, num_codebooks=4,
        pad_token_id=64, bos_token_id=64, max_position_embeddings=64,
    )  # fmt: skip
    codec = transformers.EncodecConfig(
        sampling_rate=16000, num_filters=4, hidden_size=16, codebook_size=64, codebook_dim=16, num_lstm_layers=1,
        upsampling_ratios=[2, 2], target_bandwidths=[300.0], use_causal_conv=False,
    )  # fmt: skip
    config = transformers.MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)
    model = transformers.MusicgenForConditionalGeneration(config).eval()
    for parameter in model.decoder.parameters():
        if parameter.ndim > 1:
            parameter.data += torch.randn(parameter.shape) * 0.3
    model.generation_config.decoder_start_token_id = 64
    model.generation_config.pad_token_id = 64
    model.generation_config.guidance_scale = guidance
    arguments: dict[str, Any] = {**prompts(), "max_new_tokens": 7, "return_dict_in_generate": True, **recorded}
    torch.manual_seed(2)
    expected = model.generate(**arguments, do_sample=True)
    torch.manual_seed(2)
    found = unspool.wrap(model).generate(**arguments, do_sample=True)
    assert steps
    torch.testing.assert_close(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(found.get(name), expected.get(name))


def spread_out(model: Any) -> Any:
    """A random model that is not indifferent to its input."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * (1.0 if "embed" in name else 0.3))
    return model.eval()


@pytest.mark.parametrize("guidance", [3.0, None])
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 1.3, "top_k": 20}])
def test_channels_with_delays(how: dict[str, Any], guidance: float | None, steps: list[int]) -> None:
    """Dia's rows are channels, and its guidance doubles them within the model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
    across = {f"cross_{name}": shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    ends = {"pad_token_id": 57, "eos_token_id": 56, "bos_token_id": 58, "num_channels": 3, "cross_hidden_size": 32}
    config = transformers.DiaConfig(
        encoder_config={**shape, "vocab_size": 97}, decoder_config={**shape, **across, **ends, "vocab_size": 60},
        delay_pattern=[0, 2, 3],
    )  # fmt: skip
    model = spread_out(transformers.DiaForConditionalGeneration(config))
    model.generation_config.guidance_scale = guidance
    arguments = {**prompts(), **how, "max_new_tokens": 8}
    torch.manual_seed(2)
    expected = model.generate(**arguments)
    torch.manual_seed(2)
    assert torch.equal(unspool.wrap(model).generate(**arguments), expected)
    assert steps


@pytest.mark.parametrize("sample", [False, True])
def test_speech_in_stages(sample: bool, steps: list[int]) -> None:
    """Bark's parts bring generate() of their own, the second in windows of alternating codebooks."""
    from transformers.models.bark import generation_configuration_bark as settings

    torch.manual_seed(0)
    shape = {"block_size": 64, "input_vocab_size": 200, "output_vocab_size": 200, "num_layers": 2, "num_heads": 4,
             "hidden_size": 32}  # fmt: skip
    codec = {"model_type": "encodec", "num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16,
             "upsampling_ratios": [2, 2]}  # fmt: skip
    fine = {**shape, "n_codes_total": 4, "n_codes_given": 1}
    model = spread_out(
        transformers.BarkModel(
            transformers.BarkConfig(
                semantic_config=shape, coarse_acoustics_config=shape, fine_acoustics_config=fine, codec_config=codec
            )
        )
    )
    semantic = settings.BarkSemanticGenerationConfig(
        text_encoding_offset=4, semantic_infer_token=100, semantic_vocab_size=90, text_pad_token=91, eos_token_id=90,
        semantic_pad_token=90, max_input_semantic_length=8, max_new_tokens=10, semantic_rate_hz=49.9,
    )  # fmt: skip
    coarse = settings.BarkCoarseGenerationConfig(
        coarse_semantic_pad_token=95, coarse_rate_hz=75, n_coarse_codebooks=2, coarse_infer_token=96,
        max_coarse_input_length=8, max_coarse_history=16, sliding_window_len=8, eos_token_id=None,
    )  # fmt: skip
    texts = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))

    def speak(first: Any, second: Any) -> torch.Tensor:
        torch.manual_seed(2)
        said = first.generate(texts, semantic_generation_config=semantic, do_sample=sample)
        both = {"semantic_generation_config": semantic, "coarse_generation_config": coarse, "codebook_size": 32}
        result: torch.Tensor = second.generate(said, **both, do_sample=sample)
        return result

    parts = model.semantic, model.coarse_acoustics
    expected = speak(*parts)
    assert not steps
    assert torch.equal(speak(*map(unspool.wrap, parts)), expected)
    assert len(steps) > 10
    with unspool.enabled():
        assert torch.equal(speak(*parts), expected)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "pix2struct"])
def test_an_encoder_sees_each_prompt_once(name: str) -> None:
    """Not once for each beam, nor once a step."""
    from architectures import ARCHITECTURES

    one = next(one for one in ARCHITECTURES if one.model_type == name)
    model, seen = one.make(), []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(output[0].shape[0])

    model.get_encoder().register_forward_hook(note, with_kwargs=True)
    inputs = one.inputs()
    unspool.wrap(model).generate(**inputs, max_new_tokens=5, num_beams=3)
    assert seen == [next(iter(inputs.values())).shape[0]]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 2},
        {"condition_on_prev_tokens": True, "temperature": (0.0, 0.4), "logprob_threshold": -1.0,
         "compression_ratio_threshold": 1.35},
    ],
)  # fmt: skip
def test_long_speech(how: dict[str, Any], steps: list[int]) -> None:
    """Whisper's own generate() walks over speech longer than its window; our loop decodes the parts."""
    from architectures import MULTIMODAL

    whisper = next(one for one in MULTIMODAL if one.model_type == "whisper").make()
    settings = whisper.generation_config
    settings.no_timestamps_token_id, settings.prev_sot_token_id = 60, 58
    settings.is_multilingual, settings.max_initial_timestamp_index, settings.max_length = False, 20, 30
    generator = torch.Generator().manual_seed(0)
    sound = {"input_features": torch.randn(2, 8, 200, generator=generator), "attention_mask": torch.ones(2, 200).long()}
    sound["attention_mask"][1, 150:] = 0
    torch.manual_seed(1)
    expected = whisper.generate(**sound, return_timestamps=True, **how)
    torch.manual_seed(1)
    found = unspool.wrap(whisper).generate(**sound, return_timestamps=True, **how)
    assert torch.equal(found, expected)
    assert found.shape[1] > 30
    assert steps


@pytest.mark.parametrize("version", ["4.57.1", "5.1.0", "5.2.0", "5.23.0", "6.0.0.dev0"])
def test_older_transformers_are_refused(version: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [transformers.GenerationMixin.generate, transformers.GenerationMixin._sample]
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    ways: list[Any] = [lambda: unspool.wrap(model), lambda: unspool.enabled().__enter__()]
    for way in ways:
        if version < "5.2":
            with pytest.raises(
                unspool.Unsupported, match=rf"transformers {version} is installed.*'transformers>=5\.2'"
            ):
                way()
        else:
            way()
    unspool.disable()
    assert [transformers.GenerationMixin.generate, transformers.GenerationMixin._sample] == before


def test_threads_do_not_disturb_each_other() -> None:
    model = unspool.wrap(make_model("llama"))
    other = make_model("gpt2")
    ways: list[dict[str, Any]] = [
        {}, {"num_beams": 3}, {"repetition_penalty": 1.4}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2},
        {"no_repeat_ngram_size": 2}, {"cache_implementation": "static"}, {"num_beams": 2, "length_penalty": 0.3},
    ]  # fmt: skip
    alone = [model.generate(**prompts(), max_new_tokens=8, **way) for way in ways]
    found: list[Any] = [None] * len(ways)

    def work(number: int) -> None:
        with unspool.interop.patch.inside():
            other.generate(**prompts(), max_new_tokens=2)
        found[number] = model.generate(**prompts(), max_new_tokens=8, **ways[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(ways))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert not any(patched())


def test_what_is_not_ours_is_left_to_them(model: Any, steps: list[int], caplog: pytest.LogCaptureFixture) -> None:
    class Custom(Exception):
        pass

    def own(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        raise Custom

    with caplog.at_level(logging.INFO, "unspool"), unspool.enabled(), pytest.raises(Custom):
        model.generate(**prompts(), custom_generate=own, max_new_tokens=3)
    assert steps == []
    assert "decoded by transformers' own loop" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("how", ["lookup", "theirs", "native"])
def test_drafts(family: str, rows: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text is the same with drafts; rows of one batch advance by different numbers of tokens."""
    fed: list[int] = []
    original = DraftRows.run

    def run(self: DraftRows, work: Any, watched: bool) -> Any:
        fed.append(max(item.feed for item in work))
        return original(self, work, watched)

    monkeypatch.setattr(DraftRows, "run", run)
    model, draft = make_model(family), make_model(family)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in draft.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * (0.002 if family == "mistral" else 0.01)
    draft.generation_config.assistant_confidence_threshold = 0.0
    ids = torch.randint(3, 97, (rows, 9), generator=torch.Generator().manual_seed(7))
    ids[:, 5:] = ids[:, 1:5]
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :3] = 0
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 14, "pad_token_id": 1}
    if rows > 1:
        arguments["eos_token_id"] = model.generate(**arguments)[0, 16:17].tolist()
    expected = model.generate(**arguments)
    if how == "lookup":
        drafts: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    elif how == "theirs":
        drafts = {"assistant_model": draft}
    else:
        draft.save_pretrained(tmp_path)
        drafts = {"assistant_model": unspool.AutoModelForCausalLM.from_pretrained(tmp_path)}
        drafts["assistant_model"].generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(unspool.wrap(model).generate(**arguments, **drafts), expected)
    assert fed == []
    recorded: dict[str, Any] = {"return_dict_in_generate": True}
    assert torch.equal(unspool.wrap(model).generate(**arguments, **recorded, **drafts).sequences, expected)
    assert fed == []
    recorded["cache_implementation"] = "dynamic"  # its own
    if family == "mistral" and rows > 1:  # which cannot
        with pytest.raises(unspool.Unsupported, match="one row at a time"):
            unspool.wrap(model).generate(**arguments, **drafts, **recorded)
        return
    found = unspool.wrap(model).generate(**arguments, **recorded, **drafts)
    assert torch.equal(found.sequences, expected)
    assert max(fed[0] - 9, *fed[1:]) > 1
    if how != "lookup":
        assert 0.1 < found.acceptance_rate < 1.0


@pytest.mark.parametrize("drafts", ["model", "lookup"])
def test_sampled_drafts_are_transformers_own(drafts: str) -> None:
    """After the same `torch.manual_seed`, one row's sampled text with drafts is transformers' assisted text."""
    model, draft = make_model("llama"), make_model("llama", seed=1)
    given: dict[str, Any] = {"assistant_model": draft} if drafts == "model" else {"prompt_lookup_num_tokens": 4}
    ids = torch.tensor([[5, 9, 11, 3, 8, 9, 11, 44, 51, 9, 11]])
    texts = []
    for each in (model, unspool.wrap(model)):
        torch.manual_seed(5)
        out = each.generate(ids, max_new_tokens=20, do_sample=True, top_k=20, temperature=1.3, eos_token_id=None,
                            pad_token_id=0, suppress_tokens=[0], **given)  # fmt: skip
        texts.append(out.tolist())
    assert texts[0] == texts[1]


def test_drafts_of_an_encoder_decoder() -> None:
    from architectures import SEQ2SEQ

    bart = next(one for one in SEQ2SEQ if one.model_type == "bart").make()
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(7))
    expected = bart.generate(ids, max_new_tokens=10)
    assert torch.equal(unspool.wrap(bart).generate(ids, max_new_tokens=10, prompt_lookup_num_tokens=2), expected)
    with pytest.raises(unspool.Unsupported, match="one row at a time"):
        unspool.wrap(bart).generate(ids.repeat(2, 1), max_new_tokens=10, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(("family", "rows", "ours"), [("llama", 1, True), ("llama", 2, True), ("mamba", 1, False)])
def test_drafts_where_transformers_calls(family: str, rows: int, ours: bool, steps: list[int]) -> None:
    """`enable()` takes drafts where rows can be taken back, and leaves them to transformers where they cannot."""
    from architectures import DECODERS

    target = next(one for one in DECODERS if one.model_type == family).make()
    expected = target.generate(**prompts(rows), max_new_tokens=8)
    with unspool.enabled():
        if ours:
            found = target.generate(**prompts(rows), max_new_tokens=8, prompt_lookup_num_tokens=2)
            assert torch.equal(found, expected)
        else:
            with pytest.raises(ValueError, match="assisted"):
                target.generate(**prompts(rows), max_new_tokens=8, prompt_lookup_num_tokens=2)
    assert bool(steps) == ours


def test_a_training_step_after_a_call_is_the_same() -> None:
    def step(model: Any) -> list[Tensor]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
        optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    fresh, used = make_model("mistral"), make_model("mistral")
    with unspool.enabled():
        used.generate(**prompts(), max_new_tokens=4)
        used.generate(**prompts(), max_new_tokens=4, num_beams=2)
    assert all(torch.equal(a, b) for a, b in zip(step(fresh), step(used), strict=True))


def test_inputs_embeds(model: Any) -> None:
    made = prompts()
    embeds = model.get_input_embeddings()(made["input_ids"])
    for arguments in (
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "attention_mask": made["attention_mask"], "num_beams": 2},
        {"inputs_embeds": embeds, "input_ids": made["input_ids"], "max_length": None, "repetition_penalty": 1.2},
    ):
        expected = model.generate(**arguments, max_new_tokens=5)
        assert torch.equal(unspool.wrap(model).generate(**arguments, max_new_tokens=5), expected)


def test_inputs_embeds_and_max_length(model: Any) -> None:
    embeds = model.get_input_embeddings()(prompts()["input_ids"])
    expected = model.generate(inputs_embeds=embeds, max_length=9)
    assert torch.equal(unspool.wrap(model).generate(inputs_embeds=embeds, max_length=9), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding_window", "offloaded", "quantized", "offloaded_static"])
def test_cache_kinds(model: Any, kind: str) -> None:
    expected = model.generate(**prompts(), max_new_tokens=6)
    found = unspool.wrap(model).generate(**prompts(), max_new_tokens=6, cache_implementation=kind)
    assert torch.equal(found, expected)


def test_chunked_prompts(model: Any) -> None:
    expected = model.generate(**prompts(), max_new_tokens=5)
    assert torch.equal(unspool.wrap(model).generate(**prompts(), max_new_tokens=5, prefill_chunk_size=4), expected)


def test_mistakes_are_named(model: Any) -> None:
    wrapped = unspool.wrap(model)
    with pytest.raises(ValueError, match="temprature"):
        wrapped.generate(**prompts(), temprature=2)
    with pytest.raises(ValueError, match="exclude each other"):
        wrapped.generate(**prompts(), past_key_values=unspool.DynamicCache(), cache_implementation="static")
    with pytest.raises(ValueError, match="exclude each other"):
        wrapped.generate(**prompts(), past_key_values=unspool.DynamicCache(), cache_implementation="paged")


def test_paged_is_what_ragged_modules_are(model: Any) -> None:
    expected = model.generate(**prompts(), max_new_tokens=5, do_sample=False)
    wrapped = unspool.wrap(model)
    got = wrapped.generate(**prompts(), max_new_tokens=5, do_sample=False, cache_implementation="paged")
    assert torch.equal(got, expected) and wrapped.unspool_report().tier == "ragged"
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}  # which its own cache gives
    got = wrapped.generate(**prompts(), max_new_tokens=5, do_sample=False, cache_implementation="paged", **wanted)
    assert torch.equal(got.sequences, expected)
    assert len(got.hidden_states) == 5
