"""`moiety stop`."""

from __future__ import annotations

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.run import progress, run_async, signals_interrupt
from moiety.config.running_systems import chosen, none_runs, running_systems
from moiety.errors import FailedPrecondition


@click.command()
@click.option("--app", help="Application, or pid, of the system, where several run on this machine.")
@click.option(
    "--now", is_flag=True, help="End at once: running requests are cut off. With --ray-address: only do not wait."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=FiniteRange(min=0, min_open=True),
    help="Seconds to wait for the end.  [default: no limit]",
)
@click.option(
    "--ray-address", help="A Ray cluster, as for `moiety serve`: delete the application there, and leave the Ray."
)
def stop(app: str | None, now: bool, timeout_s: float | None, ray_address: str | None) -> None:
    """Stop the system that `moiety serve` runs on this machine, and wait until it is gone.

    New requests are refused, running ones finish as with Ctrl-C of `moiety serve`, then the system ends with its Ray and its
    Redis. Ctrl-C ends the waiting only. Exit status 1 if no system runs here, or it has not ended after --timeout.

    \b
    Examples:
      moiety stop
      moiety stop --now
      moiety stop --ray-address auto --app moiety
    """
    if ray_address is not None:
        if timeout_s is not None:
            raise click.UsageError("--timeout is for the system on this machine: leave out --ray-address")
        from moiety.cli.setting_options import settings_of_system
        from moiety.tools.running.stop_on_cluster import stop_on_cluster

        settings = settings_of_system(app=app or None)
        with signals_interrupt():
            stop_on_cluster(ray_address, settings, now=now, progress=progress())
        return
    from moiety.tools.running.stop import stop_system

    system = chosen(running_systems(), app)
    if system is None:
        raise FailedPrecondition(f"{none_runs()}. One on a Ray cluster ends with --ray-address HOST:PORT or auto")
    run_async(stop_system(system, now=now, timeout_s=timeout_s, progress=progress()))
