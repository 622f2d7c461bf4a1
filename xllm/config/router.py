"""A router's addresses, limits and patience."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting
from xllm.config.routing import POLICIES


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """The service's front: addresses, limits, patience."""

    name: str = setting("", "Unique name of this router; empty: one is made.")
    host: str = setting("127.0.0.1", "Address that the HTTP server listens on.")
    port: int = setting(8010, "Port of the HTTP server; 0: any free one.", low=0, high=65535)
    share_port: bool = setting(
        False,
        "Let other routers of this machine and user listen on the same HTTP port: the kernel "
        "spreads new connections over them.",
    )
    zmq_host: str = setting("127.0.0.1", "Address that the ZeroMQ endpoint listens on.")
    zmq_port: int = setting(
        8011, "Port of the ZeroMQ endpoint; 0: any free one.", low=0, high=65535
    )
    api_key_file: str = setting("", "File with one `name:key` a line, mode 0600; empty: no keys.")
    single_tenant: bool = setting(
        False, "Everybody who asks is one tenant: cached prefixes are shared between API keys."
    )
    bus_endpoint: str = setting("", "Where presence is published; empty: ipc in the run directory.")
    max_inflight: int = setting(4096, "Open requests at most; more are refused.", low=1)
    max_body_bytes: int = setting(4 << 20, "Largest HTTP body.", unit="bytes", low=1024)
    text_cache_bytes: int = setting(
        64 << 20,
        "Encoded texts that are remembered for the next turn of their conversation, and words, a "
        "quarter of it, each model; 0: none.",
        unit="bytes",
        low=0,
    )
    hash_cache_bytes: int = setting(
        16 << 20,
        "Block hashes that are remembered for prompts which begin like an earlier one, each "
        "model; 0: none.",
        unit="bytes",
        low=0,
    )
    max_prompts: int = setting(64, "Prompts in one completion request at most.", low=1)
    max_inputs: int = setting(2048, "Inputs of one embeddings request at most.", low=1)
    max_choices: int = setting(128, "n times prompts of one request at most.", low=1)
    max_logprobs: int = setting(20, "Alternatives a token at most.", low=0, high=1000)
    max_stop_strings: int = setting(16, "Stop strings of a request at most.", low=0)
    max_stop_chars: int = setting(512, "Characters of one stop string at most.", low=1)
    max_logit_bias: int = setting(1024, "Entries of logit_bias at most.", low=0)
    timeout_s: float = setting(600.0, "Longest life of a request.", unit="s", low=1)
    hold_ms: int = setting(
        20,
        "Tokens of an HTTP stream may be held this long to travel together; 0: each as it comes.",
        unit="ms",
        low=0,
        high=1000,
    )
    policy: str = setting(
        "prefix-aware", "How an instance is chosen (docs/routing.md).", choices=POLICIES
    )
