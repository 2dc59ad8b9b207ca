"""German: manuals, and messages of programs."""

from __future__ import annotations

from moiety.training.cleaning import markdown
from moiety.training.sources.manuals import apache, electron_manual, fastapi
from moiety.training.sources.messages import messages
from moiety.training.sources.source import Archive, Source

BACKUPS = Source(
    name="iobroker-backitup",
    domain="german",
    archive=Archive(
        "npm",
        "iobroker.backitup",
        "4.0.4",
        "iobroker.backitup-4.0.4.tgz",
        "bab68e761a4c3e33ab98bfb58d546c39975b24c22a3fc0ded88f6e01957115c5",
    ),
    licence="MIT",
    stated="the file LICENSE of the package",
    attribution="ioBroker.backitup: manual. Copyright simatec.",
    files=("package/docs/de/**/*.md",),
    clean=markdown.clean,
    sift=True,
)
GERMAN = (fastapi("german"), apache("german"), electron_manual("german"), BACKUPS, *messages("german"))
