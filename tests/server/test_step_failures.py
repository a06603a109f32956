"""What fails in the step loop ends the requests it belongs to, and nothing else."""

from generation_bench import IDLE, Bench, counts, error_of, images
from torch import Tensor

from hueshift.adapters.errors import Internal, InvalidArgument, NotFound, Reason
from hueshift.engines.interface import Plan
from hueshift.engines.samplers import SamplerKind


async def test_dropping_an_adapter_ends_its_requests_and_evicts_its_rows() -> None:
    bench = Bench(max_batch=2)
    running = bench.submit(steps=50, adapters={"low-0.1": 1.0, "low-0.2": 0.5})
    queued = bench.submit(steps=5, seeds=(1, 2), adapters={"low-0.1": 1.0})
    other = bench.submit("b", steps=5, adapters={"low-0.2": 1.0})
    weightless = bench.submit("b", steps=5, adapters={"low-0.1": 0.0})
    bench.turn(3)
    bench.folder.deleted.add("low-0.1")
    bench.scheduler.drop_adapter("tenants/a/adapters/low-0.1", ["low-0.1"])
    bench.turn()
    for handle in (running, queued):
        error = await error_of(handle)
        assert isinstance(error, NotFound)
        assert error.reason is Reason.ADAPTER_DELETED
    assert not bench.scheduler.resident("low-0.1")
    bench.run()
    assert len(await images(other)) == len(await images(weightless)) == 1
    late = bench.submit(adapters={"low-0.1": 1.0})
    bench.run()
    assert (await error_of(late)).reason is Reason.ADAPTER_DELETED
    assert counts(bench) == IDLE


async def test_an_engine_failure_ends_its_batch_and_nothing_else() -> None:
    bench = Bench(max_batch=2)

    def fail(plan: Plan, slots: Tensor) -> None:
        bench.engine.on_call = None
        raise RuntimeError("out of memory")

    hit = [bench.submit(seeds=(i, i + 10), steps=3, adapters={"low-0.1": 1}) for i in range(1)]
    spared = bench.submit(steps=3)
    bench.engine.on_call = fail
    bench.turn(2)
    for handle in hit:
        error = await error_of(handle)
        assert isinstance(error, Internal)
        assert "out of memory" not in error.message
        assert isinstance(error.__cause__, RuntimeError)
    bench.run()
    assert len(await images(spared)) == 1
    assert bench.value("hueshift_samples_ended_total", outcome="failed") == 2
    assert counts(bench) == IDLE


async def test_preparation_errors_reach_the_caller() -> None:
    bench = Bench()
    bench.folder.deleted.add("low-0.5")
    missing = bench.submit(adapters={"low-0.5": 1.0})
    too_many = bench.submit(sampler=SamplerKind.LCM, steps=51)
    clash = bench.submit(adapters={"spec-0.1": 1.0, "spec-0.2": 1.0})
    broken = bench.submit(adapters={"low-x": 1.0})
    bench.run()
    assert isinstance(await error_of(missing), NotFound)
    assert isinstance(await error_of(too_many), InvalidArgument)
    assert (await error_of(clash)).reason is Reason.ADAPTERS_INCOMPATIBLE
    assert isinstance(await error_of(broken), Internal)
    assert counts(bench) == IDLE
