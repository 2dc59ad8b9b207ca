"""`moiety doctor`: checks what decides how well Moiety runs on this machine, with advice where something is wrong."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import moiety
from moiety.compose.environment import PROCESS_ENVIRONMENT
from moiety.config.options import GatewayOptions
from moiety.config.own_files import temporary_folder
from moiety.deploy.memory import MachineMemory
from moiety.deploy.ray_cluster import MOST_FOLDER
from moiety.errors import FailedPrecondition
from moiety.registry.embedded_redis import server_binary
from moiety.tools import machine
from moiety_kernels.threads import usable_cores

PYTHON = (3, 11)
LEAST_MEMORY, LITTLE_MEMORY = 1 << 30, 4 << 30
LITTLE_SHARED_MEMORY = 256 << 20  # bytes; containers get 64 MiB by default
LITTLE_BANDWIDTH = 5e9  # bytes per second
PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "safetensors", "tokenizers", "numpy", "ray", "redis")
INTERESTING = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
)


class Finding(StrEnum):
    """Result of a check. OK: as it should be. WARN: slower or less capable than it could be. FAIL: serving cannot work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. `advice` says what the user can do; it is empty where there is nothing to do."""

    check: str
    value: str
    verdict: Finding = Finding.OK
    advice: str = ""


def examine(*, measure: bool = False) -> Iterator[Check]:
    """Runs every check and yields its result. `measure` adds memory bandwidth and matrix products, which take seconds."""
    yield _python()
    yield from _packages()
    yield from _cores()
    yield _threads()
    yield from _environment()
    yield _huge_pages()
    yield _instruction_sets()
    yield _kernels()
    yield from _memory()
    yield from _ray()
    yield _package()
    yield _redis()
    defaults = GatewayOptions()
    yield _port(defaults.port, "gRPC API", "--grpc-port")
    yield _port(defaults.http_port, "HTTP API", "--http-port")
    if measure:
        yield from _speed()


def doctor_lines(checks: Sequence[Check]) -> Iterator[str]:
    """Yields the report: one line per check with its advice below, then a line that counts the verdicts."""
    width = max(len(check.check) for check in checks)
    for check in checks:
        yield f"{check.verdict:4}  {check.check:{width}}  {check.value}"
        if check.advice:
            yield f"{'':4}  {'':{width}}  → {check.advice}"
    counts = {verdict: sum(check.verdict is verdict for check in checks) for verdict in Finding}
    yield ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _python() -> Check:
    running = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < PYTHON:
        return Check("python", running, Finding.FAIL, f"Moiety needs Python {'.'.join(map(str, PYTHON))} or newer")
    return Check("python", running)


def _packages() -> Iterator[Check]:
    for name in PACKAGES:
        try:
            yield Check(name, version(name))
        except PackageNotFoundError:
            yield Check(name, "not installed", Finding.FAIL, "pip install 'moiety[serve]'")


def _cores() -> Iterator[Check]:
    usable, quota = usable_cores(), machine.core_quota()
    yield Check("processor", machine.processor())
    value = f"{usable} of {os.cpu_count()} by affinity"
    if quota is None:
        yield Check("cores", value)
    elif quota >= usable:
        yield Check("cores", f"{value}, {quota:g} by quota")
    else:
        advice = f"the kernel pauses services with more than {quota:g} threads in all for part of every period: raise the quota"
        yield Check("cores", f"{value}, {quota:g} by quota", Finding.WARN, advice)


def _threads() -> Check:
    import torch

    threads, usable = torch.get_num_threads(), usable_cores()
    value = f"{threads} unless a setting says otherwise"
    if threads < usable and "OMP_NUM_THREADS" in os.environ:
        advice = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} in the environment: unset it, and use the `threads` settings"
        return Check("torch threads", value, Finding.WARN, advice)
    return Check("torch threads", value)


def _environment() -> Iterator[Check]:
    """Checks environment variables that Moiety sets for every service. A value that the user has set overrides Moiety's."""
    for name in ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE"):
        recommended = PROCESS_ENVIRONMENT[name]
        value = os.environ.get(name, recommended)
        if value.lower() == recommended.lower():
            yield Check(name, value if name in os.environ else f"{value} (set for every service)")
        else:
            yield Check(name, value, Finding.WARN, f"unset it, or set it to {recommended}")


def _huge_pages() -> Check:
    setting = machine.huge_pages()
    if setting is None:
        return Check("huge pages", "unknown: this system does not report them")
    if setting == "never":
        advice = "weights stream up to twice as fast after: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return Check("huge pages", setting, Finding.WARN, advice)
    return Check("huge pages", setting)


def _instruction_sets() -> Check:
    found = [name for name in INTERESTING if name in machine.instruction_sets()]
    return Check("instruction sets", " ".join(found) or "none that Moiety looks for")


def _kernels() -> Check:
    from moiety_kernels.cpu.library import SWITCH, find

    path, problem = find()
    if os.environ.get(SWITCH) == "off":
        return Check("C++ kernels", "off", Finding.WARN, f"unset {SWITCH} unless this is intended")
    if path is None:
        return Check("C++ kernels", "not used: torch computes instead", Finding.WARN, problem)
    return Check("C++ kernels", str(path))


def _memory() -> Iterator[Check]:
    if (memory := MachineMemory.here()) is not None:
        available = memory.available
        value = f"{_gib(available)} of {_gib(memory.total)} (with swap) available"
        if available < LEAST_MEMORY:
            yield Check(
                "memory", value, Finding.FAIL, f"free at least {_gib(LEAST_MEMORY)}, in addition to the weights"
            )
        elif available < LITTLE_MEMORY:
            yield Check("memory", value, Finding.WARN, "enough for small models only")
        else:
            yield Check("memory", value)
    free = machine.free_bytes("/dev/shm")
    if free is None:
        yield Check("shared memory", "no /dev/shm", Finding.WARN, "calls to experts on this node go through sockets")
    elif free < LITTLE_SHARED_MEMORY:
        advice = "make /dev/shm larger (docker: --shm-size=1g; Kubernetes: an emptyDir with medium Memory)"
        yield Check("shared memory", f"{free >> 20} MiB free", Finding.WARN, advice)
    else:
        yield Check("shared memory", f"{_gib(free)} free")


def _ray() -> Iterator[Check]:
    """Checks what decides where `moiety serve` starts its Ray."""
    try:
        parent = temporary_folder()
    except FailedPrecondition as error:  # another user has taken the name
        yield Check("Ray's folder", str(error), Finding.WARN)
    else:
        most = MOST_FOLDER - len("/serve-12345678")
        if len(str(parent)) > most:
            advice = (
                f"set TMPDIR to a shorter path: Ray puts sockets below this folder, which may have {most} characters"
            )
            yield Check("Ray's folder", str(parent), Finding.FAIL, advice)
        else:
            yield Check("Ray's folder", str(parent))
    if address := os.environ.get("RAY_ADDRESS"):
        yield Check(
            "RAY_ADDRESS", f"{address}: used by `moiety serve --ray-address auto`, else serve starts a Ray of its own"
        )


def _package() -> Check:
    """Checks whether code that is started in this folder would import a folder called `moiety` instead of the package."""
    here = Path.cwd()
    found = PathFinder.find_spec("moiety", [str(here), *sys.path])
    # Python takes such a folder only where the package is not on the path.
    if found is not None and found.origin is None:
        advice = "start Python from another folder: scripts and `python -m` here import that folder, not the package"
        return Check("package", f"{here / 'moiety'} hides it", Finding.WARN, advice)
    return Check("package", str(Path(moiety.__file__).parent))


def _redis() -> Check:
    try:
        return Check("redis server", server_binary())
    except FailedPrecondition as error:
        return Check("redis server", "none", Finding.WARN, f"needed unless a registry URL is given: {error}")


def _port(port: int, api: str, option: str) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            advice = f"stop the process that listens there, or choose another port: moiety serve {option}"
            return Check(f"port {port}", error.strerror or str(error), Finding.WARN, advice)
    return Check(f"port {port}", f"free, for the gateway's {api}")


def _speed() -> Iterator[Check]:
    from moiety.tools.machine_speed import measure_speed

    speed = measure_speed()
    value = f"{speed.read_bytes_per_s / 1e9:.1f} GB/s"
    if speed.read_bytes_per_s < LITTLE_BANDWIDTH:
        advice = "memory reads limit the decode speed: check that the machine is quiet and that huge pages are on"
        yield Check("memory read", value, Finding.WARN, advice)
    else:
        yield Check("memory read", value)
    value = f"{speed.bfloat16_flops / 1e9:.0f} GFLOP/s in bfloat16, {speed.float32_flops / 1e9:.0f} in float32"
    if speed.bfloat16_flops < speed.float32_flops and "avx512_bf16" not in machine.instruction_sets():
        advice = "this processor has no instructions for bfloat16: prompts are faster with --dtype float32"
        yield Check("matrix product", value, Finding.WARN, advice)
    else:
        yield Check("matrix product", value)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
