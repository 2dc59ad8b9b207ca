"""A snapshot of a system as text: at most WIDTH columns, each heading with its unit. No clock, no I/O."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from moiety.config.registry_url import without_secrets
from moiety.core.replica import Replica, ReplicaState, Role
from moiety.tools.running.snapshot import Snapshot

WIDTH = 100
_ROW = "{:<13} {:<9} {:<8} {:<22} {:>6} {:>8} {:>8} {:>8} {:>8}"
_LEGEND = (
    "busy: share of the requests that fit (gateway), of slots or cache (router), of the time (experts). wait: mean of "
    "requests (router) or calls (experts) in the queue. rate: requests, for experts rows of hidden states."
)


def status_lines(snapshot: Snapshot) -> Iterator[str]:
    """Yields the text: the system, its replicas, the placement, the last decisions, where the logs are."""
    yield from _head(snapshot)
    if snapshot.replicas:
        yield ""
        yield from _table(snapshot)
    if snapshot.placement is not None:
        yield ""
        yield f"placement {snapshot.placement.epoch}  (LAYERS:EXPERTS, counted from 0)"
        for name, experts in snapshot.placement.held.items():
            yield _shortened(f"  {name:<13} {len(experts):>6} in all  {experts}")
    if snapshot.decisions:
        yield ""
        yield "last decisions about scaling and placement, replicas before → after"
        for decision in snapshot.decisions:
            yield from _decision(decision, snapshot.time)
    yield ""
    yield from _logs(snapshot)


def duration(seconds: float) -> str:
    """Returns a length of time in at most 7 characters: 42 s, 3 min, 2.5 h, 12 d."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def _head(snapshot: Snapshot) -> Iterator[str]:
    found, live = snapshot.found, snapshot.replicas
    models = sorted({one.model for one in live}) or ([found.local.model] if found.local else [])
    app = found.system.app if found.system else found.local.app if found.local else ""
    yield _shortened(f"{app}: {_state(snapshot)}, model {', '.join(models) or 'unknown'}")
    if (system := found.system) is not None:
        yield f"revision  {system.revision}, groups={system.groups}, slices={system.slices}"
        yield f"cluster   {system.cluster}"
    for gateway in (one for one in live if one.role is Role.GATEWAY):
        http = f"   HTTP http://{gateway.http_address}/v1" if gateway.http_address else ""
        yield f"gateway   gRPC {gateway.address}{http}"
    if found.url:
        yield f"registry  {without_secrets(found.url)}"
    if found.local is not None:
        age = duration(snapshot.time - found.local.since)
        yield f"process   `moiety serve` {found.local.version}, pid {found.local.pid}, for {age}"
    versions = sorted({one.version for one in live if one.version})
    if len(versions) > 1:
        yield f"versions  replicas of different versions run: {', '.join(versions)}"


def _state(snapshot: Snapshot) -> str:
    """Returns in a word or two how the system is."""
    serving = {one.role for one in snapshot.replicas if one.state is ReplicaState.READY}
    if serving >= set(Role):
        return "serving"
    if snapshot.found.local is not None and not snapshot.found.local.ready:
        return "starting"
    if not snapshot.replicas:
        return "no live replica"
    if all(one.state is ReplicaState.DRAINING for one in snapshot.replicas):
        return "shutting down"
    return f"not serving, no ready {' or '.join(role for role in Role if role not in serving)}"


def _table(snapshot: Snapshot) -> Iterator[str]:
    yield _ROW.format("deployment", "replica", "state", "address", "busy %", "wait ms", "rate /s", "experts", "up")
    nodes: dict[str, int] = {}
    for name, live in snapshot.deployments.items():
        if not live:
            yield f"{name:<13} no replica"
        for replica in live:
            nodes[replica.node] = nodes.get(replica.node, 0) + 1
            yield _row(snapshot, replica)
            if replica.problem:
                yield from textwrap.wrap(replica.problem, WIDTH, initial_indent="  ! ", subsequent_indent="    ")
    if len(nodes) > 1:
        yield f"on {len(nodes)} nodes: " + ", ".join(f"{node[:8]} {count}" for node, count in sorted(nodes.items()))
    yield from textwrap.wrap(_LEGEND, WIDTH)


def _row(snapshot: Snapshot, replica: Replica) -> str:
    load = snapshot.loads.get(replica.id)
    figures = ("-", "-", "-")
    if load is not None:
        wait = "-" if replica.role is Role.GATEWAY else f"{load.queue_wait_ms:.1f}"  # requests wait at the routers
        figures = (f"{100 * load.busy:.0f}", wait, f"{load.rows_per_s:.1f}")
    held = str(len(replica.held)) if replica.role is Role.EXPERT else ""
    if len(replica.leaving):
        held += f"+{len(replica.leaving)}"  # still answered until every router has acknowledged the placement
    age = duration(snapshot.time - replica.started)
    names = replica.deployment, replica.id[:9], replica.state, replica.address
    return _ROW.format(*names, *figures, held, age).rstrip()


def _decision(decision: Mapping[str, Any], now: float) -> Iterator[str]:
    """Yields one entry of the log of decisions, which may be any JSON object."""
    at = decision.get("time")
    age = f"{duration(now - at)} ago" if isinstance(at, int | float) else ""
    change = f"{decision.get('from', '?')} → {decision.get('to', '?')}"
    first = f"  {age:>11}  {decision.get('deployment', '?')!s:<13} {change:<9} "
    reason = str(decision.get("reason", ""))
    yield from textwrap.wrap(reason, WIDTH, initial_indent=first, subsequent_indent=" " * len(first)) or [
        first.rstrip()
    ]


def _logs(snapshot: Snapshot) -> Iterator[str]:
    if snapshot.found.local is not None and snapshot.found.local.logs:
        yield f"logs      {snapshot.logs}   (`moiety logs` prints them)"
    else:
        yield f"logs      on each node, below Ray's temporary folder: {snapshot.logs}"
        yield "          (serve/replica_APP_DEPLOYMENT_REPLICA.log, worker-*-PID.err)"


def _shortened(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
