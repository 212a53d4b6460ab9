"""`GenerationConfig`: the settings of a generation call, as an object and as a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, Literal, Self, TextIO, overload

from unspool.config.checks import check_values, idle_settings
from unspool.config.compilation import CompileConfig
from unspool.config.continuous import ContinuousBatchingConfig
from unspool.config.defaults import default_generation_params
from unspool.config.explain import explanation
from unspool.config.fields import FIELDS, METADATA, GenerationFields
from unspool.config.files import GENERATION_CONFIG_NAME, find_file, plain, read_json, upload, write_atomically
from unspool.config.mode import GenerationMode, mode_of
from unspool.config.notice import warn_once
from unspool.config.structured import plain_schema
from unspool.config.watermark import BaseWatermarkingConfig, watermarking_config
from unspool.types import FileName

__all__ = ["GenerationConfig"]

_NAMES = frozenset((*FIELDS, "_from_model_config", "transformers_version"))
_DECODER_KEYS = ("decoder", "generator", "text_config")
_NESTED: dict[str, tuple[type, Callable[[Mapping[str, Any]], Any]]] = {
    "watermarking_config": (BaseWatermarkingConfig, watermarking_config),
    "compile_config": (CompileConfig, CompileConfig.from_dict),
    "continuous_batching_config": (ContinuousBatchingConfig, ContinuousBatchingConfig.from_dict),
}


class GenerationConfig(GenerationFields):
    """The settings of a generation call; `GenerationFields` says what each means.

    Every field is `None` until someone sets it. A call fills those from the model's own configuration and then from
    `default_generation_params()`; see `unspool.config.resolve`. Keys that are no field become extra attributes.

    Values of the wrong type or out of range raise at once. Settings that merely have no effect are mentioned once in
    the log (logger `unspool`), and only when the caller set them.

    Raises:
        ValueError, TypeError: a value is wrong.
    """

    extra_output_flags = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")

    transformers_version: str | None
    """Version named in the file this was read from."""
    _from_model_config: bool | None
    """Whether the values come from a model's config.json, whose other keys are no settings."""
    _original_object_hash: int | None
    """Hash when it was loaded, to tell a changed configuration from an unchanged one."""
    _sources: dict[str, str] | None
    """Where each value of a resolved configuration came from."""

    def __init__(self, **kwargs: Any) -> None:
        self._fill(kwargs)
        self.validate(user_set_attributes=set(kwargs))

    def _fill(self, values: Mapping[str, Any]) -> None:
        """Set every field from `values`, the rest to `None`, and keep what is no field as extra attributes."""
        for name in FIELDS:
            setattr(self, name, _normal(name, values.get(name)))
        self._from_model_config = values.get("_from_model_config")
        self.transformers_version = values.get("transformers_version")
        self._original_object_hash = None
        self._sources = None
        if self._from_model_config:
            if values.get("force_bos_token_to_be_generated"):  # how old BART configurations say it
                self.forced_bos_token_id = self.bos_token_id
            return
        for key, value in values.items():
            if key not in _NAMES and not key.startswith("_"):
                self._set(key, value)

    def _set(self, name: str, value: Any) -> None:
        if name not in _NAMES and hasattr(type(self), name):
            raise ValueError(f"{name!r} is a method of GenerationConfig and cannot be the name of a setting")
        setattr(self, name, _normal(name, value))

    @classmethod
    def _load(cls, values: Mapping[str, Any], caller: Mapping[str, Any]) -> Self:
        """Make a configuration of a file's `values` with the `caller`'s on top, and remember it as unchanged."""
        config = cls.__new__(cls)
        config._fill({**values, **caller})
        check_values(config, set(caller), loading=True)
        if caller:
            config._remark(set(caller))
        config._original_object_hash = hash(config)
        return config

    def validate(self, strict: bool = False, user_set_attributes: Collection[str] | None = None) -> None:
        """Check the values.

        Args:
            strict: Raise for settings without effect too, instead of mentioning them in the log.
            user_set_attributes: The fields the caller set; others are not mentioned. `None` means all.

        Raises:
            ValueError: a value is out of range, two contradict each other, or, if strict, one has no effect.
            TypeError: a value has the wrong type.
        """
        check_values(self, user_set_attributes)
        if not strict:
            self._remark(user_set_attributes)
        elif idle := idle_settings(self, None, strict=True):
            raise ValueError("GenerationConfig has settings without effect: " + "; ".join(idle.values()))

    def _remark(self, caller: Collection[str] | None) -> None:
        for text in idle_settings(self, caller, strict=False).values():
            warn_once(text)

    def get_generation_mode(self, assistant_model: object | None = None) -> GenerationMode:
        """The strategy these settings mean.

        Args:
            assistant_model: A draft model of the call; with one, greedy search and sampling are assisted.
        """
        return mode_of(self, assistant_model is not None)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """`default_generation_params` under transformers' name."""
        return default_generation_params()

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Set the attributes that `kwargs` name. On an error nothing is changed.

        Args:
            defaults_only: Set only those that are still `None`.
            allow_custom_entries: Add keys that this configuration does not have yet.
            kwargs: The new values.

        Returns:
            The entries of `kwargs` that were not used.

        Raises:
            ValueError, TypeError: the result would be wrong.
        """
        attributes = self.__dict__.keys() - {"_original_object_hash", "_sources"}
        used = {
            key: value
            for key, value in kwargs.items()
            if (key in attributes and (not defaults_only or getattr(self, key) is None))
            or (key not in attributes and allow_custom_entries and not key.startswith("_"))
        }
        changed = copy(self)
        for key, value in used.items():
            changed._set(key, value)
        if self._sources is not None:
            changed._sources = self._sources | dict.fromkeys(used, "object")
        changed.validate(user_set_attributes=used.keys())
        self.__dict__.update(changed.__dict__)
        return {key: value for key, value in kwargs.items() if key not in used}

    def explain(self, file: TextIO | None = None) -> None:
        """Print each effective value and where it came from: the call, an object, the model's file or the default.

        Args:
            file: Where to print; standard output if not given.
        """
        print(self.explanation(), file=file)

    def explanation(self) -> str:
        """The table that `explain` prints."""
        return explanation(self, self._sources)

    # Dicts and JSON

    @overload
    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], *, return_unused_kwargs: Literal[False] = False, **kwargs: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], *, return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], *, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Make a configuration from a dict, such as a file's content.

        Args:
            config_dict: The values. They are taken as they are; a call that uses them checks their ranges.
            return_unused_kwargs: Hand back the `kwargs` that are neither field nor in `config_dict`; otherwise they
                become extra attributes.
            kwargs: Values that win over `config_dict`.

        Returns:
            The configuration, or with `return_unused_kwargs=True` the pair of it and a dict of the unused `kwargs`.

        Raises:
            ValueError, TypeError: a value is wrong.
        """
        for internal in ("_from_auto", "_from_pipeline"):
            kwargs.pop(internal, None)
        if not isinstance(config_dict, Mapping):
            raise TypeError(f"config_dict must be a dict, not {type(config_dict).__name__}")
        unused = {key: kwargs.pop(key) for key in kwargs.keys() - _NAMES - config_dict.keys() if return_unused_kwargs}
        config = cls._load(config_dict, kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """Take the settings out of a model's configuration; its other keys are left.

        Settings of a nested decoder (`decoder`, `generator`, `text_config`) fill those that the outer one leaves unset.

        Args:
            model_config: A dict, or an object with `to_dict()`. It is not changed.

        Raises:
            TypeError: it is neither.
        """
        if not isinstance(model_config, Mapping) and not hasattr(model_config, "to_dict"):
            raise TypeError(f"model_config must be a dict or have to_dict(), not {type(model_config).__name__}")
        outer = dict(model_config if isinstance(model_config, Mapping) else model_config.to_dict())
        if hasattr(model_config, "get_text_config"):
            decoder = model_config.get_text_config(decoder=True).to_dict()
        else:
            decoder = next((outer[key] for key in _DECODER_KEYS if isinstance(outer.get(key), Mapping)), {})
        values = {key: value for key, value in outer.items() if value is not None}
        for name in FIELDS:
            if values.get(name) is None and decoder.get(name) is not None:
                values[name] = decoder[name]
        if any(values.get(name) for name in cls.extra_output_flags):
            values["return_dict_in_generate"] = True
        return cls._load({**values, "_from_model_config": True}, {})

    def to_dict(self) -> dict[str, Any]:
        """All attributes, unset ones included, as a dict of their own; a `dtype` is given by its name."""
        hidden = {key for key in self.__dict__ if key.startswith("_") and key != "_from_model_config"}
        output = {key: deepcopy(value) for key, value in self.__dict__.items() if key not in hidden}
        _name_dtypes(output)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """The attributes that differ from those of an empty configuration."""
        return {key: value for key, value in self.to_dict().items() if key not in _NAMES or value is not None}

    def to_json_string(
        self, use_diff: bool = True, ignore_metadata: bool = False, keys_to_pop: list[str] | None = None
    ) -> str:
        """The configuration as JSON, keys sorted.

        Args:
            use_diff: Only what was set.
            ignore_metadata: Leave out where it came from.
            keys_to_pop: Keys to leave out.

        Raises:
            TypeError: a value has no JSON form.
        """
        return self._json(use_diff, {*(keys_to_pop or ()), *(METADATA if ignore_metadata else ())}, lossy=False)

    def _json(self, use_diff: bool, without: Collection[str], *, lossy: bool) -> str:
        values = self.to_diff_dict() if use_diff else self.to_dict()
        shown = {key: plain(value, key, lossy=lossy) for key, value in values.items() if key not in without}
        return json.dumps(shown, indent=2, sort_keys=True) + "\n"

    def to_json_file(
        self, json_file_path: FileName, use_diff: bool = True, keys_to_pop: list[str] | None = None
    ) -> None:
        """Write `to_json_string` to a file, whole or not at all."""
        write_atomically(json_file_path, self.to_json_string(use_diff=use_diff, keys_to_pop=keys_to_pop))

    # Files and the Hub

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: FileName,
        config_file_name: FileName | None = None,
        cache_dir: FileName | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        *,
        return_unused_kwargs: Literal[False] = False,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: FileName,
        config_file_name: FileName | None = None,
        cache_dir: FileName | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        *,
        return_unused_kwargs: Literal[True],
        **kwargs: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: FileName,
        config_file_name: FileName | None = None,
        cache_dir: FileName | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        *,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a configuration from a folder or from the Hub.

        Args:
            pretrained_model_name: A folder, or the id of a Hub repository.
            config_file_name: The file; `generation_config.json` if not given.
            cache_dir: Where downloads are kept, if not in the usual place.
            force_download: Download even what is here already.
            local_files_only: Do not use the network.
            token: Hub token; `True` or nothing for the stored one, `False` for none.
            revision: Branch, tag or commit.
            return_unused_kwargs: As for `from_dict`.
            kwargs: `subfolder` says where in the repository the file is; all others are settings that win over the
                file's. `proxies` is refused: set HTTPS_PROXY.

        Returns:
            The configuration, or with `return_unused_kwargs=True` the pair of it and a dict of the unused `kwargs`.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is not a JSON object.
            ValueError, TypeError: a value is wrong.
        """
        if kwargs.pop("proxies", None):
            raise ValueError("proxies cannot be passed, huggingface_hub takes none; set the environment's HTTPS_PROXY")
        from_model = kwargs.pop("_from_model_config", False)
        path = find_file(
            pretrained_model_name,
            config_file_name or GENERATION_CONFIG_NAME,
            subfolder=kwargs.pop("subfolder", None) or "",
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
        )
        values = read_json(path)
        if from_model:
            return cls.from_model_config(values)
        if return_unused_kwargs:
            return cls.from_dict(values, return_unused_kwargs=True, **kwargs)
        config: Self = cls.from_dict(values, **kwargs)
        return config

    def save_pretrained(
        self,
        save_directory: FileName,
        config_file_name: FileName | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write what was set to a folder, which is made if need be. `compile_config` is not written.

        Args:
            save_directory: The folder.
            config_file_name: The file; `generation_config.json` if not given.
            push_to_hub: Upload it too.
            kwargs: Arguments of `push_to_hub`; `repo_id` is the folder's name if not given.

        Raises:
            ValueError: it was changed since it was loaded and has settings that are wrong or without effect, or
                `save_directory` is a file.
            TypeError: a value has no JSON form.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory must be a folder, and {folder} is a file")
        changed = self._original_object_hash != hash(self)
        if changed:
            try:
                self.validate(strict=True)
            except ValueError as error:
                raise ValueError(f"{error}. Mend this before saving") from error
        name = config_file_name or GENERATION_CONFIG_NAME
        text = self.to_json_string(keys_to_pop=["compile_config"])
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, text)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or folder.name, config_file_name=str(name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config_file_name: str = GENERATION_CONFIG_NAME,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what was set to a Hub repository, which is made if need be; returns the commit's address."""
        return upload(
            self.to_json_string(keys_to_pop=["compile_config"]),
            config_file_name,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    # Two configurations with the same settings are equal, wherever they came from

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return NotImplemented
        return self._json(False, METADATA, lossy=True) == other._json(False, METADATA, lossy=True)

    def __hash__(self) -> int:
        return hash(self._json(True, METADATA, lossy=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self._json(True, METADATA, lossy=True)}"


def _normal(name: str, value: Any) -> Any:
    """`value` as plain data: nested settings as objects, arrays and their scalars as lists and numbers."""
    if name in _NESTED:
        kind, make = _NESTED[name]
        if value is None or isinstance(value, kind):
            return value
        values = value.to_dict() if hasattr(value, "to_dict") else value  # transformers' own classes
        if not isinstance(values, Mapping):
            raise TypeError(f"{name} must be a dict or a {kind.__name__}, not {value!r}")
        return make(values)
    if name not in _NAMES:
        return value
    if name == "json_schema":
        return plain_schema(value)
    if name == "sequence_bias" and isinstance(value, Mapping):
        return {_ids(key): bias for key, bias in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _ids(key: Any) -> Any:
    """The token ids of a `sequence_bias` key; older files write the tuple as text, "(5, 7)"."""
    if not isinstance(key, str):
        return key
    try:
        return tuple(int(part) for part in key.strip("()[] ").split(",") if part.strip())
    except ValueError:
        raise ValueError(f"sequence_bias has the key {key!r}, which is no tuple of token ids") from None


def _name_dtypes(values: dict[str, Any]) -> None:
    """Replace a `dtype` by its name, in nested dicts too."""
    for key, value in values.items():
        if isinstance(value, dict):
            _name_dtypes(value)
        elif key == "dtype" and value is not None and not isinstance(value, str):
            values[key] = str(value).rsplit(".", maxsplit=1)[-1]
