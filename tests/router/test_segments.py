"""Encoding by segments gives what the tokenizer gives for the whole text."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from tests.fixtures.tokenizers import write_byte_fallback, write_byte_level
from tests.router.model_dirs import byte_level_tokenizer
from xllm.cli.model_source import demo_model_path
from xllm.protocol.generation import ChatMessage
from xllm.router.text.model import TextModel, load_text_model
from xllm.router.text.pieces import ByteLevelScheme
from xllm.router.text.segments import CHUNK_CHARS, make_segment_encoder
from xllm.router.text.word_borders import find_word_borders


@functools.cache
def tokenizer() -> Tokenizer:
    made = byte_level_tokenizer()
    made.add_special_tokens(["<|im", "<|im_start|>x"])  # prefixes of one another
    return made


@functools.cache
def encoder():
    made = make_segment_encoder(tokenizer())
    assert made is not None
    return made


WORDS = st.sampled_from(
    ["<|im_start|>", "<|im", "<|im_start|>x", "<|end|>", "<tool call>", "hello world ", " ", "\n",
     "<|", "im_start|>", "the quick brown fox", "é🙂", "x"]
)  # fmt: skip


@given(st.lists(WORDS, max_size=12).map("".join), st.sampled_from([b"", b"t"]))
def test_segments_give_the_whole_texts_ids(text, owner):
    expected = tokenizer().encode(text, add_special_tokens=False).ids
    assert encoder().encode(text, owner) == expected
    assert encoder().encode(text, owner) == expected


@given(st.text(max_size=60))
def test_any_text(text):
    assert encoder().encode(text, b"") == tokenizer().encode(text, add_special_tokens=False).ids


def test_a_second_turn_encodes_only_its_tail_and_tenants_share_nothing():
    made = make_segment_encoder(tokenizer())
    turn = "<|im_start|>user\nthe quick brown fox<|im_end|>"
    made.encode(turn, b"a")
    assert made.num_hits == 0
    made.encode(turn + "<|im_start|>hello again, fox", b"a")
    assert made.num_hits == 1
    made.encode(turn, b"b")
    assert made.num_hits == 1


def test_a_segment_that_comes_again_in_one_text_is_encoded_once():
    for made in (make_segment_encoder(tokenizer()), two_models("demo")[0].segments):
        turn, end = "the quick brown fox, once more", "<|im_end|>"
        before = made.num_hits, made.num_encoded, made.num_found
        made.encode(turn, b"alone")
        size = made.num_encoded - before[1]
        made.encode((turn + end) * 100, b"again")
        after = made.num_hits, made.num_encoded, made.num_found
        assert after == (before[0] + 99, before[1] + 2 * size, before[2] + 99 * size)


def test_what_is_remembered_is_bounded():
    made = make_segment_encoder(tokenizer(), max_bytes=2000)
    for number in range(50):
        made.encode(f"a text of its own {number}", b"")
        assert 0 < made.kept.num_bytes <= 2000
    result = made.encode("a text of its own 49", b"")
    assert made.num_hits == 1
    result.append(1)
    assert made.encode("a text of its own 49", b"") == result[:-1]
    assert make_segment_encoder(tokenizer(), max_bytes=0).encode("hello", b"") == result[:0] + (
        tokenizer().encode("hello", add_special_tokens=False).ids
    )


def test_tokenizers_whose_segments_depend_on_each_other_have_none():
    spaced = byte_level_tokenizer()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert make_segment_encoder(spaced) is None
    prepends = byte_level_tokenizer()
    prepends.normalizer = normalizers.Prepend("_")
    assert make_segment_encoder(prepends) is None
    swallows = byte_level_tokenizer()
    swallows.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert make_segment_encoder(swallows) is None
    composed = byte_level_tokenizer()
    composed.normalizer = normalizers.NFC()
    assert make_segment_encoder(composed) is not None
    assert TextModel(spaced, ByteLevelScheme(), None).encode("x") == spaced.encode("x").ids


def write_llama_like(directory: Path) -> None:
    """Byte-level with the pattern of Llama 3: numbers by three digits, words behind any sign."""
    write_byte_level(directory, 500)
    path = str(directory / "tokenizer.json")
    made = Tokenizer.from_file(path)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.normalizer = normalizers.NFC()
    made.save(path)


WRITERS = {
    "byte-level": functools.partial(write_byte_level, vocab_size=500),
    "llama-like": write_llama_like,
    "byte-fallback": functools.partial(write_byte_fallback, vocab_size=420, chat_template=True),
}


@functools.cache
def two_models(kind: str) -> tuple[TextModel, Tokenizer]:
    """A model that remembers, and its tokenizer as it is."""
    with tempfile.TemporaryDirectory() as directory:
        path = demo_model_path()
        if kind != "demo":
            path = directory
            WRITERS[kind](Path(path))
        return load_text_model(path, 200_000), Tokenizer.from_file(f"{path}/tokenizer.json")


SCRAPS = st.one_of(
    WORDS,
    st.text(max_size=8),
    st.sampled_from(
        ["\n", " \n ", "\n\n", "  ", "\u3000", "\x1f ", "\u0301", " \u0308x", "\u2000", "'s",
         "' s", "12345", " ½ ", "привет мир", "你好 世界", "<|im_end|>", "<s>", "don't  stop\n"]
    ),
)  # fmt: skip


@st.composite
def long_texts(draw) -> str:
    """Longer than a chunk: drawn scraps between repeated ones, so that cuts fall among them."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        scrap = draw(SCRAPS)
        most = CHUNK_CHARS * 5 // 4 // max(1, len(scrap))
        parts.append(scrap * draw(st.sampled_from([1, 1, most // 4, most])))
        parts += draw(st.lists(SCRAPS, max_size=6))
    return "".join(parts)


@pytest.mark.parametrize("kind", ["demo", *WRITERS])
@settings(max_examples=30)
@given(st.data())
def test_turns_of_a_talk_are_encoded_as_if_each_were_the_first(kind, data):
    model, plain = two_models(kind)
    talk: list[ChatMessage] = []
    for _ in range(data.draw(st.integers(1, 4))):
        change = data.draw(st.sampled_from(["add", "add", "grow", "edit", "drop"]))
        content = data.draw(st.one_of(SCRAPS, long_texts()))
        at = data.draw(st.integers(0, max(0, len(talk) - 1)))
        if change == "add" or not talk:
            talk.append(ChatMessage(role="user", content=content))
        elif change == "grow":
            talk[at] = ChatMessage(role="user", content=talk[at].content + content)
        elif change == "edit":
            old = talk[at].content
            middle = data.draw(st.integers(0, len(old)))
            talk[at] = ChatMessage(role="user", content=old[:middle] + content + old[middle + 3 :])
        else:
            del talk[at]
        text = model.render(talk, {})
        owner = data.draw(st.sampled_from([b"", b"t"]))
        assert model.encode(text, False, owner) == plain.encode(text, add_special_tokens=False).ids
        assert model.encode(text) == plain.encode(text).ids


def test_a_long_text_that_grows_encodes_only_its_tail():
    model, plain = two_models("demo")
    text = "many words that nobody has asked about before, in one message " * 300
    model.encode(text, False, b"grows")
    encoded = model.segments.num_encoded
    more = text + "and a tail"
    assert model.encode(more, False, b"grows") == plain.encode(more, add_special_tokens=False).ids
    assert model.segments.num_encoded - encoded < CHUNK_CHARS
    encoded = model.segments.num_encoded
    model.encode(more, False, b"another tenant")
    assert model.segments.num_encoded - encoded > 3 * CHUNK_CHARS // 4


def test_unknown_patterns_are_not_cut():
    made = byte_level_tokenizer()
    assert find_word_borders(made) is not None
    # A token with a space in it would be cut.
    assert make_segment_encoder(made)._cut_word is None
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert find_word_borders(made) is None
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    assert find_word_borders(made) is None
