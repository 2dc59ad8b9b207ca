from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CallClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CALL_CLASS_UNSPECIFIED: _ClassVar[CallClass]
    CALL_CLASS_DECODE: _ClassVar[CallClass]
    CALL_CLASS_PREFILL: _ClassVar[CallClass]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_OK: _ClassVar[Outcome]
    OUTCOME_NOT_HELD: _ClassVar[Outcome]
    OUTCOME_WRONG_SYSTEM: _ClassVar[Outcome]
    OUTCOME_INVALID: _ClassVar[Outcome]
    OUTCOME_OVERLOADED: _ClassVar[Outcome]
    OUTCOME_EXPIRED: _ClassVar[Outcome]
    OUTCOME_FAILED: _ClassVar[Outcome]
    OUTCOME_CANCELLED: _ClassVar[Outcome]
CALL_CLASS_UNSPECIFIED: CallClass
CALL_CLASS_DECODE: CallClass
CALL_CLASS_PREFILL: CallClass
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_OK: Outcome
OUTCOME_NOT_HELD: Outcome
OUTCOME_WRONG_SYSTEM: Outcome
OUTCOME_INVALID: Outcome
OUTCOME_OVERLOADED: Outcome
OUTCOME_EXPIRED: Outcome
OUTCOME_FAILED: Outcome
OUTCOME_CANCELLED: Outcome

class DescribeReplicaRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReplicaResponse(_message.Message):
    __slots__ = ("model", "system", "dtype", "hidden", "wire_version", "held", "placement_epoch", "shared_memory", "leaving", "kind")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    model: str
    system: str
    dtype: str
    hidden: int
    wire_version: int
    held: str
    placement_epoch: int
    shared_memory: str
    leaving: str
    kind: str
    def __init__(self, model: _Optional[str] = ..., system: _Optional[str] = ..., dtype: _Optional[str] = ..., hidden: _Optional[int] = ..., wire_version: _Optional[int] = ..., held: _Optional[str] = ..., placement_epoch: _Optional[int] = ..., shared_memory: _Optional[str] = ..., leaving: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class SharedMemoryHello(_message.Message):
    __slots__ = ("wire_version", "system", "dtype")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    system: str
    dtype: str
    def __init__(self, wire_version: _Optional[int] = ..., system: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class SharedMemoryWelcome(_message.Message):
    __slots__ = ("accepted", "refusal")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    refusal: str
    def __init__(self, accepted: _Optional[bool] = ..., refusal: _Optional[str] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("payload_bytes", "call_id", "attempt", "system_key", "layer", "rows", "k_offsets", "experts", "dtype", "call_class", "deadline_ms", "traceparent", "payload", "sent_ns", "cancel")
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_KEY_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    K_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CALL_CLASS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    payload_bytes: int
    call_id: int
    attempt: int
    system_key: str
    layer: int
    rows: int
    k_offsets: bytes
    experts: bytes
    dtype: str
    call_class: CallClass
    deadline_ms: int
    traceparent: str
    payload: bytes
    sent_ns: int
    cancel: bool
    def __init__(self, payload_bytes: _Optional[int] = ..., call_id: _Optional[int] = ..., attempt: _Optional[int] = ..., system_key: _Optional[str] = ..., layer: _Optional[int] = ..., rows: _Optional[int] = ..., k_offsets: _Optional[bytes] = ..., experts: _Optional[bytes] = ..., dtype: _Optional[str] = ..., call_class: _Optional[_Union[CallClass, str]] = ..., deadline_ms: _Optional[int] = ..., traceparent: _Optional[str] = ..., payload: _Optional[bytes] = ..., sent_ns: _Optional[int] = ..., cancel: _Optional[bool] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("payload_bytes", "call_id", "attempt", "outcome", "detail", "rows", "activated_experts", "batch_rows", "queue_ms", "compute_ms", "payload")
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload_bytes: int
    call_id: int
    attempt: int
    outcome: Outcome
    detail: str
    rows: int
    activated_experts: int
    batch_rows: int
    queue_ms: float
    compute_ms: float
    payload: bytes
    def __init__(self, payload_bytes: _Optional[int] = ..., call_id: _Optional[int] = ..., attempt: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., detail: _Optional[str] = ..., rows: _Optional[int] = ..., activated_experts: _Optional[int] = ..., batch_rows: _Optional[int] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., payload: _Optional[bytes] = ...) -> None: ...
