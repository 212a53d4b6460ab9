"""Conversations to text through a checkpoint's chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["as_conversations", "choose_template", "render"]

# Names under which a message's reasoning is passed; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Appended to the message to be continued and looked for in the text. The space tells whether the template strips
# messages.
_MARK = "@@unspool-continue-here@@"

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def choose_template(own: str | Mapping[str, str] | None, asked: str | None, has_tools: bool) -> str:
    """The template to render.

    Args:
        own: The tokenizer's template, or several by name.
        asked: A template's name or text, from the caller.
        has_tools: Whether tools are passed; a template named `tool_use` is for them.

    Raises:
        ValueError: There is none, or none that is the default.
    """
    if isinstance(own, Mapping):
        if asked is not None:
            return own.get(asked, asked)
        for name in ("tool_use", "default") if has_tools else ("default",):
            if name in own:
                return own[name]
        raise ValueError(f"this tokenizer has chat templates {sorted(own)} and no default; name one as chat_template")
    template = asked if asked is not None else own
    if template is None:
        raise ValueError(
            "this tokenizer has no chat template; pass one as chat_template or set tokenizer.chat_template "
            "(a base model has none: give it text instead)"
        )
    return template


def as_conversations(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """A list of conversations, and whether several were passed.

    Messages become plain dictionaries. Keys whose value is `None` are left out, since many templates would print the
    word.

    Raises:
        ValueError: The conversation is empty.
        TypeError: It is not made of messages.
    """
    whole: Any = getattr(conversation, "messages", conversation)  # a transformers Chat
    if isinstance(whole, str | Mapping) or not isinstance(whole, Sequence):
        raise TypeError(
            f"conversation is a {type(whole).__name__}; it must be a list of messages "
            "such as {'role': 'user', 'content': 'Hello'}, or a list of such lists"
        )
    if len(whole) == 0:
        raise ValueError("conversation is empty; it must have at least one message")
    batched = isinstance(whole[0], list | tuple) or hasattr(whole[0], "messages")
    chats: list[Any] = [getattr(chat, "messages", chat) for chat in whole] if batched else [whole]
    return [[_message(message) for message in chat] for chat in chats], batched


def _message(message: Any) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise TypeError(
            f"a message is {message!r}; it must be a dictionary such as {{'role': 'user', 'content': 'Hello'}}"
        )
    plain = {key: value for key, value in plain.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy made of nothing but JSON types, so that a template meets no method of the caller's objects.

    Images, arrays and the like become their type's name in angle brackets: templates only ask whether they are there.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def render(
    template: str,
    conversations: list[list[dict[str, Any]]],
    *,
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    variables: Mapping[str, Any],
) -> list[str]:
    """The text of each conversation.

    Args:
        template: Jinja source.
        conversations: From `as_conversations`.
        tools: JSON schemas, or functions with type hints and a docstring.
        documents: Dictionaries for retrieval templates, usually with `title` and `text`.
        add_generation_prompt: Ask the template to open the assistant's turn.
        continue_final_message: Leave the last message open so that the model goes on with it: `True` for its `content`,
            or the name of another field.
        variables: What else the template sees, special tokens included.

    Raises:
        ValueError: The template is no valid Jinja, refuses the conversation, does what templates may not do or runs
            away.
    """
    if clash := _RESERVED & set(variables):
        raise ValueError(f"template variables {sorted(clash)} have arguments of their own; pass them as those")
    common = {
        "tools": None if tools is None else [_plain(_schema(tool)) for tool in tools],
        "documents": _documents(documents),
        "add_generation_prompt": add_generation_prompt,
        **{name: _plain(value) for name, value in variables.items()},
    }
    field = "content" if continue_final_message is True else continue_final_message
    texts = []
    for chat in conversations:
        if field:
            text = _run(template, {"messages": [*chat[:-1], _marked(chat, field)], **common})
            texts.append(_cut(text, chat))
        else:
            texts.append(_run(template, {"messages": chat, **common}))
    return texts


def _run(template: str, variables: dict[str, Any]) -> str:
    """Render a template in the sandbox; whatever goes wrong in it is a `ValueError`."""
    import jinja2

    from unspool.tokenization.sandbox import budget, compile_template

    try:
        with budget():
            return compile_template(template).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
    except RecursionError as error:
        raise ValueError("the chat template failed: it calls itself without end") from error
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"the chat template failed on this conversation: {error}") from error


def _schema(tool: Mapping[str, Any] | Callable[..., Any]) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        return tool
    from unspool.tokenization.tools import function_schema

    return function_schema(tool)


def _documents(documents: Sequence[Mapping[str, Any]] | None) -> Any:
    for document in documents or ():
        if not isinstance(document, Mapping):
            raise ValueError(
                f"documents holds {document!r}; each must be a dictionary such as {{'title': …, 'text': …}}"
            )
    return _plain(documents)


def _marked(chat: list[dict[str, Any]], field: str) -> dict[str, Any]:
    """The last message with a mark at the end of its field."""
    message = dict(chat[-1])
    value = message.get(field)
    if isinstance(value, list) and any("text" in part for part in value):
        at = max(index for index, part in enumerate(value) if "text" in part)
        message[field] = [*value[:at], {**value[at], "text": f"{value[at]['text']}{_MARK} "}, *value[at + 1 :]]
    elif isinstance(value, str):
        names = [name for name in _REASONING if message.get(name) == value] if field in _REASONING else [field]
        message |= dict.fromkeys(names, f"{value}{_MARK} ")
    else:
        raise ValueError(f"continue_final_message: the last message has no text in {field!r} to continue")
    return message


def _cut(text: str, chat: list[dict[str, Any]]) -> str:
    """`text` up to the mark. A template that strips messages has this one stripped too."""
    head, mark, tail = text.rpartition(_MARK)
    if not mark:
        raise ValueError(
            "continue_final_message: the chat template does not show the end of the last message "
            f"(role {chat[-1].get('role')!r}), so it cannot be continued"
        )
    return head if tail.startswith(" ") else head.rstrip()
