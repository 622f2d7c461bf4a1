"""Logs of a command that runs a model in its own process."""

from __future__ import annotations

from xllm.config.settings import Settings


def configure_command_logs(process: str, settings: Settings) -> None:
    """Log as the settings say; `process` names the lines, and the file where there is one."""
    from xllm.protocol.actor.logs import configure_logs

    cluster = settings.cluster
    configure_logs(
        process=process,
        level=cluster.log_level,
        log_format=cluster.log_format,
        log_dir=cluster.log_dir,
    )
