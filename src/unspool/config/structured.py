"""What the generated text must be: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unspool.config.fields import GenerationFields

__all__ = ["STRUCTURES", "check_structured", "plain_schema"]

STRUCTURES = ("json_schema", "regex", "grammar")
"""The settings that say it; at most one of them may be set."""


def plain_schema(value: Any) -> dict[str, Any] | None:
    """A JSON schema as a dict.

    Args:
        value: A dict, JSON text, or anything with pydantic's `model_json_schema()`, such as a model class. The text
            then has the class's fields and no others, where the class does not say otherwise.

    Raises:
        TypeError: It is none of these, or JSON cannot hold it.
        ValueError: The text is not JSON.
    """
    if value is None:
        return None
    closed = hasattr(value, "model_json_schema")
    if closed:
        value = value.model_json_schema()
    try:
        # Text and back: the result is plain data of its own, which no later change of the caller's dict reaches.
        schema = json.loads(value if isinstance(value, str) else json.dumps(value, allow_nan=False))
    except RecursionError:
        raise ValueError("json_schema is nested too deeply; name its parts in $defs and refer to them") from None
    except (TypeError, ValueError) as error:
        if isinstance(value, str):
            raise ValueError(f"json_schema is not valid JSON text ({error})") from None
        raise TypeError(f"json_schema holds what JSON cannot hold ({error})") from None
    if not isinstance(schema, Mapping):
        raise TypeError(
            "json_schema must be a dict, JSON text of an object, or a class with model_json_schema(), "
            f"not {type(schema).__name__}"
        )
    if closed:
        _close(schema)
    return dict(schema)


def _close(schema: Any) -> None:
    """Allow no other properties in objects that name some and do not say whether there may be more."""
    parts = schema if isinstance(schema, list) else schema.values() if isinstance(schema, dict) else ()
    for part in parts:
        _close(part)
    if isinstance(schema, dict) and schema.get("type") == "object" and "properties" in schema:
        schema.setdefault("additionalProperties", False)


def check_structured(settings: GenerationFields) -> None:
    """Raise unless at most one structure is set, and is of the right type.

    Raises:
        TypeError: `regex` or `grammar` is not a str.
        ValueError: Two are set, or a grammar is empty.
    """
    named = [name for name in STRUCTURES if getattr(settings, name) is not None]
    if len(named) > 1:
        raise ValueError(f"{named[0]} and {named[1]} are both set; one text can follow one of them, so set one to None")
    for name in ("regex", "grammar"):
        value = getattr(settings, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a str, not {value!r}")
    if settings.grammar is not None and not settings.grammar.strip():
        raise ValueError("grammar is empty; it needs a rule named start")
