"""Where NaN came from: one forward pass of the failed row, looked at layer by layer."""

from __future__ import annotations

import torch

from unspool.decode.runner import Decoder, logits_alone
from unspool.decode.sequence import Sequence


def find_fault(model: Decoder, row: Sequence) -> str:
    """Say which layer first gave a row values that are not finite; for an error message, after the fact."""
    trace: list[torch.Tensor] = []
    logits = logits_alone(model, row.tokens, row.adapter, trace)
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
