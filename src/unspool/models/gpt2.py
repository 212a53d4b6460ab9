"""GPT-2 (Radford et al., 2019): learned positions, layer norms, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from unspool.cache.layout import LayerGroup
from unspool.errors import CheckpointError, Unsupported
from unspool.models.base import Attend, Batch, Model, ModelSpec
from unspool.models.layers.activation import activation
from unspool.models.layers.embedding import Embedding
from unspool.models.layers.linear import Linear

__all__ = ["GPT2", "GPT2Config"]


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """The shape of a GPT-2.

    Attributes:
        vocab_size, hidden_size, inner_size: widths of the vocabulary, the residual stream and the feed-forward layer.
        layers, heads: number of layers, and of heads per layer.
        positions: rows of the table of learned positions.
        act: name of the activation.
        eps: of the norms.
        tied: the head shares the embedding's weight.
        scales: per layer, factor of the attention scores.
    """

    vocab_size: int
    hidden_size: int
    inner_size: int
    layers: int
    heads: int
    positions: int
    act: str
    eps: float
    tied: bool
    scales: tuple[float, ...]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GPT2Config:
        """Read a checkpoint's `config.json`; values it leaves out are those of the smallest GPT-2.

        Raises:
            CheckpointError: the width is no multiple of the heads.
            Unsupported: the checkpoint has cross-attention.
        """
        config = {**_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
        hidden, heads, layers = config["n_embd"], config["n_head"], config["n_layer"]
        if hidden % heads:
            raise CheckpointError(f"config.json: `n_embd` {hidden} is not a multiple of `n_head` {heads}")
        if config["add_cross_attention"]:
            raise Unsupported("this GPT-2 has cross-attention (`add_cross_attention`), which has no native model here")
        base = (hidden // heads) ** -0.5 if config["scale_attn_weights"] else 1.0
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            inner_size=config.get("n_inner") or 4 * hidden,
            layers=layers,
            heads=heads,
            positions=config["n_positions"],
            act=config["activation_function"],
            eps=config["layer_norm_epsilon"],
            tied=config["tie_word_embeddings"],
            scales=tuple(base / (i + 1) if config["scale_attn_by_inverse_layer_idx"] else base for i in range(layers)),
        )


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


class Block(nn.Module):
    """One decoder layer: attention, then feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.scale = layer, config.scales[layer]
        self.heads, self.dim = config.heads, config.head_dim
        width = config.hidden_size
        self.attention_norm = nn.LayerNorm(width, eps=config.eps)
        self.qkv = Linear(width, width, width, width, bias=True)
        self.out = Linear(width, width, bias=True)
        self.mlp_norm = nn.LayerNorm(width, eps=config.eps)
        self.up = Linear(width, config.inner_size, bias=True)
        self.down = Linear(config.inner_size, width, bias=True)
        self.act = activation(config.act)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Apply the layer to the residual stream `x` `[tokens, hidden]`."""
        q, k, v = self.qkv(self.attention_norm(x)).view(-1, 3, self.heads, self.dim).unbind(1)
        x = x + self.out(attend(self.layer, q, k, v, self.scale))
        added: Tensor = x + self.down(self.act(self.up(self.mlp_norm(x))))
        return added


class GPT2(Model):
    """The whole decoder.

    Args:
        config: contents of `config.json`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        shape = GPT2Config.from_dict(config)
        self.spec = ModelSpec(
            family="gpt2",
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            heads=shape.heads,
            groups=(LayerGroup(tuple(range(shape.layers)), shape.heads, shape.head_dim),),
            max_positions=shape.positions,
            hard_limit=True,
        )
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.eps)  # first, as in `llama`
        self.embedding = Embedding(shape.vocab_size, shape.hidden_size)
        self.position_embedding = Embedding(shape.positions, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size)
        self.tied = shape.tied

    def body(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, `[tokens, hidden]`."""
        x: Tensor = batch.embedded(self.embedding(batch.tokens))
        x = x + self.position_embedding(batch.positions)
        for layer in self.layers[: batch.layers]:
            if batch.trace is not None:
                batch.trace.append(x)
            x = layer(x, batch.attend)
        x = self.norm(x)
        if batch.trace is not None:
            batch.trace.append(x)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab]` of `hidden` `[n, hidden]`."""
        logits: Tensor = self.lm_head(hidden)
        return logits
