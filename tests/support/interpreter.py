"""Imports the Triton kernels so that they run in Triton's interpreter: on CPU, in numpy, one program at a time."""

from __future__ import annotations

import importlib
import os
import pkgutil
from importlib.util import find_spec

import torch

SWITCH = "TRITON_INTERPRET"


def import_interpreted() -> None:
    """Imports triton and the kernels with the interpreter switched on; does nothing where triton is not installed.

    Triton reads the switch when it is imported, so call this before anything else imports it, as some models of
    transformers do. The environment is restored: processes that the tests start choose for themselves.
    """
    if find_spec("triton") is None:
        return
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        package = importlib.import_module("moiety_kernels.gpu")
        for module in pkgutil.iter_modules(package.__path__, "moiety_kernels.gpu."):
            importlib.import_module(module.name)
        # The first launch of a kernel imports the rest of triton.
        importlib.import_module("moiety_kernels.gpu.row_fp8").quantise_rows(torch.zeros(1, 1))
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
