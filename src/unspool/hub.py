"""From a name to a model and its tokenizer: built-in models, checkpoint folders, repositories on the Hugging Face Hub.

`load` is the short way. `AutoModelForCausalLM` and `AutoTokenizer` take transformers' arguments. Where the files are,
and which of them are downloaded, is the business of `repositories`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from unspool.errors import Unsupported
from unspool.repositories import BUILT_IN, HubArguments, locate

if TYPE_CHECKING:
    import torch

    from unspool.adapters import AdapterMixin
    from unspool.config import BitsAndBytesConfig
    from unspool.continuous import ContinuousMixin
    from unspool.generate import GenerationMixin
    from unspool.interop import Wrapped
    from unspool.models.base import Model
    from unspool.tokenization import Tokenizer
    from unspool.types import FileName

    Dtype: TypeAlias = Literal["auto"] | str | torch.dtype
    Device: TypeAlias = str | torch.device

    class CausalLM(GenerationMixin, ContinuousMixin, AdapterMixin, Model):
        """What `load` returns, for type checkers: a native model that has `generate()`."""

        name_or_path: str


__all__ = ["BUILT_IN", "AutoModelForCausalLM", "AutoTokenizer", "HubArguments", "load", "locate"]


def load(
    path_or_id: FileName = "storyteller",
    dtype: Dtype | None = None,
    device: Device | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: FileName | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    progress: bool | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    quantize: str | BitsAndBytesConfig | None = None,
) -> tuple[CausalLM, Tokenizer]:
    """Load a model and its tokenizer.

        model, tokenizer = unspool.load("HuggingFaceTB/SmolLM2-135M", dtype="bfloat16")

    Args:
        path_or_id: A built-in model's name (`"storyteller"`, `"storyteller-draft"`), a folder in Hugging Face layout
            (`config.json`, safetensors, `tokenizer.json`), or a repository on the Hub. A folder that is called like a
            built-in model is reached as `"./storyteller"`.
        dtype: Dtype of the weights: `torch.bfloat16`, `"bfloat16"`, … The default, `None` or `"auto"`, keeps the
            checkpoint's own.
        device: Where the model lives: `"cpu"`, `"cuda:1"`, … The default is the first CUDA device if there is one, else
            the CPU.
        revision: Branch, tag or commit on the Hub; default `main`.
        subfolder: Folder below `path_or_id` that holds the files.
        token: Access token for the Hub; `True` takes the stored one, `False` sends none.
        cache_dir: Where downloads are kept; default is the Hub's own cache.
        local_files_only: Never touch the network; only what was downloaded before is found.
        force_download: Download again what is in the cache already.
        progress: Show a progress bar on stderr; `None` shows one for long loads in a terminal.
        config_overrides: Entries that replace those of `config.json`, e.g. `{"rope_scaling": {...}}`.
        quantize: Keep the weights in fewer bits: `"int8"`, `"int4"` (a scale for 64 inputs; `"int4-g32"`,
            `"int4-g128"`), `"nf4"` or `"fp4"`. The head, and an embedding that shares its weight, is kept in `int8`.
            Or a `BitsAndBytesConfig`, which leaves the head alone. Checkpoints that are quantised need none of it.

    Returns:
        The model, ready for `generate()` and in inference mode, and its tokenizer.

    Raises:
        FileNotFoundError: There is no such folder or repository, or it cannot be had without the network.
        CheckpointError: The files do not make a model: missing or misshapen tensors, a truncated file, an unknown
            `model_type`, no `tokenizer.json`, pickled weights only.
        ValueError: `quantize` is unknown, or the checkpoint is quantised already.
        Unsupported: The checkpoint needs something that this version cannot do.
    """
    hub = HubArguments(revision, subfolder, token, cache_dir, local_files_only, force_download)
    folder = locate(path_or_id, weights=True, hub=hub)
    from unspool.tokenization import Tokenizer
    from unspool.weights import read_config

    # What is quick comes first: where it fails, no weights were read in vain.
    device = _default_device() if device is None else _checked_device(device)
    read_config(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = _load_model(folder, dtype, device, progress, config_overrides, quantize)
    model.name_or_path = os.fspath(path_or_id)
    return model, tokenizer


class AutoModelForCausalLM:
    """Loads a model under transformers' name and arguments; `unspool.load` also brings the tokenizer."""

    def __init__(self) -> None:
        raise TypeError("AutoModelForCausalLM has no instances: call AutoModelForCausalLM.from_pretrained(path_or_id)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: FileName,
        *,
        dtype: Dtype | None = None,
        torch_dtype: Dtype | None = None,
        device_map: Device | Mapping[str, Device] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: FileName | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
        quantization_config: object | None = None,
        attn_implementation: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        use_safetensors: bool | None = None,
    ) -> CausalLM | Wrapped:
        """Load the model of a folder, a Hub repository or a built-in name.

        A model of a family that is not native is loaded by the installed transformers, with the same arguments, and
        comes wrapped (see `unspool.wrap`).

        Args:
            pretrained_model_name_or_path: As `path_or_id` of `unspool.load`.
            dtype: Dtype of the weights; `None` or `"auto"` keeps the checkpoint's own.
            torch_dtype: Older name of `dtype`.
            device_map: `None` or `"cpu"` loads to the CPU (then `model.to("cuda")` works as ever), `"auto"` to the
                first CUDA device if there is one; a device or `{"": device}` names one. A model is not split over
                devices.
            revision: Branch, tag or commit on the Hub; default `main`.
            subfolder: Folder below the path that holds the files.
            token: Access token for the Hub.
            cache_dir: Where downloads are kept.
            local_files_only: Never touch the network.
            force_download: Download again what is in the cache already.
            trust_remote_code: Passed on to transformers; native models never run code from a repository.
            quantization_config: Quantise while loading: a `BitsAndBytesConfig`, transformers' own or its
                `TorchAoConfig`, or a dictionary of one's fields.
            attn_implementation: `"sdpa"`, `"eager"` or `None`, which are one here; others are refused.
            low_cpu_mem_usage: Accepted, and without effect: loading always streams tensor by tensor.
            use_safetensors: `False` is refused: no other format is read.

        Raises:
            TypeError: An argument that is not listed here.
            ValueError: `dtype` and `torch_dtype` contradict each other, or `attn_implementation` is unknown.
            Unsupported: A model split over devices, another library's `quantization_config`, pickled weights.
            FileNotFoundError, CheckpointError: As `unspool.load`.
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} contradict each other; pass dtype alone")
        hub = HubArguments(revision, subfolder, token, cache_dir, local_files_only, force_download)
        family = _family(locate(pretrained_model_name_or_path, hub=hub))
        if family is not None:
            from unspool.interop.auto import through_transformers

            arguments = {
                **{entry.name: getattr(hub, entry.name) for entry in fields(hub)},
                "dtype": dtype,
                "torch_dtype": torch_dtype,
                "device_map": device_map,
                "trust_remote_code": trust_remote_code,
                "quantization_config": _as_theirs(quantization_config),
                "attn_implementation": attn_implementation,
                "use_safetensors": use_safetensors,
            }
            reason = f"{pretrained_model_name_or_path!r} is a {family} model, which is not native here"
            return through_transformers("AutoModelForCausalLM", pretrained_model_name_or_path, reason, arguments)
        if quantization_config is not None:
            from unspool.weights.quant import quantiser

            quantiser(quantization_config)  # what is wrong with it is said before anything is downloaded
        if attn_implementation not in (None, "sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is not known; leave it out (the device decides)"
            )
        if use_safetensors is False:
            raise Unsupported("use_safetensors=False: only safetensors are read, never pickled weights; leave it out")
        device = _device_of(device_map)
        folder = locate(pretrained_model_name_or_path, weights=True, hub=hub)
        model = _load_model(folder, dtype if dtype is not None else torch_dtype, device, quantize=quantization_config)
        model.name_or_path = os.fspath(pretrained_model_name_or_path)
        return model


class AutoTokenizer:
    """Loads a tokenizer under transformers' name and arguments."""

    def __init__(self) -> None:
        raise TypeError("AutoTokenizer has no instances: call AutoTokenizer.from_pretrained(path_or_id)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: FileName,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: FileName | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
        use_fast: bool = True,
        **settings: Any,
    ) -> Tokenizer:
        """Load the tokenizer of a folder, a Hub repository or a built-in name.

        Args:
            pretrained_model_name_or_path: As `path_or_id` of `unspool.load`.
            revision: Branch, tag or commit on the Hub; default `main`.
            subfolder: Folder below the path that holds the files.
            token: Access token for the Hub.
            cache_dir: Where downloads are kept.
            local_files_only: Never touch the network.
            force_download: Download again what is in the cache already.
            trust_remote_code: Accepted, and without effect: code from a repository is never run.
            use_fast: Accepted, and without effect: there is one kind of tokenizer, the fast one.
            settings: What `Tokenizer.from_pretrained` takes besides, e.g. `padding_side="right"`.

        Raises:
            FileNotFoundError, CheckpointError: As `unspool.load`.
        """
        from unspool.tokenization import Tokenizer

        hub = HubArguments(revision, subfolder, token, cache_dir, local_files_only, force_download)
        return Tokenizer.from_pretrained(locate(pretrained_model_name_or_path, hub=hub), **settings)


def _family(folder: Path) -> str | None:
    """The `model_type` of a checkpoint that has no native class; `None` when it has one, or names none."""
    from unspool.models.registry import supported

    try:
        family = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads the weights says what is wrong
        return None
    return None if family in supported() else str(family)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _checked_device(device: Device) -> Device:
    """The device, if torch knows it and this machine may have it.

    Raises:
        ValueError: it is unknown, or a CUDA device that is not here.
    """
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is unknown; use 'cpu', 'cuda', 'cuda:1' and the like") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind.type == "cuda" and (kind.index or 0) >= count:
        have = f"there are {count} CUDA devices here" if count else "there is no CUDA device that torch can use here"
        raise ValueError(f"device={str(device)!r}: {have}; leave it out, or use 'cpu'")
    return device


def _as_theirs(config: object | None) -> object | None:
    """A `quantization_config` that transformers reads: of our class, its fields."""
    from unspool.config import BitsAndBytesConfig

    return config.to_dict() if isinstance(config, BitsAndBytesConfig) else config


def _device_of(device_map: Device | Mapping[str, Device] | None) -> Device:
    """The one device that transformers' `device_map` means."""
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise Unsupported(
                f"device_map={dict(device_map)!r}: a model is not split over devices; pass one, e.g. 'cuda:0'"
            )
        return device_map[""]
    if device_map is None:
        return "cpu"
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        raise Unsupported(f"device_map={device_map!r}: a model is not split over devices; pass one, e.g. 'cuda:0'")
    return _default_device() if device_map == "auto" else device_map


def _load_model(
    folder: Path,
    dtype: Dtype | None,
    device: Device,
    progress: bool | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    quantize: object | None = None,
) -> CausalLM:
    """Read the weights and give the native model `generate()` and its generation settings."""
    from unspool.config import GenerationConfig
    from unspool.weights import load_model

    native = load_model(
        folder, dtype=dtype, device=device, progress=progress, config_overrides=config_overrides, quantize=quantize
    )
    native.__class__ = _with_generate(type(native), _public_name(native))
    model: CausalLM = native  # type: ignore[assignment]
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model.generation_config = GenerationConfig.from_model_config(native.config)
    return model


def _public_name(native: Model) -> str:
    """Class name that the checkpoint gives, `"MistralForCausalLM"`, or one like it."""
    names = native.config.get("architectures") or []
    name = str(names[0]) if len(names) == 1 else ""
    return name if name.isidentifier() else f"{type(native).__name__}ForCausalLM"


_composed: dict[tuple[type[Model], str], type[Model]] = {}


def _with_generate(native: type[Model], name: str) -> type[Model]:
    """The native class with `generate()` in front; made once, so that two loads give the same type."""
    from unspool.adapters import AdapterMixin
    from unspool.continuous import ContinuousMixin
    from unspool.generate import GenerationMixin

    if (native, name) not in _composed:
        members = {
            "__module__": native.__module__,
            "__doc__": native.__doc__,
            # pickles cannot find a class by a name that no module has
            "__reduce__": lambda self: (_without_state, (native, name), self.__getstate__()),
        }
        _composed[native, name] = type(name, (GenerationMixin, ContinuousMixin, AdapterMixin, native), members)
    return _composed[native, name]


def _without_state(native: type[Model], name: str) -> Model:
    """What a copy or a pickle of a loaded model begins with."""
    kind = _with_generate(native, name)
    return kind.__new__(kind)
