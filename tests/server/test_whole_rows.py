"""Adapters with dense deltas on their way through the step loop, turn by turn, by hand."""

import pytest
import torch
from generation_bench import IDLE, Bench, counts, error_of, images

from hueshift.adapters.errors import FailedPrecondition, Reason, ResourceExhausted
from hueshift.engines.interface import EngineRow, Plan
from hueshift.server.generation import LagRequest


def bench_of(dense_slots: int, max_batch: int = 4) -> Bench:
    """A bench whose engine holds so many mixes with dense deltas."""
    bench = Bench(max_batch=max_batch)
    bench.engine.dense_slots = dense_slots
    return bench


async def test_they_take_calls_of_their_own_beside_the_others() -> None:
    bench = bench_of(dense_slots=1)
    own = bench.submit(seeds=(1, 2), steps=3, adapters={"dense-0.3": 1.0})
    other = bench.submit(seeds=(3,), steps=3, adapters={"low-0.2": 1.0})
    bench.run()
    assert sorted(bench.engine.calls) == [(Plan.DENSE, 1)] * 3 + [(Plan.MERGED, 2)] * 3
    assert all(picture.plans == (Plan.MERGED,) for picture in await images(own))
    assert (await images(other))[0].plans == (Plan.DENSE,)
    assert counts(bench) == IDLE


async def test_who_waits_for_weights_holds_up_only_those_that_want_some() -> None:
    bench = bench_of(dense_slots=1)
    running = bench.submit("a", seeds=(1,), steps=4, adapters={"dense-0.3": 1.0})
    bench.turn(2)
    waiting = bench.submit("b", seeds=(2,), steps=1, adapters={"dense-0.5": 1.0})
    # The same adapter as the one that runs: it would have its weights for ever, if it were let past.
    same = bench.submit("a", seeds=(3,), steps=1, adapters={"dense-0.3": 1.0})
    other = bench.submit("c", seeds=(4,), steps=1, adapters={"low-0.2": 1.0})
    bench.turn(2)
    bench.decode()
    assert other.stream.closed
    assert not waiting.stream.closed
    assert not same.stream.closed
    bench.run()
    order = [name for name in bench.folder.loads if name.startswith("dense")]
    assert order[:2] == ["dense-0.3", "dense-0.5"]
    for handle in (running, waiting, same, other):
        assert len(await images(handle)) == 1


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"lag": LagRequest(())}, "lag"),
        ({"shared_attention": True, "seeds": (1, 2)}, "shared_attention"),
        ({"regions": (Bench().region({"low-0.2": 1.0}),)}, "regions"),
    ],
)
async def test_what_runs_under_another_plan_is_refused_beside_them(asked: dict[str, object], name: str) -> None:
    bench = bench_of(dense_slots=1)
    refused = bench.submit(adapters={"dense-0.3": 1.0}, **asked)  # type: ignore[arg-type]
    bench.run()
    error = await error_of(refused)
    assert isinstance(error, FailedPrecondition)
    assert error.reason is Reason.PLAN_UNAVAILABLE
    assert error.message.startswith(f"{name}: not together with")
    assert counts(bench) == IDLE


async def test_an_engine_that_serves_none_says_so() -> None:
    bench = bench_of(dense_slots=0)
    refused = bench.submit(adapters={"dense-0.3": 1.0})
    bench.run()
    error = await error_of(refused)
    assert isinstance(error, FailedPrecondition)
    assert "engine.merged_slots" in error.message


async def test_weights_that_do_not_fit_in_memory_are_told_as_such_and_lose_no_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of(dense_slots=1)

    def refuse(slot: int, row: EngineRow) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(bench.engine, "load_row", refuse)
        refused = bench.submit(adapters={"dense-0.3": 1.0})
        bench.run()
    error = await error_of(refused)
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.retry_after) == (Reason.DEVICE_MEMORY, 5.0)
    assert counts(bench) == IDLE
    again = bench.submit(seeds=(1,), adapters={"dense-0.3": 1.0})
    bench.run()
    assert len(await images(again)) == 1
