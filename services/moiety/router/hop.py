"""One lane's ExpertBackend: a layer's rows go out, one message per replica, and every (token, expert) row comes back.

Exactness: each returned row is written once into its own place [token, k], so arrival order, replica, split, retry and
duplicates cannot change a bit of the sum that the model's seam makes of them.

Two clocks. *Retry*: a call lost with its replica goes to another holder at once; a slow one is hedged, from a budget.
*Coverage*: where no live replica holds an expert, the layer waits (requests keep their slots) until one registers, or
`expert_wait_s` is over: then HopFailed names the tokens that cannot be had.

Legend: T tokens, K experts per token, D hidden size, A = T * K assignments.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from math import inf

import numpy as np
import torch

from moiety.errors import HopFailed, MoietyError, NoHolder, PeerLost, Unavailable
from moiety.policy.dispatch import plan
from moiety.router.call import CALL_TIMEOUT_S, Call, outcome_name, request_for
from moiety.router.context import HopSettings, StepContext
from moiety.router.demand import DemandCounter
from moiety.router.fleet import Fleet
from moiety.router.hedge import Hedging
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import Tracer
from moiety.wire import codec, experts_pb2
from moiety.wire.channels import MAX_MESSAGE_BYTES
from moiety.wire.expert_stream import Reply

POLL_S = 0.05  # how often a parked layer tries again and looks for cancelled requests
MAX_LOSSES = 5  # replicas that may be lost over the same rows: beyond it, the rows are what kills them
MAX_CALL_BYTES = MAX_MESSAGE_BYTES // 2  # of rows, either way; a message beyond the bound would break the stream

_Event = tuple[int, Reply | PeerLost] | None  # (call id, its answer), or None: the table has changed


class Hop:
    """The ExpertBackend of one lane, used by one thread; one layer is in flight at a time."""

    def __init__(self, fleet: Fleet, settings: HopSettings, hedging: Hedging, demand: DemandCounter, tracer: Tracer):
        self.fleet, self.settings, self.hedging, self.demand, self.tracer = fleet, settings, hedging, demand, tracer
        self.layer_began_ns = 0  # Unix time at which the layer before was done, or the step began
        self._step: StepContext | None = None

    def begin_step(self, step: StepContext) -> None:
        """Every layer submitted from now on belongs to `step`."""
        self._step = step
        self.layer_began_ns = time.time_ns()

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingLayer:
        """Sends hidden [T, D] to the experts in top_k_index [T, K] (int64, -1: none)."""
        assert self._step is not None, "submit outside a step"
        return PendingLayer(self, self._step, layer, hidden, top_k_index)

    def while_waiting(self, layer: int) -> None:
        """One lane has nothing to overlap."""


class PendingLayer:
    """One layer of one step on its way: `result()` blocks until every row is in place."""

    def __init__(self, hop: Hop, step: StepContext, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor):
        self._hop, self._step, self._layer = hop, step, layer
        self._tokens, self._top_k = top_k_index.shape
        self._experts = top_k_index.reshape(-1).cpu().numpy()  # [A]
        self._device = hidden.device
        self._rows = codec.rows_of(hidden.contiguous().cpu())  # [T]
        self._output = torch.zeros(len(self._experts), hidden.shape[1], dtype=hidden.dtype)  # [A, D]
        self._places = codec.rows_of(self._output)  # [A]
        self._filled = self._experts < 0
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._refusing: set[str] = set()  # replicas that refused this layer, until the next try
        self._failures: dict[int, MoietyError] = {}  # assignment -> what a replica said of it that waiting cannot mend
        self._losses = np.zeros(len(self._experts), dtype=np.int64)  # [A] replicas lost with each assignment
        self._parked_s = 0.0  # time spent waiting for holders so far
        self._uncovered = np.empty(0, dtype=np.int64)
        began_ns = hop.layer_began_ns
        self._span = hop.tracer.start(
            SpanName.LAYER, parent=step.span, attributes={Attribute.LAYER: layer}, start_ns=began_ns
        )
        hop.tracer.start(SpanName.ATTENTION, parent=self._span, start_ns=began_ns).end()
        wanted = np.flatnonzero(~self._filled)
        hop.demand.count(layer, self._experts[wanted])
        self._dispatch(wanted)

    def result(self) -> torch.Tensor:
        """The expert outputs [T, K, D], unweighted. Raises HopFailed, or what `StepContext.check` raises."""
        try:
            while not self._filled.all():
                if len(self._uncovered):
                    self._wait_for_holders()
                else:
                    self._wait_for_answer()
        except BaseException as error:
            self._span.error(error)
            raise
        finally:
            for call in self._calls.values():
                call.span.end()
            self._span.end()
            self._hop.layer_began_ns = time.time_ns()
        return self._output.view(self._tokens, self._top_k, -1).to(self._device)

    # Sending -----------------------------------------------------------------------------------------------------

    def _dispatch(self, assignments: np.ndarray, attempt: int = 0) -> None:
        """Sends `assignments` to live holders; what nobody holds is left in `_uncovered`."""
        table, suspects = self._hop.fleet.table, frozenset(self._hop.fleet.suspects)
        planned = plan(table, self._layer, self._experts, assignments, self._refusing | suspects)
        self._send_parts(planned.parts, attempt)
        if len(planned.uncovered) and suspects:  # a slow holder is better than none
            planned = plan(table, self._layer, self._experts, planned.uncovered, self._refusing)
            self._send_parts(planned.parts, attempt)
        self._uncovered = np.union1d(self._uncovered, planned.uncovered)

    def _send_parts(self, parts: Mapping[str, np.ndarray], attempt: int, hedge_of: int | None = None) -> None:
        for replica, assignments in parts.items():
            pieces = -(-len(assignments) * self._places.itemsize // MAX_CALL_BYTES)
            for piece in np.array_split(assignments, max(1, pieces)):
                self._send(replica, piece, attempt, hedge_of)

    def _send(self, replica: str, assignments: np.ndarray, attempt: int, hedge_of: int | None) -> None:
        hop, now = self._hop, time.monotonic()
        call_id = hop.fleet.next_call_id()
        span = hop.tracer.start(
            SpanName.HOP,
            parent=self._span,
            attributes={
                Attribute.LAYER: self._layer,
                Attribute.REPLICA: replica,
                Attribute.DEPLOYMENT: hop.fleet.deployment_of(replica),
                Attribute.ROWS: len(assignments),
                Attribute.ATTEMPT: attempt,
                Attribute.HEDGE: hedge_of is not None,
            },
        )
        header, tokens = request_for(assignments, self._experts, self._top_k, self._step.call_class)
        header.call_id, header.attempt, header.layer = call_id, attempt, self._layer
        header.revision, header.dtype = hop.settings.revision, codec.DTYPE_NAMES[hop.settings.dtype]
        header.traceparent = span.traceparent
        hedge_at = inf if hedge_of is not None else now + hop.hedging.after(self._layer, self._step.call_class)
        self._calls[call_id] = Call(replica, assignments, attempt, now, hedge_at, hedge_of, span)
        hop.hedging.sent()
        hop.fleet.send(replica, header, self._rows[tokens], lambda answer: self._events.put((call_id, answer)))

    # Receiving ---------------------------------------------------------------------------------------------------

    def _wait_for_answer(self) -> None:
        """Takes one answer, or hedges the calls that have been slow for too long."""
        due = min(min(call.hedge_at, call.sent + CALL_TIMEOUT_S) for call in self._calls.values())
        try:
            self._take(self._events.get(timeout=max(0.0, due - time.monotonic())))
        except queue.Empty:
            self._hedge(time.monotonic())

    def _take(self, event: _Event) -> None:
        if event is None:
            return  # nothing of ours waits for a holder any more
        call_id, answer = event
        if (call := self._calls.pop(call_id, None)) is None:
            return
        if isinstance(answer, PeerLost):
            call.span.error(answer)
            call.span.end()
            self._lost(call, answer)
        elif answer.header.outcome == experts_pb2.OUTCOME_OK:
            self._place(call_id, call, answer)
        else:
            self._refused(call, answer.header)

    def _place(self, call_id: int, call: Call, reply: Reply) -> None:
        expected = len(call.assignments) * self._places.itemsize
        if len(reply.payload) != expected:
            told = f"sent {len(reply.payload)} bytes for {len(call.assignments)} rows, which are {expected}"
            self._fail(call, MoietyError(f"replica {call.replica} {told}"))
            self._send_again(call, avoid=call.replica)
            return
        rows = codec.rows_in(reply.payload, self._places.itemsize)
        self._hop.hedging.answered(self._layer, self._step.call_class, time.monotonic() - call.sent)
        if call.hedge_of in self._calls:
            self._hop.fleet.suspect(self._calls[call.hedge_of].replica, call.hedge_of)
        call.span.set(Attribute.QUEUE_MS, reply.header.queue_ms)
        call.span.set(Attribute.COMPUTE_MS, reply.header.compute_ms)
        call.span.end()
        new = ~self._filled[call.assignments]
        self._places[call.assignments[new]] = rows[new]
        self._filled[call.assignments] = True
        for other_id in [i for i, other in self._calls.items() if self._filled[other.assignments].all()]:
            # The slower of two calls for the same rows: its answer finds nobody waiting, but tells that it lives.
            self._calls.pop(other_id).span.end()

    def _lost(self, call: Call, loss: PeerLost) -> None:
        self._losses[call.assignments] += 1
        if (losses := int(self._losses[call.assignments].max())) > MAX_LOSSES:
            told = f"layer {self._layer}: {losses} replicas were lost over the same rows, at last: {loss}"
            raise HopFailed(self._tokens_of(call.assignments), Unavailable(told))
        self._send_again(call)

    def _refused(self, call: Call, reply: experts_pb2.ForwardReply) -> None:
        outcome = outcome_name(reply.outcome)
        error = MoietyError(f"replica {call.replica} answered {outcome}: {reply.detail}")
        call.span.set(Attribute.OUTCOME, outcome)
        call.span.error(error)
        call.span.end()
        if reply.outcome in (experts_pb2.OUTCOME_NOT_HELD, experts_pb2.OUTCOME_REVISION_MISMATCH):
            self._hop.fleet.refresh(call.replica)
        elif reply.outcome not in (experts_pb2.OUTCOME_OVERLOADED, experts_pb2.OUTCOME_EXPIRED):
            self._fail(call, error)
        self._send_again(call, avoid=call.replica)

    def _fail(self, call: Call, error: MoietyError) -> None:
        """Remembers that one holder of these rows failed on them: once nobody else is left, no waiting will help."""
        self._failures.update(dict.fromkeys(call.assignments.tolist(), error))

    def _send_again(self, call: Call, avoid: str | None = None) -> None:
        """What `call` was to bring, less what is there or comes with another call, goes to other holders."""
        if avoid is not None:
            self._refusing.add(avoid)
        missing = ~self._filled
        for other in self._calls.values():
            missing[other.assignments] = False
        self._dispatch(call.assignments[missing[call.assignments]], call.attempt + 1)

    # The two clocks ----------------------------------------------------------------------------------------------

    def _hedge(self, now: float) -> None:
        """Sends slow calls to another holder too, as far as the budget goes; gives up on replicas that never answer."""
        for call_id, call in list(self._calls.items()):
            if now >= call.sent + CALL_TIMEOUT_S:
                self._hop.fleet.give_up(call.replica)  # its PeerLost comes as an event
                call.sent = now
            if now < call.hedge_at:
                continue
            table, avoid = self._hop.fleet.table, {call.replica} | self._refusing | self._hop.fleet.suspects
            planned = plan(table, self._layer, self._experts, call.assignments, avoid)
            if len(planned.uncovered):
                call.hedge_at = inf  # nobody else holds it all
            elif not self._hop.hedging.allowed():
                call.hedge_at = now + self._hop.hedging.least_s
            else:
                call.hedge_at = inf
                self._send_parts(planned.parts, call.attempt + 1, hedge_of=call_id)

    def _wait_for_holders(self) -> None:
        """Parks the layer until every expert has a holder again that took its rows."""
        began = time.monotonic()
        park = self._hop.tracer.start(SpanName.PARK, parent=self._span)
        stop_listening = self._hop.fleet.listen(lambda: self._events.put(None))
        self._try_uncovered()  # the table may have changed between planning and listening
        try:
            while len(self._uncovered):
                experts = np.unique(self._experts[self._uncovered]).tolist()
                if failed := [a for a in self._uncovered.tolist() if a in self._failures]:
                    raise HopFailed(self._tokens_of(failed), self._failures[failed[0]])
                waited = self._parked_s + time.monotonic() - began
                if waited >= self._hop.settings.expert_wait_s:
                    raise HopFailed(self._tokens_of(self._uncovered), NoHolder(self._layer, experts, waited))
                self._step.check()
                self._step.waits(self._layer, experts)
                try:
                    event = self._events.get(timeout=POLL_S)
                except queue.Empty:
                    event = None
                    self._hedge(time.monotonic())
                if event is None:
                    self._refusing.clear()
                    self._try_uncovered()
                else:
                    self._take(event)
        finally:
            self._parked_s += time.monotonic() - began
            stop_listening()
            park.end()

    def _try_uncovered(self) -> None:
        waiting, self._uncovered = self._uncovered, np.empty(0, dtype=np.int64)
        self._dispatch(waiting, attempt=1)

    def _tokens_of(self, assignments: np.ndarray | list[int]) -> list[int]:
        """The tokens that these assignments belong to."""
        return np.unique(np.asarray(assignments) // self._top_k).tolist()
