"""Train the demo model: corpus in, a model directory out. `scripts/train-demo` runs it.

Everything random comes from one seed and one thread computes, so that two runs with the same
torch on the same kind of CPU write the same bytes; the SHA-256 of the weights is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from scripts.demo.conversations import (
    END_OF_TEXT,
    TURN_END,
    TURN_START,
    Conversations,
    Turn,
    read_entries,
    read_texts,
)
from scripts.demo.evaluate import evaluate
from scripts.demo.network import DemoNetwork, Shape
from scripts.demo.vocabulary import save_tokenizer, train_tokenizer

SEED = 20
ROW_TOKENS = 384
ROWS = 8
PROMPT_WEIGHT = 0.05
"""Weight of the loss on tokens that the model need not say: questions, system prompts."""
TEXT_SHARE = 0.03


class Packer:
    """Rows of ROW_TOKENS + 1 ids and loss weights, cut from a stream of whole documents."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._conversations = Conversations(read_entries(), rng)
        self._texts = read_texts()
        self._end = tokenizer.token_to_id(END_OF_TEXT)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _document(self) -> tuple[list[int], list[float]]:
        if self._rng.random() < TEXT_SHARE:
            ids = [*self._ids(self._rng.choice(self._texts)), self._end]
            return ids, [0.5] * len(ids)
        return self._chat(self._conversations.draw())

    def _chat(self, turns: list[Turn]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for role, text in turns:
            head = self._ids(f"{TURN_START}{role}\n")
            body = self._ids(text + TURN_END)
            tail = self._ids("\n")
            ids += head + body + tail
            weight = 1.0 if role == "assistant" else PROMPT_WEIGHT
            weights += [0.05] * len(head) + [weight] * len(body) + [0.05] * len(tail)
        return [*ids, self._end], [*weights, 0.05]

    def row(self) -> tuple[list[int], list[float]]:
        """One row: it begins with a whole document, its last one may be cut."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < ROW_TOKENS + 1:
            more_ids, more_weights = self._document()
            more_weights[0] = 0.0
            ids += more_ids
            weights += more_weights
        return ids[: ROW_TOKENS + 1], weights[: ROW_TOKENS + 1]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [ROWS, ROW_TOKENS + 1] and weights of the same shape."""
        rows = [self.row() for _ in range(ROWS)]
        return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, then a cosine down to a hundredth."""
    if step < 50:
        return peak * (step + 1) / 50
    part = (step - 50) / max(1, steps - 50)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


def train(network: DemoNetwork, packer: Packer, steps: int, peak: float) -> None:
    """AdamW over `steps` batches."""
    matrices = [p for p in network.parameters() if p.dim() == 2]
    vectors = [p for p in network.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    begin = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids, weights = packer.batch()
        logits = network(ids[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        scale = weights[:, 1:].flatten()
        loss = (losses * scale).sum() / scale.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - begin
            print(f"step {step:5} of {steps}  loss {loss.item():.4f}  {seconds:6.1f} s", flush=True)


def save_model(network: DemoNetwork, tokenizer: Tokenizer, directory: Path) -> str:
    """Weights in bf16 and the configuration files; gives the SHA-256 of the weights."""
    shape = network.shape
    end, stop = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    tensors = {
        f"model.{name}": tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in network.state_dict().items()
    }
    path = directory / "model.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": stop,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_len,
        "max_window_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }
    generation = {"eos_token_id": [stop, end], "pad_token_id": end, "do_sample": False}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Train, save, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--rate", type=float, default=4e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    tokenizer = train_tokenizer(read_entries(), read_texts(), shape.vocab_size)
    save_tokenizer(tokenizer, arguments.out, shape.max_len)
    network = DemoNetwork(shape)
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)
    train(network, Packer(tokenizer, random.Random(SEED)), arguments.steps, arguments.rate)
    print("SHA-256 of model.safetensors:", save_model(network, tokenizer, arguments.out))
    evaluate(network, tokenizer)


if __name__ == "__main__":
    main()
