"""What a source of texts is: which archive of a registry, which files of it, how they are cleaned, and whose they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Registry = Literal["pypi", "debian", "debian source", "npm"]
Cleaner = Callable[[Sequence[Path]], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Archive:
    """A file of a package registry. `sha256` is in hexadecimal; `python` is a version that a wheel can be installed on.

    Of a Debian source package, `version` is the upstream one: its archive stays when Debian adds a correction of its own.
    """

    registry: Registry
    package: str
    version: str
    file: str
    sha256: str
    python: str = "3.11"

    @property
    def title(self) -> str:
        """Registry, package and version in words."""
        return f"{self.package} {self.version} ({_REGISTRIES[self.registry]})"


@dataclass(frozen=True, slots=True)
class Source:
    """Texts of one domain that come from one archive.

    licence: SPDX id, or "public domain"; stated: where the package says so; attribution: the line that goes with the
    weights; files: patterns below the unpacked archive, less those of `without`; most: characters that are taken at most,
    None = all; sift: whether paragraphs in other languages and repeated ones are left out, as translated manuals need it.
    """

    name: str
    domain: str
    archive: Archive
    licence: str
    stated: str
    attribution: str
    files: tuple[str, ...]
    clean: Cleaner
    most: int | None = None
    sift: bool = False
    without: tuple[str, ...] = ()


_REGISTRIES: dict[Registry, str] = {
    "pypi": "PyPI",
    "debian": "Debian",
    "debian source": "Debian, source",
    "npm": "npm",
}
