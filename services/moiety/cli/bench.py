"""`moiety bench`: one command for each thing to measure; those of the weights are in `bench_weights.py`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.bench_elastic import elastic
from moiety.cli.bench_engines import lanes, split
from moiety.cli.bench_weights import experts, memory, quantize
from moiety.cli.options import (
    IntegerList,
    WordList,
    dtype_option,
    groups_option,
    invocation,
    json_option,
    rounds_option,
    write_json,
)
from moiety.cli.run import progress, run_async


@click.group()
def bench() -> None:
    """Measure this machine: hop, split, lanes, experts, serving, flood, elasticity, control plane.

    The benchmarks start what they need as child processes, take turns with a baseline, and leave nothing behind.
    Numbers mean something on a quiet machine only.
    """


@bench.command()
@click.option(
    "--payload",
    type=IntegerList(4, 16384, step=4),
    default="4,16,64,256,1024",
    show_default=True,
    help="KiB of rows in a call, and as many in its reply; multiples of 4 from 4 to 16384, with commas.",
)
@click.option(
    "--calls", type=click.IntRange(1, 1_000_000), default=200, show_default=True, help="Per payload and round."
)
@rounds_option
@json_option
@click.pass_context
def hop(context: click.Context, payload: tuple[int, ...], calls: int, rounds: int, json_file: Path | None) -> None:
    """Measure the hop: a call to an expert replica and back, less the experts' own time, by each transport.

    Beside it, in turns, a unary gRPC echo of the same bytes: what a call costs when nothing of ours is in it.

    \b
    Example:
      moiety bench hop --payload 16,256 --calls 1000
    """
    from moiety.tools.bench_hop import bench_hop, hop_lines
    from moiety.tools.machine import Machine

    machine = Machine.here()
    rows = run_async(bench_hop(payload_kib=payload, calls=calls, rounds=rounds, progress=progress()))
    for line in (*hop_lines(rows), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])


@bench.command()
@click.option(
    "--models",
    type=WordList(),
    help="Synthetic qwen3_moe models, small (90 M parameters) and large (0.91 B), or checkpoint folders; with commas.  "
    "[default: small; with --compare large,small]",
)
@click.option("--compare", is_flag=True, help="Both synthetic models, both prompt lengths, continuous batching beside.")
@click.option(
    "--vllm", metavar="PYTHON", help="The Python of an environment that has vLLM's CPU build: measure it too."
)
@click.option("--llama-cpp", metavar="PYTHON", help="The same for one that has llama-cpp-python and gguf.")
@click.option("--int8", is_flag=True, help="Measure a second Moiety, with int8 experts.")
@groups_option
@click.option(
    "--prompts",
    type=IntegerList(1, 1 << 20),
    help="Tokens per prompt; with commas.  [default: 64; with --compare 64,512]",
)
@click.option(
    "--concurrency", type=IntegerList(1, 1024), help="Streams at once; with commas.  [default: 1,8,32; quick: 1,8]"
)
@click.option("--new", type=click.IntRange(2, 1 << 20), help="New tokens per stream.  [default: 64; quick: 16]")
@click.option("--rounds", type=click.IntRange(1, 100), help="How often the systems take turns.  [default: 3; quick: 1]")
@click.option("--quick", is_flag=True, help="Small model, short prompts, one round: does every path work?")
@click.option(
    "--minutes",
    type=click.FloatRange(0.1, 1440),
    default=60.0,
    show_default=True,
    help="No run begins after that; models share it evenly. What was not measured by then is told.",
)
@dtype_option("bfloat16")
@json_option
@click.pass_context
def serve(
    context: click.Context,
    models: tuple[str, ...] | None,
    compare: bool,
    vllm: str | None,
    llama_cpp: str | None,
    int8: bool,
    groups: int,
    prompts: tuple[int, ...] | None,
    concurrency: tuple[int, ...] | None,
    new: int | None,
    rounds: int | None,
    quick: bool,
    minutes: float,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Measure serving speed beside what else one could run, in turns, on the same checkpoints and prompts.

    Moiety is measured by a client of its gateway: attention, hop, experts, tokenising and streaming included. Every
    other system runs in a process of its own, which is stopped while it is not measured: transformers' generate, with
    --compare its continuous batching, and vLLM and llama.cpp where their Pythons are given. One that fails costs the
    others nothing. A step's time is told over its floor: the time this machine needs, at its measured best, to read the
    step's weights and to compute its products. A full comparison ends within --minutes and the start of its systems,
    some minutes a model.

    \b
    Examples:
      moiety bench serve --models ./Qwen3-30B-A3B --groups 4 --concurrency 1,16 --json serve.json
      moiety bench serve --compare --vllm ~/vllm/bin/python --llama-cpp ~/llama/bin/python --json compare.json
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the services have it: huge pages for torch
    from moiety.tools.bench_serve import Workload, bench_serve, serve_lines
    from moiety.tools.bench_systems import peer_kinds
    from moiety.tools.machine import Machine

    full = compare and not quick
    workload = Workload(
        models=models or (("large", "small") if full else ("small",)),
        groups=groups,
        prompts=prompts or ((64, 512) if full else (64,)),
        concurrency=concurrency or ((1, 8) if quick else (1, 8, 32)),
        new_tokens=new or (16 if quick else 64),
        dtype=dtype,
        rounds=rounds or (1 if quick else 3),
        minutes=minutes,
        int8=int8,
    )
    machine = Machine.here()
    peers = peer_kinds(continuous=compare, vllm=vllm, llama_cpp=llama_cpp)
    report = run_async(bench_serve(workload, peers, progress=progress()))
    for line in (*serve_lines(report), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    measured_on: dict[str, object] = {**asdict(machine)}
    measured_on.update(asdict(report.speed))
    write_json(json_file, {"machine": measured_on, "rows": [asdict(row) for row in report.rows]})


@bench.command()
@click.option(
    "--model", default="small", show_default=True, help="small, large (see bench serve), or a checkpoint folder."
)
@groups_option
@click.option("--slots", type=click.IntRange(1, 1024), default=8, show_default=True, help="Requests that run at once.")
@click.option("--queue", type=click.IntRange(1, 1024), default=8, show_default=True, help="Requests that may wait.")
@click.option(
    "--loads",
    type=IntegerList(1, 64),
    default="1,2,4",
    show_default=True,
    help="Requests offered a second, as multiples of the capacity measured first.",
)
@click.option("--seconds", type=click.FloatRange(1, 600), default=15.0, show_default=True, help="Of each load.")
@click.option("--prompt", type=click.IntRange(1, 1 << 20), default=32, show_default=True, help="Tokens per prompt.")
@click.option("--new", type=click.IntRange(1, 1 << 20), default=32, show_default=True, help="New tokens per request.")
@dtype_option("bfloat16")
@rounds_option
@json_option
@click.pass_context
def flood(
    context: click.Context,
    model: str,
    groups: int,
    slots: int,
    queue: int,
    loads: tuple[int, ...],
    seconds: float,
    prompt: int,
    new: int,
    dtype: str,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Offer more than can be served: does accepted work keep its pace, and is every refusal told when to come back?

    Capacity is what the system serves to clients that keep every slot and half of the queue taken. Then requests come at
    a multiple of that, whatever happened to those before. Exit status 1 where accepted work falls below 95 % of the
    peak at a load of 2 or more, a refusal carries no retry hint, or a request fails otherwise.

    \b
    Example:
      moiety bench flood --loads 1,2,4 --seconds 30
    """
    from moiety.tools.bench_flood import FloodWork, bench_flood, flood_lines
    from moiety.tools.machine import Machine

    machine = Machine.here()
    work = FloodWork(model, groups, slots, queue, loads, seconds, prompt, new, dtype, rounds)
    report = run_async(bench_flood(work, progress=progress()))
    for line in (*flood_lines(report), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), "rows": [asdict(row) for row in report.rows]})
    context.exit(0 if report.held else 1)


@bench.command()
@click.option("--replicas", type=click.IntRange(1, 100_000), default=2000, show_default=True, help="Expert replicas.")
@click.option("--routers", type=click.IntRange(1, 1000), default=16, show_default=True, help="That read the registry.")
@click.option("--layers", type=click.IntRange(1, 1000), default=58, show_default=True, help="MoE layers.")
@click.option("--experts", type=click.IntRange(1, 4096), default=256, show_default=True, help="Per layer.")
@click.option("--groups", type=click.IntRange(1, 4096), default=64, show_default=True, help="Expert groups.")
@click.option("--hot-sets", type=click.IntRange(0, 1024), default=16, show_default=True, help="Hot sets.")
@rounds_option
@json_option
@click.pass_context
def control(
    context: click.Context,
    replicas: int,
    routers: int,
    layers: int,
    experts: int,
    groups: int,
    hot_sets: int,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Measure the control plane of a large system: planning, the dispatch table, the traffic on Redis.

    Nothing is served: replicas are entries in a real Redis that is started for this, written and read as often as they
    would be.

    \b
    Example:
      moiety bench control --replicas 2000
    """
    from moiety.tools.bench_control import ControlWork, bench_control, control_lines
    from moiety.tools.machine import Machine

    machine = Machine.here()
    work = ControlWork(replicas, routers, layers, experts, groups, hot_sets, rounds)
    report = bench_control(work, progress())
    for line in (*control_lines(report, work), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), "work": asdict(work), "report": asdict(report)})


bench.add_command(split)
bench.add_command(lanes)
bench.add_command(experts)
bench.add_command(memory)
bench.add_command(quantize)
bench.add_command(elastic)
