"""A tokenizer's files: where they are, what they say, and how they are written."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from unspool.errors import CheckpointError
from unspool.types import FileName

__all__ = ["TokenizerFiles", "find_folder", "read_files", "write_files"]

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of one tokenizer say."""

    backend: tokenizers.Tokenizer
    config: dict[str, Any]  # tokenizer_config.json, with special_tokens_map.json where that counts
    template: str | dict[str, str] | None  # chat template, or several by name


def find_folder(
    path_or_id: FileName,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: FileName | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Path:
    """The local folder with the tokenizer's files; downloads them (and nothing else) when given a Hub id.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be reached.
    """
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local / subfolder
    if local.is_file():
        raise CheckpointError(f"{local} is a file; pass the folder it is in, {local.parent}")
    name = os.fspath(path_or_id)
    if not _REPOSITORY.fullmatch(name):
        raise CheckpointError(f"there is no folder {name!r}, and it is not the id of a Hub repository ('owner/name')")
    import huggingface_hub

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = (TOKENIZER, CONFIG, SPECIAL_TOKENS, TEMPLATE, f"{MORE_TEMPLATES}/*.jinja")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[prefix + pattern for pattern in wanted],
        )
    except (OSError, ValueError) as error:  # what huggingface_hub raises derives from these
        raise CheckpointError(
            f"there is no folder {name!r}, and the Hub repository of that name could not be fetched: {error}"
        ) from error
    return Path(folder) / subfolder


def read_files(folder: Path) -> TokenizerFiles:
    """Read a tokenizer's files.

    Raises:
        CheckpointError: tokenizer.json is missing, or a file is not what its name says.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER}. Convert the tokenizer once with transformers: "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer the tokenizers library can read: {error}") from error
    config = _read_json(folder / CONFIG)
    if "added_tokens_decoder" not in config:  # older files; transformers lets them win over the configuration
        config |= _read_json(folder / SPECIAL_TOKENS)
    return TokenizerFiles(backend, config, _read_templates(folder) or _template_of(config.get("chat_template")))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and not an object")
    return content


def _read_templates(folder: Path) -> str | dict[str, str] | None:
    files = {path.name.removesuffix(".jinja"): path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        files = {"default": folder / TEMPLATE, **files}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return texts["default"] if list(texts) == ["default"] else texts or None


def _template_of(value: Any) -> str | dict[str, str] | None:
    """The template of tokenizer_config.json: one text, or a list of `{"name": ..., "template": ...}`."""
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    if value is None or isinstance(value, str | dict):
        return value
    raise CheckpointError(f"chat_template in {CONFIG} is a {type(value).__name__}; it can be a text or a list")


def write_files(
    folder: FileName,
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    template: str | dict[str, str] | None,
) -> tuple[str, ...]:
    """Write a tokenizer's files; each appears whole or not at all. Returns their paths.

    Raises:
        ValueError: `folder` is a file, or a template has a name that is no file name.
    """
    root = Path(folder)
    if root.is_file():
        raise ValueError(f"{root} is a file; pass a folder")
    texts = {
        root / TOKENIZER: backend.to_str(pretty=True),
        root / CONFIG: json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n",
    }
    named = {"default": template} if isinstance(template, str) else template or {}
    for name, text in named.items():
        if not re.fullmatch(r"[\w-][\w. -]*", name):
            raise ValueError(f"chat template name {name!r} is no file name")
        texts[root / TEMPLATE if name == "default" else root / MORE_TEMPLATES / f"{name}.jinja"] = text
    for path, text in texts.items():
        _write(path, text)
    return tuple(map(str, texts))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
