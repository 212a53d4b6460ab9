"""How large a manager's store is, and how much it computes in a step."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence as Items

import torch

from unspool.attention.registry import paged_attention
from unspool.cache.layout import LayerGroup
from unspool.cache.paged import BLOCK_SIZE, PagedStore
from unspool.cache.swap import SwapArea
from unspool.config import ContinuousBatchingConfig
from unspool.decode.opened import Ledger, Opener
from unspool.decode.runner import Decoder
from unspool.decode.sequence import Sequence
from unspool.errors import OutOfMemory
from unspool.models.base import Batch

__all__ = ["bound_pasts", "make_ledger", "make_store", "make_swap", "share_out", "tokens_per_step"]

logger = logging.getLogger("unspool")

# Shares of the free memory taken when nobody says. A CPU's memory serves other programs too, and is only taken as the
# cache fills; what a step needs besides comes out of the rest.
_SHARE = {"cuda": 0.9, "cpu": 0.3}
_LONGEST = 32768  # positions counted for each request; a model may have a million
_TOKENS_PER_STEP = {"cuda": 8192}
# Tensors of `[rows, vocab]` in fp32 that choosing tokens takes at its height.
_SCORES = 4


def make_store(
    model: Decoder,
    config: ContinuousBatchingConfig,
    places: int,
    budget: int,
    wanted: int | None = None,
    kind: type[PagedStore] = PagedStore,
) -> PagedStore:
    """A store of fixed size: by number, or by a share of the free memory and not more than can be used.

    On a GPU, a step of the largest kind is computed first, and what it takes besides the store is left free.

    Args:
        model: whose keys and values it keeps.
        config: `num_blocks` blocks of `page_size` tokens, or `max_memory_percent` of the free memory.
        places: most requests at a time.
        budget: most tokens in a step.
        wanted: tokens that are known to be enough, or `None`.
        kind: of store.

    Raises:
        OutOfMemory: not even one block fits.
    """
    groups, device = model.spec.groups, model.device
    most = [_most(group, places, budget) for group in groups]
    if config.num_blocks is not None:
        blocks = -(-config.num_blocks * config.page_size // BLOCK_SIZE)
        counts = [blocks if limit is None else min(limit, blocks) for limit in most]
    else:
        each = [BLOCK_SIZE * group.bytes_per_token(model.dtype.itemsize) for group in groups]
        working = _warm_up(model, places, budget) if device.type == "cuda" else 0
        share = config.max_memory_percent or _SHARE.get(device.type, 0.5)
        useful = places * min(model.spec.max_positions, _LONGEST) if wanted is None else wanted + places * BLOCK_SIZE
        space = int(max(0, free_memory(device) - working) * share)
        counts = share_out(space, each, most, -(-useful // BLOCK_SIZE))
        if min(counts) < 1:
            raise OutOfMemory("one block of the key/value cache", needed=sum(each), available=space)
    return kind(groups, counts, dtype=model.dtype, device=device, block_size=BLOCK_SIZE)


def make_ledger(model: Opener, config: ContinuousBatchingConfig, places: int) -> Ledger:
    """What counts the tokens of rows that are computed by themselves: as many as can be used, where nobody says."""
    tokens = places * _LONGEST if config.num_blocks is None else config.num_blocks * config.page_size
    return Ledger.empty(-(-tokens // BLOCK_SIZE), model.device)


def bound_pasts(ledger: Ledger, config: ContinuousBatchingConfig) -> None:
    """Let pasts that a module keeps itself take a share of the memory that is free beside the store."""
    device = ledger.device
    ledger.most_bytes = free_memory(device) * (config.max_memory_percent or _SHARE.get(device.type, 0.5))


def make_swap(store: PagedStore, config: ContinuousBatchingConfig) -> SwapArea | None:
    """Room on the host for rows that are put back; `None` where none is asked for, or not one block fits.

    `cpu_offload_space` GiB, but at most the share `cpu_offload_space_safety_threshold` of the host's free memory, which
    is what `None` takes.
    """
    if config.cpu_offload_space == 0:
        return None
    most = int(free_memory(torch.device("cpu")) * config.cpu_offload_space_safety_threshold)
    asked = most if config.cpu_offload_space is None else int(config.cpu_offload_space * 2**30)
    if asked > most > 0:  # a threshold of 0 sets no limit
        logger.warning(
            "cpu_offload_space=%.2f GiB is more than is free; %.2f GiB are used", asked / 2**30, most / 2**30
        )
        asked = most
    counts = [pool.count for pool in store.blocks]
    share = asked / sum(map(int.__mul__, counts, store.block_bytes()))
    counts = [int(count * share) for count in counts]
    return SwapArea(store, counts) if min(counts) > 0 else None


def share_out(space: int, each: Items[int], most: Items[int | None], useful: int) -> list[int]:
    """Blocks of every layer group that `space` bytes hold: as many of each, but no more than it can ever need.

    Args:
        space: bytes.
        each: bytes that a block takes, of each group.
        most: blocks that a group can ever need at the same time; `None` for as many as there are tokens.
        useful: blocks that are of use to a group without such a limit.
    """
    limits = [useful if limit is None else min(limit, useful) for limit in most]
    counts = [0] * len(each)
    open_groups = sorted(range(len(each)), key=limits.__getitem__)
    while open_groups:
        fits = space // sum(each[index] for index in open_groups)
        index = open_groups[0]
        if fits <= limits[index]:
            for other in open_groups:
                counts[other] = fits
            break
        counts[index] = limits[index]
        space -= counts[index] * each[index]
        open_groups.pop(0)
    return counts


def tokens_per_step(config: ContinuousBatchingConfig, device: torch.device) -> int:
    """Most tokens fed in a step: what is given, or as many as a device computes at full speed."""
    return config.max_batch_tokens or _TOKENS_PER_STEP.get(device.type, 1024)


def _most(group: LayerGroup, places: int, budget: int) -> int | None:
    """Blocks that live rows can ever hold in layers with a window: what each sees, and what a step adds."""
    if group.window is None:
        return None
    return places * (-(-group.window // BLOCK_SIZE) + 2) + -(-budget // BLOCK_SIZE)


def _warm_up(model: Decoder, places: int, budget: int) -> int:
    """Bytes that a step of `budget` tokens takes at its height, besides weights and the store: measured on the GPU."""
    device, tokens = model.device, min(budget, model.spec.max_positions)
    store = PagedStore(model.spec.groups, -(-tokens // BLOCK_SIZE), dtype=model.dtype, device=device)
    row = Sequence(0, [0] * tokens)
    store.reserve(row, tokens)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        _one_step(model, store, row)
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    return taken * -(-budget // tokens) + _SCORES * places * model.spec.vocab_size * 4


def _one_step(model: Decoder, store: PagedStore, row: Sequence) -> torch.Tensor:
    """Compute all tokens of a row that has room in `store`."""
    device, tokens = model.device, len(row.tokens)
    return model.step(
        Batch(
            tokens=torch.tensor(row.tokens, device=device),
            positions=torch.arange(tokens, device=device),
            attend=paged_attention(store, [row], [tokens]),
            keep=torch.tensor([tokens - 1], device=device),
            extents=torch.full((tokens,), tokens, device=device) if model.spec.needs_extents else None,
        )
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4 * 2**30
