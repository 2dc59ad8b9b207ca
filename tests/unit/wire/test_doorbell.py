"""A doorbell whose peer does not read."""

from __future__ import annotations

import socket

from moiety.wire.transports.doorbell import MOST_UNSENT, Doorbell
from moiety.wire.transports.mailbox import Mailbox


def test_a_peer_that_does_not_read_is_hung_up():
    """Messages wait for it in a bounded queue. When that is full, the connection ends, with the reason."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mailbox, why = Mailbox(), list[str]()
    bell = Doorbell(ours, mailbox, lambda _: None, why.append)
    mailbox.wait(0.0)
    rung = 0
    while not why and rung < 4 * MOST_UNSENT:
        bell.ring(b"an answer")
        rung += 1
        if rung % 1000 == 0:
            mailbox.wait(0.0)
    theirs.close()
    assert why == [f"it did not read {MOST_UNSENT} messages"]
    assert MOST_UNSENT < rung < 2 * MOST_UNSENT
