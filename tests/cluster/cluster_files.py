"""Reads the files of cluster/, and calls Ray's own checks of them; no tests here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import yaml

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray declares its settings in pydantic's old way
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.serve.schema import LoggingConfig, ServeApplicationSchema, ServeDeploySchema

__all__ = [
    "CLUSTER",
    "REPOSITORY",
    "Config",
    "LoggingConfig",
    "ServeApplicationSchema",
    "ServeDeploySchema",
    "launch_check",
    "load",
]

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
Config = dict[str, Any]


def load(name: str) -> Config:
    """Returns the content of the YAML file `name` of cluster/."""
    loaded: Config = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


def launch_check(config: Config) -> None:
    """Runs the checks that `ray up` makes before it touches a machine; raises if one fails."""
    validate_config(prepare_config(config))
