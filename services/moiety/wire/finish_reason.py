"""Maps FinishReason, why a generation ended, to its protobuf enum and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moiety.core.sampling import FinishReason
from moiety.v1 import generation_pb2

TO_WIRE: Mapping[FinishReason | None, generation_pb2.FinishReason] = MappingProxyType(
    {
        None: generation_pb2.FINISH_REASON_UNSPECIFIED,
        FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
        FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    }
)
FROM_WIRE: Mapping[int, FinishReason | None] = MappingProxyType({wire: reason for reason, wire in TO_WIRE.items()})
