"""Host and port as one text, as in 127.0.0.1:50051 and [::1]:50051: the one place that joins and splits them.

An IPv6 address stands in brackets beside a port, and without them alone.
"""

from __future__ import annotations

import re
from ipaddress import ip_address

FORM = "HOST:PORT, such as 127.0.0.1:50051 or, with IPv6, [::1]:50051"
EVERY_INTERFACE = ("0.0.0.0", "::")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?\.?")  # Compose has names with an underscore


def host(text: str) -> str:
    """Returns a host without brackets: a name, an IPv4 or an IPv6 address. Raises ValueError for another text."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" in bare or bare != text:
        if ip_address(bare).version != 6:
            raise ValueError("brackets are for IPv6 addresses")
    elif not _NAME.fullmatch(bare):
        raise ValueError("neither a name nor an address")
    return bare


def joined(host: str, port: int) -> str:
    """Returns `host`:`port`, with brackets around an IPv6 address that has none."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def split(text: str) -> tuple[str, int]:
    """Returns the host, without brackets, and the port, 1 to 65535, of a `text` of FORM. Raises ValueError for another text."""
    if "@" in text:
        raise ValueError("an address has no user and no password")
    before, _, after = text.rpartition(":")
    if ":" in before and not before.startswith("["):
        raise ValueError("an IPv6 address needs brackets beside a port")
    if not (after.isascii() and after.isdigit() and 0 < int(after) < 65536):
        raise ValueError("no port from 1 to 65535 at its end")
    return host(before), int(after)
