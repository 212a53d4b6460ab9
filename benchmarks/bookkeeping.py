"""What a step of continuous batching costs besides the model: 256 rows of a model that computes nothing.

    python benchmarks/bookkeeping.py [--rows 256] [--steps 300] [--sampled] [--profile]

The model's `step` gives the same logits (64 wide) every time. Rows with prompts of 100 to 200 tokens decode, greedily
or sampled. Printed are milliseconds of processor time a step, the median and the least tenth: planning, building the
batch with all that attention is told, choosing, committing, indexing and answering are all in it.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from typing import Any

import torch

import unspool
from unspool import ContinuousBatchingConfig


def stub() -> Any:
    """A model whose step computes nothing."""
    model, _ = unspool.load("storyteller", dtype="bfloat16")
    logits = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    model.step = lambda batch: logits[: len(batch.tokens if batch.keep is None else batch.keep)]
    return model


def running(model: Any, rows: int, sampled: bool) -> Any:
    """A manager in which so many rows decode."""
    config = ContinuousBatchingConfig(num_blocks=rows * 40, page_size=16, max_requests_per_batch=rows)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    draw = random.Random(0)
    settings: dict[str, Any] = {"do_sample": True, "seed": 1, "temperature": 0.9} if sampled else {"do_sample": False}
    for _ in range(rows):
        prompt = [draw.randrange(5, 60) for _ in range(draw.randint(100, 200))]
        manager.add_request(prompt, max_new_tokens=300, eos_token_id=None, **settings)
    while manager.metrics.waiting or manager.metrics.tokens_made < 20 * rows:
        manager.step()
    return manager


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    manager = running(stub(), args.rows, args.sampled)
    if args.profile:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(args.steps):
            manager.step()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    times = []
    for _ in range(args.steps):
        start = time.thread_time()
        manager.step()
        times.append(1000 * (time.thread_time() - start))
    least = sorted(times)[len(times) // 10]
    print(f"{args.rows} rows: {statistics.median(times):.2f} ms a step, the least tenth {least:.2f}")


if __name__ == "__main__":
    main()
