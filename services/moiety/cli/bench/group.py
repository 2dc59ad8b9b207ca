"""`moiety bench`: the table of its commands, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import click

from moiety.cli.lazy import LazyCommand, LazyGroup

COMMANDS: Mapping[str, LazyCommand] = MappingProxyType(
    {
        "control": LazyCommand(
            "moiety.cli.bench.control:control",
            "Measure the control plane of a large system: planning, the dispatch table, the traffic on Redis.",
        ),
        "elastic": LazyCommand(
            "moiety.cli.bench.elastic:elastic",
            "Raise and lower a skewed load on a live Ray system: do the hot group's replicas follow, and does nobody notice?",
        ),
        "experts": LazyCommand(
            "moiety.cli.bench.experts:experts",
            "Measure the experts' kernels: weights streamed and products computed, beside plain torch.",
        ),
        "flood": LazyCommand(
            "moiety.cli.bench.flood:flood",
            "Offer more than can be served: does accepted work keep its pace, and is every refusal told when to come back?",
        ),
        "hop": LazyCommand(
            "moiety.cli.bench.hop:hop",
            "Measure the hop: a call to an expert replica and back, less the experts' own time, by each transport.",
        ),
        "lanes": LazyCommand(
            "moiety.cli.bench.lanes:lanes",
            "Measure lanes: a step's batch in one piece, in two parts that take turns, and in what the router finds faster.",
        ),
        "memory": LazyCommand(
            "moiety.cli.bench.memory:memory",
            "Measure the memory of expert replicas at its peak, from start to first answers, over the weights they hold.",
        ),
        "quantize": LazyCommand(
            "moiety.cli.bench.quantize:quantize",
            "Measure what quantised experts cost a trained model: perplexity and greedy agreement against bfloat16.",
        ),
        "serve": LazyCommand(
            "moiety.cli.bench.serve:serve",
            "Measure serving speed beside what else one could run, in turns, on the same checkpoints and prompts.",
        ),
        "split": LazyCommand(
            "moiety.cli.bench.split:split",
            "Measure what the split costs: one engine, its experts in its own process and in services on this machine.",
        ),
    }
)


@click.group(cls=LazyGroup, lazy=COMMANDS)
def bench() -> None:
    """Measure this machine: hop, split, lanes, experts, serving, flood, elasticity, control plane.

    The benchmarks start what they need as child processes, take turns with a baseline, and leave nothing behind.
    Numbers mean something on a quiet machine only.
    """
