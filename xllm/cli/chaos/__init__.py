"""`xllm chaos`: faults in a running local cluster under load, and what became of every token."""
