"""Imports Ray Serve before the test modules do: on loopback only, without its own deprecation warnings."""

import os
import warnings

# Ray reads this when it is imported: a Ray of these tests stays on loopback.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray import serve  # noqa: F401
