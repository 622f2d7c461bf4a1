"""The model that an instance serves: where it is, its name, and how its weights are read."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which model is served and under what name."""

    path: str = setting("", "Model directory or hub id; empty: the bundled demo model.")
    name: str = setting("", "Name that clients use; empty: the last part of the path.")
    more: str = setting(
        "",
        "Further models for the same worker and memory (docs/xtensor.md): PATH or NAME=PATH, "
        "separated by commas. All other settings hold for each.",
    )
    revision: str = setting("", "Hub revision to download; empty: the main one.")
    max_model_len: int = setting(
        0,
        "Longest prompt + output; 0: what the model allows, and more is refused (of several models "
        "each has what it allows of it).",
        unit="tokens",
        low=0,
    )
    implementation: str = setting(
        "auto",
        "native: this package's own; transformers: the library's, with this package's attention; "
        "auto: native where there is one.",
        choices=("auto", "native", "transformers"),
    )
    dtype: str = setting(
        "auto", "Type of weights and KV.", choices=("auto", "float32", "bfloat16", "float16")
    )
    task: str = setting(
        "auto",
        "generate: tokens; embed: vectors (/v1/embeddings); auto: embed where the directory is "
        "that of an embedding model, or its checkpoint has no head.",
        choices=("auto", "generate", "embed"),
    )
    pooling: str = setting(
        "auto",
        "How a text becomes one vector: its last token, or the mean of all; auto: what the "
        "directory says, else last.",
        choices=("auto", "last", "mean"),
    )
    quantization: str = setting(
        "none",
        "Round the weights when they are read (docs/quantization.md); w8a8: rows of activations "
        "too. Needs the compiled kernels.",
        choices=("none", "int8", "int4", "w8a8"),
    )
