"""Tiny models whose weights are arithmetic, the same on every machine and with every version of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": "float32",
}


# Deeper ones, for what looks into layers.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "deep": CONFIG | {"num_hidden_layers": 8},
    "mistral": CONFIG
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 6, "sliding_window": 6},
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 6,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": "float32",
    },
}


def weights(kind: str = "llama") -> dict[str, Tensor]:
    """Every weight by its name in a checkpoint."""
    config = CONFIGS[kind]
    shapes = _gpt2_shapes(config) if kind == "gpt2" else _llama_shapes(config)
    made = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        noise = _noise(shape, seed)
        norm = len(shape) == 1 and name.endswith(".weight")
        made[name] = 1.0 + 0.4 * noise if norm else 0.7 * noise
    return made


def _llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj": (hidden // 2, hidden) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (hidden, inner)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _gpt2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config["vocab_size"], width)}
    shapes["wpe.weight"] = (config["n_positions"], width)
    for layer in range(config["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.weight": (width,), f"h.{layer}.{norm}.bias": (width,)}
        for name, inputs, outputs in (
            ("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)
        ):  # fmt: skip
            shapes[f"h.{layer}.{name}.weight"] = (inputs * width, outputs * width)
            shapes[f"h.{layer}.{name}.bias"] = (outputs * width,)
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def save(folder: Path, kind: str = "llama") -> None:
    """Write the checkpoint."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    save_file(weights(kind), folder / "model.safetensors", metadata={"format": "pt"})


def table(vocab: int = 61) -> Tensor:
    """Logits `[vocab, vocab]` to be looked up."""
    return 5.0 * _noise((vocab, vocab), 99)


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers in [-0.5, 0.5), by an integer hash: every one is exact in fp32."""
    count = 1
    for size in shape:
        count *= size
    state = torch.arange(count, dtype=torch.int64) * 2654435761 + seed * 974711 + 12345
    for shift, factor in ((16, 2246822519), (13, 3266489917)):
        state = state & 0xFFFFFFFF
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
    state = state ^ (state >> 16)
    return ((state >> 10).float() / 2**22 - 0.5).view(shape)


def look_up(tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits `[..., vocab]` that depend on the newest token and its position alone."""
    return table()[(tokens + 7 * positions) % CONFIG["vocab_size"]]


def some_sevens(base: type) -> type:
    """A constraint of a caller's own on the library's `base`: so many multiples of seven in a row, but not 0."""

    class SomeSevens(base):  # type: ignore[misc]
        def __init__(self, seqlen: int) -> None:
            self.seqlen = seqlen
            self.reset()
            super().__init__()
            self.reset()

        def advance(self) -> int | None:
            return None if self.said == self.seqlen else 7 * (self.said + 1)

        def does_advance(self, token_id: int) -> bool:
            return token_id > 0 and token_id % 7 == 0 and self.said < self.seqlen

        def update(self, token_id: int) -> tuple[bool, bool, bool]:
            stepped = self.does_advance(token_id)
            self.said = self.said + 1 if stepped else 0
            return stepped, self.said == self.seqlen, not stepped

        def reset(self) -> None:
            self.said = 0

        def remaining(self) -> int:
            return self.seqlen - self.said

        def copy(self, stateful: bool = False) -> Any:
            made = type(self)(self.seqlen)
            made.said = self.said if stateful else 0
            return made

    return SomeSevens


def arguments(call: dict[str, Any], library: Any) -> dict[str, Any]:
    """What `library`'s `generate()` gets for a stored call: prompts padded on the left, functions and objects made."""
    kwargs = dict(call)
    prompts = kwargs.pop("prompts")
    width = max(map(len, prompts))
    kwargs["input_ids"] = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    kwargs["attention_mask"] = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    if "constraints" in kwargs:
        sevens = some_sevens(library.Constraint)
        kinds = {"phrase": library.PhrasalConstraint, "one of": library.DisjunctiveConstraint, "sevens": sevens}
        kwargs["constraints"] = [kinds[kind](value) for kind, value in kwargs["constraints"]]
    if kwargs.pop("stop", False):
        kwargs["stopping_criteria"] = library.StoppingCriteriaList([_stop])
    if kwargs.pop("shift", False):
        kwargs["logits_processor"] = library.LogitsProcessorList([_shift])
    if kwargs.pop("allow", False):
        kwargs["prefix_allowed_tokens_fn"] = _allow
    return {"do_sample": False, **kwargs}


def sums(steps: Any) -> list[list[float]]:
    """Of each step `[rows, vocab]`, each row's sum over what is above -1e4."""
    return [[round(float(row[row > -1e4].sum()), 4) for row in step] for step in steps]


def _stop(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return input_ids[:, -1] % 2 == 1


def _shift(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores - (input_ids[:, -1:] % 7) * torch.arange(scores.shape[1]) / 20


def _allow(row: int, ids: Tensor) -> list[int]:
    return [token for token in range(3, CONFIG["vocab_size"]) if (token + int(ids[-1]) + row) % 3]
