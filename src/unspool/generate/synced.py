"""Several processes that share one model's weights, kept in step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from unspool.decode.plan import Scheduler
from unspool.decode.sequence import Work

__all__ = ["SyncedScheduler", "check_synced"]


def check_synced(synced: bool | None) -> bool:
    """Whether processes are to be kept in step.

    Raises:
        ValueError: there is nothing that they could be kept in step through.
    """
    if synced and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "synced_gpus=True keeps processes in step, but torch.distributed is not initialised here; call "
            "torch.distributed.init_process_group() first, or leave it out"
        )
    return bool(synced) and dist.get_world_size() > 1


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
