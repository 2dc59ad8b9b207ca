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
from moiety.model.tiny import write_tiny

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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 8 experts that decodes in milliseconds."""
    return write_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process is connected to a Ray of its own. Replicas inherit the environment from here."""
    folder = Path(tempfile.mkdtemp(prefix="moiety-ray-"))  # short: Unix socket paths end at 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOIETY_CACHE", str(tmp_path_factory.mktemp("cache")))
        with local_ray(folder=folder):
            yield
    shutil.rmtree(folder, ignore_errors=True)
