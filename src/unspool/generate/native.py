"""Native models as a call's source and backend."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from unspool.cache import PastKeyValues
from unspool.config import GenerationConfig
from unspool.config.lengths import end_tokens
from unspool.config.unknown import no_use_for
from unspool.decode.draft.layers import FirstLayers
from unspool.decode.sequence import Sequence
from unspool.errors import Unsupported
from unspool.generate.call import Exits
from unspool.generate.healing import heal_prompts
from unspool.generate.inputs import read_embeds, read_prompts
from unspool.generate.paged import PagedBackend
from unspool.generate.reading import Arguments, Reading
from unspool.models.adapters import BASE
from unspool.models.base import Model


class NativeBackend(PagedBackend):
    """See `generate.call.Backend`.

    Args:
        model: what computes.
        layers: how many of its layers; `None` takes all.
        quantized: keep keys and values in 8 bits.
    """

    def __init__(self, model: Model, layers: int | None = None, *, quantized: bool = False) -> None:
        super().__init__(model, None if layers is None else FirstLayers(model, layers), quantized=quantized)
        self.model = model

    def idle(self) -> None:
        """See `Backend`."""
        self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.device))

    def kwargs(self, rows: list[Sequence], new: int) -> dict[str, Any]:
        """See `Backend`: a native model's plain call reads whole texts, so there is no cache among them."""
        width = max(len(row.tokens) for row in rows)
        mask = torch.tensor([[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in rows])
        inputs: dict[str, Any] = {"attention_mask": mask.to(self.device)}
        if any(row.adapter is not None for row in rows):
            inputs["adapter_names"] = [BASE if row.adapter is None else row.adapter.name for row in rows]
        return inputs

    def exits(self) -> Exits:
        """See `Backend`."""
        return Exits(self.model.spec.layers, self.model.tied, self.model.lm_head)

    def first_layers(self, layers: int) -> NativeBackend:
        """See `Backend`."""
        return NativeBackend(self.model, layers)


class NativeSource:
    """See `generate.reading.Source`."""

    module = None
    unconditional = None

    def __init__(self, model: Model) -> None:
        spec = model.spec
        self.model = model
        self.device = model.device
        self.vocab_size: int | None = spec.vocab_size
        self.max_positions: int | None = spec.max_positions
        self.beyond: Literal["refuse", "warn", "allow"] = (
            "refuse" if spec.hard_limit else "allow" if spec.needs_extents else "warn"
        )

    def read(self, arguments: Arguments, config: GenerationConfig, copies: int) -> Reading:
        """See `Source`."""
        rest = dict(arguments.rest)
        ids = rest.pop("input_ids", None)
        if arguments.inputs is not None and ids is not None:
            raise ValueError("pass the prompts as `inputs` or as `input_ids`, not both")
        mask, past = rest.pop("attention_mask", None), rest.pop("past_key_values", None)
        rest.pop("token_type_ids", None)  # tokenizers give them; they change nothing here
        embeds, names = rest.pop("inputs_embeds", None), rest.pop("adapter_names", None)
        if rest:
            raise ValueError(no_use_for("generate()", rest))
        given = arguments.inputs if ids is None else ids
        if embeds is not None and past is not None:
            raise Unsupported("inputs_embeds and past_key_values cannot be combined; pass input_ids")
        prompts = None
        if embeds is None or given is not None:
            prompts = read_prompts(
                given,
                mask,
                spec=self.model.spec,
                device=self.device,
                bos=config.bos_token_id,
                pad=config.pad_token_id,
                eos=end_tokens(config),
            )
        if embeds is not None:
            hidden = self.model.spec.hidden_size
            columns = embeds.shape[1] if given is None and isinstance(embeds, Tensor) and embeds.ndim == 3 else 0
            prompts = read_embeds(embeds, mask, prompts, hidden=hidden, device=self.device)
        else:
            columns = 0
        assert prompts is not None
        adapters = self.model.adapters.choose(names, len(prompts.tokens))
        if config.token_healing:
            if names is not None:
                raise Unsupported("token_healing and adapter_names cannot be combined; use set_adapter()")
            prompts = heal_prompts(lambda ids: self.model(ids).logits, prompts, arguments.tokenizer)
        prompts.adapters = adapters if any(adapters) else None
        expanded = prompts.expand(copies) if copies > 1 else prompts
        stored, quantized = read_past(past, len(prompts.tokens)), _quantized(config, self.device)
        if stored is not None and quantized and not stored.store.quantized:
            raise ValueError(
                "cache_implementation='quantized' does not go with past_key_values that are not; pass those of a call "
                "with the same cache_implementation, or leave one of them out"
            )
        return Reading(
            prompts=expanded,
            seen=prompts,
            backend=NativeBackend(self.model, quantized=quantized),
            past=stored,
            encoder_ids=prompts.rectangle if prompts.rectangle.shape[1] else None,
            padding=expanded.padding(),
            embeds=columns,
        )

    def draft(self, arguments: Arguments, config: GenerationConfig) -> NativeBackend:
        """See `Source`; the rows bring their tokens."""
        return NativeBackend(self.model)


def _quantized(config: GenerationConfig, device: torch.device) -> bool:
    """Whether `cache_implementation` asks for keys and values in 8 bits.

    The paged store is what "dynamic", "static" and "paged" mean here, and on a CPU the "offloaded" kinds too.

    Raises:
        Unsupported: a kind, or an entry of `cache_config`, that the paged store does not have.
    """
    kind = config.cache_implementation
    if kind in ("offloaded", "offloaded_static") and device.type != "cpu":
        raise Unsupported(f"cache_implementation={kind!r}: a native model keeps its cache on {device}; leave it out")
    if kind != "quantized":
        return False
    wanted = dict(config.cache_config or {})
    bits = wanted.pop("nbits", 8)
    if bits != 8 or wanted:
        raise Unsupported(
            f"cache_config={config.cache_config!r}: a native model's quantized cache has 8 bits and one scale for each "
            "head and token; leave it out, or pass {'nbits': 8}"
        )
    return True


def read_past(past: Any, rows: int) -> PastKeyValues | None:
    """`past_key_values` as passed to a call on `rows` prompts, checked."""
    if past is None:
        return None
    if not isinstance(past, PastKeyValues):
        raise TypeError(
            "past_key_values must come from an earlier generate(return_dict_in_generate=True), "
            f"not be a {type(past).__name__}"
        )
    if len(past) != rows:
        raise ValueError(f"past_key_values holds {len(past)} rows and input_ids {rows}")
    return past
