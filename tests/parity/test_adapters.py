"""Native low-rank adapters against PEFT on transformers, in fp32: logits, greedy tokens, beams, mixed batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import VOCAB, make_checkpoint
from torch import Tensor

import unspool
from unspool.repositories import BUILT_IN, BUILT_IN_ADAPTERS

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "some": {"r": 3, "target_modules": "last"},
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "patterns": {"r": 4, "rank_pattern": {"last": 7}, "alpha_pattern": {r"[a-z]*\.1\..*last": 3}},
    "regex": {"r": 2, "target_modules": "regex"},
    "layers": {"r": 2, "layers_to_transform": [1]},
}
TARGETS = {"llama": LLAMA, "qwen2": LLAMA, "gpt2": ["c_attn", "c_proj", "c_fc"], "phi3": ["qkv_proj", "down_proj"]}
LAST = {"llama": "v_proj", "qwen2": "v_proj", "gpt2": "c_fc", "phi3": "down_proj"}


def make_adapter(model: Any, family: str, kind: str, folder: Path, seed: int = 1) -> Any:
    """A random adapter, saved by PEFT, in a `PeftModel` around `model`."""
    last = LAST[family]
    values = {"target_modules": TARGETS[family], **KINDS[kind]}
    if values["target_modules"] == "last":
        values["target_modules"] = [last]
    if values["target_modules"] == "regex":
        values["target_modules"] = rf".*\.[01]\..*({last}|{TARGETS[family][0]})"
    for pattern in ("rank_pattern", "alpha_pattern"):
        values[pattern] = {name.replace("last", last): number for name, number in values.get(pattern, {}).items()}
    config = peft.LoraConfig(init_lora_weights=False, fan_in_fan_out=family == "gpt2", **values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the sizes of DoRA's columns follow from what PEFT draws
        made = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for family in TARGETS:
        make_checkpoint(family, root / family)
    return {family: root / family for family in TARGETS}


def theirs(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = transformers.GenerationConfig()
    return model


def prompts(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


CASES = [("llama", kind) for kind in KINDS] + [
    (family, kind) for family in ("gpt2", "qwen2", "phi3") for kind in ("lora", "rslora", "dora")
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_one_adapter(checkpoints: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    their = make_adapter(theirs(checkpoints[family]), family, kind, tmp_path / "adapter")
    model, _ = load(checkpoints[family])
    ids = prompts(3)["input_ids"]
    bare = model(ids).logits.clone()
    ours = unspool.PeftModel.from_pretrained(model, tmp_path / "adapter")
    with torch.no_grad():
        logits = ours(ids).logits
        torch.testing.assert_close(logits, their(ids).logits, rtol=1e-5, atol=1e-5)
        assert (logits - bare).abs().max() > 0.01
    settings = {**prompts(3), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**settings), their.generate(**settings))
    beams = {**settings, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    assert torch.equal(ours.generate(**beams), their.generate(**beams))
    with ours.disable_adapter(), their.disable_adapter():
        assert torch.equal(model(ids).logits, bare)
        assert torch.equal(ours.generate(**settings), their.generate(**settings))
    assert torch.equal(ours.unload()(ids).logits, bare)


def load(folder: Path) -> tuple[Any, None]:
    model = unspool.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = unspool.GenerationConfig()
    return model, None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [4, 24])
def test_adapters_by_row(checkpoints: dict[str, Path], tmp_path: Path, family: str, rows: int) -> None:
    """Rows of different adapters in one batch are what PEFT makes of each; 24 rows feed more than a small step."""
    model, _ = load(checkpoints[family])
    expected: dict[str | None, Any] = {}
    inputs = prompts(rows)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for seed, kind in enumerate(["lora", "dora", "some"]):
        their = make_adapter(theirs(checkpoints[family]), family, kind, tmp_path / kind, seed)
        expected[kind] = their.generate(**inputs, **settings)
        model.load_adapter(tmp_path / kind, kind)
    expected[None] = theirs(checkpoints[family]).generate(**inputs, **settings)
    names = [(["lora", None, "dora", "some"] * 6)[row] for row in range(rows)]
    mixed = model.generate(**inputs, **settings, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], expected[name][row]), (row, name)
    logits = model(inputs["input_ids"], adapter_names=names).logits
    for row, name in enumerate(names):
        alone = model(inputs["input_ids"][row : row + 1], adapter_names=[name]).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-5)
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**inputs, **beams, adapter_names=names)
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = model.generate(**one, **beams, adapter_names=names[row : row + 1])
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_mixed_batch_is_pefts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's own `adapter_names` gives the same tokens."""
    their = make_adapter(theirs(checkpoints["llama"]), "llama", "lora", tmp_path / "a", 1)
    make_adapter(theirs(checkpoints["llama"]), "llama", "some", tmp_path / "b", 2)
    their.load_adapter(tmp_path / "b", "other")
    model, _ = load(checkpoints["llama"])
    ours = unspool.PeftModel.from_pretrained(model, tmp_path / "a")
    ours.load_adapter(tmp_path / "b", "other")
    call = {**prompts(4), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    names = ["other", "__base__", "default", "other"]
    assert torch.equal(ours.generate(**call, adapter_names=names), their.generate(**call, adapter_names=names))
    ours.set_adapter("other")
    their.set_adapter("other")
    assert ours.active_adapter == "other"
    assert torch.equal(ours.generate(**call), their.generate(**call))


@pytest.mark.parametrize("library", ["unspool", "peft"])
def test_seed_page(library: str) -> None:
    """The examples of the page on PEFT, with the import line changed, on the built-in model and adapter."""
    folder, path = BUILT_IN["storyteller"], str(BUILT_IN_ADAPTERS["storyteller-pirate"])
    kind: Any = {"unspool": unspool, "peft": transformers}[library]
    tokenizer = unspool.AutoTokenizer.from_pretrained(folder)
    base_model = kind.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    input_ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    PeftModel: Any = {"unspool": unspool, "peft": peft}[library].PeftModel

    model = PeftModel.from_pretrained(base_model, path)
    model.eval()
    with torch.no_grad():
        outputs = model.generate(
            input_ids,
            max_new_tokens=100,
            do_sample=False,
        )
    assert outputs[0].tolist() == EXPECTED.setdefault("greedy", outputs[0].tolist())
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model.generate(
            input_ids,
            max_new_tokens=200,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
    assert outputs[0].tolist() == EXPECTED.setdefault("sampled", outputs[0].tolist())
    text = tokenizer.decode(outputs[0])
    assert "Once upon a time" in text
    assert " o' " in text or "Arr" in text or "mate" in text


EXPECTED: dict[str, list[int]] = {}


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.06), ("int4", 0.015), ("nf4", 0.015)])
def test_on_quantised_weights(quantize: str, bound: float, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """As on a plain model with the very weights that the codes stand for, alone and in company."""
    for seed, kind in enumerate(("lora", "dora")):
        make_adapter(theirs(checkpoints["llama"]), "llama", kind, tmp_path / kind, seed)
    ours: Any = unspool.hub._load_model(checkpoints["llama"], "float32", "cpu", quantize=quantize)
    plain: Any = unspool.AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype="float32")
    plain.load_state_dict(ours.state_dict())
    inputs = prompts(3)
    bare = ours(**inputs).logits
    for name in ("lora", "dora"):
        for model in (ours, plain):
            model.load_adapter(tmp_path / name, adapter_name=name)
            model.set_adapter(name)
        found, expected = ours(**inputs).logits, plain(**inputs).logits
        assert float((found - expected).norm() / expected.norm()) < bound
        assert float((found - bare).norm() / bare.norm()) > 5 * bound
    names = ["lora", "dora", "__base__"]
    together = ours.generate(**inputs, max_new_tokens=6, do_sample=False, adapter_names=names)
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = ours.generate(**one, max_new_tokens=6, do_sample=False, adapter_names=names[row : row + 1])
        assert torch.equal(alone[0], together[row])
    ours.unload()
    assert torch.equal(ours(**inputs).logits, bare)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_peft_on_bitsandbytes(bits: int, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """PEFT around a model that bitsandbytes quantised, wrapped and enabled."""
    pytest.importorskip("bitsandbytes")
    for kind in ("lora", "dora"):
        make_adapter(theirs(checkpoints["llama"]), "llama", kind, tmp_path / kind)
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoints["llama"], quantization_config=config)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    model.load_adapter(str(tmp_path / "dora"), adapter_name="dora")
    for name in ("default", "dora") if bits == 4 else ("default",):  # PEFT's DoRA fails there on eight bits
        model.set_adapter(name)
        for way in ({}, {"num_beams": 3}, {"do_sample": True}):
            torch.manual_seed(1)
            expected = model.generate(**prompts(3), max_new_tokens=6, **way)
            torch.manual_seed(1)
            assert torch.equal(unspool.wrap(model).generate(**prompts(3), max_new_tokens=6, **way), expected)
            torch.manual_seed(1)
            with unspool.enabled():
                assert torch.equal(model.generate(**prompts(3), max_new_tokens=6, **way), expected)
