"""What our code calls of torch_npu and of the driver's library: the names whose facts are kept."""

from __future__ import annotations

NPU = (
    "Event",
    "Event.query",
    "Event.record",
    "Event.synchronize",
    "NPUGraph",
    "NPUGraph.replay",
    "NPUGraph.reset",
    "Stream",
    "Stream.wait_event",
    "Stream.wait_stream",
    "current_stream",
    "device_count",
    "empty_cache",
    "get_device_name",
    "graph",
    "graph_pool_handle",
    "is_available",
    "mem_get_info",
    "set_device",
    "stream",
    "synchronize",
)
"""Of the module torch.npu. "Class.method" is a method, without self."""

OPERATORS = (
    "npu_fused_infer_attention_score",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
)
"""Of the module torch_npu itself."""

ACL = (
    "aclrtFreePhysical",
    "aclrtMallocPhysical",
    "aclrtMapMem",
    "aclrtMemGetAllocationGranularity",
    "aclrtReleaseMemAddress",
    "aclrtReserveMemAddress",
    "aclrtSetDevice",
    "aclrtUnmapMem",
)
"""Functions in C of libascendcl."""
