"""Simulates a small cluster event by event, with sampled routings, queues and merged batches.

Slow, but without the approximations of `moiety.simulate.flow`, whose results the tests compare with it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moiety.simulate.scenario import Cluster, Floats

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class EventResult:
    """The result of a run: the time of every counted decode step, the token rate and the busy fraction."""

    steps_s: Floats  # [steps]
    rate: float  # tokens per second
    busy: float  # mean over all replicas


@dataclass(slots=True)
class _Call:
    router: int
    layer: int
    experts: frozenset[int]
    rows: int


@dataclass(slots=True)
class _Server:
    queue: deque[_Call]
    working: bool = False
    busy_s: float = 0.0


def run_events(
    cluster: Cluster,
    included: Floats,
    held: Bools,
    replicas: npt.NDArray[np.int64],
    routers: int,
    steps: int,
    seed: int = 0,
) -> EventResult:
    """Simulates `routers` that decode without pause, until each has made `steps` steps.

    The first tenth of a router's steps is not counted. Each token of a batch has a row for an expert with the probability
    `included` [L, E]. All rows of an expert go to one of the replicas that hold it. A free replica takes the oldest call
    and all others that wait for the same layer.
    """
    random = np.random.default_rng(seed)
    servers = [_Server(deque()) for _ in range(int(replicas.sum()))]
    first = np.concatenate([[0], np.cumsum(replicas)])
    holders = {
        (layer, expert): np.flatnonzero(held[:, layer, expert])
        for layer in range(cluster.layers)
        for expert in range(cluster.experts)
    }
    events: list[tuple[float, int, str, int, list[_Call]]] = []
    order = itertools.count()
    outstanding, layer_of, began = np.zeros(routers, int), np.zeros(routers, int), np.zeros(routers)
    times: list[list[tuple[float, float]]] = [[] for _ in range(routers)]
    outside = cluster.attention_s + cluster.hop_s

    def push(time: float, kind: str, index: int, calls: list[_Call]) -> None:
        heapq.heappush(events, (time, next(order), kind, index, calls))

    def attend(router: int, now: float) -> None:
        push(now + outside * max(0.0, 1 + cluster.jitter * random.standard_normal()), "send", router, [])

    def serve(index: int, now: float) -> None:
        server = servers[index]
        if server.working or not server.queue:
            return
        layer = server.queue[0].layer
        batch = [call for call in server.queue if call.layer == layer]
        server.queue = deque(call for call in server.queue if call.layer != layer)
        activated = frozenset[int]().union(*(call.experts for call in batch))
        took = cluster.cost.predict(len(activated) * cluster.expert_bytes, sum(call.rows for call in batch))
        server.working = True
        server.busy_s += took
        push(now + took, "done", index, batch)

    for router in range(routers):
        push(random.uniform(0, cluster.layers * 2 * outside), "send", router, [])
    now = 0.0
    while events and min(map(len, times)) < steps:
        now, _, kind, index, calls = heapq.heappop(events)
        if kind == "send":
            layer = int(layer_of[index])
            rows = random.binomial(cluster.batch, included[layer])
            # Per layer, a router calls one replica of each deployment.
            chosen = first[:-1] + random.integers(0, np.maximum(replicas, 1))
            parts: dict[int, tuple[set[int], int]] = {}
            for expert in np.flatnonzero(rows).tolist():
                owners = holders[layer, expert]
                weights = replicas[owners] / replicas[owners].sum()
                owner = owners[0] if len(owners) == 1 else random.choice(owners, p=weights)
                activated, count = parts.get(int(chosen[owner]), (set(), 0))
                parts[int(chosen[owner])] = ({*activated, expert}, count + int(rows[expert]))
            outstanding[index] = len(parts)
            for server, (activated, count) in parts.items():
                servers[server].queue.append(_Call(index, layer, frozenset(activated), count))
                serve(server, now)
            continue
        servers[index].working = False
        for call in calls:
            router = call.router
            outstanding[router] -= 1
            if outstanding[router]:
                continue
            layer_of[router] = (layer_of[router] + 1) % cluster.layers
            if layer_of[router] == 0:
                times[router].append((now - began[router], now))
                began[router] = now
            attend(router, now)
        serve(index, now)
    counted = [took for of_router in times for took, _ in of_router[max(1, steps // 10) :]]
    total = sum(map(len, times))
    return EventResult(
        np.array(counted), total * cluster.batch / now, sum(s.busy_s for s in servers) / now / len(servers)
    )
