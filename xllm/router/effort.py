"""Which work would keep the loop waiting: it goes to a thread.

Pure sizes, no times: each bound is about half a millisecond of one core.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.protocol.generation import ChatMessage, SubmitRequest
from xllm.protocol.token_bytes import TOKEN_BYTES

LONG_TEXT_CHARS = 4096
LONG_TALK_MESSAGES = 64
LONG_IDS = 4096
"""Token ids to hash, or to turn into text."""


def is_long_request(request: SubmitRequest) -> bool:
    """Whether a request's own text and ids are much work."""
    if len(request.packed_prompt) > LONG_IDS * TOKEN_BYTES:
        return True
    prompt = request.prompt
    if prompt is not None:
        if len(prompt) > (LONG_TEXT_CHARS if isinstance(prompt, str) else LONG_IDS):
            return True
    elif request.messages is not None and is_long_talk(request.messages):
        return True
    resume = request.resume
    return resume is not None and sum(map(len, resume.outputs)) > LONG_IDS


def is_long_text(text: str) -> bool:
    """Whether encoding a text is much work."""
    return len(text) > LONG_TEXT_CHARS


def is_long_talk(messages: Sequence[ChatMessage]) -> bool:
    """Whether rendering and encoding a conversation is much work."""
    if len(messages) > LONG_TALK_MESSAGES:
        return True
    num_chars = 0
    for message in messages:
        content = message.content
        num_chars += len(message.name)
        if isinstance(content, str):
            num_chars += len(content)
        else:
            num_chars += sum(len(part.text) + 1 for part in content)
    return num_chars > LONG_TEXT_CHARS
