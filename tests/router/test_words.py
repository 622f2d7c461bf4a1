"""Words that are known are not encoded again, for their own tenant only, and within bounds: by
tables in Python and by compiled ones."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol.token_bytes import pack_tokens
from xllm.router.text.native import words as library
from xllm.router.text.word_borders import GPT2_BORDERS
from xllm.router.text.word_table import WORD_BYTES, PatternTable, table_maker
from xllm.router.text.words import AT_ONCE, VOCABULARY_BYTES, KnownWords

MAKERS = {"python": lambda: PatternTable(GPT2_BORDERS.words.findall)}
if library.load() is not None:
    MAKERS["compiled"] = table_maker(GPT2_BORDERS)
TABLES = pytest.mark.parametrize("table", MAKERS)
ENDLESS = 1 << 24


class FakeEncoder:
    """A token for each character; knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.num_calls = 0
        self.most = 0
        """Words of one call."""

    def encode(self, words: Sequence[str]) -> list[bytes]:
        self.asked += words
        self.num_calls += 1
        self.most = max(self.most, len(words))
        return [ids(word) for word in words]


def ids(text: str) -> bytes:
    return pack_tokens([ord(char) for char in text])


def words(table: str, max_bytes: int) -> tuple[KnownWords, FakeEncoder]:
    encoder = FakeEncoder()
    return KnownWords(encoder, MAKERS[table], max_bytes), encoder


TEXTS = st.text(alphabet="ab \n\t\r\u3000\x1f.", max_size=40)


@TABLES
@given(TEXTS, TEXTS)
def test_a_text_is_its_words_in_a_row(table, first, second):
    known, _ = words(table, ENDLESS)
    for text in (first, second, first):
        assert known.pack([text], b"") == [ids(text)]
    assert known.pack([first, second, first], b"new") == [ids(first), ids(second), ids(first)]


@TABLES
def test_only_words_that_are_new_are_encoded_all_at_once(table):
    known, encoder = words(table, ENDLESS)
    known.pack(["to be or not to be"], b"")
    assert encoder.asked == ["to", " be", " or", " not", " to"]
    assert (known.num_encoded, known.num_tokens) == (15, 18)
    known.pack(["to be"], b"")
    assert (known.num_encoded, known.num_tokens, encoder.num_calls) == (15, 23, 1)
    texts = ["to be it or not it", " it", "\0 to\0", " ž\0 ž"]
    assert known.pack(texts, b"") == [ids(text) for text in texts]
    assert encoder.asked[5:] == [" it", "\0", " to\0", " ž\0", " ž"]
    assert (known.num_encoded, encoder.num_calls) == (15 + 3 + 1 + 4 + 3 + 2, 2)


@TABLES
def test_no_tenant_finds_the_words_of_another(table):
    known, encoder = words(table, ENDLESS)
    known.pack(["a secret"], b"one")
    known.pack(["a secret"], b"two")
    assert encoder.asked == ["a", " secret"] * 2


@TABLES
def test_what_hardly_comes_again_is_not_kept(table):
    known, encoder = words(table, ENDLESS)
    known.pack([""], b"")
    empty = known.num_bytes
    for word in ("x" * 80, "\u4f60" * 70, "\U0001f642" * 64):
        for _ in range(2):
            assert known.pack([word], b"") == [ids(word)]
        assert encoder.asked.count(word) == 2
    assert known.num_bytes == empty


def test_what_a_word_costs_in_python_is_bounded():
    known, _ = words("python", 100_000 * WORD_BYTES)
    texts = [char * size + f"{number}" for number in range(2000) for char, size in
             (("x", 15), ("\u4f60", 9), ("\U0001f642", 3))]  # fmt: skip
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        known.pack(texts, b"")
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(texts) * 100 < grown <= known.num_bytes
    assert known.num_bytes >= len(texts) * WORD_BYTES


@TABLES
def test_tenants_cost_within_the_bound_with_words_and_without(table):
    for text in ("x" * 300, "some words of its own"):
        known, _ = words(table, 10 * VOCABULARY_BYTES)
        for number in range(100):
            known.pack([text], b"%d" % number)
            assert VOCABULARY_BYTES <= known.num_bytes <= 10 * VOCABULARY_BYTES


@TABLES
def test_words_in_use_stay_known_and_the_others_make_room(table):
    room = 40 * WORD_BYTES
    known, encoder = words(table, room)
    for number in range(2000):
        known.pack([f"always here {number}"], b"")
        assert known.num_bytes <= room
    assert encoder.asked.count(" here") == 1
    known.pack(["0 0 here"], b"")
    assert encoder.asked.count(" 0") == 2  # forgotten meanwhile
    assert encoder.asked.count(" here") == 1


@TABLES
def test_a_text_of_more_words_than_there_is_room_for_leaves_others_their_words(table):
    known, encoder = words(table, 400 * WORD_BYTES)
    known.pack(["its own words"], b"one")
    text = " ".join(map(str, range(50_000)))
    assert known.pack([text], b"two") == [ids(text)]
    assert known.num_bytes <= 400 * WORD_BYTES
    del encoder.asked[:]
    known.pack(["its own words"], b"one")
    assert not encoder.asked


@TABLES
def test_many_words_do_not_hold_the_interpreter_in_one_call(table):
    known, encoder = words(table, ENDLESS)
    texts = ["\n".join(map(str, range(at, at + 999))) for at in range(0, 5000, 1000)]
    for _ in range(2):
        assert known.pack(texts, b"") == [ids(text) for text in texts]
    assert len(encoder.asked) == 5 * 999
    assert (encoder.most, encoder.num_calls) == (AT_ONCE, 5 * 999 // AT_ONCE + 1)


@TABLES
def test_the_tenant_that_has_not_asked_for_longest_is_forgotten(table):
    known, encoder = words(table, 8 * VOCABULARY_BYTES)
    for number in range(20):
        known.pack(["some words"], b"%d" % number)
    encoder.asked.clear()
    known.pack(["some words"], b"19")
    assert not encoder.asked
    known.pack(["some words"], b"0")
    assert encoder.asked == ["some", " words"]


@TABLES
def test_threads_may_ask_at_once(table):
    room = 64 * WORD_BYTES
    known, _ = words(table, room)
    wrong: list[str] = []

    def ask(owner: bytes) -> None:
        for number in range(2000):
            texts = [f"word {number % 97}", f" of {number % 13} kinds"]
            if known.pack(texts, owner) != [ids(text) for text in texts]:
                wrong.append(texts[0])

    threads = [threading.Thread(target=ask, args=(b"%d" % (one % 2),)) for one in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < known.num_bytes <= room
