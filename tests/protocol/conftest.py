"""An address of each kind that sockets speak over."""

import pytest


@pytest.fixture(params=["ipc", "tcp", "inproc"])
def endpoint(request, tmp_path):
    return {
        "ipc": f"ipc://{tmp_path}/s",
        "tcp": "tcp://127.0.0.1:0",
        "inproc": "inproc://test-socket",
    }[request.param]
