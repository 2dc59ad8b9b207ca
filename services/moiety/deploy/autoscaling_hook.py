"""Serve's autoscaling hook. Serve copies this module by value into its controller and into replicas: no live objects here.

`scaling/autoscaler.py` holds the autoscaler's state. LoadPolicy imports it when called: a process has only one such state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LoadPolicy:
    """Asks the process's autoscaler how many replicas a deployment should have.

    Serve makes one instance per deployment and calls it in the controller's event loop about nine times a second. The
    call must not block, which would stall every deployment. It must not raise, which would silently end scaling for the
    whole application.
    """

    def __init__(self, arguments: Mapping[str, Any], held: str) -> None:
        self._arguments, self._held = arguments, held
        self._subscription: Any = None
        self._failed = False

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Returns the target number of replicas and an empty state for Serve. `ctx`: a ray.serve.config.AutoscalingContext."""
        try:
            return self._target(ctx), {}
        except Exception:
            if not self._failed:
                import logging

                logging.getLogger("ray.serve").exception(
                    "%s: scaling failed, the current target stays", ctx.deployment_name
                )
            self._failed = True
            return ctx.target_num_replicas, {}

    def _target(self, ctx: Any) -> int:
        if self._subscription is None:
            from moiety.deploy.ray_cluster import settings_of_process
            from moiety.scaling.autoscaler import subscribe

            settings = settings_of_process(self._arguments)
            self._subscription = subscribe(ctx.deployment_name, settings, self._held)
        target: int = self._subscription.target(
            ctx.target_num_replicas, ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
        )
        self._failed = False
        return target
