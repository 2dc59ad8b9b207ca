"""Manuals that are translated: one archive gives texts in several languages."""

from __future__ import annotations

from moiety.training.cleaning import html_pages, markdown
from moiety.training.cleaning.json_sheets import electron
from moiety.training.sources.source import Archive, Source

_LOCALES = {"english": "en", "german": "de", "french": "fr", "spanish": "es"}

_APACHE = Archive(
    "debian",
    "apache2-doc",
    "2.4.71-1~deb12u1",
    "apache2-doc_2.4.71-1~deb12u1_all.deb",
    "a7b3d1131c1c63dbf9999b28e75f9a133d30f70492b419936bd51759ac77a01f",
)
_ELECTRON = Archive(
    "npm",
    "electron-i18n",
    "1.3136.0",
    "electron-i18n-1.3136.0.tgz",
    "4deb99ca165f8dea82f50543cd11b43b1bdeb90f7c17f12a12747a68342eac65",
)
_FASTAPI = Archive(
    "pypi",
    "fastapi",
    "0.110.2",
    "fastapi-0.110.2.tar.gz",
    "b53d673652da3b65e8cd787ad214ec0fe303cad00d2b529b86ce7db13f17518d",
)


def apache(domain: str, most: int | None = None) -> Source:
    """Returns the manual of the Apache HTTP Server in the language of a domain."""
    return Source(
        name="apache-manual",
        domain=domain,
        archive=_APACHE,
        licence="Apache-2.0",
        stated="debian/copyright, in the package",
        attribution="Apache HTTP Server documentation. Copyright The Apache Software Foundation.",
        files=(f"usr/share/doc/apache2-doc/manual/{_LOCALES[domain]}/**/*.html",),
        clean=html_pages.clean,
        most=most,
        sift=True,
    )


def electron_manual(domain: str) -> Source:
    """Returns Electron's documentation in the language of a domain."""
    locale = _LOCALES[domain]
    return Source(
        name="electron-manual",
        domain=domain,
        archive=_ELECTRON,
        licence="BSD-3-Clause",
        stated="the file license of the package",
        attribution="Electron documentation and its translations (electron-i18n). Copyright 2017 GitHub.",
        files=("package/dist/docs.json",),
        clean=electron(f"{locale}-{locale.upper()}"),
        sift=True,
    )


def fastapi(domain: str) -> Source:
    """Returns FastAPI's documentation in the language of a domain."""
    return Source(
        name="fastapi-manual",
        domain=domain,
        archive=_FASTAPI,
        licence="MIT",
        stated="the file LICENSE of the package",
        attribution="FastAPI documentation and its translations. Copyright 2018 Sebastián Ramírez.",
        files=(f"*/docs/{_LOCALES[domain]}/docs/**/*.md",),
        clean=markdown.clean,
        sift=True,
    )
