"""The compiled loops over token ids where they cannot be used: said, and done in Python."""

import json
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.fixtures.compiled import looked_for_anew, needs
from xllm.kvcache.hashing import chain_in_python, chain_packed
from xllm.protocol.native import token_ids as library

needs_library, found_anew = needs(library), looked_for_anew(library)


@needs_library
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("__file__", "/nowhere/token_ids.py", "it was not compiled when xllm was installed"),
        ("_ABI", 0, "is of version 2, not 0: build it again"),
        ("_openssl_sha256", lambda: (_ for _ in ()).throw(AttributeError("hidden")), "hidden"),
    ],
)
def test_without_the_library_python_hashes(monkeypatch, found_anew, name, value, reason):
    monkeypatch.setattr(library, name, value)
    packed, root = bytes(range(200)), bytes(32)
    with capture_logs() as logs:
        assert chain_packed(root, packed, 4) == chain_in_python(root, packed, 16)
        chain_packed(root, packed, 4)
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("token_ids_in_python", "warning")
    assert reason in line["reason"]


@needs_library
@pytest.mark.parametrize(("size", "stride"), [(0, 16), (31, 16), (33, 16), (32, 0)])
def test_what_the_library_would_read_beyond_is_refused(size, stride):
    with pytest.raises(ValueError, match=f"a root of {size} bytes, 64 in blocks of {stride}"):
        library.load().chain(bytes(size), bytes(64), stride)


@needs_library
def test_more_bytes_than_a_call_takes_are_refused(monkeypatch):
    monkeypatch.setattr(library, "MAX_BYTES", 63)
    with pytest.raises(ValueError, match="64 in blocks of 16"):
        library.load().chain(bytes(32), bytes(64), 16)
    with pytest.raises(ValueError, match="64 bytes of ids"):
        library.load().largest(bytes(64))


@needs_library
@given(st.lists(st.integers(0, 2**32 - 1), max_size=200))
@example([2**32 - 1])
@example([7] * 64 + [2**31])
def test_the_largest_id_is_found(ids):
    assert library.load().largest(struct.pack(f"<{len(ids)}I", *ids)) == max(ids, default=0)


@needs_library
def test_another_digest_than_hashlibs_is_noticed(monkeypatch, found_anew):
    monkeypatch.setattr(library.NativeTokenIds, "chain", lambda self, *_: bytes(32))
    with capture_logs() as logs:
        assert library.load() is None
    assert "gives another digest" in logs[0]["reason"]


NUMBERS = st.one_of(
    st.integers(0, 9), st.integers(0, 10**8), st.integers(2**32 - 2, 2**32 + 1), st.integers(-2)
).map(str)
PARTS = st.one_of(
    NUMBERS, st.sampled_from(["", "01", "00", "1.0", "1e3", " 2", "3 ", "4x", ":", "1 2"])
)


@needs_library
@given(st.lists(PARTS, min_size=1, max_size=30), st.sampled_from([",", ", ", " ,\t", ",\n"]))
@example(["12345678", "1234567", "7"], ",")
def test_lists_of_ids_are_read_as_json_reads_them(parts, separator):
    text = separator.join(parts)
    read = library.load().read_ids(text.encode())
    try:
        found = json.loads(f"[{text}]")
    except ValueError:
        found = []
    plain = all(type(one) is int and 0 <= one < 1 << 32 for one in found)
    if not found or not plain or "-" in text:
        assert read is None
    else:
        assert read == struct.pack(f"<{len(found)}I", *found)
