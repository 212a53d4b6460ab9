"""Turns the medians of a benchmark run into a table (markdown) and a picture.

    python benchmarks/report.py benchmarks/results/<date>.json

writes ``RESULTS.md`` and ``results.png`` beside the folder of that file again, without measuring.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import NAMES


class Metric(NamedTuple):
    key: str
    title: str
    digits: int
    more_is_better: bool
    targets: dict[str, float]  # shape -> ratio unspool / transformers to reach in bfloat16


METRICS = (
    Metric("decode", "decode, tokens/s", 1, True, {"T": 1.6, "M": 1.3}),
    Metric("prefill", "prefill of 512, tokens/s", 0, True, {"T": 1.1, "M": 1.1}),
    Metric("mixed 8", "8 mixed prompts, tokens/s", 1, True, {}),
    Metric("mixed 32", "32 mixed prompts, tokens/s", 1, True, {"T": 2.0, "M": 2.0}),
    Metric("ragged 32", "32 mixed prompts and outputs, useful tokens/s", 1, True, {}),
    Metric("start", "process start to first token, s", 2, False, {"T": 0.5, "M": 0.5}),
    Metric("rss batch 1", "peak memory, batch 1, MiB", 0, False, {"T": 1.0, "M": 1.0}),
    Metric("rss whole", "peak memory, whole run, MiB", 0, False, {"T": 1.0, "M": 1.0}),
)
FLAGS = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "i8mm"]
PACKAGES = ("torch", "transformers", "unspool")
HEADER = "| | unspool | transformers | ratio | target |\n|---|---:|---:|---:|---:|"
METHOD = """\
How: one process per engine, checkpoint and dtype, the engines in turn, medians over rounds; random weights (seed 0),
saved by transformers and read from disk by both; greedy, no end-of-sequence token.
*Decode*: batch 1, prompt of 128, 128 new tokens (32 for {M}), median time between two tokens.
*Prefill*: time to the first token of a 512-token prompt.
*Mixed prompts*: one `generate()` call on left-padded prompts of 64 to 256 tokens, 64 new tokens each, prefill included.
*Mixed outputs*: the same with rows that stop at 32 to 128 new tokens by a stopping criterion; only those tokens count.
*Not run*: mixed outputs for {M}, and its 32 prompts in float32 (too long).
*Start*: spawn of the process to the first token of a 16-token prompt, files in the page cache.
*Peak memory*: VmHWM after the batch 1 parts and at the end.
With `--patience`, calls during which other programs used more than a quarter of a core were dropped and repeated.
A ratio is unspool / transformers; targets are for bfloat16.
"""


def machine(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that names the machine."""
    cpu: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            cpu[key.strip()] = value.strip()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    memory = Path("/proc/meminfo")
    total = int(memory.read_text().split()[1]) / 2**20 if memory.exists() else 0.0
    cores = sum(line.startswith("processor") for line in info.read_text().splitlines()) if info.exists() else 0
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": cores,
        "threads used": threads,
        "memory GiB": round(total, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def ratio(row: dict[str, dict[str, Any]], key: str) -> float | None:
    """unspool / transformers, or None where one has no figure."""
    ours, theirs = (row.get(engine, {}).get(key) for engine in ("unspool", "transformers"))
    return ours / theirs if ours and theirs else None


def markdown(result: dict[str, Any]) -> str:
    facts = result["machine"]
    run = f"{result['date']}, `{result['command'].strip()}`, {result['minutes']} minutes, {result['rounds']} round(s)."
    lines = ["# Benchmark results", "", run]
    if result["quick"]:
        lines.append(
            "**A quick run, to check that it works, not to quote: 32 tokens of decode, 16 in batches, one call each.**"
        )
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", *PACKAGES))
    lines.append(
        f"Machine: {facts['cores']} cores of {facts['cpu']} ({', '.join(facts['flags'])}), "
        f"{facts['memory GiB']} GiB, {facts['threads used']} threads; {versions}."
    )
    others = [record["others"] for record in result["records"] if "others" in record]
    if others:
        lines.append(
            f"Other programs used {max(others):.1f} cores at most, {sum(others) / len(others):.1f} on average."
        )
    lines += ["", METHOD.format(**NAMES)]
    for case, row in result["medians"].items():
        shape, dtype = case.split()
        lines += [f"## {NAMES[shape]} shape, {dtype}", "", HEADER]
        for metric in METRICS:
            cells = [row.get(engine, {}).get(metric.key) for engine in ("unspool", "transformers")]
            if not any(cells):
                continue
            shown = [f"{cell:.{metric.digits}f}" if cell else "-" for cell in cells]
            lines.append(f"| {metric.title} | {shown[0]} | {shown[1]} | {_verdict(metric, row, shape, dtype)} |")
        lines.append("")
        tokens = [row.get(engine, {}).get("tokens") for engine in ("unspool", "transformers")]
        if all(tokens):
            lines += [f"First 16 greedy tokens: {'the same' if tokens[0] == tokens[1] else 'different'}.", ""]
        lines += [f"{engine} failed: {got['error']}\n" for engine, got in row.items() if "error" in got]
    return "\n".join(lines)


def _verdict(metric: Metric, row: dict[str, dict[str, Any]], shape: str, dtype: str) -> str:
    """The cells "ratio | target"."""
    value = ratio(row, metric.key)
    target = metric.targets.get(shape) if dtype == "bfloat16" else None
    sign = "≥" if metric.more_is_better else "≤"
    wanted = f"{sign} {target:.1f}" if target else ""
    if value is None:
        return f"- | {wanted}"
    if target is None:
        return f"{value:.2f} | "
    met = value >= target if metric.more_is_better else value <= target
    return f"**{value:.2f}** | {wanted} {'met' if met else 'missed'}"


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars of how many times better unspool is (time and memory turned round), targets as ticks; no ratio, no file."""
    cases = [case for case, row in result["medians"].items() if any(ratio(row, metric.key) for metric in METRICS)]
    if not cases:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.32 * len(METRICS) * max(2, len(cases))))
    height = 0.8 / len(cases)
    for i, case in enumerate(cases):
        shape, dtype = case.split()
        colour = f"C{i}"
        label: str | None = f"{NAMES[shape]} {dtype}"
        for j, metric in enumerate(METRICS):
            value = ratio(result["medians"][case], metric.key)
            if value is None:
                continue
            better = value if metric.more_is_better else 1 / value
            y = j + (i - (len(cases) - 1) / 2) * height
            axes.barh(y, better, height * 0.9, color=colour, label=label)
            axes.text(better + 0.02, y, f"{better:.2f}", va="center", fontsize=8)
            label = None
            if dtype == "bfloat16" and shape in metric.targets:
                target = metric.targets[shape] if metric.more_is_better else 1 / metric.targets[shape]
                axes.plot([target] * 2, [y - height / 2, y + height / 2], color="black", linewidth=2)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(METRICS)), [metric.title.rsplit(",", 1)[0] for metric in METRICS])
    axes.invert_yaxis()
    axes.set_xlabel("times better than transformers (black: target)")
    axes.set_title("unspool against transformers, same checkpoints, same machine")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    stored = json.loads(source.read_text())
    (source.parent.parent / "RESULTS.md").write_text(markdown(stored))
    picture(stored, source.parent.parent / "results.png")
