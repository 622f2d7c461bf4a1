"""Encoding by segments gives what the tokenizer gives for the whole text."""

from __future__ import annotations

import functools

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from tests.router.model_dirs import byte_level_tokenizer
from xllm.router.text import segments
from xllm.router.text.model import TextModel
from xllm.router.text.pieces import ByteLevelScheme
from xllm.router.text.segments import make_segment_encoder


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


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(segments, "MAX_SEGMENTS", 4)
    made = make_segment_encoder(tokenizer())
    for number in range(50):
        made.encode(f"a text of its own {number}", b"")
        assert len(made._young) <= 4
        assert len(made._old) <= 4
    result = made.encode("a text of its own 49", b"")
    result.append(1)
    assert made.encode("a text of its own 49", b"") == result[:-1]


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
