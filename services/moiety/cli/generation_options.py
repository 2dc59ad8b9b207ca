"""The options that `moiety generate` and `moiety chat` share. Needs nothing that a plain `pip install moiety` lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

import click

from moiety.cli.arguments import Address, FiniteRange, Text

Function = TypeVar("Function", bound=Callable[..., Any])


class TokenBias(click.ParamType[tuple[int, float]]):
    """Option type: a token id and the bias to add to the token's logit, as ID=BIAS."""

    name = "id=bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        try:
            if isfinite(number := float(bias)):
                return int(token), number
        except ValueError:
            pass
        self.fail(f"{value!r}: must be ID=BIAS, such as 42=-100", param, ctx)


class JsonObject(click.ParamType[dict[str, Any]]):
    """Option type: a JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            given = json.loads(value)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            self.fail(f'{value!r}: must be a JSON object, such as {{"enable_thinking": false}}', param, ctx)
        return given


@dataclass(frozen=True, slots=True)
class _SamplingOption:
    """An option of sampling. `usual` is its default where no publisher's recommendation counts."""

    flag: str
    help: str
    type: click.ParamType[Any] | None = None
    usual: str = ""
    name: str = ""  # of the parameter, where it is not the flag's
    metavar: str | None = None
    multiple: bool = False

    def decorator(self, *, recommended: bool) -> Callable[[Any], Any]:
        names = [self.flag, self.name] if self.name else [self.flag]
        default = "" if recommended or not self.usual else f"  [default: {self.usual}]"
        return click.option(
            *names, type=self.type, help=self.help + default, metavar=self.metavar, multiple=self.multiple
        )


_SAMPLING: Sequence[_SamplingOption] = (
    _SamplingOption(
        flag="--max-tokens",
        type=click.IntRange(1, 2**32 - 1),
        help="Most tokens to generate, within the model's context.",
        usual="128, or what is left of the context",
    ),
    _SamplingOption(
        flag="--temperature",
        type=FiniteRange(0, 10),
        help="0 picks the likeliest token (greedy); 1 samples from the model's own distribution.",
        usual="0",
    ),
    _SamplingOption(
        flag="--top-p",
        type=FiniteRange(0, 1, min_open=True),
        help="Sample from the likeliest tokens whose probabilities add up to this.",
        usual="1",
    ),
    _SamplingOption(
        flag="--top-k",
        type=click.IntRange(0, 2**31 - 1),
        help="Sample from this many of the likeliest tokens; 0: from all.",
        usual="0",
    ),
    _SamplingOption(
        flag="--min-p",
        type=FiniteRange(0, 1),
        help="Drop tokens less likely than this times the likeliest token.",
        usual="0",
    ),
    _SamplingOption(
        flag="--seed",
        type=click.IntRange(0, 2**64 - 1),
        help="The same seed gives the same tokens.",
        usual="drawn for each request",
    ),
    _SamplingOption(
        flag="--repetition-penalty",
        type=FiniteRange(0, 10, min_open=True),
        help="Above 1 makes tokens of the prompt and the output less likely.",
        usual="1",
    ),
    _SamplingOption(
        flag="--presence-penalty",
        type=FiniteRange(-2, 2),
        help="Above 0 makes tokens of the output less likely, once each.",
        usual="0",
    ),
    _SamplingOption(
        flag="--frequency-penalty",
        type=FiniteRange(-2, 2),
        help="Above 0 makes tokens of the output less likely, once per occurrence.",
        usual="0",
    ),
    _SamplingOption(
        flag="--logit-bias",
        type=TokenBias(),
        multiple=True,
        help="Add BIAS, -100 to 100, to the logit of token ID. Repeatable.",
    ),
    _SamplingOption(
        flag="--stop", type=Text(), metavar="TEXT", multiple=True, help="End the output before this text. Repeatable."
    ),
    _SamplingOption(
        flag="--stop-token-id",
        name="stop_token_ids",
        type=click.IntRange(0),
        multiple=True,
        help="End the output with this token. Repeatable.",
    ),
    _SamplingOption(
        flag="--min-tokens",
        type=click.IntRange(0, 2**32 - 1),
        help="Do not end the output before it has this many tokens.",
        usual="0",
    ),
)
DEFAULT_ADDRESS = "127.0.0.1:50051"
_GATEWAY: Sequence[Callable[[Any], Any]] = (
    click.option(
        "--address",
        envvar="MOIETY_ADDRESS",
        show_envvar=True,
        type=Address(),
        help=f"HOST:PORT of the gateway.  [default: that of the system on this machine, else {DEFAULT_ADDRESS}]",
    ),
    click.option("--app", help="Application, or pid, of the system, where several run on this machine."),
    click.option("--model", type=Text(), metavar="NAME", help="Name of a served model.  [default: the only one]"),
)
_CHAT: Sequence[Callable[[Any], Any]] = (
    click.option("--system", type=Text(), metavar="TEXT", help="The conversation's first message, of the role system."),
    click.option(
        "--template-arguments",
        metavar="JSON",
        type=JsonObject(),
        help="Further variables of the chat template, such as '{\"enable_thinking\": false}'.",
    ),
)
_REQUEST: Sequence[Callable[[Any], Any]] = (
    click.option("--priority", type=click.IntRange(-100, 100), default=0, help="Lower priorities run first."),
    click.option(
        "--tenant",
        type=Text(),
        default="",
        show_default=False,
        help="Tenants share capacity fairly and share no cached prefixes.  [default: no name]",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=FiniteRange(min=0, min_open=True),
        help="Seconds for the whole request.  [default: no limit]",
    ),
    click.option(
        "--retries", type=click.IntRange(min=0), default=0, help="How often to try again when the gateway has no room."
    ),
)


def gateway_options(function: Function) -> Function:
    """Adds --address, --app and --model."""
    return _added(function, _GATEWAY)


def chat_options(function: Function) -> Function:
    """Adds --system and --template-arguments."""
    return _added(function, _CHAT)


def sampling_options(function: Function) -> Function:
    """Adds the options of sampling, each named as the option of `Client.generate` that it becomes."""
    return _added(function, [option.decorator(recommended=False) for option in _SAMPLING])


def recommended_sampling_options(function: Function) -> Function:
    """Adds the same options for a command whose defaults are those that a model's publisher recommends."""
    return _added(function, [option.decorator(recommended=True) for option in _SAMPLING])


def request_options(function: Function) -> Function:
    """Adds --priority, --tenant, --timeout and --retries, likewise."""
    return _added(function, _REQUEST)


def sampling_names(command: click.Command) -> list[str]:
    """Returns the names of the options that `sampling_options` added to a command."""
    probe = sampling_options(click.Command("probe"))
    names = {option.name for option in probe.params}
    return [str(option.name) for option in command.params if option.name in names]


def _added(function: Function, options: Sequence[Callable[[Any], Any]]) -> Function:
    for option in reversed(options):
        function = option(function)
    return function
