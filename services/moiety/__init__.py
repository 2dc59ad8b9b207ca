"""Moiety serves Mixture-of-Experts language models as elastic microservices."""

import os

# Before anything imports grpc: its chatter about connections that end as they should is no news.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__version__ = "0.1.0"
