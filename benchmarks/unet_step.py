"""One UNet call of the CUDA engine, by plan, batch and way of compiling, against diffusers' UNet called eagerly.

Every call is checked against torch in fp32 first, so that what is timed is right. The last row of each way is a profile
of one step: shares of matrix products, convolutions, attention, elementwise work and gaps.
"""

import gc
import re
from collections.abc import Iterator
from typing import Any

import torch

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.device_errors import release_memory
from hueshift.engines.interface import EngineRow, Plan
from hueshift.engines.torch_engine import example_inputs

BENCH = "unet_step"
PLANS = (Plan.DENSE, Plan.FACTORED, Plan.FULL, Plan.MERGED)
# The engines run in fp16: 2.5e-3 was measured for the factored form alone.
TOLERANCE = 2e-2
# In order: the first that fits a kernel's name counts.
CLASSES = (
    ("attention", r"fmha|flash|attention|sdpa|softmax|bmm"),
    ("convolution", r"conv|implicit|winograd|cudnn|dgrad|fprop|nchw|nhwc"),
    ("gemm", r"gemm|cutlass|cublas|matmul|addmm|linear|aten::mm|_product_kernel|_residual|xmma|wgmma|nvjet"),
    (
        "elementwise",
        r"elementwise|triton_|norm|_moments_|_factors_|_apply_|_scale_|copy|cat|index|vectorized|reduce|silu|gelu|mul|add"
        r"|memcpy|memset|fill",
    ),
)


def rows(kit: Any) -> Iterator[dict[str, Any]]:
    """Measure everything at the kit's scale."""
    eager = {count: kit.times(lambda count=count: kit.call_diffusers(count)) for count in kit.scale.rows}
    for compile in kit.scale.compiles:
        engine = kit.engine(compile=compile)
        slots = _load(kit, engine)
        # The full plan is never compiled.
        for plan in [plan for plan in PLANS if plan is not Plan.FULL or compile == kit.scale.compiles[0]]:
            for count in kit.scale.rows:
                error = _check(kit, engine, plan, count, slots)
                figures = _time(kit, engine, plan, count)
                yield kit.row(
                    BENCH,
                    f"{plan}-b{count}-{compile}",
                    {
                        **figures,
                        "batch": count,
                        "baseline": "diffusers' UNet, dense, eager",
                        "baseline_ms": eager[count]["ms"],
                        "ratio": eager[count]["ms"] / figures["ms"],
                        "error": error,
                        "form": "kernels" if plan is not Plan.MERGED and _on_kernels(engine, plan) else "torch",
                    },
                )
            yield _profile_row(kit, engine, plan, compile)
        engine.costs = None


def _load(kit: Any, engine: Any) -> list[int]:
    """Fill the slots with spectral and low-rank rows in turn; the second slot's weights are merged."""
    kinds = ("spectral", "lowrank")
    for slot in range(1, engine.slots):
        adapter = kit.adapter(slot, _kind(kinds[slot % 2]))
        engine.load_row(slot, kit.rows.compose([(adapter, 1.0)], kit.factors, kit.norms))
    engine.merge(1)
    engine.finish_merges()
    return list(range(1, engine.slots))


def _kind(name: str) -> Any:
    from hueshift.adapters.adapter import AdapterKind

    return AdapterKind(name)


def _index(plan: Plan, count: int, slots: list[int]) -> torch.Tensor:
    if plan is Plan.MERGED:
        return torch.full((count,), 1)
    # Dense reads branches only, so it gets low-rank rows: the odd slots are spectral's under `slot % 2`.
    fitting = [slot for slot in slots if plan is not Plan.DENSE or slot % 2 == 1]
    return torch.tensor([fitting[number // 2 % len(fitting)] for number in range(count)])


def _check(kit: Any, engine: Any, plan: Plan, count: int, slots: list[int]) -> float:
    """The largest difference from torch in fp32 over the largest output. Raises SystemExit where it is too large."""
    latents, timesteps, cross, _ = example_inputs(kit.base, count)
    index, added = _index(plan, count, slots), kit.added(count)
    found = engine.denoise(plan, latents, timesteps, cross, index, added).cpu()
    # Without guides the full plan draws what the factored one does.
    reference_plan = Plan.DENSE if plan is Plan.DENSE else Plan.FACTORED
    unet = AdaptedUNet(kit.base, kit.factors, kit.rows, reference_plan).to(kit.device, torch.float32)
    rows: list[EngineRow] = [engine.row(slot) for slot in index.tolist()]
    spectral = torch.stack([row.spectral for row in rows if row.spectral is not None])
    lowrank = torch.stack([row.lowrank.float() for row in rows if row.lowrank is not None])
    order = torch.arange(count, device=kit.device)
    with torch.no_grad():
        inputs = [part.to(kit.device) for part in (latents, timesteps, cross)]
        added = None if added is None else added.to(kit.device)
        expected = unet(*inputs, order, None if reference_plan is Plan.DENSE else spectral, lowrank, added).cpu()
    # SDXL's refers to itself, and would keep 14 GB of factors in fp32 until somebody looks.
    del unet
    gc.collect()
    release_memory()
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= TOLERANCE:
        raise SystemExit(f"{BENCH} {plan} at {count} rows: relative error {error:.2e} is over {TOLERANCE:.0e}")
    return float(f"{error:.2e}")


def _call(engine: Any, plan: Plan, count: int) -> Any:
    """What queues the captured call, without copies in and out."""
    side = engine.base.sample_size
    role = "merged 0" if plan is Plan.MERGED else plan.value
    return engine.warm_one(role, CallShape(count, side, side))


def _time(kit: Any, engine: Any, plan: Plan, count: int) -> dict[str, float]:
    call, repeats = _call(engine, plan, count), kit.scale.repeats
    with torch.no_grad():
        call()
        found = engine.lane.times_ms(call, repeats)
    return {"ms": found[repeats // 2], "p20": found[repeats // 5], "p80": found[repeats * 4 // 5]}


def _on_kernels(engine: Any, plan: Plan) -> bool:
    network = engine.networks.full if plan is Plan.FULL else engine.networks.of(plan)
    return bool(network.unet.kernel_layers)


def _profile_row(kit: Any, engine: Any, plan: Plan, compile: str) -> dict[str, Any]:
    """Where one step's time goes, as shares of its time on the device."""
    count = min(16, max(kit.scale.rows))
    call = _call(engine, plan, count)
    on_gpu = kit.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    wall = _time(kit, engine, plan, count)["ms"]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as profile, engine.lane.apart():
        call()
        engine.lane.mark().wait()
    spent = dict.fromkeys((*(name for name, _ in CLASSES), "other"), 0.0)
    for event in profile.key_averages():
        micro = float(getattr(event, "self_device_time_total", 0.0) if on_gpu else event.self_cpu_time_total)
        spent[classify_kernel(event.key)] += micro / 1000
    busy = sum(spent.values())
    whole = max(wall, busy, 1e-9)
    shares = {name: ms / whole for name, ms in spent.items()} | {"gaps": max(0.0, 1 - busy / whole)}
    beside = {name: share for name, share in shares.items() if name not in ("gemm", "convolution")}
    made: dict[str, Any] = kit.row(
        "unet_profile",
        f"{plan}-b{count}-{compile}",
        {"batch": count, "ms": wall, **shares, "next_gain": max(beside, key=lambda name: beside[name])},
    )
    return made


def classify_kernel(name: str) -> str:
    """The class of a kernel, by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in CLASSES if re.search(pattern, lower)), "other")
