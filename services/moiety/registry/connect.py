"""Opens the registry that the `registry` setting names. redis-py is imported only for a URL that needs it."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from moiety.config.registry_url import without_secrets
from moiety.errors import ConfigError
from moiety.registry.interface import Registry


def connect(url: str, app: str) -> Registry:
    """Returns the registry at `url` for the system called `app`; contacts nothing before the first operation.

    Raises ConfigError if `url` has no known form.
    """
    scheme, separator, _ = url.partition("://")
    bound = "must be redis://…, rediss://…, unix:///… or file:///…"
    if separator and scheme in ("redis", "rediss", "unix"):
        from moiety.registry.redis import RedisRegistry

        return RedisRegistry(url, app)
    if separator and scheme == "file":
        from moiety.registry.file import FileRegistry

        parts = urlsplit(url)
        if parts.netloc in ("", "localhost") and parts.path.startswith("/"):
            return FileRegistry(unquote(parts.path))
        bound = "must be file:// and an absolute path, such as file:///run/moiety/registry.json"
    raise ConfigError("registry", without_secrets(url), bound)
