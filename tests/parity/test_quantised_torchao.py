"""torchao: its weight-only formats through transformers, and natively from the checkpoints that transformers saves."""

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
from unspool.models.layers.linear import Linear
from unspool.models.layers.quantised import QuantisedForm
from unspool.weights import load_model

pytestmark = pytest.mark.filterwarnings("ignore")
torchao = pytest.importorskip("torchao.quantization")

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
DOWN = "model.layers.0.mlp.down_proj"


def four_bits() -> Any:
    from torchao.quantization.granularity import PerGroup

    return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


KINDS: dict[str, Callable[[], Any]] = {
    "int8": lambda: torchao.Int8WeightOnlyConfig(),
    "int4": four_bits,
    "fp8": lambda: torchao.Float8WeightOnlyConfig(),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_checkpoint("llama", folder)
    return folder


def quantised(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config), dtype=torch.float32)


def plain(model: Any, llama: Path) -> Any:
    """The same model with the weights that torchao's stand for."""
    weights = {
        name: value.dequantize().float() if hasattr(value, "tensor_data_names") else value
        for name, value in model.state_dict().items()
    }
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    whole.load_state_dict(weights)
    return whole


def near(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def forms(model: Any) -> int:
    return sum(isinstance(m._packed, QuantisedForm) for m in model.modules() if isinstance(m, Linear))


@pytest.mark.parametrize("kind", KINDS)
def test_through_transformers(kind: str, llama: Path) -> None:
    theirs = quantised(llama, KINDS[kind]())
    for way in ({}, {"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(2)
        expected = theirs.generate(IDS, max_new_tokens=6, **way)
        torch.manual_seed(2)
        assert torch.equal(unspool.wrap(theirs).generate(IDS, max_new_tokens=6, **way), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_read_natively(kind: str, llama: Path, tmp_path: Path) -> None:
    theirs = quantised(llama, KINDS[kind]())
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = plain(theirs, llama)(IDS).logits
    ours = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert forms(ours) == (0 if kind == "fp8" else 4 * ours.spec.layers)
    weight = theirs.get_submodule(DOWN).weight.dequantize().float()
    torch.testing.assert_close(ours.layers[0].mlp.down.state_dict()["weight"], weight, rtol=2**-10, atol=1e-6)
    # eight bits round what goes in as well
    assert near(ours(IDS).logits, expected) < {"int8": 0.06, "int4": 1e-3, "fp8": 1e-5}[kind]
    assert ours.generate(IDS, max_new_tokens=4).shape == (2, 16)


def rewritten(llama: Path, folder: Path, kind: str, facts: dict[str, Any], parts: dict[str, Tensor]) -> Path:
    """A checkpoint of which one module is quantised by hand."""
    tensors = load_file(llama / "model.safetensors")
    del tensors[f"{DOWN}.weight"]
    tensors |= {f"{DOWN}._weight_{name}": value.contiguous() for name, value in parts.items()}
    metadata = {"format": "pt", f"{DOWN}.weight": json.dumps({"_type": kind, "_data": facts})}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    config = json.loads((llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    return folder


def test_int4_of_gpus_is_read(llama: Path, tmp_path: Path) -> None:
    """torchao packs it with a library for GPUs alone; what the numbers mean is in its own GPTQ."""
    gptq = pytest.importorskip("torchao.prototype.gptq.api")
    draw = torch.Generator().manual_seed(0)
    outputs, inputs = load_file(llama / "model.safetensors")[f"{DOWN}.weight"].shape
    codes = torch.randint(-8, 8, (outputs, inputs), generator=draw).to(torch.int8)
    scales = torch.rand(inputs // 32, outputs, generator=draw) + 0.5
    zeros = torch.randn(inputs // 32, outputs, generator=draw)
    packed = codes[:, ::2] & 15 | codes[:, 1::2] << 4
    parts = {"qdata": packed, "scale": scales, "zero_point": zeros}
    folder = rewritten(llama, tmp_path / "made", "Int4Tensor", {"block_size": [1, 32]}, parts)
    expected = gptq._int4_row_dequantize_zp(codes, scales, zeros, 32)
    found = load_model(folder, dtype="float32").layers[0].mlp.down
    assert isinstance(found._packed, QuantisedForm)
    torch.testing.assert_close(found.state_dict()["weight"], expected, rtol=2**-9, atol=5e-3)


@pytest.mark.parametrize("block", [(1, 32), (None, None), (8, 16)])
def test_other_blocks_become_plain_weights(block: tuple[Any, Any], llama: Path, tmp_path: Path) -> None:
    outputs, inputs = load_file(llama / "model.safetensors")[f"{DOWN}.weight"].shape
    size = block[0] or outputs, block[1] or inputs
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (outputs, inputs), generator=draw).to(torch.int8)
    counts = outputs // size[0], inputs // size[1]
    scales, zeros = torch.rand(counts, generator=draw), torch.randint(-9, 9, counts, generator=draw).to(torch.int8)
    parts = {"qdata": values, "scale": scales, "zero_point": zeros}
    folder = rewritten(llama, tmp_path / "made", "Int8Tensor", {"block_size": list(size)}, parts)
    expected = torch.empty(outputs, inputs)
    for row in range(outputs):
        for column in range(inputs):
            at = row // size[0], column // size[1]
            expected[row, column] = (float(values[row, column]) - float(zeros[at])) * scales[at]
    torch.testing.assert_close(load_model(folder, dtype="float32").layers[0].mlp.down.state_dict()["weight"], expected)


def test_what_cannot_be_read_is_named(llama: Path, tmp_path: Path) -> None:
    parts = {"qdata": torch.zeros(4, 4), "scale": torch.ones(1)}
    folder = rewritten(llama, tmp_path / "made", "Int4TilePackedTo4dTensor", {}, parts)
    with pytest.raises(Unsupported, match=r"is a Int4TilePackedTo4dTensor of torchao.*unspool\[torchao"):
        load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not say in its metadata what '.*down_proj' is made of"):
        load_model(folder)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("config", "name", "group"),
    [
        (lambda: torchao.Int8WeightOnlyConfig(), "int8", 0),
        (lambda: torchao.Int4WeightOnlyConfig(group_size=32), "int4", 32),
        (four_bits, "int4", 32),
    ],
)
def test_quantising_natively_while_loading(config: Any, name: str, group: int, stored: bool, llama: Path) -> None:
    from transformers import TorchAoConfig

    given = TorchAoConfig(config())
    ours = unspool.AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=given.to_dict() if stored else given, dtype="float32"
    )
    assert forms(ours) == 4 * ours.spec.layers
    code = ours.layers[0].mlp.down._packed.code
    assert (code.name, code.group) == (name, group)
    same = load_model(llama, quantize=f"{name}-g{group}" if group else name, dtype="float32")
    mine, other = (model.layers[1].attention.qkv.state_dict()["weight"] for model in (ours, same))
    assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "config",
    [
        lambda: torchao.Float8WeightOnlyConfig(),
        lambda: torchao.Float8DynamicActivationFloat8WeightConfig(),
        lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
        lambda: torchao.Int4WeightOnlyConfig(group_size=48),
    ],
)
def test_what_is_not_quantised_natively_is_named(config: Any, llama: Path) -> None:
    from transformers import TorchAoConfig

    made = config()
    with pytest.raises(Unsupported, match=rf"torchao's {type(made).__name__}.*not quantised natively.*unspool\.wrap"):
        unspool.AutoModelForCausalLM.from_pretrained(llama, quantization_config=TorchAoConfig(made))
