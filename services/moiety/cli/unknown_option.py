"""What an error says of an option that a command does not have: the one that may be meant."""

from __future__ import annotations

import click

from moiety.core.text import similar

# Options of several commands that mean the same to a reader.
_ALIKE = (
    ("--address", "--url", "--registry", "--ray-address", "--host", "--server"),
    ("--max-tokens", "--max-new-tokens", "--new-tokens", "--new", "--output-tokens"),
    ("--seconds", "--minutes", "--hours", "--duration"),
    ("--out", "--output", "--json"),
    ("--concurrency", "--max-in-flight", "--parallel"),
)


def message_of(error: click.ClickException) -> str:
    """Returns what to print of an error of usage."""
    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error.format_message()
    name, context = error.option_name, error.ctx
    root = context.find_root()
    if name in _options(root):
        return f"No such option {name!r} here; it goes before the command: {root.command_path} {name} …"
    known = _options(context)
    near = [each for group in _ALIKE if name in group for each in group if each in known] or similar(name, known)
    if not near and "--set" in known:
        near = _settings(name)
    return f"No such option {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


def _options(context: click.Context) -> list[str]:
    return [
        name for each in context.command.get_params(context) if isinstance(each, click.Option) for name in each.opts
    ]


def _settings(option: str) -> list[str]:
    """Returns how --set gives the settings that may be meant by an option of that name."""
    from moiety.config.application import AppSettings
    from moiety.config.validate import leaves, meant_by

    single = {name for name, _ in leaves(AppSettings)}
    meant = meant_by(AppSettings, option.strip("-").replace("-", "_"))
    return [f"--set {name}=…" for name in meant if name in single]
