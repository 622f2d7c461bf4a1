"""`python -m xllm`: the same as the `xllm` command."""

from __future__ import annotations

from xllm.cli.main import main

if __name__ == "__main__":
    main()
