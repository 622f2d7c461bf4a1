"""What the processes of a service listen on, as the kernel says it."""

from __future__ import annotations

import os
import pathlib
import socket
import struct
from collections.abc import Iterable

_LISTENS = "0A"
_ACCEPTS = 0x00010000


def sockets_of(pids: Iterable[int]) -> set[str]:
    """Inodes of the sockets that these processes have."""
    found = set()
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        for name in os.listdir(folder):
            try:
                target = os.readlink(f"{folder}/{name}")
            except FileNotFoundError:
                continue  # closed since
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def tcp_listeners(pids: Iterable[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that listens."""
    inodes = sockets_of(pids)
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                packed = struct.pack(f"={len(words)}I", *words)
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


def udp_sockets(pids: Iterable[int]) -> list[str]:
    """Lines of the UDP and raw sockets that these processes have."""
    inodes = sockets_of(pids)
    lines = []
    for table in ("udp", "udp6", "raw", "raw6"):
        text = pathlib.Path(f"/proc/net/{table}").read_text()
        lines += [line for line in text.splitlines()[1:] if line.split()[9] in inodes]
    return lines


def unix_listeners(pids: Iterable[int]) -> set[str]:
    """Paths of every unix socket that listens; "@..." for one without a file."""
    inodes = sockets_of(pids)
    found = set()
    for line in pathlib.Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if int(fields[3], 16) & _ACCEPTS and fields[6] in inodes:
            found.add(fields[7] if len(fields) > 7 else "")
    return found
