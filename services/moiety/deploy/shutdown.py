"""Ends an application on the connected Ray, and tells how far it is.

The replicas keep the order themselves (`compose/departure.py`): the gateways refuse new requests and finish those that run,
then the routers end, then the expert replicas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from math import inf
from typing import Any, TypeVar

import grpc

from moiety.core.supervise import spawn_thread
from moiety.core.system import SystemId
from moiety.deploy.ray_cluster import Progress
from moiety.errors import MoietyError, Unavailable
from moiety.internal.v1.engine_pb2 import DescribeEngineRequest
from moiety.internal.v1.engine_pb2_grpc import EngineServiceStub
from moiety.registry.connect import connect, live_systems
from moiety.wire.channels import channel

Answer = TypeVar("Answer")
POLL_S = 0.2
COUNT_S = 1.0  # between two counts of the running requests
STILL_S = 10.0  # between two lines that say the same
ASK_S = 1.0  # a router may take so long to answer
CONTROLLER_S = 3.0  # Serve's controller may, which is busy while it restarts many replicas
TRIES = 3
EXTRA_S = 10.0  # beyond `drain_s`, in which Serve gives a replica time to close


def end_application(
    app: str, progress: Progress, *, registry: str = "", hurried: Callable[[], bool] = lambda: False
) -> bool:
    """Ends application `app`, and waits until its replicas have ended. Returns whether they have.

    They refuse new requests and give running ones up to `drain_s` seconds to finish. `hurried()`, which is asked all the
    time: whether to wait no longer. `progress` gets a line whenever the number of running requests changes; they are counted
    if the URL of the application's `registry` is given. It also hears if Serve does not answer, which ends the wait.
    """
    try:
        return _end(app, progress, registry, hurried)
    except Unavailable as error:
        progress(f"{app}: not known whether it has ended: {error}")
        return False


def _end(app: str, progress: Progress, registry: str, hurried: Callable[[], bool]) -> bool:
    """As `end_application`. Raises Unavailable if Serve's controller does not answer any more."""
    from ray import serve

    applications = _applications(1 if hurried() else TRIES)
    if app not in applications:
        return True
    began = counted_at = time.monotonic()
    until = began + grace_s(applications[app])
    _asked(lambda: serve.delete(app, _blocking=False))
    said, said_at = "", -inf
    while (now := time.monotonic()) < until and not hurried():
        if now >= counted_at:
            counted_at = now + COUNT_S
            if app not in _applications():
                progress(f"{app}: ended")
                return True
            running = asyncio.run(running_requests(registry, app)) if registry else 0
            what = f"{running} request{'s' * (running != 1)}, " if registry else ""
            if what != said or now >= said_at + STILL_S:
                said, said_at = what, now
                progress(f"draining: {what}{max(0.0, until - EXTRA_S - now):.0f} s left")
        time.sleep(POLL_S)
    return app not in _applications()


def grace_s(details: Mapping[str, Any]) -> float:
    """Returns the longest time that Serve gives a replica of an application to end, in seconds."""
    deployments = details["deployments"].values()
    return max((each["deployment_config"]["graceful_shutdown_timeout_s"] for each in deployments), default=0.0)


async def is_ending(app: str) -> bool:
    """Whether Serve ends all of application `app`; False if it only replaces or scales some. For a replica."""
    from ray.serve.schema import ApplicationStatus

    try:
        applications = await asyncio.to_thread(_applications, 1)
    except Exception:  # the controller may be gone: whatever it raises then, this replica must still drain
        return True
    return app not in applications or applications[app]["status"] == ApplicationStatus.DELETING


async def running_requests(registry: str, app: str) -> int:
    """Returns how many sequences the routers of application `app` run or queue; those that do not answer count as none."""
    try:
        counts = [await _at_routers(registry, system) for system in await live_systems(registry, app)]
    except MoietyError:
        return 0
    return sum(counts)


async def _at_routers(registry: str, system: SystemId) -> int:
    store = connect(registry, system)
    try:
        routers = await store.routers()
    finally:
        await store.close()
    return sum(await asyncio.gather(*(_at_router(router.address) for router in routers)))


async def _at_router(address: str) -> int:
    async with channel(address) as link:
        try:
            load = await EngineServiceStub(link).DescribeEngine(DescribeEngineRequest(), timeout=ASK_S)
        except grpc.RpcError:
            return 0
    return int(load.running + load.waiting)


def _applications(tries: int = TRIES) -> Mapping[str, Any]:
    """Returns what Serve's controller tells about each application: name -> status, deployments with their options.

    Raises Unavailable if it does not answer `tries` times in a row, for CONTROLLER_S each.
    """
    for _ in range(tries - 1):
        with suppress(Unavailable):
            return _asked(_details)
    return _asked(_details)


def _asked(question: Callable[[], Answer]) -> Answer:
    """Returns the answer to a question to Ray. Raises Unavailable if it takes longer than CONTROLLER_S, or fails.

    Ray itself waits a minute for a cluster that is gone, and then ends the process.
    """
    from ray.exceptions import RayError

    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    spawn_thread("question to Serve", ask).start()
    try:
        return answer.result(CONTROLLER_S)
    except (RayError, TimeoutError) as error:
        raise Unavailable(f"Serve's controller does not answer ({type(error).__name__})") from None


def _details() -> Mapping[str, Any]:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    except ValueError:  # Serve does not run
        return {}
    applications: Mapping[str, Any] = ray.get(controller.get_serve_instance_details.remote())["applications"]
    return applications
