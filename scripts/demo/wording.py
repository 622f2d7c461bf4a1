"""How people word the same question: other forms, openings, slips, and questions off the topic.

Forms by rule widen what the corpus has; a held-out phrasing is never made here, its entry's
caller sees to that.
"""

from __future__ import annotations

import random
import re

REWORDINGS = (
    (
        re.compile(r"^What is (?:an? |the )?(.+)\?$"),
        (
            "Tell me about {}.",
            "Explain {}.",
            "Can you explain what {} is?",
            "What does {} mean?",
            "What's {}?",
            "Do you know what {} is?",
            "Please explain {}.",
            "What do you know about {}?",
            "I want to know about {}.",
            "what about {}?",
            "{}?",
            "What is {} for?",
            "What is {} used for?",
            "What do you call {}?",
            "What does {} stand for?",
            "In one sentence, what is {}?",
        ),
    ),
    (
        re.compile(r"^What are (.+)\?$"),
        ("Tell me about {}.", "Explain {}.", "What do you know about {}?", "Please explain {}."),
    ),
    (
        re.compile(r"^How do I (.+)\?$"),
        (
            "How can I {}?",
            "How to {}?",
            "How should I {}?",
            "I want to {}.",
            "What must I do to {}?",
            "Show me how to {}.",
            "Can you tell me how to {}?",
            "I would like to {}. How?",
            "Is there a way to {}?",
            "Is it possible to {}?",
            "Can I {}?",
        ),
    ),
    (
        re.compile(r"^Does xLLM (?:support|have) (.+)\?$"),
        ("Is there support for {}?", "What about {}?", "Can xLLM do {}?", "Is there {}?"),
    ),
    (
        re.compile(r"^What happens (?:when|if) (.+)\?$"),
        ("What if {}?", "Suppose that {}. What happens?", "And when {}?"),
    ),
    (
        re.compile(r"^Which (.+) are there\?$"),
        (
            "What {} are there?",
            "List the {}.",
            "What are the {}?",
            "Tell me the {}.",
            "Which {} does xLLM have?",
            "Which {} exist?",
        ),
    ),
)


_OPENINGS = (
    "Hi, ",
    "Hello! ",
    "Please: ",
    "Tell me, ",
    "So, ",
    "Can you tell me: ",
    "Could you tell me ",
    "I would like to know: ",
    "Do you know ",
    "I wonder ",
    "And ",
    "Now, ",
    "A question: ",
)

_ASKING = ("What", "How", "Why", "Which", "Who")

_FILLERS = ("exactly", "actually", "really", "then", "precisely", "again", "please")

_OFF_TOPIC_FORMS = (
    "What is the capital of {}?",
    "Who wrote {}?",
    "Tell me about {}.",
    "What do you know about {}?",
    "Who invented {}?",
    "How far is {}?",
    "Write a story about {}.",
    "Explain {}.",
    "What is {}?",
    "What is the best {}?",
    "Where is {}?",
    "How old is {}?",
    "How do I make {}?",
    "Who is {}?",
    "Why is {} so famous?",
    "When was {} built?",
    "Do you like {}?",
    "Where can I buy {}?",
    "What is the longest {}?",
    "How many people live in {}?",
    "Give me a recipe for {}.",
    "Translate {} into Latin.",
)

_OFF_TOPIC_WORDS = (
    *("Spain", "Japan", "Brazil", "Egypt", "London", "Tokyo", "Vienna", "Africa", "Rome", "Peru"),
    *("music", "football", "chess", "cheese", "coffee", "tea", "bread", "soup", "rice", "honey"),
    *("horses", "dogs", "birds", "fish", "trees", "roses", "bees", "wolves", "elephants", "mice"),
    *("the sun", "the moon", "Mars", "the sea", "the weather", "the rain", "a mountain", "gold"),
    *("Napoleon", "Mozart", "Goethe", "Einstein", "Caesar", "Shakespeare", "Picasso", "Newton"),
    *("history", "physics", "biology", "poetry", "painting", "love", "money", "law", "medicine"),
    *("a bicycle", "a ship", "a train", "an aeroplane", "the telephone", "glass", "paper"),
    *("river", "film", "novel", "song", "car", "hotel", "king", "shoe", "holiday", "university"),
)


def off_topic(rng: random.Random) -> str:
    """A question that has nothing to do with xLLM."""
    return rng.choice(_OFF_TOPIC_FORMS).format(rng.choice(_OFF_TOPIC_WORDS))


def roughened(question: str, rng: random.Random) -> str:
    """The question as a hurried person types it."""
    words = question.split(" ")
    if len(words) >= 4 and rng.random() < 0.08:
        words.pop(rng.randrange(len(words) - 1))
        question = " ".join(words)
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.! ") or question
    if len(words) >= 3 and words[0] in _ASKING and rng.random() < 0.06:
        place = rng.randrange(1, 3)
        question = " ".join([*words[:place], rng.choice(_FILLERS), *words[place:]])
    if rng.random() < 0.12:
        question = rng.choice(_OPENINGS) + question[:1].lower() + question[1:]
    if "xLLM" not in question and len(words) >= 3 and rng.random() < 0.04:
        question = question.rstrip("?.! ") + rng.choice((" in xLLM?", " here?", ", please?"))
    return question
