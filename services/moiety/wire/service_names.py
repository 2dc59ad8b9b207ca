"""The full names of the gRPC services, read from their protos: for servers, health and reflection, and for raw calls."""

from __future__ import annotations

from moiety.internal.v1 import engine_pb2, experts_pb2, gateway_pb2
from moiety.v1 import generation_pb2

EXPERT_SERVICE: str = experts_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name
ENGINE_SERVICE: str = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name
GATEWAY_SERVICE: str = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name
GENERATION_SERVICE: str = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
