"""One call of the TensorRT engine by plan and batch, and a refit, against diffusers' UNet called eagerly.

    python -P benchmarks/run_gpu.py tensorrt_step

Needs TensorRT 10 or newer; where it is missing or refuses the GPU, that is said and nothing is measured. Every plan is
compared with torch before it is timed.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines.build import EngineOptions
from hueshift.engines.interface import Plan
from hueshift.engines.tensorrt_engine import TensorRtEngine
from hueshift.engines.tensorrt_loader import TensorRtError
from hueshift.engines.tensorrt_setup import Model, TensorRtParts, find_parts, load_engine, prepare_plans
from hueshift.engines.tensorrt_verify import verify
from hueshift.engines.torch_engine import example_inputs

BENCH = "tensorrt_step"
# fp16 plans against torch in fp32, as the server asks by default.
TOLERANCE = 1e-2


def rows(kit: Any) -> Iterator[dict[str, Any]]:
    """Measure everything at the kit's scale."""
    try:
        engine = make_engine(find_parts(kit.device), kit)
    except TensorRtError as error:
        print(f"{BENCH} skipped: {error.message} Nothing was measured.")
        return
    yield from measure(kit, engine)


def make_engine(parts: TensorRtParts, kit: Any) -> TensorRtEngine:
    """The engine with every plan, built or from the kit's folder, and verified. Raises TensorRtError."""
    model = Model(kit.base, kit.factors, kit.rows, kit.norms)
    options = EngineOptions(
        cache_dir=kit.cache,
        kind="tensorrt",
        slots=4,
        max_batch=max(kit.scale.rows),
        max_size=kit.base.pixels,
        # Any count: it decides that the merged plan is built. Calls here name their plan.
        merge_after=10**6,
    )
    plans = prepare_plans(parts, model, options, lambda stage, done, total: None)
    engine = load_engine(parts, model, options, plans)
    verify(engine, kit.base, TOLERANCE)
    return engine


def measure(kit: Any, engine: TensorRtEngine) -> Iterator[dict[str, Any]]:
    """Rows of every plan and batch, and of refits."""
    for slot, kind in ((1, AdapterKind.SPECTRAL), (2, AdapterKind.LOWRANK)):
        engine.load_row(slot, kit.rows.compose([(kit.adapter(slot, kind), 1.0)], kit.factors, kit.norms))
    engine.merge(1)
    for count in kit.scale.rows:
        latents, timesteps, cross, _ = (part.to(engine.lane.device) for part in example_inputs(kit.base, count))
        eager = time_work(engine, kit.scale.repeats, partial(kit.call_diffusers, count))
        mixed = torch.tensor([1, 2] * count)[:count]
        works: dict[str, Callable[[], object]] = {
            "dense": partial(engine.denoise, Plan.DENSE, latents, timesteps, cross, torch.tensor([2] * count)),
            "factored": partial(engine.denoise, Plan.FACTORED, latents, timesteps, cross, mixed),
            "merged": partial(engine.denoise_merged, latents, timesteps, cross),
        }
        for name, work in works.items():
            yield _row(kit, f"{name}-b{count}", time_work(engine, kit.scale.repeats, work), eager, count)
    slots = iter([2, 1] * kit.scale.repeats)
    yield _row(kit, "refit", time_work(engine, kit.scale.repeats, lambda: engine.merge(next(slots))), None, None)


def time_work(engine: TensorRtEngine, repeats: int, work: Callable[[], object]) -> list[float]:
    """Sorted milliseconds of `work`, copies in and out included: what a step of the server waits for."""
    work()
    times = []
    for _ in range(repeats):
        engine.lane.wait()
        begin = time.perf_counter()
        work()
        engine.lane.wait()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)


def _row(kit: Any, case: str, times: list[float], eager: list[float] | None, count: int | None) -> dict[str, Any]:
    repeats = len(times)
    figures: dict[str, Any] = {"ms": times[repeats // 2], "p20": times[repeats // 5], "p80": times[repeats * 4 // 5]}
    if eager is not None:
        baseline_ms = eager[repeats // 2]
        figures |= {
            "batch": count,
            "baseline": "diffusers' UNet, dense, eager",
            "baseline_ms": baseline_ms,
            "ratio": baseline_ms / figures["ms"],
        }
    row: dict[str, Any] = kit.row(BENCH, case, figures)
    return row
