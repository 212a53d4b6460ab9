"""Activation functions by the name they have in `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.errors import CheckpointError
from unspool.kernels.elementwise import silu_gate

__all__ = ["activation", "gated"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function called `name` in a checkpoint's configuration.

    Raises:
        CheckpointError: the name is unknown.
    """
    try:
        return _ACTIVATIONS[name]
    except KeyError:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise CheckpointError(f"config.json asks for the activation {name!r}; known are {known}") from None


def gated(name: str) -> Callable[[Tensor], Tensor]:
    """The function `act(gate) * up` of `[rows, 2 * width]`, each row of which is a gate and then `up`.

    Raises:
        CheckpointError: the name is unknown.
    """
    act = activation(name)
    return silu_gate if act is F.silu else partial(_gated, act)


def _gated(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    gate = act(gate)
    return gate * up if torch.is_grad_enabled() else gate.mul_(up)
