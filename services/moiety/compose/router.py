"""Builds a router."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import torch

from moiety.compose.router_model import load_model, max_context_of, threads_of
from moiety.compose.running import CLOSE_S, Running, ServiceStart
from moiety.compose.service_parts import ServiceParts
from moiety.config.services import RouterSettings
from moiety.core.experts import ModelShape
from moiety.core.load import ExpertDemand
from moiety.core.replica import Replica, ReplicaState, Role
from moiety.core.system import SystemId
from moiety.internal.v1.engine_pb2_grpc import add_EngineServiceServicer_to_server
from moiety.model.experts.cached import expert_layout
from moiety.model.trunk.encoder_decoder import DecoderStart
from moiety.policy.lane_tuner import LaneTuner
from moiety.registry.interface import Registry
from moiety.registry.watch import Watch
from moiety.router.cache.kv_cache import KVCache
from moiety.router.engine import Engine
from moiety.router.engine_health import EngineHealth
from moiety.router.hop.call_limits import CallLimits
from moiety.router.hop.context import HopContext
from moiety.router.hop.cost_fit import CostFit
from moiety.router.hop.expert_demand import ExpertDemandCounter
from moiety.router.hop.fleet import Fleet
from moiety.router.hop.hedging import Hedging
from moiety.router.hop.hop import Hop, Wrapper
from moiety.router.hop.missing_experts import MissingExpertReporter
from moiety.router.hop.overflow import BackupExperts, OverrunExperts, OverrunReplicas
from moiety.router.hop.slices import SlicedExperts
from moiety.router.lanes import Lanes
from moiety.router.router_load import RouterLoad
from moiety.router.sequence.guides import Guides
from moiety.router.service import EngineService
from moiety.router.step_context import StepBackend
from moiety.router.step_runner import StepRunner
from moiety.telemetry.names import MetricName
from moiety.telemetry.tracing import Tracer
from moiety.wire.codec import DTYPE_NAMES, torch_dtype
from moiety.wire.server import Server
from moiety.wire.service_names import ENGINE_SERVICE

_log = logging.getLogger(__name__)
MISSING_NOTICE_S = 10.0  # between two log lines of a router that waits for holders
LANES = 2  # lanes that a step may be split into; a third lane would wait for the same experts


async def start(settings: RouterSettings, replica_id: str, node: str) -> Running:
    """Starts a router: loads the trunk, follows the registry, serves. It becomes READY when every expert has a holder."""
    async with ServiceStart(settings, replica_id, node) as startup:
        checkpoint, system = startup.checkpoint, startup.system
        layout = await asyncio.to_thread(expert_layout, checkpoint)
        shape = layout.shape
        dtype = torch_dtype(settings.dtype, shape.dtype)
        max_context = max_context_of(settings, shape.max_context)
        start_token = await asyncio.to_thread(DecoderStart.of, checkpoint)
        model, cache = await asyncio.to_thread(load_model, settings, checkpoint, layout, dtype, system.revision)

        hop, lanes = await reach_experts(
            settings, shape, system, dtype, startup.registry, startup.tracer, startup.closers
        )
        overrun = _overrun_experts(settings, hop)
        engine = build_engine(
            hops_of(settings, hop, overrun),
            lanes,
            settings,
            model,
            cache,
            MissingExpertReporter(startup.registry),
            startup.tracer,
        )
        engine.start()
        health = EngineHealth(engine, hop.fleet.mailbox)
        # The thread of an engine that hangs does not end.
        startup.closers.push_async_callback(asyncio.to_thread, lambda: engine.stop(0.0 if health.hangs else CLOSE_S))
        guides = Guides(settings.model, shape.vocabulary, threads_of(settings))
        startup.closers.callback(guides.close)
        service = EngineService(
            engine,
            settings.name,
            system,
            vocabulary=shape.vocabulary,
            max_context=max_context,
            slots=settings.slots,
            guides=guides,
            tracer=startup.tracer,
            state=lambda: running.replica.state if running is not None else ReplicaState.STARTING,
            start=start_token,
        )
        running: Running | None = None  # until it is registered
        covered, warned_at = False, time.monotonic()

        def entry(replica: Replica) -> Replica:
            nonlocal covered
            covered = covered or not hop.fleet.table.uncovered()
            state = replica.state if covered else ReplicaState.STARTING
            return dataclasses.replace(replica, state=state, placement_epoch=hop.fleet.placement_epoch)

        startup.meter.observe(MetricName.ROUTED_ROWS, lambda: hop.demand.total() // settings.slices)
        startup.meter.observe(MetricName.REROUTED_ROWS, lambda: overrun.rerouted if overrun else 0)
        startup.meter.observe(MetricName.COST_ERROR, lambda: hop.costs.error)
        startup.meter.observe(MetricName.OPEN_BREAKERS, lambda: len(hop.fleet.breakers.open))
        startup.meter.observe(MetricName.BREAKER_CHANGES, lambda: hop.fleet.breakers.changes)

        async def warn_of_missing_experts() -> None:
            nonlocal warned_at
            if (
                not covered
                and time.monotonic() - warned_at > MISSING_NOTICE_S
                and (pairs := hop.fleet.table.uncovered())
            ):
                warned_at = time.monotonic()
                layer, expert = pairs[0]
                _log.warning(
                    "not ready: no replica holds %d experts, such as expert %d of layer %d", len(pairs), expert, layer
                )

        def counters() -> ExpertDemand:
            return hop.demand.reading(time.time(), hop.costs.reading())

        server = Server([], [ENGINE_SERVICE])
        add_EngineServiceServicer_to_server(service, server.grpc)
        running = await startup.serve(
            ServiceParts(
                role=Role.ROUTER,
                server=server,
                calls_end=False,
                idle=lambda: engine.load.running + engine.load.waiting == 0 and service.idle,
                healthy=lambda: health.check(time.monotonic()),
                entry=entry,
                on_beat=(
                    startup.load_beat(RouterLoad(engine, settings.slots).reading, counters),
                    warn_of_missing_experts,
                ),
            )
        )
        return running


async def reach_experts(
    settings: RouterSettings,
    shape: ModelShape,
    system: SystemId,
    dtype: torch.dtype,
    registry: Registry,
    tracer: Tracer,
    closers: AsyncExitStack,
) -> tuple[HopContext, Lanes]:
    """Returns the way to the expert replicas of `system`, now or later in `registry`, and the lanes that may wait on it.

    Closing `closers` ends the connections to the replicas and stops following the registry.
    """
    shape, expert_bytes = shape.sliced(settings.slices), shape.mlp.parameters * dtype.itemsize // settings.slices
    if settings.slices > 1:
        dtype = torch.float32
    watch = Watch(registry)
    await watch.start()
    closers.push_async_callback(watch.stop)
    fleet = Fleet(watch, shape, system, DTYPE_NAMES[dtype], settings.transport)
    fleet.start()
    closers.push_async_callback(fleet.close)
    lanes = Lanes(fleet.mailbox.wait)
    costs = CostFit(expert_bytes)
    context = HopContext(
        fleet=fleet,
        system_key=system.key,
        dtype=dtype,
        expert_wait_s=settings.expert_wait_s,
        hedging=Hedging(settings.hedge_after_s, settings.retry_budget),
        demand=ExpertDemandCounter(shape.moe_layers, shape.experts, started=time.time()),
        costs=costs,
        limits=CallLimits(costs, shape.experts),
        tracer=tracer,
        wait=lanes.wait,
        queues=OverrunReplicas(settings.overflow_queue_ms) if settings.may_overflow else None,
    )
    return context, lanes


def hops_of(settings: RouterSettings, context: HopContext, overrun: OverrunExperts | None = None) -> list[Hop]:
    """Returns a hop for each lane: with slices if `settings` say so, and with backups for `overrun` experts if given."""
    wrappers: list[Wrapper] = []
    if settings.slices > 1:
        wrappers.append(lambda backend, _: SlicedExperts(backend, settings.slices))
    if overrun is not None:
        wrappers.append(lambda backend, step: BackupExperts(backend, step, overrun))
    return [Hop(context, wrappers) for _ in range(settings.lanes or LANES)]


def _overrun_experts(settings: RouterSettings, hop: HopContext) -> OverrunExperts | None:
    """Returns what finds overrun experts; None if no group has the overflow policy `backup`."""
    if hop.queues is None:
        return None
    fleet = hop.fleet
    return OverrunExperts(hop.queues, lambda: fleet.table, fleet.deployment_of, settings.allows_backup, settings.slices)


def build_engine(
    backends: Sequence[StepBackend],
    lanes: Lanes | None,
    settings: RouterSettings,
    model: torch.nn.Module,
    cache: KVCache,
    report_missing: Callable[[int, list[int]], None],
    tracer: Tracer,
) -> Engine:
    """Returns an engine, not started yet. Each of its lanes uses a backend of its own from `backends`."""
    return Engine(
        StepRunner(model, cache, backends, lanes, None if settings.lanes else LaneTuner(len(backends))),
        cache,
        slots=settings.slots,
        token_budget=settings.token_budget,
        queue_limit=settings.queue_limit,
        threads=threads_of(settings),
        report_missing=report_missing,
        tracer=tracer,
        speculative_tokens=settings.speculative_tokens,
    )
