"""Unpacks archives without running anything of them."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a wheel, a Debian package or a tar file into `folder`. Links are left out, and so is what leads out of it.

    Raises ValueError for other kinds of files.
    """
    name = archive.name
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    elif name.endswith(".deb"):
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    elif name.endswith((".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")):
        with tarfile.open(archive) as opened_tar:
            files = [member for member in opened_tar if member.isfile()]
            opened_tar.extractall(folder, members=files, filter="data")
    else:
        raise ValueError(f"{name} is no archive of a known kind: .whl, .deb, .tgz, .tar.gz, .tar.xz, .tar.bz2")
