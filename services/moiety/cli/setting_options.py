"""Options for the application's settings: their help and their defaults come from the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from moiety.cli.options import Function
from moiety.config.application import AppSettings
from moiety.config.catalogue import catalogue
from moiety.config.registry_url import RegistryUrl
from moiety.config.resolve import nested, resolve
from moiety.config.validate import leaves
from moiety.config.yaml_text import NotRead, from_yaml

_TEXTS = frozenset(name for name, field in leaves(AppSettings) if field.annotation in (str, RegistryUrl))


class SettingValue(click.ParamType[Any]):
    """Option type: the value of `setting`, as YAML: 64, 4GiB, true, null, {experts-3: {max_replicas: 8}}.

    The value of a text may look like a number or a flag: `--app 7` names the application "7".
    """

    name = "value"

    def __init__(self, setting: str) -> None:
        self.setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            read = from_yaml(value)
        except NotRead as error:
            if self.setting in _TEXTS and str(value).isprintable():
                return value  # the setting's own bound says what is wrong with it
            self.fail(f"must be a value as in YAML; {error}", param, ctx)
        return value if self.setting in _TEXTS and not isinstance(read, str) else read


class Assignment(click.ParamType[dict[str, Any]]):
    """Option type: a setting and its value, as NAME=VALUE; nested settings have dotted names."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        setting, separator, text = str(value).partition("=")
        if not separator or not all(setting.split(".")):
            self.fail("must be NAME=VALUE, such as router.slots=64", param, ctx)
        return nested(setting, SettingValue(setting).convert(text, param, ctx))


def setting_option(option: str, name: str, default: str | None = None) -> Callable[[Function], Function]:
    """Returns a decorator that adds `option` for the application's setting `name`, with the setting's description as help.

    The command receives it as `name` with "__" for each dot, None if not given. `default` replaces the default in the help.
    """
    setting = next(setting for setting in catalogue() if setting.name == name)
    text = f"{setting.description}  [{name}; default: {default or setting.default}]"
    return click.option(option, name.replace(".", "__"), type=SettingValue(name), help=text)


def settings_of_system(**given: Any) -> AppSettings:
    """Returns the settings of a command about a running system, which needs no `model`. What is None is not given."""
    return resolve({"model": ""} | {name: value for name, value in given.items() if value is not None})
