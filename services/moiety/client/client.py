"""The asynchronous Python client of moiety.v1.GenerationService."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Self

import grpc

from moiety.client.chunk import Chunk, ModelInfo, chunk_of, models_of
from moiety.client.failure import failure
from moiety.client.request import GenerationClient
from moiety.client.retry import stream_with_retries
from moiety.errors import MoietyError
from moiety.v1 import generation_pb2


class Client(GenerationClient[AsyncGenerator[Chunk, None]]):
    """Streams generations from a gateway. An async context manager; one channel, any number of streams."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def models(self, timeout_s: float = 10.0) -> tuple[ModelInfo, ...]:
        """Returns the models that the gateway serves. Raises Unavailable while no router is ready."""
        try:
            return models_of(await self._stub.ListModels(generation_pb2.ListModelsRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise failure(error, self.address, "ListModels", timeout_s) from None

    def _open(self, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, options=options)

    async def _stream(
        self, request: generation_pb2.GenerateRequest, timeout_s: float | None, retries: int
    ) -> AsyncGenerator[Chunk, None]:
        with self._traced() as metadata:

            def call(left_s: float | None) -> grpc.aio.UnaryStreamCall:
                return self._stub.Generate(request, timeout=left_s, metadata=metadata)

            def failure_of(error: grpc.RpcError, tokens: int) -> MoietyError:
                return failure(error, self.address, "Generate", timeout_s, tokens)

            async with aclosing(stream_with_retries(call, retries, timeout_s, failure_of)) as responses:
                async for response in responses:
                    yield chunk_of(response)
