"""Places that tenants take turns for: fair, never more than there are, and never lost."""

import asyncio

from hueshift.server.tenant_turns import TenantTurns


async def test_a_burst_of_one_tenant_does_not_keep_the_others_waiting() -> None:
    turns, begin, order, running = TenantTurns(2), asyncio.Event(), list[str](), 0

    async def work(tenant: str, name: str) -> None:
        nonlocal running
        async with turns.taken(tenant):
            running += 1
            assert running <= 2
            order.append(name)
            await begin.wait()
            running -= 1

    burst = [asyncio.create_task(work("a", f"a{number}")) for number in range(6)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(work(name, name)) for name in ("b", "c")]
    await asyncio.sleep(0)
    begin.set()
    await asyncio.gather(*burst, *others)
    assert order == ["a0", "a1", "a2", "b", "c", "a3", "a4", "a5"]
    assert turns._free == 2


async def test_a_place_is_not_lost_with_who_waited_for_it() -> None:
    turns, release = TenantTurns(1), asyncio.Event()

    waiting: list[asyncio.Task[None]] = []

    async def work(until: asyncio.Event | None) -> None:
        async with turns.taken("a"):
            if until is not None:
                await until.wait()
        if until is release:
            # The place has come to this one, which has not run since.
            waiting[1].cancel()

    holder = asyncio.create_task(work(release))
    await asyncio.sleep(0)
    waiting += [asyncio.create_task(work(None)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    release.set()
    await holder
    await asyncio.gather(*waiting, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert (turns._free, len(turns._waiting)) == (1, 0)
    # And one that holds it.
    holder = asyncio.create_task(work(asyncio.Event()))
    await asyncio.sleep(0)
    assert turns._free == 0
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)
    assert turns._free == 1
