"""Modules of a user's own: shells around one tiny model, each with another calling convention and kind of past."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import unspool
from unspool import GenerationMixin


class Shell(nn.Module, GenerationMixin):
    """Holds the tiny model; nothing of it is seen from outside but its weights."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner


class Plain(Shell):
    """No cache, no mask; logits alone."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids).logits


class Masked(Shell):
    """No cache; mask and positions; a dict."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"logits": self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits}


class Tuples(Shell):
    """Keeps its past in tuples of tensors, which it makes itself; a tuple."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, past_key_values: Any = None, use_cache: bool = False,
        position_ids: Any = None,
    ) -> Any:  # fmt: skip
        past = unspool.DynamicCache.from_legacy_cache(past_key_values)
        out = self.inner(input_ids, attention_mask, position_ids, past_key_values=past, use_cache=True)
        return (out.logits, past.to_legacy_cache()) if use_cache else (out.logits,)


class Cached(Shell):
    """Takes a cache and says so; an object."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, past_key_values: unspool.Cache | None = None,
        use_cache: bool = False, position_ids: Any = None,
    ) -> Any:  # fmt: skip
        assert past_key_values is not None or not use_cache
        self.fed = [*getattr(self, "fed", []), input_ids.shape[1]]
        return self.inner(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)
