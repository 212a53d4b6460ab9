"""Rotary position embedding (Su et al., 2021) and the ways to stretch it over longer texts.

Angles are computed in fp32 and once per step for all layers. Where they depend on the length of the text (`dynamic`,
`longrope`), each token uses its own row's length, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool.errors import CheckpointError
from unspool.kernels import elementwise

__all__ = ["Rope", "Rotary", "Turn", "rotate"]

# Positions of a table, before it grows and at most.
_FIRST_POSITIONS, _MOST_POSITIONS = 256, 1 << 16


@dataclass(frozen=True, slots=True)
class Rope:
    """What a checkpoint says about its rotary embedding.

    Attributes:
        kind: `"default"`, `"linear"`, `"dynamic"`, `"yarn"`, `"llama3"` or `"longrope"`.
        theta: base of the geometric series of wavelengths.
        dim: how many elements of a head turn; the rest pass unchanged.
        max_positions: longest text the model was made for, after stretching.
        original: longest text it was trained on before stretching.
        options: the kind's own parameters, as in `config.json`.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    original: int
    options: Mapping[str, Any]

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on the length of the text."""
        return self.kind in ("dynamic", "longrope")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], head_dim: int, max_positions: int, theta: float) -> Rope:
        """Read both forms of `config.json`: a `rope_parameters` table, or `rope_theta` beside `rope_scaling`.

        Args:
            config: the checkpoint's configuration.
            head_dim: elements of one head.
            max_positions: positions the model was made for.
            theta: base to use where the file names none.
        """
        options = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        kind = options.get("rope_type") or options.get("type") or "default"
        kind = "longrope" if kind == "su" else kind
        if kind not in _FREQUENCIES:
            known = ", ".join(sorted(_FREQUENCIES))
            raise CheckpointError(f"config.json asks for the rotary scaling {kind!r}; supported are {known}")
        share = _first(options.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0)
        return cls(
            kind=kind,
            theta=float(_first(options.get("rope_theta"), config.get("rope_theta"), theta)),
            dim=int(head_dim * share),
            max_positions=max_positions,
            original=int(
                _first(
                    config.get("original_max_position_embeddings"),
                    options.get("original_max_position_embeddings"),
                    max_positions,
                )
            ),
            options=options,
        )

    def option(self, name: str) -> Any:
        """A parameter that this kind cannot do without."""
        value = self.options.get(name)
        if value is None:
            raise CheckpointError(f"the rotary scaling {self.kind!r} in config.json lacks {name!r}")
        return value


class Turn(NamedTuple):
    """Cosines and sines of one step, `[tokens, 1, dim]`; the first half of the sines is negated (see `rotate`)."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """Makes the angles of a step.

    Args:
        rope: the checkpoint's parameters.
    """

    def __init__(self, rope: Rope) -> None:
        self.rope = rope
        with torch.device("cpu"):
            self._short, self.factor = _FREQUENCIES[rope.kind](rope)
            self._long = _longrope(rope, long=True)[0] if rope.kind == "longrope" else None
        self._tables: dict[torch.dtype, Turn] = {}
        self._placed: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, positions: Tensor, extents: Tensor | None, dtype: torch.dtype) -> Turn:
        """Angles for `positions` `[tokens]` in rows of lengths `extents` `[tokens]`, which only some kinds need."""
        if not positions.is_cpu or self.rope.by_length:
            return self._computed(positions, extents, dtype)
        try:
            return self._looked_up(positions, self.table(_FIRST_POSITIONS, dtype))
        except IndexError:  # a position that the table does not have, or not yet
            low, high = map(int, positions.aminmax())
            table = None if low < 0 else self.table(high + 1, dtype)
            return self._computed(positions, extents, dtype) if table is None else self._looked_up(positions, table)

    @staticmethod
    def _looked_up(positions: Tensor, table: Turn | None) -> Turn:
        assert table is not None, "the first positions are kept"
        return Turn(table.cos.index_select(0, positions), table.sin.index_select(0, positions))

    def table(self, positions: int, dtype: torch.dtype) -> Turn | None:
        """The angles of so many positions and perhaps more, on the CPU; `None` where none is kept."""
        if self.rope.by_length or positions > _MOST_POSITIONS:
            return None
        table = self._tables.get(dtype)
        if table is None or positions > len(table.cos):
            with torch.inference_mode(False), torch.no_grad():
                first = torch.arange(max(_FIRST_POSITIONS, 1 << positions.bit_length()), device="cpu")
                table = self._tables[dtype] = self._computed(first, None, dtype)
        return table

    def _computed(self, positions: Tensor, extents: Tensor | None, dtype: torch.dtype) -> Turn:
        frequencies = self._frequencies(positions.device, extents)
        angles = positions[:, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        return Turn(
            torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1), torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1)
        )

    def _frequencies(self, device: torch.device, extents: Tensor | None) -> Tensor:
        """Inverse wavelengths, `[dim / 2]` or, where the row's length matters, `[tokens, dim / 2]`."""
        if device not in self._placed:
            self._placed[device] = (self._short.to(device), None if self._long is None else self._long.to(device))
        short, long = self._placed[device]
        if not self.rope.by_length:
            return short
        assert extents is not None, "this model's rotary angles need Batch.extents"
        if long is not None:
            return torch.where(extents[:, None] > self.rope.original, long, short)
        longer = extents.clamp(min=self.rope.max_positions)[:, None]
        return torch.where(longer > self.rope.max_positions, _dynamic(self.rope, longer), short)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn `x` `[tokens, heads, head_dim]`, in place where no gradient needs it.

    Element `i` of the first half pairs with element `i` of the second.
    """
    return elementwise.turn(x, turn.cos, turn.sin)


def _first(*values: Any) -> Any:
    """The first value that is there."""
    return next(value for value in values if value is not None)


def _exponents(rope: Rope, device: torch.device | None = None) -> Tensor:
    return torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim


def _default(rope: Rope) -> tuple[Tensor, float]:
    return 1.0 / rope.theta ** _exponents(rope), 1.0


def _linear(rope: Rope) -> tuple[Tensor, float]:
    """Positions divided by `factor` (Chen et al., 2023)."""
    return _default(rope)[0] / rope.option("factor"), 1.0


def _dynamic(rope: Rope, extents: Tensor) -> Tensor:
    """NTK-aware scaling whose base grows with the text's length beyond `max_positions`."""
    factor = rope.option("factor")
    grown = (factor * extents / rope.max_positions) - (factor - 1)
    base = rope.theta * grown ** (rope.dim / (rope.dim - 2))
    waves: Tensor = base ** _exponents(rope, extents.device)
    return 1.0 / waves


def _dynamic_short(rope: Rope) -> tuple[Tensor, float]:
    rope.option("factor")
    return _default(rope)


def _yarn(rope: Rope) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): short wavelengths kept, long ones stretched, a ramp between; scores rescaled."""
    options = rope.options
    factor = options.get("factor")
    factor = rope.max_positions / rope.original if factor is None else factor

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = options.get("attention_factor")
    if attention is None:
        mscale, everywhere = options.get("mscale"), options.get("mscale_all_dim")
        attention = temperature(mscale) / temperature(everywhere) if mscale and everywhere else temperature(1.0)

    def place(turns: float) -> float:
        """The (fractional) dimension whose wave makes `turns` turns over the original length."""
        return (rope.dim * math.log(rope.original / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = place(options.get("beta_fast") or 32), place(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    waves = rope.theta ** _exponents(rope)
    return 1.0 / (factor * waves) * (1 - kept) + 1.0 / waves * kept, float(attention)


def _longrope(rope: Rope, long: bool = False) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., 2024): one factor per wavelength, a set for short texts and another for long ones."""
    name = "long_factor" if long else "short_factor"
    factors = rope.option(name)
    if len(factors) != rope.dim // 2:
        raise CheckpointError(
            f"{name!r} in config.json has {len(factors)} numbers; rotary heads of {rope.dim} need {rope.dim // 2}"
        )
    factor, attention = rope.options.get("factor"), rope.options.get("attention_factor")
    factor = rope.max_positions / rope.original if factor is None else factor
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(rope.original))
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta ** _exponents(rope)), float(attention)


def _llama3(rope: Rope) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth passage between."""
    factor, low, high = (rope.option(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    plain = _default(rope)[0]
    wavelength = 2 * math.pi / plain
    smooth = (rope.original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    stretched = torch.where(wavelength > rope.original / low, plain / factor, between)
    return torch.where(wavelength < rope.original / high, plain, stretched), 1.0


_FREQUENCIES: dict[str, Callable[[Rope], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic_short,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
