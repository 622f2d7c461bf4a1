"""Words that are known are not encoded again, for their own tenant only, and within bounds."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol.token_bytes import pack_tokens
from xllm.router.text.word_borders import GPT2_BORDERS
from xllm.router.text.words import VOCABULARY_WORDS, WORD_BYTES, KnownWords


class FakeEncoder:
    """A token for each character; knows what it was asked, and how often of a whole text."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.num_rows = 0

    def encode(self, words: Sequence[str]) -> list[bytes]:
        self.asked += words
        return [pack_tokens([ord(char) for char in word]) for word in words]

    def encode_row(self, text: str, words: Sequence[str]) -> list[bytes]:
        assert text == "".join(words)
        self.num_rows += 1
        return self.encode(words)


def words(num_words: int) -> tuple[KnownWords, FakeEncoder]:
    encoder = FakeEncoder()
    return KnownWords(encoder, GPT2_BORDERS.split, num_words * WORD_BYTES), encoder


TEXTS = st.text(alphabet="ab \n\t\r\u3000\x1f.", max_size=40)


@given(TEXTS, TEXTS)
def test_a_text_is_its_words_in_a_row(first, second):
    known, _ = words(1000)
    for text in (first, second, first):
        assert known.pack(text, b"") == pack_tokens([ord(char) for char in text])


def test_a_text_that_is_mostly_new_is_encoded_as_a_whole_and_known_words_are_not():
    known, encoder = words(1000)
    known.pack("to be or not to be", b"")
    assert (known.num_encoded, known.num_tokens, encoder.num_rows) == (18, 18, 1)
    known.pack("to be", b"")
    assert len(encoder.asked) == 6
    assert (known.num_encoded, known.num_tokens) == (18, 23)
    known.pack("to be it or not it", b"")
    assert encoder.asked[6:] == [" it"]
    assert (known.num_encoded, known.num_tokens, encoder.num_rows) == (21, 41, 1)


def test_no_tenant_finds_the_words_of_another():
    known, encoder = words(1000)
    known.pack("a secret", b"one")
    known.pack("a secret", b"two")
    assert encoder.asked == ["a", " secret"] * 2


def test_what_hardly_comes_again_is_not_kept():
    known, encoder = words(1000)
    for word in ("x" * 60, "\u4f60" * 30, "\U0001f642" * 20):
        known.pack(word, b"")
        known.pack(word, b"")
        assert encoder.asked.count(word) == 2
    assert known.num_bytes == VOCABULARY_WORDS * WORD_BYTES


def test_what_a_word_costs_is_bounded():
    known, _ = words(100_000)
    texts = [char * size + f"{number}" for number in range(2000) for char, size in
             (("x", 15), ("\u4f60", 9), ("\U0001f642", 3))]  # fmt: skip
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for text in texts:
            known.pack(text, b"")
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(texts) * 100 < grown <= known.num_bytes
    assert known.num_bytes >= len(texts) * WORD_BYTES


def test_tenants_without_words_cost_too():
    known, _ = words(40)
    for number in range(100):
        known.pack("x" * 100, b"%d" % number)
        assert known.num_bytes <= 40 * WORD_BYTES


def test_words_in_use_stay_known_and_the_others_make_room():
    known, encoder = words(40)
    for number in range(200):
        known.pack(f"always here {number}", b"")
        assert known.num_bytes <= 40 * WORD_BYTES
    assert encoder.asked.count(" here") == 1
    known.pack("0 0 here", b"")
    assert encoder.asked.count(" 0") == 2  # forgotten meanwhile


def test_the_tenant_that_has_not_asked_for_longest_is_forgotten():
    known, encoder = words(40)
    for number in range(10):
        known.pack("some words of its own", b"%d" % number)
        assert known.num_bytes <= 40 * WORD_BYTES
    encoder.asked.clear()
    known.pack("some words of its own", b"9")
    assert not encoder.asked
    known.pack("some words of its own", b"0")
    assert len(encoder.asked) == 5


def test_threads_may_ask_at_once():
    known, _ = words(64)
    wrong: list[str] = []

    def ask(owner: bytes) -> None:
        for number in range(2000):
            text = f"word {number % 97} of {number % 13} kinds"
            if known.pack(text, owner) != pack_tokens([ord(char) for char in text]):
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(b"%d" % (one % 2),)) for one in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < known.num_bytes <= 64 * WORD_BYTES
