"""Lying replicas, over real gRPC: each lie is told as described, so a trial with it tests what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from moiety.internal.v1 import experts_pb2
from moiety.tools.chaos.lying_replica import ANSWERS, BOMB, FLOOD, HOST, LyingReplica
from moiety.wire import codec
from moiety.wire.channels import channel
from moiety.wire.service_names import EXPERT_SERVICE

WIDTH, ASKED = 8, 2
HONEST = experts_pb2.DescribeReplicaResponse(hidden=WIDTH, dtype="float32", held="0:0-3")
CALL = experts_pb2.ForwardRequest(call_id=7, attempt=1, rows=1, experts=bytes(4 * ASKED))


async def told(lie: str) -> list[tuple[experts_pb2.ForwardResponse, np.ndarray]]:
    """Makes one call and returns all its answers, as headers and rows."""
    async with LyingReplica(lie, HONEST) as liar, channel(f"{HOST}:{liar.port}") as link:
        call = link.stream_stream(f"/{EXPERT_SERVICE}/Forward")()
        await call.write(codec.encode(CALL))
        await call.done_writing()
        frames = [codec.decode(experts_pb2.ForwardResponse, frame) async for frame in call]
        assert liar.calls == 1
        return [(header, np.frombuffer(payload, "<f4").copy()) for header, payload in frames]


@pytest.mark.parametrize(
    ("lie", "values"),
    [("nan", ASKED * WIDTH), ("inf", ASKED * WIDTH), ("short", WIDTH), ("long", 3 * WIDTH), ("empty", 0)],
)
async def test_lies_about_rows(lie: str, values: int):
    """The answer is OK, under the call's id, with numbers that are not finite or rows that are too few or too many."""
    ((header, rows),) = await told(lie)
    assert (header.call_id, header.attempt, header.outcome) == (7, 1, experts_pb2.OUTCOME_OK)
    assert len(rows) == values
    if lie in ("nan", "inf"):
        assert not np.isfinite(rows).any()


async def test_lies_about_ids():
    """Answers come under ids that were not asked."""
    assert [header.call_id for header, _ in await told("nextid")] == [8]
    assert [header.call_id for header, _ in await told("ids")] == list(range(4, 11))
    flood = await told("flood")
    assert len({header.call_id for header, _ in flood} - {7}) == FLOOD


@pytest.mark.parametrize("lie", ["lacks", "wrong", "full", "fails", "unknown"])
async def test_refusals(lie: str):
    """Every call is refused, and nothing is computed."""
    ((header, rows),) = await told(lie)
    assert header.outcome != experts_pb2.OUTCOME_OK
    assert not rows.size


async def test_silence_and_impossible_times():
    """One lie gives no answer at all, another one times that are no numbers."""
    assert await told("silent") == []
    ((header, _),) = await told("times")
    assert math.isnan(header.compute_ms)


async def test_lies_about_itself():
    """A description may claim more experts than any model has, be of another width, or be no description."""
    for lie in ("bomb", "wide", "garbled"):
        async with LyingReplica(lie, HONEST) as liar, channel(f"{HOST}:{liar.port}") as link:
            description = await link.unary_unary(f"/{EXPERT_SERVICE}/DescribeReplica")(b"", timeout=5)
            assert liar.describes == 1
        if lie == "garbled":
            with pytest.raises(DecodeError):
                experts_pb2.DescribeReplicaResponse.FromString(description)
        else:
            claimed = experts_pb2.DescribeReplicaResponse.FromString(description)
            assert (claimed.held == BOMB) == (lie == "bomb")
            assert (claimed.hidden == WIDTH) == (lie != "wide")


def test_every_lie_is_told_in_words():
    """What --list shows of a lie is a phrase."""
    assert all(" " in does for does, _ in ANSWERS.values())
