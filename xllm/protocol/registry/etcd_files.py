"""What proves to etcd who calls, from files: certificates, and a user with a password.

Invariant: a key or password that others on this machine may read is refused.
"""

from __future__ import annotations

import dataclasses
import os
import stat

from xllm.config.etcd import EtcdSettings
from xllm.config.exposure import is_loopback
from xllm.errors import ConfigError
from xllm.protocol.registry.etcd_address import EtcdAddress

MAX_FILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class EtcdSecrets:
    """Contents of the files, None where there is none. Never printed."""

    ca: bytes | None = dataclasses.field(default=None, repr=False)
    cert: bytes | None = dataclasses.field(default=None, repr=False)
    key: bytes | None = dataclasses.field(default=None, repr=False)
    user: str = ""
    password: str = dataclasses.field(default="", repr=False)


def check_etcd_settings(address: EtcdAddress, settings: EtcdSettings) -> None:
    """ConfigError where address and files do not go together, or a file cannot be used."""
    tls_files = {
        "ca_file": settings.ca_file,
        "cert_file": settings.cert_file,
        "key_file": settings.key_file,
    }
    given = [name for name, path in tls_files.items() if path]
    if given and not address.tls:
        raise ConfigError(
            f"etcd.{given[0]} is given, but {address} is without TLS: etcds:// has it",
            param=f"etcd.{given[0]}",
        )
    if bool(settings.cert_file) != bool(settings.key_file):
        missing = "key_file" if settings.cert_file else "cert_file"
        raise ConfigError(
            "etcd.cert_file and etcd.key_file belong together", param=f"etcd.{missing}"
        )
    if settings.user_file and not address.tls and not all(map(is_loopback, address.hosts)):
        raise ConfigError(
            f"etcd.user_file: a password is not sent to {address} in the clear; use etcds://",
            param="etcd.user_file",
        )
    read_etcd_secrets(settings)


def read_etcd_secrets(settings: EtcdSettings) -> EtcdSecrets:
    """What the files hold now; ConfigError names the one that cannot be used."""
    user, password = _read_user(settings.user_file) if settings.user_file else ("", "")
    return EtcdSecrets(
        ca=_read(settings.ca_file, "ca_file"),
        cert=_read(settings.cert_file, "cert_file"),
        key=_read(settings.key_file, "key_file", private=True),
        user=user,
        password=password,
    )


def _read_user(path: str) -> tuple[str, str]:
    data = _read(path, "user_file", private=True) or b""
    try:
        name, colon, password = data.decode().strip("\r\n").partition(":")
    except UnicodeDecodeError as error:
        raise _refused("user_file", f"{path} is not UTF-8") from error
    if not (name and colon and password) or "\n" in password:
        raise _refused("user_file", f"{path}: one line user:password is expected")
    return name, password


def _read(path: str, setting: str, *, private: bool = False) -> bytes | None:
    if not path:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(setting, f"{path}: {error.strerror}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise _refused(setting, f"{path} is not a regular file")
        if private and stat.S_IMODE(mode) & 0o077:
            raise _refused(setting, f"{path} may be read by others: its mode must be 0600")
        data = os.read(descriptor, MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_FILE_BYTES:
        raise _refused(setting, f"{path} is larger than {MAX_FILE_BYTES} bytes")
    return data


def _refused(setting: str, what: str) -> ConfigError:
    return ConfigError(f"etcd.{setting}: {what}", param=f"etcd.{setting}")
