"""Compares the served speed of two checkouts of this repository, which take turns on one quiet machine.

    python tests/bench/two_checkouts.py OLD NEW [--model small] [--streams 8] [--tokens 160] [--rounds 14]

Both systems, each a gateway, a router and two expert groups, are up all the time, and the load passes from one to the other in
each round. So slow changes of the machine's speed meet both. Prints the median of the rounds' ratios, with quartiles: tokens
per second, and microseconds of CPU per token of each kind of service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

PROMPT = [3, 5, 7, 11, 13, 17, 19, 23]


async def serve(model: str, streams: int, tokens: int) -> None:
    """Starts a system of the checkout on PYTHONPATH; runs one round for each line on stdin and prints its figures."""
    from moiety.client import Client
    from moiety.local.cluster import LocalCluster

    async def stream(client: Client, number: int) -> None:
        async for _ in client.generate([number, *PROMPT], max_tokens=tokens, ignore_eos=True, seed=number):
            pass

    async def load(client: Client) -> float:
        began = time.monotonic()
        await asyncio.gather(*(stream(client, number) for number in range(streams)))
        return time.monotonic() - began

    async with LocalCluster(model, groups=2) as cluster, Client(cluster.address) as client:
        await load(client)
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            before = {child.replica.role: 0.0 for child in cluster.children}
            for child in cluster.children:
                before[child.replica.role] -= cpu_s(child.pid)
            took_s = await load(client)
            for child in cluster.children:
                before[child.replica.role] += cpu_s(child.pid)
            figures = {f"{role}, CPU µs per token": 1e6 * used / streams / tokens for role, used in before.items()}
            print(json.dumps({"tokens per second": streams * tokens / took_s, **figures}), flush=True)


def cpu_s(pid: int) -> float:
    """Returns the CPU seconds that the threads of a process have used."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def compare(arguments: argparse.Namespace) -> None:
    """Starts both systems, runs the rounds and prints the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model in ("small", "large"):
            from moiety.bench.checkpoints import model_folder

            model = str(model_folder(model, Path(folder), "bfloat16", 2048, print))
        systems = [start(checkout, model, arguments) for checkout in (arguments.old, arguments.new)]
        rounds: list[tuple[dict[str, float], ...]] = []
        for number in range(arguments.rounds):
            order = systems if number % 2 == 0 else systems[::-1]
            found = [figures(system) for system in order]
            rounds.append(tuple(found if number % 2 == 0 else found[::-1]))
        for system in systems:
            system.communicate()
    for name in rounds[0][0]:
        ratios = [new[name] / old[name] for old, new in rounds]
        low, _, high = quantiles(ratios, n=4)
        was, now = (median(round_[side][name] for round_ in rounds) for side in (0, 1))
        print(f"{name:28} {was:9.1f} → {now:9.1f}   ratio {median(ratios):.3f} ({low:.3f} to {high:.3f})")


def start(checkout: str, model: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Starts the system of one checkout; returns once it has served its first round."""
    root = Path(checkout).resolve()
    environment = {**os.environ, "PYTHONPATH": f"{root / 'services'}:{root / 'kernels'}"}
    command = [
        sys.executable,
        __file__,
        "--serve",
        model,
        f"--streams={arguments.streams}",
        f"--tokens={arguments.tokens}",
    ]
    process = subprocess.Popen(
        command, env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        sys.exit(f"the system of {checkout} did not start")
    return process


def figures(system: subprocess.Popen[str]) -> dict[str, float]:
    """Runs one round of a system and returns what it measured."""
    assert system.stdin is not None
    assert system.stdout is not None
    system.stdin.write("\n")
    system.stdin.flush()
    found: dict[str, float] = json.loads(system.stdout.readline())
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="")
    parser.add_argument("new", nargs="?", default="")
    parser.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument(
        "--model", default="small", help="small or large (see moiety bench serve), or a checkpoint folder"
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160, help="per stream and round")
    parser.add_argument("--rounds", type=int, default=14)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.streams, given.tokens))
    else:
        compare(given)
