"""How much faster modules of transformers decode through unspool than by themselves, as a table of ratios.

    python benchmarks/bridge.py [one eight rows ...] [--rounds 5] [--threads 2] [--patience 60] [--quick]
    python benchmarks/bridge.py sweep [t5 bart ...] [--rounds 24] [--new 48]

Both sides run the same module in one process, in turn; see `modes.py`, whose way of measuring this is. `one` and
`eight` are the ragged tier on the SmolLM2-135M shape in bf16; the names of architectures (of `tests/architectures.py`)
are the rows tier on small models, where what a step costs besides the module shows most.

`sweep` goes over all architectures (or those named) on tiny shapes, with one thread, in the tier that they take and,
for those that run ragged, in rows too. It prints two ratios of the process's own time: of the least that each part of a
call took in all rounds, which others on the machine disturb least, and the median; and at last the ten slowest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import modes
import torch
from checkpoints import NAMES
from modes import Mode, Pair, transformers_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384)  # of eight prompts


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of so many random tokens."""
    ids = torch.randint(3, 49000, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sides(model: Any, given: dict[str, Any], tier: str) -> Pair:
    """The same call of a module through unspool and by itself."""
    import unspool

    wrapped = unspool.wrap(model)
    report = wrapped.unspool_report()
    assert report.tier == tier or tier == "rows", report
    return Pair(lambda: wrapped.generate(**given), lambda: model.generate(**given))


def ragged(lengths: tuple[int, ...], quick: bool) -> Pair:
    new = 8 if quick else 64
    given = {**prompts(*lengths), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return sides(transformers_model("T").eval(), given, "ragged")


def rows(name: str, quick: bool) -> Pair:
    """A call that needs the module's own cache: ragged modules run in rows then too."""
    from architectures import ARCHITECTURES

    architecture = next(one for one in ARCHITECTURES if one.model_type == name)
    new = 8 if quick else 96
    given = {**architecture.inputs(), "max_new_tokens": new, "min_new_tokens": new}
    return sides(model := architecture.make(), {**given, **in_rows(model)}, "rows")


def in_rows(model: Any) -> dict[str, Any]:
    """A setting that asks for the module's own cache, where it would not have that anyway."""
    import unspool

    ragged = unspool.wrap(model).unspool_report().tier == "ragged"
    return {"cache_implementation": "dynamic"} if ragged else {}


def sweep(names: list[str], rounds: int, new: int) -> None:
    """Print, for each architecture, how much of a call's own time transformers needs of ours."""
    import transformers
    from architectures import ARCHITECTURES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: list[tuple[float, str]] = []
    print(f"{'':<32} least  median")
    for architecture in ARCHITECTURES:
        if names and architecture.model_type not in names:
            continue
        for name, model, pair in both_tiers(architecture, new):
            least, median = turns(model, pair, rounds)
            line = f"{name:<32} {least:.3f}  {median:.2f}"
            found.append((least, line))
            print(line, flush=True)
    print(f"\nmedian {statistics.median(least for least, _ in found):.3f}; the ten slowest:")
    print(*(line for _, line in sorted(found)[:10]), sep="\n")


def turns(model: Any, pair: Pair, rounds: int) -> tuple[float, float]:
    """Their time over ours: in the least disturbed parts of all rounds, and in the median round.

    The parts of a call are its forward passes and what lies between them. Each is taken from the round in which it was
    shortest, and time is the process's own, so that a machine that others use says as much as a quiet one.
    """
    stamps: list[float] = []
    original = torch.nn.Module.__call__

    def stamped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not model:
            return original(self, *args, **kwargs)
        stamps.append(time.process_time())
        result = original(self, *args, **kwargs)
        stamps.append(time.process_time())
        return result

    shortest: list[list[float]] = [[], []]
    spent: list[list[float]] = [[], []]
    torch.nn.Module.__call__ = stamped  # type: ignore[method-assign]
    try:
        for one in range(-1, rounds):
            for which in (0, 1) if one % 2 else (1, 0):
                stamps[:] = [time.process_time()]
                pair[which]()
                stamps.append(time.process_time())
                parts = [after - before for before, after in pairwise(stamps)]
                if one >= 0:  # the first made ready
                    spent[which].append(stamps[-1] - stamps[0])
                    shortest[which] = list(map(min, parts, shortest[which] or parts))
    finally:
        torch.nn.Module.__call__ = original  # type: ignore[method-assign]
    median = statistics.median(theirs / ours for ours, theirs in zip(*spent, strict=True))
    return sum(shortest[1]) / sum(shortest[0]), median


def both_tiers(architecture: Any, new: int) -> Iterator[tuple[str, Any, Pair]]:
    """A model's greedy call in the tier that it takes, and in rows where that is another one."""
    model = architecture.make()
    given = {**architecture.inputs(), "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    own = in_rows(model) if architecture.inputs().keys() <= {"input_ids", "attention_mask"} else {}
    if own:
        yield f"{architecture.model_type}, ragged", model, sides(model, given, "ragged")
    yield f"{architecture.model_type}, rows", model, sides(model, {**given, **own}, "rows")


def every() -> dict[str, Mode]:
    themselves = "transformers' generate() on the same module"
    shape = f"{NAMES['T']} shape, bf16"
    table = {
        "one": Mode(f"ragged, 1 row, {shape}", themselves, 1.1, partial(ragged, LENGTHS[2:3])),
        "eight": Mode(f"ragged, 8 rows of mixed lengths, {shape}", themselves, 1.5, partial(ragged, LENGTHS)),
    }
    for name in ("llama", "bloom", "gptj", "mamba", "t5", "bart", "llava"):
        table[name] = Mode(f"rows, tiny {name}, fp32", themselves, 0.97, partial(rows, name))
    return table


if __name__ == "__main__":
    if "sweep" in sys.argv[1:2]:
        parser = argparse.ArgumentParser(description="All architectures on tiny shapes.")
        parser.add_argument("names", nargs="*", metavar="MODEL_TYPE")
        parser.add_argument("--rounds", type=int, default=24)
        parser.add_argument("--new", type=int, default=48, help="tokens of each call")
        chosen = parser.parse_args(sys.argv[2:])
        sweep(chosen.names, chosen.rounds, chosen.new)
        sys.exit()
    modes.MODES = every()
    modes.__doc__ = __doc__
    modes.main()
