"""The identity of a system: what two services must have in common before one may use the other's answers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b


@dataclass(frozen=True)
class SystemId:
    """Names one running system. Services of different systems never use each other, nor what the other left behind.

    The text form is readable, and no part contains a "/": `moiety/session_2026-11-30_10-00-00_1_7/1f3a…/groups=4/slices=1`.
    """

    app: str
    cluster: str  # the Ray cluster, or the LocalCluster, that started the services
    revision: str  # of the model, see model/checkpoint/revision.py
    groups: int  # expert groups
    slices: int  # parts that every expert is cut into

    def __str__(self) -> str:
        return f"{self.app}/{self.cluster}/{self.revision}/groups={self.groups}/slices={self.slices}"

    @classmethod
    def parse(cls, text: str) -> SystemId:
        """Parses the text form. Raises ValueError if `text` does not have it."""
        try:
            app, cluster, revision, groups, slices = text.split("/")
            system = cls(app, cluster, revision, int(groups.partition("=")[2]), int(slices.partition("=")[2]))
        except ValueError:
            system = None
        if system is None or str(system) != text:
            raise ValueError(f"{text[:200]!r}: expected APP/CLUSTER/REVISION/groups=N/slices=N")
        return system

    @cached_property
    def key(self) -> str:
        """16 hex digits that differ between systems: for the names of registry keys, and for calls."""
        return blake2b(str(self).encode(), digest_size=8).hexdigest()

    def difference(self, other: str) -> str:
        """Returns in words how a peer's system, in text form, differs from this one; an empty string if it does not."""
        if other == str(self):
            return ""
        try:
            theirs = SystemId.parse(other)
        except ValueError:
            return f"it names no system ({other[:200]!r}), ours is {self}"
        pairs = ((field.name, getattr(theirs, field.name), getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"its {name} is {value}, ours {own}" for name, value, own in pairs if value != own)
