"""Words that are known are not encoded again, for their own tenant only, and within bounds."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol.token_bytes import pack_tokens
from xllm.router.text.word_borders import GPT2_BORDERS
from xllm.router.text.words import WORD_BYTES, WORD_CHARS, WORD_TOKENS, KnownWords


class Encoder:
    """A token for each character; knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, words: Sequence[str]) -> list[bytes]:
        self.asked += words
        return [pack_tokens([ord(char) for char in word]) for word in words]


def words(num_words: int) -> tuple[KnownWords, Encoder]:
    encoder = Encoder()
    return KnownWords(encoder, GPT2_BORDERS.words, num_words * WORD_BYTES), encoder


TEXTS = st.text(alphabet="ab \n\t\r\u3000\x1f.", max_size=40)


@given(TEXTS, TEXTS)
def test_a_text_is_its_words_in_a_row(first, second):
    known, _ = words(1000)
    for text in (first, second, first):
        assert known.pack(text, b"") == pack_tokens([ord(char) for char in text])


def test_each_word_is_encoded_once():
    known, encoder = words(1000)
    known.pack("to be or not to be", b"")
    assert encoder.asked == ["to", " be", " or", " not", " to"]
    assert (known.num_encoded, known.num_tokens) == (15, 18)
    known.pack("to be", b"")
    assert len(encoder.asked) == 5
    assert (known.num_encoded, known.num_tokens) == (15, 23)


def test_no_tenant_finds_the_words_of_another():
    known, encoder = words(1000)
    known.pack("a secret", b"one")
    known.pack("a secret", b"two")
    assert encoder.asked == ["a", " secret"] * 2


def test_what_hardly_comes_again_is_not_kept():
    known, encoder = words(1000)
    for word in ("x" * (WORD_CHARS + 1), "x" * (WORD_TOKENS + 1)):
        known.pack(word, b"")
        known.pack(word, b"")
        assert encoder.asked.count(word) == 2
    assert known.num_bytes == 0


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
