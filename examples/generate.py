"""One completion over ZeroMQ: python examples/generate.py [ENDPOINT]

Needs a running service: `xllm serve`.
"""

from __future__ import annotations

import sys

from xllm import Client
from xllm.errors import XllmError


def main() -> int:
    """Ask once and show what came back."""
    endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:8011"
    with Client(endpoint, timeout_s=60) as client:
        try:
            completion = client.generate("xLLM is", max_tokens=32, temperature=0)
        except XllmError as error:
            print(f"{error.code}: {error.message}", file=sys.stderr)
            return 1
    usage = completion.usage
    print(completion.text)
    print(f"{usage.prompt_tokens} + {usage.completion_tokens} tokens: {completion.finish_reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
