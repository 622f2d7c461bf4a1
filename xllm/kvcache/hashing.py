"""Content hashes: the name of a KV block, the same on every instance and in every tier.

A block's hash is the SHA-256 of its parent's hash and its token ids; the first parent is a root
that stands for everything else the KV depends on: format version, model revision, adapter,
tenant salt, media. Equal hashes therefore mean equal prefixes, all the way to the first token.
This module knows nothing of blocks, pools or who asks. Nothing depends on Python's own hashing.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from xllm.protocol.native.token_ids import load
from xllm.protocol.token_bytes import TOKEN_BYTES, pack_tokens

HASH_BYTES = 32
"""Length of a content hash."""

FORMAT_VERSION = 1
"""Part of every root: a change of the scheme changes every hash."""


def root_hash(
    revision: str, adapter: str = "", salt: bytes = b"", media_hashes: Sequence[bytes] = ()
) -> bytes:
    """The parent of a prompt's first block: 32 bytes.

    Every field carries its length, so that no two different inputs give the same bytes.
    `salt` is whatever separates tenants (and a tenant's own cache salts) from each other."""
    fields = [revision.encode(), adapter.encode(), salt, *media_hashes]
    parts = [b"xllm-kv", FORMAT_VERSION.to_bytes(4, "little"), len(fields).to_bytes(4, "little")]
    for field in fields:
        parts.append(len(field).to_bytes(8, "little"))
        parts.append(field)
    return sha256(b"".join(parts)).digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of one full block with these tokens (0 to 2**32 - 1) after `parent`."""
    return sha256(parent + pack_tokens(token_ids)).digest()


def chain_hashes(root: bytes, token_ids: Sequence[int], block_size: int) -> bytes:
    """Hashes of the full blocks of `token_ids`, in order, concatenated (32 bytes each).

    A last block that is not full has no hash. OverflowError for ids outside 32 bits."""
    if len(token_ids) < block_size:
        return b""
    return chain_packed(root, pack_tokens(token_ids), block_size)


def chain_packed(root: bytes, packed: bytes, block_size: int) -> bytes:
    """The same for ids that are bytes already (see token_bytes)."""
    stride = TOKEN_BYTES * block_size
    native = load()
    if native is None:
        return chain_in_python(root, packed, stride)
    return native.chain(root, packed, stride)


def chain_in_python(root: bytes, packed: bytes, stride: int) -> bytes:
    """The same where the library was not compiled; `stride`: the bytes of a block."""
    hashes = []
    parent = root
    for start in range(0, len(packed) - stride + 1, stride):
        parent = sha256(parent + packed[start : start + stride]).digest()
        hashes.append(parent)
    return b"".join(hashes)


def extend(hashes: bytes, root: bytes, token_ids: Sequence[int], block_size: int) -> bytes:
    """`hashes` (of the first full blocks of `token_ids`) followed by those of the others."""
    num_known = len(hashes) // HASH_BYTES
    parent = hashes[-HASH_BYTES:] if hashes else root
    return hashes + chain_hashes(parent, token_ids[num_known * block_size :], block_size)


def split_hashes(hashes: bytes) -> list[bytes]:
    """The single hashes of a concatenation."""
    return [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]
