"""Low-rank adapters side by side with the bare model: decode and prefill, one adapter and several in a batch.

    python benchmarks/adapters.py [--shape M] [--rank 16] [--rows 8] [--new 24] [--rounds 3]

One process loads a random checkpoint of a real shape (`checkpoints.py`) and as many random adapters as there are rows,
on every linear layer of the body. What is compared runs in turn, so that slow moments of a shared machine fall on all.
Decode is the median time between two tokens of `generate()`; prefill is a forward pass over 256 tokens in all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPT = 16
PREFILL = 256


def write_adapter(folder: Path, model: Any, rank: int, seed: int) -> Path:
    """A random adapter for all linear layers of the body, as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    from unspool.weights.lora import _parts

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, part in _parts(model).items():
        inputs = part.layer.weight.shape[1]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(part.outputs, rank, generator=generator) * 0.02
    folder.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def decode(model: Any, ids: Any, names: list[str] | None, new: int) -> float:
    """Milliseconds a step."""
    from worker import Clock, generate, median

    clock = Clock(len(ids))
    generate(model, ids, ids.new_ones(ids.shape), new, streamer=clock, adapter_names=names)
    return float(1000 * median([b - a for a, b in pairwise(clock.times)]))


def prefill(model: Any, ids: Any, names: list[str] | None) -> float:
    """Milliseconds a forward pass."""
    import torch

    rows = ids.repeat(1, PREFILL // ids.numel())
    began = time.perf_counter()
    with torch.inference_mode():
        model(rows, adapter_names=names)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    import torch
    from checkpoints import checkpoint

    import unspool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M")
    parser.add_argument("--quantize")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, _ = unspool.load(checkpoint(args.shape), dtype="bfloat16", quantize=args.quantize)
    names = [f"a{number}" for number in range(args.rows)]
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(names):
            model.load_adapter(write_adapter(Path(folder) / name, model, args.rank, seed), name)
    one = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    many = torch.randint(3, 1000, (args.rows, PROMPT), generator=torch.Generator().manual_seed(1))
    base = ["__base__"]
    kinds: dict[str, tuple[Any, list[str], list[str]]] = {
        "1 row, one adapter": (one, base, names[:1]),
        f"{args.rows} rows, one adapter": (many, base * args.rows, names[:1] * args.rows),
        f"{args.rows} rows, {args.rows} adapters": (many, base * args.rows, names),
    }
    columns = "bare | with | speed, bare = 1"
    print(f"| {args.shape}, rank {args.rank} | decode, ms a step: {columns} | prefill, ms: {columns} |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for label, (ids, bare, with_) in kinds.items():
        runs: list[Callable[[], float]] = [
            lambda ids=ids, bare=bare: decode(model, ids, bare, args.new),
            lambda ids=ids, with_=with_: decode(model, ids, with_, args.new),
            lambda ids=ids, bare=bare: prefill(model, ids, bare),
            lambda ids=ids, with_=with_: prefill(model, ids, with_),
        ]
        best = [min(times) for times in zip(*([run() for run in runs] for _ in range(args.rounds)), strict=True)]
        cells = [f"{best[i]:.1f} | {best[i + 1]:.1f} | {best[i] / best[i + 1]:.2f}" for i in (0, 2)]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
