"""Low-rank adapters on our fused projections (Hu et al., 2021), one pair of matrices per part as PEFT stores them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

RANK = 8
ALPHA = 16
# Our projections, and the parts they stand for under transformers' names.
PARTS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


class Adapted(nn.Module):
    """A frozen projection plus ``B A x * ALPHA / RANK`` for each of its parts; B starts at zero."""

    def __init__(self, base: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        weight = base.get_parameter("weight")
        self.base = base
        self.down = nn.ParameterList(nn.Parameter(torch.empty(RANK, weight.shape[1])) for _ in sizes)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(size, RANK)) for size in sizes)
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` ``[tokens, in]``."""
        change = [x @ down.T @ up.T for down, up in zip(self.down, self.up, strict=True)]
        out: Tensor = self.base(x) + torch.cat(change, dim=-1) * (ALPHA / RANK)
        return out


def adapt(model: nn.Module, sizes: dict[str, list[int]]) -> list[nn.Parameter]:
    """Freeze ``model`` and put adapters on every projection; returns what is left to train."""
    model.requires_grad_(False)
    for layer in model.get_submodule("layers").children():
        for name in PARTS:
            owner, attribute = name.split(".")
            base = layer.get_submodule(name)
            rows = sizes.get(name) or [base.get_parameter("weight").shape[0]]
            setattr(layer.get_submodule(owner), attribute, Adapted(base, rows))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every adapter matrix with its name, such as ``layers.0.self_attn.q_proj.lora_A.weight``."""
    for number, layer in enumerate(model.get_submodule("layers").children()):
        for name, parts in PARTS.items():
            adapted = layer.get_submodule(name)
            if isinstance(adapted, Adapted):
                for part, down, up in zip(parts, adapted.down, adapted.up, strict=True):
                    yield f"layers.{number}.{part}.lora_A.weight", down
                    yield f"layers.{number}.{part}.lora_B.weight", up
