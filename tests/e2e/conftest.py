"""One Ray cluster for the whole test session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import ray
from ray import serve

from support.ray_head import RayHead, started_head


@pytest.fixture(scope="session")
def ray_head(tiny: Callable[[str], str]) -> Iterator[RayHead]:
    """Starts a Ray head node and connects this process to it."""
    with started_head(tiny("mixtral")) as head:
        ray.init(address=head.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield head
        finally:
            serve.shutdown()
            ray.shutdown()
