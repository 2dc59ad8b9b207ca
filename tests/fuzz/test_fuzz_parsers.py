"""Every parser of foreign bytes gets damaged inputs: it returns a value or raises its documented error, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from fuzz_support import FAST, SLOW, damaged

from moiety.core.experts import ExpertSet
from moiety.core.load import BatchCost, ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Role
from moiety.core.system import SystemId
from moiety.errors import InvalidRequest
from moiety.internal.v1 import experts_pb2
from moiety.registry import entries
from moiety.testing import SYSTEM, fake_replica, fake_shape
from moiety.wire import codec
from moiety.wire.frames import parse_call
from moiety.wire.rows import RowBuffer

HIDDEN, ROW_BYTES = 4, 16
HELD = ExpertSet.uniform(3, range(6)) | ExpertSet({0: frozenset({7, 9})})
COST = BatchCost(0.001, 1e-9, 1e-6, 4096, 12, 0.1)
DEMAND = ExpertDemand(((1, 2), (3, 4)), ((1, 1), (1, 1)), 12.5, 1.0, (COST,))
TIMES = [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)]


def call_frame() -> bytes:
    """Returns a frame of a call of three rows."""
    rows = RowBuffer.within(memoryview(bytes(3 * ROW_BYTES)), ROW_BYTES)
    header = experts_pb2.ForwardRequest(
        call_id=7,
        system_key=SYSTEM.key,
        rows=3,
        dtype="float32",
        k_offsets=codec.int32_bytes(np.array([0, 2, 3, 5])),
        experts=codec.int32_bytes(np.array([0, 1, 2, 0, 3])),
        deadline_ms=100,
    )
    return codec.encode(header, rows)


def reply_frame() -> bytes:
    """Returns a frame of a reply of two rows."""
    header = experts_pb2.ForwardResponse(call_id=7, outcome=experts_pb2.OUTCOME_OK, rows=2, queue_ms=0.5)
    return codec.encode(header, RowBuffer.within(memoryview(bytes(2 * ROW_BYTES)), ROW_BYTES))


def parse_frame(data: bytes) -> None:
    """Parses a call as an expert replica does."""
    header, payload = codec.decode(experts_pb2.ForwardRequest, data)
    call = parse_call(header, payload, shape=fake_shape(hidden=HIDDEN), dtype="float32")
    assert len(call.row_of) == len(call.experts)
    assert len(call.payload) == header.rows


def parse_reply(data: bytes) -> None:
    """Parses a reply as a router does."""
    codec.decode(experts_pb2.ForwardResponse, data)


def parse_set(data: bytes) -> None:
    """Parses a set of experts; what is parsed survives a round trip."""
    held = ExpertSet.parse(data.decode(errors="replace")[:24])
    assert ExpertSet.parse(str(held)) == held


def parse_demand(data: bytes) -> None:
    """Decodes a router's counters of which one field is damaged."""
    name, _, value = data.partition(b"\0")
    entries.demand_from_fields({**entries.demand_to_fields(DEMAND), name.decode(errors="replace"): value})


PARSERS: dict[str, tuple[Callable[[bytes], object], list[bytes], tuple[type[Exception], ...]]] = {
    "call": (parse_frame, [call_frame()], (InvalidRequest,)),
    "reply": (parse_reply, [reply_frame()], (InvalidRequest,)),
    "set of experts": (parse_set, [b"0-2:0-5", b"0:1,5;3:2"], (ValueError,)),
    "replica": (
        entries.replica_from_json,
        [entries.replica_to_json(fake_replica("experts-0#1", Role.EXPERT, 1, held=HELD)).encode()],
        (ValueError,),
    ),
    "placement": (
        entries.placement_from_json,
        [entries.placement_to_json(Placement(3, {"experts-0": HELD})).encode()],
        (ValueError,),
    ),
    "load": (entries.load_from_json, [entries.load_to_json(ReplicaLoad(0.5, 1.0, 2.0, 3.0)).encode()], (ValueError,)),
    "decision": (entries.decision_from_json, [json.dumps({"deployment": "a", "to": 2}).encode()], (ValueError,)),
    "demand": (
        parse_demand,
        [b"%s\0%s" % (name.encode(), value) for name, value in entries.demand_to_fields(DEMAND).items()],
        (ValueError,),
    ),
    "system": (lambda data: SystemId.parse(data.decode(errors="replace")), [str(SYSTEM).encode()], (ValueError,)),
}


@pytest.mark.parametrize("times", TIMES)
def test_parsers_raise_nothing_but_their_errors(times: int) -> None:
    """Damaged frames, sets, entries and identities give a value or the documented error; the count is printed."""
    tried = refused = 0
    for name, (parse, valid, errors) in PARSERS.items():
        random = Random(name)
        for example in valid:
            parse(example)
        for _ in range(400 * times):
            data = damaged(random, random.choice(valid))
            tried += 1
            try:
                parse(data)
            except errors:
                refused += 1
            except Exception as error:
                error.add_note(f"{name}: {data!r}")
                raise
    print(f"fuzzed {len(PARSERS)} parsers with {tried} inputs: {refused} were refused, {tried - refused} accepted")
    assert 0 < refused < tried
