"""Texts that are like those that people send, in any number and of any length.

Lines of English and of code, from Python's own manual, in random order; about one word in a hundred
is made up, so that nobody has met it before.
"""

from __future__ import annotations

import functools
import random
import string
from pydoc_data.topics import topics

NEW_WORD_EACH = 9
"""One line in so many, of about eleven words, gets a new word."""


@functools.cache
def lines() -> tuple[str, ...]:
    """Those of the manual that are not empty."""
    return tuple(
        stripped
        for name in sorted(topics)
        for line in topics[name].splitlines()
        if (stripped := line.strip())
    )


def text(some: random.Random, num_chars: int) -> str:
    """A text of so many characters."""
    parts: list[str] = []
    left = num_chars
    while left > 0:
        line = some.choice(lines())
        if not some.randrange(NEW_WORD_EACH):
            line += " " + "".join(some.choices(string.ascii_lowercase, k=7))
        parts.append(line)
        left -= len(line) + 1
    return "\n".join(parts)[:num_chars]


def prompts(num_chars: int, shared_chars: int, pool: int, seed: int = 1) -> list[str]:
    """A pool of prompts of `num_chars` characters of which the first are the same in all."""
    some = random.Random(seed)
    shared = text(some, shared_chars)
    return [shared + text(some, num_chars - shared_chars) for _ in range(pool)]
