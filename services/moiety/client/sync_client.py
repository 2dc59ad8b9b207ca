"""The synchronous Python client of moiety.v1.GenerationService, for programs without an event loop."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Self

import grpc

from moiety.client.chunk import Chunk, ModelInfo, chunk_of, models_of
from moiety.client.failure import failure
from moiety.client.request import GenerationClient
from moiety.client.retry import iterate_with_retries
from moiety.errors import MoietyError
from moiety.v1 import generation_pb2


class SyncClient(GenerationClient[Generator[Chunk, None, None]]):
    """Streams generations from a gateway. A context manager; one channel, any number of streams, from any thread.

    Each stream belongs to the thread that reads it. Another thread can end them all by `close`.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Requests that are open, in any thread, end with Cancelled."""
        self._channel.close()

    def models(self, timeout_s: float = 10.0) -> tuple[ModelInfo, ...]:
        """Returns the models that the gateway serves. Raises Unavailable while no router is ready."""
        try:
            return models_of(self._stub.ListModels(generation_pb2.ListModelsRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise failure(error, self.address, "ListModels", timeout_s) from None

    def _open(self, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=options)

    def _stream(
        self, request: generation_pb2.GenerateRequest, timeout_s: float | None, retries: int
    ) -> Generator[Chunk, None, None]:
        with self._traced() as metadata:

            def call(left_s: float | None) -> grpc.Call:
                return self._stub.Generate(request, timeout=left_s, metadata=metadata)

            def failure_of(error: grpc.RpcError, tokens: int) -> MoietyError:
                return failure(error, self.address, "Generate", timeout_s, tokens)

            with closing(iterate_with_retries(call, retries, timeout_s, failure_of)) as responses:
                for response in responses:
                    yield chunk_of(response)
