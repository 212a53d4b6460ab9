"""Write trained weights as checkpoint folders that other libraries read: Hugging Face's and PEFT's file formats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lora import ALPHA, PARTS, RANK, adapters
from safetensors.torch import save_file
from torch import Tensor

NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def sizes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Rows of each part of the fused projections."""
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    return {"attention.qkv": [q, kv, kv], "mlp.gate_up": [config["intermediate_size"]] * 2}


def split_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our fused tensors under transformers' names, one per projection; a tied head is left out."""
    split: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        _, layer, rest = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
        stem = f"model.layers.{layer}." if layer else ""
        fused = rest.removesuffix(".weight")
        if fused in PARTS:
            parts = tensor.split(sizes(config).get(fused, [len(tensor)]))
            split.update({f"{stem}{part}.weight": piece for part, piece in zip(PARTS[fused], parts, strict=True)})
        elif rest != "lm_head.weight":
            split[stem + NAMES[rest]] = tensor
    return split


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """In half precision, and all at once: a reader sees the old file or the new one."""
    half = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}
    beside = path.with_suffix(".tmp")
    save_file(half, beside, metadata={"format": "pt"})
    beside.chmod(0o644)
    os.replace(beside, path)


def save_model(model: torch.nn.Module, config: Mapping[str, Any], generation: Mapping[str, Any], folder: Path) -> None:
    """``config.json``, ``generation_config.json`` and ``model.safetensors``."""
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_tensors(folder / "model.safetensors", split_weights(dict(model.named_parameters()), config))


def save_adapter(model: torch.nn.Module, base: str, folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` under PEFT names."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted(part.rsplit(".", 1)[-1] for parts in PARTS.values() for part in parts)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets,
    }
    write_json(folder / "adapter_config.json", settings)
    tensors = {f"base_model.model.model.{name}": tensor for name, tensor in adapters(model)}
    write_tensors(folder / "adapter_model.safetensors", tensors)
