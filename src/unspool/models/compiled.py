"""The layers of a decoder built like Llama as one compiled call, where every part of them has a kernel.

It gives what the layers give when they are called one after the other (`llama`), bit for bit. That is what is done
where gradients or hidden states are wanted, where someone listens to a layer (hooks), and where a part has no kernel:
another activation, an unpacked weight, an adapter with gains, a module that was put in place of one of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from unspool.attention.native import NativeAttention
from unspool.kernels.elementwise import silu_gate
from unspool.kernels.linear import PackedWeight
from unspool.kernels.program import Adapted, Buffer, Chosen, Past, Program, Stops
from unspool.kernels.quantised import PackedCodes
from unspool.models.layers.embedding import Embedding
from unspool.models.layers.linear import Linear
from unspool.models.layers.norm import RMSNorm
from unspool.models.layers.quantised import QuantisedForm
from unspool.models.layers.rotary import Rotary, Turn
from unspool.models.layers.watched import changes, hooked

if TYPE_CHECKING:
    from unspool.models.base import Batch
    from unspool.models.llama import Attention, Block, GatedMLP
    from unspool.models.llama_config import LlamaConfig

__all__ = ["CompiledLayers"]


# Up to so many tokens, what stands before and after the layers is worth a call that has it too.
_FEW = 64


class _Recorded(NamedTuple):
    """A program, where its result is, and the layers whose products it has, in order."""

    program: Program
    out: Buffer
    linears: list[Linear]


_Whole = tuple[_Recorded, PackedWeight | PackedCodes | Tensor]
_Key = tuple[torch.dtype, int | None, Linear | None]  # of the numbers; how many layers; the head, if it is in it


@dataclass(slots=True)
class _Seen:
    """The layers as they were at the last look, and what was recorded of them.

    Attributes:
        changes: how many there had been.
        modules: all of them, kept, so that their ids stay theirs.
        plain: their weights that are not packed.
        state: see `_state`.
        ours: see `_ours`.
        hooked: someone listens.
        recorded: programs; `None` where there can be none.
        whole: programs with a head, and packed embeddings, by their dtype, embedding and head.
    """

    changes: int
    modules: list[nn.Module]
    plain: list[Tensor]
    state: list[int]
    ours: bool
    hooked: bool
    recorded: dict[_Key, _Recorded | None]
    whole: dict[tuple[torch.dtype, Embedding, Linear], _Whole]


class CompiledLayers:
    """All layers and the last norm of a decoder.

    Args:
        shape: of the decoder.
    """

    def __init__(self, shape: LlamaConfig) -> None:
        self._shape = shape
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledLayers, (self._shape,)  # recorded anew

    def forget(self) -> None:
        """Let go of the weights, which are about to be exchanged."""
        self._seen: _Seen | None = None

    def run(self, layers: nn.ModuleList, norm: RMSNorm, x: Tensor, turn: Turn, batch: Batch) -> Tensor | None:
        """Hidden states `[tokens, hidden]` after `layers` and `norm`, of embeddings `x`; `None` where it cannot be."""
        attend = batch.attend
        if batch.trace is not None or not isinstance(attend, NativeAttention) or torch.is_grad_enabled():
            return None
        recorded = self._program(layers, norm, (x.dtype, batch.layers, None))
        if recorded is None:
            return None
        adapted: Adapted | None = None
        if batch.adapters is not None and (adapted := batch.adapters.adapted(recorded.linears)) is None:
            return None
        return recorded.program.run(x.contiguous(), recorded.out, attend.past, turn, adapted)

    def go_on(
        self,
        layers: nn.ModuleList,
        norm: RMSNorm,
        ends: tuple[Embedding, Linear],
        past: Past,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[int],
        rotary: Rotary,
        stops: Stops,
    ) -> tuple[list[Chosen], int] | None:
        """Greedy steps by themselves; see `models.base.Model.go_on`. `ends` stand before and after the layers."""
        whole = self._whole(layers, norm, ends, past.pools.dtype)
        last = max(first + len(fed) for first, fed in zip(positions, tokens, strict=True)) + max(stops.limits)
        table = rotary.table(last, past.pools.dtype)
        if whole is None or table is None:
            return None
        recorded, packed = whole
        return recorded.program.go_on(tokens, positions, recorded.out, past, table, packed, stops)

    def step(
        self, layers: nn.ModuleList, norm: RMSNorm, ends: tuple[Embedding, Linear], batch: Batch, rotary: Rotary
    ) -> Tensor | None:
        """Logits `[tokens, vocab]` of a step of few tokens; `None` where it cannot be. `ends` as in `go_on`."""
        attend, tokens = batch.attend, batch.tokens
        if not isinstance(attend, NativeAttention) or torch.is_grad_enabled() or not tokens.is_cpu:
            return None
        special = (batch.keep, batch.extents, batch.trace, batch.layers, batch.embeds, batch.adapters)
        if len(tokens) > _FEW or any(part is not None for part in special):
            return None
        past = attend.past
        whole, table = self._whole(layers, norm, ends, past.pools.dtype), rotary.table(1, past.pools.dtype)
        if whole is None or table is None:
            return None
        recorded, packed = whole
        return recorded.program.step(tokens, batch.positions, recorded.out, past, table, packed)

    def _whole(
        self, layers: nn.ModuleList, norm: RMSNorm, ends: tuple[Embedding, Linear], dtype: torch.dtype
    ) -> _Whole | None:
        """What is recorded with the head, and the embedding as the kernels read it."""
        embedding, head = ends
        seen = self._look(layers, norm)
        if seen.hooked or not seen.ours or torch.is_grad_enabled():
            return None
        if (known := seen.whole.get((dtype, *ends))) is not None:
            return known
        if not _ours(ends) or hooked(ends):
            return None
        packed = embedding.weight.detach() if embedding._packed is None else _form(embedding)
        if packed is None or (isinstance(packed, Tensor) and packed.dtype != dtype):
            return None
        recorded = self._program(layers, norm, (dtype, None, head))
        if recorded is None:
            return None
        whole = recorded, packed
        if not isinstance(packed, Tensor):  # whose memory may be exchanged
            seen.whole[dtype, *ends] = whole
        return whole

    def _program(self, layers: nn.ModuleList, norm: RMSNorm, key: _Key) -> _Recorded | None:
        """What is recorded of the layers as they are now; `None` where they have to be called themselves."""
        seen = self._look(layers, norm)  # ours: another thread may look anew meanwhile
        if seen.hooked or not seen.ours:
            return None
        if key not in seen.recorded:
            seen.recorded[key] = self._record(layers, norm, *key)
        return seen.recorded[key]

    def _look(self, layers: nn.ModuleList, norm: RMSNorm) -> _Seen:
        """Forget what was recorded of other modules or weights, and see whether someone listens to these."""
        seen = self._seen
        if seen is None or changes() != seen.changes or _state(layers, norm, seen.plain) != seen.state:
            count = changes()
            modules = [*layers.modules(), norm]
            parameters = (p for module in modules for p in module._parameters.values())
            plain: list[Tensor] = [p for p in parameters if p is not None and not p.is_meta]
            state = _state(layers, norm, plain)
            ours = _ours(module for module in modules if module is not layers)
            seen = self._seen = _Seen(count, modules, plain, state, ours, hooked(modules), {}, {})
        elif seen.hooked or hooked(()):
            seen.hooked = hooked(seen.modules)
        return seen

    def _record(
        self, layers: nn.ModuleList, norm: RMSNorm, dtype: torch.dtype, number: int | None, head: Linear | None
    ) -> _Recorded | None:
        blocks: Iterable[Block] = layers[:number]  # type: ignore[assignment]
        try:
            recorder = _Recorder(self._shape, dtype)
            out = recorder.layers(blocks, norm)
            if head is not None:
                out = recorder.head(head, out)
        except ValueError:
            return None
        return _Recorded(recorder.program, out, recorder.linears)


class _NoKernel(ValueError):
    """A part of a layer has no kernel; a weight that does not fit a program is another ValueError."""


def _state(layers: nn.ModuleList, norm: RMSNorm, plain: list[Tensor]) -> list[int]:
    """Which modules there are, and where their plain weights lie."""
    return [id(norm), *map(id, layers._modules.values()), *map(Tensor.data_ptr, plain)]


def _ours(modules: Iterable[nn.Module]) -> bool:
    """Whether `modules` compute what ours compute: none was wrapped, exchanged or given another `forward`."""
    return all(type(module).__module__.startswith("unspool.") and "forward" not in vars(module) for module in modules)


def _form(module: Linear | Embedding) -> PackedWeight | PackedCodes | None:
    """The weight as the kernels take it, where they do."""
    packed: object = module._packed
    if isinstance(packed, QuantisedForm):
        packed = packed.compiled
    return packed if isinstance(packed, PackedWeight | PackedCodes) else None


class _Recorder:
    """Writes the operations of layers in the order in which `llama` computes them."""

    def __init__(self, shape: LlamaConfig, dtype: torch.dtype) -> None:
        self.shape = shape
        self.program = Program(shape.hidden_size, dtype)
        self.linears: list[Linear] = []
        self._group_of = {layer: i for i, group in enumerate(shape.groups()) for layer in group.layers}

    def layers(self, blocks: Iterable[Block], norm: RMSNorm) -> Buffer:
        """All of them and the last norm; gives the buffer of the result."""
        hidden = self.shape.hidden_size
        normal, first, second = (self.program.buffer(hidden) for _ in range(3))
        stream, pending = self.program.input, None
        for block in blocks:
            if self.shape.norm_after:
                free = second if stream is first else first
                stream = self._norm_after(block, stream, normal, free)
            else:
                stream, pending = self._norm_before(block, stream, pending, normal, (first, second))
        self._norm(norm, stream, pending, normal)
        return normal

    def _norm(self, norm: RMSNorm, x: Buffer, pending: Buffer | None, out: Buffer) -> Buffer:
        """The norm of `x`, to which `pending` is added first, if any; gives the stream after it."""
        if pending is None:
            self.program.norm(x, norm.weight, norm.eps, out)
            return x
        self.program.add_norm(x, pending, norm.weight, norm.eps, out)
        return pending

    def _norm_before(
        self, block: Block, x: Buffer, pending: Buffer | None, normal: Buffer, branches: tuple[Buffer, Buffer]
    ) -> tuple[Buffer, Buffer]:
        """One layer; what the feed-forward gives is added with the next norm."""
        first, second = branches
        x = self._norm(block.attention_norm, x, pending, normal)
        self._attention(block.attention, normal, first)
        self._scale(first)
        x = self._norm(block.mlp_norm, x, first, normal)
        self._mlp(block.mlp, normal, second)
        self._scale(second)
        return x, second

    def _norm_after(self, block: Block, x: Buffer, branch: Buffer, out: Buffer) -> Buffer:
        """One layer whose norms stand inside the residual branches."""
        program = self.program
        middle = program.buffer(x.width)
        self._attention(block.attention, x, branch)
        program.norm(branch, block.attention_norm.weight, block.attention_norm.eps, middle)
        program.add(x, middle, self.shape.residual_multiplier)
        self._mlp(block.mlp, middle, branch)
        program.norm(branch, block.mlp_norm.weight, block.mlp_norm.eps, out)
        program.add(middle, out, self.shape.residual_multiplier)
        program.release(middle)
        return out

    def _scale(self, branch: Buffer) -> None:
        if self.shape.residual_multiplier != 1.0:
            self.program.add(None, branch, self.shape.residual_multiplier)

    def _attention(self, part: Attention, x: Buffer, out: Buffer) -> None:
        program, shape = self.program, self.shape
        qkv = program.buffer((part.turned + part.kv_heads) * part.dim)
        mixed = program.buffer(part.heads * part.dim)
        self._linear(part.qkv, x, qkv)
        if part.norm is not None:
            first = 0
            for heads, weight in part.norm.pieces:
                program.norm_parts(qkv, first, heads, weight, part.norm.eps)
                first += heads * weight.shape[0]
        if part.rotated:
            program.turn(qkv, part.turned, part.dim, shape.rope.dim)
        program.attend(
            qkv, part.heads, part.kv_heads, part.dim, mixed, group=self._group_of[part.layer], scale=part.scale
        )
        self._linear(part.out, mixed, out)
        program.release(qkv)

    def _mlp(self, part: GatedMLP, x: Buffer, out: Buffer) -> None:
        if part.gated is not silu_gate:
            raise _NoKernel
        program = self.program
        both = program.buffer(sum(part.gate_up.parts))
        gated = program.buffer(both.width // 2)
        self._linear(part.gate_up, x, both)
        program.gate(both, gated)
        self._linear(part.down, gated, out)
        program.release(both)

    def head(self, head: Linear, hidden: Buffer) -> Buffer:
        """Logits."""
        logits = self.program.buffer(sum(head.parts))
        self._linear(head, hidden, logits)
        return logits

    def _linear(self, layer: Linear, x: Buffer, out: Buffer) -> None:
        packed = _form(layer)
        if packed is None:
            raise _NoKernel
        self.program.product(x, packed, layer.bias, out)
        self.linears.append(layer)
