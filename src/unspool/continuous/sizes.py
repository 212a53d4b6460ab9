"""How large a manager's store is, and how much it computes in a step."""

from __future__ import annotations

import os

import torch

from unspool.cache.paged import BLOCK_SIZE, PagedStore
from unspool.config import ContinuousBatchingConfig
from unspool.errors import OutOfMemory
from unspool.models.base import Model

__all__ = ["make_store", "tokens_per_step"]

# Shares of the free memory taken when nobody says. A CPU's memory serves other programs too, and is only taken as the
# cache fills.
_SHARE = {"cuda": 0.9, "cpu": 0.3}
_LONGEST = 32768  # positions counted for each request; a model may have a million
_TOKENS_PER_STEP = {"cuda": 8192}


def make_store(model: Model, config: ContinuousBatchingConfig, places: int, wanted: int | None = None) -> PagedStore:
    """A store of fixed size: by number, or by a share of the free memory and not more than can be used.

    Args:
        model: whose keys and values it keeps.
        config: `num_blocks` blocks of `page_size` tokens, or `max_memory_percent` of the free memory.
        places: most requests at a time.
        wanted: tokens that are known to be enough, or `None`.

    Raises:
        OutOfMemory: not even one block fits.
    """
    if config.num_blocks is not None:
        blocks = -(-config.num_blocks * config.page_size // BLOCK_SIZE)
    else:
        device = model.device
        per_block = BLOCK_SIZE * sum(group.bytes_per_token(model.dtype.itemsize) for group in model.spec.groups)
        free = _free_memory(device)
        share = config.max_memory_percent or _SHARE.get(device.type, 0.5)
        useful = places * min(model.spec.max_positions, _LONGEST) if wanted is None else wanted + places * BLOCK_SIZE
        blocks = min(int(free * share) // per_block, -(-useful // BLOCK_SIZE))
        if blocks < 1:
            raise OutOfMemory("one block of the key/value cache", needed=per_block, available=int(free * share))
    return PagedStore(model.spec.groups, blocks, dtype=model.dtype, device=model.device, block_size=BLOCK_SIZE)


def tokens_per_step(config: ContinuousBatchingConfig, device: torch.device) -> int:
    """Most tokens fed in a step: what is given, or as many as a device computes at full speed."""
    return config.max_batch_tokens or _TOKENS_PER_STEP.get(device.type, 1024)


def _free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
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
