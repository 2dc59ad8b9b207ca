"""Encodes and decodes registry values: JSON, readable in `redis-cli`, and raw little-endian integers for counters.

Readers skip fields they do not know, so that an older service can read the entry of a newer service. A wrong field, or a
required field that is missing, raises a ValueError that names it. The store is trusted: entries may have any size.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt

from moiety.core.experts import ExpertSet
from moiety.core.load import BatchCost, ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica, ReplicaState, Role

# Of a replica's entry, those that the first version did not have.
TIMES = ("launched", "loaded", "started", "served")
ADDED_FIELDS = ("leaving", "placement_epoch", *TIMES, "pid", "kind", "scaling", "http_address", "version", "problem")
DEMAND_FIELDS = ("layers", "experts", "time", "started", "rows", "activations", "costs")

T = TypeVar("T")
_log = logging.getLogger(__name__)
_REQUIRED = object()


def replica_to_json(replica: Replica) -> str:
    """Returns `replica` as one line of JSON; expert sets are in the text form of `ExpertSet`."""
    values = {name: getattr(replica, name) for name in _converters(Replica)}
    texts = {"held": str(replica.held), "leaving": str(replica.leaving), "scaling": dict(replica.scaling)}
    return json.dumps(values | texts)


def replica_from_json(text: str | bytes) -> Replica:
    """Decodes what `replica_to_json` returns; fields that were added since the first version may be missing."""
    return _value(Replica, _mapping(_decoded(text), "entry"), optional=ADDED_FIELDS)


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
    return _value(ReplicaLoad, _mapping(_decoded(text), "entry"))


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
    if demand.costs:
        fields["costs"] = json.dumps([asdict(costs) for costs in demand.costs]).encode()
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
        costs=_field(fields, "costs", _costs, ()),
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


def _value(kind: Callable[..., T], data: Mapping[str, Any], optional: Collection[str] = ()) -> T:
    """Returns the dataclass `kind`, made from the fields in `data`. A field in `optional` has its default if it is missing."""
    return kind(
        **{
            name: _field(data, name, convert)
            for name, convert in _converters(kind).items()
            if name not in optional or data.get(name) is not None
        }
    )


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


def _costs(raw: bytes) -> tuple[BatchCost, ...]:
    values = _decoded(raw)
    if not isinstance(values, list):
        raise ValueError("must be a JSON list")
    return tuple(_value(BatchCost, _mapping(value, "costs"), optional=("kind",)) for value in values)


def _experts(value: object) -> ExpertSet:
    return ExpertSet.parse(_text(value))


# How the fields of a decoded value are read, by their annotation.
_CONVERTERS: Mapping[Any, Callable[[Any], Any]] = {
    str: _text,
    int: _integer,
    float: _number,
    Role: Role,
    ReplicaState: ReplicaState,
    ExpertSet: _experts,
    Mapping[str, float]: _numbers,
}


@cache
def _converters(kind: Callable[..., object]) -> Mapping[str, Callable[[Any], Any]]:
    return {name: _CONVERTERS[annotation] for name, annotation in get_type_hints(kind).items()}
