"""TensorRT itself on a GPU: parity, refits there and back, captured calls, and what both cost."""

import json
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_unet import TinyParts

from hueshift.engines.build import EngineOptions
from hueshift.engines.interface import BASE_SLOT, Plan
from hueshift.engines.tensorrt_engine import TensorRtEngine
from hueshift.engines.tensorrt_loader import TensorRtError
from hueshift.engines.tensorrt_setup import Model, TensorRtParts, find_parts, load_engine, prepare_plans
from hueshift.engines.tensorrt_verify import verify

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found() -> TensorRtParts:
    """TensorRT and the GPU, or a reason to skip."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        return find_parts(torch.device("cuda"))
    except TensorRtError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def engine(found: TensorRtParts, tiny: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> TensorRtEngine:
    """Every plan of the tiny base, two adapters loaded."""
    model = Model(tiny.base, tiny.factors, tiny.rows, tiny.norms)
    folder = tmp_path_factory.mktemp("plans")
    options = EngineOptions(cache_dir=folder, kind="tensorrt", slots=5, max_batch=4, max_size=128, merge_after=1)
    try:
        plans = prepare_plans(found, model, options, lambda *stage: None)
        made = load_engine(found, model, replace(options, merge_after=100), plans)
    except TensorRtError as error:
        # TensorRT-RTX 1.7.1 builds for an H200 and then refuses to load what it built.
        pytest.skip(f"this TensorRT does not serve this GPU: {error.message}")
    verify(made, tiny.base, 1e-2)
    for slot in (1, 2):
        made.load_row(slot, tiny.row((tiny.random_adapter(slot), 1.0)))
    return made


def test_mixed_batch_equals_merged_weights(engine: TensorRtEngine, tiny: TinyParts) -> None:
    inputs = tiny.inputs(2)
    for _ in range(2):
        out = engine.denoise(Plan.FACTORED, *inputs, torch.tensor([1, 2]))
        for number in (0, 1):
            one = (inputs[0][[number]], inputs[1][[number]], inputs[2][[number]])
            row = tiny.row((tiny.random_adapter(number + 1), 1.0))
            assert float((out[[number]] - tiny.merged_output(row, *one)).abs().max()) < 3e-2


def test_refit_there_and_back_is_bit_exact(engine: TensorRtEngine, tiny: TinyParts) -> None:
    inputs = tiny.inputs(2)
    engine.merge(BASE_SLOT)
    pristine = engine.denoise_merged(*inputs)
    seen: dict[int, torch.Tensor] = {}
    for slot in (1, 2, 1, 2, BASE_SLOT):
        engine.merge(slot)
        # Twice: the second is the captured call.
        outputs = [engine.denoise_merged(*inputs) for _ in range(2)]
        assert torch.equal(*outputs)
        assert torch.equal(seen.setdefault(slot, outputs[0]), outputs[0])
    assert torch.equal(seen[BASE_SLOT], pristine)
    assert not torch.equal(seen[1], seen[2])


def test_costs_are_recorded(
    engine: TensorRtEngine, tiny: TinyParts, record_property: Callable[[str, object], None]
) -> None:
    """Medians in milliseconds, into the test report; benchmarks state their hardware themselves."""
    inputs = tiny.inputs(2)
    index = torch.tensor([1, 2])

    def median(work: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            engine.lane.wait()
            begin = time.perf_counter()
            work()
            engine.lane.wait()
            times.append(1e3 * (time.perf_counter() - begin))
        return sorted(times)[len(times) // 2]

    costs = {
        "dense": median(lambda: engine.denoise(Plan.DENSE, *inputs, index)),
        "factored": median(lambda: engine.denoise(Plan.FACTORED, *inputs, index)),
        "merged": median(lambda: engine.denoise_merged(*inputs)),
        "refit": median(lambda: engine.merge(1)),
    }
    record_property("tensorrt", json.dumps({"gpu": torch.cuda.get_device_name(), **costs}))
    assert all(cost > 0 for cost in costs.values())
