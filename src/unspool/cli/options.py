"""The options that `generate` and `chat` share, as data, and what they mean for `GenerationConfig`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from unspool.cli.run import UsageError, describe

__all__ = ["ModelOptions", "generation_settings", "refuse", "split", "structure", "with_shared_options"]


class Shared(NamedTuple):
    """One option: `name` is the field it sets, `flags` replaces the flag made from the name."""

    name: str
    kind: Any
    metavar: str | None
    help: str
    panel: str
    flags: tuple[str, ...] = ()


LENGTH, SAMPLING, OTHER, MODEL = "Length", "Sampling", "Repetition and the rest", "Model"

# What a value may be is GenerationConfig's knowledge; it says so before a model is loaded.
OPTIONS: tuple[Shared, ...] = (
    Shared("max_new_tokens", int, "N", "Most tokens to write.", LENGTH),
    Shared("min_new_tokens", int, "N", "Fewest tokens to write.", LENGTH),
    Shared("max_time", float, "SECONDS", "Stop after this time.", LENGTH),
    Shared("stop_strings", list[str], "TEXT", "Stop after this text; may be given again.", LENGTH, ("--stop",)),
    Shared("do_sample", bool, None, "Draw tokens, or always take the likeliest.", SAMPLING, ("--sample/--greedy",)),
    Shared("temperature", float, "X", "Below 1 plainer, above 1 wilder; 0 is --greedy.", SAMPLING),
    Shared("top_k", int, "N", "Only the N likeliest tokens; 0 is all.", SAMPLING),
    Shared("top_p", float, "P", "Only the likeliest that sum to P.", SAMPLING),
    Shared("min_p", float, "P", "Only those P times as likely as the likeliest.", SAMPLING),
    Shared("top_h", float, "X", "Only as many as keep this share of the entropy.", SAMPLING),
    Shared("typical_p", float, "P", "Only the most typical that sum to P.", SAMPLING),
    Shared("epsilon_cutoff", float, "P", "Only those at least this likely.", SAMPLING),
    Shared("eta_cutoff", float, "P", "The same, lower where the model is unsure.", SAMPLING),
    Shared("seed", int, "N", "The same seed gives the same text.", SAMPLING),
    Shared("num_return_sequences", int, "N", "Write N texts.", SAMPLING, ("--num-return-sequences", "-n")),
    Shared("repetition_penalty", float, "X", "Above 1 avoids tokens seen before.", OTHER),
    Shared("no_repeat_ngram_size", int, "N", "Never the same N tokens in a row twice.", OTHER),
    Shared("set", list[str], "NAME=JSON", "Any other field of GenerationConfig.", OTHER, ("--set",)),
    Shared("adapter", str, "PATH_OR_ID", "A LoRA, rsLoRA or DoRA on the model, as PEFT saves it.", MODEL),
    Shared("dtype", str, "NAME", "float32, bfloat16, float16; else the checkpoint's.", MODEL),
    Shared("quantize", str, "NAME", "Keep the weights in fewer bits: int8, int4, nf4, fp4.", MODEL),
    Shared("device", str, "NAME", "cpu, cuda, cuda:1 …; else cuda if there is one.", MODEL),
    Shared("threads", int, "N", "CPU threads; else as many as torch likes.", MODEL),
    Shared("revision", str, "NAME", "Branch, tag or commit on the Hub.", MODEL),
    Shared("offline", bool, None, "Use only what was downloaded before.", MODEL, ("--offline",)),
)

# Asking for one of these is asking for sampling.
IMPLY_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "seed",
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how to run it."""

    model: str = "storyteller"
    adapter: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    threads: int | None = None
    revision: str | None = None
    offline: bool = False


def with_shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the shared options, in place of its `**options`."""
    annotated: Any = Annotated  # a type made of values, which type checkers cannot follow
    own = inspect.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for option in OPTIONS:
        flags = option.flags or (f"--{option.name.replace('_', '-')}",)
        info = typer.Option(
            *flags,
            help=option.help,
            rich_help_panel=option.panel,
            metavar=option.metavar or "",  # a switch has no value to name
            show_default=False,
        )
        kind = annotated[option.kind | None, info]
        parameters.append(inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def split(model: str, options: dict[str, Any]) -> tuple[ModelOptions, dict[str, Any]]:
    """What concerns the model, and the generation settings that were given."""
    about_model = {field.name for field in fields(ModelOptions)}
    given = {name: value for name, value in options.items() if value is not None}
    chosen = ModelOptions(model, **{name: value for name, value in given.items() if name in about_model})
    return chosen, generation_settings({name: value for name, value in given.items() if name not in about_model})


def generation_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of `GenerationConfig` that the given options set.

    Raises:
        UsageError: `--greedy` beside an option of sampling, or a `--set` that is not `NAME=JSON`.
    """
    settings = {name: value for name, value in given.items() if name != "set" and value != []}
    for pair in given.get("set", []):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {pair!r}: write --set NAME=JSON, e.g. --set renormalize_logits=true")
        settings[name.strip()] = _json_or_text(value)
    if settings.get("temperature") == 0:
        del settings["temperature"]
        settings.setdefault("do_sample", False)
    sampling = [name for name in IMPLY_SAMPLING if name in settings]
    if settings.get("do_sample") is False and (named := [name for name in sampling if name != "seed"]):
        flag = f"--{named[0].replace('_', '-')}"
        raise UsageError(f"greedy decoding and {flag} contradict each other; leave one out")
    if sampling or settings.get("num_return_sequences", 1) > settings.get("num_beams", 1):
        settings.setdefault("do_sample", True)
    _check(settings)
    return settings


def refuse(options: dict[str, Any], why: str) -> None:
    """Raise `UsageError` with `why` for the first of these options, by flag, that was given."""
    for flag, value in options.items():
        if value is not None and value is not False:
            raise UsageError(f"{flag} {why}")


def structure(json_schema: str | None, regex: str | None, grammar: str | None) -> dict[str, str | None]:
    """What the text must be, read from files where the options name files.

    Raises:
        UsageError: a file cannot be read.
    """
    inline = json_schema is not None and json_schema.lstrip().startswith("{")
    return {
        "json_schema": json_schema if inline else _content("--json-schema", json_schema),
        "regex": regex,
        "grammar": _content("--grammar", grammar),
    }


def _content(flag: str, path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag}: {describe(error)}") from error


def _check(settings: dict[str, Any]) -> None:
    """Find a wrong value now, before a model is loaded."""
    from unspool.config import GenerationConfig

    unknown = [name for name in settings if not hasattr(GenerationConfig, name)]
    if unknown:
        raise UsageError(f"--set {unknown[0]}: GenerationConfig has no such field")
    try:
        GenerationConfig(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
