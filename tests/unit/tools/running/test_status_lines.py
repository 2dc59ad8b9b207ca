"""A system's state as text: who reads it needs no legend elsewhere, and no terminal wider than 100 columns."""

from __future__ import annotations

from dataclasses import replace

from moiety.config.running_systems import RunningSystem
from moiety.core.experts import ExpertSet
from moiety.core.load import ReplicaLoad
from moiety.core.replica import Placement, Replica, ReplicaState, Role
from moiety.testing import fake_system
from moiety.tools.running.find import FoundSystem
from moiety.tools.running.snapshot import Snapshot
from moiety.tools.running.status_lines import WIDTH, duration, status_lines

NOW = 1_800_000_000.0
LOCAL = RunningSystem(4711, "here", "fake", "tiny", since=NOW - 200, version="1.2.3", logs="/tmp/moiety-0/serve-a/logs")


def live(name: str, role: Role, **changes: object) -> Replica:
    """A replica that was started 90 s before NOW."""
    deployment = name.rpartition("#")[0]
    replica = Replica(name.replace("#", ""), role, deployment, "10.0.0.7:40001", "node-a", "tiny", "0" * 32)
    return replace(replica, started=NOW - 90, version="1.2.3", **changes)  # type: ignore[arg-type]


HALF = ExpertSet.uniform(4, range(4))
REPLICAS = (
    live("experts-10#a", Role.EXPERT, held=HALF, state=ReplicaState.SICK, problem="no batch in 30 s"),
    live("experts-2#b", Role.EXPERT, held=HALF, leaving=ExpertSet.uniform(1, [9])),
    live("router#c", Role.ROUTER),
    live("gateway#d", Role.GATEWAY, http_address="10.0.0.7:50080"),
)
WHOLE = Snapshot(
    FoundSystem("redis://:secret-1@redis:6379/0", fake_system(), None),
    NOW,
    REPLICAS,
    {"experts-2b": ReplicaLoad(0.876, 12.34, 567.8, 90.1)},
    Placement(3, {"experts-2": HALF, "experts-10": HALF, "hot-0": ExpertSet()}),
    (
        {"time": NOW - 12, "deployment": "experts-2", "from": 1, "to": 2, "reason": "busy 0.98 > target 0.75 " * 9},
        {"odd": 1},
    ),
)


def test_it_shows_every_replica_with_its_load() -> None:
    """Each replica has a line, gateways first and groups by number; numbers stand under headings with units."""
    lines = list(status_lines(WHOLE))
    (head,) = (line for line in lines if line.startswith("deployment"))
    assert head.split()[:4] == ["deployment", "replica", "state", "address"]
    assert all(heading in head for heading in ("busy %", "wait ms", "rate /s", "experts", "up"))
    rows = lines[lines.index(head) + 1 :][:6]
    assert [row.split()[0] for row in rows] == ["gateway", "router", "experts-2", "experts-10", "!", "hot-0"]
    group = "experts-2 experts-2 ready 10.0.0.7:40001 88 12.3 567.8 16+1 90 s"
    assert " ".join(rows[2].split()) == group
    assert rows[2].index("567.8") + len("567.8") == head.index("rate /s") + len("rate /s")
    assert " sick " in rows[3]
    assert rows[4] == "  ! no batch in 30 s"
    assert rows[5].endswith("no replica")


def test_it_fits_and_hides_secrets() -> None:
    """No line is wider than the bound, the reason of a decision is whole, and the registry's password is not shown."""
    lines = list(status_lines(WHOLE))
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert " ".join(text.split()).count("busy 0.98 > target 0.75") >= 8
    assert "12 s ago  experts-2     1 → 2" in text
    assert "redis://redis:6379/0" in text
    assert "secret-1" not in text
    assert "secret-1" not in str(WHOLE.to_json())


def test_the_first_line_says_how_the_system_is() -> None:
    """It serves if a ready replica of each role is there; else the line says which is missing, or that it starts or ends."""

    def first(snapshot: Snapshot) -> str:
        return next(status_lines(snapshot))

    assert first(WHOLE) == "fake: serving, model tiny"
    assert first(replace(WHOLE, replicas=REPLICAS[:3])) == "fake: not serving, no ready gateway, model tiny"
    assert first(replace(WHOLE, replicas=())) == "fake: no live replica, model unknown"
    ends = replace(WHOLE, replicas=[replace(one, state=ReplicaState.DRAINING) for one in REPLICAS])
    assert first(ends) == "fake: shutting down, model tiny"
    starting = Snapshot(FoundSystem("", None, LOCAL), NOW)
    lines = list(status_lines(starting))
    assert lines[0] == "fake: starting, model tiny"
    assert "process   `moiety serve` 1.2.3, pid 4711, for 3 min" in lines
    assert lines[-1] == "logs      /tmp/moiety-0/serve-a/logs   (`moiety logs` prints them)"


def test_replicas_of_two_versions_are_named() -> None:
    """During an upgrade a line says which versions run side by side."""
    mixed = replace(WHOLE, replicas=(replace(REPLICAS[0], version="1.3.0"), *REPLICAS[1:]))
    assert "versions  replicas of different versions run: 1.2.3, 1.3.0" in list(status_lines(mixed))
    assert not any(line.startswith("versions") for line in status_lines(WHOLE))


def test_durations_are_short() -> None:
    """A length of time has one unit, and clocks that differ do not make it negative."""
    assert [duration(s) for s in (-3, 42, 300, 9000, 1e6)] == ["0 s", "42 s", "5 min", "2.5 h", "12 d"]
