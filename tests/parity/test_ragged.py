"""The ragged tier: transformers' modules fed true tokens alone, over our store; which modules and calls are not."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import weakref
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from families import make_model
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

import unspool
from unspool.bridge import probe
from unspool.bridge.capture import answered
from unspool.bridge.rows import RowsRunner
from unspool.decode.runner import PagedRunner
from unspool.kernels import plain
from unspool.logits import UnbatchedClassifierFreeGuidanceLogitsProcessor

PROPERTY = vars(PreTrainedConfig)["_attn_implementation"]


def prompts(*lengths: int) -> dict[str, Tensor]:
    """Left-padded prompts of so many tokens."""
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tier(model: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> str:
    """Which runner a call takes."""
    unspool.wrap(model).unspool_report()  # probed already, so that no step of the probe is counted
    used: set[str] = set()
    with monkeypatch.context() as patch:
        for kind in (RowsRunner, PagedRunner):

            def run(self: Any, *args: Any, original: Any = kind.run) -> Any:
                used.add(type(self).__name__)
                return original(self, *args)

            patch.setattr(kind, "run", run)
        unspool.wrap(model).generate(**arguments, max_new_tokens=3)
    return {"PagedRunner": "ragged", "RowsRunner": "rows", "DraftRows": "rows"}[used.pop()]


def architecture(name: str) -> Any:
    model = next(one for one in ARCHITECTURES if one.model_type == name).make()
    if name == "gemma2":  # transformers' default since; in 5.2 it is SDPA, which leaves the soft cap out
        model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", None),
        ("gemma3_text", None),
        ("deepseek_v2", None),
        ("bloom", "position_ids"),
        ("gptj", "registry"),
        ("gpt_oss", "s_aux"),
        ("lfm2", "conv layers carry a state"),
        ("bart", "encoder"),
    ],
)
def test_the_report_says_why(name: str, reason: str | None) -> None:
    report = unspool.wrap(architecture(name)).unspool_report()
    assert report.tier == ("rows" if reason else "ragged")
    assert (reason or "") in str(report)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_long_texts_of_different_lengths(name: str) -> None:
    """Past windows and past the first blocks; and a row's text is the same alone and in company."""
    model = architecture(name)
    assert unspool.wrap(model).unspool_report().tier == "ragged"
    inputs = prompts(3, 19, 40)
    expected = model.generate(**inputs, max_new_tokens=30)
    assert torch.equal(unspool.wrap(model).generate(**inputs, max_new_tokens=30), expected)
    alone = unspool.wrap(model).generate(inputs["input_ids"][1:2, 21:], max_new_tokens=30)
    assert alone[0, 19:].tolist() == expected[1, 40 : 40 + alone.shape[1] - 19].tolist()


def test_prompts_in_chunks_and_rows_that_end() -> None:
    model = make_model("llama")
    inputs = prompts(5, 9, 14)
    ends = model.generate(**inputs, max_new_tokens=4)[0, -1:].tolist()
    arguments = {**inputs, "max_new_tokens": 20, "eos_token_id": ends, "pad_token_id": 0}
    expected = model.generate(**arguments)
    assert torch.equal(unspool.wrap(model).generate(**arguments, prefill_chunk_size=4), expected)


def test_only_rows_that_choose_reach_the_head() -> None:
    model = make_model("llama")
    unspool.wrap(model).unspool_report()
    widths: list[int] = []

    class Head(type(model.lm_head)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            widths.append(x.shape[1])
            return super().forward(x)

    model.lm_head.__class__ = Head
    unspool.wrap(model).unspool_report()
    widths.clear()
    unspool.wrap(model).generate(**prompts(4, 9), max_new_tokens=3)
    assert widths == [2, 2, 2]


def test_calls_that_need_the_modules_own_cache_take_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    inputs = prompts(4, 6)
    assert tier(model, monkeypatch, **inputs) == "ragged"
    assert tier(model, monkeypatch, **inputs, num_beams=2) == "ragged"
    assert tier(model, monkeypatch, **inputs, prompt_lookup_num_tokens=2) == "ragged"
    assert tier(model, monkeypatch, **inputs, return_dict_in_generate=True, output_scores=True) == "ragged"
    for needs in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_attentions": True},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"past_key_values": transformers.DynamicCache(config=model.config)},
        {"attention_mask": inputs["attention_mask"].flip(1)},
    ):
        assert tier(model, monkeypatch, **{**inputs, **needs}) == "rows"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_bigcode"])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"do_sample": True, "top_k": 9},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    ],
)
def test_outputs_are_those_of_transformers_with_its_cache(
    name: str, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, logits and keys and values, also of rows that ended before others."""
    model = architecture(name)
    inputs = prompts(9, 3, 5)
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    recorded = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    arguments = {
        **inputs,
        **mode,
        **recorded,
        "max_new_tokens": 9,
        "eos_token_id": int(greedy[1, -2]),
        "pad_token_id": 0,
    }
    assert tier(model, monkeypatch, **{**inputs, **mode, **recorded}) == "ragged"
    torch.manual_seed(3)
    expected = model.generate(**arguments)
    torch.manual_seed(3)
    found = unspool.wrap(model).generate(**arguments)
    assert isinstance(found, type(expected))
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in ((found.scores, expected.scores), (found.logits, expected.logits)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert type(found.past_key_values) is unspool.DynamicCache
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    copies = mode.get("num_beams", 1)
    seen = inputs["attention_mask"].repeat_interleave(copies, 0)
    for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        true = torch.nn.functional.pad(seen, (0, 99), value=1)[:, : expected.past_key_values.get_seq_length()]
        true = true[:, -one.keys.shape[2] :, None].bool()
        for a, b in ((one.keys, other.keys), (one.values, other.values)):
            torch.testing.assert_close(
                a.transpose(1, 2)[true[..., 0]], b.transpose(1, 2)[true[..., 0]], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v2"])
def test_a_conversation_goes_on_with_the_cache_in_any_loop(name: str) -> None:
    """What a ragged call hands back continues under transformers' own generate(), and under ours."""
    model = architecture(name)
    first = prompts(8, 5)
    more = torch.randint(3, 97, (2, 4), generator=torch.Generator().manual_seed(9))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = {}
    for way in (model, unspool.wrap(model)):
        out = way.generate(**first, **settings, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, more], dim=1)
        mask = torch.nn.functional.pad(first["attention_mask"], (0, 9), value=1)
        for later in (model, unspool.wrap(model)):
            cache = copy.deepcopy(out.past_key_values)
            said[way, later] = later.generate(ids, attention_mask=mask, past_key_values=cache, **settings).tolist()
    assert len({str(one) for one in said.values()}) == 1


def test_drafts_give_back_a_cache_too() -> None:
    model = architecture("llama")
    arguments = {**prompts(7, 4), "max_new_tokens": 8, "eos_token_id": None}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    out = unspool.wrap(model).generate(**arguments, prompt_lookup_num_tokens=3)
    plain = unspool.wrap(model).generate(**arguments)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(out.logits, plain.logits, rtol=1e-4, atol=1e-4)
    for one, other in zip(out.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_attentions_and_hidden_states_of_drafts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tokens had come one by one: what transformers gives for one row without drafts."""
    model = architecture(name)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 9, 11, 5, 9, 11, 5, 9]])
    wanted = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "eos_token_id": None}
    expected = model.generate(**arguments, **wanted, do_sample=False)
    drafts = {"assistant_model": model, "assistant_confidence_threshold": 0.0, "num_assistant_tokens": 3}
    assert unspool.wrap(model).unspool_report().tier == "ragged"  # the hooks that transformers leaves stay idle
    for way in (drafts, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}):
        found = unspool.wrap(model).generate(**arguments, **wanted, **way)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-4)
        for step, other in zip(found.attentions, expected.attentions, strict=True):
            for layer, theirs in zip(step, other, strict=True):
                torch.testing.assert_close(layer, theirs[..., -layer.shape[-1] :], rtol=1e-4, atol=1e-4)
        with unspool.enabled():
            assert torch.equal(model.generate(**arguments, **wanted, **way).sequences, expected.sequences)
    assert tier(model, monkeypatch, input_ids=ids, **wanted) == "rows"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_guidance_is_rows_of_the_same_batch(name: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, scores and cache are transformers', which runs the module twice; with drafts, the text without them."""
    model = architecture(name)
    inputs = prompts(8, 3, 5)
    negative = torch.randint(3, 97, (3, 4), generator=torch.Generator().manual_seed(2))
    arguments = {**inputs, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "guidance_scale": 1.6}
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    for own in ({}, {"negative_prompt_ids": negative}):
        torch.manual_seed(3)
        expected = model.generate(**arguments, **own, **wanted, do_sample=do_sample)
        torch.manual_seed(3)
        monkeypatch.delattr(UnbatchedClassifierFreeGuidanceLogitsProcessor, "__call__")  # which runs the module
        found = unspool.wrap(model).generate(**arguments, **own, **wanted, do_sample=do_sample)
        monkeypatch.undo()
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
        for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(one.keys[0], other.keys[0], rtol=1e-4, atol=1e-4)
        if not do_sample:
            drafts = {"assistant_model": model, "assistant_confidence_threshold": 0.0, "num_assistant_tokens": 4}
            for way in (drafts, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}):
                assert torch.equal(unspool.wrap(model).generate(**arguments, **own, **way), expected.sequences)


def test_padded_negative_prompts_and_guided_beams_are_those_of_transformers() -> None:
    model = architecture("llama")
    negative = prompts(5, 2)
    arguments = {**prompts(6, 4), "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "guidance_scale": 1.5}
    padded = {"negative_prompt_ids": negative["input_ids"]}
    padded["negative_prompt_attention_mask"] = negative["attention_mask"]
    for more in (padded, {"num_beams": 2}):
        expected = model.generate(**arguments, **more, do_sample=False)
        assert torch.equal(unspool.wrap(model).generate(**arguments, **more, do_sample=False), expected)


def test_a_cache_that_cannot_be_handed_back_takes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's own cache holds other things than attention sees."""
    model = architecture("deepseek_v2")
    assert tier(model, monkeypatch, **prompts(4, 6)) == "ragged"
    assert tier(model, monkeypatch, **prompts(4, 6), return_dict_in_generate=True) == "rows"


@pytest.mark.parametrize(("name", "cast"), [("gpt2", "ragged"), ("llama", "rows")])
def test_autocasting_is_another_module(name: str, cast: str) -> None:
    """Its keys and values have other dtypes, or several; both are remembered."""
    model = architecture(name)
    wrapped = unspool.wrap(model)
    arguments = {**prompts(4, 7), "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    for _ in range(2):
        assert wrapped.unspool_report().tier == "ragged"
        assert torch.equal(wrapped.generate(**arguments).sequences, model.generate(**arguments).sequences)
        with torch.autocast("cpu", torch.bfloat16):
            assert wrapped.unspool_report().tier == cast
            found, expected = wrapped.generate(**arguments), model.generate(**arguments)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.logits, expected.logits, rtol=2e-2, atol=2e-2)


def test_hooks_and_a_preparation_of_the_users_own_take_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    seen: list[Any] = []
    hook = model.model.layers[0].register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert tier(model, monkeypatch, **prompts(4, 6)) == "rows"
    assert seen[0] == (2, 6, model.config.hidden_size)
    hook.remove()
    assert tier(model, monkeypatch, **prompts(4, 6)) == "ragged"

    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    own = Own(model.config).eval()
    assert "prepare_inputs_for_generation" in str(unspool.wrap(own).unspool_report())
    compiled = make_model("llama")
    compiled.compile(backend="eager")
    assert "compiled" in str(unspool.wrap(compiled).unspool_report())


def test_the_verdict_is_kept_until_the_module_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    probes: list[Any] = []
    original = probe._compare
    monkeypatch.setattr(probe, "_compare", lambda *args: probes.append(args) or original(*args))
    model = make_model("llama")
    for _ in range(2):
        unspool.wrap(model).generate(**prompts(4), max_new_tokens=2)
    assert len(probes) == 1
    model.double()
    unspool.wrap(model).generate(**prompts(4), max_new_tokens=2)
    assert len(probes) == 2
    model.float()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    unspool.wrap(adapted).generate(**prompts(4), max_new_tokens=2)
    unspool.wrap(adapted).generate(**prompts(4), max_new_tokens=2)
    assert len(probes) == 3
    gone = weakref.ref(model)
    del model, adapted, probes[:]
    gc.collect()
    assert gone() is None


def test_angles_of_the_longest_row_and_dropout_take_rows() -> None:
    report = unspool.wrap(make_model("llama-rope-dynamic")).unspool_report()
    assert "dynamic rotary angles" in str(report)
    model = architecture("gpt2")
    assert unspool.wrap(model).unspool_report().tier == "ragged"
    assert "drops out" in str(unspool.wrap(model.train()).unspool_report())


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")])
def test_a_probe_without_memory_is_made_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module runs in rows meanwhile."""

    def full(*given: object) -> None:
        raise error

    model = unspool.wrap(make_model("llama"))
    with monkeypatch.context() as short:
        short.setattr(probe, "_compare", full)
        report = model.unspool_report()
        assert report.tier == "rows"
        assert "no memory" in report.reason
    assert model.unspool_report().tier == "ragged"


def test_a_module_whose_tokens_mix_is_found_out() -> None:
    """What a flat row does to its neighbours shows in the probe, whatever the module is called."""

    class Mixing(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, position_ids: Any = None, **rest: Any) -> Any:
            output = super().forward(input_ids=input_ids, position_ids=position_ids, **rest)
            output.logits = output.logits + output.logits.mean(dim=1, keepdim=True)
            return output

    Mixing.__module__ = "transformers.somewhere"
    report = unspool.wrap(Mixing(make_model("llama").config).eval()).unspool_report()
    assert report.tier == "rows"
    assert "not its own" in str(report)


def test_others_use_the_module_meanwhile_and_nothing_stays() -> None:
    model = make_model("llama")
    before = {name: id(value) for name, value in vars(model).items()}
    settings = dict(vars(model.config))
    inputs = prompts(7, 7)
    with torch.no_grad():
        expected = model(**inputs).logits
    text = model.generate(**inputs, max_new_tokens=40)
    faults: list[str] = []
    over = threading.Event()

    def plain() -> None:
        while not over.is_set():
            with torch.no_grad():
                same = torch.equal(model(**inputs).logits, expected)
            if not same or model.config._attn_implementation != "sdpa":
                faults.append("disturbed")

    thread = threading.Thread(target=plain)
    thread.start()
    try:
        for _ in range(3):
            assert torch.equal(unspool.wrap(model).generate(**inputs, max_new_tokens=40), text)
    finally:
        over.set()
        thread.join()
    assert faults == []
    assert vars(PreTrainedConfig)["_attn_implementation"] is PROPERTY
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert dict(vars(model.config)) == settings


def test_an_error_in_a_step_leaves_nothing_either() -> None:
    model = make_model("llama")
    whole = [True]

    class Norm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            if not whole:
                raise IndexError("broken")
            return super().forward(x)

    model.model.norm.__class__ = Norm
    wrapped = unspool.wrap(model)
    assert wrapped.unspool_report().tier == "ragged"
    whole.clear()
    with pytest.raises(IndexError, match="broken"):
        wrapped.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert vars(PreTrainedConfig)["_attn_implementation"] is PROPERTY
    model.set_attn_implementation("unspool")
    with pytest.raises(unspool.Unsupported, match="unspool's own calls"):
        model(**prompts(3))


@pytest.mark.parametrize("own", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_ways_of_attending(dtype: torch.dtype, own: str) -> None:
    model = make_model("llama").to(dtype)
    model.set_attn_implementation(own)
    wrapped = unspool.wrap(model)
    assert wrapped.unspool_report().tier == "ragged"
    assert wrapped.generate(**prompts(3, 8), max_new_tokens=6).shape == (2, 14)
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_continuous_batching(name: str) -> None:
    """Requests of all kinds beside each other give what `generate()` gives, with little room and chunks of prompts."""
    model = unspool.wrap(architecture(name))
    texts = [prompts(length)["input_ids"][0].tolist() for length in (3, 30, 12, 30)]
    config = unspool.ContinuousBatchingConfig(num_blocks=9, page_size=16, max_batch_tokens=24)
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": 9},
        {"max_new_tokens": 5, "num_beams": 2},
        {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3},
        {"max_new_tokens": 7, "do_sample": True, "seed": 4, "temperature": 1.3},
    ]
    before = {key: id(value) for key, value in vars(model._module).items()}
    with model.init_continuous_batching(continuous_batching_config=config) as manager:
        names = [manager.add_request(text, **one) for text, one in zip(texts, settings, strict=True)]
        found = [manager.get_result(one).generated_tokens for one in names]
    for text, one, made in zip(texts, settings, found, strict=True):
        expected = model.generate(torch.tensor([text]), **one)[0, len(text) :].tolist()
        assert made == expected[: len(made)]
        assert len(made) == len(expected) or made[-1] == model.generation_config.eos_token_id
    assert {key: id(value) for key, value in vars(model._module).items()} == before


def test_continuous_batching_of_adapted_and_of_other_modules() -> None:
    import peft

    def adapted(config: Any) -> Any:
        return unspool.wrap(peft.get_peft_model(make_model("llama"), config).eval())

    lora = adapted(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    ids = prompts(6)["input_ids"]
    expected = lora.generate(input_ids=ids, max_new_tokens=6)[0, 6:].tolist()
    (output,) = lora.generate_batch(ids.tolist(), max_new_tokens=6).values()
    assert output.generated_tokens == expected[: len(output.generated_tokens)]
    assert output.error is None
    prefix = adapted(peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(unspool.Unsupported, match="learned prompt"):
        prefix.init_continuous_batching()
    with pytest.raises(TypeError, match=r"unspool\.wrap"):
        unspool.ContinuousBatchingManager(make_model("llama"))


def test_products_of_few_rows_are_ours_in_this_thread_alone() -> None:
    """In bf16, and only while a step runs: a linear layer's own forward is back afterwards."""
    forward = torch.nn.Linear.forward
    model = make_model("llama").bfloat16()
    seen: list[bool] = []

    class Norm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.nn.Linear.forward is not forward)
            return super().forward(x)

    model.model.norm.__class__ = Norm
    unspool.wrap(model).generate(**prompts(4), max_new_tokens=3)
    assert any(seen) == plain.usable()
    assert torch.nn.Linear.forward is forward


def test_enabling_brings_continuous_batching(caplog: pytest.LogCaptureFixture) -> None:
    """With transformers' own settings objects; modules that generate in a way of their own are left to transformers."""
    mixin = transformers.generation.utils.GenerationMixin
    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    originals = [getattr(mixin, name) for name in names]
    model = make_model("llama")
    texts = [prompts(length)["input_ids"][0].tolist() for length in (9, 4)]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    known = inspect.signature(mixin.continuous_batching_context_manager).parameters
    graphs = {"num_q_cuda_graphs": 2, "num_kv_cuda_graphs": 2, "max_queue_size": 3, "manual_eviction": True}
    with unspool.enabled():
        outputs = model.generate_batch(inputs=texts, generation_config=config)
        with model.continuous_batching_context_manager(
            generation_config=config, **{name: value for name, value in graphs.items() if name in known}
        ) as manager:
            assert isinstance(manager, unspool.ContinuousBatchingManager)
            alone = manager.get_result(manager.add_request(texts[1]))
        with caplog.at_level("INFO", logger="unspool"), pytest.raises(Exception):  # noqa: B017
            architecture("blip-2").generate_batch(inputs=5)
        assert "a way of its own" in caplog.text
    for text, output in zip(texts, outputs.values(), strict=True):
        made = output.generated_tokens
        expected = model.generate(torch.tensor([text]), generation_config=config)[0, len(text) :].tolist()
        assert made == expected[: len(made)]
    assert alone is not None
    assert alone.generated_tokens == list(outputs.values())[1].generated_tokens
    assert [getattr(mixin, name) for name in names] == originals
    assert not any(name in vars(mixin) for name in names)


def test_a_call_that_cannot_begin_leaves_the_next_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*given: object) -> torch.Tensor:
        raise AssertionError("nothing is attended to here")

    def register(name: str, function: object) -> None:
        raise RuntimeError("not now")

    own = torch.nn.Linear.forward
    config = transformers.LlamaConfig(attn_implementation="eager")
    with monkeypatch.context() as broken:
        broken.setattr(transformers.AttentionInterface, "register", register)
        with pytest.raises(RuntimeError, match="not now"), answered(look):
            pass
    with answered(look):
        assert config._attn_implementation == "unspool"
    assert config._attn_implementation == "eager" and torch.nn.Linear.forward is own
