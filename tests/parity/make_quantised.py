"""Makes `fixtures/quantised`: tiny checkpoints that GPTQModel and AutoAWQ wrote, and what those libraries compute.

Both pin other versions of what we use, so they run in an environment of their own, on a CPU:

    pip install torch transformers==5.23.0 datasets autoawq==0.2.9 gptqmodel==5.8.0
    PYTHONPATH=tests python tests/parity/make_quantised.py
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from families import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "quantised"
TOKENIZER = Path(__file__).resolve().parents[2] / "src" / "unspool" / "assets" / "storyteller"
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
GPTQ = {
    "gptq": {"desc_act": False},
    "gptq-desc-act": {"desc_act": True},
    "gptq-asymmetric": {"desc_act": False, "sym": False},
}


def expected(plain: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' model computes with the weights that a library's layers stand for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    wrong = model.load_state_dict({f"{name}.weight": value for name, value in weights.items()}, strict=False)
    assert not wrong.unexpected_keys
    with torch.no_grad():
        logits = model(IDS).logits
    return {"ids": IDS, "logits": logits, "down": weights["model.layers.0.mlp.down_proj"].half()}


def keep(made: Path, name: str, found: dict[str, Tensor]) -> None:
    """Copy what is read of a checkpoint."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(made / "config.json", folder)
    tensors = load_file(made / "model.safetensors")
    halves = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "expected.safetensors")


def make_gptq(plain: Path, work: Path) -> None:
    """GPTQModel quantises with its own calibration, and its PyTorch layer says what the codes stand for."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    draw = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(3, 60, (64,), generator=draw), "attention_mask": torch.ones(64).long()}] * 8
    for name, settings in GPTQ.items():
        model = GPTQModel.load(str(plain), QuantizeConfig(bits=4, group_size=32, **settings), device="cpu")
        model.quantize(texts, batch_size=1)
        model.save(str(work / name))
        again = GPTQModel.load(str(work / name), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        layers = {key: part for key, part in again.model.named_modules() if hasattr(part, "dequantize_weight")}
        keep(work / name, name, expected(plain, {key: part.dequantize_weight().t() for key, part in layers.items()}))


def make_awq(plain: Path, work: Path) -> None:
    """AutoAWQ's layer packs codes (of plain rounding: its search for scales needs a GPU) and multiplies with them."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16)
    tensors: dict[str, Tensor] = dict(load_file(plain / "model.safetensors"))
    weights: dict[str, Tensor] = {}
    for name, part in list(model.model.layers.named_modules(prefix="model.layers")):
        if not isinstance(part, nn.Linear):
            continue
        rows = part.weight.data.float().view(part.out_features, -1, 32)
        low, high = rows.amin(2), rows.amax(2)
        scales = ((high - low) / 15).clamp(min=1e-5)
        zeros = (-(low / scales).round()).clamp(0, 15)
        codes = ((rows / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
        part.weight.data = ((codes - zeros[:, :, None]) * scales[:, :, None]).view_as(part.weight).half()
        layer = WQLinear_GEMM.from_linear(
            part, 4, 32, scales=scales.half().t().contiguous(), zeros=zeros.t().contiguous()
        )
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        eye = torch.eye(part.in_features, dtype=torch.float16)
        with torch.no_grad():
            weights[name] = layer(eye[None])[0].t().float()
    made = work / "awq"
    made.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, made / "model.safetensors")
    config: dict[str, Any] = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    (made / "config.json").write_text(json.dumps(config, indent=2))
    keep(made, "awq", expected(plain, weights))


def main() -> None:
    """Make all of them anew."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        os.chdir(work)  # GPTQModel leaves logs and parts of models where it runs
        make_checkpoint("llama", work / "plain", num_hidden_layers=1)
        for file in TOKENIZER.glob("tokenizer*.json"):  # GPTQModel wants one, and never uses it here
            shutil.copy(file, work / "plain")
        make_awq(work / "plain", work)
        make_gptq(work / "plain", work)


if __name__ == "__main__":
    main()
