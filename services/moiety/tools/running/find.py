"""Finds the system that a command is about: in a registry that was named, or the one that `moiety serve` runs here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moiety.config.application import AppSettings
from moiety.config.registry_url import without_secrets
from moiety.config.running_systems import RunningSystem, chosen, none_runs, running_systems
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition, RegistryUnreachable, Unavailable
from moiety.registry.connect import live_systems


@dataclass(frozen=True, slots=True)
class FoundSystem:
    """A system and where its registry is."""

    url: str  # of the registry; "" = a local system has not started one yet
    system: SystemId | None  # None: a local system that starts, and has no live service yet
    local: RunningSystem | None  # if `moiety serve` runs it on this machine

    def known(self) -> SystemId:
        """Returns `system`. Raises Unavailable if it has no live service yet."""
        if self.system is None:
            raise Unavailable(f"{self.local} has no live service yet: try again, or see `moiety status --watch`")
        return self.system


async def find_system(settings: AppSettings, part: str) -> FoundSystem:
    """Returns the only system that fits: of application `app`, if `settings` were given one, and with `part` in its name.

    Looks in the registry that `settings` were given. If they were given none, takes the system that runs on this machine and,
    where none does, looks in the registry at the default URL. Raises FailedPrecondition, with the names that there are, if
    no system or several fit, RegistryUnreachable if the registry does not answer.
    """
    given, url = settings.model_fields_set, settings.registry.get_secret_value()
    app = settings.app if "app" in given else None
    local = chosen(running_systems(), app) if "registry" not in given else None
    if local is not None:
        if not local.registry:
            return FoundSystem("", None, local)
        if local.system:
            live = [SystemId.parse(local.system)]
        elif not (live := await live_systems(local.registry, local.app)):
            return FoundSystem(local.registry, None, local)
        return FoundSystem(local.registry, chosen_system(live, local.app, part), local)
    advice = "start a system, or name its registry with --registry"
    try:
        live = await live_systems(url, settings.app)
    except RegistryUnreachable:
        if "registry" in given:
            raise
        raise RegistryUnreachable(
            f"{none_runs()}, and no registry answers at {without_secrets(url)}: {advice}"
        ) from None
    if not live and "registry" not in given:
        there = f"the registry at {without_secrets(url)} lists none of application {settings.app}"
        raise FailedPrecondition(f"{none_runs()}, and {there}: {advice}")
    system = chosen_system(live, settings.app, part)
    local = next((one for one in running_systems() if one.system == str(system)), None)
    return FoundSystem(url, system, local)


def chosen_system(live: Sequence[SystemId], app: str, part: str) -> SystemId:
    """Returns the only system in `live`, those of application `app`, whose name contains `part`.

    Raises FailedPrecondition if there is none or more than one; the message names them.
    """
    fitting = [system for system in live if part in str(system)]
    if len(fitting) == 1:
        return fitting[0]
    if not live:
        raise FailedPrecondition(f"the registry lists no live service of application {app}: check --registry and --app")
    names = "; ".join(map(str, live))
    how = f"none of them contains {part!r}" if not fitting else "choose one by a part of its name with --system"
    raise FailedPrecondition(f"the registry lists {len(live)} live systems of application {app}: {names}; {how}")
