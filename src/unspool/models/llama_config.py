"""One description for every family built like Llama, and how each family's `config.json` says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unspool.cache.layout import LayerGroup
from unspool.errors import CheckpointError
from unspool.models.layers.rotary import Rope

__all__ = ["LlamaConfig"]

_Json = Mapping[str, Any]
_Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a decoder of rotary attention and gated feed-forward layers.

    Attributes:
        family: `model_type` of the checkpoint.
        vocab_size, hidden_size, inner_size: widths of the vocabulary, the residual stream and the feed-forward layer.
        layers, heads, kv_heads, head_dim: number of layers; of query and key/value heads per layer; width of a head.
        max_positions: positions the model was made for.
        rope: rotary parameters.
        windows: per layer, how many tokens a query sees, itself included; `None` for all.
        rotated: per layer, whether queries and keys are turned.
        act: name of the gate's activation.
        eps: of the norms.
        tied: the head shares the embedding's weight.
        qkv_bias, out_bias, mlp_bias: which projections have a bias.
        qk_norm: queries and keys are normalised per head, over the full width of all heads, or not.
        norm_after: norms follow attention and feed-forward (OLMo 2) instead of preceding them.
        scale: factor of the attention scores.
        embedding_multiplier, residual_multiplier, logits_divisor: Granite's scalars.
        initializer_range: standard deviation of fresh weights.
    """

    family: str
    vocab_size: int
    hidden_size: int
    inner_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope: Rope
    windows: _Windows
    rotated: tuple[bool, ...]
    act: str
    eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: Literal["head", "width"] | None = None
    norm_after: bool = False
    scale: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config: _Json) -> LlamaConfig:
        """Read a checkpoint's `config.json`; values it leaves out are the family's own.

        Raises:
            CheckpointError: the file describes heads that do not divide, or a scaling that is unknown.
        """
        family = config["model_type"]
        given = {name: value for name, value in config.items() if value is not None or name == "sliding_window"}
        config = {**_DEFAULTS, **_FAMILY_DEFAULTS[family], **given}
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        biased = bool(config["attention_bias"])
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            inner_size=config["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=config["max_position_embeddings"],
            rope=_FAMILY_ROPES.get(family, _rope)(config, head_dim),
            windows=_FAMILY_WINDOWS.get(family, _no_windows)(config),
            rotated=_rotated(config) if family == "smollm3" else (True,) * layers,
            act=config["hidden_act"],
            eps=config["rms_norm_eps"],
            tied=config["tie_word_embeddings"],
            qkv_bias=biased or family == "qwen2",
            out_bias=biased and family != "qwen2",
            mlp_bias=config["mlp_bias"],
            qk_norm=_QK_NORMS.get(family),
            norm_after=family == "olmo2",
            scale=config["attention_multiplier"] if family == "granite" else head_dim**-0.5,
            embedding_multiplier=config["embedding_multiplier"],
            residual_multiplier=config["residual_multiplier"],
            logits_divisor=config["logits_scaling"],
            initializer_range=config["initializer_range"],
        )

    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers by window, in the order in which the windows first appear."""
        return tuple(
            LayerGroup(
                tuple(i for i, other in enumerate(self.windows) if other == window),
                self.kv_heads,
                self.head_dim,
                window,
            )
            for window in dict.fromkeys(self.windows)
        )


def _rope(config: _Json, head_dim: int) -> Rope:
    return Rope.from_dict(config, head_dim, config["max_position_embeddings"], config["default_theta"])


def _phi3_rope(config: _Json, head_dim: int) -> Rope:
    """Phi-3 once called its longrope "su", and "yarn" before that."""
    options = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if (options.get("rope_type") or options.get("type")) == "yarn":
        options["rope_type"] = "longrope"
    return _rope({**config, "rope_scaling": None, "rope_parameters": options}, head_dim)


def _no_windows(config: _Json) -> _Windows:
    return (None,) * int(config["num_hidden_layers"])


def _one_window(config: _Json) -> _Windows:
    """Mistral, Phi-3: the same window in all layers."""
    return (config.get("sliding_window"),) * int(config["num_hidden_layers"])


def _listed_windows(config: _Json) -> _Windows:
    """Qwen, SmolLM3: `layer_types` names the layers with a window; without it, `max_window_layers` or NoPE layers."""
    layers: int = config["num_hidden_layers"]
    window = config.get("sliding_window") if config["use_sliding_window"] else None
    if window is None:
        return (None,) * layers
    if "layer_types" in config:
        return tuple(window if kind == "sliding_attention" else None for kind in config["layer_types"][:layers])
    if config["model_type"] == "smollm3":
        return tuple(None if turned else window for turned in _rotated(config))
    return tuple(window if i >= config["max_window_layers"] else None for i in range(layers))


def _rotated(config: _Json) -> tuple[bool, ...]:
    """SmolLM3 leaves out the rotation in some layers; its list says 1 where there *is* one."""
    layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    listed = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    return tuple(bool(turned) for turned in listed[:layers])


_FAMILY_ROPES: dict[str, Callable[[_Json, int], Rope]] = {"phi3": _phi3_rope}
_FAMILY_WINDOWS: dict[str, Callable[[_Json], _Windows]] = {
    "mistral": _one_window,
    "phi3": _one_window,
    "qwen2": _listed_windows,
    "qwen3": _listed_windows,
    "smollm3": _listed_windows,
}
_QK_NORMS: dict[str, Literal["head", "width"]] = {"qwen3": "head", "olmo2": "width"}

# What transformers takes where a file says nothing, first for all families, then where one differs.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "default_theta": 10000.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_multiplier": 1.0,
    "use_sliding_window": False,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "smollm3": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "default_theta": 2000000.0,
        "no_rope_layer_interval": 4,
    },
    "phi3": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "granite": {},
    "olmo2": {"vocab_size": 50304, "rms_norm_eps": 1e-5},
}
