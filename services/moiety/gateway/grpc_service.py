"""The public gRPC API, moiety.v1.GenerationService: messages to the core's values and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from moiety.core.sampling import TopLogprobs
from moiety.errors import InvalidRequest
from moiety.gateway.admission import host_of
from moiety.gateway.core import GenerationCore
from moiety.gateway.request import Conversation, Delta, GenerationRequest, new_request_id
from moiety.gateway.unread import Readers, Unread
from moiety.internal.v1 import gateway_pb2
from moiety.model.checkpoint.generation_defaults import GenerationDefaults
from moiety.v1 import generation_pb2
from moiety.wire import finish_reason
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_server import end_unread
from moiety.wire.sampling_params import options_of
from moiety.wire.service_names import GATEWAY_SERVICE, GENERATION_SERVICE
from moiety.wire.trace_context import traceparent_in


class GenerationService:
    """Serves GENERATION_SERVICE, and GATEWAY_SERVICE for other gateways."""

    def __init__(self, core: GenerationCore):
        self._core, self._readers = core, Readers()

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
        served = self._core.model
        return gateway_pb2.DescribeGatewayResponse(model=served.name, system=str(served.system))

    async def _list_models(
        self, _request: generation_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ListModelsResponse:
        models = await self._core.models(Deadline.after(context.time_remaining()))
        return generation_pb2.ListModelsResponse(
            models=[
                generation_pb2.Model(name=model.name, revision=model.revision, max_context=model.max_context)
                for model in models
            ]
        )

    async def _generate(self, message: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        began = False

        async def write(delta: Delta) -> None:
            nonlocal began
            response = _response(delta)
            if not began:
                began = True
                response.request_id = message.request_id
                await context.send_initial_metadata(())  # an RPC without it cannot be ended while a message waits
            await context.write(response)

        try:
            message.request_id = message.request_id or new_request_id()
            request = _request(message, context, self._core.model.defaults)
            deltas = self._core.generate(request, Deadline.after(context.time_remaining()))
            await self._readers.send(deltas, write)
        except Unread as error:
            await end_unread(context, error)


def _request(
    message: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext, defaults: GenerationDefaults
) -> GenerationRequest:
    sampling = options_of(message.sampling)
    return GenerationRequest(
        prompt=_prompt(message),
        sampling=defaults.filled_in(sampling) if message.sampling.recommended else sampling,
        model=message.model,
        request_id=message.request_id,
        priority=message.priority,
        tenant=message.tenant,
        host=host_of(context.peer()),
        traceparent=traceparent_in(context),
    )


def _prompt(message: generation_pb2.GenerateRequest) -> str | Sequence[int] | Conversation:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return message.token_ids.ids
        case "chat":
            messages = [{"role": each.role, "content": each.content} for each in message.chat.messages]
            return Conversation(messages, arguments=_template_arguments(message.chat.template_arguments))
    raise InvalidRequest("prompt", None, "text, token_ids or chat")


def _template_arguments(text: str) -> Mapping[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest("chat.template_arguments", text, "a JSON object")
    return arguments


def _response(delta: Delta) -> generation_pb2.GenerateResponse:
    response = generation_pb2.GenerateResponse(text=delta.text, token_ids=delta.token_ids, choice=delta.choice)
    if delta.logprobs:
        response.logprobs.extend(delta.logprobs)
        response.top_logprobs.extend(map(_top_logprobs, delta.top_logprobs))
    if delta.prompt_logprobs:
        response.prompt_logprobs.extend(delta.prompt_logprobs)
        response.prompt_top_logprobs.extend(map(_top_logprobs, delta.prompt_top_logprobs))
    if delta.finish is None:
        return response
    response.finish_reason = finish_reason.TO_WIRE[delta.finish]
    if isinstance(delta.matched_stop, str):
        response.stop = delta.matched_stop
    elif delta.matched_stop is not None:
        response.stop_token_id = delta.matched_stop
    if (usage := delta.usage) is not None:
        response.usage.prompt_tokens = usage.prompt_tokens
        response.usage.completion_tokens = usage.completion_tokens
        response.usage.cached_tokens = usage.cached_tokens
        response.usage.rerouted = usage.rerouted
    if (timings := delta.timings) is not None:
        response.timings.queued = timings.queued_s
        response.timings.prefill = timings.prefill_s
        response.timings.decode = timings.decode_s
    return response


def _top_logprobs(top: TopLogprobs) -> generation_pb2.TopLogprobs:
    return generation_pb2.TopLogprobs(token_ids=top.token_ids, logprobs=top.logprobs)
