"""The compiled search for words finds what the patterns find; without it these do."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.fixtures.compiled import looked_for_anew, needs
from xllm.protocol.token_bytes import pack_tokens
from xllm.router.text.native import words as library
from xllm.router.text.word_borders import GPT2_BORDERS, LETTERS_FIRST_BORDERS
from xllm.router.text.word_table import PatternTable, table_maker

needs_library, found_anew = needs(library), looked_for_anew(library)
BORDERS = pytest.mark.parametrize("borders", [GPT2_BORDERS, LETTERS_FIRST_BORDERS])
SIGNS = "a.'é½你🙂\u200b\u0301\xc2\u0fff\u2020"
WHITE = " \n\r\t\f\v\x1c\x1f\x85\xa0\u1680\u2000\u200a\u2028\u202f\u205f\u3000"


@needs_library
@BORDERS
@settings(max_examples=1500)
@given(st.one_of(st.text(alphabet=SIGNS + 2 * WHITE, max_size=40), st.text(max_size=40)))
@example("")
@example(" ")
@example("a\n\u3000\nb")
@example("\xa0\n \x85x\n\n y")
@example("a \t\n\t b\n")
def test_words_are_those_of_the_pattern(borders, text):
    found = borders.words.findall(text)
    assert borders.split(text) == found
    if "\0" not in text:
        assert library.load().split(text, borders.rule) == found


@needs_library
@BORDERS
def test_each_character_is_of_its_kind(borders):
    """All of the blocks that whitespace is in, as one word, between words, and behind some."""
    for number in range(1, 0x3100):
        one = chr(number)
        for text in (one, f"a{one}b", f"a{one}\nb {one}c\n{one}", f" {one} d"):
            found = borders.words.findall(text)
            assert library.load().split(text, borders.rule) == found, f"U+{number:04X}"


def test_python_knows_no_whitespace_beyond():
    rest = "".join(map(chr, (*range(0x3100, 0xD800), *range(0xE000, 0x110000))))
    assert re.search(r"\s", rest) is None


@needs_library
@BORDERS
@pytest.mark.parametrize("text", ["a b\0c d", "a b\ud800 c"])
def test_what_the_library_does_not_take_is_left_to_the_pattern(borders, text):
    with pytest.raises(ValueError, match=r"NUL|surrogates"):
        library.load().split(text, borders.rule)
    assert borders.split(text) == borders.words.findall(text)


@needs_library
def test_a_text_of_more_bytes_than_a_call_takes_is_refused(monkeypatch):
    monkeypatch.setattr(library, "MAX_BYTES", 3)
    with pytest.raises(ValueError, match="a text of 4 bytes"):
        library.load().split("éé", library.GPT2)


SCRAPS = "ab1\0é你🙂 \n\t\u3000"
TEXTS = st.text(alphabet=SCRAPS, max_size=30)
# Short ones: what is long is not the same for both.
KEEPS = st.dictionaries(
    st.text(alphabet=SCRAPS, min_size=1, max_size=12),
    st.lists(st.integers(0, 1 << 31), max_size=12),
)


@needs_library
@BORDERS
@pytest.mark.parametrize("at_once", [1, 7, library.LOOK_BYTES])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(TEXTS, KEEPS, st.just(None)), max_size=12))
def test_a_compiled_table_says_what_the_one_in_python_says(borders, at_once, monkeypatch, steps):
    """Of texts, after words were kept, and others of the time before."""
    monkeypatch.setattr(library, "LOOK_BYTES", at_once)
    makers = [table_maker(borders), lambda: PatternTable(borders.words.findall)]
    tables = [[make(), None] for make in makers]
    for step in steps:
        if step is None:
            for made, make in zip(tables, makers, strict=True):
                made[:] = make(), made[0]
        elif isinstance(step, dict):
            words = {word: pack_tokens(ids) for word, ids in step.items()}
            # More ids than bytes cannot be: see xt_look.
            words = {word: ids for word, ids in words.items() if len(ids) <= 4 * len(word.encode())}
            for recent, _ in tables:
                recent.keep(words)
        else:
            found = [joined(recent.look(step, older)) for recent, older in tables]
            assert found[0] == found[1]


def joined(row):
    """A row with neighbouring ids as one."""
    parts: list[bytes | str] = []
    for part in row:
        if parts and isinstance(part, bytes) and isinstance(parts[-1], bytes):
            parts[-1] += part
        elif part:
            parts.append(part)
    return parts


@needs_library
def test_many_words_are_found_and_cost_what_is_said():
    table, words = table_maker(GPT2_BORDERS)(), {}
    assert 0 < table.num_bytes < 1000
    for number in range(30_000):
        words[f" {number}"] = pack_tokens(range(number % 3))
    table.keep(words)
    assert 30_000 * 18 < table.num_bytes < 30_000 * 100
    assert joined(table.look("".join(words), None)) == [b"".join(words.values())]
    table.keep(dict.fromkeys(words, b"1234"))  # they are there already
    assert table.look(" 2 3 x 4", None) == [words[" 2"] + words[" 3"], " x", words[" 4"]]


@needs_library
def test_long_words_are_not_kept():
    table = table_maker(GPT2_BORDERS)()
    words = {"x" * 252: b"1234", "y" * 253: b"1234", "z" * 63: b"z" * 252, "a" * 64: b"a" * 256}
    table.keep({**words, "more ids than bytes": b"i" * 80, "b" * 20: b"i" * 80, "": b""})
    assert table.look("x" * 252, None) == [b"1234"]
    assert table.look("z" * 63, None) == [b"z" * 252]
    assert table.look("b" * 20, None) == [b"i" * 80]
    for word in ("y" * 253, "a" * 64):
        assert table.look(word, None) == [word]


@needs_library
def test_a_text_of_more_bytes_than_a_table_takes_is_one_word(monkeypatch):
    monkeypatch.setattr(library, "MAX_BYTES", 3)
    assert table_maker(GPT2_BORDERS)().look("a b c", None) == ["a b c"]


@needs_library
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_ABI", 0, "is of version 3, not 0: build it again"),
        ("open_library", lambda *_: "gone", "gone"),
    ],
)
def test_without_the_library_the_pattern_finds_them(monkeypatch, found_anew, name, value, reason):
    monkeypatch.setattr(library, name, value)
    with capture_logs() as logs:
        for _ in range(2):
            assert GPT2_BORDERS.split("one two\n") == ["one", " two\n"]
            assert table_maker(GPT2_BORDERS)().look("one two\n", None) == ["one", " two\n"]
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("words_in_python", "warning")
    assert reason in line["reason"]
