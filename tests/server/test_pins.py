"""Pins follow the newest revision of their adapter, whichever process publishes it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from adapter_server import FakeResidents
from small_jobs import small_spec
from small_store import open_small_store
from structlog.testing import capture_logs
from whole_server import adapter_file, fake_parts, live_server, norm_adapter

from hueshift.adapters.errors import Reason, ResourceExhausted, Unavailable
from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel
from hueshift.engines.residency import NO_WEIGHTS
from hueshift.server.pins import Mix, Pins
from hueshift.server.store.adapter_records import AdapterRecord
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.job_records import NewJob
from hueshift.v1 import adapters_pb2 as pb


class FlakyTable:
    """Does not answer the first time."""

    def __init__(self, store: AdapterStore) -> None:
        self._store, self.asked = store, 0

    def pinned(self) -> Sequence[AdapterRecord]:
        self.asked += 1
        if self.asked == 1:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "away")
        return self._store.pinned()


async def test_a_job_of_a_worker_moves_the_pin_of_a_running_server(base_model: BaseModel, tmp_path: Path) -> None:
    async with live_server(tmp_path, fake_parts(base_model)) as live:
        acme = await live.caller("acme")
        first = await acme.import_adapter("fox", adapter_file(base_model, 0.5))
        await acme.adapters.WarmAdapter(pb.WarmAdapterRequest(name="fox", pin=True), metadata=acme.metadata)
        # Another process, with its own connection to the same store, trains and publishes.
        jobs = live.stores.jobs
        jobs.create(NewJob("ft-1", "acme", small_spec(), "fox", "Fox", {}), tenant_limit=9)
        claimed = jobs.claim("worker", 60.0)
        assert claimed is not None
        adapter = norm_adapter(base_model, 0.9)
        jobs.publish(claimed.lease, live.stores.adapters, write_adapter(adapter), adapter, None)
        newest = live.stores.adapters.get("acme", "fox").newest.content_hash
        assert newest != first.content_hash
        scheduler = live.services.scheduler
        async with asyncio.timeout(10):
            while not scheduler.resident(newest):  # noqa: ASYNC110 (slots cannot set an event)
                await asyncio.sleep(0.05)
            while scheduler._slots.snapshot()["pinned"] != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        held = scheduler._slots._held
        assert [mix[0][0] for mix, row in held.items() if row.pinned] == [newest]


async def test_slots_follow_the_table(tmp_path: Path) -> None:
    store, residents = open_small_store(tmp_path), FakeResidents()
    follower = Pins(store.adapters, residents)

    def publish(adapter_id: str, seed: int) -> str:
        return store.publish(adapter_id=adapter_id, seed=seed).content_hash

    one = publish("a", 1)
    store.adapters.set_pinned("acme", "a", True)
    assert (await follower.follow(), residents.pins) == (1, {one})
    two = publish("a", 2)
    assert (await follower.follow(), residents.pins) == (1, {two})
    # Pinned for one adapter and given up by another, a file's row stays pinned.
    same = publish("b", 2)
    store.adapters.set_pinned("acme", "b", True)
    store.adapters.set_pinned("acme", "a", False)
    assert (await follower.follow(), residents.pins) == (1, {same})
    # What was deleted elsewhere is let go, and nothing is loaded for that.
    store.adapters.delete("acme", "b")
    residents.rows.clear()
    assert (await follower.follow(), residents.rows) == (0, set())
    store.database.close()


async def test_a_row_that_went_with_another_adapter_comes_back(tmp_path: Path) -> None:
    store, residents = open_small_store(tmp_path), FakeResidents()
    follower = Pins(store.adapters, residents)
    content_hash = store.publish(adapter_id="a", seed=1).content_hash
    assert store.publish(tenant="other", adapter_id="b", seed=1).content_hash == content_hash
    store.adapters.set_pinned("acme", "a", True)
    await follower.follow()
    residents.drop_adapter("tenants/other/adapters/b", [content_hash])
    assert (await follower.follow(), residents.pins) == (1, {content_hash})
    store.database.close()


async def test_without_a_slot_nothing_is_loaded_for_the_other_pins(tmp_path: Path) -> None:
    store, asked = open_small_store(tmp_path), []

    class Full(FakeResidents):
        async def warm(self, mix: Mix, pin: bool | None) -> bool:
            asked.append(mix)
            raise ResourceExhausted(Reason.SLOTS_EXHAUSTED, "all pinned")

    for number in range(5):
        store.publish(adapter_id=f"a{number}", seed=number)
        store.adapters.set_pinned("acme", f"a{number}", True)
    assert await Pins(store.adapters, Full()).follow() == 0
    assert len(asked) == 1
    store.database.close()


@pytest.mark.parametrize("retry_after", [None, 1.0])
async def test_a_pin_that_lacks_weights_holds_up_no_other(tmp_path: Path, retry_after: float | None) -> None:
    store, asked = open_small_store(tmp_path), []
    first, second = (store.publish(adapter_id=name, seed=seed).content_hash for seed, name in enumerate("ab"))
    for adapter_id in "ab":
        store.adapters.set_pinned("acme", adapter_id, True)

    class Short(FakeResidents):
        async def warm(self, mix: Mix, pin: bool | None) -> bool:
            asked.append(mix[0][0])
            if mix[0][0] == first and len(self.rows) < 2:
                raise ResourceExhausted(
                    Reason.SLOTS_EXHAUSTED, "all held", metadata=NO_WEIGHTS, retry_after=retry_after
                )
            return await super().warm(mix, pin)

    residents = Short()
    follower = Pins(store.adapters, residents)
    for _ in range(4):
        assert (await follower.follow(), residents.pins) == (1, {second})
    # Once more as the other was pinned since; where only a pin that ends can help it is not read again after that.
    assert asked.count(first) == (2 if retry_after is None else 4)
    residents.rows.add("another")
    store.adapters.set_pinned("acme", "b", False)
    assert [await follower.follow() for _ in range(2)] == [1 if retry_after else 0, 1]
    assert residents.pins == {first}
    store.database.close()


async def test_a_pin_is_not_let_go_while_it_is_written(tmp_path: Path) -> None:
    store, residents = open_small_store(tmp_path), FakeResidents()
    follower = Pins(store.adapters, residents)
    content_hash = store.publish(adapter_id="a", seed=1).content_hash
    await residents.warm(((content_hash, 1.0),), True)
    following: list[asyncio.Task[int]] = []

    async def write() -> AdapterRecord:
        following.append(asyncio.create_task(follower.follow()))
        await asyncio.sleep(0.1)
        return store.adapters.set_pinned("acme", "a", True)

    assert (await follower.note(("acme", "a", content_hash), write)).pinned
    assert (await following[0], residents.pins) == (1, {content_hash})
    store.database.close()


async def test_what_cannot_be_unpinned_is_tried_again_and_told_once(tmp_path: Path) -> None:
    store, residents = open_small_store(tmp_path), FakeResidents()
    follower = Pins(store.adapters, residents)
    content_hash = store.publish(adapter_id="a", seed=1).content_hash
    store.adapters.set_pinned("acme", "a", True)
    await follower.follow()
    store.adapters.set_pinned("acme", "a", False)
    residents.refuse = True
    with capture_logs() as logs:
        assert [await follower.follow() for _ in range(2)] == [0, 0]
    assert ([entry["event"] for entry in logs], residents.pins) == (["unpin failed"], {content_hash})
    residents.refuse = False
    assert (await follower.follow(), residents.pins) == (0, set())
    store.database.close()


async def test_a_pin_that_finds_no_slot_is_tried_again_and_told_once(tmp_path: Path) -> None:
    store, residents = open_small_store(tmp_path), FakeResidents(refuse=True)
    follower = Pins(store.adapters, residents)
    content_hash = store.publish(adapter_id="a", seed=1).content_hash
    store.adapters.set_pinned("acme", "a", True)
    with capture_logs() as logs:
        assert [await follower.follow() for _ in range(3)] == [0, 0, 0]
    assert [entry["event"] for entry in logs] == ["pin failed"]
    residents.refuse = False
    assert (await follower.follow(), residents.pins) == (1, {content_hash})
    store.database.close()


async def test_a_store_that_is_away_is_asked_again(tmp_path: Path) -> None:
    store, residents = open_small_store(tmp_path), FakeResidents()
    store.publish(adapter_id="a", seed=1)
    store.adapters.set_pinned("acme", "a", True)
    table = FlakyTable(store.adapters)
    keeping = asyncio.create_task(Pins(table, residents).keep(0.01))
    async with asyncio.timeout(10):
        while not residents.pins:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    keeping.cancel()
    assert table.asked >= 2
    store.database.close()
