"""The public gRPC API: checks requests, tokenises, streams text, and ends requests that their clients leave or do not read."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing

import grpc

from moiety.core.system import SystemId
from moiety.errors import InvalidRequest, NotFound, ResourceExhausted
from moiety.gateway.admission import Admission, host_of
from moiety.gateway.choices import ResponseBuilder
from moiety.gateway.encoder import PromptEncoder
from moiety.gateway.router_pool import RouterPool
from moiety.gateway.text import Tokenizer
from moiety.internal.v1 import engine_pb2, gateway_pb2
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import Tracer
from moiety.v1 import generation_pb2
from moiety.wire import finish_reason, status
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_server import end_unread
from moiety.wire.sampling_params import check_labels, check_prompt, check_sampling, write_defaults
from moiety.wire.service_names import GATEWAY_SERVICE, GENERATION_SERVICE
from moiety.wire.trace_context import traceparent_in

UNREAD_S = 20.0  # a client that has not read for so long loses its request

_SAMPLING: Mapping[Attribute, str] = {
    Attribute.MAX_TOKENS: "max_tokens",
    Attribute.TEMPERATURE: "temperature",
    Attribute.TOP_P: "top_p",
    Attribute.TOP_K: "top_k",
}


class Unread(ResourceExhausted):
    """The client does not read what was generated for it."""


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
        self._encoder = PromptEncoder(tokenizer)
        self._writing: dict[asyncio.Timeout, float] = {}  # since when a response waits for its client
        self._next_look: asyncio.TimerHandle | None = None
        self.running = 0  # requests in progress
        self.begun = 0  # requests since the start

    def close(self) -> None:
        """Drops the prompts that wait to be tokenised."""
        self._encoder.close()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
        """Returns the handlers to add to a server under the names GENERATION_SERVICE and GATEWAY_SERVICE."""
        generation = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self._generate,
                request_deserializer=generation_pb2.GenerateRequest.FromString,
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
        served = (await self._routers.pick(Deadline.after(context.time_remaining()))).description
        model = generation_pb2.Model(name=self._model, revision=self._system.revision, max_context=served.max_context)
        return generation_pb2.ListModelsResponse(models=[model])

    async def _generate(self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        span = self._tracer.start(
            SpanName.GENERATE,
            parent=traceparent_in(context),
            attributes={Attribute.OPERATION: "text_completion", Attribute.REQUEST_MODEL: self._model},
        )
        self.running += 1
        self.begun += 1
        held = ExitStack()
        try:
            check_labels(request)
            self._routers.check_room()
            host = host_of(context.peer())
            held.enter_context(self._admission.place(request.tenant, host))
            deadline = Deadline.after(context.time_remaining())
            request.request_id = request.request_id or secrets.token_hex(8)
            span.set(Attribute.REQUEST_ID, request.request_id)
            engine_request, continues = await self._admit(request, deadline)
            engine_request.host = host
            span.set(Attribute.INPUT_TOKENS, len(engine_request.prompt_ids))
            for key, field in _SAMPLING.items():
                span.set(key, getattr(engine_request.sampling, field))
            answer = ResponseBuilder(engine_request, self._tokenizer, tuple(request.sampling.stop), continues)
            events = self._routers.generate(engine_request, deadline, span.traceparent, answer.ended)
            await self._answer(events, answer, context)
            span.set(Attribute.OUTPUT_TOKENS, answer.produced)
            span.set(
                Attribute.FINISH_REASONS, [str(finish_reason.FROM_WIRE[reason]) for reason in answer.finish_reasons]
            )
        except Unread as error:
            span.error(error)
            held.close()
            await end_unread(context, error)
        except grpc.aio.BaseError:  # the client has gone
            raise
        except Exception as error:
            seen = status.ours(error, request.request_id)
            span.error(seen)
            await status.abort(context, seen)
        finally:
            held.close()
            self.running -= 1
            span.end()

    async def _answer(
        self,
        events: AsyncGenerator[engine_pb2.EngineEvent, None],
        answer: ResponseBuilder,
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Sends the responses to `events`. Raises Unread if the client does not read them."""
        sent_headers, loop = False, asyncio.get_running_loop()
        async with aclosing(events):  # leaving it cancels the request at its router
            try:
                async with asyncio.timeout(None) as patience:
                    async for event in events:
                        if (response := answer.push(event)) is not None:
                            if not sent_headers:  # an RPC without them cannot be ended while a message waits
                                await context.send_initial_metadata(())
                                sent_headers = True
                            self._writing[patience] = loop.time()
                            if self._next_look is None:
                                self._next_look = loop.call_later(UNREAD_S / 4, self._end_patience)
                            await context.write(response)
                            del self._writing[patience]
                        if answer.complete:
                            break
            except TimeoutError:
                if not patience.expired():
                    raise
                raise Unread(f"the client has not read for {UNREAD_S:g} s", UNREAD_S) from None
            finally:
                # Before `events` is closed, which takes time: a timeout that has ended cannot be rescheduled.
                self._writing.pop(patience, None)

    def _end_patience(self) -> None:
        """Ends the requests whose clients have not read for UNREAD_S. One timer for all: one for each token costs 5 µs."""
        loop = asyncio.get_running_loop()
        now, self._next_look = loop.time(), None
        for patience, since in self._writing.items():
            if since <= now - UNREAD_S:
                patience.reschedule(now)
        if self._writing:
            self._next_look = loop.call_later(UNREAD_S / 4, self._end_patience)

    async def _admit(
        self, request: generation_pb2.GenerateRequest, deadline: Deadline
    ) -> tuple[engine_pb2.EngineRequest, list[int]]:
        """Checks a client's request. Returns it as token ids, and the ids whose text the output continues.

        Raises the error that the client receives.
        """
        if request.model and request.model != self._model:
            raise NotFound(f"model {request.model!r} is not served here; this is {self._model!r}")
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt", None, "text or token_ids")
        served = (await self._routers.pick(deadline)).description
        if kind == "text":
            ids = await self._encoder.encode(request.text, served.max_context)
            check_prompt(ids, served.vocabulary, served.max_context)
        else:
            check_prompt(request.token_ids.ids, served.vocabulary, served.max_context)
            ids = list(request.token_ids.ids)
        if request.sampling.HasField("first_token"):
            request.sampling.first_token_id = self._tokenizer.token_id(request.sampling.first_token)
        continues = [] if served.encoder_decoder else ids
        in_context = len(continues) or 1  # an encoder-decoder's output begins with its start token
        sampling = check_sampling(request.sampling, in_context, served.vocabulary, served.max_context)
        engine_request = engine_pb2.EngineRequest(
            request_id=request.request_id,
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
