"""A foreign module over our own paged store: flat true tokens in, attention through transformers' registry.

The module's layers, norms and products are its own; its cache, its masks and its hooks for generation take no part.
Whether that gives what the module itself gives is found out by `probe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.bridge.capture import Unfit, answered
from unspool.bridge.module import Foreign
from unspool.cache.layout import LayerGroup
from unspool.models.adapters import Adapters
from unspool.models.base import Attend, Batch, ModelSpec

__all__ = ["Layer", "RaggedModel", "Shape", "look"]

_UNBOUNDED = 2**31  # positions of a module that names no limit


class Layer(NamedTuple):
    """One call of attention in a forward pass.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        dim: of a query or key.
        value_dim: of a value.
        window: how many tokens a query sees, itself included; `None` for all before it.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a module's attention is asked for.

    Attributes:
        layers: every call of a forward pass, in order.
        dtype, device: of keys and values.
        vocab: width of the logits.
        gives_cache: what is stored of it can be handed back as its own cache.
    """

    layers: tuple[Layer, ...]
    dtype: torch.dtype
    device: torch.device
    vocab: int
    gives_cache: bool = False


class _Look:
    """Sees what attention is asked for, and answers zeros; see `capture.Answer`."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.kinds: set[tuple[torch.dtype, torch.device]] = set()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        self.layers.append(_layer(q, k, v, window))
        self.kinds |= {(one.dtype, one.device) for one in (q, k, v)}
        return q.new_zeros(*q.shape[:2], v.shape[-1])


class _Step:
    """Answers the layers of one step over the store; see `capture.Answer`."""

    def __init__(self, attend: Attend, layers: tuple[Layer, ...]) -> None:
        self._attend = attend
        self._layers = layers
        self.at = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        at = self.at
        if at == len(self._layers) or _layer(q, k, v, window) != self._layers[at]:
            raise Unfit("its layers differ from step to step")
        self.at = at + 1
        dim, value_dim = k.shape[2], v.shape[2]
        if value_dim < dim:
            v = F.pad(v, (0, dim - value_dim))
        out = self._attend(at, q, k, v, scale, softcap).view(q.shape)
        return out if value_dim == dim else out[..., :value_dim]


def _layer(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Layer:
    return Layer(q.shape[1], k.shape[1], k.shape[2], v.shape[2], window)


class RaggedModel:
    """See `decode.runner.Decoder`.

    Args:
        foreign: the module.
        shape: what `look` saw of it.
    """

    def __init__(self, foreign: Foreign, shape: Shape) -> None:
        self.foreign = foreign
        self.dtype = shape.dtype
        self.device = shape.device
        self.adapters = Adapters()
        self.layers = layers = shape.layers
        self._keeps = foreign.accepts("logits_to_keep")
        positions = foreign.entry("max_position_embeddings")
        self.spec = ModelSpec(
            family=str(foreign.entry("model_type") or type(foreign.module).__name__),
            vocab_size=shape.vocab,
            hidden_size=int(foreign.entry("hidden_size") or 0),
            heads=layers[0].heads,
            groups=_groups(layers),
            max_positions=positions if isinstance(positions, int) else _UNBOUNDED,
        )

    def step(self, batch: Batch) -> Tensor:
        """See `Steps`."""
        keep = batch.keep
        given = _arguments(batch.tokens, batch.positions)
        if keep is not None and self._keeps:
            given["logits_to_keep"] = keep
        if batch.trace is not None:
            given["output_hidden_states"] = True
        step = _Step(batch.attend, self.layers)
        with answered(step):
            output = self.foreign.call(given)
        if step.at != len(self.layers):
            raise Unfit("its layers differ from step to step")
        if batch.trace is not None:
            for hidden in getattr(output, "hidden_states", None) or ():
                batch.trace.append(hidden[0])
        logits = self.foreign.logits(output)[0]
        return logits if keep is None or self._keeps else logits.index_select(0, keep)


def look(foreign: Foreign, ids: list[int]) -> Shape:
    """Run a module once on a few ids to see what its attention asks for.

    Raises:
        Unfit: it is more than a paged store can give, or not asked for through transformers' registry.
    """
    tokens = torch.tensor(ids, device=foreign.device)
    seen = _Look()
    with answered(seen):
        logits = foreign.logits(foreign.call(_arguments(tokens, torch.arange(len(ids), device=foreign.device))))
    if not seen.layers:
        raise Unfit("its attention does not go through transformers' registry")
    if len(seen.kinds) > 1:
        raise Unfit("its queries, keys and values have several dtypes or devices")
    if any(layer.value_dim > layer.dim or layer.heads % layer.kv_heads for layer in seen.layers):
        raise Unfit("its values are wider than its keys, or its heads cannot be shared out")
    ((dtype, device),) = seen.kinds
    return Shape(tuple(seen.layers), dtype, device, logits.shape[-1])


def _arguments(tokens: Tensor, positions: Tensor) -> dict[str, Any]:
    return {"input_ids": tokens[None], "position_ids": positions[None], "use_cache": False}


def _groups(layers: tuple[Layer, ...]) -> tuple[LayerGroup, ...]:
    """Layers with keys and values of one shape and the same window share a table."""

    def kind(number: int) -> tuple[int, int, int]:
        _, kv_heads, dim, _, window = layers[number]
        return kv_heads, dim, window or 0

    order = sorted(range(len(layers)), key=kind)
    return tuple(
        LayerGroup(tuple(sorted(members)), kv_heads, dim, window or None)
        for (kv_heads, dim, window), members in groupby(order, key=kind)
    )
