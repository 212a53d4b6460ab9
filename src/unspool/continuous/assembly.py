"""A manager's engine, put together as its configuration says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from unspool.cache.paged import PagedStore
from unspool.config import ContinuousBatchingConfig
from unspool.continuous.engine import Engine
from unspool.continuous.outbox import Outbox
from unspool.continuous.plain import PlainRows
from unspool.continuous.room import Room
from unspool.continuous.scheduler import scheduler_class
from unspool.continuous.sizes import bound_pasts, make_ledger, make_store, make_swap, tokens_per_step
from unspool.decode.fault import find_fault
from unspool.decode.invariant import InvariantRunner
from unspool.decode.opened import BesideRunner, Ledger, OpenedRunner, Opener
from unspool.decode.runner import Decoder, PagedRunner, Runner
from unspool.decode.sequence import Sequence
from unspool.errors import Unsupported
from unspool.models.base import Model

__all__ = ["make_engine"]

_PLACES = 256  # most requests that run at a time, when nobody says


def _may_run_ahead(model: Decoder | Opener, config: ContinuousBatchingConfig) -> bool:
    """Whether a step may be launched before the host has seen the last one: none is told of a row's whole length."""
    plain = not model.spec.needs_extents and model.spec.recompute_past is None
    return plain and model.device.type == "cuda" and config.use_async_batching is not False


def make_engine(
    model: Decoder | Opener,
    opener: Opener | None,
    config: ContinuousBatchingConfig,
    outbox: Outbox,
    wanted: int | None,
) -> Engine:
    """The engine of a manager, with its store.

    Args:
        model: computes.
        opener: computes requests that are told more than tokens, or `None`.
        config: sizes, limits and the scheduler.
        outbox: where outputs go.
        wanted: tokens of keys and values that are known to be enough, or `None`.

    Raises:
        ValueError, Unsupported: a setting is wrong.
        OutOfMemory: no room for keys and values.
    """
    places = config.max_requests_per_batch or _PLACES
    kind = scheduler_class(config.scheduler_type)
    deterministic = _deterministic(model, config.deterministic)
    budget = tokens_per_step(config, model.device)
    runner: Runner
    fault: Callable[[Sequence], str]
    if isinstance(model, Opener):
        store: PagedStore = (ledger := make_ledger(model, config, places))
        runner = opened = OpenedRunner(model, ledger, alone=deterministic)
        swap, fault = None, opened.fault
    else:
        store = make_store(model, config, places, budget, wanted, PagedStore if opener is None else Ledger)
        paged = InvariantRunner if deterministic else PagedRunner
        runner = paged(model, store, model.device, forks=True)
        swap, fault = make_swap(store, config), partial(find_fault, model)
        if opener is not None:
            assert isinstance(store, Ledger)
            opened = OpenedRunner(opener, store, alone=deterministic)
            runner = beside = BesideRunner(runner, opened)
            fault = beside.fault_finder(fault)
    if isinstance(store, Ledger):
        bound_pasts(store, config)
    # Keys that depend on a row's whole length are not another row's.
    sharing = config.allow_block_sharing and not model.spec.needs_extents
    room = Room(store, sharing=sharing, swap=swap)
    scheduler = kind(room, config.safety_margin, places, recompute_past=model.spec.recompute_past)
    return Engine(
        runner,
        model.device,
        scheduler,
        PlainRows(places, model.device, fault),
        outbox,
        token_budget=budget,
        ahead=_may_run_ahead(model, config),
    )


def _deterministic(model: Decoder | Opener, asked: bool | None) -> bool:
    """Whether rows must be the same bits in any company.

    Raises:
        Unsupported: that is asked for, and nobody can promise it.
    """
    cpu = model.device.type == "cpu"
    if asked and not cpu:
        raise Unsupported(f"deterministic=True is promised on a CPU only, and the model is on {model.device}")
    return cpu and isinstance(model, Model) if asked is None else asked
