"""`moiety bench`: the group and the table of its commands. Each command has its own file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import click

from moiety.cli.lazy import LazyGroup

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "control": "Measure the control plane of a large system: planning, the dispatch table, the traffic on Redis.",
        "elastic": "Raise and lower a skewed load on a live Ray system, and check that only the hot group's replicas follow.",
        "experts": "Measure the experts' kernels beside plain torch: weight bandwidth and matrix products.",
        "flood": "Offer more requests than can be served, and check tokens/s of accepted ones and retry delays of refusals.",
        "hop": "Measure the hop over each transport: a call to an expert replica and back, less the experts' own time.",
        "lanes": "Measure lanes: a step's batch in one piece, in two parts that take turns, and in the way the router chooses.",
        "load": "Offer load to any server that speaks OpenAI's API, and measure what its clients see.",
        "memory": "Compare the peak memory of expert replicas, from start to first answers, with the weights they hold.",
        "quantize": "Measure what quantised experts cost a trained model: perplexity and greedy agreement with bfloat16.",
        "serve": "Measure serving speed beside other systems, in turns, on the same checkpoints and prompts.",
        "split": "Measure what the split costs: one engine with its experts in its own process and in services.",
    }
)


@click.group(cls=LazyGroup, package="moiety.cli.bench", summaries=COMMANDS)
def bench() -> None:
    """Measure the system on this machine: transports, kernels, memory, serving speed, overload, elasticity.

    Each benchmark starts what it needs and leaves no process behind; `load` measures a server that runs. Systems that are
    compared are measured in turns. Run it on a quiet machine: other load distorts the numbers.

    \b
    Example:
      moiety bench hop
    """
