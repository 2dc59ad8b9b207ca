"""What services send to the load ledger while they serve, as the Redis server sees it."""

from __future__ import annotations

import time
from collections import Counter

import redis

from moiety.core.replica import Role
from support.serving import Served

WATCHED_S = 1.8  # services beat twice a second and tell their load at every second or third beat


def transactions(port: int, seconds: float) -> list[list[str]]:
    """The commands of every transaction that the server executed meanwhile; whatever stands alone is a list of one."""
    running: dict[str, list[str]] = {}  # client -> the commands of its open transaction
    done = []
    with redis.Redis(port=port) as client, client.monitor() as monitor:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            seen = monitor.next_command()  # heartbeats see to it that there is always one soon
            sender, command = f"{seen['client_address']}:{seen['client_port']}", seen["command"]
            if command == "MULTI":
                running[sender] = []
            elif command == "EXEC":
                done.append(running.pop(sender, []))
            elif seen["client_type"] != "lua":
                if sender in running:
                    running[sender].append(command)
                else:
                    done.append([command])
    return done


def test_a_process_sends_its_load_in_one_pipeline_a_second(served: Served) -> None:
    """A router's counters and occupancy go together; a gateway and an expert replica send one load of their own."""
    seen = transactions(served.redis.port, WATCHED_S)
    told: Counter[str] = Counter()
    for commands in seen:
        text = " ".join(commands)
        for child in served.cluster.children:
            replica = child.replica
            kinds = [kind for kind in ("busy", "load") if f":{kind}:{replica.id} " in text]
            told[replica.id] += bool(kinds)
            if kinds and replica.role is Role.ROUTER:
                assert kinds == ["busy", "load"]
            elif kinds:
                assert kinds == ["busy"]
    assert {child.replica.id for child in served.cluster.children} == {name for name, count in told.items() if count}
    assert max(told.values()) <= WATCHED_S + 1
