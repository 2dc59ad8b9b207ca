"""Starts a Ray for this process on this machine, or connects to one that is running."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moiety.compose.environment import PROCESS_ENVIRONMENT
from moiety.config.application import AppSettings
from moiety.core.supervise import spawn_thread
from moiety.deploy.arguments import LOOPBACK, from_arguments
from moiety.deploy.ray_probe import check_ray
from moiety.deploy.ray_processes import children, end_all
from moiety.errors import FailedPrecondition, Unavailable

if TYPE_CHECKING:
    from ray.job_config import JobConfig

Progress = Callable[[str], None]

# Moiety sends nothing through Ray's object store; about the smallest size that Ray accepts
OBJECT_STORE_BYTES = 80 << 20
LOGICAL_CPUS = 64  # replicas on one machine share its cores: Ray must not refuse them for lack of CPUs

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" binds Ray to loopback, on Linux too, despite the name

MOST_FOLDER = 43  # characters; a socket's path may have 107, and Ray adds /session_<time>_<pid>/sockets/plasma_store
SLOW_S = 10.0
SLICE_MS = 200
MOST_TEXT = 400  # characters of an error of Ray's
_LOCAL = {
    "RAY_AUTH_MODE": "disabled",  # everything listens on loopback
    LOOPBACK_ONLY: "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_server_port_wait_time_s": "90",  # Ray's 30 s are too few for the first start of a fresh environment
    **PROCESS_ENVIRONMENT,
}
# Variables that tell a process of some other Ray about it. A Ray on the machine, or the pod of one, may have set them.
_OF_ANOTHER_RAY = (
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE", "RAY_CLIENT_MODE", "RAY_GCS_SERVER_PORT"),
    *("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID", "RAY_RUNTIME_ENV", "RAY_RUNTIME_ENV_HOOK", "RAY_START_HOOK"),
    *("RAY_REDIS_ADDRESS", "RAY_REDIS_USERNAME", "RAY_REDIS_PASSWORD", "RAY_external_storage_namespace"),
    *("RAY_gcs_storage", "RAY_gcs_storage_path", "RAY_ENABLE_GCS_LEADER_ELECTION", "RAY_OVERRIDE_DASHBOARD_URL"),
    *("RAY_OVERRIDE_RESOURCES", "RAY_OVERRIDE_LABELS", "RAY_RAYLET_PID"),
)


@contextmanager
def local_ray(
    *,
    registry: str = "",
    num_cpus: int = LOGICAL_CPUS,
    dashboard: bool = False,
    folder: Path | None = None,
    progress: Progress = lambda line: None,
) -> Iterator[None]:
    """Runs a Ray on loopback inside the context, and shuts that Ray down at the end. It has nothing to do with any other Ray.

    The URL `registry` may hold a password, so replicas get it only through their environment. `folder` is where Ray keeps
    sockets and logs (default: $RAY_TMPDIR/ray, $TMPDIR/ray or /tmp/ray). A start that fails is tried once more; `progress`
    hears of that, and of a slow start. Raises FailedPrecondition if that path is too long for sockets, or if Ray would
    listen on the network: Ray decides this when it is first imported, which may have been before this call. Raises
    Unavailable, with the folder of its logs, if Ray does not start.
    """
    folder = folder or default_ray_folder()
    if len(str(folder)) > MOST_FOLDER:
        raise FailedPrecondition(
            f"{folder}: Ray puts sockets below it, so its path may have {MOST_FOLDER} characters: set TMPDIR to a shorter one"
        )
    with environment({"MOIETY_REGISTRY": registry} if registry else {}, _LOCAL, without=_OF_ANOTHER_RAY):
        # Ray reads its environment when it is imported.
        import ray

        others = children({os.getpid()})

        def shut_down() -> None:
            end_all(children({os.getpid()}) - others, ray.shutdown)

        def start() -> None:
            with _own_signals():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    job_config=_job_config(),
                    _node_ip_address=LOOPBACK[0],
                    _temp_dir=str(folder),
                )

        try:
            with _slowness_told(progress):
                try:
                    start()
                except Exception as error:
                    if isinstance(error, PermissionError | FileNotFoundError):
                        raise  # the next start would meet a wrong folder again
                    progress(f"Ray: did not start ({_one_line(error)}); trying once more")
                    shut_down()
                    start()
            started = children({os.getpid()}) - others
        except KeyboardInterrupt:
            shut_down()  # of what had started: the process may end without its exit handlers
            raise
        except Exception as error:
            shut_down()
            logs = folder / "session_latest" / "logs"
            where = f"; its logs are in {logs}" if logs.exists() else ""
            raise Unavailable(f"Ray did not start: {_one_line(error)}{where}") from error
        try:
            if (host := ray.util.get_node_ip_address()) not in LOOPBACK:
                raise FailedPrecondition(
                    f"a local Ray would listen on {host}: set {LOOPBACK_ONLY}=0 before Ray is first imported"
                )
            yield
        finally:
            end_all(started, ray.shutdown)


def default_ray_folder() -> Path:
    """Returns the folder where a Ray keeps sockets and logs, unless another one is given."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")


@contextmanager
def _own_signals() -> Iterator[None]:
    """While Ray starts: keeps the handler of SIGTERM that this process has, which Ray would replace by one that aborts.

    What Ray starts meanwhile ignores SIGHUP, as it does SIGINT. Both go to all processes of a terminal that closes or gets
    Ctrl-C, and Ray's must live until this process has ended them in order.
    """
    from ray._private import node, utils

    wait = node.wait_for_persisted_port
    node.wait_for_persisted_port = partial(_in_slices, wait)
    replace, mask = utils.set_sigterm_handler, signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    ours = signal.getsignal(signal.SIGTERM)
    if callable(ours):
        utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler, node.wait_for_persisted_port = replace, wait
        if callable(ours) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray's C++ has put a handler below Python's, which aborts after 3 s
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # a SIGHUP that came meanwhile arrives now


def _in_slices(wait: Callable[..., int], *where: str, timeout_ms: int) -> int:
    """Waits as `wait`, Ray's for the port of a process that starts, which keeps Python's lock: no signal is heard meanwhile."""
    until = time.monotonic() + timeout_ms / 1000
    while True:
        try:
            return wait(*where, timeout_ms=min(timeout_ms, SLICE_MS))
        except RuntimeError:
            if time.monotonic() >= until:
                raise
        hidden = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # one that came meanwhile arrives now
        signal.pthread_sigmask(signal.SIG_SETMASK, hidden)


@contextmanager
def existing_ray(address: str) -> Iterator[None]:
    """Connects to the Ray at `address` (as `ray start` prints it, or `auto`), and disconnects at the end.

    Raises FailedPrecondition within seconds if no Ray answers there, or one that refuses this process. Raises Unavailable if
    Ray cannot connect for another reason.
    """
    import ray

    check_ray(address)
    try:
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, job_config=_job_config())
    except Exception as error:
        ray.shutdown()
        raise Unavailable(f"cannot connect to the Ray at {address}: {_one_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _job_config() -> JobConfig:
    """Returns Ray's description of this process, without its working directory and the folder of its script.

    Ray would put both first on the path of every worker. In a folder that holds a clone called `moiety`, workers would
    import that folder instead of the package.
    """
    from ray.job_config import JobConfig

    class NoFolders(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:  # the question by which Ray decides to leave them out
            return True

    return NoFolders()


@contextmanager
def _slowness_told(progress: Progress) -> Iterator[None]:
    """Tells `progress` if the block takes longer than SLOW_S."""
    done = threading.Event()

    def tell() -> None:
        if not done.wait(SLOW_S):
            progress("Ray: still starting; its first start in a fresh environment can take a minute")

    spawn_thread("slow start of Ray", tell).start()
    try:
        yield
    finally:
        done.set()


def _one_line(error: Exception) -> str:
    """Returns the start of an error of Ray's, whose texts may be pages long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"


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
def environment(
    values: Mapping[str, str],
    defaults: Mapping[str, str] = MappingProxyType({}),
    without: Collection[str] = (),
) -> Iterator[None]:
    """Inside the context, sets `values`, and those of `defaults` that the user has not set, and removes those in `without`."""
    changed = {**{name: value for name, value in defaults.items() if name not in os.environ}, **values}
    before = {name: os.environ.get(name) for name in (*changed, *without)}
    for name in without:
        os.environ.pop(name, None)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
