"""The public gRPC API: checks requests, tokenises, streams text, and cancels requests that their clients abandon."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, aclosing

import grpc
from google.protobuf.message import DecodeError

from moiety.core.system import SystemId
from moiety.errors import InvalidRequest, MoietyError, NotFound
from moiety.gateway.admission import Admission, check_priority_and_tenant
from moiety.gateway.choices import ResponseBuilder
from moiety.gateway.router_pool import RouterPool
from moiety.gateway.text import Tokenizer
from moiety.internal.v1 import engine_pb2, gateway_pb2
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import Tracer
from moiety.v1 import generation_pb2
from moiety.wire import finish_reason, status
from moiety.wire.deadline import Deadline
from moiety.wire.sampling_params import check_prompt, check_sampling, write_defaults
from moiety.wire.service_names import GATEWAY_SERVICE, GENERATION_SERVICE
from moiety.wire.trace_context import traceparent_in

MAX_REQUEST_ID = 128
LONG_PROMPT = 1 << 13  # characters: some 5 ms of tokenising


_SAMPLING: Mapping[Attribute, str] = {
    Attribute.MAX_TOKENS: "max_tokens",
    Attribute.TEMPERATURE: "temperature",
    Attribute.TOP_P: "top_p",
    Attribute.TOP_K: "top_k",
}


class GenerationService:
    """Serves the public API, moiety.v1.GenerationService, for one model."""

    def __init__(
        self,
        routers: RouterPool,
        tokenizer: Tokenizer,
        model: str,
        system: SystemId,
        max_concurrent: int,
        tracer: Tracer,
    ):
        self._routers, self._tokenizer, self._model, self._tracer = routers, tokenizer, model, tracer
        self._system = system
        self._admission = Admission(max_concurrent, routers.retry_after_s)
        self.running = 0  # requests in progress
        self.begun = 0  # requests since the start

    def handlers(self) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
        """Returns the handlers to add to a server under the names GENERATION_SERVICE and GATEWAY_SERVICE."""
        generation = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate,
                request_deserializer=_parse,
                response_serializer=generation_pb2.GenerateResponse.SerializeToString,
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self._list_models,
                request_deserializer=generation_pb2.ListModelsRequest.FromString,
                response_serializer=generation_pb2.ListModelsResponse.SerializeToString,
            ),
        }
        gateway = {
            "DescribeGateway": grpc.unary_unary_rpc_method_handler(
                self._describe,
                request_deserializer=gateway_pb2.DescribeGatewayRequest.FromString,
                response_serializer=gateway_pb2.DescribeGatewayResponse.SerializeToString,
            )
        }
        return (
            grpc.method_handlers_generic_handler(GENERATION_SERVICE, generation),
            grpc.method_handlers_generic_handler(GATEWAY_SERVICE, gateway),
        )

    async def _describe(
        self, _request: gateway_pb2.DescribeGatewayRequest, _context: grpc.aio.ServicerContext
    ) -> gateway_pb2.DescribeGatewayResponse:
        return gateway_pb2.DescribeGatewayResponse(model=self._model, system=str(self._system))

    async def _list_models(
        self, _request: generation_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ListModelsResponse:
        try:
            router = await self._routers.pick(Deadline.after(context.time_remaining()))
        except MoietyError as error:
            await status.abort(context, error)
        served = router.description
        model = generation_pb2.Model(name=self._model, revision=self._system.revision, max_context=served.max_context)
        return generation_pb2.ListModelsResponse(models=[model])

    async def _generate(
        self, request: generation_pb2.GenerateRequest | InvalidRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        span = self._tracer.start(
            SpanName.GENERATE,
            parent=traceparent_in(context),
            attributes={Attribute.OPERATION: "text_completion", Attribute.REQUEST_MODEL: self._model},
        )
        self.running += 1
        self.begun += 1
        held = ExitStack()
        try:
            if isinstance(request, InvalidRequest):
                raise request
            check_priority_and_tenant(request)
            self._routers.check_room()
            held.enter_context(self._admission.place(request.tenant))
            deadline = Deadline.after(context.time_remaining())
            engine_request, continues = await self._admit(request, deadline)
            span.set(Attribute.REQUEST_ID, engine_request.request_id)
            span.set(Attribute.INPUT_TOKENS, len(engine_request.prompt_ids))
            for key, field in _SAMPLING.items():
                span.set(key, getattr(engine_request.sampling, field))
            answer = ResponseBuilder(engine_request, self._tokenizer, tuple(request.sampling.stop), continues)
            events = self._routers.generate(engine_request, deadline, span.traceparent, answer.ended)
            async with aclosing(events):  # leaving it cancels the request at its router
                async for event in events:
                    if (response := answer.push(event)) is not None:
                        yield response
                    if answer.complete:
                        break
            span.set(Attribute.OUTPUT_TOKENS, answer.produced)
            span.set(
                Attribute.FINISH_REASONS, [str(finish_reason.FROM_WIRE[reason]) for reason in answer.finish_reasons]
            )
        except MoietyError as error:
            span.error(error)
            await status.abort(context, error)
        finally:
            held.close()
            self.running -= 1
            span.end()

    async def _admit(
        self, request: generation_pb2.GenerateRequest, deadline: Deadline
    ) -> tuple[engine_pb2.EngineRequest, list[int]]:
        """Checks a client's request. Returns it as token ids, and the ids whose text the output continues.

        Raises the error that the client receives.
        """
        if request.model and request.model != self._model:
            raise NotFound(f"model {request.model!r} is not served here; this is {self._model!r}")
        if len(request.request_id) > MAX_REQUEST_ID:
            raise InvalidRequest("request_id", request.request_id, f"at most {MAX_REQUEST_ID} characters")
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt", None, "text or token_ids")
        ids = await self._encode(request.text) if kind == "text" else list(request.token_ids.ids)
        router = await self._routers.pick(deadline)
        served = router.description
        check_prompt(ids, served.vocabulary, served.max_context)
        if request.sampling.HasField("first_token"):
            request.sampling.first_token_id = self._tokenizer.token_id(request.sampling.first_token)
        continues = [] if served.encoder_decoder else ids
        in_context = len(continues) or 1  # an encoder-decoder's output begins with its start token
        sampling = check_sampling(request.sampling, in_context, served.vocabulary, served.max_context)
        engine_request = engine_pb2.EngineRequest(
            request_id=request.request_id or secrets.token_hex(8),
            system_key=self._system.key,
            prompt_ids=ids,
            sampling=request.sampling,
            stop_ids=self._tokenizer.stop_ids,
            priority=request.priority,
            tenant=request.tenant,
        )
        write_defaults(engine_request.sampling, sampling)
        engine_request.sampling.ClearField("stop")  # the gateway matches stop strings: the engine has no text
        return engine_request, continues

    async def _encode(self, text: str) -> list[int]:
        """Returns the token ids of a prompt. A long prompt is tokenised on another thread.

        On the event loop, a long prompt would hold up all streams and the gateway's heartbeat.
        """
        if len(text) <= LONG_PROMPT:
            return self._tokenizer.encode(text)
        return await asyncio.to_thread(self._tokenizer.encode, text)


def _parse(data: bytes) -> generation_pb2.GenerateRequest | InvalidRequest:
    """Parses a request. For unreadable bytes it returns an InvalidRequest, which the handler raises.

    gRPC would report an exception raised here as INTERNAL.
    """
    try:
        return generation_pb2.GenerateRequest.FromString(data)
    except DecodeError as error:
        return InvalidRequest("request", f"{len(data)} bytes", f"a GenerateRequest with valid UTF-8 text: {error}")
