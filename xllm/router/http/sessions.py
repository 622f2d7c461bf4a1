"""Which session an HTTP request belongs to: a header, a field of its metadata, or its user.

Pure. The header comes first, for it is the one that proxies and gateways can set.
"""

from __future__ import annotations

import msgspec

from xllm.errors import InvalidRequestError
from xllm.router.http.schema import GenerationBody
from xllm.router.validation import MAX_SESSION_CHARS

METADATA_KEY = "session_id"


def session_of(body: GenerationBody, header: str, users_are_sessions: bool) -> str:
    """The session's name, or "". InvalidRequestError where it is no text, or too long."""
    name, session = "x-session-id", header
    if not session and body.metadata and METADATA_KEY in body.metadata:
        name = f"metadata.{METADATA_KEY}"
        try:
            session = msgspec.json.decode(body.metadata[METADATA_KEY], type=str)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"{name} must be a string", param=name) from error
    if not session and users_are_sessions and body.user:
        name, session = "user", body.user
    if len(session) > MAX_SESSION_CHARS:
        raise InvalidRequestError(
            f"{name} must have at most {MAX_SESSION_CHARS} characters", param=name
        )
    return session
