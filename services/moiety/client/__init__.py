"""The Python clients: `from moiety.client import Client, SyncClient`."""

from moiety.client.chunk import Chunk, ModelInfo
from moiety.client.client import Client
from moiety.client.sync_client import SyncClient

__all__ = ["Chunk", "Client", "ModelInfo", "SyncClient"]
