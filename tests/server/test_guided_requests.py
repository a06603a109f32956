"""LAG sampling, shared attention and regions on their way through the step loop, turn by turn, by hand."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from generation_bench import IDLE, Bench, counts, error_of, images
from PIL import Image

from hueshift.adapters.errors import (
    Cancelled,
    DeadlineExceeded,
    HueshiftError,
    Internal,
    InvalidArgument,
    NotFound,
    Reason,
)
from hueshift.engines.interface import Plan
from hueshift.engines.mixes import make_mix
from hueshift.engines.region_masks import Box
from hueshift.server.generation import ImageEvent, LagRequest


def pixels(picture: ImageEvent) -> bytes:
    """What a picture shows, without what its file says."""
    with Image.open(io.BytesIO(picture.data)) as opened:
        return opened.tobytes()


async def test_pictures_that_share_attention_join_at_once_and_step_together() -> None:
    bench = Bench(max_batch=4)
    other = bench.submit(seeds=(9, 10), steps=4)
    bench.turn(2)
    shared = bench.submit(seeds=(1, 2, 3), steps=2, shared_attention=True)
    late = bench.submit(seeds=(4,), steps=1)
    bench.turn(2)
    # Two pictures would fit now, but three must; and who comes later does not take their rows.
    assert counts(bench)["active"] == 2
    bench.run()
    assert [rows for _, rows in bench.engine.calls] == [2, 2, 2, 2, 4, 3]
    assert [plan for plan, _ in bench.engine.calls][4:] == [Plan.FULL] * 2
    assert [guides.reference.tolist() for guides in bench.engine.guides] == [[0, 0, 0, 3], [0, 0, 0]]
    found = await images(shared)
    assert all(picture.plans == (Plan.FULL,) for picture in found)
    assert len(await images(other)) == 2
    assert len(await images(late)) == 1
    alone = bench.submit(seeds=(1, 2, 3), steps=2)
    bench.run()
    # Of the same pixels: their files differ in what they say about how they were made.
    same = [pixels(mine) == pixels(theirs) for mine, theirs in zip(found, await images(alone), strict=True)]
    assert same == [True, False, False]
    assert counts(bench) == IDLE


async def test_cancelling_a_shared_request_takes_all_its_pictures_out() -> None:
    bench = Bench(max_batch=4)
    shared = bench.submit(seeds=(1, 2), steps=50, shared_attention=True, adapters={"low-0.1": 1.0})
    bench.turn(3)
    assert (counts(bench)["rows"], counts(bench)["slot_uses"]) == (2, 2)
    shared.cancel()
    bench.turn()
    assert isinstance(await error_of(shared), Cancelled)
    assert bench.value("hueshift_samples_ended_total", outcome="cancelled") == 2
    assert counts(bench) == IDLE


async def test_a_shared_request_past_its_deadline_ends_as_one() -> None:
    bench = Bench(max_batch=4)
    shared = bench.submit(seeds=(1, 2), steps=50, shared_attention=True, deadline=bench.clock.monotonic() + 5)
    bench.turn(3)
    bench.clock.advance(6)  # type: ignore[attr-defined]
    bench.turn()
    assert isinstance(await error_of(shared), DeadlineExceeded)
    assert bench.value("hueshift_samples_ended_total", outcome="deadline") == 2
    assert counts(bench) == IDLE


async def test_shared_requests_of_one_tenant_leave_another_its_share() -> None:
    bench = Bench(max_batch=4)
    for i in range(12):
        bench.submit("greedy", seeds=(i, i + 1, i + 2), steps=5, shared_attention=True)
    bench.turn(2)
    late = [bench.submit("late", seeds=(i,), steps=5) for i in range(8)]
    turns = 0
    while not all(handle.stream.closed for handle in late):
        turns += 1
        bench.turn()
        bench.decode()
    # Half of the work is its: 8 pictures of 5 rows against as much of the other's, on at least 3 of 4 rows a step.
    assert turns <= 5 + 2 * 8 * 5 / 3 + 5
    for handle in late:
        assert len(await images(handle)) == 1


async def test_a_shared_request_is_not_overtaken_for_ever() -> None:
    bench = Bench(max_batch=4)
    for i in range(4):
        bench.submit("a", seeds=(i,), steps=3 + i)
    bench.turn(2)
    shared = bench.submit("b", seeds=(1, 2), steps=2, guidance_scale=4.0, shared_attention=True)
    for i in range(40):
        bench.submit("c", seeds=(i,), steps=3)
    bench.turn(10)
    bench.decode()
    assert len(await images(shared)) == 2


def region_request(bench: Bench, **given: Any) -> dict[str, Any]:
    regions = (bench.region({"low-0.2": 1.0}), bench.region({"spec-0.3": 1.0}, area=Box(32, 0, 32, 64)))
    return {"adapters": {"low-0.1": 1.0}, "regions": regions, **given}


async def test_regions_change_their_part_of_the_picture() -> None:
    bench = Bench(max_batch=16)
    plain = bench.submit(steps=3, adapters={"low-0.1": 1.0})
    left = bench.submit(steps=3, adapters={"low-0.1": 1.0}, regions=(bench.region({"low-0.2": 1.0}),))
    bench.run()
    one, other = [(await images(handle))[0] for handle in (plain, left)]
    before, after = (np.asarray(Image.open(io.BytesIO(event.data))).astype(int) for event in (one, other))
    assert (before[:, 32:] == after[:, 32:]).all()
    assert (before[:, :32] != after[:, :32]).any()
    assert other.plans == (Plan.DENSE,)
    assert [adapter.content_hash for adapter in other.regions[0]] == ["low-0.2"]
    assert b"low-0.2*1" in other.data
    assert one.regions == ()


async def test_regions_count_as_rows_and_choose_the_plan() -> None:
    bench = Bench(max_batch=12)
    handle = bench.submit(**region_request(bench, guidance_scale=3.0, seeds=(1, 2), steps=2))
    bench.turn(2)
    assert (counts(bench)["rows"], counts(bench)["slot_uses"]) == (12, 6)
    bench.run()
    assert bench.engine.calls == [(Plan.FACTORED, 12), (Plan.FACTORED, 12)]
    assert bench.value("hueshift_batch_adapters_sum") == 2 * 3
    assert len(await images(handle)) == 2
    assert counts(bench) == IDLE


async def test_regions_wait_until_every_slot_is_theirs_and_hold_none_before() -> None:
    bench = Bench(slots=4, max_batch=8)
    running = bench.submit("b", steps=4, adapters={"low-0.4": 1.0})
    bench.turn(2)
    waiting = bench.submit(**region_request(bench, steps=2))
    # More of the first mix must not keep the slots for ever.
    more = [bench.submit("b", seeds=(i,), steps=4, adapters={"low-0.4": 1.0}) for i in range(3)]
    bench.turn(1)
    assert (counts(bench)["active"], counts(bench)["slot_uses"]) == (1, 1)
    bench.run()
    for handle in (running, waiting, *more):
        assert len(await images(handle)) == 1
    assert counts(bench) == IDLE


async def test_pinned_slots_that_leave_too_few_end_the_request() -> None:
    bench = Bench(slots=4, max_batch=8)
    bench.slots.pin(bench.slots.prepare(make_mix([("low-0.5", 1.0)])), True)
    handle = bench.submit(**region_request(bench))
    fits = bench.submit(adapters={"low-0.5": 1.0}, regions=region_request(bench)["regions"])
    bench.run()
    error = await error_of(handle)
    assert error.reason is Reason.SLOTS_EXHAUSTED
    assert "3 adapter slots" in error.message
    assert len(await images(fits)) == 1
    assert counts(bench) == IDLE


async def test_a_mix_evicted_while_the_request_waited_is_prepared_again() -> None:
    bench = Bench(slots=4, max_batch=2)
    first = bench.submit(steps=1, adapters={"spec-0.3": 1.0})
    bench.run()
    blocker = bench.submit(steps=3, guidance_scale=2.0)
    bench.turn(2)
    # Its region's mix is in a slot now, so it is prepared without a row; by the time there is room it is gone.
    waiting = bench.submit(steps=1, regions=(bench.region({"spec-0.3": 1.0}),))
    bench.turn(1)
    bench.slots.drop(["spec-0.3"])
    bench.run()
    for handle in (first, blocker, waiting):
        assert len(await images(handle)) == 1
    assert bench.folder.loads.count("spec-0.3") == 2


async def test_a_row_the_engine_refuses_leaves_nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(max_batch=8)
    load = bench.engine.load_row

    def refuse(slot: int, row: Any) -> None:
        if row.spectral is not None:
            raise RuntimeError("no")
        load(slot, row)

    monkeypatch.setattr(bench.engine, "load_row", refuse)
    handle = bench.submit(**region_request(bench, seeds=(1, 2), shared_attention=True))
    bench.run()
    assert isinstance(await error_of(handle), Internal)
    assert counts(bench) == IDLE


@pytest.mark.parametrize("begun", [True, False])
async def test_deleting_a_regions_adapter_ends_the_request(begun: bool) -> None:
    bench = Bench(max_batch=6)
    blocker = None if begun else bench.submit(seeds=(1, 2, 3, 4, 5), steps=4)
    bench.turn(2)
    handle = bench.submit(**region_request(bench, steps=9))
    ignored = bench.submit(regions=(bench.region({"spec-0.3": 0.0}),), steps=1)
    bench.turn(2)
    assert (counts(bench)["slot_uses"] == 3) == begun
    bench.scheduler.drop_adapter("tenants/a/adapters/spec-0.3", ["spec-0.3"])
    bench.turn(1)
    error = await error_of(handle)
    assert isinstance(error, NotFound)
    assert error.reason is Reason.ADAPTER_DELETED
    bench.run()
    assert len(await images(ignored)) == 1
    assert blocker is None or len(await images(blocker)) == 5
    assert counts(bench) == IDLE


async def test_lag_confines_by_the_adapters_words_and_sends_the_masks() -> None:
    bench = Bench()
    asked: dict[str, Any] = {"adapters": {"fox-0.3": 1.0}, "prompt": "fox animal", "steps": 2}
    masked = bench.submit(lag=LagRequest(return_masks=True), seeds=(1, 2), **asked)
    unmasked = bench.submit(lag=LagRequest(), **asked)
    bench.run()
    assert all(torch.equal(row, torch.tensor([1.0, 1, 0])) for guides in bench.engine.guides for row in guides.lag)
    for picture in await images(masked):
        mask = Image.open(io.BytesIO(picture.mask))
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (64, 64))
        # The fake engine's branches act on half of the blocks.
        assert mask.getextrema() == (128, 128)
        assert picture.plans == (Plan.FULL,)
    assert (await images(unmasked))[0].mask == b""


async def test_lag_takes_the_requests_own_words_and_every_occurrence() -> None:
    bench = Bench()
    handle = bench.submit(
        adapters={"low-0.3": 1.0, "fox-0.1": 1.0}, prompt="hat and hat", steps=1, lag=LagRequest(("hat",))
    )
    bench.run()
    assert len(await images(handle)) == 1
    assert bench.engine.guides[0].lag.tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ({"prompt": "a fox", "adapters": {"fox-0.3": 1.0}}, {"prompt": "'animal'"}),
        ({"prompt": "a b", "adapters": {"fox-0.3": 1.0}}, {"prompt": "'fox'"}),
        ({"prompt": "a fox", "adapters": {"low-0.3": 1.0}}, {"lag.words": "low-0.3"}),
        ({"prompt": "a fox", "adapters": {"spec-0.3": 1.0}}, {"lag": "low-rank"}),
        ({"prompt": "a fox", "adapters": {"fox-0.3": 0.0}}, {"lag": "low-rank"}),
        # Three tokens are read.
        ({"prompt": "one two three fox", "adapters": {"low-1": 1.0}, "words": ("fox",)}, {"lag.words[0]": "'fox'"}),
        (
            {"prompt": "a fox", "adapters": {"low-1": 1.0}, "words": ("b", "fox", "c")},
            {"lag.words[0]": "'b'", "lag.words[2]": "'c'"},
        ),
    ],
)
async def test_lag_errors_name_the_word_and_the_field(asked: dict[str, Any], fields: dict[str, str]) -> None:
    bench = Bench()
    handle = bench.submit(lag=LagRequest(asked.pop("words", ())), **asked)
    bench.run()
    error: HueshiftError = await error_of(handle)
    assert isinstance(error, InvalidArgument)
    assert {violation.field for violation in error.violations} == set(fields)
    for field, text in fields.items():
        assert any(text in v.description for v in error.violations if v.field == field)
    assert counts(bench) == IDLE


async def test_everything_at_once_beside_plain_pictures_equals_each_alone() -> None:
    def submit(bench: Bench, number: int) -> Any:
        wanted: list[dict[str, Any]] = [
            region_request(bench, seeds=(1, 2), steps=3, shared_attention=True, guidance_scale=3.0),
            {"adapters": {"fox-0.3": 1.0}, "prompt": "fox animal", "lag": LagRequest(return_masks=True), "steps": 4},
            {"steps": 2, "seeds": (5, 6, 7)},
            region_request(bench, steps=4, lag=LagRequest(("fox",))),
        ]
        return bench.submit(**wanted[number])

    together = Bench(max_batch=32)
    handles = [submit(together, number) for number in range(4)]
    together.run()
    assert len(together.engine.calls) == 4
    for number, handle in enumerate(handles):
        bench = Bench(max_batch=32)
        alone = submit(bench, number)
        bench.run()
        for mine, theirs in zip(await images(handle), await images(alone), strict=True):
            assert (mine.data, mine.mask) == (theirs.data, theirs.mask)
