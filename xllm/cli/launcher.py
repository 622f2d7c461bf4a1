"""`xllm serve`'s own process: starts the others, watches them, ends them in order.

Owns the run directory, the children, and the embedded registry where no other one was named. It
carries no request: when it hangs, the service goes on; when it dies, everything ends with it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time

from xllm.cli.launch_plan import Plan, PlannedChild, announcement, keep_ports, plan_children
from xllm.cli.screen import LaunchScreen
from xllm.cli.shared_port import SharedPort
from xllm.cli.startup import ServiceAddresses, Startup
from xllm.cli.supervision import (
    QUARANTINE_S,
    GiveUp,
    Quarantine,
    RestartPolicy,
    describe_exit,
)
from xllm.client.asynchronous import AsyncClient
from xllm.config.environment import runtime_base
from xllm.config.models import each_model
from xllm.config.settings import Settings
from xllm.errors import XllmError
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.children import ChildExit, Children
from xllm.protocol.actor.rundir import RunDirectory
from xllm.protocol.codec import Decoder
from xllm.protocol.launch import LaunchMessage, ProcessProgress, ProcessReady
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.transport.router import RouterSocket

STOP_GRACE_S = 3.0
"""What a process gets beyond the time to drain before it is killed."""
SIGNAL_ECHO_S = 0.02
"""Some senders signal a process and its whole group: so close together they are one."""
_PROBE_S = 30.0
_PROBE_AGAIN_S = 0.02
_MAX_PROBE_AGAIN_S = 1.0


class LaunchedService(Actor):
    """Everything of one service on this machine. `plan` says which processes that are."""

    def __init__(
        self,
        settings: Settings,
        screen: LaunchScreen,
        plan: Plan = plan_children,
    ) -> None:
        super().__init__("launcher", keys_dir=settings.cluster.keys_dir)
        self._plan = plan
        self._settings = settings
        self._screen = screen
        self._began = time.monotonic()
        self._directory: RunDirectory | None = None
        self._registry: EmbeddedRegistryServer | None = None
        self._reports: RouterSocket[LaunchMessage] | None = None
        self._children: Children | None = None
        self._port: SharedPort | None = None
        self._planned: dict[str, PlannedChild] = {}
        self._policies: dict[str, RestartPolicy] = {}
        self._startup = Startup(())
        self._was_ready = False
        self._gave_up = False
        self._num_interrupts = 0
        self._interrupted_at = 0.0

    async def start(self) -> None:
        """Make the run directory, the registry and the children; all of them start at once."""
        self._directory = RunDirectory(self._settings.cluster.run_dir or runtime_base())
        if not self._settings.cluster.registry:
            where = self._directory.ipc("registry")
            self._registry = EmbeddedRegistryServer(self.transport, where)
        self._reports = RouterSocket(
            self.transport,
            self._directory.ipc("launch"),
            Decoder(LaunchMessage),
            lambda identity, message, frames: self._report(message),
            name="launch",
        )
        self._children = Children(self._child_ended)
        settings = self._settings
        if settings.serve.routers > 1:
            self._port = SharedPort(settings.router.host, settings.router.port)
            router = dataclasses.replace(settings.router, port=self._port.number)
            settings = dataclasses.replace(settings, router=router)
        planned = self._plan(settings, self._directory.path)
        self._planned = {child.name: child for child in planned}
        self._policies = {name: RestartPolicy() for name in self._planned}
        self._startup = Startup(self._planned)
        for child in planned:
            self._children.start(child.spec)

    async def stop(self) -> None:
        """Routers drain first, then instances and the daemon end."""
        self._screen.close_bars()
        if self._children is not None:
            shutdown_s = 0.0 if self._gave_up else self._settings.cluster.shutdown_s
            routers = [child.name for child in self._planned.values() if child.kind == "router"]
            grace_s = shutdown_s + STOP_GRACE_S
            await asyncio.gather(*(self._children.stop(name, grace_s) for name in routers))
            await self._children.stop_all(STOP_GRACE_S)
        if self._port is not None:
            self._port.close()
        if self._reports is not None:
            self._reports.close()
        if self._registry is not None:
            await self._registry.close()
        if self._directory is not None:
            self._directory.remove()

    def interrupt(self, number: int) -> None:
        """A signal asks for the end: the first one drains, a second one stops at once."""
        now = asyncio.get_running_loop().time()
        if self._num_interrupts and now - self._interrupted_at < SIGNAL_ECHO_S:
            return
        self._interrupted_at = now
        self._num_interrupts += 1
        if self._num_interrupts == 1:
            if not self._gave_up:
                wait_s = self._settings.cluster.shutdown_s
                what = f"draining, at most {wait_s:g} s" if self._was_ready else "stopping"
                self._screen.close_bars()
                self._screen.line(f"{what}; once more (Ctrl-C) stops at once")
            self.request_stop()
            return
        self._screen.close_bars()
        self._screen.line("stopped at once")
        if self._children is not None:
            self._children.kill_all()
        if self._directory is not None:
            self._directory.remove()
        os._exit(128 + number)

    # -- reports -----------------------------------------------------------------------------

    def _report(self, message: LaunchMessage) -> None:
        if isinstance(message, ProcessProgress):
            self._screen.bar(message.name, message.done, message.total, message.unit)
            return
        line = self._startup.handle(message)
        if line:
            self._screen.line(line)
        if isinstance(message, ProcessReady) and message.kind == "router":
            self._keep_ports(message.name)
        if self._startup.all_ready and not self._was_ready and not self.stopping:
            self._was_ready = True
            self._screen.close_bars()
            self.spawn(self._announce(self._startup.addresses))

    def _keep_ports(self, name: str) -> None:
        """A router that starts again listens where clients know it."""
        if name in self._planned:
            addresses = self._startup.addresses_of(name)
            self._planned[name] = keep_ports(self._planned[name], addresses)

    async def _announce(self, addresses: ServiceAddresses) -> None:
        """Ask the service itself until it is ready, then say so."""
        task = "generate"
        if addresses.zmq:
            client = AsyncClient(
                addresses.zmq,
                keys_dir=self._settings.cluster.keys_dir,
                server_key=self.transport.public_key,
            )
            async with client:
                task = await self._wait_healthy(client)
        took_s = time.monotonic() - self._began
        has_keys = bool(self._settings.router.api_key_file)
        names = [one.model.name for one in each_model(self._settings)]
        for line in announcement(names, addresses, took_s, has_keys=has_keys, task=task):
            self._screen.line(line)

    async def _wait_healthy(self, client: AsyncClient) -> str:
        """Until the data path works, and the task that the first model is served for; says now and
        then that it does not yet, and why."""
        began = complained = time.monotonic()
        pause_s = _PROBE_AGAIN_S
        while True:
            why = ""
            try:
                if (await client.health(probe=True, timeout_s=_PROBE_S)).ready:
                    return (await client.models(timeout_s=_PROBE_S))[0].task
            except XllmError as error:
                why = f": {error.message}"
            now = time.monotonic()
            if now - complained >= _PROBE_S:
                complained = now
                waited_s = now - began
                self._screen.complain(
                    f"the service is not ready {waited_s:.0f} s after its processes{why}"
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PROBE_AGAIN_S)

    # -- children ----------------------------------------------------------------------------

    def _child_ended(self, end: ChildExit) -> None:
        was_ready = self._was_ready or self._startup.is_ready(end.name)
        reason = self._startup.ended(end.name)
        if end.expected or self.stopping:
            return
        decision = self._policies[end.name].exited(
            end.code, time.monotonic(), was_ready=was_ready, needed=self._is_needed(end.name)
        )
        what = f"{end.name} (pid {end.pid}) ended with {describe_exit(end.code)}"
        if reason:
            what += f": {reason}"
        if isinstance(decision, GiveUp):
            self._gave_up = True
            self._screen.close_bars()
            self._screen.complain(f"{what}; {decision.reason}")
            self.request_stop(decision.exit_code)
            return
        when = f" in {decision.delay_s:g} s" if decision.delay_s else ""
        if isinstance(decision, Quarantine) and decision.reason:
            self._screen.complain(
                f"{what}; {decision.reason}: the service goes on without it, and it starts again"
                + when
            )
        else:
            self._screen.line(f"{what}; it starts again{when}")
        self.later(decision.delay_s, self._start_again, end.name)

    def _is_needed(self, name: str) -> bool:
        """Whether there is no service without this child, or there was none yet."""
        kind = self._planned[name].kind
        if not self._was_ready:
            return True
        if kind not in ("router", "master"):
            return False
        return not any(
            self._startup.is_ready(other.name) or not self._policies[other.name].quarantined
            for other in self._planned.values()
            if other.kind == kind and other.name != name
        )

    def _start_again(self, name: str) -> None:
        if self._children is None or self.stopping:
            return
        try:
            self._children.start(self._planned[name].spec)
        except OSError as error:  # no memory, no processes: perhaps later
            self._screen.complain(f"{name} cannot be started: {error.strerror}")
            self.later(QUARANTINE_S, self._start_again, name)
