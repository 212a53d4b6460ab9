"""Checkpoints that hold quantised weights: bitsandbytes' as transformers saves them, GPTQ, AWQ, compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import unspool
from unspool.errors import CheckpointError, Unsupported
from unspool.models.base import Model
from unspool.models.layers.linear import Linear
from unspool.models.layers.quantised import QuantisedForm
from unspool.weights import load_model

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make_checkpoint("llama", tmp_path / "plain")
    return tmp_path / "plain"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result.float()


def near(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def quantised(model: Model) -> int:
    return sum(isinstance(m._packed, QuantisedForm) for m in model.modules() if isinstance(m, Linear))


def rewrite(folder: Path, settings: dict[str, Any], change: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    """Exchange the weights of the projections for what `change` makes of each, by its module's name."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith(tuple(f"{part}.weight" for part in PROJECTIONS)):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{key}": value for key, value in change(module, tensors.pop(name)).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_four_bits(kind: str, double: bool, llama: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "four")
    ours = load_model(tmp_path / "four", dtype="float32")
    assert quantised(ours) == 4 * ours.spec.layers
    layer = theirs.model.layers[1]
    for module, parts in (
        (ours.layers[1].attention.qkv, [getattr(layer.self_attn, f"{part}_proj") for part in "qkv"]),
        (ours.layers[1].mlp.down, [layer.mlp.down_proj]),
    ):
        each = [bnb.functional.dequantize_4bit(part.weight.data, part.weight.quant_state) for part in parts]
        expected = torch.cat([value.float() for value in each])
        got = module.state_dict()["weight"]
        assert torch.allclose(got, expected, rtol=2**-8, atol=1e-7)
    # these random nets make much of the table's rounding to bf16
    assert near(logits(ours), logits(theirs)) < 0.03
    mine = load_model(llama, dtype="float32", quantize=config)
    assert near(logits(mine), logits(theirs)) < (0.06 if not double else 0.1)


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_eight_bits(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "eight")
    ours = load_model(tmp_path / "eight", dtype="float32")
    assert quantised(ours) == 4 * ours.spec.layers
    plain = load_model(llama, dtype="float32")
    stored = load_file(tmp_path / "eight" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    expected = stored[f"{name}.weight"].float() * stored[f"{name}.SCB"][:, None] / 127
    assert torch.allclose(ours.layers[0].mlp.down.state_dict()["weight"], expected, rtol=1e-5)
    assert near(logits(ours), logits(plain)) < 0.1


def nibbles(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Words of eight codes each along the last axis, written the slow way."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for word in range(words.shape[1]):
        for place, column in enumerate(order):
            words[:, word] |= codes[:, 8 * word + column].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


class Drawn:
    """Codes, scales and zero points of every module, and the weights that they mean."""

    def __init__(self, group: int, symmetric: bool) -> None:
        self.group, self.symmetric = group, symmetric
        self.plain: dict[str, Tensor] = {}
        self.draw = torch.Generator().manual_seed(0)

    def of(self, module: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs, inputs = weight.shape
        groups = inputs // self.group
        codes = torch.randint(0, 16, (outputs, inputs), generator=self.draw)
        scales = (torch.rand(outputs, groups, generator=self.draw) * 0.05 + 0.01).half()
        zeros = torch.full((outputs, groups), 8)
        if not self.symmetric:
            zeros = torch.randint(1, 16, (outputs, groups), generator=self.draw)
        spread = [value.repeat_interleave(self.group, dim=1) for value in (zeros, scales.float())]
        self.plain[f"{module}.weight"] = (codes - spread[0]) * spread[1]
        return codes, scales, zeros

    def check(self, folder: Path, plain: Path) -> None:
        ours = load_model(folder, dtype="float32")
        assert quantised(ours) == 4 * ours.spec.layers
        tensors = load_file(plain / "model.safetensors")
        save_file({**tensors, **self.plain}, plain / "model.safetensors", metadata={"format": "pt"})
        expected = load_model(plain, dtype="float32")
        for name, value in expected.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, rtol=2**-9, atol=2e-4), name
        assert near(logits(ours), logits(expected)) < 1e-2
        ids = torch.arange(3, 9)[None]
        model = unspool.AutoModelForCausalLM.from_pretrained(folder)
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 6


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "quantised"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(("symmetric", "form"), [(True, "gptq"), (False, "gptq"), (False, "gptq_v2")])
def test_gptq(symmetric: bool, form: str, llama: Path, copied: Path) -> None:
    drawn = Drawn(32, symmetric)

    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales, zeros = drawn.of(module, weight)
        return {
            "qweight": nibbles(codes).t(),
            "qzeros": nibbles(zeros.t() - (1 if form == "gptq" else 0)),
            "scales": scales.t(),
            "g_idx": (torch.arange(weight.shape[1]) // 32).int(),
        }

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": symmetric, "checkpoint_format": form}
    rewrite(copied, settings, change)
    drawn.check(copied, llama)
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.g_idx"
    save_file({**tensors, name: tensors[name].flip(0)}, copied / "model.safetensors")
    with pytest.raises(Unsupported, match="desc_act"):
        load_model(copied)


def test_awq(llama: Path, copied: Path) -> None:
    drawn, order = Drawn(64, False), (0, 2, 4, 6, 1, 3, 5, 7)

    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales, zeros = drawn.of(module, weight)
        return {"qweight": nibbles(codes.t(), order), "qzeros": nibbles(zeros.t(), order), "scales": scales.t()}

    rewrite(copied, {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, change)
    drawn.check(copied, llama)
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["version"] = "marlin"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="'marlin' cannot be read here"):
        load_model(copied)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_of_four_bits(symmetric: bool, llama: Path, copied: Path) -> None:
    drawn = Drawn(32, symmetric)

    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales, zeros = drawn.of(module, weight)
        made = {"weight_packed": nibbles(codes), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
        return made if symmetric else {**made, "weight_zero_point": nibbles(zeros.t()).t()}

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    settings = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    rewrite(copied, {"quant_method": "compressed-tensors", **settings}, change)
    drawn.check(copied, llama)
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="type 'float' with 4 bits"):
        load_model(copied)


def test_compressed_tensors_of_eight_bits(llama: Path, copied: Path) -> None:
    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    settings = {"format": "int-quantized", "config_groups": {"group_0": {"weights": weights}}}
    rewrite(copied, {"quant_method": "compressed-tensors", **settings}, change)
    ours = load_model(copied)
    assert quantised(ours) == 4 * ours.spec.layers
    assert near(logits(ours), logits(load_model(llama))) < 0.1


WAYS = {
    "w4": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "w8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "w8 groups": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    "fp8 tensor": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_what_compressed_tensors_writes(way: str, llama: Path, tmp_path: Path) -> None:
    """The library quantises, transformers saves and loads it again, and we read the same and decode both."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**WAYS[way]))
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(made, config)
    for module in made.modules():
        if hasattr(module, "quantization_scheme"):
            weight = module.weight.data
            count = module.weight_scale.numel() // weight.shape[0]
            rows = weight.view(weight.shape[0], count, -1) if count else weight.view(1, 1, -1)
            scales, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scales.reshape(module.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(tmp_path / "made")
    compressor.update_config(tmp_path / "made")

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    expected = theirs.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(unspool.wrap(theirs).generate(IDS, max_new_tokens=5, do_sample=False), expected)
    ours = load_model(tmp_path / "made", dtype="float32")
    assert quantised(ours) == (4 * ours.spec.layers if way in ("w4", "w8") else 0)
    found, weight = (
        ours.layers[1].mlp.down.state_dict()["weight"],
        theirs.model.layers[1].mlp.down_proj.weight.detach(),
    )
    torch.testing.assert_close(found, weight, rtol=2**-9, atol=1e-6)
    assert near(logits(ours), logits(theirs)) < {"w4": 5e-3, "w8": 0.06}.get(way, 1e-5)


def test_fp8_of_blocks(llama: Path, copied: Path) -> None:
    """As DeepSeek's and Qwen's checkpoints have it, with blocks at the edges that are not whole."""
    plain: dict[str, Tensor] = {}

    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight.shape
        values = weight.to(torch.float8_e4m3fn)
        scales = torch.rand(-(-outputs // 24), -(-inputs // 40), generator=torch.Generator().manual_seed(outputs)) + 0.5
        rows = torch.arange(outputs)[:, None] // 24, torch.arange(inputs)[None] // 40
        plain[f"{module}.weight"] = values.float() * scales[rows]
        return {"weight": values, "weight_scale_inv": scales}

    rewrite(copied, {"quant_method": "fp8", "weight_block_size": [24, 40]}, change)
    ours = load_model(copied, dtype="float32")
    tensors = load_file(llama / "model.safetensors")
    save_file({**tensors, **plain}, llama / "model.safetensors", metadata={"format": "pt"})
    assert near(logits(ours), logits(load_model(llama, dtype="float32"))) < 1e-6


@pytest.mark.parametrize("name", ["gptq", "gptq-desc-act", "gptq-asymmetric", "awq"])
def test_what_the_libraries_wrote(name: str) -> None:
    """Checkpoints of GPTQModel and AutoAWQ (`make_quantised.py`), with the logits of those libraries' own layers."""
    folder = Path(__file__).parent / "fixtures" / "quantised" / name
    ours = load_model(folder, dtype="float32")
    assert quantised(ours) == (0 if name == "gptq-desc-act" else 4 * ours.spec.layers)
    expected = load_file(folder / "expected.safetensors")
    torch.testing.assert_close(
        ours.layers[0].mlp.down.state_dict()["weight"], expected["down"].float(), rtol=2**-9, atol=2e-4
    )
    with torch.no_grad():
        found = ours(expected["ids"]).logits
    assert near(found, expected["logits"]) < 1e-2  # the files' embedding and head are of 16 bits, the libraries' of 32


def test_what_is_missing_or_misshapen_is_named(copied: Path) -> None:
    drawn = Drawn(64, True)

    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales, zeros = drawn.of(module, weight)
        return {"qweight": nibbles(codes).t(), "qzeros": nibbles(zeros.t() - 1), "scales": scales.t()}

    rewrite(copied, {"quant_method": "gptq", "bits": 4, "group_size": 64}, change)
    whole = load_file(copied / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    without = {key: value for key, value in whole.items() if key != f"{name}.scales"}
    save_file(without, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}.scales'"):
        load_model(copied)
    save_file({**whole, f"{name}.qweight": whole[f"{name}.qweight"][:-1]}, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"qweight' has shape .* it must be"):
        load_model(copied)
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="GPTQ with 3 bits"):
        load_model(copied)
