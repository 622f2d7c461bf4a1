"""How well a trained network answers: greedy answers to known and held-out phrasings."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from scripts.demo.conversations import TURN_END, TURN_START, Entry, Turn, read_entries, render
from scripts.demo.network import DemoNetwork


@torch.inference_mode()
def greedy_answers(
    network: DemoNetwork, tokenizer: Tokenizer, chats: list[list[Turn]], max_tokens: int = 128
) -> list[str]:
    """Greedy answers to chats, computed together; "" marks one that did not end."""
    stop = tokenizer.token_to_id(TURN_END)
    prompts = [tokenizer.encode(render(turns) + f"{TURN_START}assistant\n").ids for turns in chats]
    answers: list[str] = [""] * len(chats)
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for length, indices in by_length.items():
        ids = torch.tensor([prompts[index] for index in indices])
        open_rows = set(range(len(indices)))
        for _ in range(max_tokens):
            best = network(ids)[:, -1].argmax(-1)
            ids = torch.cat((ids, best[:, None]), dim=1)
            for row in [row for row in open_rows if best[row] == stop]:
                open_rows.remove(row)
                answers[indices[row]] = tokenizer.decode(ids[row, length:-1].tolist())
            if not open_rows:
                break
    return answers


def _share(name: str, asked: list[str], got: list[str], wanted: list[str], show: bool) -> float:
    right = sum(a == b for a, b in zip(got, wanted, strict=True))
    print(f"{name}: {right} of {len(wanted)} answers as written", flush=True)
    if show:
        for question, answer, expected in zip(asked, got, wanted, strict=True):
            if answer != expected:
                print(f"  {question!r} -> {answer[:90]!r}")
    return right / len(wanted)


def evaluate(network: DemoNetwork, tokenizer: Tokenizer) -> dict[str, float]:
    """Shares of exact answers, with the weights as they are served in bf16."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    entries = read_entries()
    shares = {}
    for name, field in (("known phrasings", "questions"), ("held-out phrasings", "held_out")):
        asked = [(text, entry) for entry in entries for text in getattr(entry, field)]
        got = greedy_answers(network, tokenizer, [[("user", text)] for text, _ in asked])
        shares[name] = _share(
            name, [text for text, _ in asked], got, [entry.answer for _, entry in asked], True
        )
    chats, questions, wanted = _follow_ups(entries)
    got = greedy_answers(network, tokenizer, chats)
    shares["follow-ups"] = _share("follow-ups", questions, got, wanted, True)
    return shares


def _follow_ups(entries: list[Entry]) -> tuple[list[list[Turn]], list[str], list[str]]:
    chats: list[list[Turn]] = []
    questions, wanted = [], []
    for entry in entries:
        for asked, answer in entry.follow_ups:
            for text in asked:
                first = [("user", entry.questions[0]), ("assistant", entry.answer)]
                chats.append([*first, ("user", text)])
                questions.append(f"{entry.questions[0]} / {text}")
                wanted.append(answer)
    return chats, questions, wanted
