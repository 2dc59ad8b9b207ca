"""What the environment of every service's process should hold before it starts; what the user has set wins."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PROCESS_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "OMP_WAIT_POLICY": "passive",  # replicas share cores: a spinning one steals from the others
        "HF_HUB_OFFLINE": "1",  # checkpoints are folders; nothing is ever downloaded
        "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for what torch allocates at once in many megabytes
        "GRPC_VERBOSITY": "NONE",
    }
)
