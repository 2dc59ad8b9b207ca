"""Moiety serves Mixture-of-Experts language models as elastic microservices."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moiety.local.llm import LLM

# Set before anything imports grpc, which otherwise logs connections that ended normally.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports `LLM`, which needs the extra `serve` and torch, when it is first asked for."""
    if name == "LLM":
        return import_module("moiety.local.llm").LLM
    raise AttributeError(f"module 'moiety' has no attribute {name!r}")
