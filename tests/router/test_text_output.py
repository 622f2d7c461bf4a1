"""The output object: text and stop points depend on the tokens alone."""

from __future__ import annotations

import functools
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.router.model_dirs import byte_fallback_tokenizer, byte_level_tokenizer
from xllm.protocol.sampling import SamplingParams
from xllm.router.text.detokenizer import MAX_PENDING, WindowDetokenizer
from xllm.router.text.model import TextModel
from xllm.router.text.pieces import ByteLevelScheme, SentencePieceScheme, find_scheme
from xllm.router.text.stops import StopMatcher


@functools.cache
def byte_level() -> TextModel:
    return TextModel(byte_level_tokenizer(), ByteLevelScheme(), None)


@functools.cache
def fallback() -> TextModel:
    return TextModel(byte_fallback_tokenizer(), SentencePieceScheme("▁", True, 1), None)


@functools.cache
def window() -> TextModel:
    vocab = {"[UNK]": 0, "he": 1, "##llo": 2, "world": 3, "##s": 4, "!": 5}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return TextModel(tokenizer, None, None)


def chunks(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    edges = [0, *cuts, len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@st.composite
def chunked_ids(draw: st.DrawFn, size: int) -> tuple[list[int], list[list[int]]]:
    ids = draw(st.lists(st.integers(0, size - 1), max_size=40))
    return ids, chunks(draw, ids)


def say(
    model: TextModel, pieces: list[list[int]], sampling: SamplingParams
) -> tuple[str, int, str | None]:
    output = model.output(sampling, ())
    text = ""
    for piece in pieces:
        delta = output.feed(piece)
        delta.encode()  # each delta is valid text of its own
        text += delta
    text += output.finish()
    output.check()
    return text, output.num_tokens, output.stop


@given(chunked_ids(320), st.booleans())
def test_byte_level_text_is_what_the_library_decodes(given_ids, skip):
    ids, pieces = given_ids
    expected = byte_level()._tokenizer.decode(ids, skip_special_tokens=skip)
    assert say(byte_level(), pieces, SamplingParams(skip_special_tokens=skip))[0] == expected


@given(chunked_ids(295))
def test_byte_fallback_text_does_not_depend_on_chunks(given_ids):
    ids, pieces = given_ids
    text = say(fallback(), pieces, SamplingParams())[0]
    assert text == say(fallback(), [ids], SamplingParams())[0]
    if "\ufffd" not in text:
        assert text == fallback()._tokenizer.decode(ids)


@given(st.text(max_size=40))
def test_byte_fallback_round_trips_any_text(text):
    model = fallback()
    ids = model.encode(text, add_special_tokens=False)
    assert say(model, [[i] for i in ids], SamplingParams())[0] == model._tokenizer.decode(ids)


@given(chunked_ids(6))
def test_window_detokenizer_does_not_depend_on_chunks(given_ids):
    ids, pieces = given_ids
    assert say(window(), pieces, SamplingParams())[0] == say(window(), [ids], SamplingParams())[0]


def test_window_detokenizer_joins_words():
    assert say(window(), [[1], [2], [3, 4], [5]], SamplingParams())[0] == "hello worlds!"


@given(
    chunked_ids(320),
    st.lists(
        st.sampled_from(["a", "he", "the", " q", "o ", "th", "e q", "\n"]), min_size=1, max_size=3
    ),
    st.booleans(),
    st.integers(0, 8),
)
def test_stop_point_does_not_depend_on_chunks(given_ids, stops, include, min_tokens):
    ids, pieces = given_ids
    sampling = SamplingParams(
        stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens
    )
    one_by_one = say(byte_level(), [[i] for i in ids], sampling)
    assert say(byte_level(), pieces, sampling) == one_by_one
    assert say(byte_level(), [ids], sampling) == one_by_one


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_first_completed_stop_wins(text, stops):
    model = byte_level()
    ids = [model._tokenizer.token_to_id({"\n": "Ċ"}.get(c, c)) for c in text]
    said, counted, stop = say(model, [ids], SamplingParams(stop=tuple(stops)))
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert (said, counted, stop) == (text, len(ids), None)
        return
    end = min(ends)
    assert counted == end
    assert stop == max((s for s in stops if text[:end].endswith(s)), key=len)
    assert said == text[: end - len(stop)]


def test_a_match_may_end_inside_a_token():
    model = byte_level()
    ids = model.encode("the quick")
    text, counted, stop = say(model, [ids], SamplingParams(stop=("e q",)))
    assert (text, stop) == ("th", "e q")
    assert model.decode(ids[:counted]).startswith("the q")
    included = say(model, [ids], SamplingParams(stop=("e q",), include_stop_str_in_output=True))
    assert included == ("the q", counted, "e q")


def test_what_might_begin_a_stop_is_held_and_comes_at_the_end():
    matcher = StopMatcher(("END",))
    assert matcher.feed("the E") == ("the ", None)
    assert matcher.feed("N") == ("", None)
    assert matcher.feed("d") == ("ENd", None)
    assert matcher.feed("EN") == ("", None)
    assert matcher.finish() == "EN"


def test_the_longest_stops_for_the_most_choices_cost_little():
    """As many choices as one HTTP request may have, each with the longest stop strings."""
    stops = tuple("a" * 500 + str(k).zfill(12) for k in range(16))
    tracemalloc.start()
    matchers = [StopMatcher(stops) for _ in range(128)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(matchers) == 128
    assert size < 1 << 20


class Watched(str):
    """A text that counts how often one of its characters is looked at by its index."""

    num_looks = 0

    def __radd__(self, held):
        return Watched(str(held) + str(self))

    def __getitem__(self, key):
        Watched.num_looks += isinstance(key, int)
        return str(self)[key]


def test_text_that_almost_stops_over_and_over_is_looked_at_about_once(monkeypatch):
    monkeypatch.setattr(Watched, "num_looks", 0)
    stops = tuple("a" * 500 + str(k).zfill(12) for k in range(16))
    matcher = StopMatcher(stops)
    pieces = ["a" * (k % 7) + "b" * (k % 500 == 0) for k in range(5000)]
    text = "".join(pieces)
    said = "".join(matcher.feed(Watched(piece))[0] for piece in pieces)
    # One look lets a character go, or keeps the rest: one for each piece.
    assert len(text) / 2 < Watched.num_looks <= len(text) + len(pieces)
    assert said + matcher.finish() == text


class NeverSure:
    """A tokenizer none of whose tokens ever becomes a character; counts what it decodes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.num_decoded += len(ids)
        return self.text * len(ids)


@pytest.mark.parametrize("text", ["\ufffd", ""])
def test_text_that_stays_incomplete_costs_the_same_for_each_token(text):
    tokenizer = NeverSure(text)
    output = WindowDetokenizer(tokenizer, True)
    said = output.feed(range(10_000)) + output.finish()
    assert said == text * 10_000
    assert tokenizer.num_decoded < 10_000 * 2 * MAX_PENDING + 1000


def test_min_tokens_guards_stop_strings():
    model = byte_level()
    ids = [model._tokenizer.token_to_id(c) for c in "xaxax"]
    assert say(model, [ids], SamplingParams(stop=("a",), min_tokens=3)) == ("xax", 4, "a")
    assert say(model, [ids], SamplingParams(stop=("a",), min_tokens=2)) == ("x", 2, "a")


def test_incomplete_utf8_is_held_and_replaced_only_at_the_end():
    model = byte_level()
    ids = model.encode("é🙂")
    output = model.output(SamplingParams(), ())
    told = [output.feed([i]) for i in ids[:-1]]
    assert "".join(told) == "é"
    assert output.finish() == "\ufffd"
    whole = model.output(SamplingParams(), ())
    assert "".join(whole.feed([i]) for i in ids) == "é🙂"
    assert whole.finish() == ""


def test_leading_space_belongs_to_a_continued_text():
    model = fallback()
    ids = model.encode("hello", add_special_tokens=False)
    fresh = model.output(SamplingParams(), (1,))
    assert fresh.feed(ids) == "hello"
    after_text = model.output(SamplingParams(), (1, *ids))
    assert after_text.feed(ids) == " hello"


def test_metaspace_strips_the_first_tokens_spaces():
    tokenizer = byte_fallback_tokenizer(metaspace=True)
    model = TextModel(tokenizer, find_scheme({"type": "Metaspace", "replacement": "▁"}), None)
    ids = tokenizer.encode("  hi there", add_special_tokens=False).ids
    assert model.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece"},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "CTC"}]},
        {
            "type": "Sequence",
            "decoders": [{"type": "Strip", "content": " ", "start": 0, "stop": 1}],
        },
    ],
)
def test_other_decoders_have_no_table(decoder):
    assert find_scheme(decoder) is None
