"""Who may speak to etcd: TLS with client certificates, users, and files that are refused."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.registry.etcd_server import make_files, one_etcd
from tests.registry.watcher import Told, run, until
from xllm.config.etcd import EtcdSettings
from xllm.errors import BrokenError, ConfigError, PermissionDeniedError
from xllm.protocol.registry.etcd import EtcdRegistry
from xllm.protocol.registry.etcd_address import is_etcd, parse_etcd_address
from xllm.protocol.registry.etcd_files import check_etcd_settings, read_etcd_secrets

PASSWORD = "a-pass:word"


# -- addresses and files -----------------------------------------------------------------------


def test_addresses():
    address = parse_etcd_address("etcd://10.0.0.1:2379,db.example:2380, [::1]:2381")
    assert address.endpoints == ("10.0.0.1:2379", "db.example:2380", "[::1]:2381")
    assert address.hosts == ("10.0.0.1", "db.example", "[::1]")
    assert not address.tls
    assert parse_etcd_address("etcds://a:1").tls
    assert str(parse_etcd_address("etcds://a:1,b:2")) == "etcds://a:1,b:2"
    assert is_etcd("etcd://a:1")
    assert not is_etcd("tcp://a:1")


@pytest.mark.parametrize(
    "rest", ["", "host", "host:", "host:0", "host:65536", "a:1,", "a:1,,b:2", "u@h:1", "h:1/x"]
)
def test_malformed_addresses_are_named(rest):
    with pytest.raises(ConfigError, match="is not host:port") as caught:
        parse_etcd_address(f"etcd://{rest}")
    assert caught.value.param == "cluster.registry"


def private(path, text, mode=0o600):
    path.write_text(text)
    os.chmod(path, mode)
    return str(path)


def test_a_password_is_read_whole(tmp_path):
    path = private(tmp_path / "user", f"xllm:{PASSWORD}\n")
    secrets = read_etcd_secrets(EtcdSettings(user_file=path))
    assert (secrets.user, secrets.password) == ("xllm", PASSWORD)
    assert PASSWORD not in repr(secrets)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o660])
@pytest.mark.parametrize("name", ["user_file", "key_file"])
def test_secrets_that_others_may_read_are_refused(tmp_path, name, mode):
    path = private(tmp_path / "secret", "xllm:password", mode)
    with pytest.raises(ConfigError, match="its mode must be 0600") as caught:
        read_etcd_secrets(EtcdSettings(**{name: path}))
    assert caught.value.param == f"etcd.{name}"


@pytest.mark.parametrize("text", ["", "xllm", "xllm:", ":password", "a:b\nc:d"])
def test_a_malformed_user_file_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="user:password") as caught:
        read_etcd_secrets(EtcdSettings(user_file=private(tmp_path / "user", text)))
    assert "password" not in caught.value.message.replace("user:password", "")


@pytest.mark.parametrize(
    ("address", "given", "param"),
    [
        ("etcd://127.0.0.1:1", {"ca_file": "x"}, "etcd.ca_file"),
        ("etcds://127.0.0.1:1", {"cert_file": "x"}, "etcd.key_file"),
        ("etcds://127.0.0.1:1", {"key_file": "x"}, "etcd.cert_file"),
        ("etcd://10.0.0.1:1", {"user_file": "x"}, "etcd.user_file"),
        ("etcds://10.0.0.1:1", {"ca_file": "/nowhere"}, "etcd.ca_file"),
        ("etcds://10.0.0.1:1", {"ca_file": "/tmp"}, "etcd.ca_file"),
    ],
)
def test_settings_that_do_not_go_together(address, given, param):
    with pytest.raises(ConfigError) as caught:
        check_etcd_settings(parse_etcd_address(address), EtcdSettings(**given))
    assert caught.value.param == param


# -- a server that asks who calls --------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Certificates of an authority."""
    return make_files(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def guarded(files, tmp_path_factory):
    """An etcd with TLS, client certificates and users; its tokens live 2 s."""
    folder = tmp_path_factory.mktemp("guarded")
    with one_etcd(folder, "--auth-token-ttl", "2", "--bcrypt-cost", "4", files=files) as member:
        for command in (
            ["user", "add", "root:root"],
            ["user", "grant-role", "root", "root"],
            ["role", "add", "xllm"],
            ["role", "grant-permission", "xllm", "--prefix=true", "readwrite", "/xllm/"],
            ["user", "add", f"xllm:{PASSWORD}"],
            ["user", "grant-role", "xllm", "xllm"],
            ["auth", "enable"],
        ):
            member.ctl(*command)
        yield member


@pytest.fixture
def settings(files, tmp_path):
    """How xLLM reaches it."""
    return EtcdSettings(
        ca_file=files.ca,
        cert_file=files.client_cert,
        key_file=files.client_key,
        user_file=private(tmp_path / "user", f"xllm:{PASSWORD}"),
    )


def replaced(settings, **changes):
    return EtcdSettings(**{**vars(settings), **changes})


async def opened_and_asked(server, settings):
    registry = EtcdRegistry(parse_etcd_address(server.address), settings, timeout_s=3.0)
    try:
        return await registry.get("/xllm/a")
    finally:
        await registry.close()


@pytest.mark.process
@pytest.mark.etcd
def test_with_certificate_and_user_everything_works(guarded, settings):
    async def main():
        registry = EtcdRegistry(parse_etcd_address(guarded.address), settings)
        told = Told()
        await registry.watch("/xllm/", told)
        lease = await registry.grant(60.0)
        await registry.put("/xllm/a", b"1", lease.id)
        await until(lambda: told.values == {"/xllm/a": b"1"}, "the watch")
        with pytest.raises(PermissionDeniedError, match="permission denied"):
            await registry.put("/other", b"1")
        await registry.revoke(lease.id)
        await until(lambda: told.values == {}, "the end of the lease")
        await registry.close()

    run(main())


@pytest.mark.process
@pytest.mark.etcd
def test_a_token_that_ended_is_replaced(guarded, settings):
    async def main():
        registry = EtcdRegistry(parse_etcd_address(guarded.address), settings)
        lease = await registry.grant(60.0)
        before = await registry.put("/xllm/token", b"1")
        await asyncio.sleep(5.0)  # nobody probes without a watch: the token ends at the server
        assert await registry.put("/xllm/token", b"2") > before
        assert not registry.degraded
        assert registry.connection.num_links == 1
        assert await registry.keep_alive(lease.id) > 0
        await registry.close()

    run(main())


@pytest.mark.process
@pytest.mark.etcd
def test_a_restart_that_forgets_all_tokens(guarded, settings):
    async def main():
        registry = EtcdRegistry(parse_etcd_address(guarded.address), settings)
        told = Told()
        await registry.watch("/xllm/restart/", told)
        await registry.put("/xllm/restart/a", b"1")
        guarded.kill()
        await until(lambda: registry.degraded, "degraded")
        guarded.start()
        await until(lambda: not registry.degraded, "its return", 30.0)
        await registry.put("/xllm/restart/b", b"2")
        await until(lambda: len(told.values) == 2, "the watch")
        await registry.close()

    run(main())


@pytest.mark.process
@pytest.mark.etcd
def test_who_is_refused_learns_why(guarded, settings, files, tmp_path):
    wrong = private(tmp_path / "wrong", "xllm:guess")
    with pytest.raises(ConfigError, match="invalid user ID or password"):
        run(opened_and_asked(guarded, replaced(settings, user_file=wrong)))
    with pytest.raises(ConfigError, match=r"permission denied|user name"):
        run(opened_and_asked(guarded, replaced(settings, user_file="")))
    with pytest.raises(BrokenError):
        run(opened_and_asked(guarded, replaced(settings, cert_file="", key_file="")))
    other = tmp_path / "pki"
    other.mkdir()
    with pytest.raises(BrokenError):
        run(opened_and_asked(guarded, replaced(settings, ca_file=make_files(other).ca)))


@pytest.mark.process
@pytest.mark.etcd
def test_a_user_for_an_etcd_that_asks_for_none(etcd, tmp_path):
    user = private(tmp_path / "user", f"xllm:{PASSWORD}")
    assert run(opened_and_asked(etcd, EtcdSettings(user_file=user))) is None
