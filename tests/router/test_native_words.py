"""The compiled search for words finds what the patterns find; without it these do."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.fixtures.compiled import looked_for_anew, needs
from xllm.router.text.native import words as library
from xllm.router.text.word_borders import GPT2_BORDERS, LETTERS_FIRST_BORDERS

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


@needs_library
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_ABI", 0, "is of version 1, not 0: build it again"),
        ("open_library", lambda *_: "gone", "gone"),
    ],
)
def test_without_the_library_the_pattern_finds_them(monkeypatch, found_anew, name, value, reason):
    monkeypatch.setattr(library, name, value)
    with capture_logs() as logs:
        for _ in range(2):
            assert GPT2_BORDERS.split("one two\n") == ["one", " two\n"]
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("words_in_python", "warning")
    assert reason in line["reason"]
