"""Fails when the committed protobuf stubs are not what protos/ generates; `make proto` mends it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Regenerates into a scratch folder and compares file by file."""
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("protos/moiety/wire/*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", *outputs, *protos], cwd=ROOT, check=True)
        fresh = {path.name: path.read_text() for path in Path(scratch).glob("moiety/wire/*_pb2*")}
    committed = {path.name: path.read_text() for path in (ROOT / "services/moiety/wire").glob("*_pb2*")}
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if stale:
        print(f"stale generated files: {', '.join(stale)}; run `make proto` and commit", file=sys.stderr)
        return 1
    print(f"stubs: {len(fresh)} files are current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
