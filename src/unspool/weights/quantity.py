"""How much memory a model's weights take when they are quantised."""

from __future__ import annotations

from unspool.models.base import Model
from unspool.models.layers.linear import Linear
from unspool.weights.names import targets
from unspool.weights.quant import Quantiser

__all__ = ["size"]


def size(model: Model, quantiser: Quantiser) -> int:
    """Bytes of the weights of `model`, which needs no memory yet; a tied head is counted once."""
    total = 0
    for target in targets(model):
        if model.tied and target.name == "lm_head.weight":
            continue
        path, _, kind = target.name.rpartition(".")
        owner = model.get_submodule(path)
        code = None
        if kind == "weight" and (isinstance(owner, Linear) or (model.tied and owner is model.embedding)):
            code = quantiser.code if owner not in (model.lm_head, model.embedding) else quantiser.head
        shape = target.parameter.shape
        total += target.parameter.nbytes if code is None else code.nbytes(shape[0], shape[1])
    return total
