"""Where NaN came from: one forward pass of the failed row, looked at layer by layer."""

from __future__ import annotations

import torch

from unspool.attention.registry import paged_attention
from unspool.cache import PagedStore
from unspool.decode.runner import Decoder
from unspool.decode.sequence import Sequence
from unspool.models.adapters import Mixer
from unspool.models.base import Batch


def find_fault(model: Decoder, row: Sequence) -> str:
    """Say which layer first gave a row values that are not finite; for an error message, after the fact."""
    tokens = torch.tensor(row.tokens, device=model.device)
    store = PagedStore(
        model.spec.groups, -(-len(row.tokens) // 16), dtype=model.dtype, device=model.device, block_size=16
    )
    probe = Sequence(0, list(row.tokens))
    store.reserve(probe, len(row.tokens))
    trace: list[torch.Tensor] = []
    with torch.no_grad():
        batch = Batch(
            tokens=tokens,
            positions=torch.arange(len(row.tokens), device=model.device),
            attend=paged_attention(store, [probe], [len(row.tokens)]),
            keep=torch.tensor([len(row.tokens) - 1], device=model.device),
            extents=torch.full_like(tokens, len(row.tokens)) if model.spec.needs_extents else None,
            trace=trace,
            adapters=Mixer().select([row.adapter], [len(row.tokens)], model.device),
        )
        logits = model.step(batch)
    bad = [not bool(hidden.isfinite().all()) for hidden in trace]
    if bad and bad[0]:
        return "the token embeddings are not finite (damaged weights)"
    if any(bad):
        first = bad.index(True)
        name = f"layer {first - 1}" if first < len(bad) - 1 or len(bad) == 1 else f"layer {first - 1} or the final norm"
        return f"the output of {name} is the first that is not finite (damaged weights, or too narrow a dtype?)"
    if not bool(logits.isfinite().all()):
        if not trace:  # the layers are not ours to look into
            return "the model's logits are not finite (damaged weights, or too narrow a dtype?)"
        return "the logits are not finite though all layers are (damaged output head)"
    return "the model's logits are finite, so a logits processor left no token to choose"
