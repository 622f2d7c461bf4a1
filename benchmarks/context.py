"""How long a context a benchmark asks for."""

from __future__ import annotations

import json
from pathlib import Path


def context_length(model: str | Path, most: int = 2048) -> str:
    """`most`, or what the model of that directory allows, as a setting's text. A directory without
    a model is for whoever loads it to complain of."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return str(most)
    config = json.loads(file.read_text(encoding="utf-8"))
    return str(min(most, int(config.get("max_position_embeddings", most))))
