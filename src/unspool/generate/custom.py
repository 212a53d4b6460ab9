"""Generation methods of the caller's own: a function, or a file in a folder or a Hub repository."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "custom_generate"
_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def load_custom_generate(
    source: str | os.PathLike[str], trust_remote_code: bool | None = None, **hub: Any
) -> Callable[..., Any]:
    """The function `generate` of `custom_generate/generate.py` in a folder or a Hub repository.

    Args:
        source: a folder, or a repository's id.
        trust_remote_code: must be `True` for a repository, whose code is run; a folder of one's own needs it not, and
            `False` refuses that too.
        hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        ValueError: without trust, or the file defines no such function.
        FileNotFoundError: there is no such file.
        ImportError: a package that its `requirements.txt` names is missing.

    Source: `GenerationMixin.load_custom_generate` of transformers.
    """
    local = Path(source).is_dir()
    if not (trust_remote_code is True or (local and trust_remote_code is None)):
        raise ValueError(
            f"custom_generate={os.fspath(source)!r} would run the Python code in its {FOLDER}/generate.py; read it, "
            "and pass trust_remote_code=True when you trust it"
        )
    file = _folder(source, {name: hub[name] for name in _HUB if hub.get(name) is not None}) / "generate.py"
    if not file.is_file():
        raise FileNotFoundError(f"{os.fspath(source)!r} has no {FOLDER}/generate.py")
    _check_requirements(file.with_name("requirements.txt"), source)
    function = getattr(_load(file), "generate", None)
    if not callable(function):
        raise ValueError(f"{file} defines no function `generate`")
    loaded: Callable[..., Any] = function
    return loaded


def _folder(source: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source) / FOLDER
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=[f"{FOLDER}/*"], **hub)) / FOLDER
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"custom_generate={os.fspath(source)!r} is no folder here and no Hub repository that can be reached"
        ) from error


def _check_requirements(file: Path, source: str | os.PathLike[str]) -> None:
    if not file.is_file():
        return
    from packaging.requirements import Requirement

    missing = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        try:
            if not requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True):
                missing.append(text)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
    if missing:
        raise ImportError(f"custom_generate={os.fspath(source)!r} needs {', '.join(missing)}; install that first")


def _load(file: Path) -> ModuleType:
    """Run a file as a module of a package that is its folder, so that it may import its neighbours."""
    package = "unspool_custom_" + hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:16]
    parent = sys.modules[package] = ModuleType(package)
    parent.__path__ = [str(file.parent)]
    spec = spec_from_file_location(f"{package}.generate", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def own_arguments(function: Callable[..., Any], kwargs: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Those of a call's keyword arguments that only the caller's function knows."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in kwargs.items() if name in parameters and name not in known}


def call_custom(
    function: Callable[..., Any], model: Any, ids: Any, always: dict[str, Any], named: dict[str, Any]
) -> Any:
    """Call a function as transformers does: model, ids, `always`, and of `named` what it has parameters for."""
    parameters = inspect.signature(function).parameters
    return function(model, ids, **always, **{name: value for name, value in named.items() if name in parameters})
