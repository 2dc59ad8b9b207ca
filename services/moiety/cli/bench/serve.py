"""`moiety bench serve`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.bench.model_check import check_model
from moiety.cli.options import (
    IntegerList,
    WordList,
    dtype_option,
    groups_option,
    invocation,
    json_option,
    service_environment,
    write_json,
)
from moiety.cli.run import progress, run_async


@click.command()
@click.option(
    "--models",
    type=WordList(),
    help="Synthetic qwen3_moe models small (90 M parameters) and large (0.91 B), or checkpoint folders; separated by "
    "commas.  [default: small; with --compare large,small]",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Measure both synthetic models at both prompt lengths, and transformers' continuous batching too.",
)
@click.option(
    "--vllm",
    metavar="PYTHON",
    type=click.Path(exists=True, dir_okay=False),
    help="Also measure vLLM: the Python of an environment that has vLLM's CPU build.",
)
@click.option(
    "--llama-cpp",
    metavar="PYTHON",
    type=click.Path(exists=True, dir_okay=False),
    help="Also measure llama.cpp: the Python of an environment that has llama-cpp-python and gguf.",
)
@click.option("--int8", is_flag=True, help="Also measure Moiety with int8 experts.")
@groups_option
@click.option(
    "--prompts",
    type=IntegerList(1, 1 << 20),
    help="Tokens per prompt; separated by commas.  [default: 64; with --compare 64,512]",
)
@click.option(
    "--concurrency",
    type=IntegerList(1, 1024),
    help="Streams at once; separated by commas.  [default: 1,8,32; with --quick 1,8]",
)
@click.option(
    "--new", type=click.IntRange(2, 1 << 20), help="Tokens to generate per stream.  [default: 64; with --quick 16]"
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    help="Rounds of measurement; the systems take turns in each round.  [default: 3; with --quick 1]",
)
@click.option("--quick", is_flag=True, help="Small model, short prompts, one round: checks that every path works.")
@click.option(
    "--minutes",
    type=FiniteRange(0.1, 1440),
    default=60.0,
    help="No run begins after this many minutes, which the models share evenly. Rows not measured by then say so.",
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
    """Measure serving speed beside other systems, in turns, on the same checkpoints and prompts.

    A client of the gateway measures Moiety: attention, hop, experts, tokenising and streaming included. The other systems
    are transformers' generate, with --compare also transformers' continuous batching, and vLLM and llama.cpp where their
    options are given. Each other system runs in its own process, which is stopped between its turns. If a system fails,
    the others are still measured. The floor is the time to read a decode step's weights and then compute its products, at
    the best speeds measured on this machine. The column step/floor is a step's time divided by the floor. A full
    comparison takes about --minutes, and a few minutes more per model to start the systems.

    \b
    Examples:
      moiety bench serve --models ./Qwen3-30B-A3B --groups 4 --concurrency 1,16 --json serve.json
      moiety bench serve --compare --vllm ~/vllm/bin/python --llama-cpp ~/llama/bin/python --json compare.json
    """
    service_environment()
    full = compare and not quick
    models = models or (("large", "small") if full else ("small",))
    prompts = prompts or ((64, 512) if full else (64,))
    new = new or (16 if quick else 64)
    for model in models:
        check_model({"model": model, "groups": groups, "prompt_tokens": max(prompts), "new_tokens": new})
    from moiety.bench.serve.serve import Workload, bench_serve, serve_lines
    from moiety.bench.serve.systems import peer_kinds
    from moiety.tools.machine import Machine

    workload = Workload(
        models=models,
        groups=groups,
        prompts=prompts,
        concurrency=concurrency or ((1, 8) if quick else (1, 8, 32)),
        new_tokens=new,
        dtype=dtype,
        rounds=rounds or (1 if quick else 3),
        minutes=minutes,
        int8=int8,
    )
    machine = Machine.here()
    peers = peer_kinds(continuous=compare, vllm=vllm, llama_cpp=llama_cpp)
    report = run_async(bench_serve(workload, peers, progress=progress()))
    for line in (*serve_lines(report), *machine.lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    measured_on: dict[str, object] = {**asdict(machine)}
    measured_on.update(asdict(report.speed))
    write_json(json_file, {"machine": measured_on, "rows": [asdict(row) for row in report.rows]})
