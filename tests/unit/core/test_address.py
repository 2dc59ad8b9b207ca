"""Host and port as one text."""

from __future__ import annotations

import pytest

from moiety.core.address import host, joined, split


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("gateway.example:1", ("gateway.example", 1)),
        ("my_gateway:65535", ("my_gateway", 65535)),
        ("[::1]:50051", ("::1", 50051)),
        ("[fe80::1%eth0]:50051", ("fe80::1%eth0", 50051)),
    ],
)
def test_what_is_split_can_be_joined(text: str, parts: tuple[str, int]) -> None:
    """An address is split into host and port, and these give the address again."""
    assert split(text) == parts
    assert joined(*parts) == text


WITHOUT_HOST_OR_PORT = (
    "",
    "localhost",
    "localhost:",
    ":50051",
    "localhost:0",
    "localhost:65536",
    "[::1]",
    "localhost:-1",
)
NO_HOST = ("::1:50051", "[localhost]:1", "[::1:50051", "http://localhost:1", "a b:1", "[127.0.0.1]:1")


@pytest.mark.parametrize("text", [*WITHOUT_HOST_OR_PORT, *NO_HOST, "localhost:1x", "x:\u0661"])
def test_other_texts_are_refused(text: str) -> None:
    """A text without port or host, with a scheme, or with IPv6 outside brackets is no address."""
    with pytest.raises(ValueError, match=r"."):
        split(text)


def test_a_host_alone_has_no_brackets() -> None:
    """Brackets are taken away, and other colons refused: that is a port."""
    assert [host(text) for text in ("[::1]", "::", "0.0.0.0", "node-1.svc")] == ["::1", "::", "0.0.0.0", "node-1.svc"]
    with pytest.raises(ValueError, match=r"0\.0\.0\.0:50051"):
        host("0.0.0.0:50051")
