"""`xllm bench`: load on an endpoint, local latency and throughput, and the machine's limits."""
