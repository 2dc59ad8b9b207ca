"""Imports the Triton kernels so that they run in Triton's interpreter: on CPU, in numpy, one program after the other."""

from __future__ import annotations

import importlib
import os
import pkgutil
from importlib.util import find_spec

import torch

SWITCH = "TRITON_INTERPRET"


def import_interpreted() -> None:
    """Must come before anything imports triton, as some of transformers' models do: triton decides when it is imported.

    The environment is left as it was: what this process starts decides for itself.
    """
    if find_spec("triton") is None:
        return
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        package = importlib.import_module("moiety_kernels.gpu")
        for module in pkgutil.iter_modules(package.__path__, "moiety_kernels.gpu."):
            importlib.import_module(module.name)
        importlib.import_module("moiety_kernels.gpu.row_fp8").quantise_rows(
            torch.zeros(1, 1)
        )  # a launch imports the rest
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
