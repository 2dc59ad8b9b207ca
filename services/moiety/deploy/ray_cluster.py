"""Starts a Ray for this process on this machine, or connects to one that is running."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moiety.compose.environment import PROCESS_ENVIRONMENT
from moiety.config.application import AppSettings
from moiety.deploy.arguments import LOOPBACK, from_arguments
from moiety.errors import FailedPrecondition

# Moiety sends nothing through Ray's object store; about the smallest size that Ray accepts
OBJECT_STORE_BYTES = 80 << 20
LOGICAL_CPUS = 64  # replicas on one machine share its cores: Ray must not refuse them for lack of CPUs

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" binds Ray to loopback, on Linux too, despite the name

MOST_FOLDER = 43  # characters; a socket's path may have 107, and Ray adds /session_<time>_<pid>/sockets/plasma_store
_LOCAL = {
    "RAY_AUTH_MODE": "disabled",  # everything listens on loopback
    LOOPBACK_ONLY: "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    **PROCESS_ENVIRONMENT,
}


@contextmanager
def local_ray(
    *, registry: str = "", num_cpus: int = LOGICAL_CPUS, dashboard: bool = False, folder: Path | None = None
) -> Iterator[None]:
    """Runs a Ray on loopback inside the context, and shuts that Ray down at the end.

    The URL `registry` may hold a password, so replicas get it only through their environment. `folder` is where Ray keeps
    sockets and logs (default: /tmp/ray). Raises FailedPrecondition if that path is too long for sockets, or if Ray would
    listen on the network: Ray decides this when it is first imported, which may have been before this call.
    """
    if folder is not None and len(str(folder)) > MOST_FOLDER:
        raise FailedPrecondition(
            f"{folder}: Ray puts sockets below it, so its path may have {MOST_FOLDER} characters: set TMPDIR to a shorter one"
        )
    with environment({"MOIETY_REGISTRY": registry} if registry else {}, _LOCAL):
        # Ray reads its environment when it is imported.
        import ray

        with _own_signals():
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _node_ip_address=LOOPBACK[0],
                _temp_dir=str(folder) if folder else None,
            )
        try:
            if (host := ray.util.get_node_ip_address()) not in LOOPBACK:
                raise FailedPrecondition(
                    f"a local Ray would listen on {host}: set {LOOPBACK_ONLY}=0 before Ray is first imported"
                )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """While Ray starts: keeps the handler of SIGTERM that this process has, which Ray would replace by one that aborts.

    What Ray starts meanwhile ignores SIGHUP, as it does SIGINT. Both go to all processes of a terminal that closes or gets
    Ctrl-C, and Ray's must live until this process has ended them in order.
    """
    from ray._private import utils

    replace, mask = utils.set_sigterm_handler, signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    ours = signal.getsignal(signal.SIGTERM)
    if callable(ours):
        utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = replace
        if callable(ours) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray's C++ has put a handler below Python's, which aborts after 3 s
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # a SIGHUP that came meanwhile arrives now


@contextmanager
def existing_ray(address: str) -> Iterator[None]:
    """Connects to the Ray at `address` (as `ray start` prints it, or `auto`), and disconnects at the end."""
    import ray

    with _own_signals():
        ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def settings_of_process(arguments: Mapping[str, Any]) -> AppSettings:
    """Returns the settings of the application in a process of Ray, which got its `arguments`."""
    return on_this_cluster(from_arguments(arguments))


def on_this_cluster(settings: AppSettings) -> AppSettings:
    """Returns `settings` with the cluster in the system's identity: if none is set, the session of the connected Ray.

    A session lasts as long as the Ray cluster. Two clusters side by side, as during KubeRay's upgrade, have two.
    """
    import ray

    return settings.model_copy(update={"cluster": settings.cluster or ray.get_runtime_context().get_session_name()})


def connected() -> bool:
    """Whether this process is connected to a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@contextmanager
def environment(values: Mapping[str, str], defaults: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Sets `values`, and those of `defaults` that the user has not set, inside the context."""
    changed = {**{name: value for name, value in defaults.items() if name not in os.environ}, **values}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
