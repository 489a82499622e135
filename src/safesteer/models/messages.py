"""Conversations as people and clients write them -> chat messages as templates take them.

As vLLM's server has it: no content is an empty text, parts are texts, the arguments of tool calls are mappings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.files import RepeatedKeyError, parse_json
from safesteer.prompts.reading import TEXT_PARTS

Message = Mapping[str, Any]
"""`role`; `content`: text, a list of text parts, or None; and what templates know (`tool_calls`, `tool_call_id`, `name`, ...)."""
Conversation = str | Sequence[Message]


def messages_of(conversation: Conversation, system: str | None = None) -> list[dict[str, Any]]:
    """A list of chat messages; a plain string is one user message. `content` becomes text, or a list of several texts.

    Raises `SafeSteerError` for what is no message, parts other than text, and a conversation that leaves nothing to answer.
    """
    given = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
    messages = [_message(one, f"message {place} of the conversation") for place, one in enumerate(given, 1)]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise SafeSteerError("a conversation must end with a message of the user, or with a tool's result")
    return [{"role": "system", "content": system}, *messages] if system else messages


def texts_in(value: Any) -> Iterator[str]:
    """Every text within a value made of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from texts_in(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from texts_in(one)


def _message(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise SafeSteerError(f'{name} is none; write {{"role": "user", "content": "..."}}')
    message = {key: value for key, value in given.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [_part(part, name) for part in content]
        content = parts if len(parts) > 1 else "".join(parts)
    elif not isinstance(content, str):
        raise SafeSteerError(f"{name}: the content is neither text nor a list of text parts")
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [_call(call, name) for call in calls]
    message["content"] = content
    try:
        "".join(texts_in(message)).encode("utf-8")
    except UnicodeEncodeError:
        raise SafeSteerError("the prompt holds half a character (an unpaired surrogate); mend the text") from None
    return message


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise SafeSteerError(f"{name} holds a part of the type {kind!r}, and only text is read here; leave it out")
    return str(part["text"])


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise SafeSteerError(f"{name} holds a tool call without the name of its function")
    arguments = function.get("arguments") or {}
    try:
        arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
    except RepeatedKeyError as error:
        raise SafeSteerError(f"{name}: in the arguments of the tool call {function['name']!r}, {error}") from None
    except ValueError:
        raise SafeSteerError(f"{name}: the arguments of the tool call {function['name']!r} are not JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}
