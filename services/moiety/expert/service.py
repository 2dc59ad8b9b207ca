"""The RPC handlers: DescribeReplica, and the Forward stream that feeds the runtime and returns its results."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import grpc
import torch

from moiety.core.experts import ModelShape
from moiety.core.replica import WIRE_VERSION
from moiety.core.system import SystemId
from moiety.errors import DeadlineExceeded, InvalidRequest, MoietyError, NotHeld, ResourceExhausted, WrongSystem
from moiety.expert.batcher import Computed, QueuedCall
from moiety.expert.call_stream import CallStream
from moiety.expert.runtime import Runtime
from moiety.internal.v1 import experts_pb2
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import Tracer
from moiety.wire import codec
from moiety.wire.frames import ForwardCall, ReplyCallback, parse_call
from moiety.wire.rows import SelectedRows
from moiety.wire.service_names import EXPERT_SERVICE

_log = logging.getLogger(__name__)
_OUTCOMES: tuple[tuple[type[MoietyError], experts_pb2.Outcome], ...] = (
    (NotHeld, experts_pb2.OUTCOME_NOT_HELD),
    (WrongSystem, experts_pb2.OUTCOME_WRONG_SYSTEM),
    (InvalidRequest, experts_pb2.OUTCOME_INVALID),
    (ResourceExhausted, experts_pb2.OUTCOME_OVERLOADED),
    (DeadlineExceeded, experts_pb2.OUTCOME_EXPIRED),
)


class ExpertService:
    """moiety.internal.v1.ExpertService: accepts calls from every transport. gRPC passes frames as raw bytes."""

    def __init__(
        self, runtime: Runtime, shape: ModelShape, model: str, system: SystemId, dtype: torch.dtype, tracer: Tracer
    ):
        self._runtime, self._shape, self._model, self._system, self._tracer = runtime, shape, model, system, tracer
        self.dtype = codec.DTYPE_NAMES[dtype]
        self.row_bytes = shape.mlp.hidden * dtype.itemsize
        self.open_streams = 0
        self.shared_memory = ""  # name of the socket for routers on this node, see DescribeReplicaResponse

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns the handler to add to a server under the name EXPERT_SERVICE."""
        describe = grpc.unary_unary_rpc_method_handler(
            self._describe,
            request_deserializer=experts_pb2.DescribeReplicaRequest.FromString,
            response_serializer=experts_pb2.DescribeReplicaResponse.SerializeToString,
        )
        forward = grpc.stream_stream_rpc_method_handler(self._forward)  # no serialisers: raw frames
        return grpc.method_handlers_generic_handler(EXPERT_SERVICE, {"DescribeReplica": describe, "Forward": forward})

    async def _describe(
        self, _request: experts_pb2.DescribeReplicaRequest, _context: grpc.aio.ServicerContext
    ) -> experts_pb2.DescribeReplicaResponse:
        holding = self._runtime.holding
        return experts_pb2.DescribeReplicaResponse(
            model=self._model,
            system=str(self._system),
            dtype=self.dtype,
            hidden=self._shape.mlp.hidden,
            wire_version=WIRE_VERSION,
            held=str(holding.held),
            leaving=str(holding.leaving),
            placement_epoch=holding.epoch,
            shared_memory=self.shared_memory,
        )

    async def _forward(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serves one router's calls until the router closes its half and every call is answered."""
        self.open_streams += 1
        try:
            await CallStream(self._accept_frame).serve(frames, context)
        finally:
            self.open_streams -= 1

    def _accept_frame(self, frame: bytes, stream: CallStream) -> None:
        """Passes one frame to the runtime; every path sends one reply."""
        try:
            header, payload = codec.decode(experts_pb2.ForwardRequest, frame)
        except InvalidRequest as error:
            refusal = experts_pb2.ForwardResponse(outcome=experts_pb2.OUTCOME_INVALID, detail=str(error))
            stream.begin(len(frame))(codec.encode(refusal))
            return
        reply = stream.begin(len(frame) + len(header.experts) // 4 * self.row_bytes)
        self.accept(
            header,
            payload,
            lambda header, picked: reply(codec.encode(header, None if picked is None else picked.gathered())),
        )

    def accept(self, header: experts_pb2.ForwardRequest, payload: memoryview, answer: ReplyCallback) -> None:
        """Passes one call to the runtime; every path calls `answer` exactly once. `payload` is readable until that call."""
        try:
            if header.system_key != self._system.key:
                raise WrongSystem(f"the call is for system {header.system_key or '(none)'}, not for {self._system}")
            call = parse_call(header, payload, shape=self._shape, dtype=self.dtype)

            def done(result: Computed | BaseException) -> None:
                answer(*self._reply(call, result))
                self._trace(waiting, result)

            waiting = QueuedCall(call, done)
            self._runtime.submit(waiting)
        except MoietyError as error:
            answer(*self._reply(header, error))
        except Exception:  # a bug: without an answer, the router would wait until the call's time is over
            _log.exception("a call for layer %d could not be accepted", header.layer)
            answer(*self._reply(header, MoietyError("the replica failed to accept the call; its log says why")))

    def _reply(
        self, to: experts_pb2.ForwardRequest | ForwardCall, result: Computed | BaseException
    ) -> tuple[experts_pb2.ForwardResponse, SelectedRows | None]:
        if isinstance(result, BaseException):
            reply = experts_pb2.ForwardResponse(
                outcome=next((o for kind, o in _OUTCOMES if isinstance(result, kind)), experts_pb2.OUTCOME_FAILED),
                detail=str(result),
            )
        else:
            reply = experts_pb2.ForwardResponse(
                outcome=experts_pb2.OUTCOME_OK,
                rows=len(result.picked.order),
                activated_experts=result.activated_experts,
                batch_rows=result.batch_rows,
                queue_ms=result.queue_ms,
                compute_ms=result.compute_ms,
            )
        reply.call_id, reply.attempt = to.call_id, to.attempt
        return reply, None if isinstance(result, BaseException) else result.picked

    def _trace(self, waiting: QueuedCall, result: Computed | BaseException) -> None:
        """Records the spans of a call that has ended: `expert`, and within it `expert.queue` and `expert.kernel`.

        Does nothing if the router's hop span is not sampled.
        """
        call = waiting.call
        if not call.traceparent:
            return
        attributes = {Attribute.LAYER: call.layer, Attribute.ROWS: len(call.experts), Attribute.ATTEMPT: call.attempt}
        expert = self._tracer.start(
            SpanName.EXPERT, parent=call.traceparent, attributes=attributes, start_ns=waiting.since_ns
        )
        if isinstance(result, BaseException):
            expert.error(result)
            expert.end()
            return
        expert.set(Attribute.EXPERTS_ACTIVATED, result.activated_experts)
        expert.set(Attribute.BATCH_ROWS, result.batch_rows)
        self._tracer.start(SpanName.EXPERT_QUEUE, parent=expert, start_ns=waiting.since_ns).end(result.started_ns)
        self._tracer.start(SpanName.EXPERT_KERNEL, parent=expert, start_ns=result.started_ns).end(result.ended_ns)
        expert.end(result.ended_ns)
