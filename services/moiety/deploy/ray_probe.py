"""Asks whether a Ray answers at an address before this process connects to it: Ray's own attempt takes minutes to fail."""

from __future__ import annotations

import os

import grpc

from moiety.errors import FailedPrecondition

ANSWER_S = 5.0
_TOKEN_HELP = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; `ray get-auth-token` on its head prints the token"


def check_ray(address: str) -> None:
    """Returns if a Ray answers at `address`, `auto` or host:port, and takes this process's token; waits up to ANSWER_S.

    Raises FailedPrecondition otherwise, which says what to do.
    """
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    if "://" in address:
        raise _refused(address, "must be auto or host:port of the head, as `ray start` prints it")
    try:
        found = canonicalize_bootstrap_address(address)
    except ConnectionError:
        raise _refused(address, "no Ray runs on this machine: give its head's host:port") from None
    except (ValueError, OSError) as error:
        raise _refused(address, f"must be auto, or host:port of a head: {error}") from None
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does for `auto` alone
    where = f"{found}{_origin()}" if address == "auto" else address
    with init_grpc_channel(found) as channel:
        ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
        try:
            answer = ask(gcs_service_pb2.CheckAliveRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            raise _refused(address, _reason(error.code(), where)) from None
    if answer.ray_version != ray.__version__:
        bound = (
            f"Ray {answer.ray_version} runs at {where}, and Ray {ray.__version__} is installed here: must be the same"
        )
        raise _refused(address, bound)


def _refused(address: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"--ray-address {address}: {why}")


def _reason(code: grpc.StatusCode, where: str) -> str:
    """Returns what a failed question to `where` means."""
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"the Ray at {where} refuses this process's token: {_TOKEN_HELP}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"nothing that is a Ray answered at {where} within {ANSWER_S:g} s: must be host:port of a running head"
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"no Ray answers at {where}: must be host:port of a running head"
    return f"another program than a Ray answers at {where} ({code.name}): must be host:port of a running head"


def _origin() -> str:
    """Returns where `auto` found its address, in words."""
    return ", from RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else ", found on this machine"
