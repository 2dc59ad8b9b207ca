"""The `moiety` command: the table of its commands, and how errors and signals become one line and an exit status."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from types import FrameType, MappingProxyType
from typing import NoReturn

import click

from moiety import __version__
from moiety.cli.lazy import LazyGroup, install_hint
from moiety.cli.run import Interrupted
from moiety.cli.unknown_option import message_of
from moiety.core.text import for_terminal
from moiety.errors import MoietyError

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "batch": "Send a file of requests to a server and write the answers, in OpenAI's batch format.",
        "bench": "Measure the system on this machine: transports, kernels, memory, serving speed, overload, elasticity.",
        "chat": "Talk with a model of a running gateway.",
        "chaos": "Let faults of every kind happen to a system under load, and check that nothing is lost.",
        "demo": "Show the whole system at work on this machine, from start to end.",
        "doctor": "Check what decides how well this machine serves, and report what is wrong.",
        "generate": "Generate text from a running gateway.",
        "inspect": "Report how large a checkpoint and its parts are, and its revision.",
        "logs": "Print the logs of the replicas of the system that `moiety serve` runs on this machine.",
        "models": "List the architectures that can be served, and what each uses.",
        "parity": "Compare the served system with transformers, token for token.",
        "quantize": "Quantise a checkpoint's experts, each to 16, 8 or 4 bits by its measured sensitivity.",
        "rebalance": "Move experts between replicas to fit the current load, while requests run.",
        "serve": "Serve a checkpoint on Ray: gateway, router and elastic expert groups.",
        "settings": "List the settings of a system: name, default, environment variable, and what each means.",
        "simulate": "Simulate a day of a large cluster, to estimate what elasticity would save.",
        "status": "Show a running system: replicas, load, placement, decisions with their reasons, where the logs are.",
        "stop": "Stop the system that `moiety serve` runs on this machine, and wait until it is gone.",
    }
)
_PASSWORD = re.compile(r"://\S*@")  # and user, of a URL that a message quotes; a password may hold an @
_log = logging.getLogger(__name__)
LOG_LEVELS = ("debug", "info", "warning", "error")


@click.group(
    cls=LazyGroup,
    package="moiety.cli",
    summaries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(__version__, prog_name="moiety")
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    default="warning",
    envvar="MOIETY_LOG_LEVEL",
    help="Lowest level of messages that this process logs on stderr.",
)
def cli(log_level: str) -> None:
    """Serve a Mixture-of-Experts language model by its parts.

    \b
    Examples:
      moiety demo
      moiety serve ./Mixtral-8x7B-v0.1
      moiety serve --help
    """
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status. Errors are printed on stderr before it returns."""
    try:
        return int(cli.main(list(arguments), prog_name="moiety", standalone_mode=False) or 0)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            say(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.\n")
        say(f"Error: {message_of(error)}")
        return error.exit_code
    except MoietyError as error:
        say(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if (hint := install_hint(error)) is None:
            raise
        say(f"error: {hint}")
        return 1
    except click.Abort as error:  # click makes one of every KeyboardInterrupt, after a line feed
        ended = error.__cause__ if isinstance(error.__cause__, Interrupted) else Interrupted()
        say(str(ended))
        return ended.exit_status
    except OSError as error:
        if error.filename is None:
            raise
        _log.debug("the traceback:", exc_info=True)
        say(f"error: {error.filename}: {error.strerror}")
        return 1


def say(text: str) -> None:
    """Prints a message on stderr: without the password of a URL, and without what would command a terminal."""
    text = _PASSWORD.sub("://…@", text)
    click.echo(for_terminal(text) if sys.stderr.isatty() else text, err=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C where no command does.

    An import that is interrupted may raise anything, print a traceback of its own, or go on. So the process ends at once:
    while a command's modules are imported, there is nothing to clean up.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), f"\n{Interrupted(number)}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


def _read_and_write_text() -> None:
    """Makes standard streams take any text: in the C locale as UTF-8; an error about other bytes names their field."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            encoding = "utf-8" if stream.encoding.lower() in ("ascii", "ansi_x3.4-1968", "us-ascii") else None
            stream.reconfigure(
                encoding=encoding, errors="surrogateescape" if stream is sys.stdin else "backslashreplace"
            )


def main() -> NoReturn:
    """Runs the console script and exits the process."""
    signal.signal(signal.SIGINT, _interrupt)
    _read_and_write_text()
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has had enough, as `| head`; the interpreter would flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    if status > 128:
        # Clean-up is done. `sys.exit` would wait for threads that still compute, for no benefit.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
