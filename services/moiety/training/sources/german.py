"""German: manuals, and messages of programs."""

from __future__ import annotations

from moiety.training.cleaning import markdown
from moiety.training.sources.manuals import apache, electron_manual, fastapi
from moiety.training.sources.messages import messages
from moiety.training.sources.source import Archive, Source


def _adapter(name: str, version: str, sha256: str, owner: str) -> Source:
    """Returns the manual of a part of ioBroker, a program for smart homes."""
    package = f"iobroker.{name}"
    return Source(
        name=f"iobroker-{name}",
        domain="german",
        archive=Archive("npm", package, version, f"{package}-{version}.tgz", sha256),
        licence="MIT",
        stated="the file LICENSE of the package",
        attribution=f"ioBroker.{name}: manual. Copyright {owner}.",
        files=("package/docs/de/**/*.md",),
        clean=markdown.clean,
        sift=True,
    )


GERMAN = (
    fastapi("german"),
    apache("german"),
    electron_manual("german"),
    _adapter(
        "javascript", "9.1.1", "e2f797ad9e6d300ed54e8fbc916c0fa31b14404827a6ed69d87737bdf494cd28", "bluefox and others"
    ),
    _adapter("mqtt", "6.1.4", "b4299976f5023c3f2c0167ea94d65995af8c157fcc2b4fbb988ec2ceed6d4f54", "bluefox and others"),
    _adapter(
        "backitup", "4.0.4", "bab68e761a4c3e33ab98bfb58d546c39975b24c22a3fc0ded88f6e01957115c5", "simatec and others"
    ),
    *messages("german"),
)
