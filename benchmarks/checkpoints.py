"""Checkpoints for benchmarks, made once and kept in ``.cache/checkpoints/`` of the repository.

Those of real shapes are made by transformers: bfloat16 weights, drawn with seed 0, saved as safetensors with a small
byte-level tokenizer. Neither shape has an end-of-sequence token, so every run makes exactly as many tokens as it asks
for. The copier has the shape and the tokenizer of the built-in model, and weights set by hand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "checkpoints"
STORYTELLER = ROOT / "src" / "unspool" / "assets" / "storyteller"

SHAPES: dict[str, dict[str, Any]] = {
    "T": {  # SmolLM2-135M
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "M": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
NAMES = {"T": "SmolLM2-135M", "M": "Llama-3.2-1B"}
SHARP, LOUD = 16, 8  # how sharply the copier looks at one place, and how loudly it says what it sees


def checkpoint(shape: str) -> Path:
    """The folder of the checkpoint of ``shape`` ("T" or "M"), made now if it is not there yet (M: half a minute)."""
    return _made(shape, lambda folder: _save(shape, folder))


def copier(tokens: int) -> Path:
    """The folder of a model that says again, token by token, what stood ``tokens`` tokens before."""
    return _made(f"copier-{tokens}", lambda folder: _save_copier(tokens, folder))


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled by ``make`` if it is not there yet."""
    folder = CACHE / name
    if not folder.exists():
        unfinished = CACHE / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def _save(shape: str, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape],
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    _save_tokenizer(folder)


def _save_copier(tokens: int, folder: Path) -> None:
    """One layer looks back, the others do a layer's work and add nothing.

    A token's vector is a half of ones, the same for all tokens, and a half of signs, its code. The queries and keys of
    layer 0 see the ones alone, so rotary positions alone tell where its heads look: at ``distance`` the score is
    ``SHARP`` times the sum over rotary frequencies f of f * cos(f * (distance - (tokens - 1))). That is 13 below its
    highest one place aside, and more further off. Values are the codes found there; the output adds them, ``LOUD``
    times as strong as the token's own, to the half of codes, which is all that the head reads.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((STORYTELLER / "config.json").read_text())
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    half, shared = hidden // 2, heads // kv_heads
    assert kv_heads * dim == half, "the values must hold a code"
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * 0.02

    codes = torch.randint(0, 2, (vocab, half), generator=draw) * 2.0 - 1
    weights = {
        "model.embed_tokens.weight": torch.cat([torch.ones(vocab, half), codes], 1),
        "model.norm.weight": torch.cat([torch.zeros(half), torch.full((half,), 1 / LOUD)]),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        weights |= {
            name + "input_layernorm.weight": torch.ones(hidden),
            name + "self_attn.q_proj.weight": noise(heads * dim, hidden),
            name + "self_attn.k_proj.weight": noise(kv_heads * dim, hidden),
            name + "self_attn.v_proj.weight": noise(kv_heads * dim, hidden),
            name + "self_attn.o_proj.weight": torch.zeros(hidden, heads * dim),
            name + "post_attention_layernorm.weight": torch.ones(hidden),
            name + "mlp.gate_proj.weight": noise(inner, hidden),
            name + "mlp.up_proj.weight": noise(inner, hidden),
            name + "mlp.down_proj.weight": torch.zeros(hidden, inner),
        }

    frequency = config["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    length, angle = (SHARP * frequency * dim**0.5).sqrt(), frequency * (tokens - 1)
    query = torch.cat([length * angle.cos(), -length * angle.sin()]).float()  # turned back by tokens - 1 places
    key = torch.cat([length, torch.zeros(dim // 2)]).float()
    ones = torch.cat([torch.full((half,), 1 / half), torch.zeros(half)])
    read = torch.eye(half).view(kv_heads, 1, dim, half).repeat(1, shared, 1, 1).view(heads * dim, half)
    first = "model.layers.0.self_attn."
    weights[first + "q_proj.weight"] = query.repeat(heads)[:, None] * ones
    weights[first + "k_proj.weight"] = key.repeat(kv_heads)[:, None] * ones
    weights[first + "v_proj.weight"] = torch.cat([torch.zeros(half, half), torch.eye(half)], 1)
    weights[first + "o_proj.weight"][half:] = read.T * (LOUD / shared)
    save_file({name: value.bfloat16() for name, value in weights.items()}, folder / "model.safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORYTELLER / name, folder)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["once upon a time there was a small engine that turned models into words"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)


if __name__ == "__main__":
    for each in SHAPES:
        checkpoint(each)
