"""What services write to the load ledger while they serve, observed at the Redis server."""

from __future__ import annotations

import time
from collections import Counter

import redis

from moiety.core.replica import Role
from support.serving import Served

WATCHED_S = 1.8  # services beat twice a second and publish their load at every second or third beat


def transactions(port: int, seconds: float) -> list[list[str]]:
    """Returns each transaction of the next `seconds` as a list of commands; a single command is a list of one."""
    open_transactions: dict[str, list[str]] = {}  # client -> its commands so far
    executed = []
    with redis.Redis(port=port) as client, client.monitor() as monitor:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = monitor.next_command()  # returns soon: services send heartbeats
            sender, command = f"{entry['client_address']}:{entry['client_port']}", entry["command"]
            if command == "MULTI":
                open_transactions[sender] = []
            elif command == "EXEC":
                executed.append(open_transactions.pop(sender, []))
            elif entry["client_type"] != "lua":
                if sender in open_transactions:
                    open_transactions[sender].append(command)
                else:
                    executed.append([command])
    return executed


def test_a_process_sends_its_load_in_one_pipeline_a_second(served: Served) -> None:
    """A router sends its load and its counters together; a gateway and an expert replica send their load."""
    publications: Counter[str] = Counter()
    for commands in transactions(served.redis.port, WATCHED_S):
        text = " ".join(commands)
        for child in served.cluster.children:
            replica = child.replica
            kinds = [kind for kind in ("busy", "load") if f":{kind}:{replica.id} " in text]
            publications[replica.id] += bool(kinds)
            if kinds and replica.role is Role.ROUTER:
                assert kinds == ["busy", "load"]
            elif kinds:
                assert kinds == ["busy"]
    assert {child.replica.id for child in served.cluster.children} == {
        name for name, count in publications.items() if count
    }
    assert max(publications.values()) <= WATCHED_S + 1
