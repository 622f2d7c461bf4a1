"""How long a context a benchmark asks for."""

from __future__ import annotations

import json
from pathlib import Path


def context_length(model: str | Path, most: int = 2048) -> str:
    """`most`, or what the model of that directory allows, as a setting's text."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return str(min(most, int(config.get("max_position_embeddings", most))))
