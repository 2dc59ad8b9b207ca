"""Checks the GPU kernels on this machine's GPU, then times them beside other implementations.

python -m moiety_kernels.bench [--quick] [--json] [--vllm PATH] [--scattermoe PATH]
python -m moiety_kernels.bench --check-only     works without a GPU too, in Triton's interpreter
python -m moiety_kernels.bench --tune           searches tile sizes, prints TABLE of gpu/tiles.py as source
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict

import torch


def main() -> None:
    """Runs the command. Exits with 1 where a kernel is wrong, 2 where there is no GPU to measure on."""
    parser = argparse.ArgumentParser(
        prog="python -m moiety_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="check correctness, measure nothing")
    parser.add_argument("--quick", action="store_true", help="measure three token counts instead of eight")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the table")
    parser.add_argument("--tune", action="store_true", help="search tiles: some 600 compilations for all four models")
    parser.add_argument("--model", action="append", default=[], help="only models whose name contains this; repeatable")
    parser.add_argument("--vllm", metavar="PATH", help="folder to import vLLM from, measured too")
    parser.add_argument("--scattermoe", metavar="PATH", help="folder to import scattermoe from, measured too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        if not options.check_only:
            print("No CUDA device to measure on. --check-only runs the checks in Triton's interpreter.")
            sys.exit(2)
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.exit(run(options, "cuda" if torch.cuda.is_available() else "cpu"))


def run(options: argparse.Namespace, device: str) -> int:
    """Checks the kernels on `device`; if all are right, tunes or measures as `options` say. Returns the exit status."""
    import triton

    from moiety_kernels.bench.check import check_all
    from moiety_kernels.bench.clock import Clock
    from moiety_kernels.bench.peers import scattermoe, vllm
    from moiety_kernels.bench.table import HEADER, measure, summary
    from moiety_kernels.bench.tune import tune
    from moiety_kernels.gpu.models import MODELS

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    name = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    say = (lambda *_: None) if options.json else print
    say(f"{name}: " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    torch.manual_seed(0)
    checked = []
    for check in check_all(device, small=device == "cpu"):
        checked.append(check)
        say(f"{'right' if check.right else 'WRONG':6}{check.what:64}{check.error:10.2e}, bound {check.bound:.1e}")
    result = {"device": name, **versions, "checked": [asdict(check) for check in checked]}
    if not all(check.right for check in checked) or options.check_only:
        if options.json:
            print(json.dumps(result))
        return 0 if all(check.right for check in checked) else 1

    clock, dtype = Clock(device), torch.bfloat16
    models = [model for model in MODELS if any(part.lower() in model.name.lower() for part in options.model or [""])]
    if options.tune:
        for line in tune(models, clock, dtype):
            print(line)
        return 0
    peers = {}
    for peer, make, path in (("vLLM", vllm, options.vllm), ("scattermoe", scattermoe, options.scattermoe)):
        if path is not None:
            try:
                peers[peer] = make(path)
            except Exception as error:  # importing another package can raise anything
                print(f"{peer} not imported from {path}, skipped: {type(error).__name__}: {error}", file=sys.stderr)
    ceilings = clock.ceilings(dtype)
    say(
        f"measured best: {ceilings.matmul / 1e12:.0f} TFLOP/s dense {dtype}, {ceilings.copy / 1e9:.0f} GB/s copy\n\n{HEADER}"
    )
    tokens = (1, 64, 4096) if options.quick else (1, 4, 16, 64, 256, 1024, 4096, 8192)
    rows = []
    for model in models:
        for row in measure(model, tokens, clock, ceilings, dtype, peers):
            rows.append(row)
            say(row)
    for line in summary(rows):
        say(line)
    if options.json:
        print(json.dumps({**result, "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    main()
