"""What Moiety uses of Ray beyond its documented API is there: an upgrade of Ray that changes it fails here, with a reason."""

from __future__ import annotations

import inspect

import pytest
from ray._private import node, services, utils
from ray._private.authentication import authentication_token_setup
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.job_config import JobConfig
from ray.serve._private import constants
from ray.serve._private.controller import ServeController


@pytest.mark.parametrize(
    ("used", "parameters", "where"),
    [
        (
            vars(JobConfig)["_runtime_env_has_working_dir"],
            ["self"],
            "ray_cluster.py leaves folders off the workers' path",
        ),
        (utils.set_sigterm_handler, ["sigterm_handler"], "ray_cluster.py keeps this process's handler of SIGTERM"),
        (
            node.wait_for_persisted_port,
            ["dir", "node_id", "port_name", "timeout_ms"],
            "ray_cluster.py hears signals while Ray waits for the port of its head",
        ),
        (services.canonicalize_bootstrap_address, ["addr"], "ray_probe.py finds the address of `auto`"),
        (
            authentication_token_setup.maybe_enable_token_auth_if_token_available,
            ["warn_if_disabled"],
            "ray_probe.py uses a token that is there",
        ),
        (init_grpc_channel, ["address"], "ray_probe.py asks a Ray whether it is alive"),
        (ServeController.get_serve_instance_details, ["self"], "shutdown.py asks what Serve runs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_of_rays_takes_what_it_is_given(used: object, parameters: list[str], where: str) -> None:
    """Each function that deploy/ calls or replaces begins with these parameters."""
    assert callable(used), where
    assert list(inspect.signature(used).parameters)[: len(parameters)] == parameters, where


def test_values_of_rays() -> None:
    """Serve's controller has a name, and a head tells its version when it is asked whether it is alive."""
    assert constants.SERVE_CONTROLLER_NAME
    assert constants.SERVE_NAMESPACE
    assert hasattr(gcs_service_pb2_grpc, "NodeInfoGcsServiceStub")
    assert "ray_version" in gcs_service_pb2.CheckAliveReply.DESCRIPTOR.fields_by_name
