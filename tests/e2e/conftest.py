"""One Ray for the session (it takes 5 to 14 s to start), on loopback, with its files in a folder that goes with it."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from moiety.deploy.cluster import LOOPBACK_ONLY, local_ray
from moiety.load.embedded import EmbeddedRedis

os.environ.setdefault(LOOPBACK_ONLY, "0")  # read when Ray is first imported, by whichever test comes first

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of Ray's own making
    from ray import serve  # noqa: F401


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Redis for the session; tests keep apart by the name of their application."""
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """This process is connected to a Ray of its own, whose replicas inherit the environment of this moment."""
    folder = Path(tempfile.mkdtemp(prefix="moiety-ray-"))  # short: Unix socket paths end at 107 characters
    try:
        with local_ray(folder=folder):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
