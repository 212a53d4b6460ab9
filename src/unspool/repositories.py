"""From a name to a folder with a model's files: built-in models, checkpoint folders, the Hugging Face Hub.

From the Hub only the files that are read get downloaded: JSON, chat templates and safetensors; never pickled weights,
never code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from unspool.errors import CheckpointError
from unspool.types import FileName

__all__ = ["BUILT_IN", "BUILT_IN_ADAPTERS", "HubArguments", "locate", "locate_adapter"]

BUILT_IN: Mapping[str, Path] = {
    name: Path(__file__).parent / "assets" / name for name in ("storyteller", "storyteller-draft")
}
"""Models that come with the package, by name."""

BUILT_IN_ADAPTERS: Mapping[str, Path] = {"storyteller-pirate": Path(__file__).parent / "assets" / "storyteller-pirate"}
"""Adapters that come with the package, by name."""

# A Hub id: "name" or "owner/name".
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_INDEX = "model.safetensors.index.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    _INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True, slots=True)
class HubArguments:
    """How to reach a repository: the arguments that all loading functions share, with their meaning in `load`."""

    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: FileName | None = None
    local_files_only: bool = False
    force_download: bool = False


def locate(path_or_id: FileName, *, weights: bool = False, hub: HubArguments | None = None) -> Path:
    """Folder with a model's files; they are downloaded when `path_or_id` is neither built in nor on this disk.

    Args:
        path_or_id: A built-in name, a folder or a Hub id; see `load`.
        weights: Download the weights too, and not only configuration, tokenizer and chat template.
        hub: How to reach the Hub.

    Raises:
        FileNotFoundError: No such folder, and no such repository or no way to reach it.
        NotADirectoryError: A file was named.
    """
    hub = hub or HubArguments()
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(f"a model is a name, a folder or a Hub id, not {path_or_id!r}")
    name = os.fspath(path_or_id)
    if isinstance(path_or_id, str) and name in BUILT_IN:
        return BUILT_IN[name] / hub.subfolder
    folder = Path(name).expanduser() / hub.subfolder
    if name and folder.is_dir():  # an empty name is a mistake and not the current folder
        return folder
    if folder.is_file():
        raise NotADirectoryError(
            f"{name!r} is a file: give the folder that holds it, with config.json beside the weights"
        )
    if name in BUILT_IN_ADAPTERS:
        raise FileNotFoundError(
            f"{name!r} is no model but an adapter; load it beside one: model.load_adapter({name!r})"
        )
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(name) or Path(name).is_dir():
        raise FileNotFoundError(
            f"there is no folder {name and os.fspath(folder)!r}, and that cannot be a Hub id ('owner/name')"
        )
    return _download(name, weights, hub)


def locate_adapter(path_or_id: FileName, *, hub: HubArguments | None = None) -> Path:
    """Folder with an adapter's files; they are downloaded when `path_or_id` is neither built in nor on this disk.

    Raises:
        FileNotFoundError: no such folder, and no such repository or no way to reach it.
    """
    hub = hub or HubArguments()
    name = os.fspath(path_or_id)
    if name in BUILT_IN_ADAPTERS:
        return BUILT_IN_ADAPTERS[name]
    folder = Path(name).expanduser() / hub.subfolder
    if name and folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name) or Path(name).exists():
        raise FileNotFoundError(
            f"there is no adapter's folder {name and os.fspath(folder)!r}, and that cannot be a Hub id ('owner/name')"
        )
    prefix = f"{hub.subfolder.strip('/')}/" if hub.subfolder else ""
    return _snapshot(name, [prefix + file for file in _ADAPTER_FILES], hub) / prefix


def _download(repo: str, weights: bool, hub: HubArguments) -> Path:
    """Fetch the small files of a repository, then the weights that its index names."""
    prefix = f"{hub.subfolder.strip('/')}/" if hub.subfolder else ""
    root = _snapshot(repo, [prefix + name for name in _SMALL_FILES], hub)
    folder = root / prefix
    if not weights:
        return folder
    names = {"model.safetensors"}
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        # The index is a stranger's file: whatever it names, nothing but safetensors is fetched.
        names = {str(name) for name in index.get("weight_map", {}).values() if str(name).endswith(".safetensors")}
    _snapshot(repo, sorted(prefix + name for name in names), hub)
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"{repo!r} has no safetensors weights, and pickled ones are not read; look for another revision or a "
            "repository that has them"
        )
    return folder


def _snapshot(repo: str, names: list[str], hub: HubArguments) -> Path:
    """Download the named files; the Hub's many errors become one clear sentence each, all of them `OSError`."""
    from huggingface_hub import errors, snapshot_download

    revision = f" at revision {hub.revision!r}" if hub.revision else ""
    try:
        folder = snapshot_download(
            repo,
            revision=hub.revision,
            cache_dir=None if hub.cache_dir is None else os.fspath(hub.cache_dir),
            token=hub.token,
            local_files_only=hub.local_files_only,
            force_download=hub.force_download,
            allow_patterns=names,
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo!r} is gated: accept its conditions on its page on the Hub, then pass token= or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo!r} has no revision {hub.revision!r} on the Hub") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"there is no folder {repo!r} here and no such repository on the Hub (a private one needs token=)"
            f"{_like(repo)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if hub.local_files_only:
            raise FileNotFoundError(
                f"there is no folder {repo!r} here, and {repo!r}{revision} was not downloaded before; "
                f"leave local_files_only (--offline) out to fetch it{_like(repo)}"
            ) from error
        raise ConnectionError(
            f"there is no folder {repo!r} here, and the Hub cannot be reached to fetch {repo!r}{revision}; "
            f"check the name, or the network (and HF_HUB_OFFLINE){_like(repo)}"
        ) from error
    return Path(folder)


def _like(name: str) -> str:
    """What may have been meant by a name that is no folder, in brackets."""
    near = get_close_matches(name, [*BUILT_IN, *BUILT_IN_ADAPTERS], 1, 0.8)
    return f" (did you mean {near[0]!r}?)" if near else ""
