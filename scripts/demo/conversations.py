"""The corpus as conversations: reading it, varying its questions, rendering chats as text.

The files `corpus/*.txt` hold entries separated by blank lines: `Q:` a phrasing of a question,
`H:` a phrasing held out for evaluation, `A:` the answer, `>` follow-up questions (separated by
`|`) and `<` their answer. `corpus/texts.txt` holds plain paragraphs. All randomness comes from
the generator that is passed in, so that a seed gives the same conversations everywhere.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from scripts.demo.wording import REWORDINGS, off_topic, roughened

CORPUS = Path(__file__).parent / "corpus"

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the xLLM demo model.",
    "Answer briefly.",
    "You answer questions about xLLM.",
    "You are a helpful assistant. Answer in plain words.",
)


@dataclasses.dataclass
class Entry:
    """One answer with the questions that lead to it."""

    questions: list[str] = dataclasses.field(default_factory=list)
    held_out: list[str] = dataclasses.field(default_factory=list)
    answer: str = ""
    follow_ups: list[tuple[list[str], str]] = dataclasses.field(default_factory=list)


FREQUENT = ("What is xLLM?", "What is xLLM?", "Who are you?", "What can you do?", "Hello")
"""What people ask first: drawn more often than other questions."""

FALLBACK = "I do not know that."
"""How the answer to everything else begins."""

Turn = tuple[str, str]
"""(role, content) of one message."""


def read_entries() -> list[Entry]:
    """All questions and answers, in the order of the files' names."""
    entries: list[Entry] = []
    for path in sorted(CORPUS.glob("*.txt")):
        if path.name == "texts.txt":
            continue
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            lines = [line for line in paragraph.splitlines() if line and not line.startswith("#")]
            if lines:
                entries.append(_read_entry(lines, path.name))
    return entries


def _read_entry(lines: list[str], source: str) -> Entry:
    entry = Entry()
    for line in lines:
        mark, _, rest = line.partition(" ")
        if mark == "Q:":
            entry.questions.append(rest)
        elif mark == "H:":
            entry.held_out.append(rest)
        elif mark == "A:":
            entry.answer = rest
        elif mark == ">":
            entry.follow_ups.append(([part.strip() for part in rest.split("|")], ""))
        elif mark == "<":
            entry.follow_ups[-1] = (entry.follow_ups[-1][0], rest)
        else:
            raise ValueError(f"{source}: no such line: {line}")
    if not entry.questions or not entry.answer:
        raise ValueError(f"{source}: an entry without question or answer: {lines[0]}")
    return entry


def read_texts() -> list[str]:
    """The plain paragraphs."""
    paragraphs = (CORPUS / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    return [text.strip() for text in paragraphs if not text.startswith("#")] + [
        text.strip().split("\n", 1)[1].strip() for text in paragraphs if text.startswith("#")
    ]


def reworded(entry: Entry) -> list[str]:
    """Phrasings that follow from the entry's own by rule, none of them held out."""
    found: list[str] = []
    for question in entry.questions:
        for pattern, forms in REWORDINGS:
            match = pattern.match(question)
            if match:
                found += [form.format(match.group(1)) for form in forms]
    known = {*entry.questions, *entry.held_out}
    return [text for text in dict.fromkeys(found) if text not in known]


def render(turns: list[Turn]) -> str:
    """Messages as the chat template renders them."""
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns)


class Conversations:
    """Draws conversations: one to four turns, sometimes with a system prompt."""

    def __init__(self, entries: list[Entry], rng: random.Random) -> None:
        self._entries = entries
        self._reworded = [reworded(entry) for entry in entries]
        self._rng = rng
        self._fallback = next(
            index for index, entry in enumerate(entries) if entry.answer.startswith(FALLBACK)
        )
        self._frequent = [
            next(index for index, entry in enumerate(entries) if question in entry.questions)
            for question in FREQUENT
        ]
        self._order: list[int] = []

    def _next_entry(self) -> int:
        if not self._order:
            self._order = list(range(len(self._entries))) + [self._fallback] * 8 + self._frequent
            self._rng.shuffle(self._order)
        return self._order.pop()

    def _question(self, index: int) -> str:
        if index == self._fallback and self._rng.random() < 0.7:
            return roughened(off_topic(self._rng), self._rng)
        own, more = self._entries[index].questions, self._reworded[index]
        pool = more if more and self._rng.random() < 0.35 else own
        return roughened(self._rng.choice(pool), self._rng)

    def draw(self) -> list[Turn]:
        """The messages of one conversation."""
        rng = self._rng
        turns: list[Turn] = []
        if rng.random() < 0.2:
            turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
        num_turns = rng.choices((1, 2, 3, 4), (60, 25, 10, 5))[0]
        while num_turns > 0:
            index = self._next_entry()
            entry = self._entries[index]
            turns += [("user", self._question(index)), ("assistant", entry.answer)]
            num_turns -= 1
            if entry.follow_ups and rng.random() < 0.5:
                asked, answer = rng.choice(entry.follow_ups)
                turns += [
                    ("user", roughened(rng.choice(asked), rng)),
                    ("assistant", answer),
                ]
                num_turns -= 1
        return turns
