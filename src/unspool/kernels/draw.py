"""Draws of tokens by torch's own random numbers, by `draw.h`.

`torch.multinomial` draws the largest of `p / e` with exponential noise `e`, of which torch makes one number after the
other: on a large vocabulary that takes longer than many a model's step. The kernel makes the same generator's bits in
vectors, and a noise only where it could win. Tokens, and where generators are left, are the same bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from unspool.kernels import native

__all__ = ["draw", "draw_seeded"]

_WORD, _INT = ctypes.c_void_p, ctypes.c_int
_reading = Lock()


def draw(
    probs: Tensor, places: Sequence[int] | None = None, rows: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Tokens `[n]` drawn from `probs` `[n, vocab]`, -1 where a row has nothing to draw (NaN, infinite or all 0).

    Args:
        probs: not negative; they need not sum to 1. May be written over.
        places: which row of noise each row gets, of `rows` that the generator gives; by default their own.
        rows: see `places`.
        generator: of the device of `probs`; by default torch's own for that.
    """
    if places is None:
        rows = len(probs)
    if _usable(probs):
        tokens, _ = _draw(probs, places, rows, torch.default_generator if generator is None else generator)
        if tokens is not None:
            return tokens
    noise = probs.new_empty(rows, probs.shape[1]).exponential_(1, generator=generator)
    return _race(probs, noise if places is None else noise[torch.tensor(places, device=probs.device)])


def draw_seeded(probs: Tensor, seeds: Sequence[int], generator: torch.Generator) -> Tensor:
    """The same, each row with the noise that a generator gives that was seeded with the row's number (not negative).

    Args:
        generator: of the device of `probs`; it may be seeded anew.
    """
    if _usable(probs):
        return _draw_seeded(probs, seeds)[0]
    noise = torch.empty_like(probs)
    for seed, out in zip(seeds, noise, strict=True):
        out.exponential_(1, generator=generator.manual_seed(seed))
    return _race(probs, noise)


def _race(probs: Tensor, noise: Tensor) -> Tensor:
    ratio = probs.div_(noise)
    tokens = ratio.argmax(dim=-1)
    value = ratio.gather(1, tokens[:, None])[:, 0]
    return tokens.where(value.isfinite() & (value > 0), -1)


def _usable(probs: Tensor) -> bool:
    return probs.is_cpu and probs.dtype is torch.float32 and probs.numel() > 0 and _alike()


@cache
def _alike() -> bool:
    """Whether there are kernels, and torch's generator is the one they know; tried with one of our own.

    Builds of torch may draw by other libraries, and long rows otherwise than short ones.
    """
    if not native.active():
        return False
    generator = torch.Generator("cpu").manual_seed(2**62 + 12345)
    for shape in ((16, 16), (17, 17), (2, 49152)):
        probs = torch.eye(*shape, dtype=torch.float32, device="cpu")
        if shape[0] != shape[1]:
            probs.fill_(1.0)
        before = generator.get_state()
        noise = torch.empty_like(probs).exponential_(1, generator=generator)
        after = generator.get_state()
        generator.set_state(before)
        tokens, ratios = _draw(probs, None, len(probs), generator)
        expected, places = (probs / noise).max(dim=-1)
        if tokens is None or not torch.equal(tokens, places) or not torch.equal(ratios, expected):
            return False
        if not torch.equal(generator.get_state(), after):
            return False
    seeds = [7, 2**63 - 1]
    for seed, out in zip(seeds, noise, strict=True):
        out.exponential_(1, generator=generator.manual_seed(seed))
    tokens, ratios = _draw_seeded(probs, seeds)
    expected, places = (probs / noise).max(dim=-1)
    return torch.equal(tokens, places) and torch.equal(ratios, expected)


def _draw(
    probs: Tensor, places: Sequence[int] | None, rows: int, generator: torch.Generator
) -> tuple[Tensor | None, Tensor]:
    """Tokens and the largest ratios; no tokens where the generator's state is not understood."""
    count, vocab = probs.shape
    probs = probs.contiguous()
    tokens, ratios = probs.new_empty(count, dtype=torch.int64), probs.new_empty(count)
    table = None
    if places is not None:
        table = (ctypes.c_int64 * rows)(*[-1] * rows)
        for i, place in enumerate(places):
            table[place] = i
    pointers = probs.data_ptr(), vocab, table, rows, tokens.data_ptr(), ratios.data_ptr()
    with _reading:  # so that no two of our threads draw the same numbers
        while True:
            state = generator.get_state()
            before = state.clone()
            if _functions()[0](state.data_ptr(), *pointers):
                return None, ratios
            if torch.equal(generator.get_state(), before):  # else somebody else has drawn them meanwhile
                generator.set_state(state)
                return tokens, ratios


def _draw_seeded(probs: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens and the largest ratios."""
    count, vocab = probs.shape
    probs = probs.contiguous()
    tokens, ratios = probs.new_empty(count, dtype=torch.int64), probs.new_empty(count)
    low = (ctypes.c_uint32 * count)(*(seed & 0xFFFFFFFF for seed in seeds))
    threads = torch.get_num_threads()
    _functions()[1](probs.data_ptr(), count, vocab, low, tokens.data_ptr(), ratios.data_ptr(), threads)
    return tokens, ratios


@cache
def _functions() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    # the first with Python's other threads stopped, which might use the generator
    return (
        native.function("unspool_draw", _INT, *(_WORD,) * 7, alone=True),
        native.function("unspool_draw_seeded", None, *(_WORD,) * 6, _INT),
    )
