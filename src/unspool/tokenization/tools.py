"""Functions as tools: the JSON schema of a Python function, from its type hints and its Google-style docstring."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

__all__ = ["function_schema"]

_TYPES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Examples?):[ \t]*$", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function as chat templates expect a tool.

    Args:
        function: A function or method. Each parameter needs a type hint and a line under `Args:` in the docstring; a
            line may end in `(choices: ["a", "b"])`.

    Returns:
        `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`.

    Raises:
        TypeError: It is not a function, or a hint has no JSON equivalent.
        ValueError: A hint or a description is missing.
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise TypeError(f"a tool is {function!r}; pass a JSON schema (a dictionary) or a function")
    name = function.__name__
    doc = inspect.getdoc(function)
    if not doc:
        raise ValueError(f"tool {name!r} has no docstring; describe it, and each parameter under 'Args:'")
    summary, described, returned = _read_docstring(doc)
    hints = typing.get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in hints:
            raise ValueError(f"tool {name!r}: parameter {parameter.name!r} has no type hint")
        if parameter.name not in described:
            raise ValueError(f"tool {name!r}: parameter {parameter.name!r} is not described under 'Args:'")
        properties[parameter.name] = _described(hint_schema(hints[parameter.name]), described[parameter.name])
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    schema: dict[str, Any] = {"name": name, "description": summary, "parameters": parameters}
    if "return" in hints and returned is not None:
        schema["return"] = {**hint_schema(hints["return"]), "description": returned}
    return {"type": "function", "function": schema}


def _described(schema: dict[str, Any], description: str) -> dict[str, Any]:
    choices = _CHOICES.search(description)
    if choices:
        schema["enum"] = [item.strip() if isinstance(item, str) else item for item in json.loads(choices[1])]
        description = description[: choices.start()].strip()
    return {**schema, "description": description}


def _read_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """The text before the sections, the entries under `Args:`, and what is under `Returns:`."""
    parts = _SECTION.split(doc)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    entries: dict[str, str] = {}
    name = ""
    lines = [line for line in inspect.cleandoc(sections.get("Args", "")).splitlines() if line.strip()]
    for line in lines:
        entry = _ENTRY.match(line)
        if entry:
            name = entry[1]
            entries[name] = entry[2].strip()
        elif name:
            entries[name] = f"{entries[name]} {line.strip()}"
    returned = " ".join(sections["Returns"].split()) if "Returns" in sections else None
    return parts[0].strip(), entries, returned


def hint_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint.

    Raises:
        TypeError: There is none.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _enumeration(list(args))
    if origin in (typing.Union, types.UnionType):
        return _union(args)
    if origin in (list, tuple, dict):
        return _container(origin, args)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enumeration([member.value for member in hint])
    if hint is Any:
        return {}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    raise TypeError(f"the type hint {hint!r} has no JSON schema; use basic types, or pass the tool's schema yourself")


def _container(origin: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    if origin is list and args:
        return {"type": "array", "items": hint_schema(args[0])}
    if origin is tuple and args:
        if ... in args or len(args) == 1:
            raise TypeError(f"the type hint tuple{list(args)} has no JSON schema; use list[...]")
        return {"type": "array", "prefixItems": [hint_schema(item) for item in args]}
    if origin is dict and len(args) == 2:
        return {"type": "object", "additionalProperties": hint_schema(args[1])}
    return {"type": _TYPES[origin]}


def _union(args: tuple[Any, ...]) -> dict[str, Any]:
    members = [hint_schema(item) for item in args if item is not type(None)]
    if len(members) == 1:
        schema = members[0]
    elif all(set(member) == {"type"} for member in members):
        names = sorted({member["type"] for member in members})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": members}
    return {**schema, "nullable": True} if type(None) in args else schema


def _enumeration(values: list[Any]) -> dict[str, Any]:
    unknown = [value for value in values if type(value) not in _TYPES or isinstance(value, list | tuple | dict)]
    if unknown or not values:
        raise TypeError(f"the values {values} cannot be an enumeration in JSON")
    names = list(dict.fromkeys(_TYPES[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
