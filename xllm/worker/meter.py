"""What a worker counts of its steps, and how Prometheus reads it. Knows results only."""

from __future__ import annotations

from xllm.protocol.step import StepResult


class StepMeter:
    """Running totals since the start."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.num_failed_items = 0
        self.busy_ns = 0

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.num_steps += 1
        self.num_tokens += sum(map(len, result.tokens))
        self.num_failed_items += len(result.failed)
        self.busy_ns += result.duration_ns

    def prometheus(self, rank: int) -> bytes:
        """Prometheus text format; the router adds the instance."""
        rows = (
            ("xllm_worker_steps_total", "Steps run.", self.num_steps),
            ("xllm_worker_tokens_total", "Tokens drawn.", self.num_tokens),
            ("xllm_worker_failed_items_total", "Items that failed.", self.num_failed_items),
            ("xllm_worker_busy_seconds_total", "Time in steps.", self.busy_ns / 1e9),
        )
        lines = []
        for name, text, value in rows:
            lines.append(f"# HELP {name} {text}\n# TYPE {name} counter\n")
            lines.append(f'{name}{{rank="{rank}"}} {value}\n')
        return "".join(lines).encode()
