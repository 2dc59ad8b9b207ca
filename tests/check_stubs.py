"""Fails when the committed protobuf stubs differ from what `protos/` generates; `make proto` regenerates them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Generates the stubs into a scratch folder and compares them file by file; returns the exit status."""
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("protos/**/*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", *outputs, *protos], cwd=ROOT, check=True)
        fresh = _stubs(Path(scratch))
    committed = _stubs(ROOT / "services")
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if stale:
        print(f"stale generated files: {', '.join(stale)}; run `make proto` and commit", file=sys.stderr)
        return 1
    print(f"stubs: {len(fresh)} files are current")
    return 0


def _stubs(root: Path) -> dict[str, str]:
    found = (path for path in root.glob("moiety/**/*_pb2*.py*") if path.suffix != ".pyc")
    return {str(path.relative_to(root)): path.read_text() for path in found}


if __name__ == "__main__":
    sys.exit(main())
