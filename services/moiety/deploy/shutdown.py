"""Ends an application on a Ray that goes on running."""

from __future__ import annotations

from collections.abc import Callable

from moiety.errors import NotFound


def shut_down(app: str, progress: Callable[[str], None]) -> None:
    """Deletes the application `app` of the connected Ray; returns once all its replicas have ended.

    Raises NotFound, with the applications that are there, if there is no such one.
    """
    from ray import serve

    there = serve.status().applications
    if app not in there:
        raise NotFound(f"no application {app!r} on this Ray: there are {', '.join(sorted(there)) or 'none'}")
    progress(f"{app}: its replicas finish what they do, then end")
    serve.delete(app)
    progress(f"{app}: ended")
