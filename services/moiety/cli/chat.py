"""`moiety chat`."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import click

from moiety.cli.generation_options import (
    DEFAULT_ADDRESS,
    chat_options,
    gateway_options,
    recommended_sampling_options,
    request_options,
    sampling_names,
)
from moiety.cli.local_system import gateway_address
from moiety.cli.run import Interrupted
from moiety.core.text import did_you_mean
from moiety.errors import NotFound, Unavailable


@click.command()
@gateway_options
@chat_options
@recommended_sampling_options
@request_options
@click.option(
    "--history/--no-history", default=True, help="Keep what you enter in a file: moiety/chat_history in XDG_STATE_HOME."
)
@click.pass_context
def chat(
    context: click.Context,
    /,
    address: str | None,
    app: str | None,
    model: str | None,
    system: str | None,
    history: bool,
    **options: Any,
) -> None:
    """Talk with a model of a running gateway.

    Replies stream in. Ctrl-C stops a reply and keeps the conversation, Ctrl-D leaves, and /help lists the commands, such as
    /retry, /set temperature 0.7 and /save FILE. When the context is full, the oldest turns are left out, and the chat says
    so. Options of sampling that you leave out are as the model's publisher recommends.

    Through pipes it draws no prompt: each line of stdin is a message or a command, and stdout has the replies. Then the exit
    status is 1 if one of them failed. NO_COLOR turns styles off.

    \b
    Examples:
      moiety chat
      moiety chat --system "Answer in one sentence." --temperature 0.7
      moiety chat --address gateway.example:50051 --template-arguments '{"enable_thinking": false}'
      echo "What is an expert?" | moiety chat
    """
    from moiety.client import SyncClient
    from moiety.tools.chat.chat import Chat
    from moiety.tools.chat.commands import COMMANDS
    from moiety.tools.chat.entries import LineEditor, entries, history_file
    from moiety.tools.chat.screen import Screen
    from moiety.tools.chat.settings import ChatSettings

    names = sampling_names(context.command)
    options["logit_bias"] = dict(options["logit_bias"])
    sampling = {name: options.pop(name) for name in names}
    settings = ChatSettings(sampling, {name: _parser(context, name) for name in names})
    gateway = gateway_address(address, app, DEFAULT_ADDRESS)
    screen = Screen.standard()
    with ExitStack() as ends:
        ends.enter_context(_ends_raise())
        client = ends.enter_context(SyncClient(gateway.address))
        try:
            models = client.models()
        except Unavailable as error:
            raise Unavailable(f"{error}{gateway.hint}") from None
        served = next((each for each in models if model in (None, "", each.name)), None)
        if served is None:
            names = [each.name for each in models]
            near = did_you_mean(str(model), names)
            raise NotFound(f"model {model!r} is not served at {gateway.address}: there is {', '.join(names)}{near}")
        if screen.interactive:
            words = [f"/{name}" for name in COMMANDS] + [f"/set {name} " for name in settings.names]
            ends.enter_context(LineEditor(history_file() if history else None, words))
        talk = Chat(client, served, screen, settings, system, options)  # type: ignore[arg-type]
        talk.run(entries(screen))
    context.exit(1 if talk.failures and not screen.interactive else 0)


def _parser(context: click.Context, name: str) -> Callable[[str], Any]:
    """Returns a function from an option's text to its value, by the option's own type. It raises ValueError."""
    option = next(each for each in context.command.params if each.name == name)

    def parse(text: str) -> Any:
        try:
            value = option.type_cast_value(context, shlex.split(text) if option.multiple else text)
        except click.BadParameter as error:
            raise ValueError(error.message) from None
        return dict(value) if name == "logit_bias" else value

    return parse


class _Ended(BaseException):
    """A signal that ends a chat. It is no KeyboardInterrupt, which stops a reply only."""


@contextmanager
def _ends_raise() -> Iterator[None]:
    """Ends the block on SIGTERM and SIGHUP, and then raises Interrupted."""

    def stop(number: int, _: object) -> NoReturn:
        raise _Ended(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except _Ended as ended:
        raise Interrupted(*ended.args) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
