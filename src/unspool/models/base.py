"""What the decoding core knows of a model: its shape, one batch in, logits out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.attention.dense import DenseAttention
from unspool.cache.layout import LayerGroup
from unspool.kernels.program import Chosen, Stops
from unspool.models.adapters import Adapters, Mixer, Selection
from unspool.models.layers.embedding import Embedding
from unspool.models.layers.linear import Linear, pack
from unspool.models.layers.packed import Packable, regroup


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder, as far as caches, schedulers and front ends need it.

    Attributes:
        family: `model_type` of the checkpoint's `config.json`, e.g. `"llama"`.
        vocab_size: width of the logits; token ids lie in `[0, vocab_size)`.
        hidden_size: width of the residual stream.
        heads: query heads of a layer.
        groups: the layers' key/value groups; every layer is in exactly one.
        max_positions: positions the model was made for (tokens of prompt and output together).
        hard_limit: positions past `max_positions` do not exist (a learned table), rather than being merely untrained.
        needs_extents: the rotary angles depend on the row's length (dynamic NTK, longrope): fill `Batch.extents`.
        recompute_past: length past which a row's stored keys no longer fit (longrope changes wavelengths there): the
            row is then computed anew, once; `None` when they always fit.
    """

    family: str
    vocab_size: int
    hidden_size: int
    heads: int
    groups: tuple[LayerGroup, ...]
    max_positions: int
    hard_limit: bool = False
    needs_extents: bool = False
    recompute_past: int | None = None

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return sum(len(group.layers) for group in self.groups)

    def check_tokens(self, name: str, tokens: list[int]) -> None:
        """Raise ValueError, blaming `name`, for an id outside the vocabulary."""
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{name} holds token id {low if low < 0 else high}, outside the model's vocabulary of "
                f"{self.vocab_size}; use the tokenizer that belongs to the model"
            )


class Attend(Protocol):
    """Attention of one step, handed to every layer; it stores the new keys and values and answers for all rows."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        """Attend `q` `[tokens, heads, dim]` over each row's past and its new `k`, `v` `[tokens, kv_heads, dim]`.

        Returns `[tokens, heads * dim]`. `scale` multiplies the scores; `softcap` bounds them by `cap * tanh(s / cap)`.
        """
        ...


class Trace(list[Tensor]):
    """Hidden states by layer as a model appends them, of which only those wanted are kept.

    Args:
        layers: places that are kept; the others get empty tensors. `None` keeps all.
    """

    def __init__(self, layers: frozenset[int] | None) -> None:
        super().__init__()
        self._layers = layers

    def append(self, hidden: Tensor) -> None:
        """Add the next layer's hidden states `[tokens, hidden]`."""
        wanted = self._layers is None or len(self) in self._layers
        super().append(hidden if wanted else hidden.new_empty(0, hidden.shape[-1]))


@dataclass(slots=True, eq=False)
class Batch:
    """True tokens of any number of rows, flat, for one forward pass.

    Attributes:
        tokens: `[tokens]` int64 ids.
        positions: `[tokens]` int64, each token's place in its row.
        attend: attention over the rows' stored keys and values.
        keep: `[kept]` int64 indexes into the tokens whose logits are wanted; `None` keeps all.
        extents: `[tokens]` int64, tokens known of the token's row (a prompt's whole length also while it is fed in
            chunks); filled when the spec asks for it.
        trace: where given, the model appends the hidden states `[tokens, hidden]` that enter each layer,
            and last the ones after the final norm.
        layers: run only so many layers before the final norm; `None` runs all.
        embeds: `(places [n], values [n, hidden])` of tokens that have embeddings of their own.
        adapters: which adapter each token goes through; `None` where none has one.
    """

    tokens: Tensor
    positions: Tensor
    attend: Attend
    keep: Tensor | None = None
    extents: Tensor | None = None
    trace: list[Tensor] | None = None
    layers: int | None = None
    embeds: tuple[Tensor, Tensor] | None = None
    adapters: Selection | None = None

    def embedded(self, x: Tensor) -> Tensor:
        """The tokens' embeddings `x` `[tokens, hidden]`, with the given ones in their places."""
        if self.embeds is None:
            return x
        places, values = self.embeds
        return x.index_copy(0, places, values.to(x.dtype))


@dataclass(slots=True)
class CausalLMOutput:
    """Result of a plain call `model(input_ids)`: `logits` `[batch, length, vocab]`; the rest as asked."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None

    def __getitem__(self, key: str | int) -> Tensor | tuple[Tensor, ...]:
        """A field by name, or by place among those that are there, the loss first."""
        every = {name: getattr(self, name) for name in ("loss", "logits", "hidden_states", "attentions")}
        there: dict[str, Tensor | tuple[Tensor, ...]] = {k: v for k, v in every.items() if v is not None}
        if isinstance(key, int):
            return list(there.values())[key]
        if key not in there:
            raise KeyError(f"{key!r} is not in this output; it holds {', '.join(there)}")
        return there[key]


class ModelConfig(dict[str, Any]):
    """The contents of a checkpoint's `config.json`, whose entries are attributes too: `config.vocab_size`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config.json has no entry {name!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """A plain copy."""
        return dict(self)


class Model(nn.Module):
    """Base of the native decoders.

    A family implements `body` and `head`; `step` is what the core calls, `forward` what people call.

    Args:
        config: contents of the checkpoint's `config.json`.

    Attributes:
        spec: the model's shape.
        config: as given.
        embedding: one row per token id.
        lm_head: turns hidden states into logits.
        tied: the head's weight is the embedding's.
        adapters: low-rank adapters loaded beside the weights.
        packs: its weights are kept packed (see `pack`) while it is not trained.
    """

    spec: ModelSpec
    config: ModelConfig
    embedding: Embedding
    lm_head: Linear
    tied: bool

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = ModelConfig(config)
        self.adapters = Adapters()
        self.packs = False

    def body(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, `[tokens, hidden]`."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[n, vocab]` of hidden states `[n, hidden]`, in the model's dtype."""
        raise NotImplementedError

    def step(self, batch: Batch) -> Tensor:
        """Logits `[kept, vocab]` of one batch; the new keys and values are stored through `batch.attend`."""
        hidden = self._adapted_body(batch)
        return self.head(hidden if batch.keep is None else hidden.index_select(0, batch.keep))

    def go_on(
        self, attend: Attend, tokens: Sequence[Sequence[int]], positions: Sequence[int], stops: Stops
    ) -> tuple[list[Chosen], int] | None:
        """Greedy steps of some rows by themselves, where nobody has to see anything between them.

        Args:
            attend: of the first step, in which every row feeds one token; with room for all.
            tokens: of each row, to be fed first, one in a step; no row has an adapter or embeddings of its own.
            positions: of the first of them.
            stops: when rows end. Rows that ended go along, until more than half have.

        Returns:
            What each row chose after those, and how many steps there were; `None` where such steps are not possible,
            and nothing is done.
        """
        return None

    def _adapted_body(self, batch: Batch) -> Tensor:
        if batch.adapters is None:
            return self.body(batch)
        with batch.adapters.applied():
            return self.body(batch)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        adapter_names: Sequence[str | None] | None = None,
    ) -> CausalLMOutput:
        """Run whole texts at once, without a cache; differentiable.

        Args:
            input_ids: `[batch, length]` token ids.
            attention_mask: `[batch, length]`, 1 for true tokens and 0 for padding; by default all are true.
            position_ids: `[batch, length]` or `[1, length]`; by default 0, 1, 2 ... in every row, padded or not.
                Without a mask, positions that start again begin a new text that does not see the one before.
            labels: `[batch, length]`, usually `input_ids` with -100 where no loss is wanted. They are shifted here:
                position `i` is scored on predicting label `i + 1`.
            output_hidden_states: also return what enters each layer, and what leaves the final norm.
            output_attentions: also return attention weights, one `[batch, heads, length, length]` per layer.
            logits_to_keep: compute logits only for the last so many positions (0: all), or for the given ones.
            return_dict: accepted because callers pass it; only `True` means anything here.
            adapter_names: for each row a loaded adapter's name, `None` or `"__base__"` for none; by default the active
                adapter serves all rows.

        Raises:
            ValueError: shapes disagree, a token id lies outside the vocabulary, or a position outside a learned table.
        """
        self._check(input_ids, attention_mask, position_ids, labels, return_dict)
        rows, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device)[None] if position_ids is None else position_ids
        positions = positions.expand(rows, length)
        packed = position_ids is not None and attention_mask is None
        attend = DenseAttention(
            self.spec.groups, rows, length, attention_mask, positions if packed else None, weights=output_attentions
        )
        trace: list[Tensor] | None = [] if output_hidden_states else None
        extents = positions.amax(dim=1, keepdim=True).add(1).expand(rows, length).reshape(-1)
        adapters = Mixer().select(self.adapters.choose(adapter_names, rows), [length] * rows, input_ids.device)
        batch = Batch(
            input_ids.reshape(-1), positions.reshape(-1), attend, extents=extents, trace=trace, adapters=adapters
        )
        hidden = self._adapted_body(batch).view(rows, length, -1)
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.head(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:2], -1)
        return CausalLMOutput(
            logits,
            None if trace is None else tuple(state.view(rows, length, -1) for state in trace),
            tuple(attend.weights) if attend.weights is not None else None,
            None if labels is None else _next_token_loss(logits, labels),
        )

    def _check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        return_dict: bool,
    ) -> None:
        """Refuse a plain call that cannot work, before any of it is done."""
        if input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
            raise ValueError(
                f"`input_ids` must be integers of shape [batch, length], neither of them 0; got {input_ids.dtype} of "
                f"shape {list(input_ids.shape)}"
            )
        shape = tuple(input_ids.shape)
        for name, value in (("attention_mask", attention_mask), ("labels", labels)):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"`{name}` has shape {list(value.shape)}; it must be that of `input_ids`, {list(shape)}"
                )
        if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"`position_ids` has shape {list(position_ids.shape)}; it must be {list(shape)}")
        if not return_dict:
            raise ValueError("`return_dict=False` is not supported; take `.logits` of the result")
        low, high = (int(value) for value in torch.aminmax(input_ids))
        if low < 0 or high >= self.spec.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"`input_ids` holds {wrong}; token ids of this model lie in [0, {self.spec.vocab_size})")
        if self.spec.hard_limit:
            last = shape[1] - 1 if position_ids is None else int(position_ids.max())
            if last >= self.spec.max_positions:
                raise ValueError(
                    f"`input_ids` needs position {last}, but this model has {self.spec.max_positions} positions; "
                    f"shorten it"
                )

    def pack(self) -> None:
        """Exchange weights for layouts that multiply faster, layer by layer, where there are such; for inference only.

        See `models.layers.linear`. A head and an embedding that share a weight share its packed form.
        """
        self.packs = True
        uses = Counter(id(parameter) for _, parameter in self.named_parameters(remove_duplicate=False))
        users: defaultdict[int, list[Packable]] = defaultdict(list)
        for module in self.modules():
            if isinstance(module, Packable):
                users[id(module.weight)].append(module)
        for weight, modules in users.items():
            if len(modules) == uses[weight] and any(isinstance(module, Linear) for module in modules):
                pack(modules)

    @property
    def invariant(self) -> bool:
        """Whether the kernels compute every product, so that a row gets the same bits alone and in company."""
        return all(module.invariant for module in self.modules() if isinstance(module, Linear))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for adapter in self.adapters.loaded.values():
            for delta in adapter.deltas.values():
                delta.convert(fn)
        self._pack_again()
        return self

    def train(self, mode: bool = True) -> Model:
        """See `torch.nn.Module`; weights are packed again when it ends, unless they are still to be trained."""
        super().train(mode)
        self._pack_again()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Model:
        """See `torch.nn.Module`; weights to be trained become plain at once, so that an optimizer finds them."""
        for module in self.modules() if requires_grad else ():
            if isinstance(module, Packable) and module._packed is not None and module._packed.lossless:
                module.unpack()
        super().requires_grad_(requires_grad)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See `torch.nn.Module`."""
        result = super().load_state_dict(*args, **kwargs)
        self._pack_again()
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.tied:
            self.lm_head.weight = self.embedding.weight
        regroup(module for module in self.modules() if isinstance(module, Packable))
        self._pack_again()

    def _pack_again(self) -> None:
        """Pack what was unpacked, by a cast, say, unless it is trained: then others hold the plain weights."""
        if self.packs and not self.training and not any(parameter.requires_grad for parameter in self.parameters()):
            self.pack()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights; `meta` where none has memory."""
        devices = (parameter.device for parameter in self.parameters())
        # a packed weight is on `meta`
        return next((device for device in devices if device.type != "meta"), torch.device("meta"))


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each position's logits `[batch, length, vocab]` against the next label; -100 is skipped."""
    if logits.shape[1] != labels.shape[1]:
        raise ValueError("`labels` need the logits of all positions; leave `logits_to_keep` at 0")
    following = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), following.reshape(-1))
