"""Which tensors of a checkpoint make which parameter of a native model. Data, and one function to unfold it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from unspool.models.base import Model

__all__ = ["Source", "Target", "is_ignored", "targets"]


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor in a checkpoint.

    Attributes:
        name: as Hugging Face saves it.
        prefix: leading part that files saved from the bare decoder lack.
        shape: what the configuration says it must be.
    """

    name: str
    prefix: str
    shape: tuple[int, ...]

    @property
    def bare(self) -> str:
        """The name without the prefix."""
        return self.name.removeprefix(self.prefix)


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter of the model, made of `sources` joined along its first axis.

    Attributes:
        name: in the model.
        parameter: the parameter itself.
        sources: its parts, in order.
        transposed: the file holds `[in, out]` where the model holds `[out, in]`.
    """

    name: str
    parameter: Tensor
    sources: tuple[Source, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class _Table:
    """One family's names: parts of a model's parameter names, and the tensors that make them."""

    prefix: str
    layers: str
    outer: dict[str, str]
    inner: dict[str, tuple[str, ...]]
    transposed: tuple[str, ...] = ()


_LLAMA = _Table(
    prefix="model.",
    layers="model.layers",
    outer={"embedding": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
    inner={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "attention.norm": ("self_attn.q_norm", "self_attn.k_norm"),
        "attention.norm.q": ("self_attn.q_norm",),
        "attention.norm.k": ("self_attn.k_norm",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
)
_PHI3 = _Table(
    _LLAMA.prefix,
    _LLAMA.layers,
    _LLAMA.outer,
    {**_LLAMA.inner, "attention.qkv": ("self_attn.qkv_proj",), "mlp.gate_up": ("mlp.gate_up_proj",)},
)
_OLMO2 = _Table(
    _LLAMA.prefix,
    _LLAMA.layers,
    _LLAMA.outer,
    {
        **_LLAMA.inner,
        "attention_norm": ("post_attention_layernorm",),
        "mlp_norm": ("post_feedforward_layernorm",),
    },
)
_GPT2 = _Table(
    prefix="transformer.",
    layers="transformer.h",
    outer={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    inner={
        "attention_norm": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "out": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "up": ("mlp.c_fc",),
        "down": ("mlp.c_proj",),
    },
    transposed=("qkv", "out", "up", "down"),
)
_TABLES: dict[str, _Table] = {"gpt2": _GPT2, "phi3": _PHI3, "olmo2": _OLMO2}

# Constants that older files carry beside the weights: rotary frequencies and GPT-2's causal masks.
_IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def is_ignored(name: str) -> bool:
    """Whether a tensor is a constant that the model makes by itself."""
    return name.endswith(_IGNORED)


def targets(model: Model) -> Iterator[Target]:
    """Every parameter of `model` with the tensors that make it, in the model's order."""
    table = _TABLES.get(model.spec.family, _LLAMA)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, kind = name.rsplit(".", 1)
        if path.startswith("layers."):
            _, layer, inner = path.split(".", 2)
            bases = [f"{table.layers}.{layer}.{base}" for base in table.inner[inner]]
            transposed = inner in table.transposed and parameter.dim() == 2
        else:
            bases, transposed = [table.outer[path]], False
        sources = zip(bases, _shapes(modules[path], parameter, len(bases), transposed), strict=True)
        yield Target(
            name,
            parameter,
            tuple(Source(f"{base}.{kind}", table.prefix, shape) for base, shape in sources),
            transposed,
        )


def _shapes(module: nn.Module, parameter: Tensor, count: int, transposed: bool) -> list[tuple[int, ...]]:
    """Shapes of the `count` tensors that a module's parameter is made of."""
    shape = tuple(parameter.shape)
    if count == 1:
        return [shape[::-1] if transposed else shape]
    parts: tuple[int, ...] = module.parts  # type: ignore[assignment]
    return [(part, *shape[1:]) for part in parts]
