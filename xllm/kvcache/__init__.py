"""Accounting of KV memory: hashes, blocks, prefixes, tiers: pure; and the daemon around them."""
