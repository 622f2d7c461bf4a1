"""One etcd for all tests of registries that leave it as it is."""

from __future__ import annotations

import pytest

from tests.registry.etcd_server import one_etcd


@pytest.fixture(scope="session")
def etcd(tmp_path_factory):
    """A running etcd of one member."""
    with one_etcd(tmp_path_factory.mktemp("etcd")) as member:
        yield member
