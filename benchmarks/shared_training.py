"""Fine-tuning jobs in one batch against one after the other, and against an SVDiff that makes its weights every step.

    python -P benchmarks/run_gpu.py shared_training

The model has Stable Diffusion's shapes and random weights; a step is a whole one of `hueshift.training`: pictures
drawn, words encoded and learned, UNet, loss, backward, AdamW. Jobs per hour leave out what comes before and after the
steps.
"""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hueshift.engines.base_model import BaseModel, read_layout
from hueshift.engines.interface import Plan
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.kernels.bench import floor_ms
from hueshift.training.defaults import complete_spec
from hueshift.training.latents import PictureLatents, PictureSet
from hueshift.training.loop import TrainingTask, train_step
from hueshift.training.methods.learnable import Learnable, Rows, Values
from hueshift.training.methods.make import make_learnable
from hueshift.training.methods.svdiff import SpectralShifts
from hueshift.training.precision import has_fast_bfloat16, mixed_precision
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.spec import Method, SubjectKind, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import StepAlone, Stepper
from hueshift.training.unet import TrainingUNet, make_unet
from hueshift.training.words import Captions

TOKENIZER = Path(__file__).resolve().parent.parent / "models" / "emoji-128" / "tokenizer"
CAPTIONS = (
    "a photo of a sks dog",
    "a sks dog in the grass",
    "a sks dog, seen from the side",
    "a painting of a sks dog",
)
COMPANIES = (1, 2, 4, 8)
# SVDiff's own batch, and the default here.
BATCHES = (1, 4)
WARM_STEPS, STEPS = 3, 12
COMPARED = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's size: the UNet's configuration, and the width, layers, heads and tokens of its text encoder."""

    name: str
    unet: Mapping[str, Any]
    text: tuple[int, int, int, int]


SHAPES = {
    "sd15": Shape("sd15", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, (768, 12, 12, 77))
}


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """A base model of random weights and its factors, on a device."""

    base: BaseModel
    factors: SpectralFactors
    device: torch.device


@dataclass(slots=True)
class Run:
    """Seconds of every step that counts, and the losses of all."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def milliseconds(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile."""
        fifths = quantiles(self.seconds, n=10, method="inclusive")
        return fifths[4] * 1e3, fifths[1] * 1e3, fifths[7] * 1e3


def make_world(shape: Shape, device: torch.device) -> World:
    """Make the model. U and V^T are random too: W is made of them, so nothing has to be decomposed."""
    torch.manual_seed(0)
    width, layers, heads, tokens = shape.text
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with device:
        unet = UNet2DConditionModel(**shape.unet)
    for module in (unet, text):
        module.to(device).eval().requires_grad_(False)
    layout = read_layout(unet, "0" * 64, width)
    factors = SpectralFactors({}, {}, {})
    for layer in layout.matrices:
        u = torch.randn(layer.rows, layer.rank, device=device) / layer.rank**0.5
        vh = torch.randn(layer.rank, layer.cols, device=device) / layer.cols**0.5
        sigma = torch.rand(layer.rank, device=device) + 0.5
        weight = unet.get_parameter(f"{layer.name}.weight")
        weight.copy_(((u * sigma) @ vh).view(weight.shape))
        factors.u[layer.name], factors.vh[layer.name], factors.sigma[layer.name] = u, vh, sigma.cpu()
    size = int(shape.unet["sample_size"])
    base = BaseModel(
        name=shape.name,
        path=Path(shape.name),
        base_hash="0" * 64,
        unet=unet,
        vae=SimpleNamespace(),
        text_encoder=text,
        tokenizer=tokenizer,
        schedule=NoiseSchedule.from_config({"prediction_type": "epsilon"}),
        layout=layout,
        latent_channels=4,
        latent_factor=8,
        sample_size=size,
        size_multiple=8,
    )
    return World(base, factors, device)


def make_spec(batch: int, seed: int) -> TrainingSpec:
    """An svdiff job with the defaults; its anchors are off, so that every step costs the same."""
    return complete_spec(
        method=Method.SVDIFF,
        subject_kind=SubjectKind.SUBJECT,
        captions=CAPTIONS,
        identifier="sks",
        class_noun="dog",
        batch_size=batch,
        seed=seed,
        anchor_below=0,
        caption_dropout=0.0,
    )


class RematerialisedShifts(SpectralShifts):
    """SVDiff as it is usually written: W = U diag(relu(sigma + delta)) V^T in every step, through autograd.

    The products run in the job's precision, like all others.
    """

    plan = Plan.DENSE

    def __init__(self, world: World, spec: TrainingSpec) -> None:
        layout, unet = world.base.layout, world.base.unet
        norms = read_norms(layout, lambda name: unet.get_parameter(f"{name}.weight"))
        super().__init__(RowLayout(layout, (), 1), world.factors, norms, spec)
        self._world, self._precision = world, spec.precision

    def rows(self, values: Values) -> Rows:
        """Every weight of the UNet."""
        world, row = self._world, super().rows(values).spectral
        if row is None:
            raise TypeError("spectral shifts have a spectral row")
        layout, weights = world.base.layout, dict[str, Tensor]()
        row = row[0].to(world.device)
        for name, begin, end in layout.spans():
            part = row[begin:end]
            if name in layout.matrix_offsets:
                shape = world.base.unet.get_parameter(f"{name}.weight").shape
                with mixed_precision(world.device, self._precision):
                    part = ((world.factors.u[name] * part) @ world.factors.vh[name]).view(shape)
            weights[name] = part
        return Rows(weights=weights)


def make_job(
    world: World,
    spec: TrainingSpec,
    unet: TrainingUNet,
    learnable: Learnable,
    stepper: Stepper,
    sharing: SharedTraining | None,
) -> tuple[TrainingTask, TrainingState]:
    """One job before its first step, on pictures that are noise."""
    base = world.base if sharing is None else sharing.own_words(world.base)
    captions = Captions(base, TextStage(base), spec)
    side = base.sample_size
    mean = torch.randn(len(CAPTIONS), 4, side, side, generator=torch.Generator().manual_seed(spec.seed))
    latents = PictureLatents(mean, torch.full_like(mean, 0.1))
    indices = range(len(CAPTIONS))
    pictures = PictureSet(latents, CAPTIONS, tuple(0 for _ in indices), torch.tensor([*indices]))
    task = TrainingTask(spec, base.schedule, unet, learnable, captions, pictures, (), world.device, stepper)
    generator = torch.Generator().manual_seed(spec.seed)
    values = learnable.initial(generator) | captions.initial()
    rates = {name: learnable.learning_rate(name) if name in ("sigma", "norm") else 1e-3 for name in values}
    return task, TrainingState(values, rates, generator, spec)


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_steps(job: tuple[TrainingTask, TrainingState], steps: int, together: Callable[[], object]) -> Run:
    """Take the first steps, meet the others, take those that count."""
    run = Run()
    for number in range(WARM_STEPS + steps):
        if number == WARM_STEPS:
            job[0].stepper.leave()
            together()
        begun = time.perf_counter()
        # Its loss is read in the step, so the device is done with all but the update.
        run.losses.append(train_step(*job, lambda _: None))
        if number >= WARM_STEPS:
            run.seconds.append(time.perf_counter() - begun)
    job[0].stepper.leave()
    settle(job[0].device)
    return run


def run_alone(world: World, spec: TrainingSpec, learnable: Learnable, steps: int) -> tuple[Run, float]:
    """One job by itself; also return the FLOPs of one of its steps, forward and backward."""
    unet = make_unet(world.base, world.factors, learnable, spec)
    job = make_job(world, spec, unet, learnable, StepAlone(), None)
    run = take_steps(job, steps, lambda: None)
    with FlopCounterMode(display=False) as counter:
        train_step(*job, lambda _: None)
    return run, float(counter.get_total_flops())


def run_shared(world: World, specs: Sequence[TrainingSpec], steps: int) -> list[Run]:
    """All jobs in threads, with their steps taken together."""
    sharing = SharedTraining(world.base, world.factors, patience=60.0)
    jobs = []
    for spec in specs:
        learnable = make_learnable(spec, world.base, world.factors)
        unet, stepper = sharing.join(spec, learnable)
        jobs.append(make_job(world, spec, unet, learnable, stepper, sharing))
    barrier = threading.Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [f.result() for f in [pool.submit(take_steps, job, steps, barrier.wait) for job in jobs]]


def rows(
    shape: Shape,
    device: torch.device,
    about: Mapping[str, Any],
    *,
    companies: Sequence[int] = COMPANIES,
    batches: Sequence[int] = BATCHES,
    steps: int = STEPS,
) -> Iterator[dict[str, Any]]:
    """Measure one model: for each batch a job that rematerialises, then each number of jobs that share."""
    world = make_world(shape, device)
    for batch in batches:
        suffix = "" if batch == 1 else f"-batch{batch}"
        spec = make_spec(batch, 0)
        alone, flops = run_alone(world, spec, make_learnable(spec, world.base, world.factors), steps)
        free(device)
        again, _ = run_alone(world, spec, RematerialisedShifts(world, spec), steps)
        free(device)
        ms = {"alone": alone.milliseconds(), "again": again.milliseconds()}
        yield {
            **_row(
                f"{shape.name}-svdiff-factored{suffix}", ms["alone"], "W in every step", ms["again"][0], batch, flops
            ),
            "error": check(alone.losses, again.losses, device),
            "jobs_per_hour": jobs_per_hour(1, spec.steps, ms["alone"][0]),
            "baseline_jobs_per_hour": jobs_per_hour(1, spec.steps, ms["again"][0]),
            **about,
        }
        for count in companies:
            runs = run_shared(world, [make_spec(batch, seed) for seed in range(count)], steps)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            free(device)
            shared, one = runs[0].milliseconds(), ms["alone"][0]
            case = f"{shape.name}-svdiff-{count}job{'s' if count > 1 else ''}{suffix}"
            yield {
                **_row(case, shared, "one at a time", count * one, count * batch, count * flops),
                "error": check(runs[0].losses, alone.losses, device),
                "jobs": count,
                "jobs_per_hour": jobs_per_hour(count, spec.steps, shared[0]),
                "baseline_jobs_per_hour": jobs_per_hour(1, spec.steps, one),
                "rematerialised_jobs_per_hour": jobs_per_hour(1, spec.steps, ms["again"][0]),
                "peak_bytes": peak,
                **about,
            }


def jobs_per_hour(jobs: int, steps: int, ms: float) -> float:
    """Jobs that are done in an hour when `jobs` of them take a step in `ms`."""
    return round(jobs * 3.6e6 / (steps * ms), 1)


def check(losses: Sequence[float], expected: Sequence[float], device: torch.device) -> float:
    """Largest relative difference of two runs' first losses. Raises SystemExit if they did not do the same.

    Later ones part in bfloat16 whatever is right: Adam makes full steps of gradients that are rounding alone.
    """
    error = max(abs(a - b) / abs(b) for a, b in zip(losses[:COMPARED], expected[:COMPARED], strict=True))
    tolerance = 5e-2 if has_fast_bfloat16(device) else 1e-3
    if not error <= tolerance:
        raise SystemExit(f"losses differ by {error:.2e}; allowed: {tolerance:.0e}")
    return float(f"{error:.2e}")


def free(device: torch.device) -> None:
    """Give back what the last run held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _row(
    case: str, ms: tuple[float, float, float], baseline: str, baseline_ms: float, batch: int, flops: float
) -> dict[str, Any]:
    floor = floor_ms(flops, 0.0)
    return {
        "bench": "shared_training",
        "case": case,
        "ms": round(ms[0], 3),
        "p20": round(ms[1], 3),
        "p80": round(ms[2], 3),
        "baseline": baseline,
        "baseline_ms": round(baseline_ms, 3),
        "ratio": round(baseline_ms / ms[0], 3),
        "floor_ms": round(floor, 5),
        "floor_share": round(floor / ms[0], 3),
        "tflops": round(flops / ms[0] / 1e9, 3),
        "flops": flops,
        "batch": batch,
    }
