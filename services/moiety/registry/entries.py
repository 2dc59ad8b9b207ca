"""Encodes and decodes registry values: JSON, readable in `redis-cli`, and raw little-endian integers for counters.

Readers skip fields they do not know, so that an older service can read the entry of a newer service. A wrong field, or a
required field that is missing, raises a ValueError that names it. The store is trusted: entries may have any size.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moiety.core.experts import ExpertSet
from moiety.core.load import BatchCost, ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica, ReplicaState, Role

DEMAND_FIELDS = ("layers", "experts", "time", "started", "rows", "activations", "costs")

T = TypeVar("T")
_log = logging.getLogger(__name__)
_REQUIRED = object()


def replica_to_json(replica: Replica) -> str:
    """Returns `replica` as one line of JSON; expert sets are in the text form of `ExpertSet`."""
    return json.dumps(
        {
            "id": replica.id,
            "role": replica.role,
            "deployment": replica.deployment,
            "address": replica.address,
            "node": replica.node,
            "model": replica.model,
            "revision": replica.revision,
            "state": replica.state,
            "held": str(replica.held),
            "leaving": str(replica.leaving),
            "placement_epoch": replica.placement_epoch,
            "wire_version": replica.wire_version,
            "launched": replica.launched,
            "loaded": replica.loaded,
            "started": replica.started,
            "served": replica.served,
            "pid": replica.pid,
            "scaling": dict(replica.scaling),
        }
    )


def replica_from_json(text: str | bytes) -> Replica:
    """Decodes what `replica_to_json` returns; fields that were added since the first version have defaults."""
    data = _mapping(_decoded(text), "entry")
    return Replica(
        id=_field(data, "id", _text),
        role=_field(data, "role", Role),
        deployment=_field(data, "deployment", _text),
        address=_field(data, "address", _text),
        node=_field(data, "node", _text),
        model=_field(data, "model", _text),
        revision=_field(data, "revision", _text),
        state=_field(data, "state", ReplicaState),
        held=_field(data, "held", _experts),
        leaving=_field(data, "leaving", _experts, ExpertSet()),
        placement_epoch=_field(data, "placement_epoch", _integer, 0),
        wire_version=_field(data, "wire_version", _integer),
        launched=_field(data, "launched", _number, 0.0),
        loaded=_field(data, "loaded", _number, 0.0),
        started=_field(data, "started", _number, 0.0),
        served=_field(data, "served", _number, 0.0),
        pid=_field(data, "pid", _integer, 0),
        scaling=_field(data, "scaling", _numbers, {}),
    )


def placement_to_json(placement: Placement) -> str:
    """Returns JSON such as `{"epoch": 3, "held": {"experts-0": "0-31:0-7", …}}`."""
    held = {deployment: str(experts) for deployment, experts in sorted(placement.held.items())}
    return json.dumps({"epoch": placement.epoch, "held": held})


def placement_from_json(text: str | bytes) -> Placement:
    """Decodes what `placement_to_json` returns."""
    data = _mapping(_decoded(text), "placement")
    held = _field(data, "held", lambda value: _mapping(value, "held"))
    return Placement(
        epoch=_field(data, "epoch", _integer),
        held={deployment: _field(held, deployment, _experts) for deployment in held},
    )


def load_to_json(busy: ReplicaLoad) -> str:
    """Returns `busy` as a JSON object with the fields of `ReplicaLoad`."""
    return json.dumps(asdict(busy))


def load_from_json(text: str | bytes) -> ReplicaLoad:
    """Decodes what `load_to_json` returns."""
    data = _mapping(_decoded(text), "entry")
    return ReplicaLoad(
        busy=_field(data, "busy", _number),
        queue_wait_ms=_field(data, "queue_wait_ms", _number),
        rows_per_s=_field(data, "rows_per_s", _number),
        calls_per_s=_field(data, "calls_per_s", _number),
    )


def decision_from_json(text: str | bytes) -> dict[str, Any]:
    """Decodes one entry of the log of scaling decisions. An entry may be any JSON object."""
    return _mapping(_decoded(text), "decision")


def demand_to_fields(demand: ExpertDemand) -> dict[str, bytes]:
    """Returns `demand` as the fields of a Redis hash, named as in DEMAND_FIELDS.

    `rows` and `activations` are row-major arrays [moe_layers][experts] of integers. An integer takes 4 bytes if every
    value of the array fits into 4, else 8.
    """
    rows, activations = np.asarray(demand.rows, dtype="<i8"), np.asarray(demand.activations, dtype="<i8")
    if rows.ndim != 2 or rows.shape != activations.shape:
        raise ValueError(
            f"demand: rows {rows.shape} and activations {activations.shape} must have one shape, [layers][experts]"
        )
    fields = {
        "layers": b"%d" % rows.shape[0],
        "experts": b"%d" % rows.shape[1],
        "time": repr(demand.time).encode(),
        "started": repr(demand.started).encode(),
        "rows": _packed(rows),
        "activations": _packed(activations),
    }
    if demand.costs is not None:
        fields["costs"] = json.dumps(asdict(demand.costs)).encode()
    return fields


def demand_from_fields(fields: Mapping[str, bytes | None]) -> ExpertDemand:
    """Decodes what `demand_to_fields` returns; the fields `started` and `costs` may be missing."""
    shape = (_field(fields, "layers", int), _field(fields, "experts", int))

    def table(raw: bytes) -> tuple[tuple[int, ...], ...]:
        width = "<i4" if len(raw) == 4 * shape[0] * shape[1] else "<i8"
        return tuple(map(tuple, np.frombuffer(raw, dtype=width).reshape(shape).tolist()))

    return ExpertDemand(
        rows=_field(fields, "rows", table),
        activations=_field(fields, "activations", table),
        time=_field(fields, "time", _seconds),
        started=_field(fields, "started", _seconds, 0.0),
        costs=_field(fields, "costs", _costs, None),
    )


class TolerantReader:
    """Decodes entries and skips broken ones. Repeated failures of one entry are logged once."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def read(self, name: str, decode: Callable[[Any], T], raw: Any) -> T | None:
        """Returns `decode(raw)`, or None if that raises ValueError. `name` is the entry's name in the logged warning."""
        try:
            value = decode(raw)
        except ValueError as error:
            if name not in self._warned:
                self._warned.add(name)
                _log.warning("registry entry %s is left out: %s", name, error)
            return None
        self._warned.discard(name)
        return value


def _packed(counters: npt.NDArray[np.int64]) -> bytes:
    narrow = counters.astype("<i4")
    return (narrow if np.array_equal(narrow, counters) else counters).tobytes()


def _field(data: Mapping[str, Any], name: str, convert: Callable[[Any], T], default: Any = _REQUIRED) -> T:
    value = data.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"field {name} is missing")
        return default
    try:
        return convert(value)
    except (TypeError, ValueError) as error:
        shown = repr(value)
        raise ValueError(f"field {name} = {shown[:80]}: {error}") from None


def _decoded(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: must be a JSON object, not {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("must be a number")
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return float(value)


def _numbers(value: object) -> dict[str, float]:
    return {name: _number(number) for name, number in _mapping(value, "scaling").items()}


def _seconds(raw: bytes) -> float:
    return _number(float(raw))


def _costs(raw: bytes) -> BatchCost:
    data = _mapping(_decoded(raw), "costs")
    return BatchCost(
        fixed_s=_field(data, "fixed_s", _number),
        s_per_byte=_field(data, "s_per_byte", _number),
        s_per_row=_field(data, "s_per_row", _number),
        expert_bytes=_field(data, "expert_bytes", _integer),
        samples=_field(data, "samples", _integer),
        error=_field(data, "error", _number),
    )


def _experts(value: object) -> ExpertSet:
    return ExpertSet.parse(_text(value))
