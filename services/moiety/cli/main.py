"""The `moiety` command: its commands, and what an error or a signal becomes: one line and an exit status."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

import click

from moiety import __version__
from moiety.cli.lazy import LazyCommand, LazyGroup
from moiety.cli.run import Interrupted
from moiety.errors import MoietyError

COMMANDS: Mapping[str, LazyCommand] = MappingProxyType(
    {
        "bench": LazyCommand(
            "moiety.cli.bench.group:bench",
            "Measure this machine: hop, split, lanes, experts, serving, flood, elasticity, control plane.",
        ),
        "demo": LazyCommand("moiety.cli.demo:demo", "Show the main job on this machine, start to end."),
        "doctor": LazyCommand(
            "moiety.cli.doctor:doctor", "Say what decides how well this machine serves, and what is wrong."
        ),
        "generate": LazyCommand("moiety.cli.generate:generate", "Generate text from a running gateway."),
        "inspect": LazyCommand(
            "moiety.cli.inspect:inspect", "Say how large a checkpoint and its parts are, without reading a weight."
        ),
        "models": LazyCommand(
            "moiety.cli.models:models", "List the architectures that can be served, and what each uses."
        ),
        "parity": LazyCommand(
            "moiety.cli.parity:parity", "Compare the served system with transformers, token for token."
        ),
        "quantize": LazyCommand(
            "moiety.cli.quantize:quantize", "Quantise a checkpoint's experts, each to as many bits as it deserves."
        ),
        "rebalance": LazyCommand(
            "moiety.cli.rebalance:rebalance", "Place experts anew by the load of the moment, without a stop."
        ),
        "serve": LazyCommand(
            "moiety.cli.serve:serve", "Serve a checkpoint on Ray: gateway, router and elastic expert groups."
        ),
        "simulate": LazyCommand(
            "moiety.cli.simulate:simulate", "Simulate a day of a large cluster: what elasticity would save."
        ),
    }
)
LOG_LEVELS = ("debug", "info", "warning", "error")


@click.group(
    cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="moiety")
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    default="warning",
    show_default=True,
    envvar="MOIETY_LOG_LEVEL",
    help="What this process logs on stderr.",
)
def cli(log_level: str) -> None:
    """Serve a Mixture-of-Experts language model by its parts.

    Each command explains itself: moiety COMMAND --help
    """
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status; whatever went wrong has been told on stderr."""
    try:
        return int(cli.main(list(arguments), prog_name="moiety", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except MoietyError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except Interrupted as interruption:
        click.echo(f"\n{interruption}", err=True)
        return interruption.exit_status
    except click.Abort:  # Ctrl-C before or after the command's own work
        return Interrupted().exit_status


def main() -> NoReturn:
    """The console script."""
    status = run(sys.argv[1:])
    if status > 128:
        # Everything that must be undone has been; a thread that still computes would hold the process up for nothing.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
