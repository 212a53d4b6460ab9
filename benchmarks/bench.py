"""Side-by-side benchmark of unspool and transformers on the same random checkpoints.

    python benchmarks/bench.py [--shapes T,M] [--dtypes bfloat16,float32] [--engines unspool,transformers]
                               [--quick] [--out benchmarks/results]

Every engine, shape and dtype runs in a fresh process with the same number of threads (see ``worker.py``); rounds
interleave the engines so that a busy minute of the machine falls on both, and the figures are medians over rounds.
Writes ``<out>/<date>.json``, and beside ``<out>`` the table ``RESULTS.md`` and the picture ``results.png``. ``--quick``
is one short round, to see that all works: it prints the table and writes below ``.cache/`` unless ``--out`` is given.
On a machine that others use at the same time, ``--patience 60`` waits that long for a quiet moment for each figure,
drops calls that were disturbed, and leaves out a figure for which no quiet moment came.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
from checkpoints import NAMES, ROOT, checkpoint
from quiet import Disturbed, undisturbed

WORKER = Path(__file__).with_name("worker.py")


def settings(shape: str, dtype: str, quick: bool) -> list[str]:
    """How much the worker does: enough tokens for a steady median, little enough that the large shape ends today."""
    if quick:
        return ["--new", "32", "--repeats", "1", "--batch-new", "16", "--rows", "8", "32"]
    if shape == "T":
        return ["--new", "128", "--repeats", "3", "--rows", "8", "32", "--batch-repeats", "2", "--ragged"]
    rows = ["8", "32"] if dtype == "bfloat16" else ["8"]
    return ["--new", "32", "--repeats", "3", "--rows", *rows]


def spawn(part: dict[str, Any], threads: int, extra: list[str]) -> dict[str, Any]:
    """One worker process; its JSON line, or ``{"error": last line of stderr}``."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(WORKER), part["mode"], "--engine", part["engine"], "--dtype", part["dtype"]]
    command += ["--checkpoint", str(checkpoint(part["shape"])), "--threads", str(threads), *extra]
    command += ["--spawned", repr(time.monotonic())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1].replace(str(ROOT), ".")}
    line: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return line


def parts(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The processes to run, in order: speed first, since it also brings the files into the page cache."""
    for turn in range(args.rounds):
        for shape, dtype in itertools.product(args.shapes, args.dtypes):
            for engine in args.engines if turn % 2 == 0 else args.engines[::-1]:
                for mode in ("speed", "start") if args.quick else ("speed", "start", "start"):
                    yield {"round": turn, "shape": shape, "dtype": dtype, "engine": engine, "mode": mode}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per process: what was run, and its figures or its error."""
    records: list[dict[str, Any]] = []
    for part in parts(args):
        if part["mode"] == "speed":
            extra = [*settings(part["shape"], part["dtype"], args.quick), "--patience", str(args.patience)]
            got = spawn(part, args.threads, extra)
        else:
            try:
                got, others = undisturbed(lambda _, part=part: spawn(part, args.threads, []), args.patience)
                got["others"] = others
            except Disturbed:
                got = {}
        records.append(part | got)
        print(f"[{part['round'] + 1}/{args.rounds}]", *list(part.values())[1:], shown(got), file=sys.stderr, flush=True)
    return records


def shown(got: dict[str, Any]) -> str:
    numbers = (f"{key} {value:.4g}" for key, value in got.items() if isinstance(value, float))
    return got.get("error") or ", ".join(numbers)


def medians(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{"T bfloat16": {"unspool": {"decode": 41.2, ...}, ...}, ...}``; "tokens" are the first round's."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    collected: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        case, engine = f"{record['shape']} {record['dtype']}", record["engine"]
        row = table.setdefault(case, {}).setdefault(engine, {})
        for key, value in record.items():
            if isinstance(value, float):
                collected.setdefault((case, engine, key), []).append(value)
            elif key == "error":
                row[key] = value
            elif key == "tokens":
                row.setdefault(key, value)
    for (case, engine, key), values in collected.items():
        table[case][engine][key] = statistics.median(values)
    return table


def listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=listed, default=["T", "M"], help="T: SmolLM2-135M, M: Llama-3.2-1B")
    parser.add_argument("--dtypes", type=listed, default=["bfloat16", "float32"])
    parser.add_argument("--engines", type=listed, default=["unspool", "transformers"])
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet moment, per figure")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (default benchmarks/results)")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.out = args.out or (ROOT / ".cache/quick/results" if args.quick else ROOT / "benchmarks/results")
    choices = {"shapes": list(NAMES), "engines": ["unspool", "transformers"], "dtypes": ["bfloat16", "float32"]}
    for name, known in choices.items():
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: unknown {sorted(unknown)}; there are {known}")
    return args


def main() -> None:
    args = arguments()
    for shape in args.shapes:
        checkpoint(shape)
    began = time.time()
    records = measure(args)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/bench.py " + " ".join(sys.argv[1:]),
        "minutes": round((time.time() - began) / 60, 1),
        "machine": report.machine(args.threads),
        "quick": args.quick,
        "rounds": args.rounds,
        "medians": medians(records),
        "records": records,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report.markdown(result)
    (args.out.parent / "RESULTS.md").write_text(text)
    report.picture(result, args.out.parent / "results.png")
    print(text)
    if any("error" in record for record in records):
        sys.exit("some measurements failed; see the lines above")


if __name__ == "__main__":
    main()
