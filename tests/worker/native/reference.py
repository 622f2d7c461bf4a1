"""The oracle: transformers' own models with eager attention, in fp32 unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

LOGIT_BOUND = 1e-4
"""Logits agree within this in fp32; two candidates closer than this may change places."""


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a directory."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    )
    return model.eval()


def reference_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """fp32 logits [tokens, vocab] of one text."""
    with torch.inference_mode():
        return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()


def assert_greedy(model: Any, prompt: Sequence[int], output: Sequence[int]) -> int:
    """Every token of `output` is the reference's best after prompt and the tokens before it, or
    closer to the best than the bound (then the check goes on with it: teacher-forced). Returns
    how many were such near ties."""
    logits = reference_logits(model, [*prompt, *output])[len(prompt) - 1 : -1]
    best, best_ids = logits.max(dim=-1)
    drawn = logits.gather(1, torch.tensor(list(output))[:, None])[:, 0]
    behind = best - drawn
    wrong = (behind > LOGIT_BOUND).nonzero()
    assert not len(wrong), f"token {int(wrong[0])} of the output is {float(behind.max())} behind"
    return int((best_ids != torch.tensor(list(output))).sum())
