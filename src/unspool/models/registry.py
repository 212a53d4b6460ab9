"""Which class builds which `model_type`, and models without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from unspool.errors import CheckpointError
from unspool.models.base import Model

__all__ = ["allocate", "build", "dtype_of", "empty", "supported"]

# Imported when first asked for; the class takes the contents of `config.json`.
_CLASSES: dict[str, str] = {
    "gpt2": "unspool.models.gpt2:GPT2",
    "granite": "unspool.models.llama:Llama",
    "llama": "unspool.models.llama:Llama",
    "mistral": "unspool.models.llama:Llama",
    "olmo2": "unspool.models.llama:Llama",
    "phi3": "unspool.models.llama:Llama",
    "qwen2": "unspool.models.llama:Llama",
    "qwen3": "unspool.models.llama:Llama",
    "smollm3": "unspool.models.llama:Llama",
}


def supported() -> tuple[str, ...]:
    """Every `model_type` that has a native class."""
    return tuple(sorted(_CLASSES))


def empty(config: Mapping[str, Any], dtype: torch.dtype | str | None = None) -> Model:
    """A model that has shapes but no memory (on the `meta` device), in evaluation mode.

    Args:
        config: contents of `config.json`.
        dtype: of the weights; `None` or `"auto"` takes the configuration's.

    Raises:
        CheckpointError: the `model_type` is missing or unknown, or the configuration contradicts itself.
        Unsupported: the model has a part that is not there natively.
    """
    family = config.get("model_type")
    if family not in _CLASSES:
        named = "names no `model_type`" if family is None else f"names the `model_type` {family!r}"
        raise CheckpointError(
            f"config.json {named}, which has no native model here; supported are {', '.join(supported())}. Other "
            f"transformers models run through the `transformers` extra: `pip install unspool[transformers]`"
        )
    module, name = _CLASSES[family].split(":")
    make: type[Model] = getattr(import_module(module), name)
    with torch.device("meta"):
        model = make(config)
    return model.to(dtype_of(dtype, config)).eval()


def build(
    config: Mapping[str, Any], dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> Model:
    """A model with fresh weights, for training from scratch.

    Matrices are drawn from a normal distribution with the configuration's `initializer_range`, from torch's global
    generator; norms are 1 and biases 0.

    Args:
        config: contents of `config.json`.
        dtype: of the weights; `None` or `"auto"` takes the configuration's.
        device: where the weights live.
    """
    model = empty(config, dtype)
    allocate(model, device)
    deviation = float(config.get("initializer_range", 0.02))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, deviation)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return model


def allocate(model: Model, device: torch.device | str) -> None:
    """Give every parameter of an empty model memory, not yet filled; a tied head shares the embedding's.

    (`nn.Module.to_empty` does the first half, but imports the compiler for it.)
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(memory))
    if model.tied:
        model.lm_head.register_parameter("weight", model.embedding.weight)


def dtype_of(dtype: torch.dtype | str | None, config: Mapping[str, Any]) -> torch.dtype:
    """The floating dtype meant by an argument: a dtype, its name, or `None` / `"auto"` for the configuration's.

    Raises:
        ValueError: no such floating dtype.
    """
    if dtype is None or dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype") or torch.float32
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"`dtype` is {dtype!r}; use 'auto', 'float32', 'bfloat16', 'float16' or a torch.dtype")
        dtype = found
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"`dtype` is {dtype!r}; weights can be float32, bfloat16, float16 or float64")
    return dtype
