"""Continuous batching beside transformers: 64 requests of many lengths on the SmolLM2-135M shape, bf16.

    python benchmarks/continuous.py [--requests 64] [--spread 2.0] [--engines unspool,generate-8,...] [--threads N]
                                    [--quick] [--prefix]

Every engine runs in a fresh process on the same requests: prompts of 64 to 256 random tokens, outputs of 32 to 128,
greedy. To unspool they arrive at random within ``--spread`` seconds; transformers has them all at once, which is in its
favour: ``generate-N`` decodes padded batches of N in order, each as long as its longest output, ``generate_batch`` is
its continuous batching. Prints output tokens a second (only what was asked for counts), peak memory, and ratios.
``--prefix`` compares unspool with itself: requests with a shared beginning of 1,000 tokens, with and without sharing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from typing import Any

from checkpoints import ROOT, checkpoint

ENGINES = ("unspool", "generate-8", "generate-32", "generate_batch")
Requests = list[tuple[list[int], int]]


def requests_of(args: argparse.Namespace) -> Requests:
    """Prompts and lengths of outputs, the same in every process."""
    draw = random.Random(0)
    shared = [draw.randrange(49152) for _ in range(1000)] if args.prefix else []
    some = []
    for _ in range(args.requests):
        prompt = [draw.randrange(49152) for _ in range(draw.randint(64, 256) if not args.prefix else 16)]
        some.append((shared + prompt, draw.randint(32, 128) if not args.prefix else 8))
    return some


def run_unspool(requests: Requests, spread: float, sharing: bool) -> dict[str, Any]:
    """Requests from a thread of their own, at random moments."""
    import unspool

    model = unspool.AutoModelForCausalLM.from_pretrained(checkpoint("T"), dtype="bfloat16")
    draw = random.Random(1)
    moments = sorted(draw.random() * spread for _ in requests)
    model.generate_batch([requests[0][0][:8]], max_new_tokens=2, progress_bar=False)
    with model.init_continuous_batching(allow_block_sharing=sharing) as manager:
        start = time.perf_counter()
        for moment, (prompt, length) in zip(moments, requests, strict=True):
            time.sleep(max(0.0, start + moment - time.perf_counter()))
            manager.add_request(prompt, max_new_tokens=length, do_sample=False)
        made = sum(len(manager.get_result().generated_tokens) for _ in requests)
        seconds = time.perf_counter() - start
        metrics = manager.metrics
    return {"tokens": made, "seconds": seconds, "steps": metrics.steps, "fed": metrics.tokens_fed}


def run_generate(requests: Requests, rows: int) -> dict[str, Any]:
    """Padded batches, one after the other."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("T"), dtype=torch.bfloat16)
    start = time.perf_counter()
    for first in range(0, len(requests), rows):
        part = requests[first : first + rows]
        width = max(len(prompt) for prompt, _ in part)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in part])
        longest = max(length for _, length in part)
        model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0)
    return {"tokens": sum(length for _, length in requests), "seconds": time.perf_counter() - start}


def run_their_batching(requests: Requests) -> dict[str, Any]:
    """Requests of one length each cannot be given to its `generate_batch`, but they can to its manager."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("T"), dtype=torch.bfloat16)
    model.generation_config.do_sample = False
    made = 0
    with model.continuous_batching_context_manager() as manager:
        manager.add_request(requests[0][0][:8], max_new_tokens=2)  # its thread first makes room for keys and values
        manager.get_result(timeout=600)
        start = time.perf_counter()
        for prompt, length in requests:
            manager.add_request(prompt, max_new_tokens=length)
        for _ in requests:
            output = manager.get_result(timeout=600)
            if output is None or output.error is not None:
                raise RuntimeError(f"a request came back with {output and output.error!r}")
            made += len(output.generated_tokens)
        seconds = time.perf_counter() - start
    return {"tokens": made, "seconds": seconds}


def work(args: argparse.Namespace) -> None:
    """One engine in this process; a JSON line."""
    import torch

    torch.set_num_threads(args.threads)
    requests = requests_of(args)
    if args.work.startswith("unspool"):
        done = run_unspool(requests, args.spread, args.work == "unspool")
    elif args.work == "generate_batch":  # its thread cannot write to what was made here in inference mode
        done = run_their_batching(requests)
    else:
        with torch.inference_mode():
            done = run_generate(requests, int(args.work.removeprefix("generate-")))
    done["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(done))


def main() -> None:
    """Run the engines one after the other and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--spread", type=float, default=2.0)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="8 requests, to see that all works")
    parser.add_argument("--prefix", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.requests, args.spread = 8, 0.2
    if args.work:
        return work(args)
    engines = ["unspool", "unspool-without-sharing"] if args.prefix else args.engines.split(",")
    first = None
    print(f"{'engine':26}{'tokens/s':>10}{'seconds':>9}{'peak GiB':>10}{'ratio':>8}")
    for engine in engines:
        given = [*(["--prefix"] if args.prefix else []), "--requests", args.requests, "--spread", args.spread]
        command = [sys.executable, __file__, "--work", engine, "--threads", args.threads, *given]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            print(f"{engine:26} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            continue
        result = json.loads(done.stdout.strip().splitlines()[-1])
        if not result["tokens"]:
            print(f"{engine:26} made no tokens")
            continue
        rate = result["tokens"] / result["seconds"]
        first = first or rate
        print(f"{engine:26}{rate:10.1f}{result['seconds']:9.1f}{result['peak_gib']:10.2f}{first / rate:8.2f}")
    return None


if __name__ == "__main__":
    main()
