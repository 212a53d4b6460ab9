"""Decoding in every weight format beside llama.cpp and CTranslate2: batches of 1 to 32 rows, short and long contexts.

    python benchmarks/engines.py [--shapes T,M] [--rows 1,8,16,32] [--contexts 256,2048] [--engines unspool:int8,...]
                                 [--new 32] [--quick] [--out benchmarks/engines]

Every engine and format is a process of its own on the same random checkpoint (``peers.py`` converts it). A figure is
rows / median time of a step after prompts of that length, which differ from row to row. unspool is measured through
``generate()``, drawing tokens (``top_k=40``, ``temperature=0.8``) and turning each into text; the others decode
greedily and make no text, in their favour. *Mixed* is 32 requests (prompts of 64 to 256, outputs of 32 to 128 tokens)
through ``generate_batch``, prompts included, output tokens a second. The bound is what reading the weights and the
rows' keys and values once a step would allow at the rate at which two threads read memory here. Peers that are not
installed are left out and named. Writes ``<out>.md`` and the picture ``<out>.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoints import NAMES, ROOT, SHAPES, checkpoint

UNSPOOL = ("bf16", "int8", "int4", "nf4")
ENGINES = (
    *(f"unspool:{kind}" for kind in UNSPOOL),
    *(f"llama.cpp:{kind}" for kind in ("BF16", "Q8_0", "Q4_0")),
    *(f"ctranslate2:{kind}" for kind in ("bfloat16", "int8")),
)
# What our figure is held against: (ours, theirs, rows) -> ratio to reach, by shape.
WANTED = {
    ("unspool:bf16", "llama.cpp:BF16", 1): {"T": 1.5, "M": 1.25},
    ("unspool:int8", "llama.cpp:Q8_0", 1): {"T": 1.5, "M": 1.15},
    ("unspool:int4", "llama.cpp:Q4_0", 1): {"T": 2.0, "M": 1.4},
    ("unspool:int8", "llama.cpp:Q8_0", 16): {"T": 4.0, "M": 5.0},
}


def prompts(rows: int, length: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 49000) for _ in range(length)] for _ in range(rows)]


class Unspool:
    """Our own engine, through ``generate()``: tokens are drawn, and turned into text one by one."""

    def __init__(self, shape: str, kind: str, threads: int) -> None:
        import torch

        import unspool

        torch.set_num_threads(threads)
        given = None if kind == "bf16" else kind
        self.model, self.tokenizer = unspool.load(checkpoint(shape), dtype="bfloat16", quantize=given)

    def times(self, some: list[list[int]], new: int) -> tuple[float, list[float], list[int]]:
        """Seconds of the prompts, of each step after them, and the first row's new tokens."""
        import torch

        moments: list[float] = []
        tokenizer, rows = self.tokenizer, len(some)

        class Text:
            def put(self, value: Any) -> None:
                if value.numel() == rows:
                    tokenizer.batch_decode(value.view(-1, 1))
                    moments.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids = torch.tensor(some)
        began = time.perf_counter()
        out = self.model.generate(
            ids, max_new_tokens=new, do_sample=True, top_k=40, temperature=0.8, streamer=Text(), pad_token_id=0
        )
        return moments[0] - began, [b - a for a, b in pairwise(moments)], out[0, len(some[0]) :].tolist()

    def mixed(self, count: int = 32) -> float:
        """Output tokens a second of requests of many lengths, prompts included."""
        draw = random.Random(0)
        some = []
        for _ in range(count):
            ids = [draw.randrange(3, 49000) for _ in range(draw.randint(64, 256))]
            some.append((ids, draw.randint(32, 128)))
        with self.model.init_continuous_batching() as manager:
            began = time.perf_counter()
            for ids, length in some:
                manager.add_request(ids, max_new_tokens=length, do_sample=False)
            made = sum(len(manager.get_result().generated_tokens) for _ in some)
            return made / (time.perf_counter() - began)


def open_engine(name: str, shape: str, threads: int) -> Any:
    engine, _, kind = name.partition(":")
    if engine == "unspool":
        return Unspool(shape, kind, threads)
    from peers import CTranslate2, LlamaCpp

    return (LlamaCpp if engine == "llama.cpp" else CTranslate2)(shape, kind, threads)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One engine on one shape, in this process."""
    from worker import peak_mib

    engine = open_engine(args.one, args.shapes[0], args.threads)
    engine.times(prompts(1, 16), 4)  # warm
    first = [engine.times(prompts(1, 512), 2)[0] for _ in range(args.repeats)]
    got: dict[str, Any] = {"prefill": 512 / statistics.median(first)}
    for context in args.contexts:
        for rows in args.rows:
            if rows * context <= args.most:
                _, steps, _ = engine.times(prompts(rows, context), args.new)
                got[f"{context}x{rows}"] = rows / statistics.median(steps)
    got["peak MiB"] = peak_mib()
    if isinstance(engine, Unspool) and 32 in args.rows and args.most >= 8192:
        got["mixed"] = engine.mixed()
    return got


def bandwidth(threads: int) -> float:
    """Bytes a second that ``threads`` read from memory (best of some sums over 1 GiB)."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(2**28)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


BITS = {"bf16": 16, "int8": 8, "int4": 4.5, "nf4": 4.5, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "bfloat16": 16}


def bound(shape: str, kind: str, rows: int, context: int, rate: float) -> float:
    """Tokens a second if a step only read the weights and each row's keys and values, once."""
    facts = SHAPES[shape]
    hidden, layers, inner = facts["hidden_size"], facts["num_hidden_layers"], facts["intermediate_size"]
    dim = facts.get("head_dim", hidden // facts["num_attention_heads"])
    kept = 2 * facts["num_key_value_heads"] * dim
    layer = hidden * (2 * facts["num_attention_heads"] * dim + kept) + 3 * hidden * inner
    weights = (layers * layer + facts["vocab_size"] * hidden) * BITS.get(kind, 8) / 8
    return rows * rate / (weights + rows * context * layers * kept * 2)


def table(shape: str, got: dict[str, dict[str, Any]], rate: float) -> str:
    """Markdown: a line for each engine; below, the ratios that were set out to be reached."""
    columns = [key for key in next(iter(got.values())) if key[0].isdigit()]
    for figures in got.values():
        columns += [key for key in figures if key[0].isdigit() and key not in columns]
    heads = [f"{rows} at {context}" for context, rows in (key.split("x") for key in columns)]
    lines = [f"## {NAMES[shape]} shape", "", f"| engine | prefill 512 | {' | '.join(heads)} | mixed | peak MiB |"]
    lines.append("|---|" + "---:|" * (len(columns) + 3))
    for name, figures in got.items():
        if "error" in figures:
            lines.append(f"| {name} | {figures['error']} |" + " |" * (len(columns) + 2))
            continue
        cells = [f"{figures['prefill']:.0f}"]
        for key in columns:
            context, rows = map(int, key.split("x"))
            share = figures.get(key, 0) / bound(shape, name.partition(":")[2], rows, context, rate)
            cells.append(f"{figures[key]:.1f} ({100 * share:.0f} %)" if key in figures else "")
        cells += [f"{figures['mixed']:.0f}" if "mixed" in figures else "", f"{figures['peak MiB']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| ours | against | rows | ratio | wanted |", "|---|---|---:|---:|---:|"]
    for (ours, theirs, rows), wanted in WANTED.items():
        key = f"256x{rows}"
        if key in got.get(ours, {}) and key in got.get(theirs, {}):
            ratio = got[ours][key] / got[theirs][key]
            lines.append(f"| {ours} | {theirs} | {rows} | {ratio:.2f} | ≥ {wanted[shape]} |")
    return "\n".join(lines) + "\n"


def picture(found: dict[str, dict[str, dict[str, Any]]], rate: float, path: Path) -> None:
    """Tokens a second over rows at the shortest context, with our formats' bounds as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4.5), squeeze=False)
    colours = {"unspool": "C0", "llama.cpp": "C1", "ctranslate2": "C2"}
    marks = ["o", "s", "^", "d"]
    for axis, (shape, got) in zip(axes[0], found.items(), strict=True):
        seen: dict[str, int] = {}
        for name, figures in got.items():
            engine, _, kind = name.partition(":")
            keys = [key for key in figures if key[0].isdigit()]
            if not keys:
                continue
            context = min(int(key.split("x")[0]) for key in keys)
            rows = [int(key.split("x")[1]) for key in keys if key.startswith(f"{context}x")]
            mark = marks[seen.setdefault(engine, 0) % len(marks)]
            seen[engine] += 1
            axis.plot(rows, [figures[f"{context}x{n}"] for n in rows], mark + "-", color=colours[engine], label=name)
            if engine == "unspool" and kind in ("bf16", "int8", "int4"):
                limits = [bound(shape, kind, n, context, rate) for n in rows]
                axis.plot(rows, limits, "--", color="grey", linewidth=1)
                axis.annotate(f"bound, {kind}", (rows[0], limits[0]), fontsize=7, color="grey")
        axis.set(title=f"{NAMES[shape]} shape", xlabel="rows", ylabel="tokens/s", xscale="log", yscale="log")
        axis.set_xticks(rows, rows)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["T", "M"])
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES))
    parser.add_argument("--rows", type=numbers, default=[1, 8, 16, 32])
    parser.add_argument("--contexts", type=numbers, default=[256, 2048])
    parser.add_argument("--most", type=int, help="leave out batches with more prompt tokens (default T 65536, M 8192)")
    parser.add_argument("--new", type=int, default=32, help="steps of each figure")
    parser.add_argument("--repeats", type=int, default=3, help="of the prefill")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="to see that all works; writes below .cache/")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.contexts, args.new, args.repeats = [1, 8], [64], 8, 1
    args.out = args.out or ROOT / (".cache/engines" if args.quick else "benchmarks/engines")
    return args


def main() -> None:
    """Every engine and format in a process of its own, a table and a picture of all."""
    args = arguments()
    if args.one:
        print(json.dumps(measure(args)))
        return
    rate = bandwidth(args.threads)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    text = f"# Beside other engines\n\n`python benchmarks/engines.py {' '.join(sys.argv[1:])}`".rstrip() + "\n\n"
    text += f"Tokens a second, in brackets the share of the bound (memory read at {rate / 1e9:.1f} GB/s). How: see the "
    text += "head of `benchmarks/engines.py`.\n\n"
    for shape in args.shapes:
        checkpoint(shape)
        for name in args.engines:
            most = args.most or {"T": 65536, "M": 8192}[shape]
            command = [sys.executable, __file__, "--one", name, "--shapes", shape, "--threads", args.threads]
            command += ["--rows", ",".join(map(str, args.rows)), "--contexts", ",".join(map(str, args.contexts))]
            command += ["--new", args.new, "--repeats", args.repeats, "--most", most]
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)
            if done.returncode:
                got: dict[str, Any] = {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
            else:
                got = json.loads(done.stdout.strip().splitlines()[-1])
            found.setdefault(shape, {})[name] = got
            print(shape, name, got, file=sys.stderr, flush=True)
        text += table(shape, found[shape], rate) + "\n"
    print(text)
    args.out.with_suffix(".md").write_text(text)
    picture(found, rate, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
