"""The `moiety` command: the table of its commands, and how errors and signals become one line and an exit status."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

import click

from moiety import __version__
from moiety.cli.lazy import LazyGroup
from moiety.cli.run import Interrupted
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
# Which extra brings a package, if not `serve`.
EXTRAS: Mapping[str, str] = MappingProxyType({"matplotlib": "plot", "triton": "gpu"})
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
        error.show()
        return error.exit_code
    except MoietyError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "moiety", "moiety_kernels"):
            raise
        extra = EXTRAS.get(package, "serve")
        click.echo(
            f"error: this command needs {package}, of the extra {extra!r}: pip install 'moiety[{extra}]'", err=True
        )
        return 1
    except Interrupted as interruption:
        click.echo(f"\n{interruption}", err=True)
        return interruption.exit_status
    except click.Abort:  # Ctrl-C before or after the command's own signal handling
        return Interrupted().exit_status


def main() -> NoReturn:
    """Runs the console script and exits the process."""
    status = run(sys.argv[1:])
    if status > 128:
        # Clean-up is done. `sys.exit` would wait for threads that still compute, for no benefit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
