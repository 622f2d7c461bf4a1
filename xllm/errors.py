"""The exception tree. Each class says when you get it, its wire code and its HTTP status.

XllmError
├── ConfigError
│   └── NameTakenError
├── DependencyError
├── FencedError
├── InvariantError
├── RequestError
│   ├── AuthenticationError
│   ├── ConflictError
│   ├── ContextLengthError
│   ├── InvalidRequestError
│   ├── MethodNotAllowedError
│   ├── ModelNotFoundError
│   ├── NotFoundError
│   ├── PayloadTooLargeError
│   ├── PermissionDeniedError
│   └── UnsupportedMediaTypeError
├── ServiceError
│   ├── DeadlineError
│   ├── EngineError
│   │   └── DeviceLostError
│   ├── OverloadedError
│   │   └── RateLimitError
│   ├── RequestAbortedError
│   ├── UnavailableError
│   └── WorkerLostError
└── TransportError
    ├── BackpressureError
    ├── BadMessageError
    ├── BrokenError
    ├── ClosedError
    └── ListenError
"""

from __future__ import annotations


class XllmError(Exception):
    """The root: everything that xLLM raises on purpose."""

    code = "internal_error"
    http_status = 500
    exit_code = 70

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(XllmError):
    """A setting is missing, unknown or out of bounds. The process does not start."""

    code = "config_error"
    exit_code = 64


class NameTakenError(ConfigError):
    """Another living process has the name of this one, in the cluster or in its run directory."""

    code = "name_taken"


class DependencyError(XllmError):
    """A thing that xLLM needs to start is absent: a package, a device, a model, a peer."""

    code = "dependency_error"
    exit_code = 69


class FencedError(XllmError):
    """This process was replaced: its lease or epoch is no longer valid. Restart at once."""

    code = "fenced"
    exit_code = 75


class InvariantError(XllmError):
    """`check()` found state that cannot be: a bug in xLLM. The message tells the story."""

    code = "invariant_broken"


class RequestError(XllmError):
    """This request cannot be served as it was asked; asking again changes nothing."""

    code = "invalid_request"
    http_status = 400


class AuthenticationError(RequestError):
    """No key, or an unknown one, where keys are required."""

    code = "invalid_api_key"
    http_status = 401


class ConflictError(RequestError):
    """The request's id is already in use on this connection."""

    code = "conflict"
    http_status = 409


class ContextLengthError(RequestError):
    """Prompt and requested output do not fit the model's context or the instance's memory."""

    code = "context_length_exceeded"


class InvalidRequestError(RequestError):
    """A field has a wrong type or is out of its bound; `param` names it."""

    code = "invalid_value"


class MethodNotAllowedError(RequestError):
    """The path exists, the HTTP method does not."""

    code = "method_not_allowed"
    http_status = 405


class ModelNotFoundError(RequestError):
    """No model of that name is served here."""

    code = "model_not_found"
    http_status = 404


class NotFoundError(RequestError):
    """No such path, or no such request of this client."""

    code = "not_found"
    http_status = 404


class PayloadTooLargeError(RequestError):
    """The body, header or address is larger than its limit; reading stopped there."""

    code = "payload_too_large"
    http_status = 413


class PermissionDeniedError(RequestError):
    """The peer is known but may not do this."""

    code = "permission_denied"
    http_status = 403


class UnsupportedMediaTypeError(RequestError):
    """The body is not JSON, or is compressed."""

    code = "unsupported_media_type"
    http_status = 415


class ServiceError(XllmError):
    """The service failed the request; the same request may succeed later or elsewhere."""

    code = "service_error"
    http_status = 500


class DeadlineError(ServiceError):
    """The request's own deadline, or the client's timeout, passed first."""

    code = "deadline_exceeded"
    http_status = 504


class EngineError(ServiceError):
    """The engine failed this request while running it; others are unharmed."""

    code = "engine_error"


class DeviceLostError(EngineError):
    """A device failed and computes nothing any more: its worker ends, and its requests go on
    elsewhere."""

    code = "device_lost"


class OverloadedError(ServiceError):
    """A queue is full. `retry_after_s` says when to come back."""

    code = "overloaded"
    http_status = 429

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class RateLimitError(OverloadedError):
    """The tenant has used up what it may: requests or tokens a minute, or open requests.
    `retry_after_s` says when there will be more."""

    code = "rate_limit_exceeded"


class RequestAbortedError(ServiceError):
    """The request was aborted: by its client, or because the process drains."""

    code = "aborted"
    http_status = 499


class UnavailableError(ServiceError):
    """No instance that could serve the request is ready. `everywhere`: nor is there for any other
    router of the cluster, since the model is asleep."""

    code = "unavailable"
    http_status = 503

    def __init__(self, message: str, *, param: str | None = None, everywhere: bool = False) -> None:
        super().__init__(message, param=param)
        self.everywhere = everywhere


class WorkerLostError(ServiceError):
    """The worker ended in the midst of a step of this request. Routers move such a request on,
    once: clients get `engine_error` if it happens to it again."""

    code = "worker_lost"
    http_status = 503


class TransportError(XllmError):
    """A message could not be carried."""

    code = "transport_error"


class BackpressureError(TransportError):
    """The peer does not read as fast as we write, and the bounded queue to it is full."""

    code = "backpressure"


class BadMessageError(TransportError):
    """Bytes that are no message of this conversation: counted and answered, never raised past
    the edge."""

    code = "bad_message"
    http_status = 400


class BrokenError(TransportError):
    """The other side went away, or was never there."""

    code = "broken"
    http_status = 503


class ClosedError(TransportError):
    """You closed this socket, client or actor yourself and then used it."""

    code = "closed"


class ListenError(TransportError):
    """An address cannot be listened on: it is taken, not this machine's, or not permitted."""

    code = "cannot_listen"
    exit_code = 71


def error_classes() -> dict[str, type[XllmError]]:
    """Every class of the tree by wire code, for turning a received code into an exception."""
    found: dict[str, type[XllmError]] = {}
    todo: list[type[XllmError]] = [XllmError]
    while todo:
        cls = todo.pop()
        found[cls.code] = cls
        todo.extend(cls.__subclasses__())
    return found


def error_from_code(code: str, message: str, param: str | None = None) -> XllmError:
    """The exception a peer's error message stands for; an unknown code gives the root."""
    return error_classes().get(code, XllmError)(message, param=param)


def error_from_exit_code(code: int, message: str) -> XllmError:
    """The exception whose exit code a child's end stands for. Zero, a signal (negative) and a code
    that is none of ours give the root."""
    for cls in (ConfigError, DependencyError, FencedError, ListenError):
        if cls.exit_code == code:
            return cls(message)
    return XllmError(message)
