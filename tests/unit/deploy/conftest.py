"""Imports Ray Serve before the test modules do: on loopback only, and past the deprecations of its own making."""

import os
import warnings

os.environ.setdefault(
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"
)  # read on import: a Ray of these tests stays on loopback

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray import serve  # noqa: F401
