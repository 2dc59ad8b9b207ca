"""A gRPC client in Python that knows nothing of Moiety but its protos. Prints what it saw, as one line of JSON.

Run as `grpc_program.py ACTION ADDRESS`, with the folder of the stubs that protoc made of generation.proto on PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import generation_pb2
import generation_pb2_grpc
import grpc


def request(**sampling: Any) -> generation_pb2.GenerateRequest:
    """Returns a request for one prompt."""
    return generation_pb2.GenerateRequest(text="Each expert", sampling=generation_pb2.SamplingParams(**sampling))


def stream(stub: generation_pb2_grpc.GenerationServiceStub) -> dict[str, Any]:
    """Lists the models and reads one generation to its end."""
    models = stub.ListModels(generation_pb2.ListModelsRequest(), timeout=20)
    messages = list(stub.Generate(request(temperature=0.9, seed=3, max_tokens=12), timeout=20))
    return {
        "models": [model.name for model in models.models],
        "text": "".join(message.text for message in messages),
        "ids": [token for message in messages for token in message.token_ids],
        "reason": generation_pb2.FinishReason.Name(messages[-1].finish_reason),
        "completion_tokens": messages[-1].usage.completion_tokens,
        "timed": messages[-1].HasField("timings"),
    }


def cancel(stub: generation_pb2_grpc.GenerationServiceStub) -> dict[str, Any]:
    """Cancels a generation after its first message."""
    call = stub.Generate(request(max_tokens=1000, ignore_eos=True), timeout=20)
    next(call)
    call.cancel()
    return failure(call)


def wrong(stub: generation_pb2_grpc.GenerationServiceStub) -> dict[str, Any]:
    """Asks for a temperature that is out of bounds."""
    return failure(stub.Generate(request(temperature=99.0), timeout=20))


def unknown(stub: generation_pb2_grpc.GenerationServiceStub) -> dict[str, Any]:
    """Asks for a model that is not served."""
    return failure(stub.Generate(generation_pb2.GenerateRequest(text="Each", model="other"), timeout=20))


def refused(stub: generation_pb2_grpc.GenerationServiceStub) -> dict[str, Any]:
    """Asks a full system."""
    return failure(stub.Generate(request(max_tokens=1), timeout=20))


def failure(call: Any) -> dict[str, Any]:
    """Returns how a call fails."""
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        trailers = {key: value for key, value in call.trailing_metadata() or () if key == "retry-after-ms"}
        return {"code": call.code().name, "details": call.details(), **trailers}
    return {"code": "OK"}


def main() -> None:
    """Runs one action."""
    actions = {"stream": stream, "cancel": cancel, "wrong": wrong, "unknown": unknown, "refused": refused}
    with grpc.insecure_channel(sys.argv[2]) as channel:
        seen = actions[sys.argv[1]](generation_pb2_grpc.GenerationServiceStub(channel))
    assert "moiety" not in sys.modules
    print(json.dumps(seen))


main()
