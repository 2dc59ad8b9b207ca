"""NaN and Inf in results: whose fault they are, and that they are never used while another holder could be right."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hop_scenarios import EXPECTED, HIDDEN, ROUTING, SHAPE, assert_layer, holder, hop_over

from moiety.errors import HopFailed
from moiety.internal.v1 import experts_pb2
from moiety.testing import FakeExperts, fake_layer
from moiety.wire.finite import all_finite, non_finite_rows
from moiety.wire.rows import RowBuffer

pytestmark = pytest.mark.usefixtures("each_transport")


def returning(replica: FakeExperts, value: float, experts: tuple[int, ...] = (0, 1, 2, 3)) -> FakeExperts:
    """Makes `replica` return `value` in the first element of each row of `experts`."""

    def on_reply(frame: bytes) -> bytes:
        reply = experts_pb2.ForwardResponse.FromString(frame)
        reply.ClearField("payload_bytes")
        rows = np.frombuffer(reply.payload, dtype="<f4").reshape(-1, SHAPE.mlp.hidden).copy()
        rows[np.isin(replica.calls[-1].experts, experts), 0] = value
        reply.payload = rows.tobytes()
        return reply.SerializeToString()

    replica.on_reply = on_reply
    return replica


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_non_finite_value_is_found_and_no_finite_one(dtype: torch.dtype):
    """NaN and Inf of either sign, in any place, are found; the largest and smallest finite values are not."""
    limits = torch.finfo(dtype)
    for value in (limits.max, limits.min, limits.tiny, -0.0, 0.0, 1.0):
        assert all_finite(RowBuffer.of(torch.full((3, 8), value, dtype=dtype)), dtype)
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for place in range(24):
            rows = torch.randn(3, 8).to(dtype)
            rows.view(-1)[place] = value
            assert not all_finite(RowBuffer.of(rows), dtype)
            assert non_finite_rows(RowBuffer.of(rows), dtype).tolist() == [row == place // 8 for row in range(3)]
    assert all_finite(RowBuffer.of(torch.empty(0, 8, dtype=dtype)), dtype)


async def test_only_the_rows_concerned_are_computed_again():
    """A holder returns NaN for one expert: the other holder gets that expert's rows and no others."""
    sick, other = returning(holder("a"), float("nan"), (3,)), holder("b")
    async with hop_over(sick, other) as lane:
        lane.fleet.breakers.overtaken("b", time.monotonic(), 60.0)  # so that all rows go to a first
        await assert_layer(lane)
        assert [call.experts.tolist() for call in other.calls] == [[3, 3]]
        assert lane.fleet.breakers.open == {"a"}


async def test_two_holders_that_agree_prove_the_rows():
    """Rows that overflow are accepted once a second holder returns the same: the reference has them too. Nobody is blamed."""
    both = [returning(holder(name), float("inf"), (2,)) for name in ("a", "b")]
    expected = EXPECTED.clone()
    expected[1, 0, 0] = float("inf")
    async with hop_over(*both) as lane:
        assert torch.equal(await lane.compute(0, HIDDEN, ROUTING), expected)
        assert not lane.fleet.breakers.avoided(time.monotonic())


async def test_a_third_holder_settles_who_is_right():
    """Of three holders, the one that returns NaN alone is avoided, the two that do not are not."""
    sick, *well = returning(holder("a"), float("nan")), holder("b"), holder("c")
    async with hop_over(sick, *well) as lane:
        for _ in range(4):
            await assert_layer(lane)
        assert lane.fleet.breakers.open == {"a"}


async def test_a_sick_replica_is_no_witness():
    """Two holders of NaN, one of them known to be sick: the rows are not proved, and fail with an error that says why."""
    known, other = returning(holder("a"), float("nan")), returning(holder("b"), float("nan"))
    async with hop_over(known, other) as lane:
        lane.fleet.breakers.failed("a", time.monotonic(), "known", certain=True)
        with pytest.raises(HopFailed, match=r"replica . returned NaN or Inf for . finite rows of layer 0"):
            await lane.compute(0, HIDDEN, ROUTING)


async def test_the_only_holder_of_nan_ends_the_tokens_concerned():
    """Without another holder, the tokens of the bad rows fail; the replica is marked, and still serves what is good."""
    only = returning(holder("a"), float("nan"), (3,))
    async with hop_over(only, expert_wait_s=60.0) as lane:
        with pytest.raises(HopFailed, match="replica a returned NaN or Inf for 2 finite rows of layer 0") as failed:
            await lane.compute(0, HIDDEN, ROUTING)
        assert failed.value.tokens == [1, 2]
        assert lane.fleet.breakers.open == {"a"}
        survivors = ROUTING[:1]
        assert torch.equal(await lane.compute(0, HIDDEN[:1], survivors), EXPECTED[:1])


async def test_non_finite_rows_of_the_router_are_nobodys_fault():
    """A NaN that the router sends comes back as NaN: it is not sent again, and no replica is blamed."""
    hidden = HIDDEN.clone()
    hidden[1, 2] = float("nan")
    both = [holder("a"), holder("b")]
    async with hop_over(*both) as lane:
        result = await lane.compute(0, hidden, ROUTING)
        assert torch.equal(result.nan_to_num(7.0), fake_layer(0, hidden, ROUTING).nan_to_num(7.0))
        assert all(call.attempt == 0 for replica in both for call in replica.calls)
        assert not lane.fleet.breakers.avoided(time.monotonic())
