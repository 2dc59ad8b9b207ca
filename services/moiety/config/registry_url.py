"""The registry's URL, which may hold a password: what errors, logs and pages may show of it."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import Secret

_SECRET_OPTIONS = ("password", "ssl_password", "username")


class RegistryUrl(Secret[str]):
    """A registry's URL. Text, JSON and repr show it without its secrets; `get_secret_value()` returns all of it."""

    def _display(self) -> str:
        return without_secrets(self.get_secret_value())

    @property
    def holds_secret(self) -> bool:
        """Whether the URL may not be shown whole."""
        return str(self) != self.get_secret_value()


def without_secrets(url: str) -> str:
    """Returns `url` without user name, password and secret options, or only the scheme of a malformed `url`.

    A URL without any of these is returned as it is.
    """
    try:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        given = parse_qsl(parts.query)
        options = [(name, value) for name, value in given if name not in _SECRET_OPTIONS]
        # A password with an unescaped "/", "?" or "#" ends up outside the netloc: show nothing of such a text.
        if not parts.scheme or any("@" in part for part in (parts.path, parts.query, parts.fragment)):
            raise ValueError
        if not user and options == given:
            return url
        return urlunsplit((parts.scheme, host, parts.path, urlencode(options), ""))
    except ValueError:
        return f"{url.partition('://')[0]}://…" if "://" in url else "…"
