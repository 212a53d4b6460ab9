"""`unspool info`: what a model is and needs, from `config.json` and the headers of its weights.

The weights themselves are read only to find out how a module of transformers runs here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unspool.models.base import Model
    from unspool.weights.safetensors import Entry

__all__ = ["run"]

# Bytes of one parameter.
DTYPES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


@dataclass(frozen=True, slots=True)
class Stored:
    """The weights on disk: number of files, tensors' bytes, their element count and dtypes; no files means not here."""

    files: int = 0
    bytes: int = 0
    elements: int = 0
    dtypes: tuple[str, ...] = ()


def run(
    name: str, revision: str | None, offline: bool, everything: bool, as_json: bool, probe: bool | None = None
) -> None:
    """Print the facts about a model; `probe`: as transformers runs it, too (`None`: where it is not native)."""
    from unspool.repositories import HubArguments, locate

    folder = locate(name, hub=HubArguments(revision=revision, local_files_only=offline))
    from unspool.weights import read_config  # with torch, once the folder is known to be there

    config = read_config(folder)
    model, refusal = _native(config)
    facts = _facts(name, folder, config, model, refusal)
    if model is None if probe is None else probe:
        facts |= _wrapped(folder, facts["weights_bytes"])
    generation = _generation(folder, config)
    if as_json:
        print(json.dumps({**facts, "generation": generation.to_diff_dict()}, ensure_ascii=False, indent=2, default=str))
        return
    _print(facts)
    _print_settings(generation, everything)


def _native(config: Mapping[str, Any]) -> tuple[Model | None, str | None]:
    """The model without its weights, or why there is none."""
    from unspool.errors import CheckpointError, Unsupported
    from unspool.models.registry import empty
    from unspool.weights import quant

    try:
        quant.method(config)
        return empty(config), None
    except (CheckpointError, Unsupported) as error:
        return None, str(error)


def _wrapped(folder: Path, weights: int | None) -> dict[str, Any]:
    """In which way the checkpoint's module of transformers runs here, and why; loads it."""
    import torch

    from unspool.continuous.sizes import free_memory
    from unspool.errors import Unsupported
    from unspool.interop.auto import report_on_checkpoint

    if not weights:
        return {"wrapped": None, "wrapped_reason": "its weights are not here"}
    free = free_memory(torch.device("cpu"))
    if weights > free:
        return {"wrapped": None, "wrapped_reason": f"its weights need {_size(weights)} and {_size(free)} are free"}
    try:
        report = report_on_checkpoint(folder)
    except Unsupported as error:
        return {"wrapped": None, "wrapped_reason": str(error)}
    return {"wrapped": report.tier, "wrapped_reason": report.reason}


def _facts(
    name: str, folder: Path, config: Mapping[str, Any], model: Model | None, refusal: str | None
) -> dict[str, Any]:
    """Everything that is shown, by name."""
    stored = _stored(folder)
    facts: dict[str, Any] = {
        "model": name,
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "architecture": next(iter(config.get("architectures") or []), None),
        "supported": refusal is None,
        "refusal": refusal,
    }
    parameters = stored.elements
    if model is not None:
        parameters = sum({id(weight): weight.numel() for weight in model.parameters()}.values())
        if model.tied:
            parameters -= model.lm_head.weight.numel()
        spec = model.spec
        element = model.dtype.itemsize
        facts |= {
            "layers": spec.layers,
            "hidden_size": spec.hidden_size,
            "heads": spec.heads,
            "kv_heads": max(group.kv_heads for group in spec.groups),
            "vocab_size": spec.vocab_size,
            "max_positions": spec.max_positions,
            "windows": {group.window: len(group.layers) for group in spec.groups if group.window is not None},
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_bytes_per_token": sum(group.bytes_per_token(element) for group in spec.groups),
        }
    from unspool.kernels import native

    facts |= {
        "parameters": parameters or None,
        "weights_files": stored.files,
        "weights_bytes": stored.bytes or None,
        "weights_dtypes": list(stored.dtypes),
        "memory_bytes": {dtype: int(parameters * size) for dtype, size in DTYPES.items()} | _quantised(model),
        "kernels": native.describe(),
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "chat_template": _has_chat_template(folder),
    }
    return facts


def _quantised(model: Model | None) -> dict[str, int]:
    """Bytes of the weights in each format that `--quantize` takes."""
    if model is None:
        return {}
    from unspool.weights.quant import FORMATS, quantiser
    from unspool.weights.quantity import size

    return {name: size(model, quantiser(name)) for name in FORMATS}


def _stored(folder: Path) -> Stored:
    """What the headers of the safetensors files say."""
    from unspool.weights.safetensors import SafetensorsFile

    paths = sorted(folder.glob("model*.safetensors"))
    entries: list[Entry] = []
    for path in paths:
        with SafetensorsFile(path) as file:
            entries += file.entries.values()
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})
    size = sum(entry.bytes for entry in entries)
    return Stored(len(paths), size, sum(entry.bytes // entry.dtype.itemsize for entry in entries), tuple(dtypes))


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _generation(folder: Path, config: Mapping[str, Any]) -> Any:
    from unspool.config import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _print_settings(generation: Any, everything: bool) -> None:
    """What the model's own file sets, or every setting with its source."""
    from unspool.config import resolve

    resolved = resolve({}, None, generation)
    print()
    if everything:
        print(resolved.config.explanation())
        return
    own = {name: getattr(resolved.config, name) for name, source in resolved.sources.items() if source == "model"}
    print("generation settings of the model" if own else "the model has no generation settings of its own")
    width = max([20, *(len(name) + 2 for name in own)])
    for name, value in own.items():
        print(f"  {name:<{width}}{value!r}")


def _print(facts: Mapping[str, Any]) -> None:
    """The facts as a table of names and values."""
    kind = f"{facts['model_type']} ({facts['architecture']})" if facts["architecture"] else str(facts["model_type"])
    rows = [("model", facts["model"]), ("folder", facts["folder"]), ("architecture", kind)]
    if facts["supported"]:
        rows += _shape(facts)
    if facts["parameters"]:
        rows.append(("parameters", f"{facts['parameters']:,}"))
    if facts["weights_files"]:
        files = f"{facts['weights_files']} file{'s' * (facts['weights_files'] > 1)}"
        rows.append(("on disk", f"{_size(facts['weights_bytes'])} {', '.join(facts['weights_dtypes'])}, {files}"))
    else:
        rows.append(("on disk", "weights are not downloaded"))
    if facts["parameters"]:
        memory = facts["memory_bytes"]
        rows.append(("in memory", ", ".join(f"{dtype} {_size(memory[dtype])}" for dtype in DTYPES)))
        quantised = [f"{name} {_size(memory[name])}" for name in ("int8", "int4", "nf4") if name in memory]
        if quantised:
            rows.append(("", ", ".join(quantised) + " (--quantize)"))
    if facts["supported"]:
        per_token, positions = facts["kv_bytes_per_token"], facts["max_positions"]
        whole = f"{_size(per_token * positions)} for {positions:,} tokens"
        rows.append(("keys and values", f"{_size(per_token)} a token in {facts['dtype']}, {whole}"))
    rows.append(("tokenizer", "yes" if facts["tokenizer"] else "none (no tokenizer.json)"))
    rows.append(("chat", "yes" if facts["chat_template"] else "no chat template"))
    rows.append(("kernels", facts["kernels"]))
    tier, reason = facts.get("wrapped"), facts.get("wrapped_reason")
    if facts["supported"]:
        rows.append(("runs here", "yes: generate, streaming, batches"))
    elif tier is not None:
        rows.append(
            ("runs here", "wrapped alone: unspool.wrap(model) around transformers' module, or unspool.enable()")
        )
    else:
        rows.append(("runs here", f"no: {facts['refusal']}"))
    if "wrapped" in facts:
        because = f", because {reason}" if reason else ""
        rows.append(("wrapped", f"not looked at: {reason}" if tier is None else tier + because))
    for name, value in rows:
        print(f"{name:<16}{value}".rstrip())


def _shape(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    heads = f"{facts['heads']} heads"
    if facts["kv_heads"] != facts["heads"]:
        heads += f" over {facts['kv_heads']} key/value heads"
    rows = [
        ("shape", f"{facts['layers']} layers, width {facts['hidden_size']:,}, {heads}"),
        ("vocabulary", f"{facts['vocab_size']:,} tokens"),
        ("positions", f"{facts['max_positions']:,} tokens"),
    ]
    rows += [("window", f"{window:,} tokens in {layers} layers") for window, layers in facts["windows"].items()]
    return rows


def _size(count: float) -> str:
    """Bytes in decimal units with three figures."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.0f} {units[0]}" if units[0] == "B" or count >= 100 else f"{count:.3g} {units[0]}"
