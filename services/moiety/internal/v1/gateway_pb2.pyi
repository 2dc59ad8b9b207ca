from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeGatewayRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeGatewayResponse(_message.Message):
    __slots__ = ("model", "system")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    model: str
    system: str
    def __init__(self, model: _Optional[str] = ..., system: _Optional[str] = ...) -> None: ...
