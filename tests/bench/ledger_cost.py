"""Measures what the load ledger costs a router: counting rows in each layer, and one flush a second to a real Redis.

    python tests/bench/ledger_cost.py

Prints the CPU time of both, and their share of one core at the step times in `MODELS`: the ledger may take 1 %.
A router flushes on its asyncio thread and counts on its engine's thread; here one core is charged for both.
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
from moiety.testing import SYSTEM

# Name, MoE layers, experts, top-k, streams, milliseconds of a decode step: the first two from `moiety bench split`, the
# third for GPUs.
MODELS = (
    ("90 M, 1 stream", 8, 16, 4, 1, 28.0),
    ("0.91 B, 8 streams", 16, 32, 4, 8, 136.0),
    ("DeepSeek-V3's size, 64 streams", 58, 256, 8, 64, 60.0),
)
REPEATS = 2000
FLUSHES = 50


def counting_us(layers: int, experts: int, rows: int) -> float:
    """Returns the CPU microseconds of counting one layer's rows and passing its two replies to the cost model."""
    demand, costs = ExpertDemandCounter(layers, experts), CostFit(1 << 20)
    chosen = np.random.default_rng(0).integers(0, experts, (64, rows))
    reply = ForwardResponse(activated_experts=4, batch_rows=rows, compute_ms=1.0)
    began = time.thread_time()
    for repeat in range(REPEATS):
        demand.count(repeat % layers, chosen[repeat % 64])
        costs.record("", reply, 1.0)
        costs.record("", reply, 1.0)
    return 1e6 * (time.thread_time() - began) / REPEATS


async def flush_ms(url: str, layers: int, experts: int) -> float:
    """Returns the CPU milliseconds of one flush, including the fit of one second's samples."""
    registry, demand = connect(url, SYSTEM), ExpertDemandCounter(layers, experts)
    costs = CostFit(1 << 20, count(step=SAMPLE_S).__next__)  # with this clock every reply is sampled
    replies = [
        ForwardResponse(activated_experts=1 + n % 9, batch_rows=4 + n % 31, compute_ms=1 + n % 5) for n in range(100)
    ]
    for layer in range(layers):
        demand.count(layer, np.arange(experts))
    spent = 0.0
    try:
        for flush in range(FLUSHES + 1):
            for reply in replies:
                costs.record("", reply, 1.0)
            began = time.process_time()
            await registry.publish_load("router", demand=demand.reading(time.time(), costs.reading()))
            spent += (time.process_time() - began) * (flush > 0)  # the first flush also connects
    finally:
        await registry.close()
    return 1e3 * spent / FLUSHES


def main() -> None:
    """Prints one line per model."""
    with EmbeddedRedis() as redis:
        for name, layers, experts, top_k, streams, step_ms in MODELS:
            counting = counting_us(layers, experts, streams * top_k)
            flush = asyncio.run(flush_ms(redis.url, layers, experts))
            share = layers * counting / 1e3 / step_ms + flush / 1e3
            parts = f"{counting:.1f} µs a layer, {flush:.2f} ms a flush"
            print(f"{name} ({layers} x {experts} top-{top_k}): {parts}: {share:.2%} of a core at {step_ms:g} ms a step")


if __name__ == "__main__":
    main()
