from moiety.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateTokensRequest(_message.Message):
    __slots__ = ("call_id", "request", "timeout_ms", "traceparent")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    request: EngineRequest
    timeout_ms: int
    traceparent: str
    def __init__(self, call_id: _Optional[int] = ..., request: _Optional[_Union[EngineRequest, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class GenerateTokensResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[EngineEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[EngineEvent, _Mapping]]] = ...) -> None: ...

class DescribeEngineRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeEngineResponse(_message.Message):
    __slots__ = ("model", "system", "max_context", "vocabulary", "running", "waiting", "slots", "block_tokens", "blocks", "encoder_decoder", "queue_limit", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_DECODER_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: str
    system: str
    max_context: int
    vocabulary: int
    running: int
    waiting: int
    slots: int
    block_tokens: int
    blocks: int
    encoder_decoder: bool
    queue_limit: int
    state: str
    def __init__(self, model: _Optional[str] = ..., system: _Optional[str] = ..., max_context: _Optional[int] = ..., vocabulary: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., slots: _Optional[int] = ..., block_tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., encoder_decoder: _Optional[bool] = ..., queue_limit: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class EngineRequest(_message.Message):
    __slots__ = ("request_id", "system_key", "prompt_ids", "generated_ids", "sampling", "stop_ids", "priority", "tenant", "choice", "host")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_KEY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    system_key: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    generated_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _generation_pb2.SamplingParams
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    tenant: str
    choice: int
    host: str
    def __init__(self, request_id: _Optional[str] = ..., system_key: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., generated_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., stop_ids: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., choice: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class EngineEvent(_message.Message):
    __slots__ = ("token_ids", "finish_reason", "logprobs", "choice", "top_logprobs", "prompt_logprobs", "cached_tokens", "routed_rows", "rerouted_rows", "call_id", "error", "prompt_top_logprobs", "queued_us")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    REROUTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: _generation_pb2.FinishReason
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    choice: int
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TopLogprobs]
    prompt_logprobs: _containers.RepeatedScalarFieldContainer[float]
    cached_tokens: int
    routed_rows: int
    rerouted_rows: int
    call_id: int
    error: EngineError
    prompt_top_logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TopLogprobs]
    queued_us: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., logprobs: _Optional[_Iterable[float]] = ..., choice: _Optional[int] = ..., top_logprobs: _Optional[_Iterable[_Union[_generation_pb2.TopLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[float]] = ..., cached_tokens: _Optional[int] = ..., routed_rows: _Optional[int] = ..., rerouted_rows: _Optional[int] = ..., call_id: _Optional[int] = ..., error: _Optional[_Union[EngineError, _Mapping]] = ..., prompt_top_logprobs: _Optional[_Iterable[_Union[_generation_pb2.TopLogprobs, _Mapping]]] = ..., queued_us: _Optional[int] = ...) -> None: ...

class EngineError(_message.Message):
    __slots__ = ("code", "detail", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    detail: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., detail: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...
