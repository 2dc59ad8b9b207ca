"""Builds one replica of an expert group."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from math import inf
from typing import Any

import torch

from moiety.compose.placement_follower import PlacementFollower
from moiety.compose.running import CLOSE_S, Running, ServiceStart
from moiety.compose.service_parts import ServiceParts
from moiety.config.options import Scaling
from moiety.config.services import ExpertSettings
from moiety.core.experts import ExpertSet
from moiety.core.replica import Replica, Role
from moiety.errors import ConfigError
from moiety.expert.fault import Fault
from moiety.expert.runtime import Runtime
from moiety.expert.service import ExpertService
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.read import load_experts
from moiety.wire.codec import DTYPE_NAMES, torch_dtype
from moiety.wire.server import Server
from moiety.wire.service_names import EXPERT_SERVICE
from moiety.wire.transports.shm_listener import SharedMemoryListener
from moiety.wire.transports.shm_segment import AVAILABLE


async def start(settings: ExpertSettings, replica_id: str, node: str, launched: float) -> Running:
    """Starts a replica: reads its experts' weights, serves, registers, follows placements.

    Its experts are those that the placement in force gives to `settings.deployment`, else those in `settings.held`.
    """
    async with ServiceStart(settings, replica_id, node, launched) as startup:
        layout, slices = await asyncio.to_thread(expert_layout, startup.checkpoint), settings.slices
        shape = layout.shape.sliced(slices)
        dtype = torch_dtype(settings.dtype, shape.dtype)
        dtype_name, wire_dtype = DTYPE_NAMES[dtype], torch.float32 if slices > 1 else dtype
        runtime = Runtime(
            shape.mlp,
            dtype,
            settings.device,
            lambda experts: load_experts(
                startup.checkpoint,
                layout,
                experts,
                dtype,
                settings.device,
                int8=settings.weights == "int8",
                slices=slices,
            ),
            queue_calls=settings.queue_calls,
            capacity=settings.capacity,
            threads=settings.threads,
            deterministic=settings.deterministic,
            wire_dtype=wire_dtype,
        )

        follower = PlacementFollower(runtime, startup.registry, settings.deployment, ExpertSet.parse(settings.held))
        await follower.start()
        loaded = time.time()
        runtime.start()
        startup.closers.push_async_callback(asyncio.to_thread, runtime.stop, CLOSE_S)
        device = torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else settings.device

        def kind() -> str:
            pace = "" if runtime.capacity is None else f", {runtime.capacity:g} rows/s"
            weights = dtype_name if settings.weights == "auto" else settings.weights
            return f"{device}, {settings.threads} threads, {weights}{pace}"

        service = ExpertService(runtime, shape, settings.name, startup.system, wire_dtype, startup.tracer, kind)
        server = Server([service.handler()], [EXPERT_SERVICE])
        if AVAILABLE:
            listener = SharedMemoryListener(
                str(startup.system), service.dtype, service.row_bytes, runtime.mailbox, service.accept
            )
            service.shared_memory = listener.name
            startup.closers.push_async_callback(listener.close)

        def entry(replica: Replica) -> Replica:
            holding = runtime.holding
            return dataclasses.replace(
                replica,
                held=holding.held,
                leaving=holding.leaving,
                placement_epoch=holding.epoch,
                loaded=loaded,
                served=runtime.served,
                kind=kind(),
                scaling=scaling,
            )

        scaling: dict[str, float] = {}

        async def reconfigure(values: Mapping[str, Any]) -> None:
            nonlocal scaling
            capacity = values.get("capacity", settings.capacity)
            if capacity is not None and not (isinstance(capacity, int | float) and 0 < capacity < inf):
                raise ConfigError("user_config.capacity", capacity, "must be above 0, or null for no limit")
            fault = Fault.parse(values.get("fault", ""))
            live = {name: value for name, value in values.items() if name not in ("capacity", "fault")}
            checked = Scaling().with_live(live)  # raises ConfigError for a setting that is not live, or a wrong value
            runtime.capacity, runtime.device.fault = capacity, fault
            scaling = {name: getattr(checked, name) for name in live}  # as numbers, also where the values were texts

        return await startup.serve(
            ServiceParts(
                role=Role.EXPERT,
                server=server,
                idle=lambda: runtime.idle,
                work=lambda: runtime.accepted,
                healthy=runtime.check_health,
                reconfigure=reconfigure,
                entry=entry,
                on_beat=(startup.load_beat(runtime.load_since_last), follower.follow),
                calls_end=False,
            )
        )
