"""What a reader of replica entries keeps between two readings, so that it fetches only entries it does not have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moiety.core.replica import Replica


def digest_of(text: str | bytes) -> bytes:
    """Returns the digest that names an entry's text: 16 hexadecimal digits."""
    raw = text.encode() if isinstance(text, str) else text
    return hashlib.blake2b(raw, digest_size=8).hexdigest().encode()


@dataclass(frozen=True, slots=True)
class Listing:
    """One reading of the table. `digest` names the answer it came from; if empty, the next reading must list again."""

    digest: bytes = b""
    replicas: tuple[Replica, ...] = ()  # sorted by id
    # (id, digest) -> replica; None = a broken entry
    entries: Mapping[tuple[bytes, bytes], Replica | None] = field(default_factory=dict)

    def unknown(self, beats: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Returns the ids in `beats`, (id, digest) pairs, whose text must be fetched."""
        return [replica_id for replica_id, digest in beats if (replica_id, digest) not in self.entries]

    def following(
        self,
        digest: bytes,
        beats: Sequence[tuple[bytes, bytes]],
        texts: Mapping[bytes, bytes | None],
        decode: Callable[[bytes, bytes], Replica | None],
    ) -> Listing:
        """Returns the listing of `beats`, given the `texts` of the unknown ids; `decode` takes an id and a text.

        A text that is gone, or that does not have the digest of its beat, changed between listing and fetching. It
        counts in this reading and is not kept for the next.
        """
        complete, kept, live = True, dict[tuple[bytes, bytes], Replica | None](), dict[bytes, Replica]()
        for beat in beats:
            replica_id, listed_digest = beat
            text = texts.get(replica_id)
            if beat in self.entries:
                replica = kept[beat] = self.entries[beat]
            else:
                replica = None if text is None else decode(replica_id, text)
                if text is not None and digest_of(text) == listed_digest:
                    kept[beat] = replica
                else:
                    complete = False
            if replica is not None:
                live[replica_id] = replica
        return Listing(digest if complete else b"", tuple(live[replica_id] for replica_id in sorted(live)), kept)
