"""A running service with keys: two API tenants, a CURVE client and logs in files."""

from __future__ import annotations

import os
import pathlib

import httpx

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served
from xllm.cli.keys import allow_peer
from xllm.client import Client
from xllm.protocol.transport.security import create_keys

MODEL = "toy-model"
ALICE, ALICE_TOO, BOB, CAROL = (
    f"{name}-0123456789-canary-key" for name in ("alice", "alice2", "bob", "carol")
)
KEYS = f"alice:{ALICE}\nalice:{ALICE_TOO}\nbob:{BOB}\ncarol:{CAROL}\n"
PROMPT = list(range(70, 110))
CANARY = "canary prompt kestrel 7f3a"


class Keyed:
    """The service, its keys and who asks it."""

    def __init__(self, folder: pathlib.Path, run_dir: str) -> None:
        self.folder = folder
        self.model = make_toy_model(folder / MODEL)
        self.logs = folder / "logs"
        self.key_file = folder / "api-keys"
        self.write_keys(KEYS)
        self.keys_dir = str(folder / "node")
        self.public_key = create_keys(self.keys_dir)
        self.client_key = create_keys(str(folder / "client"))
        allow_peer(self.keys_dir, "app", self.client_key, client=True)
        allow_peer(self.keys_dir, "ops", create_keys(str(folder / "ops")), roles=("admin",))
        self.served = Served(
            self.model,
            run_dir,
            *("--api-key-file", str(self.key_file), "--cluster-keys-dir", self.keys_dir),
            *("--cluster-log-dir", str(self.logs), "--cluster-log-level", "debug"),
            *("--worker-toy-step-ms", "2"),
        )
        self.url = self.served.http.removesuffix("/v1")
        self.pids = self.served.family()

    def write_keys(self, text: str) -> None:
        """Replace the API keys as operators should: whole."""
        fresh = self.key_file.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(0o600)
        os.replace(fresh, self.key_file)

    def post(self, key, prompt=PROMPT, **fields):
        """A completion, as HTTP answers it."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0} | fields
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(
            self.url + "/v1/completions", json=body, headers=headers, timeout=30, trust_env=False
        )

    def cached(self, key, prompt, **fields) -> int:
        """Tokens of a prompt that were found cached for that key."""
        answer = self.post(key, prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def client(self, name="client") -> Client:
        """A ZeroMQ client with keys."""
        keys_dir = str(self.folder / name)
        return Client(self.served.zmq, server_key=self.public_key, keys_dir=keys_dir)

    def metrics(self) -> str:
        """The page of figures."""
        headers = {"authorization": f"Bearer {CAROL}"}
        return httpx.get(self.url + "/metrics", headers=headers, trust_env=False).text

    def check(self) -> None:
        """It is the same service, and serves."""
        assert self.served.family() == self.pids
        answer = self.post(CAROL, logprobs=0)
        assert answer.status_code == 200
