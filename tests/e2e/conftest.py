"""One Ray for the whole run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from moiety.deploy.ray_cluster import LOOPBACK_ONLY
from support.ray_head import RayHead, started_head

os.environ.setdefault(LOOPBACK_ONLY, "0")  # read when Ray is first imported, by whichever test comes first
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
from ray import serve


@pytest.fixture(scope="session")
def ray_head(tiny: Callable[[str], str]) -> Iterator[RayHead]:
    """This process is connected to it."""
    with started_head(tiny("mixtral")) as head:
        ray.init(address=head.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield head
        finally:
            serve.shutdown()
            ray.shutdown()
