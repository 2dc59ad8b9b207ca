"""What a reader keeps of a table of replicas between two readings, so that it fetches only entries that are new to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moiety.core.replica import Replica


def digest_of(text: str | bytes) -> bytes:
    """Names an entry's text: 16 hexadecimal digits."""
    raw = text.encode() if isinstance(text, str) else text
    return hashlib.blake2b(raw, digest_size=8).hexdigest().encode()


@dataclass(frozen=True, slots=True)
class Listing:
    """A reading of the table. `digest` names the answer it came from; empty where the next reading must list anew."""

    digest: bytes = b""
    replicas: tuple[Replica, ...] = ()  # sorted by id
    entries: Mapping[tuple[bytes, bytes], Replica | None] = field(
        default_factory=dict
    )  # by id and digest; None: broken

    def unknown(self, beats: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """The ids, of (id, digest) pairs, whose text must be fetched."""
        return [replica_id for replica_id, digest in beats if (replica_id, digest) not in self.entries]

    def following(
        self,
        digest: bytes,
        beats: Sequence[tuple[bytes, bytes]],
        texts: Mapping[bytes, bytes | None],
        decode: Callable[[bytes, bytes], Replica | None],
    ) -> Listing:
        """The listing of `beats`, given the `texts` of those unknown; `decode` takes an id and a text.

        A text that is gone, or is not the one its beat names, was changed between listing and fetching: it counts as
        read now and is not kept.
        """
        settled, kept, live = True, dict[tuple[bytes, bytes], Replica | None](), dict[bytes, Replica]()
        for beat in beats:
            replica_id, named = beat
            text = texts.get(replica_id)
            if beat in self.entries:
                replica = kept[beat] = self.entries[beat]
            else:
                replica = None if text is None else decode(replica_id, text)
                if text is not None and digest_of(text) == named:
                    kept[beat] = replica
                else:
                    settled = False
            if replica is not None:
                live[replica_id] = replica
        return Listing(digest if settled else b"", tuple(live[replica_id] for replica_id in sorted(live)), kept)
