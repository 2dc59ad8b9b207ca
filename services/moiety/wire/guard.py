"""What every RPC of every server gets: a request that arrives in time, or its end; and errors that quote nothing internal."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from moiety.core.visible import visible
from moiety.errors import DeadlineExceeded, InvalidRequest, ResourceExhausted
from moiety.wire import status

REQUEST_S = 10.0  # a client sends its request with the headers; this is for slow networks
MOST_EMPTY = 256  # RPCs whose request has not arrived
MOST_SIDE = 64  # streams of health and reflection, which stay open as long as their client likes


class Guard(grpc.aio.ServerInterceptor):
    """Wraps the handler of each method.

    A handler may raise any error of errors.py: the client gets it with its status code. Another exception becomes INTERNAL
    without its text. An RPC whose single request has not arrived within REQUEST_S ends, and the oldest such RPC ends when
    there are more than MOST_EMPTY: each takes 17 KB, and a client can open any number. For that, the guard reads the request
    itself, as if the method took a stream of requests.
    """

    def __init__(self) -> None:
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._empty: dict[asyncio.Timeout, None] = {}  # oldest first
        self._side = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Returns the wrapped handler of the method, or None for an unknown method."""
        method = handler_call_details.method
        if (wrapped := self._wrapped.get(method)) is None:
            handler: Any = await continuation(handler_call_details)
            if handler is None:
                return handler
            # A single health check ends by itself, and is always answered: probes depend on it.
            side = method.startswith("/grpc.") and handler.response_streaming
            wrapped = self._wrapped[method] = self._wrap(handler, side)
        return wrapped

    def _wrap(self, handler: Any, side: bool) -> grpc.RpcMethodHandler:
        behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        behaviour = next(filter(None, behaviours))
        generates = inspect.isasyncgenfunction(behaviour)

        async def call(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            if side and self._side >= MOST_SIDE:
                why = f"{MOST_SIDE} streams of health and reflection are open, the most allowed"
                await status.abort(context, ResourceExhausted(why, 1.0))
            self._side += side
            try:
                request = requests if handler.request_streaming else await self._first(requests)
                if not generates:
                    return await behaviour(request, context)
                async for response in behaviour(request, context):
                    await context.write(response)
            except grpc.aio.AbortError:
                raise
            except grpc.aio.BaseError:  # the client has gone: gRPC would log a traceback
                raise asyncio.CancelledError from None
            except Exception as error:
                await status.abort(context, visible(error))
            finally:
                self._side -= side

        streams = grpc.stream_stream_rpc_method_handler
        made: grpc.RpcMethodHandler = (streams if handler.response_streaming else grpc.stream_unary_rpc_method_handler)(
            call, handler.request_deserializer, handler.response_serializer
        )
        return made

    async def _first(self, requests: AsyncIterator[Any]) -> Any:
        """Returns the only request of an RPC."""
        try:
            async with asyncio.timeout(REQUEST_S) as wait:
                self._empty[wait] = None
                if len(self._empty) > MOST_EMPTY:
                    oldest = next(iter(self._empty))
                    oldest.reschedule(0.0)  # its time is over
                    del self._empty[oldest]
                return await anext(requests)
        except TimeoutError:
            bound = f"for {REQUEST_S:g} s, or {MOST_EMPTY} newer RPCs have none either"
            raise DeadlineExceeded(f"no request has followed the headers {bound}") from None
        except StopAsyncIteration:
            raise InvalidRequest("request", "none", "one message") from None
        except DecodeError as error:
            raise InvalidRequest("request", "unreadable bytes", f"a message with valid UTF-8 text: {error}") from None
        finally:
            self._empty.pop(wait, None)
