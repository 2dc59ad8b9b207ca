"""The Python clients: `from moiety.client import Client, SyncClient`."""

from moiety.client.chunk import Chunk, ModelInfo
from moiety.client.client import Client
from moiety.client.completion import Choice, Completion, completion_of
from moiety.client.message import is_messages
from moiety.client.options import GenerateOptions, Messages, Prompt
from moiety.client.sync_client import SyncClient

__all__ = [
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "GenerateOptions",
    "Messages",
    "ModelInfo",
    "Prompt",
    "SyncClient",
    "completion_of",
    "is_messages",
]
