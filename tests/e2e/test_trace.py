"""One request gives one trace, from the client through gateway, router and hops to the experts' kernels."""

from __future__ import annotations

from moiety.client import Client
from moiety.telemetry import configure
from moiety.tools.trace.spans import ReceivedSpan
from moiety.tools.trace.tree import coverage
from moiety.tools.trace.waterfall import waterfall
from support.serving import Served

NEW_TOKENS = 6
CHAIN = {  # span name -> name of its parent, from the kernel up
    "expert.kernel": "expert",
    "expert.queue": "expert",
    "expert": "hop",
    "hop": "layer",
    "attention": "layer",
    "layer": "step",
    "sample": "step",
    "step": "engine.request",
    "queue": "engine.request",
    "engine.request": "generate",
    "generate": "client.generate",
}


def test_a_trace_leads_from_the_client_into_every_kernel(served: Served) -> None:
    """The spans of the client and of four processes form one tree without orphans, with one step per new token."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        tracer = configure("test-client", endpoint=served.receiver.endpoint)
        traced = Client(client.address, tracer)
        async with traced:
            async for _ in traced.generate([5, 6, 7], max_tokens=NEW_TOKENS, ignore_eos=True):
                pass
        tracer.shutdown()

    served.receiver.clear()
    served.run(scenario)
    layers, steps = served.cluster.shape.moe_layers, NEW_TOKENS

    def complete(spans: list[ReceivedSpan]) -> bool:
        return {"client.generate", "generate", "engine.request"} <= {span.name for span in spans} and (
            sum(span.name == "expert" for span in spans) == sum(span.name == "hop" for span in spans) >= steps * layers
        )

    served.receiver.wait_for(complete)
    spans = served.receiver.spans()
    by_id = {span.span_id: span for span in spans}
    trace_ids = {span.trace_id for span in spans}
    assert len(trace_ids) == 1
    for span in spans:
        if span.name == "client.generate":
            assert not span.parent_id
        else:
            assert by_id[span.parent_id].name == CHAIN[span.name], span.name
    assert sum(span.name == "step" for span in spans) == steps
    assert sum(span.name == "layer" for span in spans) == steps * layers
    services = {span.service for span in spans}
    assert services == {"test-client", "moiety-gateway", "moiety-router", "moiety-experts-0", "moiety-experts-1"}
    explained = coverage(spans, trace_ids.pop())
    print(waterfall(spans, spans[0].trace_id))
    print(f"explained by layers and sampling: {explained:.1%} of the steps' time")
    assert explained > 0.9
