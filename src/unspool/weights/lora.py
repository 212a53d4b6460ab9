"""Low-rank adapters as PEFT saves them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Read are LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023) and DoRA (Liu et al., 2024). Whatever else the files ask
for is refused by name: an adapter that is applied in part would quietly be another one.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unspool.errors import CheckpointError, Unsupported
from unspool.models.adapters import Adapter, Delta
from unspool.models.base import Model
from unspool.models.layers.linear import Linear
from unspool.weights.names import targets
from unspool.weights.safetensors import SafetensorsFile

__all__ = ["read_adapter"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = "base_model.model."
_DOWN, _UP, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_KINDS = {_DOWN: _DOWN, _UP: _UP, _MAGNITUDE: _MAGNITUDE, f"{_MAGNITUDE}.weight": _MAGNITUDE}

# Entries of adapter_config.json that change what is computed, and the value that leaves each off.
_REFUSED: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "megatron_config": None,
}
# Ways to start training that leave the base's weights alone; the others subtract something from them.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What `adapter_config.json` says, as far as it is needed."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    some_layers: bool

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of one module."""
        rank = int(_by_pattern(self.rank_pattern, module, self.rank))
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def wants(self, module: str) -> bool:
        """Whether `target_modules` names it."""
        return _names(self.target_modules, module) and not _names(self.exclude_modules, module)


@dataclass(frozen=True, slots=True)
class _Part:
    """A module of the checkpoint: rows `first` to `first + outputs` of a layer of the model's."""

    layer: Linear
    first: int
    outputs: int


def read_adapter(folder: Path, model: Model, name: str) -> Adapter:
    """Read an adapter for `model`, into its dtype and device. Neither the folder nor the model is changed.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        model: what the adapter was trained on.
        name: what the adapter is to be called.

    Raises:
        CheckpointError: files are missing or damaged, or the adapter is one of another model: it changes modules that
            this one lacks, or of other shapes.
        Unsupported: another kind of adapter, or a setting that is not read here.
    """
    settings = _read_settings(folder)
    parts = _parts(model)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = f"only {PICKLE}, a pickle, which is never read; save it with safetensors"
        raise CheckpointError(f"{folder} has {pickled if (folder / PICKLE).is_file() else f'no {WEIGHTS}'}")
    with SafetensorsFile(path) as file:
        found = _sort(file, parts, model)
        _check_complete(settings, found, parts, path)
        deltas: defaultdict[Linear, list[tuple[_Part, _Low]]] = defaultdict(list)
        for module, tensors in found.items():
            deltas[parts[module].layer].append((parts[module], _read_low(file, module, tensors, settings, parts)))
    kind = "DoRA" if settings.dora else "rsLoRA" if settings.rslora else "LoRA"
    made = {layer: _join(layer, lows, model) for layer, lows in deltas.items()}
    return Adapter(name, kind, made)


@dataclass(frozen=True, slots=True)
class _Low:
    """One module's tensors in fp32: `down` `[rank, inputs]`, `up` `[outputs, rank]` scaled, `magnitude` `[outputs]`."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None


def _read_settings(folder: Path) -> _Settings:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder that PEFT saved an adapter in") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(f"{path}: peft_type={kind!r} is not read by native models, which take LoRA, rsLoRA and DoRA")
    for entry, off in _REFUSED.items():
        if config.get(entry, off) not in (off, None, [], {}):
            raise Unsupported(f"{path}: {entry}={config[entry]!r} is not supported by native models")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise Unsupported(
            f"{path}: init_lora_weights={start!r} changes the base's weights too; save it as a plain LoRA "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    return _Settings(
        rank=_number(config, "r", 8, path),
        alpha=_number(config, "lora_alpha", 8, path),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        target_modules=config.get("target_modules"),
        exclude_modules=config.get("exclude_modules"),
        some_layers=config.get("layers_to_transform") not in (None, []),
    )


def _number(config: Mapping[str, Any], entry: str, default: int, path: Path) -> Any:
    value = config.get(entry, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{path}: {entry}={value!r} is no positive number")
    return value


def _parts(model: Model) -> dict[str, _Part]:
    """The linear layers of the model's body under the names of the checkpoint's modules."""
    made = {}
    for target in targets(model):
        owner, _, kind = target.name.rpartition(".")
        layer = model.get_submodule(owner)
        if kind != "weight" or not isinstance(layer, Linear) or layer is model.lm_head:
            continue
        first = 0
        for source in target.sources:
            outputs = source.shape[1 if target.transposed else 0]
            made[source.name.removesuffix(".weight")] = _Part(layer, first, outputs)
            first += outputs
    return made


def _sort(file: SafetensorsFile, parts: Mapping[str, _Part], model: Model) -> dict[str, dict[str, str]]:
    """The file's tensors by module and kind.

    Raises:
        CheckpointError: a tensor belongs to no module of the model.
        Unsupported: a tensor that low-rank adapters of linear layers do not have.
    """
    # adapters of a bare decoder lack the decoder's prefix
    bare = {name.partition(".")[2]: name for name in parts}
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    strangers = []
    for name in file.entries:
        kind = next((kind for kind in _KINDS if name.endswith(f".{kind}")), None)
        if kind is None:
            raise Unsupported(f"{file.path}: the tensor {name!r} is not one of a LoRA on a linear layer")
        module = name.removeprefix(_PREFIX).removesuffix(f".{kind}")
        module = module if module in parts else bare.get(module, module)
        if module in parts:
            found[module][_KINDS[kind]] = name
        elif module not in strangers:
            strangers.append(module)
    if strangers:
        some = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        raise CheckpointError(
            f"{file.path}: the adapter changes {some}, which is no linear layer inside this {model.spec.family!r} "
            "model; it belongs to another base, or changes the embedding or the head, which is not supported"
        )
    if not found:
        raise CheckpointError(f"{file.path} holds no tensors, so the adapter would change nothing")
    return found


def _check_complete(
    settings: _Settings, found: Mapping[str, Mapping[str, str]], parts: Mapping[str, _Part], path: Path
) -> None:
    """Raise CheckpointError unless the file holds what the configuration promises, and nothing else."""
    wanted = {_DOWN, _UP, _MAGNITUDE} if settings.dora else {_DOWN, _UP}
    for module, tensors in found.items():
        for kind in sorted(wanted ^ tensors.keys()):
            verb = "lacks" if kind in wanted else f"has (though {CONFIG} does not say use_dora)"
            raise CheckpointError(f"{path} {verb} {module}.{kind}")
    names = settings.target_modules
    if isinstance(names, list):
        for one in names:
            if not any(_names([one], module) for module in parts):
                raise CheckpointError(
                    f"{path.parent / CONFIG}: target_modules has {one!r}, which is no linear layer inside this model; "
                    "the adapter belongs to another base"
                )
    if names is None or settings.some_layers:
        return
    missing = [module for module in parts if settings.wants(module) and module not in found]
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]}.{_DOWN}, which {CONFIG} promises (target_modules)")


def _read_low(
    file: SafetensorsFile, module: str, tensors: Mapping[str, str], settings: _Settings, parts: Mapping[str, _Part]
) -> _Low:
    rank, scale = settings.of(module)
    part = parts[module]
    inputs = part.layer.weight.shape[1]
    shapes = {_DOWN: (rank, inputs), _UP: (part.outputs, rank), _MAGNITUDE: (part.outputs,)}
    read = {}
    for kind, name in tensors.items():
        entry = file.entries[name]
        if entry.shape != shapes[kind]:
            raise CheckpointError(
                f"{file.path}: {name!r} has shape {list(entry.shape)}, but this model and the adapter's rank make it "
                f"{list(shapes[kind])}; the adapter belongs to another base"
            )
        if not entry.dtype.is_floating_point:
            raise CheckpointError(f"{file.path}: {name!r} holds integers, which no adapter does")
        tensor = torch.empty(entry.shape, dtype=torch.float32)
        file.read_into(name, tensor)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file.path}: {name!r} holds values that are not finite (a damaged file?)")
        read[kind] = tensor
    return _Low(read[_DOWN], read[_UP] * scale, read.get(_MAGNITUDE))


def _join(layer: Linear, lows: Iterable[tuple[_Part, _Low]], model: Model) -> Delta:
    """What the modules' matrices come to for the layer that they are parts of."""
    lows = list(lows)
    outputs = layer.weight.shape[0]
    up = torch.zeros(sum(low.down.shape[0] for _, low in lows), outputs, dtype=torch.float32)
    gain = torch.ones(outputs, dtype=torch.float32) if any(low.magnitude is not None for _, low in lows) else None
    plain = None if gain is None else layer.plain.float().cpu()
    at = 0
    for part, low in lows:
        own = slice(part.first, part.first + part.outputs)
        up[at : at + low.down.shape[0], own] = low.up.t()
        at += low.down.shape[0]
        if gain is not None and plain is not None and low.magnitude is not None:
            gain[own] = low.magnitude / torch.linalg.norm(plain[own] + low.up @ low.down, dim=1)
    down = torch.cat([low.down for _, low in lows])
    shift = None
    if gain is not None:
        up *= gain
        # DoRA scales the product and not the bias
        shift = torch.zeros_like(gain) if layer.bias is None else layer.bias.detach().float().cpu() * (1 - gain)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(model.device, model.dtype)

    made = Delta(down, up, gain, shift)
    made.convert(place)
    return made


def _names(names: str | list[str] | None, module: str) -> bool:
    """Whether `target_modules` (or `exclude_modules`), in PEFT's ways to write them, name a module."""
    if not names:
        return False
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The entry of the first pattern that matches the end of a module's name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
