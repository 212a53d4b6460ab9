"""Configuration files: where they are, how they are written, what a value looks like in JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from unspool.errors import CheckpointError
from unspool.types import JSON, FileName

__all__ = ["GENERATION_CONFIG_NAME", "find_file", "plain", "read_json", "upload", "write_atomically"]

GENERATION_CONFIG_NAME = "generation_config.json"


def write_atomically(path: FileName, text: str) -> None:
    """Write `text` as UTF-8 so that `path` holds either all of it or what it held before.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_json(path: FileName) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is not valid JSON, or not an object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # both bad JSON and bad UTF-8
        raise CheckpointError(f"{os.fspath(path)} is not valid JSON ({error}); write or download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{os.fspath(path)} must hold a JSON object, not a {type(values).__name__}")
    return values


def find_file(
    source: FileName,
    name: FileName,
    *,
    subfolder: str = "",
    cache_dir: FileName | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    revision: str = "main",
) -> Path:
    """The file `name` of a folder or of a Hub repository, downloaded when it is not yet here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `source` is itself a file.
    """
    folder = Path(source)
    local = folder / subfolder / name
    if local.is_file():
        return local
    if folder.is_dir():
        raise FileNotFoundError(f"{folder / subfolder} has no {os.fspath(name)}")
    if folder.is_file():
        raise ValueError(f"{folder} is a file; pass its folder, and its name as config_file_name")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(
            hf_hub_download(
                os.fspath(source),
                os.fspath(name),
                subfolder=subfolder or None,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
            )
        )
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no {os.fspath(name)} for {os.fspath(source)!r}: it is no folder here and no Hub repository that can "
            f"be reached and has this file ({str(error).partition(chr(10))[0] or type(error).__name__})"
        ) from error


def upload(
    text: str,
    name: str,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Make `name` a file of a Hub repository, which is created if need be; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_file(
        path_or_fileobj=text.encode(),
        path_in_repo=name,
        repo_id=repo,
        revision=revision,
        commit_message=commit_message or f"Upload {name}",
        create_pr=create_pr,
    )
    return commit.commit_url


def plain(value: Any, name: str = "value", *, lossy: bool = False) -> JSON:
    """`value` as JSON can hold it: dtypes by name, arrays and tuples as lists, settings objects as dicts.

    A mapping with tuple keys (`sequence_bias`) becomes a list of `[list(key), value]`, which both libraries read back.

    Args:
        value: Anything.
        name: The setting's name, for the error.
        lossy: Show what JSON cannot hold by its repr instead of raising.

    Raises:
        TypeError: JSON cannot hold `value`.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        if any(isinstance(key, tuple) for key in value):
            return [[plain(key, name, lossy=lossy), plain(item, name, lossy=lossy)] for key, item in value.items()]
        return {str(key): plain(item, f"{name}.{key}", lossy=lossy) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item, name, lossy=lossy) for item in items]
    if hasattr(value, "to_dict"):
        return plain(value.to_dict(), name, lossy=lossy)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), name, lossy=lossy)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), name, lossy=lossy)
    if type(value).__name__ == "dtype":
        return str(value).rsplit(".", maxsplit=1)[-1]
    if lossy:
        return repr(value)
    raise TypeError(f"{name} cannot be written to JSON: {value!r} is a {type(value).__name__}; unset it before saving")
