"""Kernels in Triton: attention over the KV memory of a device, and what is fused around it."""
