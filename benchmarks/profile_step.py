"""Where a decode step of unspool spends its time.

    python benchmarks/profile_step.py [--shape T] [--dtype bfloat16] [--rows 1] [--prompt 128] [--new 32] [--python]

Prints the time per step, then the operations with the largest own time (torch.profiler over one ``generate()`` call;
the profiler itself adds about a microsecond per operation). ``--python`` prints Python functions instead (cProfile).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats

import torch
from checkpoints import SHAPES, checkpoint
from worker import Clock, generate, load_transformers, load_unspool, median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="T")
    parser.add_argument("--engine", choices=["unspool", "transformers"], default="unspool")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--python", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = load_unspool if args.engine == "unspool" else load_transformers
    model, _ = load(str(checkpoint(args.shape)), args.dtype)
    ids = torch.randint(3, 1000, (args.rows, args.prompt), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    generate(model, ids, mask, 4)

    clock = Clock(args.rows)
    generate(model, ids, mask, args.new, streamer=clock)
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    print(f"{args.shape} {args.dtype}, {args.rows} row(s): {median(steps) * 1000:.2f} ms per step without the profiler")

    if args.python:
        with cProfile.Profile() as profile:
            generate(model, ids, mask, args.new)
        pstats.Stats(profile).sort_stats("tottime").print_stats(args.top)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        generate(model, ids, mask, args.new)
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    calls = sum(event.count for event in events)
    print(
        f"{calls / args.new:.0f} operations and {total / args.new / 1000:.2f} ms in them per step (prefill shared out)"
    )
    print(f"{'operation':<40} {'calls/step':>10} {'us/call':>9} {'us/step':>9} {'share':>6}")
    for event in events[: args.top]:
        own = event.self_cpu_time_total
        rates = f"{event.count / args.new:>10.1f} {own / event.count:>9.1f} {own / args.new:>9.0f} {own / total:>6.1%}"
        print(f"{event.key:<40} {rates}")


if __name__ == "__main__":
    main()
