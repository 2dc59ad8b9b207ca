"""Code: Python modules, scripts, and examples of commands."""

from __future__ import annotations

from pathlib import Path

from moiety.training.cleaning import examples, python_code, shell_scripts

MODULE = '"""Adds."""\n\n\n' + "\n\n".join(f"def add_{i}(a, b):\n    return a + b" for i in range(20))


def _file(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_modules_that_are_worth_reading(tmp_path: Path) -> None:
    """A module loses the notice at its top. Tests, tables of numbers, other Pythons and code under the GPL are left out."""
    files = [
        _file(tmp_path, "a.py", "# Copyright 2020 A. Person\n# All rights reserved.\n\n" + MODULE),
        _file(tmp_path, "tests/b.py", MODULE + "\n"),
        _file(tmp_path, "c.py", "x = [" + "12345, " * 40 + "]\n" + MODULE[:20] + '"""'),
        _file(tmp_path, "d.py", MODULE + '\nprint "old"'),
        _file(tmp_path, "e.py", "# GNU General Public License\n" + MODULE),
        _file(tmp_path, "f.py", "x = 1\n"),
    ]
    assert list(python_code.clean(files)) == [MODULE]


def test_a_comment_about_the_code_stays() -> None:
    """Only comments about licences are left out at the top."""
    text = "# Adds two numbers.\n" + MODULE
    assert python_code.without_licence(text) == text


def test_scripts(tmp_path: Path) -> None:
    """A script keeps its first line and loses the notice below it. Binary files and the GPL are left out."""
    body = "\n".join(f'echo "line {number}"' for number in range(10))
    files = [
        _file(tmp_path, "a.sh", f"#!/bin/sh\n# Licensed under the Apache License.\n\n{body}\n"),
        _file(tmp_path, "b.sh", f"#!/bin/sh\n# This is free software: GPLv3\n{body}\n"),
        _file(tmp_path, "c.sh", body + "\0"),
    ]
    assert list(shell_scripts.clean(files)) == [f"#!/bin/sh\n{body}"]


def test_examples_without_what_they_print(tmp_path: Path) -> None:
    """What a command prints is left out, the sentences and commands stay."""
    text = """**To list things**

The following ``list-things`` example lists things. ::

    aws list-things \\
        --all

Output::

    {
        "things": []
    }

For more information, see `Things <https://example.org>`__ in the guide.
"""
    assert list(examples.clean_rst([_file(tmp_path, "a.rst", text)])) == [
        "To list things\n\nThe following `list-things` example lists things.:\n\n    aws list-things \\\n        --all"
    ]


def test_help_of_commands(tmp_path: Path) -> None:
    """Commands stand below comments; groups of commands, and those without examples, are left out."""
    text = '''
helps["group"] = """
type: group
short-summary: A group.
"""
helps["group show"] = """
type: command
short-summary: Show a thing.
examples:
  - name: Show the thing called a.
    text: az group show -n a
"""
'''
    assert list(examples.clean_help([_file(tmp_path, "_help.py", text)])) == [
        "# az group show: Show a thing.\n\n# Show the thing called a.\naz group show -n a"
    ]
