"""A streamed chat answer over ZeroMQ: python examples/chat_stream.py [ENDPOINT]

Needs a running service: `xllm serve`.
"""

from __future__ import annotations

import sys

from xllm import Client


def main() -> int:
    """Show the answer as it comes, then how fast it came."""
    endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:8011"
    messages = [{"role": "user", "content": "What is xLLM?"}]
    with Client(endpoint, timeout_s=60) as client:
        # Leaving the block early (or a `break`) would abort the request at the service.
        with client.stream(messages=messages, max_tokens=64) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        assert stream.completion is not None
        timing = stream.completion.timing
    print()
    print(f"first token after {timing.ttft_s * 1000:.1f} ms, {timing.tokens_per_s:.0f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
