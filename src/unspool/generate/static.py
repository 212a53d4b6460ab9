"""One static call run: the mode's group, the backend's runner and a scheduler in the core's loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from unspool.config import GenerationMode
from unspool.decode.loop import Loop
from unspool.decode.plan import Scheduler, StaticScheduler
from unspool.decode.sequence import Sequence
from unspool.generate.assisted import set_up_assisted
from unspool.generate.beams import set_up_beams
from unspool.generate.call import Call, Setup
from unspool.generate.contrastive import set_up_contrastive
from unspool.generate.dola import set_up_dola
from unspool.generate.guidance import guided
from unspool.generate.outputs import GenerateOutput
from unspool.generate.sampling import set_up_sampling
from unspool.generate.synced import SyncedScheduler

_SET_UP: dict[GenerationMode, Callable[[Call], Setup]] = {
    GenerationMode.GREEDY_SEARCH: set_up_sampling,
    GenerationMode.SAMPLE: set_up_sampling,
    GenerationMode.ASSISTED_GENERATION: set_up_assisted,
    GenerationMode.CONTRASTIVE_SEARCH: set_up_contrastive,
    GenerationMode.DOLA_GENERATION: set_up_dola,
    GenerationMode.BEAM_SEARCH: set_up_beams,
    GenerationMode.BEAM_SAMPLE: set_up_beams,
    GenerationMode.GROUP_BEAM_SEARCH: set_up_beams,
    GenerationMode.CONSTRAINED_BEAM_SEARCH: set_up_beams,
}


def run(call: Call) -> Tensor | GenerateOutput:
    """Generate: `[rows, columns]` ids, or the output object when `return_dict_in_generate` is set."""
    guidance = call.guidance
    setup = _SET_UP[call.mode](call)
    if call.negative is not None and guidance is not None:
        setup = guided(setup, call, guidance, *call.negative)
    rows = setup.group.rows
    copies, drafts = call.copies * setup.candidates, setup.group.drafter is not None
    runner = call.backend.runner(
        rows, copies, call.steps, call.past, forks=setup.forks, drafts=drafts, alike=setup.candidates > 1
    )
    scheduler: Scheduler = StaticScheduler(
        setup.group,
        runner,
        steps=call.steps + setup.ahead,
        chunk=_chunk(call, rows[::copies]),
        recompute_past=call.backend.recompute_past,
        keep_finished=setup.keep_finished,
        keep_stored=call.detailed and setup.gives_past,
    )
    if call.synced:
        scheduler = SyncedScheduler(scheduler, call.backend.idle, call.backend.device)
    recomputes = call.backend.recompute_past is not None
    in_step = setup.in_step or setup.keep_finished or recomputes
    loop = Loop(runner, scheduler, device=call.backend.device, in_step=in_step)
    with _mode(call):
        loop.run()
    return call.backend.dress(setup.result(runner))


def _mode(call: Call) -> AbstractContextManager[Any]:
    """Without gradients; in inference mode, unless its tensors would reach the caller, who may compute with them."""
    seen = call.synced or call.every_row or call.detailed or call.foreign
    return torch.no_grad() if seen else call.backend.unseen()


def _chunk(call: Call, prompts: list[Sequence]) -> int | None:
    """Columns of prompt per step; `prompts` has one row for each."""
    if call.config.prefill_chunk_size is not None:
        return int(call.config.prefill_chunk_size)
    budget = call.backend.abilities.prompt_budget
    if budget is None or sum(len(row.tokens) for row in prompts) <= budget:
        return None
    return max(64, budget // len(prompts))
