"""Words found by their borders have the ids that they have in their text."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.router.model_dirs import byte_level_tokenizer
from tests.router.test_segments import write_llama_like
from xllm.cli.model_source import demo_model_path
from xllm.protocol.token_bytes import pack_tokens
from xllm.router.text.segments import make_segment_encoder
from xllm.router.text.word_borders import (
    GPT2_BORDERS,
    LETTERS_FIRST_BORDERS,
    find_word_borders,
)
from xllm.router.text.word_encoder import WordEncoder


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "gpt-2":
        return byte_level_tokenizer()
    if kind == "demo":
        return Tokenizer.from_file(f"{demo_model_path()}/tokenizer.json")
    with tempfile.TemporaryDirectory() as directory:
        write_llama_like(Path(directory))
        return Tokenizer.from_file(f"{directory}/tokenizer.json")


BORDERS = {
    "gpt-2": GPT2_BORDERS,
    "demo": LETTERS_FIRST_BORDERS,
    "llama": LETTERS_FIRST_BORDERS,
}
ALPHABET = "ab1.'s \n\t\r\f\v\x1f\x85\xa0\u3000\u2028\u200b\u0301é½你🙂"


@pytest.mark.parametrize("kind", BORDERS)
@settings(max_examples=400)
@given(st.text(alphabet=ALPHABET, max_size=24))
def test_a_texts_ids_are_those_of_its_words(kind, text):
    made = tokenizer(kind)
    borders = find_word_borders(made)
    assert borders is BORDERS[kind]
    words = borders.words.findall(text)
    assert "".join(words) == text
    whole = made.encode(text, add_special_tokens=False).ids
    apart = [made.encode(word, add_special_tokens=False).ids for word in words]
    assert [one for ids in apart for one in ids] == whole
    for found in borders.cut.finditer(text):
        before, behind = text[: found.end()], text[found.end() :]
        parts = [made.encode(part, add_special_tokens=False).ids for part in (before, behind)]
        assert parts[0] + parts[1] == whole


@pytest.mark.parametrize(
    ("text", "gpt2", "letters_first"),
    [
        ("to be,  or not", ["to", " be,", "  or", " not"], ["to", " be,", "  or", " not"]),
        ("one\ntwo\n", ["one\n", "two\n"], ["one\n", "two\n"]),
        ("if x:\n    go()\n", ["if", " x:\n    go()\n"], ["if", " x:\n", "    go()\n"]),
        ("a\n\nb \n c", ["a\n\nb", " \n c"], ["a\n\n", "b", " \n", " c"]),
        ("a\tb\n \t", ["a\tb\n \t"], ["a\tb\n", " \t"]),
    ],
)
def test_where_they_are(text, gpt2, letters_first):
    assert GPT2_BORDERS.words.findall(text) == gpt2
    assert LETTERS_FIRST_BORDERS.words.findall(text) == letters_first


@pytest.mark.parametrize("kind", BORDERS)
@settings(max_examples=400)
@given(
    st.lists(
        st.one_of(
            st.text(alphabet=ALPHABET, min_size=1, max_size=5),
            st.sampled_from([" the", " fox", " 12", "a\n", "b,\n", "12\n", " b.", " \x00"]),
        ),
        max_size=6,
        unique=True,
    )
)
def test_words_are_encoded_at_once_as_if_each_were_alone(kind, words):
    made = tokenizer(kind)
    expected = [pack_tokens(made.encode(word, add_special_tokens=False).ids) for word in words]
    encoder = WordEncoder(made, BORDERS[kind].split)
    assert encoder.encode(words) == expected


@pytest.mark.parametrize("kind", BORDERS)
def test_lines_and_words_behind_spaces_are_encoded_together(kind):
    encoder = WordEncoder(tokenizer(kind), BORDERS[kind].split)
    asked: list[list[str]] = []
    apart = encoder._encode_apart
    encoder._encode_apart = lambda words: asked.append(list(words)) or apart(words)
    words = ["a,b\n", " fox", "end", "c\n", "\t12", " the", "off", "\n"]
    assert encoder.encode(words) == apart(words)
    assert asked == [["\t12", "off", "\n"]]


def test_many_words_are_one_call():
    encoder = WordEncoder(tokenizer("demo"), LETTERS_FIRST_BORDERS.split)
    for words in (
        ["to", " be,\n", "or"],
        [" \u017eluti\u010dk\u00fd", " k\u016f\u0148", " \U0001f642"],
    ):
        parts = encoder._encode_together("".join(words), words)
        assert parts == encoder._encode_apart(words)
    assert encoder._encode_together(" e\u0301", [" e\u0301"]) is None  # another text, in NFC


def test_a_tokenizer_that_leaves_bytes_out_is_asked_word_by_word():
    made = Tokenizer(
        models.BPE(vocab={"a": 0, "\u0120": 1, "\u0120a": 2}, merges=[("\u0120", "a")])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder = WordEncoder(made, GPT2_BORDERS.split)
    for words in (["zz", " zy"], ["a", " z", " a"], [" z", " a"], ["z"]):
        expected = [pack_tokens(made.encode(word).ids) for word in words]
        assert encoder.encode(words) == expected


def test_words_are_not_put_together_where_an_added_token_has_whitespace():
    made = Tokenizer.from_str(tokenizer("llama").to_str())
    assert make_segment_encoder(made).words is not None
    made.add_special_tokens(["<|a b|>"])
    encoder = make_segment_encoder(made)
    assert encoder.words is None
    for text in (" x", "y <|a x b|>", "y <|a b|> x"):
        assert encoder.encode(text, b"") == made.encode(text, add_special_tokens=False).ids
