"""DoLa in a static call: greedy decoding or sampling on the contrast between layers."""

from __future__ import annotations

from unspool.decode.choose.dola import DolaChooser, early_layers
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
