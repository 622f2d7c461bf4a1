"""Rights of sockets' files and of lists of keys: what others may write is not believed."""

from __future__ import annotations

import os

import pytest

from tests.security.keyed_peers import Nodes, run
from tests.security.socket_words import BOTH
from xllm.errors import ConfigError, ListenError
from xllm.protocol.authority import PeerRole
from xllm.protocol.transport.allow_list import CLUSTER_DOMAIN
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket
from xllm.protocol.transport.security import Security


def test_ipc_sockets_are_the_users_alone_wherever_they_lie(tmp_path):

    async def main():
        transport = Transport()
        router = RouterSocket(transport, f"ipc://{tmp_path}/s", BOTH, lambda i, m, f: None)
        assert os.stat(tmp_path / "s").st_mode & 0o077 == 0
        # A link in the way of the lock is not followed, one in the way of the socket is replaced.
        (tmp_path / "victim").write_text("mine")
        (tmp_path / "t.lock").symlink_to(tmp_path / "victim")
        with pytest.raises(ListenError):
            RouterSocket(transport, f"ipc://{tmp_path}/t", BOTH, lambda i, m, f: None)
        (tmp_path / "u").symlink_to(tmp_path / "victim")
        other = RouterSocket(transport, f"ipc://{tmp_path}/u", BOTH, lambda i, m, f: None)
        assert (tmp_path / "victim").read_text() == "mine"
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        open_to_all.chmod(0o777)
        with pytest.raises(ConfigError, match="everybody"):
            RouterSocket(transport, f"ipc://{open_to_all}/s", BOTH, lambda i, m, f: None)
        for thing in (router, other, transport):
            thing.close()

    run(main())


@pytest.mark.parametrize("folder", ["allowed", "clients"])
def test_lists_that_others_may_write_are_refused(tmp_path, folder):
    """An empty one, too: somebody else may be the first to write there."""
    nodes = Nodes(tmp_path)
    path = tmp_path / "server" / folder
    path.mkdir(exist_ok=True)
    os.chmod(path, 0o777)
    with pytest.raises(ConfigError, match="written by others"):
        Transport(Security.load(nodes.server_dir))


def test_a_list_that_others_may_write_by_now_admits_nobody_new(tmp_path):
    nodes = Nodes(tmp_path)
    known, gone = nodes.admit("known", "router"), nodes.admit("gone", "router")
    transport = Transport(Security.load(nodes.server_dir))
    try:
        folder = tmp_path / "server" / "allowed"
        os.chmod(folder, 0o777)
        nodes.admit("known", "router", "master")
        new = nodes.admit("new", "router")
        nodes.revoke("gone")
        transport.refresh_keys()
        # Who raised himself to more is nobody until the list is ours again.
        assert transport.peer(known, CLUSTER_DOMAIN) is None
        assert transport.peer(new, CLUSTER_DOMAIN) is None
        assert transport.peer(gone, CLUSTER_DOMAIN) is None
        nodes.admit("known", "router")
        transport.refresh_keys()
        os.chmod(folder, 0o700)
        transport.refresh_keys()
        assert transport.peer(known, CLUSTER_DOMAIN).roles == {PeerRole.ROUTER}
        assert transport.peer(new, CLUSTER_DOMAIN) is not None
    finally:
        transport.close()
