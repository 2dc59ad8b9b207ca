"""`moiety demo`: the whole system on one machine, stage by stage: serve, stream, scale, trace, kill, shut down."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from itertools import pairwise

from moiety.client import Client
from moiety.config.application import AppSettings, ExpertDeployment, GatewayDeployment, RouterDeployment
from moiety.config.registry_url import RegistryUrl
from moiety.config.run_folder import scratch_folder
from moiety.core.replica import Replica, ready_experts
from moiety.deploy.ray_cluster import environment
from moiety.deploy.run import deploy_app
from moiety.errors import Unavailable
from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import Registry
from moiety.synthetic import write_tiny
from moiety.telemetry import configure
from moiety.telemetry.names import Attribute, SpanName
from moiety.tools.trace.receiver import TraceReceiver
from moiety.tools.trace.spans import ReceivedSpan
from moiety.tools.trace.tree import coverage
from moiety.tools.trace.waterfall import waterfall

Say = Callable[[str], None]

GROUPS = 2
# Services trace a request only if its client does.
TRACING = {"OTEL_TRACES_SAMPLER": "parentbased_always_off", "OTEL_BSP_SCHEDULE_DELAY": "200"}
CAPACITY = 120.0  # rows per second that a replica is paced to: replicas that share few cores are not faster together
PROMPT = "The experts were asked"
STREAMS = 6
KILL_TOKENS = 60
PROMPT_TOKENS = 8
LEDGER_S = 1.1  # seconds between readings of the ledger; routers report once a second
CANDIDATES = 6  # prompts to try, in search of one that keeps one group busier than the other
POLL_S = 0.2


def run_demo(say: Say, wait_s: float) -> None:
    """Runs all stages of the demo. Raises Unavailable or TimeoutError where a stage does not finish in time.

    The system may take 3 * `wait_s` seconds to start. Each later wait, for replicas, load or spans, may take `wait_s`.
    Raises Unavailable also where the tokens differ after a replica was killed.
    """
    began = time.monotonic()

    def stage(title: str) -> None:
        say(f"\n[{time.monotonic() - began:5.1f} s] {title}")

    with ExitStack() as ends:
        stage("A small Mixtral checkpoint with random weights")
        folder = ends.enter_context(scratch_folder())
        model = folder / "tiny-mixtral"
        write_tiny("mixtral", model, num_hidden_layers=2)
        receiver = ends.enter_context(TraceReceiver())
        redis = ends.enter_context(EmbeddedRedis())
        stage(f"Redis at {redis.url}; Ray, the gateway, the router and {GROUPS} expert groups, each its own deployment")
        settings = AppSettings(
            app="demo",
            model=str(model),
            dtype="float32",
            groups=GROUPS,
            registry=RegistryUrl(redis.url),
            gateway=GatewayDeployment(port=0, http_port=0),
            router=RouterDeployment(num_cpus=0.1),
            experts=ExpertDeployment(
                max_replicas=2,
                num_cpus=0.1,
                capacity=CAPACITY,
                target_busy=0.75,
                queue_wait_ms=10_000.0,
                shrink_after_s=4.0,
            ),
        )
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "MOIETY_CACHE": str(folder / "cache")}
        with environment({**TRACING, **variables}):
            deployed = ends.enter_context(
                deploy_app(
                    settings, progress=lambda line: say(f"    {line}"), wait_s=wait_s * 3, ray_folder=folder / "ray"
                )
            )
        registry = connect(redis.url, deployed.system)
        demo = _Demo(say, stage, registry, deployed.gateways[0], receiver, wait_s)
        asyncio.run(demo.show())
        stage("Shutting down: replicas drain, then Ray and Redis end")
    stage("Done; nothing is left behind")


class _Demo:
    """Runs the stages of the demo that need the running system: stream, scale, trace and kill."""

    def __init__(
        self, say: Say, stage: Say, registry: Registry, address: str, receiver: TraceReceiver, wait_s: float
    ) -> None:
        self._say, self._stage, self._registry, self._address = say, stage, registry, address
        self._receiver, self._wait_s = receiver, wait_s

    async def show(self) -> None:
        try:
            async with Client(self._address) as client:
                await self._stream(client)
                await self._scale(client)
                await self._trace()
                await self._kill(client)
        finally:
            await self._registry.close()

    async def _stream(self, client: Client) -> None:
        self._stage(f"A generation, streamed over gRPC from {self._address}")
        pieces, count, began = [], 0, time.monotonic()
        async for chunk in client.generate(PROMPT, max_tokens=32, ignore_eos=True):
            pieces.append(chunk.text)
            count += len(chunk.token_ids)
        self._say(f"    {PROMPT!r} → {''.join(pieces)!r}")
        self._say(
            f"    {count} tokens in {len(pieces)} messages, {time.monotonic() - began:.2f} s "
            "(random weights: the text makes no sense)"
        )

    async def _scale(self, client: Client) -> None:
        self._stage("Loading one expert group: traffic on a prompt whose tokens go mostly to its experts")
        token, hot, shares = await self._skewed_prompt(client)
        split = ", ".join(f"{share:.0%} to experts-{group}" for group, share in enumerate(shares))
        self._say(f"    prompt [{token}] x {PROMPT_TOKENS} sends its rows {split}: experts-{hot} should grow")
        async with _traffic(client, [token] * PROMPT_TOKENS):
            await self._until(f"experts-{hot} to grow", lambda counts: counts[f"experts-{hot}"] >= 2)
            await asyncio.sleep(2.0)  # until the new replica has reported its share of the load
            await self._show_load()
        self._stage("The traffic ends: the group shrinks again")
        await self._until(f"experts-{hot} to shrink", lambda counts: counts[f"experts-{hot}"] == 1)

    async def _skewed_prompt(self, client: Client) -> tuple[int, int, list[float]]:
        """Returns (token, group, shares) of the one of CANDIDATES prompts that sends the largest share of rows to one group.

        Each prompt is one token repeated. `group` gets the largest share; `shares` has the share of every group.
        """
        best: tuple[float, int, list[float]] = (0.0, 0, [])
        before = await self._rows_by_group()
        for token in range(20, 20 + CANDIDATES):
            async for _ in client.generate([token] * PROMPT_TOKENS, max_tokens=8, ignore_eos=True):
                pass
            after = await self._rows_after(before)
            rows = [new - old for new, old in zip(after, before, strict=True)]
            shares = [row / sum(rows) for row in rows]
            best, before = max(best, (max(shares), token, shares)), after
        share, token, shares = best
        return token, shares.index(share), shares

    async def _rows_after(self, before: Sequence[int]) -> list[int]:
        """Reads each group's rows from the load ledger until two successive readings agree and differ from `before`.

        Returns the last reading. Readings are LEDGER_S apart, longer than a router's reporting period. Raises TimeoutError.
        """
        async with asyncio.timeout(self._wait_s):
            last = list(before)
            while True:
                await asyncio.sleep(LEDGER_S)
                rows = await self._rows_by_group()
                if rows == last and rows != list(before):
                    return rows
                last = rows

    async def _rows_by_group(self) -> list[int]:
        """Returns the rows that routers have sent to each group's experts, from the load ledger."""
        held = {replica.deployment: replica.held for replica in await self._experts()}  # all of a group hold the same
        totals = [0] * len(held)
        for demand in (await self._registry.expert_demand()).values():
            for layer, rows in enumerate(demand.rows):
                for group, (_, experts) in enumerate(sorted(held.items())):
                    totals[group] += sum(rows[expert] for expert in experts.layer(layer))
        return totals

    async def _until(self, what: str, reached: Callable[[dict[str, int]], bool]) -> None:
        """Waits until `reached` is true of the number of replicas per group. Raises Unavailable after `wait_s`.

        Prints each change of these numbers, and each scaling decision with its reason. The error names `what`.
        """
        began, shown = time.monotonic(), len(await self._registry.decisions())
        counts: dict[str, int] = {}
        try:
            async with asyncio.timeout(self._wait_s):
                while not reached(counts := await self._show_counts(counts, began)):
                    shown = await self._show_decisions(shown)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(f"waited {self._wait_s:g} s for {what}; replicas are {counts}") from None
        await self._show_decisions(shown)

    async def _show_counts(self, before: dict[str, int], began: float) -> dict[str, int]:
        counts = {f"experts-{group}": 0 for group in range(GROUPS)}
        for replica in await self._experts():
            counts[replica.deployment] += 1
        if counts != before:
            bars = "  ".join(f"{name} {'■' * count} {count}" for name, count in counts.items())
            self._say(f"    +{time.monotonic() - began:4.1f} s  replicas: {bars}")
        return counts

    async def _show_load(self) -> None:
        loads = await self._registry.replica_load()
        for replica in sorted(await self._experts(), key=lambda replica: (replica.deployment, replica.started)):
            if load := loads.get(replica.id):
                text = f"busy {load.busy:.0%}, {load.rows_per_s:.0f} rows/s, queue wait {load.queue_wait_ms:.1f} ms"
                self._say(f"    {replica.deployment} replica {replica.id}: {text}")

    async def _show_decisions(self, shown: int) -> int:
        """Prints the registry's scaling decisions after the first `shown`; returns how many decisions it has now."""
        decisions = await self._registry.decisions()
        for decision in decisions[shown:]:
            self._say(
                f"    decision: {decision['deployment']} {decision['from']} → {decision['to']}: {decision['reason']}"
            )
            inputs = ", ".join(f"{name} {value:.4g}" for name, value in decision["inputs"].items())
            self._say(f"              on {inputs}")
        return len(decisions)

    async def _trace(self) -> None:
        self._stage("One traced request, as a waterfall; then one of its decode steps")
        tracer = configure("moiety-client", endpoint=self._receiver.endpoint)
        async with Client(self._address, tracer) as traced:
            async for _ in traced.generate(PROMPT, max_tokens=4, ignore_eos=True):
                pass
        await asyncio.to_thread(tracer.shutdown)
        spans = await asyncio.to_thread(self._receiver.wait_for, _complete, self._wait_s)
        trace_id = spans[0].trace_id
        step = next(span for span in spans if span.attributes.get(Attribute.STEP_CLASS) == "decode")
        for text in (
            waterfall(spans, trace_id, max_rows=24),
            waterfall(spans, trace_id, focus=step.span_id, max_rows=24),
        ):
            self._say("    " + text.replace("\n", "\n    ") + "\n")
        self._say(f"    spans below the steps account for {coverage(spans, trace_id):.1%} of the steps' time")

    async def _kill(self, client: Client) -> None:
        self._stage("kill -9 of an expert group's only replica, during a generation")
        expected = await _tokens(client, PROMPT)
        victim = next(replica for replica in await self._experts() if replica.deployment == "experts-1")
        tokens: list[int] = []
        times: list[float] = []
        async for chunk in client.generate(PROMPT, max_tokens=KILL_TOKENS, ignore_eos=True):
            tokens.extend(chunk.token_ids)
            times.append(time.monotonic())
            if len(tokens) == KILL_TOKENS // 3:
                os.kill(victim.pid, signal.SIGKILL)
                self._say(f"    token {len(tokens)}: killed {victim.deployment}, pid {victim.pid}")
        gap = max(b - a for a, b in pairwise(times))
        verdict = "the same" if tokens == expected else "NOT the same"
        self._say(f"    the stream waited {gap:.1f} s for Serve's replacement and finished: {len(tokens)} tokens")
        self._say(f"    they are {verdict} as those of a run without a fault")
        if tokens != expected:
            raise Unavailable("the tokens changed")

    async def _experts(self) -> list[Replica]:
        return ready_experts(await self._registry.replicas())


async def _tokens(client: Client, prompt: str) -> list[int]:
    stream = client.generate(prompt, max_tokens=KILL_TOKENS, ignore_eos=True)
    return [token async for chunk in stream for token in chunk.token_ids]


def _complete(spans: Sequence[ReceivedSpan]) -> bool:
    """Returns whether the trace has spans of client, gateway and router, and an expert replica's span for every hop."""
    counts = Counter(span.name for span in spans)
    heads = (SpanName.CLIENT_GENERATE, SpanName.GENERATE, SpanName.ENGINE_REQUEST)
    return all(counts[name] for name in heads) and counts[SpanName.HOP] == counts[SpanName.EXPERT] > 0


@asynccontextmanager
async def _traffic(client: Client, prompt: Sequence[int]) -> AsyncIterator[None]:
    """Keeps STREAMS generations from `prompt` running until the block ends. Raises generations' errors in an ExceptionGroup."""
    ending = asyncio.Event()

    async def stream() -> None:
        while not ending.is_set():
            async for _ in client.generate(prompt, max_tokens=16, ignore_eos=True):
                pass

    async with asyncio.TaskGroup() as group:
        for _ in range(STREAMS):
            group.create_task(stream())
        try:
            yield
        finally:
            ending.set()
