"""The addresses of commands that send requests: those that are given, or those of the system on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from moiety.config.running_systems import RunningSystem, chosen, none_runs, running_systems
from moiety.errors import FailedPrecondition, Unavailable


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """A gateway to send requests to. `hint`: what an error adds if nothing answers there."""

    address: str
    hint: str = ""


def gateway_address(address: str | None, app: str | None, default: str) -> GatewayAddress:
    """Returns the gateway's HOST:PORT: `address` if given, else that of the system on this machine, else `default`.

    Raises FailedPrecondition where several systems run here and `app` names none of them, Unavailable for one that starts.
    """
    if address is not None:
        return GatewayAddress(address)
    if (system := _local(app)) is not None:
        return GatewayAddress(system.grpc[0])
    return GatewayAddress(default, f"; {none_runs()}: start one, or name its gateway with --address HOST:PORT")


def http_url(url: str | None, app: str | None, default: str) -> str:
    """Returns the URL of an OpenAI HTTP API, likewise. Raises FailedPrecondition also if the system here has none."""
    if url is not None:
        return url
    if (system := _local(app)) is None:
        return default
    if not system.http:
        raise FailedPrecondition(f"{system} has no HTTP API: serve it with the setting gateway.http on")
    return f"http://{system.http[0]}"


def _local(app: str | None) -> RunningSystem | None:
    system = chosen(running_systems(), app)
    if system is not None and not system.ready:
        raise Unavailable(f"{system} is not ready yet: `moiety status --watch` shows how far it is")
    if system is None and app is not None:
        raise FailedPrecondition(f"--app {app}: {none_runs()}")
    return system
