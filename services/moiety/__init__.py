"""Moiety serves Mixture-of-Experts language models as elastic microservices."""

import os

# Set before anything imports grpc, which otherwise logs connections that ended normally.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__version__ = "0.1.0"
