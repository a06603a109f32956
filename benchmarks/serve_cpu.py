"""Throughput on a CPU: one mixed batch of four through the server, against four calls of diffusers' own pipeline.

The batch is base, spectral, low-rank and another spectral adapter, over gRPC, PNG out, all from one running server. The
baseline draws the same prompts with the same scheduler, steps and guidance, one after the other, in fp32 and without
its safety checker. Both alternate in one run; medians are compared. Appends a line to
benchmarks/results/serve_cpu.jsonl.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.file import write_adapter
from hueshift.adapters.layout import BaseLayout
from hueshift.client.aio import AsyncClient
from hueshift.client.choices import Sampler
from hueshift.engines.base_model import load_base_model
from hueshift.examples.live_server import live_server
from hueshift.models.embedded import EMBEDDED_MODEL

STEPS, GUIDANCE = 15, 5.0
PROMPTS = (
    "a fluent 3d emoji of a dog face",
    "a noto emoji of a red apple",
    "a twemoji emoji of a house",
    "a fluent flat emoji of a bell",
)
ADAPTERS = (None, "spectral-1", "lowrank-1", "spectral-2")
RESULTS = Path(__file__).resolve().parent / "results" / "serve_cpu.jsonl"


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds of each repeat, and of the UNet steps alone within one mixed batch."""

    ours: Sequence[float]
    baseline: Sequence[float]
    floor: float


def make_adapters(layout: BaseLayout) -> dict[str, bytes]:
    """Return small random adapters as files: their values do not change the work, only the pictures."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    files = {}
    for name in ("spectral-1", "spectral-2"):
        shifts = {layer.name: normal(layer.rank) for layer in layout.matrices}
        files[name] = write_adapter(Adapter(AdapterKind.SPECTRAL, layout.base_hash, "svdiff", spectral=shifts))
    factors = {
        layer.name: LowRankFactors(
            normal(max(1, layer.rows // 20), layer.cols), normal(layer.rows, max(1, layer.rows // 20))
        )
        for layer in layout.matrices
        if layer.name.endswith("proj_out")
    }
    files["lowrank-1"] = write_adapter(Adapter(AdapterKind.LOWRANK, layout.base_hash, "residuals", lowrank=factors))
    return files


def load_pipeline() -> Callable[[], None]:
    """Return a function that draws the four pictures with diffusers."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

    disable_progress_bar()
    disable_transformers_progress_bar()
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        EMBEDDED_MODEL, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> None:
        for seed, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(seed)
            pipeline(prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)

    return draw


async def draw_batch(client: AsyncClient) -> float:
    """Draw the mixed batch and return the seconds its steps took, from first to last."""
    answers = await asyncio.gather(
        *(
            client.generate_images(
                prompt,
                adapters=[adapter] if adapter else [],
                seeds=[seed],
                steps=STEPS,
                guidance_scale=GUIDANCE,
                sampler=Sampler.DPMPP_2M,
            )
            for seed, (prompt, adapter) in enumerate(zip(PROMPTS, ADAPTERS, strict=True))
        )
    )
    pictures = [picture for answer in answers for picture in answer]
    used = [picture.adapters[0].adapter.rsplit("/", 1)[-1] if picture.adapters else None for picture in pictures]
    if tuple(used) != ADAPTERS:
        raise RuntimeError(f"the batch was made with {used} instead of {ADAPTERS}")
    return max(picture.timings.denoise for picture in pictures)


async def measure(repeats: int, cache: Path, progress: Progress) -> Timings:
    """Alternate the two, after one unmeasured round of each."""
    files = make_adapters(load_base_model(EMBEDDED_MODEL).layout)
    baseline_draw = load_pipeline()
    bar = progress.add_task("measure", total=repeats + 1)
    ours, baseline, floors = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        # No worker: nothing but the two sides of the comparison may use the cores.
        running = live_server(("bench",), cache, log, {"HUESHIFT_TRAINING__WORKERS": "0"})
        async with running as server, AsyncClient(server.grpc, api_key=server.keys["bench"]) as client:
            await client.wait_until_ready()
            for name, data in files.items():
                await client.import_adapter(data, adapter_id=name)
                await client.warm_adapter(name)
            for _ in range(repeats + 1):
                begin = time.perf_counter()
                floors.append(await draw_batch(client))
                middle = time.perf_counter()
                await asyncio.to_thread(baseline_draw)
                ours.append(middle - begin)
                baseline.append(time.perf_counter() - middle)
                progress.advance(bar)
    return Timings([1000 * s for s in ours[1:]], [1000 * s for s in baseline[1:]], 1000 * median(floors[1:]))


def result_row(timings: Timings) -> dict[str, Any]:
    """Return the line of results."""
    ours, baseline = median(timings.ours), median(timings.baseline)
    fifths = quantiles(timings.ours, n=5, method="inclusive")
    packages = ("hueshift", "torch", "diffusers", "onnxruntime", "grpcio")
    return {
        "bench": "serve_cpu",
        "case": f"mixed batch of {len(PROMPTS)}, dpmpp_2m {STEPS} steps, guidance {GUIDANCE:g}, gRPC and PNG included",
        "ms": round(ours, 1),
        "p20": round(fifths[0], 1),
        "p80": round(fifths[3], 1),
        "baseline": f"{len(PROMPTS)} single StableDiffusionPipeline calls, fp32",
        "baseline_ms": round(baseline, 1),
        "ratio": round(baseline / ours, 3),
        "floor_ms": round(timings.floor, 1),
        "hardware": f"{os.cpu_count()}-core {platform.machine()} CPU",
        # Well above the number of cores: something else used them too, and the times (less so the ratio) are too long.
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit that is measured, marked when the tree differs from it; empty outside of a repository."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> int:
    """Measure, append the result and print it."""
    parser = argparse.ArgumentParser(description="Throughput of the server on a CPU, against diffusers' pipeline.")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds of each")
    parser.add_argument("--cache", type=Path, default=Path("out/cache"), help="folder of exported graphs")
    options = parser.parse_args()
    with Progress(console=Console(stderr=True)) as progress:
        row = result_row(asyncio.run(measure(max(2, options.repeats), options.cache, progress)))
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))
    print(f"the mixed batch is {row['ratio']:.2f} times as fast as diffusers' pipeline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
