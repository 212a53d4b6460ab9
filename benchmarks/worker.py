"""One engine, one checkpoint, one dtype, in a process of its own: prints one line of JSON.

Run by ``bench.py``, which gives every measurement a fresh process. Two modes:

* ``start``: time from the moment the parent spawned this process (``--spawned``, the monotonic clock) to the first
  token of a 16-token prompt: interpreter, imports, model, tokenizer and one step.
* ``speed``: after a warm-up, decode and prefill at batch 1, mixed batches, peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from quiet import Disturbed, Others, undisturbed

T = TypeVar("T")


def load_unspool(path: str, dtype: str) -> tuple[Any, Any]:
    import unspool

    return unspool.load(path, dtype=dtype)


def load_transformers(path: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)), AutoTokenizer.from_pretrained(path)


ENGINES = {"unspool": load_unspool, "transformers": load_transformers}


class Clock:
    """A streamer that notes when each step's tokens came; the prompt, which is put first, is told by its length."""

    def __init__(self, rows: int = 1, watch: Others | None = None) -> None:
        self.rows, self.watch = rows, watch
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == self.rows:
            self.times.append(time.perf_counter())
        if self.watch:
            self.watch.check()

    def end(self) -> None:
        pass


class Lengths:
    """A stopping criterion that ends row ``i`` at ``outputs[i]`` new tokens after a prompt of ``width`` columns."""

    def __init__(self, width: int, outputs: torch.Tensor) -> None:
        self.ends = outputs + width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.ends <= input_ids.shape[1]


def peak_mib() -> float:
    """Peak resident memory of this process so far, MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int, **extra: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **extra)
    if out.shape != (ids.shape[0], ids.shape[1] + new):
        raise RuntimeError(f"{new} new tokens for a prompt {tuple(ids.shape)} gave a result {tuple(out.shape)}")
    return out


def start(load: Any, args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load(args.checkpoint, args.dtype)
    tokenizer("once upon a time", return_tensors="pt")
    ids = torch.arange(3, 19)[None]
    generate(model, ids, torch.ones_like(ids), 1)
    return {"start": time.monotonic() - args.spawned}


def median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Bench:
    """The measurements of one loaded model; ``others`` collects the cores other programs used in each."""

    def __init__(self, model: Any, vocab: int, args: argparse.Namespace) -> None:
        self.model, self.vocab, self.args = model, vocab, args
        self.others: list[float] = []

    def undisturbed(self, call: Callable[[Others | None], T]) -> T:
        result, cores = undisturbed(call, self.args.patience)
        self.others.append(cores)
        return result

    def single(self, prompt: int, new: int, repeats: int) -> tuple[list[float], list[float]]:
        """Batch 1: the times to the first token, one per run, and all times between two tokens; seconds."""
        ids = torch.randint(3, self.vocab, (1, prompt), generator=torch.Generator().manual_seed(0))
        firsts: list[float] = []
        steps: list[float] = []

        def call(watch: Others | None) -> list[float]:
            clock = Clock(1, watch)
            began = time.perf_counter()
            generate(self.model, ids, torch.ones_like(ids), new, streamer=clock)
            assert len(clock.times) == new
            return [began, *clock.times]

        for _ in range(repeats):
            began, first, *rest = self.undisturbed(call)
            firsts.append(first - began)
            steps += [b - a for a, b in pairwise([first, *rest])]
        return firsts, steps

    def batch(self, rows: int, ragged: bool = False) -> float:
        """Useful output tokens per second of ``generate()`` on mixed prompts, prefill included; median of the calls.

        Every row makes ``batch_new`` tokens; if ``ragged``, row ``i`` stops at its own length and only those count.
        """
        ids, mask, outputs = mixed(rows, self.vocab)
        new = int(outputs.max()) if ragged else self.args.batch_new
        useful = int(outputs.sum()) if ragged else rows * new
        extra: dict[str, Any] = {"stopping_criteria": [Lengths(ids.shape[1], outputs)]} if ragged else {}

        def call(watch: Others | None) -> float:
            began = time.perf_counter()
            generate(self.model, ids, mask, new, streamer=Clock(rows, watch), **extra)
            return useful / (time.perf_counter() - began)

        return median([self.undisturbed(call) for _ in range(self.args.batch_repeats)])


def mixed(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rows`` left-padded prompts of 64 to 256 tokens, their mask, and an output length of 32 to 128 for each."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 257, (rows,), generator=draw)
    outputs = torch.randint(32, 129, (rows,), generator=draw)
    width = int(lengths.max())
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return torch.randint(3, vocab, (rows, width), generator=draw) * mask, mask, outputs


def speed(load: Any, args: argparse.Namespace) -> dict[str, Any]:
    model, _ = load(args.checkpoint, args.dtype)
    with open(os.path.join(args.checkpoint, "config.json")) as file:
        vocab = json.load(file)["vocab_size"]
    bench = Bench(model, vocab, args)
    got: dict[str, Any] = {"rss loaded": peak_mib()}
    ids = torch.arange(3, 19)[None]
    got["tokens"] = generate(model, ids, torch.ones_like(ids), 16)[0, 16:].tolist()  # also the warm-up
    generate(model, torch.full((1, 512), 3), torch.ones(1, 512, dtype=torch.long), 1)
    with contextlib.suppress(Disturbed):
        _, steps = bench.single(128, args.new, args.repeats)
        got["decode"] = 1 / median(steps)
        got["decode mean"] = len(steps) / sum(steps)
    with contextlib.suppress(Disturbed):
        firsts, _ = bench.single(512, 1, args.repeats + 2)
        got["prefill"] = 512 / median(firsts)
    got["rss batch 1"] = peak_mib()
    for rows in args.rows:
        with contextlib.suppress(Disturbed):
            got[f"mixed {rows}"] = bench.batch(rows)
    if args.ragged:
        with contextlib.suppress(Disturbed):
            got["ragged 32"] = bench.batch(32, ragged=True)
    got["rss whole"] = peak_mib()
    got["others"] = max(bench.others, default=0.0)
    return got


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["start", "speed"])
    parser.add_argument("--engine", choices=list(ENGINES), required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--spawned", type=float, default=0.0, help="the parent's monotonic clock when it spawned this")
    parser.add_argument("--new", type=int, default=128, help="new tokens of the decode run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--batch-new", type=int, default=64)
    parser.add_argument("--batch-repeats", type=int, default=1)
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet moment, per figure")
    parser.add_argument("--ragged", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with contextlib.suppress(PermissionError):
        os.nice(-5)  # where allowed: keeps other jobs of a shared machine out of the figures
    got = (start if args.mode == "start" else speed)(ENGINES[args.engine], args)
    print(json.dumps(got), flush=True)


if __name__ == "__main__":
    main()
