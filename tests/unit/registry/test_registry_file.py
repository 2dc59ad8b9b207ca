"""The registry in a file: one writer, and any number of readers in other processes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from registry_support import demand_of, expert_replica

from moiety.core.experts import ExpertSet
from moiety.core.load import ReplicaLoad
from moiety.core.replica import Placement
from moiety.errors import ConfigError, FailedPrecondition, RegistryUnreachable
from moiety.registry.connect import connect
from moiety.registry.file import FileRegistry, FileRegistryWriter
from moiety.testing import SYSTEM


async def test_readers_see_every_change_of_the_writer(tmp_path: Path) -> None:
    """A reader sees replicas and placement at once, however fast they change."""
    path = tmp_path / "a folder" / "registry.json"
    path.parent.mkdir()
    writer = FileRegistryWriter(path)
    reader = connect(path.as_uri(), SYSTEM)
    assert await reader.replicas() == ()
    assert await reader.placement() is None
    for epoch in range(1, 20):
        replica = expert_replica(f"e{epoch % 3}", placement_epoch=epoch)
        await writer.register(replica)
        assert replica in await reader.replicas()
        placement = Placement(epoch, {"experts-0": ExpertSet.uniform(1, [epoch])})
        assert await writer.set_placement(placement)
        assert await reader.placement() == placement
    await writer.deregister("e1")
    assert [replica.id for replica in await reader.replicas()] == ["e0", "e2"]
    assert await reader.replicas() == await writer.replicas()
    await writer.close()
    assert list(path.parent.iterdir()) == []


async def test_a_change_that_could_not_be_written_is_written_when_it_is_repeated(tmp_path: Path) -> None:
    """If writing the file fails, readers keep what they have, and the same change again is not taken as done."""
    folder, away = tmp_path / "folder", tmp_path / "away"
    folder.mkdir()
    writer, reader = FileRegistryWriter(folder / "registry.json"), FileRegistry(folder / "registry.json")
    await writer.register(expert_replica("stays"))
    await writer.register(expert_replica("leaves"))
    old, new = Placement(1, {}), Placement(2, {"experts-0": ExpertSet.uniform(1, [1])})
    assert await writer.set_placement(old)
    changes = [
        lambda: writer.register(expert_replica("comes")),
        lambda: writer.deregister("leaves"),
        lambda: writer.set_placement(new),
    ]
    folder.rename(away)  # the folder's file system is gone, as it may be full
    for change in changes:
        with pytest.raises(RegistryUnreachable, match=r"registry\.json"):
            await change()
    away.rename(folder)
    assert [replica.id for replica in await reader.replicas()] == ["leaves", "stays"]
    assert await reader.placement() == await writer.placement() == old
    for change in changes:
        await change()
    assert [replica.id for replica in await reader.replicas()] == ["comes", "stays"]
    assert await reader.placement() == new


async def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    """A child's heartbeat is harmless, and its placement is refused."""
    writer = FileRegistryWriter(tmp_path / "registry.json")
    await writer.register(expert_replica())
    reader = FileRegistry(tmp_path / "registry.json")
    await reader.register(expert_replica("intruder"))
    await reader.deregister("e0")
    with pytest.raises(FailedPrecondition, match=r"registry\.json"):
        await reader.set_placement(Placement(1, {}))
    assert await reader.replicas() == await writer.replicas() == (expert_replica(),)


async def test_the_writers_placement_is_compare_and_set(tmp_path: Path) -> None:
    """The writer refuses an epoch that is not the next, like every registry."""
    writer = FileRegistryWriter(tmp_path / "registry.json")
    assert await writer.set_placement(Placement(1, {}))
    assert not await writer.set_placement(Placement(1, {}))


async def test_the_ledger_stays_within_the_process(tmp_path: Path) -> None:
    """Counters, load reports, missing experts and decisions are kept in memory and are not shared."""
    FileRegistryWriter(tmp_path / "registry.json")
    one, other = FileRegistry(tmp_path / "registry.json"), FileRegistry(tmp_path / "registry.json")
    await one.publish_load("r0", demand=demand_of((1, 2)))
    await one.publish_load("e0", ReplicaLoad(0.5, 1.0, 2.0, 3.0))
    await one.report_missing_experts(0, [1])
    await one.record_decision({"target": 1})
    assert await one.expert_demand() == {"r0": demand_of((1, 2))}
    assert await one.replica_load() == {"e0": ReplicaLoad(0.5, 1.0, 2.0, 3.0)}
    assert await one.missing_experts() == {0: frozenset({1})}
    assert await one.decisions() == [{"target": 1}]
    assert not await other.expert_demand()
    assert not await other.decisions()


async def test_a_missing_or_broken_file_is_unreachable(tmp_path: Path) -> None:
    """A missing or malformed file raises RegistryUnreachable, which names the file; a repaired file is read."""
    path = tmp_path / "registry.json"
    reader = FileRegistry(path)
    for text in (None, "{", "[]", '{"replicas": {}}', '{"replicas": 1, "placement": null}'):
        if text is not None:
            path.write_text(text)
        with pytest.raises(RegistryUnreachable, match=r"registry\.json"):
            await reader.replicas()
    await FileRegistryWriter(path).register(expert_replica())
    assert await reader.replicas() == (expert_replica(),)


async def test_a_broken_entry_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One unreadable replica is left out with a warning; the others are read."""
    path = tmp_path / "registry.json"
    with caplog.at_level(logging.WARNING):
        await FileRegistryWriter(path).register(expert_replica())
        data = json.loads(path.read_text())
        data["replicas"]["odd"] = {"id": 7}
        path.write_text(json.dumps(data))
        assert await FileRegistry(path).replicas() == (expert_replica(),)
    assert "replica:odd is left out: field id = 7: must be a string" in caplog.text


@pytest.mark.parametrize("url", ["file://relative/x.json", "file:x.json", "etcd://h", "127.0.0.1:6379", ""])
def test_a_url_of_another_form_is_refused(url: str) -> None:
    """The error names the setting and the forms it may have."""
    with pytest.raises(ConfigError, match="registry"):
        connect(url, SYSTEM)
