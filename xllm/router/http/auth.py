"""Who asks: API keys, and which requests may enter at all.

Knows header bytes and paths, no requests. Invariant: with a key file, every path but the public
one needs a key (deny by default, decided on the path that routing uses); without one, only a
loopback client with a Host that no DNS name can forge enters.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Sequence

import structlog

from xllm.config.exposure import is_loopback
from xllm.errors import AuthenticationError, ConfigError, InvalidRequestError, PermissionDeniedError
from xllm.router.front import Tenant

PUBLIC_PATHS = frozenset({"/health/live"})
MAX_KEY_FILE_BYTES = 1 << 20
MIN_KEY_CHARS = 16
MAX_KNOWN_HOSTS = 64
SALT_LABEL = b"xllm tenant salt v1"

Header = tuple[bytes, bytes]
FileMark = tuple[int, int, int, int]

_log = structlog.get_logger("api_keys")


class KeyFile:
    """The key file while it is in use: a key that leaves it opens nothing more."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._mark = _mark_of(path)
        self.tenants = read_key_file(path)

    def refresh(self) -> bool:
        """Read it again if it changed; whether it did. A file that cannot be read, or has a line
        that is none, leaves the keys as they were; one without keys opens to nobody."""
        mark = _mark_of(self._path)
        if mark == self._mark:
            return False
        self._mark = mark
        try:
            self.tenants = read_key_file(self._path, may_be_empty=True)
        except ConfigError as error:
            _log.error("api_keys_unreadable", error=error.message)
            return False
        _log.info("api_keys_changed", num_keys=len(self.tenants))
        return True


def _mark_of(path: str) -> FileMark | None:
    """What changes with a file's content; None where it cannot be seen."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino


def read_key_file(path: str, *, may_be_empty: bool = False) -> dict[bytes, Tenant]:
    """Tenants by the SHA-256 of their keys, from `name:key` lines of a private file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise _bad_file(f"{path}: {error.strerror}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) or stat.S_IMODE(mode) & 0o077:
            raise _bad_file(f"{path} must be a regular file of mode 0600")
        data = os.read(descriptor, MAX_KEY_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise _bad_file(f"{path} is larger than {MAX_KEY_FILE_BYTES} bytes")
    tenants: dict[bytes, Tenant] = {}
    salts: dict[bytes, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        name, colon, key = (part.strip() for part in text.partition(b":"))
        if not colon or not name or not name.isascii() or len(key) < MIN_KEY_CHARS:
            raise _bad_file(f"{path}, line {number}: name:key with {MIN_KEY_CHARS} characters")
        digest = hashlib.sha256(key).digest()
        if digest in tenants:
            raise _bad_file(f"{path}, line {number}: the key is in use above")
        # A name's later keys share the salt of its first: they are one tenant.
        salt = salts.setdefault(name, hmac.digest(key, SALT_LABEL + name, "sha256"))
        tenants[digest] = Tenant(name.decode("ascii"), salt)
    if not tenants and not may_be_empty:
        raise _bad_file(f"{path} holds no key")
    return tenants


def _bad_file(message: str) -> ConfigError:
    return ConfigError(f"router.api_key_file: {message}", param="router.api_key_file")


class Gate:
    """Decides for each request whether it may enter, and as whom."""

    def __init__(self, tenants: dict[bytes, Tenant]) -> None:
        self._needs_key = bool(tenants)
        self._tenants = list(tenants.items())
        self._known_hosts: set[bytes] = set()
        self._anyone = Tenant()
        self._last_client = ""

    @property
    def has_keys(self) -> bool:
        """Whether keys are required."""
        return self._needs_key

    def replace(self, tenants: dict[bytes, Tenant]) -> None:
        """The keys changed. A gate that needs one stays so, even where none is left."""
        self._tenants = list(tenants.items())

    def admit(self, path: str, headers: Sequence[Header], client: str) -> Tenant:
        """The tenant of a request, or an error. `client` is the peer's address."""
        if path in PUBLIC_PATHS:
            return self._anyone
        if self._needs_key:
            return self._tenant_of(headers)
        self._check_host(headers)
        if client != self._last_client:
            if client and not is_loopback(client):
                raise PermissionDeniedError("without API keys only local clients are served")
            self._last_client = client
        return self._anyone

    def _tenant_of(self, headers: Sequence[Header]) -> Tenant:
        values = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        found: Tenant | None = None
        for known, tenant in self._tenants:
            # All keys are compared, each in constant time: time tells nothing of where one lies.
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None or scheme.lower() != b"bearer":
            raise AuthenticationError("a valid API key is needed: Authorization: Bearer KEY")
        return found

    def _check_host(self, headers: Sequence[Header]) -> None:
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) == 1 and hosts[0] in self._known_hosts:
            return
        if len(hosts) > 1:
            raise InvalidRequestError("more than one Host header", param="host")
        if not hosts:
            return  # HTTP/1.0 only; the protocol refuses a newer request without Host
        if not is_plain_host(hosts[0]):
            # A web page can give its own name our address, and then read our answers.
            raise PermissionDeniedError("Host must be localhost or an IP address", param="host")
        if len(self._known_hosts) < MAX_KNOWN_HOSTS:
            self._known_hosts.add(hosts[0])


def is_plain_host(value: bytes) -> bool:
    """Whether a Host header names localhost or an IP address, with or without a port."""
    try:
        text = value.decode("ascii").lower()
    except UnicodeDecodeError:
        return False
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return False
        port = port[1:]
    else:
        host, _, port = text.partition(":")
    if port and not (port.isdigit() and len(port) <= 5):
        return False
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
