"""Attention of mixed batches over paged KV."""
