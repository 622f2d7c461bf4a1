"""etcd's generated messages and stubs, and gRPC: loaded where etcd is spoken, and nowhere else.

The generated code works with protobuf's pure Python back-end only, and protobuf chooses at its
first import: a process that loaded another one gets DependencyError here, not a riddle later.
"""

from __future__ import annotations

import warnings

from google.protobuf.internal import api_implementation

from xllm.errors import DependencyError

if api_implementation.Type() != "python":
    raise DependencyError(
        "the etcd client needs PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python in the environment "
        f"before protobuf is loaded; this process loaded it as {api_implementation.Type()!r}",
        param="cluster.registry",
    )

with warnings.catch_warnings():
    # Code that was generated for an older protobuf makes its descriptors as one did then.
    warnings.simplefilter("ignore", DeprecationWarning)
    import grpc
    from etcd3.etcdrpc import kv_pb2, rpc_pb2, rpc_pb2_grpc

__all__ = ("grpc", "kv_pb2", "rpc_pb2", "rpc_pb2_grpc")
