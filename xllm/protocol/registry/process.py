"""The registry as a process of its own, for nodes without etcd: `xllm registry`.

It serves at the very address that everybody else has in `cluster.registry`. Its entries live as
long as it does; after a restart their owners register again.
"""

from __future__ import annotations

import structlog

from xllm.config.load import decode_settings
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.reporter import LaunchReporter
from xllm.protocol.actor.run import run_role
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.etcd_address import is_etcd
from xllm.protocol.registry.open import split_address
from xllm.protocol.transport.context import Transport

_log = structlog.get_logger("registry")


class RegistryActor(Actor):
    """Serves the embedded registry at `cluster.registry`."""

    def __init__(self, settings: Settings, transport: Transport | None = None) -> None:
        super().__init__("registry", transport, settings.cluster.keys_dir)
        self._settings = settings
        self._reporter: LaunchReporter | None = None
        self.server: EmbeddedRegistryServer | None = None

    async def start(self) -> None:
        """Bind and serve."""
        cluster = self._settings.cluster
        self._reporter = LaunchReporter(self.transport, cluster.launcher, "registry", self.name)
        self._reporter.started()
        if is_etcd(cluster.registry):
            raise ConfigError(
                f"{cluster.registry}: etcd is its own server; no xllm registry is needed",
                param="cluster.registry",
            )
        endpoint, _ = split_address(cluster.registry)
        self.server = EmbeddedRegistryServer(self.transport, endpoint)
        _log.info("registry_ready", endpoint=self.server.endpoint)
        self._reporter.ready((("registry", self.server.endpoint),))

    async def stop(self) -> None:
        """Stop serving; everybody else goes on with what they know."""
        if self.server is not None:
            await self.server.close()
        if self._reporter is not None:
            self._reporter.close()


def main(settings: bytes) -> None:
    """Run a registry to its end; `settings` as `encode_settings` wrote them. Never returns."""
    decoded = decode_settings(settings)
    run_role("registry", "registry", decoded.cluster, lambda: RegistryActor(decoded))
