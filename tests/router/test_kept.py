"""What is remembered is bounded, and the block names made with it are those made without."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from xllm.kvcache.hashing import HASH_BYTES, chain_hashes, root_hash
from xllm.protocol.token_bytes import pack_tokens, unpack_tokens
from xllm.router.block_names import BLOCKS_IN_RUN, BlockNames
from xllm.router.text.kept import ENTRY_BYTES, KeptBytes


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 400))), st.integers(0, 3000)
)
def test_the_least_recently_used_gives_way(steps, most):
    kept = KeptBytes(most)
    model: OrderedDict[int, bytes] = OrderedDict()
    for puts, name, size in steps:
        if puts:
            kept.put(name, bytes(size))
            if size + ENTRY_BYTES <= most:
                model.setdefault(name, bytes(size))
            while sum(len(one) + ENTRY_BYTES for one in model.values()) > most:
                model.popitem(last=False)
        else:
            assert kept.get(name) == model.get(name)
            if name in model:
                model.move_to_end(name)
        assert len(kept) == len(model)
        assert kept.num_bytes == sum(len(one) + ENTRY_BYTES for one in model.values()) <= most


IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@given(st.lists(st.tuples(IDS, st.integers(0, 300)), max_size=4), st.sampled_from([1, 2, 16]))
def test_block_names_are_those_of_the_hash_chain(pieces, block_size):
    names = BlockNames(100_000)
    ids: list[int] = []
    for piece, times in pieces:
        ids += piece * times  # a prompt that grows
        for root in (root_hash("r"), root_hash("r", salt=b"a tenant")):
            expected = chain_hashes(root, ids, block_size)
            assert names.chain(root, pack_tokens(ids), block_size) == expected


def test_a_prompt_that_begins_alike_is_hashed_from_there():
    names = BlockNames(1 << 20)
    root = root_hash("r")
    ids = list(range(16 * BLOCKS_IN_RUN * 3))
    known = names.chain(root, pack_tokens(ids), 16)
    assert len(known) == 3 * BLOCKS_IN_RUN * HASH_BYTES
    assert len(names.kept) == 3
    names.chain(root, pack_tokens([*ids, *range(16)]), 16)
    assert len(names.kept) == 3
    names.chain(root_hash("r", salt=b"another"), pack_tokens(ids), 16)
    assert len(names.kept) == 6
    names.chain(root, pack_tokens(ids), 8)
    assert len(names.kept) == 12


@given(IDS)
def test_tokens_are_packed_in_the_order_of_the_wire(ids):
    packed = pack_tokens(ids)
    assert packed == b"".join(one.to_bytes(4, "little") for one in ids)
    assert unpack_tokens(packed).tolist() == ids
