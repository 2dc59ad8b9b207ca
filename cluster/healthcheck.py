"""Docker's HEALTHCHECK: exits 0 if this machine's gateway reports SERVING by the gRPC health protocol, else 1."""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def serving(address: str, timeout_s: float = 3.0) -> bool:
    """Whether the server at `address` (host:port) reports SERVING for the whole server within `timeout_s` seconds."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving("127.0.0.1:" + os.environ.get("MOIETY_GATEWAY__PORT", "50051")) else 1)
