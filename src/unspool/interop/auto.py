"""Models that transformers loads and unspool decodes, under transformers' names for the kinds of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unspool.errors import Unsupported
from unspool.generate.report import Report
from unspool.interop.versions import check_version
from unspool.interop.wrap import Wrapped, wrap
from unspool.repositories import BUILT_IN

if TYPE_CHECKING:
    from unspool.types import FileName

__all__ = [
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "report_on_checkpoint",
    "through_transformers",
]

# transformers' auto classes of models that generate text, the more special ones first.
_KINDS = ("AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")

# What to install for transformers' ways to quantise, by a word of what it says when it lacks the library.
_QUANTISERS = {
    "bitsandbytes": "'unspool[bitsandbytes]'",
    "torchao": "'unspool[torchao]'",
    "gptqmodel": "gptqmodel",
    "optimum": "optimum gptqmodel",
    "compressed_tensors": "compressed-tensors",
    "compressed-tensors": "compressed-tensors",
}


def through_transformers(kind: str, path_or_id: FileName, reason: str, arguments: Mapping[str, Any]) -> Wrapped:
    """Load a model with transformers' own auto class and wrap it.

    Args:
        kind: name of the class, `"AutoModelForCausalLM"`.
        path_or_id: a folder, a Hub id or a built-in name.
        reason: why it is loaded so, for the error message.
        arguments: of its `from_pretrained`; those that are `None` are left out. Safetensors alone are read, and code of
            a repository runs only with `trust_remote_code=True`.

    Raises:
        Unsupported: transformers is not installed, or a library that it needs for quantised weights; or pickled weights
            are asked for.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    given.pop("low_cpu_mem_usage", None)  # what transformers does anyway
    if given.pop("use_safetensors", True) is False:
        raise Unsupported("use_safetensors=False: only safetensors are read, never pickled weights; leave it out")
    if "torch_dtype" in given:
        given.setdefault("dtype", given["torch_dtype"])
        del given["torch_dtype"]
    try:
        auto = getattr(import_module("transformers"), kind)
    except ImportError as error:
        raise Unsupported(
            f"{reason}, and transformers is not installed: pip install 'unspool[transformers]'"
        ) from error
    check_version()
    name = os.fspath(path_or_id)
    place = BUILT_IN.get(name, name)
    given.setdefault("trust_remote_code", False)
    try:
        return wrap(auto.from_pretrained(place, use_safetensors=True, **given).eval())
    except ImportError as error:
        extra = next((name for name in _QUANTISERS if name in str(error).lower()), None)
        if extra is None:
            raise
        raise Unsupported(
            f"transformers cannot load {name!r} without another library (it says: {error}): pip install "
            f"{_QUANTISERS[extra]}"
        ) from error


def report_on_checkpoint(folder: Path) -> Report:
    """How the module that transformers makes of a checkpoint is run; loads its weights and probes it.

    Raises:
        Unsupported: transformers is not installed, has no generating model for the checkpoint, or cannot load it.
    """
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise Unsupported("transformers is not installed: pip install 'unspool[transformers]'") from error
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        kind = _kind_of(folder, transformers)
        model = through_transformers(kind, folder, "it is looked at as transformers runs it", {"dtype": "auto"})
        return model.unspool_report()
    except Unsupported:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        said = str(error).strip().splitlines()
        raise Unsupported(f"transformers cannot load it: {said[0] if said else repr(error)}") from error
    finally:
        if shown:
            log.enable_progress_bar()


def _kind_of(folder: Path, transformers: Any) -> str:
    """The auto class whose model of a checkpoint generates."""
    config = type(transformers.AutoConfig.from_pretrained(folder))
    for name in _KINDS:
        if config in getattr(transformers, name)._model_mapping:
            return name
    raise Unsupported(f"transformers has no model of kind {config.model_type!r} that generates text")


class _Through:
    """A class of transformers by name, whose models come wrapped."""

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} has no instances: call {name}.from_pretrained(path_or_id)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: FileName, **kwargs: Any) -> Wrapped:
        """Load a model through the installed transformers, with our `generate()`.

        Args:
            pretrained_model_name_or_path: A folder or a repository on the Hub.
            kwargs: As transformers takes them: `dtype`, `device_map`, `attn_implementation`, `quantization_config`,
                `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `trust_remote_code`, …

        Raises:
            Unsupported: transformers is not installed, or pickled weights are asked for.
            OSError: there is no such model, or it has no safetensors.
            TypeError: an argument that the model does not take.
        """
        return through_transformers(
            cls.__name__, pretrained_model_name_or_path, f"{cls.__name__} loads through transformers", kwargs
        )


class AutoModelForSeq2SeqLM(_Through):
    """Loads encoder-decoders of text: T5, BART, mBART, Pegasus, …; see `unspool.wrap`."""


class AutoModelForSpeechSeq2Seq(_Through):
    """Loads models from speech to text: Whisper, Speech2Text, Moonshine, …; see `unspool.wrap`."""


class AutoModelForImageTextToText(_Through):
    """Loads models from images and text to text: LLaVA, Qwen2-VL, Idefics, BLIP, …; see `unspool.wrap`."""
