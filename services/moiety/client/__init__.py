"""The Python client: `from moiety.client import Client`."""

from moiety.client.client import Chunk, Client, ModelInfo

__all__ = ["Chunk", "Client", "ModelInfo"]
