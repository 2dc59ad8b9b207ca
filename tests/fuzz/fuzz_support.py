"""Damages valid inputs: what differs in a few places gets deeper into a parser than noise does."""

from __future__ import annotations

from random import Random

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
FAST, SLOW = 1, 10  # how many times the usual number of inputs a test tries


def damaged(random: Random, valid: bytes) -> bytes:
    """Returns noise, or `valid` with some bytes changed, cut out, doubled or cut off."""
    if random.random() < 0.1:
        return random.randbytes(random.randrange(200))
    out = bytearray(valid)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(out) + 1)
        match random.randrange(5):
            case 0:
                out[at : at + 1] = bytes([random.choice(INTERESTING)])
            case 1:
                out[at : at + 1] = random.randbytes(1)
            case 2:
                del out[at : at + random.randrange(8)]
            case 3:
                out[at:at] = out[at : at + random.randrange(16)]
            case 4:
                del out[at:]
    return bytes(out)
