"""What would keep an application from serving, found before anything is started."""

from __future__ import annotations

from dataclasses import dataclass

from moiety.config.application import HOT, AppSettings
from moiety.core.text import size
from moiety.deploy.arguments import LOOPBACK, router_settings
from moiety.deploy.memory import MachineMemory, MemoryNeed
from moiety.deploy.ray_cluster import Progress
from moiety.deploy.ready import wanted_replicas
from moiety.errors import ConfigError, FailedPrecondition
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.tokenizer import check_tokenizer
from moiety.model.experts.cached import expert_layout
from moiety.registry.connect import connect


@dataclass(frozen=True, slots=True)
class Resources:
    """What an application asks of Ray."""

    cpus: float
    gpus: float

    @classmethod
    def at_start(cls, settings: AppSettings) -> Resources:
        """Returns what the replicas that the application starts with reserve together."""
        return cls._of(settings, wanted_replicas(settings))

    @classmethod
    def at_most(cls, settings: AppSettings) -> Resources:
        """Returns what all replicas that the application may have reserve together."""
        names = [*wanted_replicas(settings), *(f"{HOT}{slot}" for slot in range(settings.hot_sets))]
        return cls._of(settings, {name: settings.scaling(name).max_replicas for name in names})

    @classmethod
    def _of(cls, settings: AppSettings, replicas: dict[str, int]) -> Resources:
        scaling = {name: settings.scaling(name) for name in replicas}
        return cls(
            cpus=sum(count * scaling[name].num_cpus for name, count in replicas.items()),
            gpus=sum(count * scaling[name].num_gpus for name, count in replicas.items()),
        )

    def shortage(self, cpus: float, gpus: float) -> str:
        """Returns, in words, what a Ray with so many CPUs and GPUs lacks; empty if it has enough."""
        short = [
            f"{asked:g} {what} (Ray has {there:g})"
            for what, asked, there in (("CPUs", self.cpus, cpus), ("GPUs", self.gpus, gpus))
            if asked > there
        ]
        if not short:
            return ""
        advice = "add nodes, or lower num_cpus and num_gpus of router, gateway and experts"
        return f"its replicas ask for {' and '.join(short)}: {advice}"


def check_application(settings: AppSettings, checkpoint: Checkpoint) -> None:
    """Checks what is the same on every machine: the settings together, the groups, the tokenizer.

    Raises ConfigError or CheckpointError here for what would stop a replica from starting.
    """
    if not settings.registry.get_secret_value().lower().startswith(("redis://", "rediss://")):
        raise ConfigError(
            "registry", str(settings.registry), "must be redis://… or rediss://…: replicas may be on any node"
        )
    router_settings(settings, LOOPBACK[0])
    expert_layout(checkpoint).shape.sliced_partition(settings.groups, settings.slices)
    if not settings.gateway.skip_tokenizer:
        check_tokenizer(settings.model)


def check_memory(need: MemoryNeed, memory: MachineMemory | None, progress: Progress) -> None:
    """Raises FailedPrecondition if `need` is more than all `memory` of the machine that is to run the application.

    Tells `progress` if what is free now may not be enough. None: the memory is unknown.
    """
    if memory is None:
        return
    bound = f"this machine has {size(memory.total)} with swap"
    if need.weights > memory.total:
        parts = f"{size(need.experts)} for the expert groups and {size(need.trunks)} for the routers"
        advice = "serve fewer replicas, set experts.weights to int8, or use more machines"
        raise FailedPrecondition(f"the weights need {size(need.weights)}, {parts}, and {bound}: {advice}")
    if need.weights + need.cache > memory.total:
        left = size(memory.total - need.weights)
        raise ConfigError(
            "router.kv_memory",
            size(need.cache),
            f"must be at most {left}: {size(need.weights)} are weights, and {bound}",
        )
    if need.weights + need.caches > memory.available:
        progress(f"memory: {need} are needed once the caches are full, and {size(memory.available)} are free")


async def check_registry(settings: AppSettings) -> None:
    """Raises RegistryUnreachable or ConfigError if the registry cannot be used."""
    registry = connect(settings.registry.get_secret_value(), settings.system)
    try:
        await registry.replicas()
    finally:
        await registry.close()


def check_devices(settings: AppSettings) -> None:
    """Raises FailedPrecondition if the application asks for devices that this machine, which is to run it, does not have."""
    asked = Resources.at_start(settings).gpus
    if settings.device == "cpu" and not asked:
        return
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cuda" and not there:
        raise ConfigError(
            "device", "cuda", "torch finds no CUDA device on this machine: `moiety doctor` shows which torch it is"
        )
    if asked > there:
        by = ", ".join(
            f"{name} {gpus:g}"
            for name, count in wanted_replicas(settings).items()
            if (gpus := count * settings.scaling(name).num_gpus)
        )
        raise FailedPrecondition(
            f"the replicas ask for {asked:g} GPUs ({by}), and this machine has {there}: lower num_gpus"
        )
