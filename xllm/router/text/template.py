"""Chat templates: a conversation to the text that the model was trained on.

A template comes from the model's directory and nowhere else, and runs in jinja2's immutable
sandbox, set up as `transformers` does it so that the text is the same. What it sees are plain
dicts, lists and strings.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xllm.errors import DependencyError, InvalidRequestError
from xllm.protocol.generation import ChatMessage
from xllm.router.text.model_files import read_object, read_text

TEMPLATE_KWARGS: Mapping[str, type] = {
    "add_generation_prompt": bool,
    "enable_thinking": bool,
    "thinking": bool,
    "reasoning_effort": str,
}
"""What clients may hand to a template. Anything else is refused: `transformers` would take
`tokenize` or `chat_template` from the same place."""

MAX_KWARG_CHARS = 64


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is its value."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled template with the model's special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise DependencyError(f"the model's chat template is no template: {error}") from error
        # As it comes it is a chain of dictionaries, which every rendering copies: half of its time.
        self._template.globals = dict(self._template.globals)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> str:
        """The conversation as text, with the prompt for an answer unless `kwargs` says no.

        InvalidRequestError where the template refuses the conversation."""
        variables: dict[str, Any] = {"add_generation_prompt": True}
        variables.update(self._special_tokens)
        variables.update(kwargs)
        variables.update(messages=[_plain(m) for m in messages], tools=None, documents=None)
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {str(error)[:200]}",
                param="messages",
            ) from error
        except (RecursionError, MemoryError, AttributeError) as error:
            raise InvalidRequestError(
                "the model's chat template cannot render these messages", param="messages"
            ) from error


def find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The template's source: `chat_template.jinja`, `chat_template.json`, or tokenizer_config's
    `chat_template` (a string, or a list of named ones of which `default` is taken).

    DependencyError names the file that cannot be read."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    found: Any = config.get("chat_template")
    path = directory / "chat_template.json"
    if found is None and path.is_file():
        found = read_object(path).get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((one.get("template") for one in named if one.get("name") == "default"), None)
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _plain(message: ChatMessage) -> dict[str, Any]:
    content = message.content
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if message.name:
        plain["name"] = message.name
    return plain


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
