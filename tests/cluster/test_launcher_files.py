"""Checks local.yaml and gpu.yaml with Ray's validator, and against the repository, the settings and a shell."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_files import CLUSTER, REPOSITORY, Config, launch_check, load
from jsonschema import ValidationError

from moiety.config.application import AppSettings
from moiety.config.resolve import resolve

LAUNCHER_FILES = ["local.yaml", "gpu.yaml"]
SECRETS = {"~/.ray/auth_token", "~/.moiety/redis_password"}


def start_commands(config: Config) -> list[str]:
    """Returns the commands that run on the head and on the workers at every `ray up`."""
    return [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_the_launcher_file(name: str) -> None:
    """`ray up` accepts the file as it is."""
    launch_check(load(name))


def rename_workers(config: Config) -> None:
    """Puts an unknown key in place of a known one."""
    config["max_worker"] = config.pop("max_workers")


def misspell_command(config: Config) -> None:
    """Puts a command list under a wrong name."""
    config["head_start_commands"] = config.pop("head_start_ray_commands")


def mistype_command(config: Config) -> None:
    """Puts a number in place of a command."""
    config["setup_commands"] = [3]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (rename_workers, "'max_worker' was unexpected"),
        (misspell_command, "'head_start_commands' was unexpected"),
        (mistype_command, "3 is not of type 'string'"),
    ],
)
def test_rays_check_of_the_launcher_file_can_fail(name: str, break_it: Callable[[Config], None], why: str) -> None:
    """Each mutation of a valid file is refused for its own reason."""
    config = load(name)
    break_it(config)
    with pytest.raises(ValidationError, match=why):
        launch_check(config)


@pytest.mark.parametrize(
    ("path", "value", "error", "why"),
    [
        (("head_node_type",), "none", ValueError, "must be one of `available_node_types`"),
        (("available_node_types", "gpu", "min_workers"), 99, ValueError, "smaller than the sum of `min_workers`"),
        (("available_node_types", "gpu", "min_worker"), 1, ValidationError, "'min_worker' was unexpected"),
    ],
)
def test_rays_check_of_node_types_can_fail(path: tuple[str, ...], value: Any, error: type[Exception], why: str) -> None:
    """An unknown head type, more workers than allowed and an unknown key are refused."""
    config = load("gpu.yaml")
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(error, match=why):
        launch_check(config)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_what_is_mounted_exists(name: str) -> None:
    """Every mounted path is in the repository, except the two secrets, which the user creates."""
    mounts = load(name)["file_mounts"]
    assert {local for local in mounts.values() if local.startswith("~")} == SECRETS
    assert [local for local in set(mounts.values()) - SECRETS if not (REPOSITORY / local).exists()] == []
    assert {"~/moiety/" + local for local in set(mounts.values()) - SECRETS} <= set(mounts)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_ray_process_has_the_environment(name: str) -> None:
    """Each `ray start` sources environment.sh, so every node has the token mode, the model and the registry."""
    starts = [command for command in start_commands(load(name)) if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith(". ~/moiety/cluster/environment.sh;") for command in starts)
    assert all("--dashboard-host=127.0.0.1" in command for command in starts if "--head" in command)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_shell_commands_parse(name: str) -> None:
    """bash finds no syntax error in any command."""
    config = load(name)
    for command in [*config.get("initialization_commands", []), *config["setup_commands"], *start_commands(config)]:
        subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True, timeout=10)


def test_the_local_provider_has_the_old_autoscaler() -> None:
    """The head turns autoscaler v2 off, with which the local provider never launches its workers."""
    head = " ".join(load("local.yaml")["head_start_ray_commands"])
    assert "RAY_enable_autoscaler_v2=0 ~/venv/bin/ray start" in head


def run_under_environment(home: Path, command: str, **extra: str) -> str:
    """Returns the output of `command` in a shell that has sourced environment.sh with `home` as its HOME."""
    script = f". {CLUSTER / 'environment.sh'}; {command}"
    environment = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", **extra}
    done = subprocess.run(
        ["bash", "-ec", script], env=environment, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory with a Redis password in it."""
    (tmp_path / ".moiety").mkdir()
    (tmp_path / ".moiety" / "redis_password").write_text("s3cret\n")
    return tmp_path


def test_the_environment_is_the_applications(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MOIETY_ variables of environment.sh are settings of the application; a worker uses the head's address."""
    lines = run_under_environment(home, "env", RAY_HEAD_IP="192.0.2.10").splitlines()
    variables = dict(line.partition("=")[::2] for line in lines)
    ours = {name: value for name, value in variables.items() if name.startswith("MOIETY_")}
    assert {name.removeprefix("MOIETY_").lower() for name in ours} <= set(AppSettings.model_fields)
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    settings = resolve({})
    assert settings.registry.get_secret_value() == "redis://:s3cret@192.0.2.10:6390/0"
    assert (settings.model, settings.listen_host) == ("/models/moiety", "0.0.0.0")
    assert variables["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_ports_do_not_meet(name: str, home: Path) -> None:
    """Ray and Redis take the ports of environment.sh: two, and neither is that of a distribution's redis-server."""
    ports = run_under_environment(home, "echo $RAY_HEAD_PORT $REDIS_PORT").split()
    assert len({*ports, "6379"}) == 3
    commands = start_commands(load(name))
    starts = [command for command in commands if "ray start" in command]
    assert ["$RAY_HEAD_PORT" in command for command in starts] == [True, True]
    assert not [command for command in commands if "6379" in command]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_redis_is_checked_before_ray_starts(name: str) -> None:
    """The head first starts the Redis of its environment, or stops there if another server has the port."""
    first = load(name)["head_start_ray_commands"][0]
    assert first == ". ~/moiety/cluster/environment.sh; ~/venv/bin/python ~/moiety/cluster/shared_redis.py start"


def test_files_are_copied_before_any_command_runs() -> None:
    """No command of gpu.yaml installs rsync: Ray has used it by then."""
    config = load("gpu.yaml")
    commands = [*config["initialization_commands"], *config["setup_commands"], *start_commands(config)]
    assert not [command for command in commands if "rsync" in command]


def test_apt_is_tried_again_while_its_locks_are_held(tmp_path: Path) -> None:
    """The first commands of gpu.yaml wait for a machine that still updates itself after its first boot."""
    (tmp_path / "sudo").write_text('#!/bin/sh\necho "$*" >> calls\n[ "$(grep -c update calls)" -ge 3 ]\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("sudo", "sleep"):
        (tmp_path / name).chmod(0o755)
    for command in load("gpu.yaml")["initialization_commands"]:
        subprocess.run(
            ["bash", "-ec", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path, check=True, timeout=20
        )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [*["apt-get update -q"] * 3, "apt-get install -yq python3-venv"]
