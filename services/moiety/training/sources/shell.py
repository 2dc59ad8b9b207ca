"""Shell: scripts, manuals of programs for the terminal, and examples of commands."""

from __future__ import annotations

from moiety.training.cleaning import examples, markdown, shell_scripts
from moiety.training.sources.source import Archive, Source

_LICENSE = "the file LICENSE of the package"

_LIBPOD = Archive(
    "debian source",
    "libpod",
    "4.3.1+ds1",
    "libpod_4.3.1+ds1.orig.tar.xz",
    "2785fcade807395d6d1bf2a31a910cf051f2b3e723e98109dfe1803236a76e50",
)
_PODMAN = "Podman. Copyright the Podman authors (containers/podman)."

SHELL = (
    Source(
        name="aws-examples",
        domain="shell",
        archive=Archive(
            "pypi",
            "awscli",
            "1.46.3",
            "awscli-1.46.3-py3-none-any.whl",
            "94c561c1b1b2cf0978ec8d87d956c26c807555438593eec29ea90602b9518cfb",
        ),
        licence="Apache-2.0",
        stated="the file LICENSE.txt of the package",
        attribution="AWS Command Line Interface: examples. Copyright Amazon.com, Inc. or its affiliates.",
        files=("awscli/examples/**/*.rst",),
        clean=examples.clean_rst,
    ),
    Source(
        name="azure-examples",
        domain="shell",
        archive=Archive(
            "pypi",
            "azure-cli",
            "2.91.0",
            "azure_cli-2.91.0-py3-none-any.whl",
            "998f2b7812e553520c0f4c7bbb8420487d83f9930711cef335401c1f3fc5e0b6",
        ),
        licence="MIT",
        stated="metadata of the package",
        attribution="Azure CLI: help of its commands. Copyright Microsoft Corporation.",
        files=("**/_help.py",),
        clean=examples.clean_help,
    ),
    Source(
        name="zsh-functions",
        domain="shell",
        archive=Archive(
            "debian",
            "zsh-common",
            "5.9-4",
            "zsh-common_5.9-4_all.deb",
            "4f263aa88910f750965b1a83dcbca1355b2cf509acffe96cc2d856333909a7b5",
        ),
        licence="MIT-Modern-Variant",
        stated="debian/copyright, in the package; functions under the GPL are left out",
        attribution="Zsh: functions. Copyright 1992-2022 The Zsh Development Group.",
        files=("usr/share/zsh/functions/**/*",),
        without=("**/_darcs", "**/_osc", "**/_zypper", "**/*.zwc"),
        clean=shell_scripts.clean,
        most=2_000_000,
    ),
    Source(
        name="bazel-scripts",
        domain="shell",
        archive=Archive(
            "debian source",
            "bazel-bootstrap",
            "4.2.3+ds",
            "bazel-bootstrap_4.2.3+ds.orig.tar.xz",
            "12da647c178ca4d5925a33c496cc3579db336be3aa6421a4319dc9238d40a1ff",
        ),
        licence="Apache-2.0",
        stated=_LICENSE,
        attribution="Bazel: scripts. Copyright The Bazel Authors.",
        files=("src/**/*.sh",),
        clean=shell_scripts.clean,
    ),
    Source(
        name="podman-manual",
        domain="shell",
        archive=_LIBPOD,
        licence="Apache-2.0",
        stated=_LICENSE,
        attribution=_PODMAN,
        files=("*/docs/**/*.md",),
        clean=markdown.clean_whole,
    ),
    Source(
        name="podman-scripts",
        domain="shell",
        archive=_LIBPOD,
        licence="Apache-2.0",
        stated=_LICENSE,
        attribution=_PODMAN,
        files=("**/*.sh", "**/*.bats", "**/*.bash"),
        without=("*/vendor/**/*", "*/completions/**/*"),
        clean=shell_scripts.clean,
    ),
    Source(
        name="docker-manual",
        domain="shell",
        archive=Archive(
            "debian source",
            "docker.io",
            "20.10.24+dfsg1",
            "docker.io_20.10.24+dfsg1.orig-cli.tar.xz",
            "670549697a76b1c0ade0c41c79381a62c608d6ef829f8f45842a830d5ce189b7",
        ),
        licence="Apache-2.0",
        stated=_LICENSE,
        attribution="Docker CLI: documentation. Copyright Docker, Inc.",
        files=("**/docs/**/*.md",),
        clean=markdown.clean_whole,
    ),
    Source(
        name="openssh-scripts",
        domain="shell",
        archive=Archive(
            "debian source",
            "openssh",
            "9.2p1",
            "openssh_9.2p1.orig.tar.gz",
            "3f66dbf1655fb45f50e1c56da62ab01218c228807b21338d634ebcdf9d71cf46",
        ),
        licence="BSD-2-Clause",
        stated="the file LICENCE of the package: BSD or freer; the headers of the scripts",
        attribution="OpenSSH: its tests. Copyright the OpenSSH authors.",
        files=("**/*.sh",),
        clean=shell_scripts.clean,
    ),
    Source(
        name="diskimage-scripts",
        domain="shell",
        archive=Archive(
            "pypi",
            "diskimage-builder",
            "3.43.0",
            "diskimage_builder-3.43.0-py3-none-any.whl",
            "ece951ea63ea0ea55ecb4c4a75d6d453dc5e77c5558aace3dee883fa0e2dd039",
        ),
        licence="Apache-2.0",
        stated=_LICENSE,
        attribution="diskimage-builder: scripts. Copyright the OpenStack contributors.",
        files=("**/*.d/*", "**/*.sh", "**/*.bash"),
        clean=shell_scripts.clean,
    ),
)
