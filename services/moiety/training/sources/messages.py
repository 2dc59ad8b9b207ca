"""Translated programs: their messages and help pages, in German and Spanish. Sentences rather than texts, in plain words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moiety.training.cleaning import html_pages, translations
from moiety.training.sources.source import Archive, Cleaner, Source

_LOCALES = {"german": "de", "spanish": "es"}
_METADATA = "metadata of the package"


@dataclass(frozen=True, slots=True)
class _Program:
    """A program of which one archive holds several languages. In `files`, {l} is de or es, {full} de_DE or es_ES."""

    name: str
    archive: Archive
    licence: str
    stated: str
    attribution: str
    files: tuple[str, ...]
    clean: Cleaner = translations.clean

    def source(self, domain: str) -> Source:
        """Returns the source of its texts in the language of a domain."""
        locale = _LOCALES[domain]
        return Source(
            name=self.name,
            domain=domain,
            archive=self.archive,
            licence=self.licence,
            stated=self.stated,
            attribution=self.attribution,
            files=tuple(pattern.format(l=locale, full=f"{locale}_{locale.upper()}") for pattern in self.files),
            clean=self.clean,
            sift=True,
        )


_PROGRAMS = (
    _Program(
        name="home-assistant",
        archive=Archive(
            "pypi",
            "homeassistant",
            "2026.2.3",
            "homeassistant-2026.2.3-py3-none-any.whl",
            "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
            python="3.14",
        ),
        licence="Apache-2.0",
        stated=_METADATA,
        attribution="Home Assistant: translations. Copyright Open Home Foundation and its translators.",
        files=("homeassistant/components/*/translations/{l}.json",),
    ),
    _Program(
        name="home-assistant-2024",  # with messages of parts that are gone
        archive=Archive(
            "pypi",
            "homeassistant",
            "2024.6.4",
            "homeassistant-2024.6.4-py3-none-any.whl",
            "28e53f0a4b99acd78960a3e31cd23baa9ebc6a7ead5a5cb33f43855cc1c04306",
            python="3.12",
        ),
        licence="Apache-2.0",
        stated=_METADATA,
        attribution="Home Assistant: translations. Copyright Home Assistant's authors and translators.",
        files=("homeassistant/components/*/translations/{l}.json",),
    ),
    _Program(
        name="mayan",
        archive=Archive(
            "pypi",
            "mayan-edms",
            "3.5.12",
            "mayan_edms-3.5.12-py2.py3-none-any.whl",
            "dad426cb1997a0db06f53d20dfcb419c5c68dc166789df9715b388c006d637b0",
        ),
        licence="Apache-2.0",
        stated=_METADATA,
        attribution="Mayan EDMS: translations. Copyright Roberto Rosario and contributors.",
        files=("mayan/apps/*/locale/{l}/LC_MESSAGES/*.mo", "mayan/apps/*/locale/{full}/LC_MESSAGES/*.mo"),
    ),
    _Program(
        name="typescript",
        archive=Archive(
            "npm",
            "typescript",
            "5.9.3",
            "typescript-5.9.3.tgz",
            "10e108c9cf7d5f2879053dff18515fb405abf2ccef63eaaf017d9c571687a1d3",
        ),
        licence="Apache-2.0",
        stated="the file LICENSE.txt of the package",
        attribution="TypeScript: messages. Copyright Microsoft Corporation.",
        files=("package/lib/{l}/diagnosticMessages.generated.json",),
    ),
    _Program(
        name="scratch",
        archive=Archive(
            "npm",
            "scratch-l10n",
            "3.18.357",
            "scratch-l10n-3.18.357.tgz",
            "0b4f4e44428639e733f628cd446f1b7e29f1eb076d55a5fc2c705cf99221a9d4",
        ),
        licence="BSD-3-Clause",
        stated="the file LICENSE of the package; later versions are under another licence",
        attribution="Scratch: translations of its pages and editor. Copyright Massachusetts Institute of Technology.",
        files=("package/www/*/{l}.json", "package/editor/*/{l}.json"),
    ),
    _Program(
        name="pretix",
        archive=Archive(
            "pypi",
            "pretix",
            "3.16.0",
            "pretix-3.16.0-py3-none-any.whl",
            "87e2f0f65bdf5535fd1ff9c8f581c246c21deb40be9033335bda609ceec48504",
        ),
        licence="Apache-2.0",
        stated="metadata of the package; later versions are under another licence",
        attribution="pretix: translations. Copyright rami.io GmbH, Raphael Michel and contributors.",
        files=("pretix/locale/{l}/LC_MESSAGES/*.po",),
    ),
    _Program(
        name="pretalx",
        archive=Archive(
            "pypi",
            "pretalx",
            "2023.1.3",
            "pretalx-2023.1.3-py3-none-any.whl",
            "098aa0648e22139541f3c2e928b17692715e2733967e729656df90fba211216e",
        ),
        licence="Apache-2.0",
        stated=_METADATA,
        attribution="pretalx: translations. Copyright Tobias Kunze and contributors.",
        files=("pretalx/locale/{full}/LC_MESSAGES/*.po", "pretalx/locale/{l}/LC_MESSAGES/*.po"),
    ),
    _Program(
        name="indico",
        archive=Archive(
            "pypi",
            "indico",
            "3.2.9",
            "indico-3.2.9-py3-none-any.whl",
            "194d2e31ccaabd2b9af7809e67d60d942faee35a6b4de36f0c2c280a32ed84c3",
        ),
        licence="MIT",
        stated=_METADATA,
        attribution="Indico: translations. Copyright European Organization for Nuclear Research (CERN).",
        files=("indico/translations/{full}/LC_MESSAGES/*.po",),
    ),
    _Program(
        name="horizon",
        archive=Archive(
            "pypi",
            "horizon",
            "27.0.0",
            "horizon-27.0.0-py3-none-any.whl",
            "8a981dae4fb6626e71553aa185f6e429b0b1efb86b04b0a72c3b18ee04f1f990",
        ),
        licence="Apache-2.0",
        stated=_METADATA,
        attribution="OpenStack Horizon: translations. Copyright the OpenStack contributors.",
        files=("*/locale/{l}/LC_MESSAGES/*.po",),
    ),
    _Program(
        name="matrix",
        archive=Archive(
            "npm",
            "matrix-react-sdk",
            "3.80.0",
            "matrix-react-sdk-3.80.0.tgz",
            "9a9eefaa2bc185b13d2bffec2948815d1e7b64d5d3a242576d09f3ab5b393523",
        ),
        licence="Apache-2.0",
        stated="the file LICENSE of the package; later versions are under another licence",
        attribution="matrix-react-sdk: translations. Copyright The Matrix.org Foundation C.I.C.",
        files=("package/src/i18n/strings/{full}.json", "package/src/i18n/strings/{l}.json"),
    ),
    _Program(
        name="node-red-help",
        archive=Archive(
            "npm",
            "@node-red/nodes",
            "5.0.7",
            "node-red-nodes-5.0.7.tgz",
            "7f7f66869382f0015f87c88353f1cf3a92754c0e65e64758126e41f995a1f022",
        ),
        licence="Apache-2.0",
        stated="the file LICENSE of the package",
        attribution="Node-RED: help of its nodes. Copyright OpenJS Foundation and other contributors.",
        files=("package/locales/{l}*/**/*.html",),
        clean=html_pages.clean_templates,
    ),
)
_LANGUAGE_PACKS = {
    "german": "ff572e9f8677b33f31c656892acf3ddabf1268dc2387933236ae124021b95675",
    "spanish": "1ca1f39231b9d8dbed64330849b0cbc338e92cb474a583cd4446ddede18b8b34",
}


def _visual_studio_code(domain: str) -> Source:
    """Returns the language pack of Visual Studio Code: each language is an archive of its own."""
    locale = _LOCALES[domain]
    name = f"monaco-vscode-language-pack-{locale}"
    return Source(
        name="visual-studio-code",
        domain=domain,
        archive=Archive("npm", f"@codingame/{name}", "25.1.2", f"codingame-{name}-25.1.2.tgz", _LANGUAGE_PACKS[domain]),
        licence="MIT",
        stated="package.json of the package",
        attribution="Visual Studio Code: translations (vscode-loc). Copyright Microsoft Corporation.",
        files=("package/translations/*.json.js", "package/translations/extensions/*.json"),
        clean=translations.clean,
        sift=True,
    )


def messages(domain: str) -> Iterable[Source]:
    """Yields the sources of messages in the language of a domain, german or spanish."""
    yield _visual_studio_code(domain)
    yield from (program.source(domain) for program in _PROGRAMS)
