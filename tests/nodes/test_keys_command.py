"""`scripts/keys` and the systemd units."""

from __future__ import annotations

import configparser
import os
import stat
import subprocess

import pytest

from tests.architecture.sources import ROOT
from xllm.cli.keys import allow_peer, revoke_peer
from xllm.cli.main import COMMANDS, run_command
from xllm.cli.node_file import ROLES
from xllm.errors import ConfigError
from xllm.protocol.transport.security import Security, create_keys


def test_a_pair_is_made_shown_and_never_overwritten(tmp_path, capsys):
    directory = str(tmp_path / "keys")
    assert run_command(["keys", "make", directory]) == 0
    public = capsys.readouterr().out.strip()
    assert len(public) == 40
    assert run_command(["keys", "show", directory]) == 0
    assert capsys.readouterr().out.strip() == public
    assert run_command(["keys", "make", directory]) == 64
    assert Security.load(directory).public_key == public
    for folder, _, names in os.walk(directory):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in names:
            mode = stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode)
            assert mode == 0o600 or (mode == 0o644 and not name.endswith("_secret")), name


def test_peers_join_the_allow_list(tmp_path):
    public = create_keys(str(tmp_path / "b"))
    create_keys(str(tmp_path / "a"))
    assert run_command(["keys", "allow", str(tmp_path / "a"), "node-b", public]) == 0
    written = (tmp_path / "a" / "allowed" / "node-b.key").read_text()
    assert public in written
    assert "secret" not in written


def test_clients_join_a_list_of_their_own(tmp_path):
    public = create_keys(str(tmp_path / "client"))
    create_keys(str(tmp_path / "a"))
    assert run_command(["keys", "allow", str(tmp_path / "a"), "c", public, "--client"]) == 0
    assert public in (tmp_path / "a" / "clients" / "c.key").read_text()
    assert stat.S_IMODE((tmp_path / "a" / "clients").stat().st_mode) == 0o700
    assert os.listdir(tmp_path / "a" / "allowed") == ["self.key"]


@pytest.mark.parametrize(
    ("name", "key"),
    [("../evil", "a" * 40), ("", "a" * 40), ("b", "short"), ("b", "é" * 40), ("b", 'a"' * 20)],
)
def test_bad_names_and_keys_are_refused(tmp_path, name, key):
    create_keys(str(tmp_path))
    with pytest.raises(ConfigError):
        allow_peer(str(tmp_path), name, key)
    assert os.listdir(tmp_path / "allowed") == ["self.key"]


@pytest.mark.parametrize("name", ["node-start", "node-stop", "node-status", "keys"])
def test_scripts_are_executable_bash(name):
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", ["xllm@.service", "xllm-node.service"])
def test_systemd_units_name_commands_that_exist(name):
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(ROOT / "scripts" / "systemd" / name)
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    command = unit["Service"]["ExecStart"].split()
    assert command[0] == "/opt/xllm/.venv/bin/xllm"
    roles = ROLES if command[1] == "%i" else (command[1],)
    assert all(role in COMMANDS for role in roles)


def test_who_is_admitted_is_listed_with_roles(tmp_path, capsys):
    directory = str(tmp_path / "a")
    assert run_command(["keys", "make", directory]) == 0
    own = capsys.readouterr().out.strip()
    allow_peer(directory, "b", "b" * 40)
    allow_peer(directory, "c", "c" * 40, client=True)
    allow_peer(directory, "d", "d" * 40, roles=("master", "worker"))
    allow_peer(directory, "e", "e" * 40, roles=("admin",))
    assert run_command(["keys", "list", directory]) == 0
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == [
        ["b", "allowed", "any", "b" * 40],
        ["d", "allowed", "master,worker", "d" * 40],
        ["self", "allowed", "any", own],
        ["c", "clients", "client", "c" * 40],
        ["e", "clients", "admin", "e" * 40],
    ]


def test_a_revoked_key_goes_with_all_its_names(tmp_path, capsys):
    directory = str(tmp_path / "a")
    create_keys(directory)
    allow_peer(directory, "b", "b" * 40)
    allow_peer(directory, "b-again", "b" * 40, roles=("router",))
    allow_peer(directory, "b-client", "b" * 40, client=True)
    allow_peer(directory, "c", "c" * 40)
    assert run_command(["keys", "revoke", directory, "b"]) == 0
    assert "b, b-again, b-client: revoked" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "a" / "allowed")) == ["c.key", "self.key"]
    assert os.listdir(tmp_path / "a" / "clients") == []
    assert run_command(["keys", "revoke", directory, "b"]) == 64
    assert run_command(["keys", "revoke", directory, "self"]) == 64
    assert run_command(["keys", "revoke", directory, "../c"]) == 64
    assert sorted(os.listdir(tmp_path / "a" / "allowed")) == ["c.key", "self.key"]


def test_a_file_that_says_no_key_keeps_nobody_from_being_revoked(tmp_path, capsys):
    directory = str(tmp_path / "a")
    create_keys(directory)
    allow_peer(directory, "b", "b" * 40)
    allow_peer(directory, "c", "c" * 40)
    (tmp_path / "a" / "allowed" / "aa.key").write_text("half a fi")
    assert run_command(["keys", "list", directory]) == 64
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == ["b", "c", "self"]
    assert "aa.key" in said.err
    assert revoke_peer(directory, "b") == ["b"]
    assert revoke_peer(directory, "aa") == ["aa"]
    assert sorted(os.listdir(tmp_path / "a" / "allowed")) == ["c.key", "self.key"]


@pytest.mark.parametrize("name", ["node.key", "node.key_secret", "allowed"])
def test_keys_are_not_made_through_a_link_that_somebody_laid(tmp_path, name):
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o777)
    elsewhere = tmp_path / "elsewhere"
    if name == "allowed":
        elsewhere.mkdir()
    (directory / name).symlink_to(elsewhere)
    with pytest.raises(ConfigError):
        create_keys(str(directory))
    assert not elsewhere.exists() or os.listdir(elsewhere) == []
    assert not (directory / "node.key_secret").exists()


def test_keys_are_not_made_in_a_directory_of_another_user(tmp_path, monkeypatch):
    (tmp_path / "keys").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="no directory of this user"):
        create_keys(str(tmp_path / "keys"))


def test_a_list_is_never_half_written(tmp_path):
    directory = str(tmp_path / "a")
    create_keys(directory)
    path = allow_peer(directory, "b", "b" * 40)
    inode = path.stat().st_ino
    allow_peer(directory, "b", "c" * 40)
    assert path.stat().st_ino != inode
    assert sorted(os.listdir(path.parent)) == ["b.key", "self.key"]
    # A link of that name is replaced, not followed.
    (tmp_path / "victim").write_text("mine")
    (path.parent / "l.key").symlink_to(tmp_path / "victim")
    allow_peer(directory, "l", "d" * 40)
    assert (tmp_path / "victim").read_text() == "mine"


def test_roles_that_are_none_are_refused(tmp_path):
    directory = str(tmp_path / "a")
    create_keys(directory)
    assert run_command(["keys", "allow", directory, "b", "b" * 40, "--role", "king"]) == 64
    (tmp_path / "a" / "allowed" / "k.key").write_text(f'roles = "king"\npublic-key = "{"k" * 40}"')
    assert run_command(["keys", "list", directory]) == 64
