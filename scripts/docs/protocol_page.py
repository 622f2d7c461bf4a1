"""The reference part of docs/protocol.md, from the message classes and their golden bytes."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
import typing
from typing import Any

import msgspec

from scripts.docs.examples import members
from scripts.docs.golden import read_golden
from xllm.protocol import client, generation, questions, sampling

_PLAIN = {str: "str", int: "int", float: "float", bool: "bool", bytes: "bin", Any: "anything"}

_NOTES = {
    "id": "The client's number of the request.",
    "model": "Name of the model.",
    "prompt": "Text or token ids.",
    "messages": "A conversation, rendered by the model's chat template.",
    "chat_template_kwargs": "Arguments of the chat template.",
    "sampling": "How tokens are drawn.",
    "resume": "What is already there of a request that another router lost.",
    "traceparent": "W3C trace context.",
    "text": "Text.",
    "token_ids": "Token ids.",
    "choice": "Index of the choice.",
    "index": "Index of the choice.",
    "attempt": "Number of the request's try.",
    "first_index": "Place of the first of `token_ids` in the choice's output.",
    "logprobs": "One entry a token, if asked for.",
    "prompt_logprobs": "One entry a prompt token, nil for the first, if asked for.",
    "request_id": "The server's name of the request: 32 hexadecimal digits.",
    "choices": "How each choice ended.",
    "usage": "Token counts.",
    "seed": "The seed in use.",
    "code": "What went wrong, see [error codes](#error-codes).",
    "message": "The same for people.",
    "param": "The field that is wrong.",
    "retry_after_ms": "When to come back; 0: no hint.",
    "models": "The models served.",
    "live": "The router runs.",
    "ready": "Requests can be served.",
    "degraded": "What is missing, one word each.",
    "version": "xLLM's version.",
    "processes": "The cluster as the router sees it.",
    "max_model_len": "Longest prompt and output together.",
    "probe": "Send one token through the data path first.",
    "add_special_tokens": "Add what the tokenizer puts around a text.",
    "finish_reason": "stop, length or abort.",
    "role": "system, user, assistant, ...",
    "content": "Text, or parts of which only text is accepted at present.",
    "outputs": "Token ids received, by choice.",
    "heartbeat_age_ms": "Time since the process was last heard.",
}
"""What is clear from a class's docstring in the source and still wants a word in a table."""


def type_words(hint: Any) -> str:
    """A type in the words of MessagePack."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [type_words(part) for part in parts if part is not type(None)]
        return " or ".join([*words, "nil"] if type(None) in parts else words)
    if origin is tuple:
        return f"array of {type_words(parts[0])}"
    if origin is dict:
        return f"map of {type_words(parts[0])} to {type_words(parts[1])}"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return _PLAIN[hint]


def field_notes(cls: type) -> dict[str, str]:
    """The sentence that stands under each field in the source."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    notes: dict[str, str] = {}
    name = ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            notes[name] = " ".join(str(node.value.value).split())
            name = ""
    return notes


def _default_words(field: Any) -> str:
    if field.required:
        return "required"
    default = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        default = field.default_factory()
    if isinstance(default, msgspec.Struct):
        return "all defaults"
    words = {None: "nil", True: "true", False: "false"}
    if default is None or isinstance(default, bool):
        return f"`{words[default]}`"
    if default == ():
        return "`[]`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


def _first_words(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def class_section(cls: type[msgspec.Struct]) -> list[str]:
    """Heading, meaning and field table of one class."""
    tag = cls.__struct_config__.tag
    lines = [f"### {cls.__name__}", "", _first_words(cls), ""]
    if tag is not None:
        lines += [f'`type`: `"{tag}"`', ""]
    notes, hints = field_notes(cls), typing.get_type_hints(cls)
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(cls):
        note = notes.get(field.name) or _NOTES.get(field.name, "")
        words = type_words(hints[field.name])
        lines.append(f"| `{field.name}` | {words} | {_default_words(field)} | {note} |")
    return [*lines, ""]


def _golden_lines(name: str) -> list[str]:
    label = {"typical": "Example", "full": "All fields set", "minimal": "Fewest fields"}
    lines = []
    for entry in read_golden():
        if entry["message"] != name or not entry["conversation"].startswith("client."):
            continue
        shown = json.dumps(
            msgspec.msgpack.decode(bytes.fromhex(entry["hex"])),
            ensure_ascii=False,
            default=lambda binary: {"bytes": binary.hex()},
        )
        lines += [f"{label[entry['shape']]}:", "", "```", *textwrap.wrap(shown, 96), ""]
        lines += [*_wrapped(entry["hex"]), "```", ""]
    return lines


def _wrapped(text: str) -> list[str]:
    return [text[start : start + 96] for start in range(0, len(text), 96)]


def _parts() -> list[type[msgspec.Struct]]:
    found = []
    for module in (generation, questions, sampling):
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, msgspec.Struct)
                and value.__module__ == module.__name__
                and value.__struct_config__.tag is None
            ):
                found.append(value)
    return found


def protocol_reference() -> str:
    """Everything between the markers of docs/protocol.md."""
    lines = ["## From client to router", ""]
    for cls in members(client.ClientMessage):
        lines += class_section(cls) + _golden_lines(cls.__name__)
    lines += ["## From router to client", ""]
    for cls in members(client.RouterMessage):
        lines += class_section(cls) + _golden_lines(cls.__name__)
    lines += ["## Parts of messages", "", "Maps without a `type`.", ""]
    for cls in _parts():
        lines += class_section(cls)
    return "\n".join(lines).rstrip() + "\n"
