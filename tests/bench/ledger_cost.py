"""What the load ledger costs a router: counting in each layer, and a flush to a real Redis once a second.

    python tests/bench/ledger_cost.py

Prints the CPU time of both, and their share of a step's time at the step times given below: the ledger may take 1 %.
Flushes run on the router's asyncio thread, counting on the engine's; both are charged to one core here.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count

import numpy as np

from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.router.hop.cost_fit import SAMPLE_S, CostFit
from moiety.router.hop.expert_demand import ExpertDemandCounter

# name, MoE layers, experts, top-k, streams, milliseconds of a decode step (README: moiety bench split; a V3 on GPUs)
MODELS = (
    ("90 M, 1 stream", 8, 16, 4, 1, 28.0),
    ("0.91 B, 8 streams", 16, 32, 4, 8, 136.0),
    ("DeepSeek-V3's size, 64 streams", 58, 256, 8, 64, 60.0),
)
REPEATS = 2000
FLUSHES = 50


def counting_us(layers: int, experts: int, rows: int) -> float:
    """Microseconds of one layer's count, and of what its replies teach the cost model."""
    demand, costs = ExpertDemandCounter(layers, experts), CostFit(1 << 20)
    chosen = np.random.default_rng(0).integers(0, experts, (64, rows))
    reply = ForwardResponse(activated_experts=4, batch_rows=rows, compute_ms=1.0)
    began = time.thread_time()
    for repeat in range(REPEATS):
        demand.count(repeat % layers, chosen[repeat % 64])
        costs.answered(reply)
        costs.answered(reply)
    return 1e6 * (time.thread_time() - began) / REPEATS


async def flush_ms(url: str, layers: int, experts: int) -> float:
    """Milliseconds of CPU of one flush, with the fit of a second's samples."""
    registry, demand = connect(url, "bench"), ExpertDemandCounter(layers, experts)
    costs = CostFit(1 << 20, count(step=SAMPLE_S).__next__)  # by this clock, every reply is a sample
    replies = [
        ForwardResponse(activated_experts=1 + n % 9, batch_rows=4 + n % 31, compute_ms=1 + n % 5) for n in range(100)
    ]
    for layer in range(layers):
        demand.count(layer, np.arange(experts))
    spent = 0.0
    try:
        for flush in range(FLUSHES + 1):
            for reply in replies:
                costs.answered(reply)
            began = time.process_time()
            await registry.publish_load("router", demand=demand.reading(time.time(), costs.reading()))
            spent += (time.process_time() - began) * (flush > 0)  # the first connects
    finally:
        await registry.close()
    return 1e3 * spent / FLUSHES


def main() -> None:
    """One line per model."""
    with EmbeddedRedis() as redis:
        for name, layers, experts, top_k, streams, step_ms in MODELS:
            counting = counting_us(layers, experts, streams * top_k)
            flush = asyncio.run(flush_ms(redis.url, layers, experts))
            share = layers * counting / 1e3 / step_ms + flush / 1e3
            told = f"{counting:.1f} µs a layer, {flush:.2f} ms a flush"
            print(f"{name} ({layers} x {experts} top-{top_k}): {told}: {share:.2%} of a core at {step_ms:g} ms a step")


if __name__ == "__main__":
    main()
