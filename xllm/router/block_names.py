"""Block hashes of a prompt, of which the beginning was often hashed before.

A chain of block hashes is remembered in runs of blocks: a run's hashes follow from the hash
before it and its tokens, so the name of a run is a hash of those, one call instead of one for each
block. The hash before it stands for everything that came earlier, the tenant's salt included:
nobody finds what another tenant asked. Invariant: the hashes are those of
`xllm.kvcache.hashing`.
"""

from __future__ import annotations

from hashlib import blake2b

from xllm.kvcache.hashing import HASH_BYTES, chain_packed
from xllm.protocol.token_bytes import TOKEN_BYTES
from xllm.router.text.kept import KeptBytes

BLOCKS_IN_RUN = 64


class BlockNames:
    """Hashes the blocks of prompts, and remembers `max_bytes` of hashes at most."""

    def __init__(self, max_bytes: int) -> None:
        self.kept = KeptBytes(max_bytes)

    def chain(self, root: bytes, packed: bytes, block_size: int) -> bytes:
        """Hashes of the full blocks of a prompt (ids as bytes), 32 bytes each."""
        stride = TOKEN_BYTES * block_size * BLOCKS_IN_RUN
        num_whole = len(packed) // stride
        parts = []
        parent = root
        for start in range(0, num_whole * stride, stride):
            run = packed[start : start + stride]
            # Half of SHA-256's time where the CPU has no instructions for that; stays in here.
            name = blake2b(run, digest_size=32, key=parent, salt=b"%d" % block_size).digest()
            hashes = self.kept.get(name)
            if hashes is None:
                hashes = chain_packed(parent, run, block_size)
                self.kept.put(name, hashes)
            parts.append(hashes)
            parent = hashes[-HASH_BYTES:]
        parts.append(chain_packed(parent, packed[num_whole * stride :], block_size))
        return b"".join(parts)
