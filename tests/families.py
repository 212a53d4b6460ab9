"""Tiny checkpoints of every native family, written to disk by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 97

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-rope-llama3": (
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-rope-linear": ("Llama", _rope("linear", factor=4.0)),
    "llama-rope-dynamic": ("Llama", {"max_position_embeddings": 32, **_rope("dynamic", factor=2.0)}),
    "llama-rope-yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "phi3": ("Phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "Phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.3 * i for i in range(8)],
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}),
}


def make_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised transformers model of the family, in eval mode, with weights large enough to differ."""
    import transformers

    family, values = FAMILIES[name]
    shape = {} if family == "GPT2" else _SHAPE
    config = getattr(transformers, f"{family}Config")(**{**shape, **values, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.1)
    model.generation_config = transformers.GenerationConfig()
    return model


def make_checkpoint(name: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Write the family's tiny checkpoint to `folder`; returns transformers' model of it, in fp32."""
    model = make_model(name, seed, **changes)
    model.save_pretrained(folder)
    return model
