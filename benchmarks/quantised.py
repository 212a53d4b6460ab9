"""Quantised weights side by side with bf16: memory, loading, decode speed, and what they cost in quality.

    python benchmarks/quantised.py [--shape M] [--new 32] [--rows 8 16] [--only int8 nf4]

Every format runs in a process of its own, all in turn, so that slow moments of a shared machine fall on all. Speed is
on a random checkpoint of a real shape (`checkpoints.py`), as the median time between two tokens of `generate()`.
Quality is on the built-in storyteller: perplexity of text that it wrote itself in bf16, and how often the most likely
token is the same as in bf16; `--quality` prints only that.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

FORMATS = ("bf16", "int8", "int4-g32", "int4", "int4-g128", "nf4", "fp4")


def measure(shape: str, kind: str, new: int, rows: Iterable[int]) -> dict[str, Any]:
    """Memory in MiB, seconds to load, and milliseconds a step by number of rows."""
    import torch
    from checkpoints import checkpoint
    from worker import Clock, generate, median, peak_mib

    import unspool

    torch.set_num_threads(2)
    before, began = peak_mib(), time.perf_counter()
    model, _ = unspool.load(checkpoint(shape), dtype="bfloat16", quantize=None if kind == "bf16" else kind)
    got: dict[str, Any] = {"load": time.perf_counter() - began, "memory": peak_mib() - before}
    for count in (1, *rows):
        ids = torch.randint(3, 1000, (count, 16), generator=torch.Generator().manual_seed(0))
        generate(model, ids, torch.ones_like(ids), 3)
        clock = Clock(count)
        generate(model, ids, torch.ones_like(ids), new, streamer=clock)
        got[f"rows {count}"] = 1000 * median([b - a for a, b in pairwise(clock.times)])
    return got


def quality(kinds: Iterable[str], tokens: int = 12_000) -> dict[str, tuple[float, float]]:
    """Perplexity, and the part of most likely tokens that are those of bf16, of each format."""
    import torch

    import unspool

    plain, tokenizer = unspool.load("storyteller", dtype="bfloat16")
    prompts = tokenizer(["Once upon a time"] * (tokens // 400), return_tensors="pt")
    torch.manual_seed(0)
    text = plain.generate(**prompts, max_new_tokens=400, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    pad = plain.generation_config.pad_token_id
    real = text[:, 1:] != (-1 if pad is None else pad)

    def look(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            logits = torch.cat([model(part).logits[:, :-1].float() for part in text.split(4)])
        chances = logits.log_softmax(-1).gather(2, text[:, 1:, None])[:, :, 0]
        return chances[real].mean(), logits.argmax(-1)[real]

    _, expected = look(plain)
    found = {}
    for kind in kinds:
        model, _ = unspool.load("storyteller", dtype="bfloat16", quantize=None if kind == "bf16" else kind)
        mean, tops = look(model)
        found[kind] = (math.exp(-float(mean)), float((tops == expected).float().mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="M")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--only", nargs="*", default=FORMATS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quality", action="store_true", help="print only that")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.shape, args.one, args.new, args.rows)))
        return
    kinds = list(dict.fromkeys(("bf16", *args.only)))
    if args.quality:
        print(quality(kinds))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for kind in kinds:
            command = [sys.executable, str(Path(__file__)), "--one", kind, "--shape", args.shape]
            command += ["--new", str(args.new), "--rows", *map(str, args.rows)]
            got = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            kept = best.setdefault(kind, got)
            best[kind] = {name: min(kept[name], got[name]) for name in got}
    good = quality(kinds)
    columns = "".join(f" {count} rows, ms a step (one row = 1) |" for count in args.rows)
    print(f"| weights | memory, MiB | load, s | decode, tokens/s (bf16 = 1) |{columns} perplexity | same top token |")
    print("|---|---:|---:|---:|" + "---:|" * len(args.rows) + "---:|---:|")
    for kind in kinds:
        got, one = best[kind], best[kind]["rows 1"]
        steps = "".join(f" {got[f'rows {n}']:.0f} ({got[f'rows {n}'] / one:.2f}) |" for n in args.rows)
        speed = f"{1000 / one:.1f} ({best['bf16']['rows 1'] / one:.2f})"
        perplexity, same = good[kind]
        change = 100 * (perplexity / good["bf16"][0] - 1)
        print(
            f"| {kind} | {got['memory']:.0f} | {got['load']:.1f} | {speed} |{steps} {perplexity:.4f} ({change:+.2f} %) "
            f"| {100 * same:.1f} % |"
        )


if __name__ == "__main__":
    main()
