"""What GetModel tells of the engine's capacity: of a plain engine, and of one that measured what fits."""

from fake_clock import FakeClock
from fake_engine import FakeEngine
from merging_engine import MergingFakeEngine
from tiny_unet import SD1_LIKE, tiny_parts

from hueshift.engines.cost_model import CostTable
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_options import CudaOptions
from hueshift.server.rpc.model_service import describe_capacity
from hueshift.v1 import model_pb2


class MeasuredFakeEngine(MergingFakeEngine):
    """As CudaEngine: calls are filled up, and what fits is known for two sizes."""

    def __init__(self) -> None:
        super().__init__(CostTable({}, merge_ms=1.0), FakeClock(), weight_slots=3, slots=9)
        self.buckets = (2, 4, 8)
        self.capacity = {(64, 96): 6, (64, 64): 8}


def test_a_plain_engine_tells_its_rows_and_slots() -> None:
    found = describe_capacity(FakeEngine(slots=9, max_batch=6), 8)
    assert found == model_pb2.EngineCapacity(max_rows=6, adapter_slots=8)


def test_a_measured_engine_tells_what_fits_in_pixels() -> None:
    engine = MeasuredFakeEngine()
    found = describe_capacity(engine, 8)
    assert (found.max_rows, found.adapter_slots, found.merged_slots) == (engine.max_batch, 8, 3)
    assert list(found.buckets) == [2, 4, 8]
    assert [(size.width, size.height, size.rows) for size in found.sizes] == [(512, 512, 8), (768, 512, 6)]


def test_the_cuda_engine_is_a_measured_one() -> None:
    tiny = tiny_parts(SD1_LIKE)
    options = CudaOptions(warm_sizes=((8, 8),), max_area=64, weight_slots=1)
    given = (tiny.base, tiny.factors, tiny.rows, tiny.norms)
    engine = CudaEngine(*given, slots=5, max_batch=4, lane=HostLane(), options=options)
    engine.capacity = {(8, 8): 3}
    found = describe_capacity(engine, 8)
    assert (found.max_rows, found.adapter_slots, found.merged_slots) == (4, 4, 1)
    assert found.buckets[-1] == 4
    assert [(size.width, size.height, size.rows) for size in found.sizes] == [(64, 64, 3)]
