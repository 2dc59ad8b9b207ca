"""moiety.internal.v1.EngineService: takes and returns token ids. This is the engine's asyncio side; it does not compute."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

import grpc

from moiety.core.replica import ReplicaState
from moiety.core.sampling import TopLogprobs
from moiety.core.system import SystemId
from moiety.errors import InvalidRequest, MoietyError, Unavailable
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.model.trunk.encoder_decoder import DecoderStart
from moiety.router.engine import Engine
from moiety.router.sequence.guides import Guides
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import Tracer
from moiety.v1 import generation_pb2
from moiety.wire import finish_reason
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_server import CallServer, SendEvent
from moiety.wire.sampling_params import check_labels, check_prompt, check_resolved, options_of

_MOST_UINT32 = (1 << 32) - 1


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """Serves the RPCs of one engine: DescribeEngine and GenerateTokens."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        system: SystemId,
        *,
        vocabulary: int,
        max_context: int,
        slots: int,
        guides: Guides,
        tracer: Tracer,
        state: Callable[[], ReplicaState],
        start: DecoderStart | None = None,
    ):
        """`state` returns the router's own state, as in its registry entry.

        `start`: the tokens at the start of an encoder-decoder's output; None for a decoder-only model.
        """
        self._state = state
        self._start = start
        self._guides = guides
        self._engine, self._model, self._system, self._tracer = engine, model, system, tracer
        self._vocabulary, self._max_context, self._slots = vocabulary, max_context, slots
        self._streams: set[CallServer] = set()  # one for each gateway
        self._arrivals = itertools.count()

    async def DescribeEngine(
        self, _request: engine_pb2.DescribeEngineRequest, _context: grpc.aio.ServicerContext
    ) -> engine_pb2.DescribeEngineResponse:
        load = self._engine.load
        return engine_pb2.DescribeEngineResponse(
            model=self._model,
            system=str(self._system),
            max_context=self._max_context,
            vocabulary=self._vocabulary,
            running=load.running,
            waiting=load.waiting,
            slots=self._slots,
            queue_limit=self._engine.queue_limit,
            block_tokens=self._engine.block_tokens,
            blocks=self._engine.blocks,
            encoder_decoder=self._start is not None,
            state=self._state(),
        )

    async def GenerateTokens(
        self,
        calls: AsyncIterator[engine_pb2.GenerateTokensRequest],
        context: grpc.aio.ServicerContext[engine_pb2.GenerateTokensRequest, engine_pb2.GenerateTokensResponse],
    ) -> None:
        stream = CallServer(self._answer)
        self._streams.add(stream)
        try:
            await stream.serve(calls, context)
        finally:
            self._streams.discard(stream)

    @property
    def idle(self) -> bool:
        """Whether no request is open and every event was sent."""
        return all(stream.idle for stream in self._streams)

    async def _answer(self, call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        """Serves one request until all its choices have ended."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        error: MoietyError | None = None
        unfinished = max(call.request.sampling.n, 1)

        def emit(emitted: Emitted) -> None:  # on the engine's thread
            nonlocal error, unfinished
            error = error or emitted.error
            unfinished -= emitted.finish is not None
            if error is None:
                send_event(partial(_event, emitted))
            if error is not None or not unfinished:
                loop.call_soon_threadsafe(ended.set)

        sequence = await self._sequence(call, emit)
        try:
            self._engine.submit(sequence)
        except Exception as refusal:
            sequence.span.error(refusal)
            sequence.span.end()
            raise
        try:
            await ended.wait()
        finally:
            self._engine.cancel(sequence)  # no effect once it has ended; frees its slots if the client has left
        if error is not None:
            raise error

    async def _sequence(self, call: engine_pb2.GenerateTokensRequest, emit: Callable[[Emitted], None]) -> Sequence:
        request = call.request
        if request.system_key != self._system.key:  # the gateway meant another router, which had this address before
            raise Unavailable(f"the request is for system {request.system_key or '(none)'}, not for {self._system}")
        check_labels(request)
        check_prompt(request.prompt_ids, self._vocabulary, self._max_context)  # before it is copied
        prompt = list(request.prompt_ids)
        # An encoder-decoder's prompt goes to the encoder; its decoder begins with its start token.
        decoder_prompt = prompt if self._start is None else [self._start.token]
        sampling = options_of(request.sampling).resolved(len(decoder_prompt), self._vocabulary, self._max_context)
        check_resolved(request, sampling.max_tokens)
        generated = list(request.generated_ids)
        check_prompt(decoder_prompt + generated, self._vocabulary, self._max_context)
        if self._start is not None:
            if sampling.prompt_logprobs:
                raise InvalidRequest(
                    "sampling.prompt_logprobs", True, "false: an encoder gives no probabilities for prompt tokens"
                )
            if sampling.first_token_id is None:
                sampling = replace(sampling, first_token_id=self._start.first_token)
        if generated and sampling.n > 1:
            raise InvalidRequest("sampling.n", sampling.n, "1 with generated_ids, which belong to one choice")
        guide = await self._guides.compile(sampling.guide, decoder_prompt) if sampling.guide else None
        eos = {*request.stop_ids, *(self._guides.eos_ids if guide else ())}
        span = self._tracer.start(
            SpanName.ENGINE_REQUEST,
            parent=call.traceparent,
            attributes={Attribute.REQUEST_ID: request.request_id, Attribute.INPUT_TOKENS: len(prompt)},
        )
        return Sequence(
            request_id=f"{request.request_id}/{next(self._arrivals)}",  # several calls may have the same request_id
            tokens=decoder_prompt + generated,
            prompt_tokens=len(decoder_prompt),
            encoder_ids=() if self._start is None else tuple(prompt),
            sampling=sampling,
            stop_ids=sampling.ends(eos),
            emit=emit,
            deadline=Deadline.after(call.timeout_ms / 1000 if call.timeout_ms else None),
            span=span,
            choice=request.choice,
            priority=request.priority,
            tenant=request.tenant,
            host=request.host,
            guide=guide,
        )


def _event(emitted: Emitted) -> engine_pb2.EngineEvent:
    return engine_pb2.EngineEvent(
        token_ids=emitted.token_ids,
        finish_reason=finish_reason.TO_WIRE[emitted.finish],
        logprobs=emitted.logprobs,
        choice=emitted.choice,
        top_logprobs=map(_top_logprobs, emitted.top_logprobs),
        prompt_logprobs=emitted.prompt_logprobs,
        prompt_top_logprobs=map(_top_logprobs, emitted.prompt_top_logprobs),
        cached_tokens=emitted.cached_tokens,
        queued_us=min(emitted.queued_us, _MOST_UINT32),
        routed_rows=emitted.routed_rows,
        rerouted_rows=emitted.rerouted_rows,
    )


def _top_logprobs(top: TopLogprobs) -> generation_pb2.TopLogprobs:
    return generation_pb2.TopLogprobs(token_ids=top.token_ids, logprobs=top.logprobs)
