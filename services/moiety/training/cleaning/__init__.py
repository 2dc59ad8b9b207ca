"""Turns files of packages into plain text: one module a kind of file, each of which yields documents."""
