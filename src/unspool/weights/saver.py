"""A native model becomes a folder that transformers, and this library, can load."""

from __future__ import annotations

import json
import os
from pathlib import Path

from unspool.models.base import Model
from unspool.types import FileName
from unspool.weights.names import targets

__all__ = ["save_model"]

_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def save_model(model: Model, folder: FileName) -> None:
    """Write `config.json` and `model.safetensors` under Hugging Face's names, projections apart.

    Each file is written under another name first and then put in its place, so a run that is cut short leaves what was
    there. The folder is made where it is missing.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    # not the parameters: a packed layer's is only a shape
    state = model.state_dict()
    for target in targets(model):
        whole = state[target.name].cpu()
        at = 0
        for source in target.sources:
            part = whole.t() if target.transposed else whole[at : at + source.shape[0]]
            tensors[source.name] = part.contiguous().clone()
            at += source.shape[0]
    config = {
        **model.config,
        "architectures": [_CLASSES[model.spec.family]],
        "dtype": str(model.dtype).removeprefix("torch."),
        "tie_word_embeddings": model.tied,
    }
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)  # what is written is plain
    unfinished = folder / f".model.safetensors.{os.getpid()}"
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, folder / "model.safetensors")
        unfinished.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / "config.json")
    finally:
        unfinished.unlink(missing_ok=True)
