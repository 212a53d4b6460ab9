"""`unspool bench`: many requests at a model at once, and how fast they were answered.

The load is random prompts of random lengths, the same ones in every run, or a file as `generate --input` reads it.
Requests of random prompts ignore end tokens, so that the amount of work is known beforehand.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unspool.cli.lines import Line, read_line, read_lines
from unspool.cli.options import ModelOptions
from unspool.cli.run import UsageError, check_watch, describe
from unspool.cli.text import load_model

if TYPE_CHECKING:
    from unspool.continuous import ContinuousBatchingManager, GenerationOutput, Metrics
    from unspool.hub import CausalLM
    from unspool.tokenization import Tokenizer

__all__ = ["Load", "Span", "run", "span"]

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Span(NamedTuple):
    """From `low` to `high` tokens, both included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the model.

    Attributes:
        requests: how many; with `source`, at most so many, and `None` means all lines.
        prompt, output: lengths in tokens, drawn evenly.
        shared: tokens at the beginning that all prompts have in common.
        rate: requests a second, at random moments; `None` means all at once.
        at_once: most requests that run at a time; `None` leaves it to the manager.
        source: a file of prompts in place of random ones.
        assistant: a smaller model that drafts, by name or folder.
    """

    requests: int | None
    prompt: Span
    output: Span
    shared: int
    rate: float | None
    at_once: int | None
    source: Path | None
    assistant: str | None


def span(flag: str, text: str) -> Span:
    """`64:256`, or one number for both.

    Raises:
        UsageError: it is neither.
    """
    low, colon, high = text.partition(":")
    try:
        found = Span(int(low), int(high if colon else low))
    except ValueError:
        raise UsageError(f"{flag} {text!r}: write one number of tokens or two, as 64:256") from None
    if not 1 <= found.low <= found.high:
        raise UsageError(f"{flag} {text!r}: the first number must be at least 1 and at most the second")
    return found


def run(load: Load, options: ModelOptions, settings: dict[str, Any], chat: bool, as_json: bool, watch: bool) -> None:
    """Load the model, put the load on it, and print what came of it."""
    check_watch(watch)
    if load.source is not None and not load.source.is_file():
        raise UsageError(f"--input {load.source}: there is no such file")
    model, tokenizer = load_model(options)
    lines = list(
        _random_lines(load, model, settings)
        if load.source is None
        else _own_lines(load, model, tokenizer, settings, chat)
    )
    assistant = None if load.assistant is None else load_model(ModelOptions(load.assistant, device=options.device))[0]
    from unspool.config import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(max_requests_per_batch=load.at_once)
    manager = model.init_continuous_batching(tokenizer=tokenizer, continuous_batching_config=config)
    extra = {} if assistant is None else {"assistant_model": assistant}
    manager.start()
    try:
        with manager.watch(clear=True) if watch else nullcontext():
            result = _drive(manager, lines, load.rate, extra)
    finally:
        manager.stop(hard_stop=True)
    report = _report(options.model, model, result, manager.metrics)
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print(report)


def _random_lines(load: Load, model: CausalLM, settings: dict[str, Any]) -> Iterator[Line]:
    """Prompts of random tokens."""
    chance, vocabulary, most = random.Random(0), model.spec.vocab_size, model.spec.max_positions
    if load.shared >= load.prompt.low:
        raise UsageError(f"--shared-prefix {load.shared} must be less than the shortest prompt, {load.prompt.low}")
    if load.prompt.high + load.output.high > most:
        raise UsageError(
            f"prompts of {load.prompt.high} and outputs of {load.output.high} tokens are more than the model's {most} "
            "positions; lower --prompt-tokens or --output-tokens"
        )
    shared = [chance.randrange(vocabulary) for _ in range(load.shared)]
    for number in range(1, (load.requests or 64) + 1):
        count, new = chance.randint(*load.prompt), chance.randint(*load.output)
        prompt = shared + [chance.randrange(vocabulary) for _ in range(count - len(shared))]
        yield Line(number, None, prompt, {**settings, "max_new_tokens": new, "eos_token_id": []})


def _own_lines(
    load: Load, model: CausalLM, tokenizer: Tokenizer, settings: dict[str, Any], chat: bool
) -> Iterator[Line]:
    """The prompts of a file."""
    assert load.source is not None
    for number, text in read_lines(load.source):
        if load.requests is not None and number > load.requests:
            return
        yield read_line(number, text, model, tokenizer, settings, chat)


class Result(NamedTuple):
    """What came back: the outputs, why some requests were refused, and from the first request to the last token."""

    outputs: list[GenerationOutput]
    refused: list[Exception]
    seconds: float


def _drive(manager: ContinuousBatchingManager, lines: list[Line], rate: float | None, extra: dict[str, Any]) -> Result:
    """Send the requests when their time comes, and wait for all answers."""
    chance, refused = random.Random(1), []
    begin = end = due = time.perf_counter()
    for line in lines:
        if (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        try:
            if line.error is not None:
                raise line.error
            manager.add_request(line.prompt, record_timestamps=True, **line.settings, **extra)
        except Exception as error:
            refused.append(error)
        due += chance.expovariate(rate) if rate else 0.0
    outputs = list(manager)
    end = max([one.lifespan[1] for one in outputs], default=end)
    return Result(outputs, refused, end - begin)


def _report(name: str, model: CausalLM, result: Result, metrics: Metrics) -> dict[str, Any]:
    """Everything that is told, in seconds and shares."""
    outputs, seconds = result.outputs, max(result.seconds, 1e-9)
    failed = [one for one in outputs if one.error is not None]
    first = [one.timings.first_token for one in outputs if one.timings.first_token is not None]
    marks = [one.timestamps or [] for one in outputs]
    errors = [describe(error) for error in result.refused] + [str(one.error) for one in failed]
    return {
        "model": name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "requests": len(outputs) + len(result.refused),
        "failed": len(errors),
        "first_error": errors[0] if errors else None,
        "seconds": seconds,
        "prompt_tokens": sum(one.usage.prompt_tokens for one in outputs if "__child#" not in one.request_id),
        "output_tokens": metrics.tokens_made,
        "computed_tokens": metrics.tokens_fed,
        "steps": metrics.steps,
        "output_tokens_per_second": metrics.tokens_made / seconds,
        "computed_tokens_per_second": metrics.tokens_fed / seconds,
        "time_to_first_token": _spread(first),
        "time_per_token": _spread([(times[-1] - times[0]) / (len(times) - 1) for times in marks if len(times) > 1]),
        "time_between_tokens": _spread([after - before for times in marks for before, after in pairwise(times)]),
        "time_per_request": _spread([one.timings.total for one in outputs if one.timings.total is not None]),
        "cache_peak": metrics.cache_peak,
        "prefix_hits": metrics.prefix_hits,
        "cached_tokens": metrics.cached_tokens,
        "preemptions": metrics.preemptions,
        "acceptance": metrics.acceptance,
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    """Mean and percentiles, or `None` of nothing."""
    if not values:
        return None
    import numpy as np

    found = np.quantile(values, list(_QUANTILES.values()))
    return {"mean": sum(values) / len(values), **dict(zip(_QUANTILES, found.tolist(), strict=True))}


def _print(report: dict[str, Any]) -> None:
    """The report as tables on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{report['model']}[/bold], {report['dtype']} on {report['device']}", soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    for name, text in _facts(report):
        facts.add_row(name, text)
    times = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    times.add_column("")
    for column in ("mean", *_QUANTILES):
        times.add_column(column, justify="right", no_wrap=True)
    for key in ("time_to_first_token", "time_per_token", "time_between_tokens", "time_per_request"):
        spread = report[key]
        shown = [] if spread is None else [_time(spread[column]) for column in ("mean", *_QUANTILES)]
        times.add_row(key.replace("_", " "), *shown)
    console.print(facts)
    console.print()
    console.print(times)
    if report["first_error"]:
        console.print(f"\nfirst error: {report['first_error']}", style="red", markup=False, soft_wrap=True)


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    done = report["requests"] - report["failed"]
    yield "outputs", f"{done:,} done, {report['failed']:,} failed, in {report['seconds']:.2f} s"
    yield "output tokens/s", f"{report['output_tokens_per_second']:,.1f} ({report['output_tokens']:,} tokens)"
    computed, steps = report["computed_tokens"], report["steps"]
    yield "computed tokens/s", f"{report['computed_tokens_per_second']:,.1f} ({computed:,} tokens in {steps:,} steps)"
    yield "cache", f"at most {report['cache_peak']:.1%} in use"
    share, found = report["prefix_hits"], report["cached_tokens"]
    yield "prefix hits", "none" if not found else f"{share:.1%} ({found:,} tokens)"
    yield "preemptions", f"{report['preemptions']:,}"
    if report["acceptance"] is not None:
        yield "acceptance", f"{report['acceptance']:.1%} of drafted tokens"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
