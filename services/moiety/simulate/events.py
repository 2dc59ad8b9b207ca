"""The same cluster event by event, for small ones: real routings, real queues, batches that merge. Slow, and true.

What `flow.py` says is held against it in tests.
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
class Played:
    """What was seen: the time of every decode step, and the rate and busy fraction that came of it."""

    steps_s: Floats  # [steps]
    rate: float  # tokens per second
    busy: float  # mean of all replicas


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


def play(
    cluster: Cluster,
    included: Floats,
    held: Bools,
    replicas: npt.NDArray[np.int64],
    routers: int,
    steps: int,
    seed: int = 0,
) -> Played:
    """`routers` decode without pause until each has made `steps`, of which the first tenth is not counted.

    A batch's rows per expert are drawn from `included` [L, E]; each expert goes whole to one of the replicas that hold
    it; a free replica takes the oldest call and all others that wait for the same layer.
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
            # A router talks to one replica of each deployment per layer.
            chosen = first[:-1] + random.integers(0, np.maximum(replicas, 1))
            parts: dict[int, tuple[set[int], int]] = {}
            for expert in np.flatnonzero(rows).tolist():
                owners = holders[layer, expert]
                weights = replicas[owners] / replicas[owners].sum()
                owner = owners[0] if len(owners) == 1 else random.choice(owners, p=weights)
                names, count = parts.get(int(chosen[owner]), (set(), 0))
                parts[int(chosen[owner])] = ({*names, expert}, count + int(rows[expert]))
            outstanding[index] = len(parts)
            for server, (names, count) in parts.items():
                servers[server].queue.append(_Call(index, layer, frozenset(names), count))
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
    counted = [took for mine in times for took, _ in mine[max(1, steps // 10) :]]
    made = sum(map(len, times))
    return Played(np.array(counted), made * cluster.batch / now, sum(s.busy_s for s in servers) / now / len(servers))
