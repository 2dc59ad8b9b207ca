"""LocalCluster: the whole system as child processes of this one, without Ray and, by default, without Redis.

A child (`python -m moiety.local.child`) reads its settings as one JSON line on stdin. It answers with one JSON line on
stdout when it is ready, and with another whenever its registry entry changes. When the parent ends, in whatever way, the
child's stdin ends, and the child stops. Logs go to files in `LocalCluster.folder`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from moiety import compose
from moiety.compose.environment import PROCESS_ENVIRONMENT
from moiety.config.run_folder import RunFolder
from moiety.config.services import GatewaySettings
from moiety.config.validate import validated
from moiety.core.experts import ExpertSet, ModelShape
from moiety.core.replica import Placement, Replica, Role
from moiety.core.supervise import supervise
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition, RegistryUnreachable, Unavailable
from moiety.local.child_process import STOP_S, Child, read, share_of_cores, tail, until_serves, write
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import revision_of
from moiety.model.checkpoint.tokenizer import check_tokenizer
from moiety.model.experts.cached import expert_layout
from moiety.registry.connect import connect
from moiety.registry.entries import replica_from_json
from moiety.registry.file import FileRegistryWriter
from moiety.registry.interface import Registry
from moiety.scaling.placement_progress import until_settled
from moiety.wire.shared_port import check_ports

READY_S = 120.0
CHILD = (sys.executable, "-P", "-m", "moiety.local.child")  # -P: a folder `moiety` where the user stands is no package
_log = logging.getLogger(__name__)


class LocalCluster:
    """Runs a gateway, `routers` routers and `groups` expert groups on this machine. An async context manager.

    `add_hot_set` starts a hot set, which holds no experts until a placement gives it some.
    `threads` is the number of compute threads of an expert replica. `registry` is a redis:// URL, or None for a registry
    file that this process writes. `cluster` names the cluster in the system's identity; default: a random name. `expert`,
    `router` and `gateway` are further settings of these services (`config/services.py`). `env` is added to the children's
    environment. `pin` gives every group its own cores, if there are enough: otherwise the operating system sometimes keeps
    two replicas on one core while another core is idle.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        groups: int = 2,
        routers: int = 1,
        registry: str | None = None,
        app: str = "local",
        dtype: str = "auto",
        threads: int = 1,
        weights: str = "auto",
        deterministic: bool = False,
        slices: int = 1,
        cluster: str = "",
        expert: Mapping[str, Any] | None = None,
        router: Mapping[str, Any] | None = None,
        gateway: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        pin: bool = False,
    ):
        self.model, self.groups, self.slices, self.routers = str(model), groups, slices, routers
        self._run = RunFolder("cluster")
        self.folder = self._run.path
        self.children: list[Child] = []
        self._writer = FileRegistryWriter(self.folder / "registry.json") if registry is None else None
        self.registry_url = registry or f"file://{self.folder / 'registry.json'}"
        self.system: SystemId  # known once the cluster is entered, as the registry
        self._registry: Registry | None = self._writer
        self._common: dict[str, Any] = {
            "model": self.model,
            "registry": self.registry_url,
            "app": app,
            "cluster": cluster or f"local-{secrets.token_hex(4)}",
            "groups": groups,
            "dtype": dtype,
            "slices": slices,
            "deterministic": deterministic,
        }
        self._extra: Mapping[Role, Mapping[str, Any]] = {
            Role.EXPERT: {"threads": threads, "weights": weights, **(expert or {})},
            Role.ROUTER: router or {},
            Role.GATEWAY: {"port": 0, "http_port": 0, **(gateway or {})},
        }
        self._env = {**PROCESS_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **os.environ, **(env or {})}
        self._count, self._pin, self._stopped = 0, pin, False

    async def __aenter__(self) -> Self:
        try:
            settings = validated(GatewaySettings, {**self._common, **self._extra[Role.GATEWAY]})
            self.shape, revision = await asyncio.to_thread(_shape_and_revision, self.model, settings.skip_tokenizer)
            self._common["revision"] = revision
            self.system = settings.model_copy(update={"revision": revision}).system
            self._registry = self._writer or connect(self.registry_url, self.system)
            await check_ports(settings, self.system)
            self.partition = self.shape.sliced_partition(self.groups, self.slices)
            async with asyncio.TaskGroup() as starting:  # if one child does not start, it ends the others
                for group in range(self.groups):
                    starting.create_task(self.add_expert(group))
                for _ in range(self.routers):
                    starting.create_task(self.add_router())
                starting.create_task(self.add_gateway())
            async with asyncio.timeout(READY_S):
                await until_serves(self.address)
        except BaseException as error:
            await self.stop()
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0] from None
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def registry(self) -> Registry:
        """The system's registry."""
        if self._registry is None:
            raise Unavailable("the cluster was not entered")
        return self._registry

    @property
    def address(self) -> str:
        """The address of the gateway, which serves moiety.v1.GenerationService."""
        return next(child.replica.address for child in self.children if child.replica.role is Role.GATEWAY)

    @property
    def http_address(self) -> str:
        """The address of the gateway's HTTP API; empty with the setting `http` of `gateway` off."""
        return next(child.replica.http_address for child in self.children if child.replica.role is Role.GATEWAY)

    def experts(self, group: int) -> list[Child]:
        """Returns the live replicas of one group, oldest first."""
        return self.replicas(f"experts-{group}")

    def router(self) -> Child:
        """Returns the oldest router."""
        return next(child for child in self.children if child.replica.role is Role.ROUTER)

    async def add_expert(self, group: int, *, prefix: Sequence[str] = (), **settings: Any) -> Child:
        """Starts one more replica of `group`; returns when it is registered. `settings` apply to this replica only.

        `prefix` is a command that runs the child's command, such as `("nice", "-n", "5")`; it must end as that command.
        """
        values = {"held": str(self.partition[group]), **settings}
        return await self._add(Role.EXPERT, f"experts-{group}", values, prefix)

    async def add_hot_set(self, slot: int) -> Child:
        """Starts one more replica of the hot set `hot-<slot>`; returns when it is registered."""
        return await self._add(Role.EXPERT, f"hot-{slot}", {"held": ""})

    def replicas(self, deployment: str) -> list[Child]:
        """Returns the live replicas of one deployment, oldest first."""
        return [child for child in self.children if child.replica.deployment == deployment]

    async def add_router(self, **settings: Any) -> Child:
        """Starts one more router; returns when it is registered. `settings` apply to this router only."""
        return await self._add(Role.ROUTER, "router", settings)

    async def add_gateway(self, **settings: Any) -> Child:
        """Starts one more gateway; returns when it is registered. `settings` apply to this gateway only."""
        return await self._add(Role.GATEWAY, "gateway", settings)

    async def set_placement(self, held: Mapping[str, ExpertSet]) -> int:
        """Puts a new placement (deployment -> experts) in force and returns its epoch; replicas follow at their next beat."""
        current = await self.registry.placement()
        epoch = (current.epoch if current else 0) + 1
        if not await self.registry.set_placement(Placement(epoch, held)):
            raise Unavailable(f"placement {epoch} was not stored: another one was set at the same time; try again")
        return epoch

    async def until_settled(self, epoch: int, timeout_s: float = 30.0) -> None:
        """Waits until every expert replica holds exactly what the placement of `epoch` says."""
        await until_settled(self.registry, epoch, timeout_s)

    async def drain(self, child: Child, grace_s: float = 8.0, *, ending: bool = False) -> None:
        """Stops one child as an autoscaler would, or, if `ending`, as at the end of the system: see `Running.drain`."""
        child.leaving = True
        await write(child.process, {"drain_s": grace_s, "ending": ending})
        async with asyncio.timeout(grace_s + STOP_S):
            await child.process.wait()

    async def set_fault(self, child: Child, fault: str) -> None:
        """Makes the device of an expert replica faulty, for trials: see `expert.fault.Fault.parse`. "" clears the fault."""
        await self.reconfigure(child, {"fault": fault})

    async def reconfigure(self, child: Child, values: Mapping[str, Any]) -> None:
        """Gives one child new live settings, as Serve does with `user_config`; a setting that is left out is as at the start.

        Raises FailedPrecondition where the child refuses them, TimeoutError if it does not answer.
        """
        await write(child.process, {"reconfigure": values})
        async with asyncio.timeout(STOP_S):
            refusal = await child.reconfigured.get()
        if refusal:
            raise FailedPrecondition(f"{child.replica.id}: {refusal}")

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends every child and removes the files of the cluster. Running requests get up to `grace_s` seconds to finish."""
        self._stopped = True
        followers = [child.follower for child in self.children if child.follower]
        if grace_s:
            ends = (self.drain(child, grace_s, ending=True) for child in self.children)
            await asyncio.gather(*ends, return_exceptions=True)  # a child that does not end is killed below
        await asyncio.gather(*(child.end() for child in self.children))
        if followers:
            await asyncio.wait(followers, timeout=STOP_S)
        for late in followers:
            late.cancel()
        if self._registry is not None:
            with suppress(RegistryUnreachable):
                await self._registry.forget()
            await self._registry.close()
        self._run.end()

    async def _add(self, role: Role, deployment: str, settings: Mapping[str, Any], prefix: Sequence[str] = ()) -> Child:
        self._count += 1
        replica_id = f"{deployment}#{self._count}"
        values = {**self._common, "deployment": deployment, **self._extra[role], **settings}
        compose.settings_of(role, values)  # raises for a wrong setting here, not in a child's log
        log = (self.folder / f"{replica_id.replace('#', '-')}.log").open("wb")
        with log:
            process = await asyncio.create_subprocess_exec(
                *prefix,
                *CHILD,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._env,
                limit=1 << 20,
                start_new_session=True,  # Ctrl-C at a terminal reaches only the parent, which stops the children in order
            )
        try:
            if self._pin and role is Role.EXPERT and (cores := share_of_cores(deployment, self.groups)):
                os.sched_setaffinity(process.pid, cores)
            await write(process, {"role": role, "settings": values, "replica_id": replica_id})
            async with asyncio.timeout(READY_S):
                answer = await read(process)
            if "error" in answer:
                raise Unavailable(f"{deployment} did not start: {answer['error']}")
            child = Child(replica_from_json(json.dumps(answer["replica"])), process, Path(log.name))
            await self._record(child.replica)
            if self._stopped:
                raise Unavailable(f"{deployment} was started while the cluster stopped")
        except BaseException as error:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(error, EOFError):
                raise Unavailable(f"{deployment} ended while starting:\n{tail(Path(log.name))}") from None
            raise
        child.follower = supervise("child of a local cluster", lambda: self._follow(child))
        self.children.append(child)
        return child

    async def _follow(self, child: Child) -> None:
        """Keeps `child` and its entry in the registry file up to date until the child ends."""
        with suppress(EOFError):
            await self._record(child.replica)  # again, if that has failed: the disk may have been full
            while True:
                message = await read(child.process)
                if "reconfigured" in message:
                    child.reconfigured.put_nowait(message["reconfigured"])
                    continue
                child.replica = replica_from_json(json.dumps(message["replica"]))
                await self._record(child.replica)
        await child.process.wait()
        if not child.leaving:
            _log.warning("%s", child.obituary())
        if self._writer is not None:
            await self._writer.deregister(child.replica.id)
        self.children.remove(child)

    async def _record(self, replica: Replica) -> None:
        if self._writer is not None:
            await self._writer.register(replica)


def _shape_and_revision(model: str, skip_tokenizer: bool) -> tuple[ModelShape, str]:
    checkpoint = Checkpoint.open(model)
    if not skip_tokenizer:
        check_tokenizer(model)
    return expert_layout(checkpoint).shape, revision_of(checkpoint)
