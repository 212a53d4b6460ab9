"""How much faster modules of transformers decode through unspool than by themselves, as a table of ratios.

    python benchmarks/bridge.py [one eight rows ...] [--rounds 5] [--threads 2] [--patience 60] [--quick]

Both sides run the same module in one process, in turn; see `modes.py`, whose way of measuring this is. `one` and
`eight` are the ragged tier on the SmolLM2-135M shape in bf16; the names of architectures (of `tests/architectures.py`)
are the rows tier on small models, where what a step costs besides the module shows most.
"""

from __future__ import annotations

import sys
from functools import partial
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
    given = {**architecture.inputs(), "max_new_tokens": new, "min_new_tokens": new, "return_dict_in_generate": True}
    return sides(architecture.make(), given, "rows")


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
    modes.MODES = every()
    modes.__doc__ = __doc__
    modes.main()
