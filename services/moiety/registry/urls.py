"""Removes secrets from registry URLs, so that errors, logs and pages may show them."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

_SECRET_OPTIONS = ("password", "ssl_password", "username")


def without_secrets(url: str) -> str:
    """Returns `url` without user name, password and secret options, or only the scheme of a malformed `url`."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        options = [(name, value) for name, value in parse_qsl(parts.query) if name not in _SECRET_OPTIONS]
        # A password with an unescaped "/", "?" or "#" ends up outside the netloc: show nothing of such a text.
        if not parts.scheme or any("@" in part for part in (parts.path, parts.query, parts.fragment)):
            raise ValueError
        return urlunsplit((parts.scheme, host, parts.path, urlencode(options), ""))
    except ValueError:
        return f"{url.partition('://')[0]}://…" if "://" in url else "…"
