"""Decoders built like Llama (Touvron et al., 2023).

They are Llama, Mistral, Qwen2, Qwen3, SmolLM2, SmolLM3, Phi-3, Granite and OLMo 2; `llama_config` says how they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.attention.native import NativeAttention
from unspool.kernels.elementwise import norm_heads
from unspool.kernels.program import Chosen, Stops
from unspool.models.base import Attend, Batch, Model, ModelSpec
from unspool.models.compiled import CompiledLayers
from unspool.models.layers.activation import gated
from unspool.models.layers.embedding import Embedding
from unspool.models.layers.linear import Linear
from unspool.models.layers.norm import RMSNorm
from unspool.models.layers.rotary import Rotary, Turn, rotate
from unspool.models.layers.watched import Watched
from unspool.models.llama_config import LlamaConfig

__all__ = ["Llama"]


class HeadNorm(Watched):
    """Qwen3's norm of queries and keys: each head by itself; query heads share one weight, key heads another."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.eps = config.heads, config.kv_heads, config.head_dim, config.eps
        self.weight = nn.Parameter(torch.ones(2 * config.head_dim))
        self.parts = (config.head_dim, config.head_dim)

    @property
    def pieces(self) -> tuple[tuple[int, Tensor], ...]:
        """How many heads follow each other, and their weight."""
        return (self.heads, self.weight[: self.dim]), (self.kv_heads, self.weight[self.dim :])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[tokens, heads + kv_heads, dim]`; in place where no gradient needs it."""
        (_, q), (_, k) = self.pieces
        if norm_heads(x[:, : self.heads], q, self.eps) and norm_heads(x[:, self.heads :], k, self.eps):
            return x
        weight = torch.cat((q.expand(self.heads, -1), k.expand(self.kv_heads, -1)))
        return F.rms_norm(x, (self.dim,), None, self.eps) * weight


class WidthNorm(Watched):
    """OLMo 2's norm of queries and keys: over all query heads together, and over all key heads together."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.width = config.heads * config.head_dim
        self.q = RMSNorm(self.width, config.eps)
        self.k = RMSNorm(config.kv_heads * config.head_dim, config.eps)
        self.eps = config.eps

    @property
    def pieces(self) -> tuple[tuple[int, Tensor], ...]:
        """As `HeadNorm.pieces`, with all heads as one."""
        return (1, self.q.weight), (1, self.k.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[tokens, heads + kv_heads, dim]`."""
        flat = x.flatten(1)
        return torch.cat((self.q(flat[:, : self.width]), self.k(flat[:, self.width :])), dim=-1).view(x.shape)


_QK_NORMS: dict[str, type[HeadNorm | WidthNorm]] = {"head": HeadNorm, "width": WidthNorm}


class Attention(Watched):
    """Causal self-attention with rotary positions and shared key/value heads."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.scale = layer, config.scale
        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, config.head_dim
        self.turned = config.heads + config.kv_heads
        self.rotated = config.rotated[layer]
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkv = Linear(config.hidden_size, q, kv, kv, bias=config.qkv_bias)
        self.out = Linear(q, config.hidden_size, bias=config.out_bias)
        self.norm = None if config.qk_norm is None else _QK_NORMS[config.qk_norm](config)

    def forward(self, x: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Attend from `x` `[tokens, hidden]`."""
        qkv = self.qkv(x).view(-1, self.turned + self.kv_heads, self.dim)
        qk = qkv[:, : self.turned]
        if self.norm is not None:
            qk = self.norm(qk)
        if self.rotated:
            qk = rotate(qk, turn)
        mixed = attend(self.layer, qk[:, : self.heads], qk[:, self.heads :], qkv[:, self.turned :], self.scale)
        out: Tensor = self.out(mixed)
        return out


class GatedMLP(Watched):
    """Feed-forward layer with a gate: `down(act(gate(x)) * up(x))` (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, config.inner_size, config.inner_size, bias=config.mlp_bias)
        self.down = Linear(config.inner_size, config.hidden_size, bias=config.mlp_bias)
        self.gated = gated(config.act)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` `[tokens, hidden]`."""
        out: Tensor = self.down(self.gated(self.gate_up(x)))
        return out


class Block(Watched):
    """One decoder layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = GatedMLP(config)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Apply the layer to the residual stream `x` `[tokens, hidden]`."""
        branch = scale(self.attention(self.attention_norm(x), turn, attend), self.multiplier)
        x, normal = self.mlp_norm.of_sum(x, branch)
        return add(x, scale(self.mlp(normal), self.multiplier))


class NormAfterBlock(Block):
    """OLMo 2's layer: the norms stand after attention and feed-forward, inside the residual branch."""

    def forward(self, x: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Apply the layer to the residual stream `x` `[tokens, hidden]`."""
        x = add(x, scale(self.attention_norm(self.attention(x, turn, attend)), self.multiplier))
        return add(x, scale(self.mlp_norm(self.mlp(x)), self.multiplier))


def scale(branch: Tensor, multiplier: float) -> Tensor:
    """`branch * multiplier`, in place where no gradient needs it."""
    if multiplier == 1.0:
        return branch
    return branch * multiplier if torch.is_grad_enabled() else branch.mul_(multiplier)


def add(stream: Tensor, branch: Tensor) -> Tensor:
    """`stream + branch`, written over `branch` where no gradient needs it; `stream` stays as it is."""
    return stream + branch if torch.is_grad_enabled() else branch.add_(stream)


class Llama(Model):
    """The whole decoder.

    Args:
        config: contents of `config.json`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.shape = shape = LlamaConfig.from_dict(config)
        self.spec = ModelSpec(
            family=shape.family,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            heads=shape.heads,
            groups=shape.groups(),
            max_positions=shape.max_positions,
            needs_extents=shape.rope.by_length,
            recompute_past=shape.rope.original if shape.rope.kind == "longrope" else None,
        )
        self.rotary = Rotary(shape.rope)
        # first, since many ask next(model.parameters()) where a model is, and packed weights are nowhere
        self.norm = RMSNorm(shape.hidden_size, shape.eps)
        self.embedding = Embedding(shape.vocab_size, shape.hidden_size)
        kind = NormAfterBlock if shape.norm_after else Block
        self.layers = nn.ModuleList(kind(shape, layer) for layer in range(shape.layers))
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size)
        self.tied = shape.tied
        self._compiled = CompiledLayers(self.shape)

    def train(self, mode: bool = True) -> Llama:
        """Set training mode; see `Packable.train`."""
        self._compiled.forget()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Llama:
        self._compiled.forget()
        super()._apply(fn, recurse)
        return self

    def body(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, `[tokens, hidden]`."""
        x: Tensor = batch.embedded(self.embedding(batch.tokens))
        if self.shape.embedding_multiplier != 1.0:
            x = x * self.shape.embedding_multiplier
        turn = self.rotary(batch.positions, batch.extents, x.dtype)
        if (compiled := self._compiled.run(self.layers, self.norm, x, turn, batch)) is not None:
            return compiled
        for layer in self.layers[: batch.layers]:
            if batch.trace is not None:
                batch.trace.append(x)
            x = layer(x, turn, batch.attend)
        x = self.norm(x)
        if batch.trace is not None:
            batch.trace.append(x)
        return x

    def step(self, batch: Batch) -> Tensor:
        """See `Model.step`."""
        if self._plain_ends:
            ends = self.embedding, self.lm_head
            logits = self._compiled.step(self.layers, self.norm, ends, batch, self.rotary)
            if logits is not None:
                return logits
        return super().step(batch)

    @property
    def _plain_ends(self) -> bool:
        """Whether nothing is multiplied before and after the layers."""
        return self.shape.embedding_multiplier == self.shape.logits_divisor == 1.0

    def go_on(
        self, attend: Attend, tokens: Sequence[Sequence[int]], positions: Sequence[int], stops: Stops
    ) -> tuple[list[Chosen], int] | None:
        """See `Model.go_on`."""
        if not self._plain_ends or not isinstance(attend, NativeAttention):
            return None
        ends = self.embedding, self.lm_head
        return self._compiled.go_on(self.layers, self.norm, ends, attend.past, tokens, positions, self.rotary, stops)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab]` of `hidden` `[n, hidden]`."""
        logits: Tensor = self.lm_head(hidden)
        return logits if self.shape.logits_divisor == 1.0 else logits / self.shape.logits_divisor
