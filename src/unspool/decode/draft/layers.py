"""Drafts from a model's own first layers (Elhoushi et al., 2024)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from unspool.models.base import Batch, Model


class FirstLayers:
    """A model that stops after its first layers, with the norm and head of the whole; see `decode.runner.Steps`.

    Raises:
        ValueError: that is all layers.
    """

    def __init__(self, model: Model, layers: int) -> None:
        if layers >= model.spec.layers:
            raise ValueError(
                f"assistant_early_exit={layers} drafts with so many of the model's {model.spec.layers} layers; "
                "choose fewer"
            )
        self._model = model
        self._layers = layers
        cut = ((group, tuple(layer for layer in group.layers if layer < layers)) for group in model.spec.groups)
        groups = tuple(replace(group, layers=kept) for group, kept in cut if kept)
        self.spec = replace(model.spec, groups=groups)

    def step(self, batch: Batch) -> Tensor:
        """See `Steps`."""
        batch.layers = self._layers
        return self._model.step(batch)
