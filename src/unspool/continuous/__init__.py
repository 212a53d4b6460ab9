"""Continuous batching: the front end for requests that come and go.

`manager` is the public object, `mixin` the methods a model gets, `reading` turns arguments into what a request asks
for. `engine` takes steps: `scheduler` says what to feed, `room` who gets blocks and what need not be computed, `plain`
decides greedy and sampled rows, `beams` and `drafted` those of a request that has a group of its own. `worker` puts it
behind a thread, `outbox` carries outputs, `requests` holds the nouns, `metrics` the numbers, and `view` shows
them in a terminal. How a step is computed is the core's business (`unspool.decode`).
"""

from unspool.continuous.manager import ContinuousBatchingManager
from unspool.continuous.metrics import Metrics
from unspool.continuous.mixin import ContinuousMixin
from unspool.continuous.requests import GenerationOutput, RequestState, RequestStatus
from unspool.continuous.scheduler import FIFOScheduler, PrefillFirstScheduler, Scheduler, register_scheduler

__all__ = [
    "ContinuousBatchingManager",
    "ContinuousMixin",
    "FIFOScheduler",
    "GenerationOutput",
    "Metrics",
    "PrefillFirstScheduler",
    "RequestState",
    "RequestStatus",
    "Scheduler",
    "register_scheduler",
]
