"""What is checked before anything starts: memory, tokenizer, devices, and what an application asks of Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moiety.config.application import AppSettings
from moiety.config.services import GatewaySettings
from moiety.deploy.app import build
from moiety.deploy.checks import Resources, check_devices, check_memory
from moiety.deploy.memory import MachineMemory, MemoryNeed
from moiety.errors import CheckpointError, ConfigError, FailedPrecondition
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.tools.inspect_checkpoint import inspect
from moiety.wire.shared_port import claimed_ports

GIB = 1 << 30
MACHINE = "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nSwapTotal: 1048576 kB\n"


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "growth"), [("auto", 1.0), ("bfloat16", 0.5)])
def test_the_need_is_what_inspect_reports(
    tiny: Callable[[str], str], architecture: str, dtype: str, growth: float
) -> None:
    """Weights that are counted from headers are those of `moiety inspect`, in the data type that is served."""
    checkpoint = Checkpoint.open(tiny(architecture))
    found = inspect(checkpoint)
    settings = AppSettings(
        model=tiny(architecture), dtype=dtype, groups=1, router={"min_replicas": 2, "max_replicas": 2}
    )
    need = MemoryNeed.of(settings, checkpoint)
    assert found.dtype == "float32"
    assert need.trunks == pytest.approx(2 * growth * found.router_bytes, rel=0.001)
    assert need.experts == pytest.approx(growth * found.group_bytes(1), rel=0.1)
    assert need.caches == 2 * need.cache == 2 * GIB


def test_a_control_group_bounds_the_memory(tmp_path: Path) -> None:
    """What a container was given counts, not what its machine has; without a limit, the machine's memory and swap count."""
    (tmp_path / "meminfo").write_text(MACHINE)
    assert MachineMemory.here(tmp_path, tmp_path) == MachineMemory(9 * GIB, 4 * GIB)
    (tmp_path / "memory.max").write_text("max")
    (tmp_path / "memory.current").write_text(str(GIB))
    assert MachineMemory.here(tmp_path, tmp_path) == MachineMemory(9 * GIB, 4 * GIB)
    (tmp_path / "memory.max").write_text(str(3 * GIB))
    assert MachineMemory.here(tmp_path, tmp_path) == MachineMemory(4 * GIB, 2 * GIB)
    assert MachineMemory.here(tmp_path / "none", tmp_path) is None


def test_only_what_must_fail_is_refused() -> None:
    """Weights or one router's cache beyond all memory are refused with the sum; what is free is said."""
    memory = MachineMemory(16 * GIB, GIB)
    lines: list[str] = []
    check_memory(MemoryNeed(8 * GIB, 2 * GIB, 12 * GIB, 6 * GIB), memory, lines.append)
    assert "12.0 GiB (kv_memory) are needed once the caches are full, and 1.0 GiB are free" in lines[0]
    with pytest.raises(
        ConfigError, match=r"kv_memory = '7.0 GiB': must be at most 6.0 GiB: 10.0 GiB are weights, .* 16.0"
    ):
        check_memory(MemoryNeed(8 * GIB, 2 * GIB, 7 * GIB, 7 * GIB), memory, lines.append)
    with pytest.raises(FailedPrecondition, match=r"need 18.0 GiB, 16.0 GiB for .* and 2.0 GiB for .* has 16.0 GiB"):
        check_memory(MemoryNeed(16 * GIB, 2 * GIB, GIB, GIB), memory, lines.append)


def test_what_an_application_asks_of_ray(tiny: Callable[[str], str]) -> None:
    """The sums count the replicas of every deployment, hot sets at most; only a Ray with less lacks something."""
    settings = AppSettings(
        model=tiny("mixtral"), hot_sets=1, overrides={"experts-1": {"num_gpus": 0.5, "max_replicas": 6}}
    )
    assert Resources.at_start(settings) == Resources(cpus=3.5, gpus=0.5)
    assert Resources.at_most(settings) == Resources(cpus=1.5 + 4 + 6 + 4, gpus=3.0)
    asked = Resources.at_start(settings)
    assert asked.shortage(3.5, 1.0) == ""
    assert asked.shortage(2.0, 0.0).startswith("its replicas ask for 3.5 CPUs (Ray has 2) and 0.5 GPUs (Ray has 0): ")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="for machines without a CUDA device")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "cuda"}, "device = 'cuda': torch finds no CUDA device"),
        ({"experts": {"num_gpus": 0.5}}, r"ask for 1 GPUs \(experts-0 0.5, experts-1 0.5\).* has 0"),
    ],
)
def test_devices_that_are_not_there(tiny: Callable[[str], str], values: dict[str, object], message: str) -> None:
    """A CUDA device or GPUs that this machine lacks are refused with the deployments that ask for them."""
    settings = AppSettings(model=tiny("mixtral"), gateway={"port": 0, "http_port": 0}, **values)
    with pytest.raises(FailedPrecondition, match=message):
        check_devices(settings)


def test_no_tokenizer(tiny: Callable[[str], str], tmp_path: Path) -> None:
    """`serve deploy` refuses a checkpoint without a tokenizer, or with a damaged one, before it deploys anything."""
    for file in Path(tiny("mixtral")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    build(AppSettings(model=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not readable as"):
        build(AppSettings(model=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer: there is none of"):
        build(AppSettings(model=str(tmp_path)))


def test_a_port_of_a_system_that_still_starts(unused_tcp_port_factory: Callable[[], int]) -> None:
    """Who starts a system on the ports of another that does not listen yet is refused at once; afterwards they are free."""
    grpc, http, other = (unused_tcp_port_factory() for _ in range(3))
    settings = GatewaySettings(model="m", port=grpc, http_port=http)
    with claimed_ports(settings):
        with (
            pytest.raises(ConfigError, match=f"gateway.http_port = {http}: another system is starting"),
            claimed_ports(settings.model_copy(update={"port": other})),
        ):
            raise AssertionError("both have the port")
        with claimed_ports(settings.model_copy(update={"port": other, "http": False})):
            pass
    with claimed_ports(settings), claimed_ports(settings.model_copy(update={"port": 0, "http_port": 0})):
        pass
