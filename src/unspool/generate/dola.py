"""DoLa in a static call: greedy decoding or sampling on the contrast between layers."""

from __future__ import annotations

from collections.abc import Sequence as Items

from unspool.decode.choose.dola import DolaChooser
from unspool.generate.call import Call, Setup
from unspool.generate.sampling import set_up_sampling
from unspool.logits.dola import DolaLogitsProcessor


def set_up_dola(call: Call) -> Setup:
    """A row for each output."""
    exits = call.backend.exits()
    layers = early_layers(call.config.dola_layers or "high", exits.layers, exits.tied)
    contrast = DolaLogitsProcessor()
    call.processors.insert(0, contrast)
    setup = set_up_sampling(call)
    group = setup.group
    chooser = DolaChooser(group.chooser, contrast, layers, exits.head, call.copies, group.watch)
    group.chooser, group.watch = chooser, chooser
    return setup


def early_layers(asked: str | Items[int], layers: int, tied: bool) -> list[int]:
    """The layers that the last of `layers` may be contrasted with, by the number of what enters them.

    `"low"` and `"high"` are every other layer of the lower and upper half, or of the first and last 20 where there are
    more than 40. With a tied head, the embeddings are left out: they would give each token itself.

    Raises:
        ValueError: a number that the model has not.
    """
    first = 0 if not tied or layers == 1 else min(layers, 3) - 1
    if asked == "low":
        return list(range(first, layers // 2 if layers <= 40 else 20, 2)) or [first]
    if asked == "high":
        return list(range(layers // 2 if layers <= 40 else layers - 20, layers, 2))
    wrong = [layer for layer in asked if int(layer) >= layers]
    if wrong:
        raise ValueError(
            f"dola_layers={list(asked)!r} names layer {wrong[0]}; the model has {layers}, and those that the last one "
            f"can be contrasted with are 0 to {layers - 1}"
        )
    return [int(layer) for layer in asked]
