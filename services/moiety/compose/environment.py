"""Environment variables for every service's process, set before it starts. Values set by the user win."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PROCESS_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "OMP_WAIT_POLICY": "passive",  # replicas share cores: one that spins takes time from the others
        "HF_HUB_OFFLINE": "1",  # checkpoints are folders; nothing is downloaded
        "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for torch's allocations of many megabytes
        "GRPC_VERBOSITY": "NONE",
    }
)
