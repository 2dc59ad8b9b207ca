"""Caches the replica entries that a reader has fetched, so that its next reading fetches only new or changed ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moiety.core.replica import Replica


def digest_of(text: str | bytes) -> bytes:
    """Returns the digest of an entry's text, as 16 hexadecimal digits."""
    raw = text.encode() if isinstance(text, str) else text
    return hashlib.blake2b(raw, digest_size=8).hexdigest().encode()


@dataclass(frozen=True, slots=True)
class Listing:
    """The replicas found by one reading of the registry, with the entries that the next reading need not fetch.

    `digest` is the store's digest of its list of ids and entry digests. If the next reading finds the same `digest`, the
    replicas have not changed. An empty `digest` makes the next reading fetch the list: before the first reading, and if
    an entry changed during this reading.
    """

    digest: bytes = b""
    replicas: tuple[Replica, ...] = ()  # sorted by id
    # (id, digest) -> replica; None = a broken entry
    entries: Mapping[tuple[bytes, bytes], Replica | None] = field(default_factory=dict)

    def unknown(self, beats: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Returns the ids whose entries must be fetched. `beats`: the (id, digest of the entry) pairs that the store lists."""
        return [replica_id for replica_id, digest in beats if (replica_id, digest) not in self.entries]

    def following(
        self,
        digest: bytes,
        beats: Sequence[tuple[bytes, bytes]],
        texts: Mapping[bytes, bytes | None],
        decode: Callable[[bytes, bytes], Replica | None],
    ) -> Listing:
        """Returns the reading after this one. `beats`: the (id, digest of the entry) pairs that the store lists.

        `digest` is the digest of `beats`. `texts` maps each id that `unknown` returned to the entry's text, or None if
        it is gone. `decode(id, text)` decodes an entry. If a text is gone or has another digest than in `beats`, the entry
        changed after it was listed. The changed text, if any, is used now; the following reading fetches it again.
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
