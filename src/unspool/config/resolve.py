"""One configuration for a call, from the four places that settings come from.

    the call's keyword arguments  >  the GenerationConfig object passed  >  the model's generation_config  >  defaults

The order is decided field by field: a field that the object leaves at `None` is filled from the model's
generation_config and then from the defaults, as in transformers. An explicit `None` in the call switches a setting off
(`top_k=None` keeps all tokens, whatever the model's file says); fields that must have a value get their default.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from unspool.config.checks import check_complete
from unspool.config.defaults import default_generation_params
from unspool.config.fields import FIELDS
from unspool.config.generation import GenerationConfig
from unspool.config.notice import warn_once

__all__ = ["Resolved", "as_generation_config", "resolve"]

_NEVER_NONE = frozenset(
    (
        "max_length",
        "min_length",
        "do_sample",
        "use_cache",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "length_penalty",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "remove_invalid_values",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_lookbehind",
        "target_lookbehind",
    )
)
"""Fields for which `None` means nothing, so that an explicit `None` is the default."""


# Values that nobody can change, so that they need no copy.
_FIXED = (bool, int, float, str)


@dataclass(frozen=True)
class Resolved:
    """The settings of one call."""

    config: GenerationConfig
    """A new configuration with every field filled; `None` means off."""
    unused: dict[str, Any]
    """Keyword arguments that are no settings: the model's inputs."""
    sources: dict[str, str]
    """For each setting `"call"`, `"object"`, `"model"` or `"default"`."""

    def caller_set(self, name: str) -> bool:
        """Whether the caller, rather than the model's file or a default, gave this setting its value."""
        return self.sources.get(name) in ("call", "object")


def resolve(
    call_kwargs: Mapping[str, Any],
    config_object: GenerationConfig | Mapping[str, Any] | None = None,
    model_config: GenerationConfig | Mapping[str, Any] | None = None,
) -> Resolved:
    """Merge the settings of a call. No argument is changed.

    Args:
        call_kwargs: The call's keyword arguments, settings and model inputs together.
        config_object: The configuration passed to the call; a dict or transformers' own class will do.
        model_config: The model's generation configuration.

    Raises:
        ValueError, TypeError: the result is wrong or contradicts itself.
    """
    passed = as_generation_config("generation_config", config_object)
    model = as_generation_config("the model's generation_config", model_config)
    base = GenerationConfig() if passed is None else passed
    config = copy(base)
    defaults = default_generation_params()
    extras = [key for one in (base, model) if one is not None for key in vars(one) if _is_extra(key)]
    sources: dict[str, str] = {}
    for name in dict.fromkeys((*FIELDS, *extras)):
        value, sources[name] = _pick(name, base, model, defaults)
        setattr(config, name, value if value is None or isinstance(value, _FIXED) else deepcopy(value))
    # a cache that old releases wrote into the files of models with sliding windows; those need none of their own
    if config.cache_implementation == "hybrid" and call_kwargs.get("cache_implementation") is None:
        config.cache_implementation = None

    used = {key: value for key, value in call_kwargs.items() if key in sources}
    sources.update(dict.fromkeys(used, "call"))
    for key, value in used.items():
        config._set(key, value)
        if value is None and key in _NEVER_NONE:
            setattr(config, key, defaults[key])
            sources[key] = "default"
    config._sources, config._original_object_hash = sources, None
    caller = {*used, *_set_by_hand(passed)}
    if passed is not None:
        _mention_misspelt(passed)
    config.validate(user_set_attributes=caller)
    check_complete(config, caller)
    unused = {key: value for key, value in call_kwargs.items() if key not in used}
    return Resolved(config, unused, sources)


def as_generation_config(name: str, value: Any) -> GenerationConfig | None:
    """`value` as a `GenerationConfig`; dicts and objects with `to_dict()` are converted, `None` stays.

    Raises:
        TypeError: it is none of these; the message calls it `name`.
    """
    if value is None or isinstance(value, GenerationConfig):
        return value
    values = value.to_dict() if hasattr(value, "to_dict") else value
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a GenerationConfig or a dict, not {type(value).__name__}")
    config: GenerationConfig = GenerationConfig.from_dict(values)
    # an object of another class tells nothing about files: its values are the caller's
    config._original_object_hash = None
    return config


def _is_extra(name: str) -> bool:
    return name not in FIELDS and not name.startswith("_") and name != "transformers_version"


def _pick(
    name: str, passed: GenerationConfig, model: GenerationConfig | None, defaults: Mapping[str, Any]
) -> tuple[Any, str]:
    for one, source in ((passed, "object"), (model, "model")):
        if (value := getattr(one, name, None)) is not None:
            return value, source
    return defaults.get(name), "default"


def _set_by_hand(config: GenerationConfig | None) -> set[str]:
    """The fields of an object that its user set; none when it is just as it was loaded from a file."""
    if config is None or config._original_object_hash == hash(config):
        return set()
    return {name for name in FIELDS if getattr(config, name) is not None}


def _mention_misspelt(config: GenerationConfig) -> None:
    """Remark on entries of a caller's object that are no settings and are called almost like one."""
    for name in vars(config):
        near = get_close_matches(name, FIELDS, 1, 0.85) if _is_extra(name) else []
        if near:
            warn_once(f"generation_config has an entry {name}, which is no setting; did you mean {near[0]}?")
