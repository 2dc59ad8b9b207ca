"""`python -m moiety_kernels.cpu` builds the C++ kernels; with `--check` it only prints what a replica would use."""

from __future__ import annotations

import argparse
import os
import sys
import time

from moiety_kernels.cpu.build import BuildError, build
from moiety_kernels.cpu.library import SWITCH, VNNI, cpu_flags, find


def main() -> int:
    """Runs the command and returns its exit status: 0 where the kernels can be used or `--optional` is given, else 1."""
    parser = argparse.ArgumentParser(prog="python -m moiety_kernels.cpu", description=__doc__)
    parser.add_argument("--check", action="store_true", help="build nothing; print what a replica would use")
    parser.add_argument(
        "--optional", action="store_true", help="exit with 0 even if the kernels cannot be built or used"
    )
    options = parser.parse_args()
    if not options.check:
        began = time.monotonic()
        try:
            print(f"C++ kernels: {build()} ({time.monotonic() - began:.1f} s)")
        except BuildError as error:
            print(f"C++ kernels: {error}", file=sys.stderr)
            return 0 if options.optional else 1
    path, problem = find()
    if os.environ.get(SWITCH) == "off":
        path, problem = None, f"{SWITCH}=off"
    if path is None:
        print(f"used: torch ({problem})")
        return 0 if options.optional else 1
    rows = ", int8 rows" if cpu_flags() >= VNNI else ""
    print(f"used: {path} for float32, bfloat16, int8, int4, fp8, mxfp4{rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
