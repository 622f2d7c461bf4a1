"""The content hash: golden vectors, and what must change it."""

import hashlib
import itertools
import os
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.kvcache.hashing import (
    HASH_BYTES,
    chain_hashes,
    chain_in_python,
    chain_packed,
    extend,
    next_hash,
    root_hash,
    split_hashes,
)
from xllm.protocol.native.token_ids import load

GOLDEN_EMPTY = "1462b23c3082e4f7e02ed2a16bb419d704b778acd5cfbc74b610327a07419b5f"
GOLDEN_ROOT = "af6f2652d303bdf53fc9d186c8f5dc40f661bc29fec3e80e672184c16b383cbe"
GOLDEN_CHAIN = (
    "3ea3165cab94138297666b1a3c99b17b0737a918c01e0ce2c6ebed16db53743d"
    "4a1023589e9778def93f1a8e7c3ef9d4060ed684a818b56c46a9052490322927"
)


def golden_root() -> bytes:
    return root_hash("rev", "ad", b"salt", [b"m" * 32])


def test_golden_vectors():
    assert root_hash("").hex() == GOLDEN_EMPTY
    assert golden_root().hex() == GOLDEN_ROOT
    assert chain_hashes(golden_root(), list(range(10)), 4).hex() == GOLDEN_CHAIN


def test_chain_is_sha256_of_parent_and_little_endian_ids():
    first = hashlib.sha256(golden_root() + struct.pack("<4I", 0, 1, 2, 3)).digest()
    second = hashlib.sha256(first + struct.pack("<4I", 4, 5, 6, 7)).digest()
    assert chain_hashes(golden_root(), range(8), 4) == first + second
    assert next_hash(first, (4, 5, 6, 7)) == second


@pytest.mark.skipif(load() is None, reason="it was not compiled here")
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=400), st.sampled_from([1, 4, 16]))
def test_the_library_hashes_as_python_does(root, packed, block_size):
    stride = 4 * block_size
    blocks = [packed[i : i + stride] for i in range(0, len(packed) - stride + 1, stride)]
    links = itertools.accumulate(
        blocks, lambda parent, block: hashlib.sha256(parent + block).digest(), initial=root
    )
    expected = b"".join(list(links)[1:])
    assert load().chain(root, packed, stride) == expected
    assert chain_packed(root, packed, block_size) == expected
    assert chain_in_python(root, packed, stride) == expected


def test_long_prompts_let_other_threads_run():
    """The loop goes on while a thread hashes: a call that kept the interpreter would stop it."""
    packed = os.urandom(64 << 20)
    turns = 0
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(chain_packed, bytes(32), packed, 16)
        while not hashed.done():
            turns += 1
            time.sleep(0.001)
    assert turns > 10


def test_every_field_counts():
    base = ("rev", "ad", b"salt", (b"one", b"two"))
    others = [
        ("rew", "ad", b"salt", (b"one", b"two")),
        ("rev", "ae", b"salt", (b"one", b"two")),
        ("reva", "d", b"salt", (b"one", b"two")),
        ("rev", "ads", b"alt", (b"one", b"two")),
        ("rev", "ad", b"salu", (b"one", b"two")),
        ("rev", "ad", b"salt", (b"two", b"one")),
        ("rev", "ad", b"salt", (b"onetwo",)),
        ("rev", "ad", b"salt", (b"one", b"two", b"")),
        ("rev", "ad", b"salt", ()),
    ]
    roots = {root_hash(*fields) for fields in [base, *others]}
    assert len(roots) == 1 + len(others)


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_outside_32_bits_are_refused(bad):
    with pytest.raises(OverflowError):
        chain_hashes(golden_root(), [bad] * 4, 4)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=40),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(0, 40),
)
def test_extending_gives_the_same_as_hashing_at_once(tokens, block_size, num_first):
    root = golden_root()
    whole = chain_hashes(root, tokens, block_size)
    assert len(whole) == len(tokens) // block_size * HASH_BYTES
    known = chain_hashes(root, tokens[:num_first], block_size)
    assert whole.startswith(known)
    assert extend(known, root, tokens, block_size) == whole
    parent = root
    for index, value in enumerate(split_hashes(whole)):
        parent = next_hash(parent, tokens[index * block_size : (index + 1) * block_size])
        assert value == parent


def test_a_changed_token_changes_its_block_and_all_after_it():
    tokens = list(range(16))
    before = split_hashes(chain_hashes(golden_root(), tokens, 4))
    tokens[5] = 99
    after = split_hashes(chain_hashes(golden_root(), tokens, 4))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]


@pytest.mark.process
def test_python_hash_seed_does_not_matter():
    code = "from xllm.kvcache.hashing import root_hash; print(root_hash('').hex())"
    for seed in ("0", "1234"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        assert out.stdout.strip() == GOLDEN_EMPTY
