"""`moiety logs`."""

from __future__ import annotations

import sys
from contextlib import closing
from itertools import chain

import click

from moiety.cli.run import signals_interrupt
from moiety.config.run_folder import kept_folder
from moiety.config.running_systems import chosen, is_running, none_runs, running_systems
from moiety.core.text import for_terminal
from moiety.errors import FailedPrecondition


@click.command()
@click.argument("deployment", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines, also of replicas that start later.")
@click.option("--lines", type=click.IntRange(0), default=20, help="Last lines of each log to begin with.")
@click.option("--app", help="Application, or pid, of the system, where several run on this machine.")
def logs(deployment: str | None, follow: bool, lines: int, app: str | None) -> None:
    """Print the logs of the replicas of the system that `moiety serve` runs on this machine.

    DEPLOYMENT is one that `moiety status` lists, such as router or experts-1, or `experts` for all groups, or `controller`
    for Serve's controller, which starts replicas; by default, all. Each line begins with the deployment and the replica, or
    the pid of its process. --follow ends with the system, or with Ctrl-C.

    On a cluster each node keeps the logs of its own replicas: `moiety status` says where, on Kubernetes it is `kubectl logs`.

    \b
    Examples:
      moiety logs
      moiety logs experts-1 --lines 100
      moiety logs -f
    """
    from moiety.tools.running.logs import LogReader, log_folder

    system = chosen(running_systems(), app)
    if system is None:
        kept = kept_folder("serve")
        earlier = f"; the latest run that failed or was killed has left its logs in {kept}" if kept else ""
        cluster = "On a cluster each node keeps the logs of its replicas: `moiety status --registry URL` says where"
        raise FailedPrecondition(f"{none_runs()}{earlier}. {cluster}")
    if (folder := log_folder(system)) is None:
        raise FailedPrecondition(f"{system}: its Ray keeps no logs in a folder of this machine that this command knows")
    if system.ready and not folder.is_dir():
        raise FailedPrecondition(f"{system}: its folder of logs is gone: {folder}: a new `moiety serve` makes another")
    if system.ray_address:
        click.echo(
            f"this machine's replicas only: the other nodes of {system.ray_address} keep their own logs", err=True
        )
    with signals_interrupt(), closing(LogReader(folder, system.app, deployment)) as reader:
        printed = False
        for line in chain(
            reader.last(lines), reader.follow(lambda: is_running(system)) if follow else reader.unfinished()
        ):
            printed = True
            click.echo(for_terminal(line) if sys.stdout.isatty() else line)
        if not (printed or follow) and lines:
            click.echo(f"{system}: no log has a line yet in {folder}; --follow waits for some", err=True)
