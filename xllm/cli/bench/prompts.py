"""Prompts of given lengths: token ids, or words. Pure; the same seed gives the same prompts."""

from __future__ import annotations

import random

from xllm.cli.bench.shapes import RequestShape

FIRST_ID = 3
"""Ids below are special in many vocabularies."""

_TEXT = """
    the of and to in is that it was for on are with as his they be at one have this from or
    had by hot word but what some we can out other were all there when up use your how said an each
    she which do their time if will way about many then them write would like so these her long
    make thing see him two has look more day could go come did number sound no most people my over
    know water than call first who may down side been now find any new work part take get place
    made live where after back little only round man year came show every good me give our under
    name very through just form sentence great think say help low line differ turn cause much mean
    before move right boy old too same tell does set three want air well also play small end put
    home read hand port large spell add even land here must big high such follow act why ask men
    change went light kind off need house picture try us again animal point mother world near build
    self earth father"""

WORDS = tuple(_TEXT.split())
"""Short English words: about one token each in vocabularies trained on English."""


class PromptMaker:
    """Makes prompts. `vocab_size`: ids are drawn below it."""

    def __init__(self, seed: int, vocab_size: int = 0) -> None:
        self._seed = seed
        self._ids = range(min(FIRST_ID, vocab_size - 1), vocab_size) if vocab_size else range(0)

    def ids(self, index: int, shape: RequestShape) -> tuple[int, ...]:
        """The token ids of request `index`."""
        return tuple(self._draw(index, shape, self._ids))

    def text(self, index: int, shape: RequestShape) -> str:
        """As many words as request `index` has tokens."""
        return " ".join(WORDS[i] for i in self._draw(index, shape, range(len(WORDS))))

    def _draw(self, index: int, shape: RequestShape, among: range) -> list[int]:
        drawn: list[int] = []
        for name, count in shape.shared:
            drawn += random.Random(f"{self._seed}/shared/{name}").choices(among, k=count)
        del drawn[shape.num_prompt :]
        own = random.Random(f"{self._seed}/{index}")
        return drawn + own.choices(among, k=shape.num_prompt - len(drawn))
