"""The HTTP endpoint with the official OpenAI client: python examples/openai_client.py [URL [KEY]]

Needs a running service (`xllm serve`) and `pip install openai`; a service that was started with
`--api-key-file` wants a key of that file.
"""

from __future__ import annotations

import sys

from openai import APIError, OpenAI


def main() -> int:
    """One streamed chat answer."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8010/v1"
    key = sys.argv[2] if len(sys.argv) > 2 else "none"
    with OpenAI(base_url=url, api_key=key, timeout=60, max_retries=0) as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is xLLM?"}],
            max_tokens=64,
            stream=True,
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                print(chunk.choices[0].delta.content, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except APIError as error:
        sys.exit(f"openai_client: {error.message}")
