"""A replica dies or hangs under eight streams: every stream ends with the tokens of a run without faults."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from chaos_support import NEW_TOKENS, STRIKE_AT, assert_serves_on

from moiety.client import Client
from moiety.errors import Unavailable
from moiety.local.cluster import LocalCluster
from support.serving import Served
from support.streams import Streams


def test_a_hung_replica_with_a_spare_is_hedged(served: Served, expected: list[list[int]]) -> None:
    """SIGSTOP of one of two holders: hedges keep every stream going; tokens stay the same, also after SIGCONT."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(2, 1)
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        hung = served.cluster.experts(0)[0]
        hung.signal(signal.SIGSTOP)
        assert await streams.finish() == expected
        print(f"worst token gap after SIGSTOP with a second holder: {streams.worst_gap:.3f} s")
        hung.signal(signal.SIGCONT)
        await assert_serves_on(client, expected)

    served.run(scenario)


def test_a_killed_replica_with_a_spare_costs_no_token(served: Served, expected: list[list[int]]) -> None:
    """kill -9 of one of two holders: no stream fails or changes; the worst token gap is printed (goal 0.4 s)."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(2, 1)
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        lost = served.cluster.experts(0)[0]
        lost.signal(signal.SIGKILL)
        assert await streams.finish() == expected
        await lost.ended()
        print(f"worst token gap after kill -9 with a second holder: {streams.worst_gap:.3f} s (goal 0.4 s)")

    served.run(scenario)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="hung", marks=pytest.mark.slow),  # detected after 10 s without an answer
    ],
)
def test_streams_wait_for_a_new_sole_holder(served: Served, expected: list[list[int]], fault: signal.Signals) -> None:
    """The only holder dies or hangs: streams keep their slots, wait for its replacement, and end with the same tokens."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        lost = served.cluster.experts(1)[0]
        lost.signal(fault)
        await served.cluster.add_expert(1)
        assert await streams.finish() == expected
        if fault is signal.SIGSTOP:
            lost.signal(signal.SIGKILL)
        await lost.ended()

    served.run(scenario)


@pytest.mark.slow
async def test_requests_fail_without_a_replacement_in_time(tiny: Callable[[str], str]) -> None:
    """Without a replacement in time requests end with UNAVAILABLE, which names layer and experts; later ones work.

    Over 20 s: its router waits only one second, so it needs its own cluster.
    """
    impatient = LocalCluster(tiny("qwen3_moe"), dtype="float32", router={"expert_wait_s": 1.0})
    async with impatient as cluster, Client(cluster.address) as client:
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        cluster.experts(1)[0].signal(signal.SIGKILL)
        with pytest.raises(Unavailable, match=r"no live replica holds expert\(s\) \[.*\] of MoE layer \d"):
            await streams.finish()
        await cluster.add_expert(1)
        await Streams(client, NEW_TOKENS).finish()
