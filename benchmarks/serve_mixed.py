"""Serving many tenants with Zipf-distributed adapters: the scheduler in this process, against three other ways.

(a) diffusers' pipeline that loads, fuses and unfuses a LoRA for each request; (b) the same with peft's hot swap; (c)
this engine with one user at a time, whose adapter is merged first. They serve one request after the other, so their
latencies with many tenants follow from their service times. Tenants ask for the next picture when they have the last.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines.conditioning import CrossInputs, make_conditioner
from hueshift.engines.cuda_setup import planner_of
from hueshift.engines.denoise import advance, start_sample
from hueshift.engines.half_decoder import serving_decoder
from hueshift.engines.interface import Plan
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.residency import SlotCache
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.torch_engine import example_inputs
from hueshift.engines.vae import VaeStage
from hueshift.server.clock import SystemClock
from hueshift.server.generation import AppliedAdapter, GenerationRequest
from hueshift.server.metrics import Metrics
from hueshift.server.residency_metrics import ResidencyMetrics
from hueshift.server.scheduler import Scheduler

BENCH = "serve_mixed"
GUIDANCE = 7.5
PROMPT = "a noto emoji of a red apple"
ZIPF = 1.1
BUDGET = 1 << 33
# Tenants and adapters of the comparison; the others vary one of the two.
USUAL_TENANTS, USUAL_ADAPTERS = 8, 1000


class Limits:
    """No limits."""

    queue_size = 1 << 20
    tenant_queue_size = 1 << 20


def rows(kit: Any) -> Iterator[dict[str, Any]]:
    """Serve every load and compare."""
    scale = kit.scale
    compile = scale.compiles[-1]
    engine = kit.engine(compile=compile, slots=64, max_batch=max(scale.rows))
    tenants = USUAL_TENANTS if USUAL_TENANTS in scale.tenants else max(scale.tenants)
    adapters = USUAL_ADAPTERS if USUAL_ADAPTERS in scale.adapters else max(scale.adapters)
    others = {
        "a_fuse": _pipeline_times(kit, hotswap=False),
        "b_hotswap": _pipeline_times(kit, hotswap=True),
        "c_swap_per_user": _swap_times(kit, engine),
    }
    bare = _bare_rate(kit, engine, min(tenants, engine.max_batch // 2))
    loads = [(count, adapters) for count in scale.tenants]
    loads += [(tenants, count) for count in scale.adapters if count != adapters]
    for kind in (AdapterKind.SPECTRAL, AdapterKind.LOWRANK):
        for users, registered in loads:
            served = asyncio.run(serve(kit, engine, kind, users, registered))
            figures: dict[str, Any] = {
                "tenants": users,
                "adapters": registered,
                "images_per_s": len(served.latencies) / served.seconds,
                **_percentiles(served.latencies),
                "overhead": served.overhead,
                "bare_images_per_s": bare,
                "compile": str(compile),
            }
            for name, times in others.items():
                waits = closed_loop(times, users)
                figures[f"{name}_images_per_s"] = len(times) / sum(times)
                figures[f"{name}_p50_s"] = _percentiles(waits)["p50_s"]
                figures[f"ratio_{name}"] = figures["images_per_s"] / figures[f"{name}_images_per_s"]
            yield kit.row(BENCH, f"{users}tenants-zipf-{kind}-{registered}adapters", figures)


@dataclass(frozen=True)
class Served:
    """Seconds of each picture and of all. `overhead` is what the step loop took over its calls, as a share of them."""

    latencies: list[float]
    seconds: float
    overhead: float


async def serve(kit: Any, engine: Any, kind: AdapterKind, tenants: int, registered: int) -> Served:
    """Draw pictures for `tenants` that ask in turn."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    observer = ResidencyMetrics(metrics)
    host = HostCache(lambda key: kit.adapter(int(key), kind), BUDGET, observer)
    pinned = kit.device.type == "cuda"
    cache = RowCache(host, kit.rows, kit.factors, kit.norms, BUDGET, observer, pinned=pinned)
    scheduler = Scheduler(
        engine,
        kit.base,
        make_conditioner(kit.base, kit.factors, dtype=engine.dtype),
        VaeStage(kit.base, half=serving_decoder(kit.base, fuse=True)),
        SlotCache(engine, cache, observer),
        metrics,
        SystemClock(),
        Limits(),
        planner=planner_of(engine),
    )
    scheduler.start()
    drawn = iter(zipf(registered, kit.scale.requests * (1 + tenants)))
    latencies: list[float] = []

    async def ask(tenant: int, number: int) -> None:
        begin = time.perf_counter()
        handle = scheduler.submit(_request(kit, tenant, number, next(drawn)))
        async for _ in handle.events():
            pass
        latencies.append(time.perf_counter() - begin)

    async def tenant_asks(tenant: int, count: int) -> None:
        for number in range(count):
            await ask(tenant, number)

    try:
        await asyncio.gather(*(tenant_asks(tenant, 1) for tenant in range(tenants)))
        latencies.clear()
        before = _loop_seconds(registry)
        begin = time.perf_counter()
        share = max(1, kit.scale.requests // tenants)
        await asyncio.gather(*(tenant_asks(tenant, share) for tenant in range(tenants)))
        seconds = time.perf_counter() - begin
        loop, calls = (now - then for now, then in zip(_loop_seconds(registry), before, strict=True))
        return Served(latencies, seconds, loop / calls - 1)
    finally:
        await asyncio.to_thread(scheduler.close)


def _loop_seconds(registry: CollectorRegistry) -> tuple[float, float]:
    """Seconds of the step loop with pictures, and of those the seconds of the engine's work, as the service exports."""
    names = ("hueshift_step_loop_seconds_total", "hueshift_step_call_seconds_total")
    loop, calls = (registry.get_sample_value(name) or 0.0 for name in names)
    return loop, calls


def _request(kit: Any, tenant: int, number: int, adapter: int) -> GenerationRequest:
    applied = AppliedAdapter(f"tenants/t{tenant}/adapters/a{adapter}", 1, str(adapter), 1.0)
    fields: dict[str, Any] = {
        "request_id": f"{tenant}-{number}",
        "tenant": f"t{tenant}",
        "prompt": PROMPT,
        "negative_prompt": "",
        "adapters": (applied,),
        "seeds": (number,),
        "steps": kit.scale.steps,
        "guidance_scale": GUIDANCE,
        "sampler": SamplerKind.DPMPP_2M,
        "eta": 0.0,
        "width": kit.base.pixels,
        "height": kit.base.pixels,
        "format": PictureFormat.PNG,
        "preview_interval": 0,
        "priority": 0,
        "deadline": SystemClock().monotonic() + 3600,
    }
    return GenerationRequest(**fields)


def zipf(registered: int, count: int) -> list[int]:
    """Adapters of requests, by popularity 1 / rank^ZIPF, from a fixed seed."""
    weights = torch.arange(1, registered + 1, dtype=torch.float64) ** -ZIPF
    generator = torch.Generator().manual_seed(7)
    return [int(one) for one in torch.multinomial(weights, count, replacement=True, generator=generator)]


def closed_loop(times: Sequence[float], tenants: int) -> list[float]:
    """Latencies of requests served one by one, first come first served, by tenants that always have one waiting."""
    free_at, asked = 0.0, [0.0] * tenants
    latencies = []
    for number, seconds in enumerate(times):
        tenant = number % tenants
        free_at = max(free_at, asked[tenant]) + seconds
        latencies.append(free_at - asked[tenant])
        asked[tenant] = free_at
    # The first round finds an empty server.
    return latencies[tenants:] or latencies


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_s": ordered[len(ordered) // 2], "p99_s": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}


def _swap_times(kit: Any, engine: Any) -> list[float]:
    """(c): seconds of each picture when one user is served at a time, its adapter merged into the weights."""
    times = []
    vae = VaeStage(kit.base, half=serving_decoder(kit.base, fuse=True))
    for number in range(max(2, kit.scale.requests // 8)):
        row = kit.rows.compose([(kit.adapter(number, AdapterKind.SPECTRAL), 1.0)], kit.factors, kit.norms)
        begin = time.perf_counter()
        engine.load_row(1, row)
        engine.merge(1)
        engine.finish_merges()
        sample = _sample(kit, number, 1)
        # Until the weights are written the engine would answer by the factored plan: the swap comes first here.
        while 1 not in engine.merged:
            time.sleep(0)
        while not sample.done:
            advance(engine, [sample], Plan.MERGED)
        vae.decode(sample.latents[None])
        times.append(time.perf_counter() - begin)
    return times[1:]


def _bare_rate(kit: Any, engine: Any, pictures: int) -> float:
    """Images per second of the step loop's body alone, factored, without text, VAE, files or scheduling."""
    begin = 0.0
    for timed in (False, True):
        samples = [_sample(kit, number, 1 + number % (engine.slots - 1)) for number in range(pictures)]
        begin = time.perf_counter()
        while not samples[0].done:
            advance(engine, samples, Plan.FACTORED)
        float(samples[0].latents.sum())
        if timed:
            break
    return pictures / (time.perf_counter() - begin)


def _sample(kit: Any, seed: int, slot: int) -> Any:
    cross = example_inputs(kit.base, 2)[2].to(kit.device, kit.dtype)
    table = make_table(kit.base.schedule, SamplerKind.DPMPP_2M, kit.scale.steps)
    side = kit.base.sample_size
    inputs = CrossInputs((cross,))
    return start_sample(seed, (4, side, side), cross=inputs, guidance=GUIDANCE, table=table, slot=slot)


def _pipeline_times(kit: Any, *, hotswap: bool) -> list[float]:
    """(a) and (b): seconds of each picture of diffusers' pipeline with a LoRA of its own."""
    pipeline, state_of = _pipeline(kit), _lora_states(kit)
    times = []
    for number in range(max(2, kit.scale.requests // 8)):
        begin = time.perf_counter()
        unet = pipeline.unet
        if hotswap:
            unet.load_lora_adapter(state_of(number), prefix=None, adapter_name="user", hotswap=number > 0)
        else:
            unet.load_lora_adapter(state_of(number), prefix=None, adapter_name="user")
            unet.fuse_lora()
        pipeline(PROMPT, num_inference_steps=kit.scale.steps, guidance_scale=GUIDANCE, output_type="np")
        if not hotswap:
            unet.unfuse_lora()
            unet.unload_lora()
        times.append(time.perf_counter() - begin)
    return times[1:]


def _pipeline(kit: Any) -> Any:
    import copy

    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    base = kit.base
    parts = [copy.deepcopy(part).to(kit.dtype) for part in (base.vae, base.text_encoder, base.unet)]
    pipeline: Any = StableDiffusionPipeline(
        vae=parts[0],
        text_encoder=parts[1],
        tokenizer=base.tokenizer,
        unet=parts[2],
        scheduler=DPMSolverMultistepScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _lora_states(kit: Any) -> Any:
    linear = {layer.name for layer in kit.base.layout.matrices if not layer.is_conv}

    def state_of(seed: int) -> dict[str, torch.Tensor]:
        factors = kit.adapter(seed, AdapterKind.LOWRANK).lowrank
        named = {(name, part): getattr(parts, part) for name, parts in factors.items() for part in ("a", "b")}
        return {
            f"{name}.lora_{part.upper()}.weight": tensor.to(kit.device, kit.dtype)
            for (name, part), tensor in named.items()
            if name in linear
        }

    return state_of
