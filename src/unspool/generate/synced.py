"""Several processes that share one model's weights, kept in step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from unspool.decode.plan import Scheduler
from unspool.decode.sequence import Work

__all__ = ["SyncedScheduler", "check_synced"]


def check_synced(synced: bool | None, module: nn.Module) -> bool:
    """Whether processes are to be kept in step; `None`: where the module's weights are spread over several.

    Raises:
        ValueError: there is nothing that they could be kept in step through.
    """
    there = dist.is_available() and dist.is_initialized()
    if synced and not there:
        raise ValueError(
            "synced_gpus=True keeps processes in step, but torch.distributed is not initialised here; call "
            "torch.distributed.init_process_group() first, or leave it out"
        )
    if not there or dist.get_world_size() == 1:
        return False
    return _is_spread(module) if synced is None else synced


def _is_spread(module: nn.Module) -> bool:
    """Whether each process holds a part of the weights: FSDP of either kind, or DeepSpeed's ZeRO 3.

    Of tensor parallelism, where processes decode the same prompts together, nothing is said.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds = (FSDPModule, FullyShardedDataParallel)
    if any(isinstance(part, kinds) or getattr(part, "_is_fsdp_managed_module", False) for part in module.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


class SyncedScheduler:
    """A scheduler whose process goes on with its share of the others' steps after its own rows have ended.

    Where weights are spread over processes, each must run the model as often as every other, or they wait for ever.

    Args:
        inner: plans this process's work.
        idle: runs the model once, for nothing.
        device: where processes can exchange a flag.
    """

    def __init__(self, inner: Scheduler, idle: Callable[[], None], device: torch.device) -> None:
        self._inner = inner
        self._idle = idle
        self._device = device

    def plan(self) -> list[Work]:
        """See `Scheduler`; comes back empty when all processes are done."""
        while True:
            work = self._inner.plan()
            busy = torch.tensor(int(bool(work)), device=self._device)
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
            if work or not busy.item():
                return work
            self._idle()
