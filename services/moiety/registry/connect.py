"""Opens the registry that the `registry` setting names. redis-py is imported only for a URL that needs it."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from moiety.config.registry_url import without_secrets
from moiety.errors import ConfigError
from moiety.registry.interface import Registry

SCHEMES = "must be redis://…, rediss://…, unix:///… or file:///…"


def connect(url: str, app: str) -> Registry:
    """Returns the registry at `url` for the system called `app`; contacts nothing before the first operation.

    Raises ConfigError if `url` has no known form.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ConfigError("registry", without_secrets(url), SCHEMES)
    if scheme in ("redis", "rediss", "unix"):
        from moiety.registry.redis import RedisRegistry

        return RedisRegistry(url, app)
    if scheme == "file":
        return _file(url)
    raise ConfigError("registry", without_secrets(url), SCHEMES)


def _file(url: str) -> Registry:
    from moiety.registry.file import FileRegistry

    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigError(
            "registry",
            without_secrets(url),
            "must be file:// and an absolute path, such as file:///run/moiety/registry.json",
        )
    return FileRegistry(unquote(parts.path))
