"""The shared arena: no name, sealed size, bounds on every access, checksums at the reader."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.errors import BrokenError, ClosedError, InvalidRequestError
from xllm.kvcache.arena import Arena, block_checksum, open_arena, read_blocks, write_blocks

SIZE = 1 << 16


@pytest.fixture(scope="module")
def arena():
    arena = Arena(SIZE)
    yield arena
    arena.close()


def test_a_second_mapping_sees_the_same_bytes(arena):
    other = open_arena(arena.path, SIZE)
    other.write(100, b"hello")
    assert arena.view.read(98, 9) == b"\0\0hello\0\0"
    other.close()


def test_the_arena_has_no_name_and_is_for_its_user_alone(arena):
    state = os.stat(arena.path)
    assert state.st_mode & 0o777 == 0o600
    assert state.st_nlink == 0


def test_its_size_is_sealed(arena):
    fd = os.open(arena.path, os.O_RDWR)
    try:
        for size in (SIZE // 2, SIZE * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


@given(st.integers(-(1 << 64), 1 << 64), st.integers(-(1 << 64), 1 << 64))
def test_no_read_is_out_of_bounds(arena, offset, num_bytes):
    inside = offset >= 0 and num_bytes >= 0 and offset + num_bytes <= SIZE
    if inside:
        assert len(arena.view.read(offset, num_bytes)) == num_bytes
    else:
        with pytest.raises(InvalidRequestError):
            arena.view.read(offset, num_bytes)


@given(st.integers(-SIZE, 2 * SIZE), st.binary(max_size=100))
def test_no_write_is_out_of_bounds(arena, offset, data):
    if offset >= 0 and offset + len(data) <= SIZE:
        arena.view.write(offset, data)
        assert arena.view.read(offset, len(data)) == data
    else:
        before = arena.view.read(0, SIZE)
        with pytest.raises(InvalidRequestError):
            arena.view.write(offset, data)
        assert arena.view.read(0, SIZE) == before


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/fd/0", "/proc/1/fd/../../../etc/passwd", "", "/dev/zero"]
)
def test_other_paths_are_refused(path):
    with pytest.raises(BrokenError):
        open_arena(path, SIZE)


def test_a_descriptor_that_is_no_arena_is_refused(tmp_path, arena):
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(SIZE)
        file.flush()
        with pytest.raises(BrokenError):
            open_arena(f"/proc/{os.getpid()}/fd/{file.fileno()}", SIZE)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(BrokenError):
            open_arena(arena.path, size)
    with pytest.raises(BrokenError):
        open_arena("/proc/4194305/fd/3", SIZE)


def test_a_closed_arena_says_so():
    arena = Arena(SIZE)
    path = arena.path
    view = open_arena(path, SIZE)
    arena.close()
    arena.close()
    view.write(0, b"still mapped here")
    view.close()
    with pytest.raises(ClosedError):
        view.read(0, 1)
    with pytest.raises(BrokenError):
        open_arena(path, SIZE)


def test_blocks_are_read_up_to_the_first_bad_one(arena):
    blocks = [bytes([n]) * 64 for n in range(4)]
    offsets = [n * 64 for n in range(4)]
    checksums = write_blocks(arena.view, list(zip(offsets, blocks, strict=True)))
    assert checksums == b"".join(map(block_checksum, blocks))
    assert read_blocks(arena.view, offsets, checksums, 64) == blocks
    arena.view.write(2 * 64 + 63, b"\xff")
    assert read_blocks(arena.view, offsets, checksums, 64) == blocks[:2]
    assert read_blocks(arena.view, [-1, *offsets], bytes(16) + checksums, 64) == []
