"""The device memory that holds KV."""
