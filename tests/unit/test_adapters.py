"""Adapters of native models: what is refused, names, rows, stored keys and values, threads, continuous batching."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import unspool
from unspool.errors import CheckpointError, Unsupported
from unspool.kernels.lowrank import fits
from unspool.repositories import BUILT_IN_ADAPTERS

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.down_proj": (48, 32)}
PROMPT = list(range(3, 25))


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A random adapter of rank 3 for the model of `tiny`."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(2):
        for module, (inputs, outputs) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            made[f"{stem}.lora_A.weight"] = torch.randn(3, inputs, generator=generator) * 0.3
            made[f"{stem}.lora_B.weight"] = torch.randn(outputs, 3, generator=generator) * 0.3
    return made


def write(folder: Path, weights: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", tensors(1))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.save(folder)
    return unspool.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def both(model: Any, adapter: Path, tmp_path: Path) -> Any:
    """The model with the adapters "one" (active) and "two"."""
    model.load_adapter(adapter, "one")
    model.load_adapter(write(tmp_path / "second", tensors(2)), "two")
    return model


def made(model: Any, names: list[str | None] | None = None, rows: int = 1, **settings: Any) -> list[list[int]]:
    tokens = model.generate([PROMPT] * rows, max_new_tokens=10, do_sample=False, adapter_names=names, **settings)
    return [row[len(PROMPT) :] for row in tokens.tolist()]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"peft_type": "IA3"}, Unsupported, "peft_type='IA3'"),
        ({"bias": "all"}, Unsupported, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, Unsupported, "modules_to_save"),
        ({"target_parameters": ["x"]}, Unsupported, "target_parameters"),
        ({"init_lora_weights": "pissa"}, Unsupported, "init_lora_weights='pissa'"),
        ({"r": 4}, CheckpointError, "has shape"),
        ({"r": 0}, CheckpointError, "r=0"),
        ({"target_modules": ["q_proj", "query"]}, CheckpointError, "'query', which is no linear layer"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}, CheckpointError, "lacks .*k_proj"),
        ({"target_modules": r".*\.(q|o)_proj"}, CheckpointError, "lacks .*o_proj"),
        ({"use_dora": True}, CheckpointError, "lacks .*lora_magnitude_vector"),
    ],
)
def test_settings_that_are_refused(
    model: Any, tmp_path: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        model.load_adapter(write(tmp_path / "adapter", tensors(1), **changes))
    assert model.adapters.loaded == {}
    assert model.active_adapter is None


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "error", "text"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", (3, 32), CheckpointError, "layers.9"),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", (3, 32), CheckpointError, "another base"),
        ("base_model.model.lm_head.lora_A.weight", (3, 32), CheckpointError, "lm_head, which is no linear layer"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (3, 61), Unsupported, "lora_embedding_A"),
        (f"{FIRST}.lora_magnitude_vector", (32,), CheckpointError, "use_dora"),
        (f"{FIRST}.lora_A.weight", (3, 31), CheckpointError, r"has shape \[3, 31\]"),
        (f"{FIRST}.lora_B.weight", None, CheckpointError, "lacks .*q_proj.lora_B.weight"),
        (f"{FIRST}.lora_B.weight", float("nan"), CheckpointError, "not finite"),
    ],
)
def test_tensors_that_are_refused(
    model: Any, tmp_path: Path, name: str, tensor: Any, error: type[Exception], text: str
) -> None:
    weights = tensors(1)
    if tensor is None:
        del weights[name]
    else:
        weights[name] = torch.full((32, 3), tensor) if isinstance(tensor, float) else torch.zeros(tensor)
    with pytest.raises(error, match=text):
        model.load_adapter(write(tmp_path / "adapter", weights))
    assert model.adapters.loaded == {}


def test_files_that_are_refused(model: Any, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter's folder"):
        model.load_adapter("./nowhere/at all")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        model.load_adapter(tmp_path / "model")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        model.load_adapter(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle"):
        model.load_adapter(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        model.load_adapter(adapter)
    with pytest.raises(CheckpointError, match="another base"):
        model.load_adapter("storyteller-pirate")
    assert made(model) == made(model, [None])


def test_names(both: Any, adapter: Path) -> None:
    assert both.active_adapter == "one"
    with pytest.raises(ValueError, match="'one' is loaded already"):
        both.load_adapter(adapter, "one")
    with pytest.raises(ValueError, match="cannot name"):
        both.load_adapter(adapter, "__base__")
    for call in (both.set_adapter, both.delete_adapter):
        with pytest.raises(ValueError, match="no adapter is called 'three'; loaded: 'one', 'two'"):
            call("three")
    with pytest.raises(TypeError, match="takes one name"):
        both.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="no adapter is called 'three'"):
        made(both, ["three"])
    with pytest.raises(ValueError, match="2 names for 1 prompts"):
        made(both, ["one", "two"])
    with pytest.raises(TypeError, match="must be a list"):
        both.generate([PROMPT], adapter_names="one")
    with pytest.raises(TypeError, match="native model"):
        unspool.PeftModel.from_pretrained(torch.nn.Linear(2, 2), adapter)
    with pytest.raises(ValueError, match="is_trainable"):
        unspool.PeftModel.from_pretrained(both, adapter, "more", is_trainable=True)


def test_switching(both: Any) -> None:
    base, one, two = (made(both, [name])[0] for name in ("__base__", "one", "two"))
    assert len({tuple(base), tuple(one), tuple(two)}) == 3
    assert made(both) == [one]
    both.set_adapter("two")
    assert made(both, rows=2) == [two, two]
    with both.disable_adapter():
        assert both.active_adapter is None
        assert made(both) == [base]
        assert made(both, ["one"]) == [one]
    assert made(both, ["two", "one", None, "two"], 4) == [two, one, base, two]
    both.delete_adapter("two")
    assert both.active_adapter is None
    assert made(both) == [base]
    assert both.unload() is both
    assert both.adapters.loaded == {}


def test_weights_are_never_changed(both: Any, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    made(both, ["one", "two", None], 3)
    both.unload()
    after = both.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_and_casts_take_their_adapters_along(both: Any) -> None:
    expected = made(both, ["one", "two"], 2)
    twin = copy.deepcopy(both)
    both.unload()
    assert made(twin, ["one", "two"], 2) == expected
    twin.to(torch.float64)
    assert made(twin, ["one", "two"], 2) == expected


def test_stored_keys_and_values_serve_one_adapter_only(both: Any) -> None:
    first = both.generate([PROMPT], max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    longer = [first.sequences[0].tolist()]
    past = first.past_key_values
    for name in ("one", "two", None):
        plain = both.generate(longer, max_new_tokens=6, do_sample=False, adapter_names=[name])
        again = both.generate(longer, max_new_tokens=6, do_sample=False, adapter_names=[name], past_key_values=past)
        assert torch.equal(plain, again)


def test_modes(both: Any) -> None:
    """Every mode computes every row with its own adapter."""
    names = ["two", None, "one"]
    for settings in (
        {"guidance_scale": 1.7},
        {"assistant_early_exit": 1},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2},
        {"prefill_chunk_size": 5},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"penalty_alpha": 0.6, "top_k": 3, "guidance_scale": 1.5},
        {"dola_layers": [0]},
    ):
        together = made(both, names, 3, **settings)
        assert together == [made(both, [name], **settings)[0] for name in names]
    assert made(both, names, 3, assistant_early_exit=1) == made(both, names, 3)
    assert made(both, names, 3, assistant_model=copy.deepcopy(both)) == made(both, names, 3)


def test_threads_do_not_see_each_other(both: Any) -> None:
    expected = {name: made(both, [name])[0] for name in ("one", "two", None)}
    wrong: list[str] = []

    def work(name: str | None) -> None:
        for _ in range(8):
            if name is None:
                with both.disable_adapter():
                    tokens = made(both)[0]
            else:
                tokens = made(both, [name])[0]
            if tokens != expected[name]:
                wrong.append(f"{name}: {tokens}")

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert made(both)[0] == expected["one"]


def test_requests_share_prefixes_with_their_own_adapter_only(both: Any, tmp_path: Path) -> None:
    expected = {name: made(both, [name])[0] for name in ("one", "two", "__base__")}
    prompt = PROMPT * 3
    expected = {
        name: both.generate([prompt], max_new_tokens=8, do_sample=False, adapter_names=[name])[
            0, len(prompt) :
        ].tolist()
        for name in expected
    }
    with both.init_continuous_batching() as manager:
        for _ in range(2):  # the second time, the prompts are stored
            ids = {
                manager.add_request(prompt, max_new_tokens=8, do_sample=False, adapter_name=name): name
                for name in ("one", "two", "__base__", "one")
            }
            for request, name in ids.items():
                output = manager.get_result(request, timeout=60)
                assert output.generated_tokens == expected[name], name
        assert output.usage.cached_tokens >= 32
        beams = manager.add_request(prompt, max_new_tokens=8, do_sample=False, adapter_name="two", num_beams=2)
        alone = both.generate([prompt], max_new_tokens=8, do_sample=False, adapter_names=["two"], num_beams=2)
        assert manager.get_result(beams, timeout=60).generated_tokens == alone[0, len(prompt) :].tolist()
        drafted = manager.add_request(
            prompt, max_new_tokens=8, do_sample=False, adapter_name="two", assistant_early_exit=1
        )
        assert manager.get_result(drafted, timeout=60).generated_tokens == expected["two"]
        # another adapter under a name that was used before
        both.delete_adapter("two")
        both.load_adapter(write(tmp_path / "third", tensors(3)), "two")
        later = manager.add_request(prompt, max_new_tokens=8, do_sample=False, adapter_name="two")
        output = manager.get_result(later, timeout=60)
        assert output.usage.cached_tokens == 0
        assert output.generated_tokens != expected["two"]
        with pytest.raises(ValueError, match="no adapter is called 'nobody'"):
            manager.add_request(prompt, adapter_name="nobody")


def test_bare_names(model: Any, adapter: Path, tmp_path: Path) -> None:
    """An adapter of the bare decoder, whose names lack the decoder's own prefix, is the same adapter."""
    weights = load_file(adapter / "adapter_model.safetensors")
    bare = {name.replace("model.model.layers", "model.layers"): tensor for name, tensor in weights.items()}
    model.load_adapter(adapter, "whole")
    model.load_adapter(write(tmp_path / "bare", bare), "bare")
    whole, short = made(model, ["whole", "bare"], 2)
    assert whole == short != made(model, [None])[0]


def test_built_in_adapter() -> None:
    model, tokenizer = unspool.load("storyteller")
    assert set(BUILT_IN_ADAPTERS) == {"storyteller-pirate"}
    model.load_adapter("storyteller-pirate", "pirate")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    torch.manual_seed(0)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=80, do_sample=True)[0])
    assert " o' " in text or "Arr" in text or "mate" in text


def test_bf16(both: Any, adapter: Path, tmp_path: Path) -> None:
    """The kernels' products, where the processor has them, agree with plain ones; copies keep working."""
    weights = {
        name: torch.cat([tensor, tensor], dim=0 if "lora_A" in name else 1) for name, tensor in tensors(1).items()
    }
    both.load_adapter(write(tmp_path / "even", weights, r=6, lora_alpha=6), "even")
    both.to(torch.bfloat16)
    ids = torch.tensor([PROMPT])
    exact = both(ids, adapter_names=["even"]).logits.float()  # plain products, which gradients need
    for model in (both, copy.deepcopy(both)):
        with torch.no_grad():
            fast = model(ids, adapter_names=["even"]).logits.float()
            bare = model(ids, adapter_names=[None]).logits.float()
        assert (fast - exact).abs().max() < 0.05 * (exact - bare).abs().max()


@pytest.mark.skipif(
    not fits(torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)),
    reason="the kernels are not in use on this machine",
)
def test_bf16_rows_are_the_same_bits_alone_and_in_company(both: Any) -> None:
    both.to(torch.bfloat16).requires_grad_(False)
    both.pack()
    names = ["one", None, "two", "one", "two"]
    prompts = [PROMPT[i:] for i in range(len(names))]
    settings: dict[str, Any] = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    together = both.generate(prompts, adapter_names=names, do_sample=False, **settings)
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        alone = both.generate([prompt], adapter_names=[name], do_sample=False, **settings)
        for several, one in zip(together.logits, alone.logits, strict=True):
            assert torch.equal(several[row], one[0])
