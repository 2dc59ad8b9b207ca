"""Fake routers: an EngineService whose tokens are a function of the prompt, with limited places and a prefix cache."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

import grpc

from moiety.core.experts import ModelShape
from moiety.core.replica import ReplicaState, Role
from moiety.core.system import SystemId
from moiety.errors import ResourceExhausted, Unavailable
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.registry.memory import MemoryRegistry
from moiety.testing.common import HOST, MODEL, SYSTEM, fake_replica, fake_token, no_wait
from moiety.v1 import generation_pb2
from moiety.wire.event_stream.call_server import CallServer, SendEvent
from moiety.wire.server import Server
from moiety.wire.service_names import ENGINE_SERVICE


class FakeEngine(engine_pb2_grpc.EngineServiceServicer):
    """A fake router: the token at each position is a function of prompt, seed, choice and position, as in a real engine.

    `before_token(position)` is awaited before each token; the first generated token has position 0. The hook may wait,
    or raise a MoietyError, which the caller receives. At most `places` requests run; further ones are refused. The router
    reports `slots` and a `queue` limit but does not enforce them. It caches up to `blocks` blocks of `block_tokens` tokens
    and evicts the least recently used.
    """

    def __init__(
        self,
        replica_id: str,
        shape: ModelShape,
        *,
        system: SystemId = SYSTEM,
        places: int = 1 << 20,
        slots: int = 0,
        queue: int = 0,
        blocks: int = 0,
        block_tokens: int = 4,
        encoder_decoder: bool = False,
    ):
        self.id = replica_id
        self.requests: list[engine_pb2.EngineRequest] = []  # accepted, in order of arrival
        self.refused = 0  # requests beyond `places`
        self.cancelled = 0  # requests whose client went away
        self.before_token: Callable[[int], Awaitable[None]] = no_wait
        self.script: Sequence[int] = ()  # where there are any, every choice generates these tokens and ends by itself
        self.places = places
        self.system = system  # as it describes itself; a test may change it
        self.state = ReplicaState.READY  # as it reports it on its link; a test may change it
        self.before_describe: Callable[[int], Awaitable[None]] = no_wait  # awaited, with 0, before each DescribeEngine
        self._shape, self._slots, self._queue = shape, slots, queue
        self._blocks, self._block_tokens = blocks, block_tokens
        self._encoder_decoder = encoder_decoder
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._running = 0
        self._streams: set[asyncio.Event] = set()  # one for each gateway; setting it breaks the stream
        self._server: Server | None = None

    async def start(self, registry: MemoryRegistry) -> None:
        """Serves on a free port and registers."""
        server = self._server = Server([], [ENGINE_SERVICE])
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, server.grpc)
        port = await server.start(HOST, 0)
        await registry.register(fake_replica(self.id, Role.ROUTER, port, system=self.system))

    async def vanish(self) -> None:
        """Breaks every stream immediately, without a grace period; the registry still lists the router."""
        if self._server is not None:
            await self._server.stop(0)

    def break_streams(self) -> None:
        """Breaks every stream; the router lives and answers on new ones."""
        for broken in self._streams:
            broken.set()

    def empty_cache(self) -> None:
        """Evicts every block from the prefix cache."""
        self._cached.clear()

    async def DescribeEngine(
        self, _request: engine_pb2.DescribeEngineRequest, _context: grpc.aio.ServicerContext
    ) -> engine_pb2.DescribeEngineResponse:
        await self.before_describe(0)
        return engine_pb2.DescribeEngineResponse(
            model=MODEL,
            system=str(self.system),
            max_context=self._shape.max_context,
            vocabulary=self._shape.vocabulary,
            running=self._running,
            slots=self._slots,
            queue_limit=self._queue,
            blocks=self._blocks,
            block_tokens=self._block_tokens if self._blocks else 0,
            encoder_decoder=self._encoder_decoder,
            state=self.state,
        )

    async def GenerateTokens(
        self,
        calls: AsyncIterator[engine_pb2.GenerateTokensRequest],
        context: grpc.aio.ServicerContext[engine_pb2.GenerateTokensRequest, engine_pb2.GenerateTokensResponse],
    ) -> None:
        self._streams.add(broken := asyncio.Event())
        serving = asyncio.create_task(CallServer(self._answer).serve(calls, context))
        breaking = asyncio.create_task(broken.wait())
        try:
            await asyncio.wait((serving, breaking), return_when=asyncio.FIRST_COMPLETED)
            if broken.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream was broken by the test")
        finally:
            self._streams.discard(broken)
            serving.cancel()
            breaking.cancel()

    async def _answer(self, call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        request = call.request
        if request.system_key != self.system.key:
            raise Unavailable(f"this router is of {self.system}")
        if self._running >= self.places:
            self.refused += 1
            raise ResourceExhausted(f"{self._running} of at most {self.places} requests run", 0.25)
        self.requests.append(request)
        self._running += 1
        sampling, cached = request.sampling, self._look_up(request)
        choices = range(request.choice, request.choice + (sampling.n or 1))
        try:
            most = min(sampling.max_tokens, len(self.script) or sampling.max_tokens)
            for position in range(len(request.generated_ids), most):
                await self.before_token(position)
                for choice in choices:
                    send_event(partial(self._event, request, choice, position, cached))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._running -= 1

    def _event(
        self, request: engine_pb2.EngineRequest, choice: int, position: int, cached: int
    ) -> engine_pb2.EngineEvent:
        vocabulary, first = self._shape.vocabulary, position == len(request.generated_ids)
        made = fake_token(request.prompt_ids, request.sampling.seed, position, vocabulary, choice)
        event = engine_pb2.EngineEvent(
            token_ids=[self.script[position] if self.script else made],
            choice=choice,
            cached_tokens=cached if first else 0,
        )
        top = generation_pb2.TopLogprobs(token_ids=range(request.sampling.top_logprobs))
        top.logprobs.extend([-1.0] * request.sampling.top_logprobs)
        if request.sampling.logprobs:
            event.logprobs.append(-float(position))
            event.top_logprobs.extend([top] if top.token_ids else [])
        if request.sampling.prompt_logprobs and first and choice == request.choice:
            event.prompt_logprobs.extend([-1.0] * (len(request.prompt_ids) - 1))
            event.prompt_top_logprobs.extend([top] * (len(request.prompt_ids) - 1) if top.token_ids else [])
        if position + 1 == len(self.script):
            event.finish_reason = generation_pb2.FINISH_REASON_STOP
        elif position + 1 == request.sampling.max_tokens:
            event.finish_reason = generation_pb2.FINISH_REASON_LENGTH
        return event

    def _look_up(self, request: engine_pb2.EngineRequest) -> int:
        """Returns how many of the request's tokens the prefix cache has, then caches all whole blocks of the request."""
        ids = [*request.prompt_ids, *request.generated_ids]
        blocks, block = list[int](), hash(request.tenant)
        for end in range(self._block_tokens, len(ids), self._block_tokens) if self._blocks else ():
            block = hash((block, *ids[end - self._block_tokens : end]))
            blocks.append(block)
        found = next((i for i, block in enumerate(blocks) if block not in self._cached), len(blocks))
        for block in reversed(blocks):
            self._cached[block] = None
            self._cached.move_to_end(block)
        while len(self._cached) > self._blocks:
            self._cached.popitem(last=False)
        return found * self._block_tokens
