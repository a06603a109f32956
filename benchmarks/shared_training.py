"""Fine-tuning jobs in one batch against one after the other, and against an SVDiff that makes its weights every step.

    python -P benchmarks/run_gpu.py shared_training

The model has Stable Diffusion's shapes and random weights; a step is a whole one of `hueshift.training`: pictures
drawn, words encoded and learned, UNet, loss, backward, AdamW. Jobs per hour leave out what comes before and after the
steps, and rows anchored to the base. Steps are not waited for one by one, as in a worker: a block of them is timed from
one standstill to the next, with all jobs in every step.

Rows come in two ways of running (training.compile), each with baselines of its own: launched one by one, and the middle
of the step as a CUDA graph. In each: one job factored against one that makes W in every step, then 1, 2, 4 and 8 in
shared steps against one alone; beside that the plain loop, one at a time launch by launch. compiled_training.py has the
third way. About two minutes on an H200, counted.
"""

import copy
import gc
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from hueshift.engines.cuda_lane import CudaLane, GraphLane
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.kernels.bench import floor_ms, load_script
from hueshift.training.arrivals import MOST_UNDERWAY
from hueshift.training.defaults import complete_spec
from hueshift.training.devices import prepare_device
from hueshift.training.latents import PictureLatents, PictureSet
from hueshift.training.loop import TrainingTask, train_step
from hueshift.training.methods.learnable import Learnable
from hueshift.training.methods.make import make_learnable
from hueshift.training.precision import has_fast_bfloat16
from hueshift.training.sharing.captured import CapturedSteps
from hueshift.training.sharing.compiled import Compiler
from hueshift.training.sharing.shared_training import SharedStepper, SharedTraining
from hueshift.training.sharing.together import Share, SharedStep
from hueshift.training.spec import Method, SubjectKind, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import StepAlone, Stepper, StepWork, Turn
from hueshift.training.unet import TrainingUNet, make_unet
from hueshift.training.words import Captions

BASELINE = Path(__file__).with_name("rematerialised_unet.py")
TOKENIZER = Path(__file__).resolve().parent.parent / "models" / "emoji-128" / "tokenizer"
CAPTIONS = (
    "a photo of a sks dog",
    "a sks dog in the grass",
    "a sks dog, seen from the side",
    "a painting of a sks dog",
)
COMPANIES = (1, 2, 4, 8)
BATCHES = (1, 4)  # SVDiff's own, and the default here.
# Of each shape a graph is captured at the second step; compiling at the first may take minutes.
WARM_STEPS, PATIENCE = 4, 600.0
BLOCKS, STEPS = 5, 6
COMPARED = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's size: the UNet's configuration, and the width, layers, heads and tokens of its text encoder."""

    name: str
    unet: Mapping[str, Any]
    text: tuple[int, int, int, int]


SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SHAPES = {"sd15": Shape("sd15", SD15, (768, 12, 12, 77))}


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """A base model of random weights and its factors, on a device."""

    base: BaseModel
    factors: SpectralFactors
    device: torch.device


@dataclass(slots=True)
class Run:
    """Seconds of a step in every block that counts, the losses of all steps, and the most memory held."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def milliseconds(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile of the blocks."""
        fifths = quantiles(self.seconds, n=10, method="inclusive")
        return fifths[4] * 1e3, fifths[1] * 1e3, fifths[7] * 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """How steps run and are timed: `lane` for graphs, None to launch one by one; `compiler` for what is in them."""

    name: str
    lane: GraphLane | None = None
    compiler: Compiler | None = None
    blocks: int = BLOCKS
    steps: int = STEPS
    clock: Callable[[], float] = time.perf_counter


def make_world(shape: Shape, device: torch.device) -> World:
    """Make the model. U and V^T are random too: W is made of them, so nothing has to be decomposed."""
    torch.manual_seed(0)
    width, layers, heads, tokens = shape.text
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "max_position_embeddings": tokens}
    depth = {"num_hidden_layers": layers, "num_attention_heads": heads}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **depth, **marks))
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
    words: dict[str, Any] = {"captions": CAPTIONS, "identifier": "sks", "class_noun": "dog"}
    given: dict[str, Any] = {"batch_size": batch, "seed": seed, "anchor_below": 0, "caption_dropout": 0.0}
    return complete_spec(method=Method.SVDIFF, subject_kind=SubjectKind.SUBJECT, **words, **given)


class CapturedAlone:
    """A job with the UNet to itself, its steps as graphs (a `Stepper`)."""

    def __init__(self, unet: TrainingUNet, text: TextStage, lane: GraphLane, compiler: Compiler | None) -> None:
        self._step = SharedStep(unet, text, captured=CapturedSteps(lane, compiler))

    def step(self, unet: TrainingUNet, work: StepWork, state: TrainingState, turn: Turn) -> Tensor:
        """See Stepper."""
        [loss] = self._step([Share(work, state, turn.count, turn.first, turn.last)])
        if isinstance(loss, Exception):
            raise loss
        return loss

    def leave(self) -> None:
        """Nobody waits."""


def make_job(
    world: World,
    spec: TrainingSpec,
    unet: TrainingUNet,
    learnable: Learnable,
    stepper: Stepper,
    *,
    shared: bool = False,
) -> tuple[TrainingTask, TrainingState]:
    """One job before its first step, on pictures that are noise."""
    # Tokenizers do not stand two callers at once.
    base = replace(world.base, tokenizer=copy.deepcopy(world.base.tokenizer)) if shared else world.base
    captions = Captions(base, TextStage(base), spec)
    side = base.sample_size
    mean = torch.randn(len(CAPTIONS), 4, side, side, generator=torch.Generator().manual_seed(spec.seed))
    latents = PictureLatents(mean, torch.full_like(mean, 0.1))
    pictures = PictureSet(latents, CAPTIONS, (0,) * len(CAPTIONS), torch.arange(len(CAPTIONS)))
    task = TrainingTask(spec, base.schedule, unet, learnable, captions, pictures, (), world.device, stepper)
    generator = torch.Generator().manual_seed(spec.seed)
    values = learnable.initial(generator) | captions.initial()
    rates = {name: learnable.learning_rate(name) if name in ("sigma", "norm") else 1e-3 for name in values}
    return task, TrainingState(values, rates, generator, spec, world.device)


def take_steps(job: tuple[TrainingTask, TrainingState], way: Way, together: Callable[[], object]) -> Run:
    """Take the first steps, then blocks of steps; all jobs meet, and the device stands still, before each block."""
    run, (task, state) = Run(), job

    def take(steps: int) -> float:
        if isinstance(task.stepper, SharedStepper):
            # Else the first to come would begin alone, the others never catch up, and other sizes of batch be timed.
            task.stepper.come()
        together()
        begun = way.clock()
        for _ in range(steps):
            train_step(task, state, lambda _: None)
            # As a worker does it: behind by no more than a few steps.
            run.losses.extend(state.arrived(MOST_UNDERWAY))
        task.stepper.leave()
        run.losses.extend(state.arrived())
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        return way.clock() - begun

    take(WARM_STEPS)
    run.seconds += [take(way.steps) / way.steps for _ in range(way.blocks)]
    return run


def run_alone(world: World, spec: TrainingSpec, unet: TrainingUNet, way: Way) -> tuple[Run, float]:
    """One job by itself; also return the FLOPs of one of its steps, forward and backward."""
    learnable = make_learnable(spec, world.base, world.factors)
    stepper = StepAlone() if way.lane is None else CapturedAlone(unet, TextStage(world.base), way.lane, way.compiler)
    job = make_job(world, spec, unet, learnable, stepper)
    run = take_steps(job, way, lambda: None)
    run.peak_bytes = peak_bytes(world.device)
    # A replay hides its products.
    eager = make_job(world, spec, unet, learnable, StepAlone())
    with FlopCounterMode(display=False) as counter:
        train_step(*eager, lambda _: None)
    return run, float(counter.get_total_flops())


def run_shared(world: World, specs: Sequence[TrainingSpec], way: Way) -> list[Run]:
    """All jobs in threads, with their steps taken together."""
    sharing = SharedTraining(world.base, world.factors, patience=PATIENCE, lane=way.lane, compiler=way.compiler)
    jobs = []
    for spec, learnable in [(spec, make_learnable(spec, world.base, world.factors)) for spec in specs]:
        unet, stepper = sharing.join(spec, learnable)
        jobs.append(make_job(world, spec, unet, learnable, stepper, shared=True))
    barrier = threading.Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as pool:
        runs = [f.result() for f in [pool.submit(take_steps, job, way, barrier.wait) for job in jobs]]
    runs[0].peak_bytes = peak_bytes(world.device)
    return runs


def ways(device: torch.device) -> list[Way]:
    """The ways of running on a device that need no compiler."""
    return [Way(""), *([Way("-graph", CudaLane(device))] if device.type == "cuda" else [])]


def rows(
    shape: Shape,
    device: torch.device,
    about: Mapping[str, Any],
    *,
    companies: Sequence[int] = COMPANIES,
    batches: Sequence[int] = BATCHES,
    chosen: Sequence[Way] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure one model: for each batch and way a job that rematerialises, then each number of jobs that share.

    Raises RuntimeError in the end if one of them failed; the others are measured.
    """
    prepare_device(device)
    world, failed = make_world(shape, device), []
    for batch in batches:
        for way in chosen or ways(device):
            try:
                yield from way_rows(shape, world, about, companies, batch, way)
            # What does not fit, or differs, costs the other ways nothing.
            except Exception:
                traceback.print_exc()
                failed.append(f"batch {batch}{way.name}")
            free(world.device)
    if failed:
        raise RuntimeError(f"not all measured: {', '.join(failed)}")


def way_rows(
    shape: Shape, world: World, about: Mapping[str, Any], companies: Sequence[int], batch: int, way: Way
) -> Iterator[dict[str, Any]]:
    """Measure one batch size in one way of running."""
    suffix = way.name + ("" if batch == 1 else f"-batch{batch}")
    spec = make_spec(batch, 0)
    alone, flops = run_factored(world, spec, way)
    launched = alone if way.lane is None else run_factored(world, spec, replace(way, lane=None, compiler=None))[0]
    again, _ = run_alone(world, spec, rematerialising_unet(world, spec), replace(way, compiler=None))
    free(world.device)
    one, plain, remade = alone.milliseconds(), launched.milliseconds()[0], again.milliseconds()[0]
    known = {
        "rematerialised_jobs_per_hour": jobs_per_hour(1, spec.steps, remade),
        "plain_jobs_per_hour": jobs_per_hour(1, spec.steps, plain),
        **about,
    }
    yield {
        **_row(f"{shape.name}-svdiff-factored{suffix}", one, "W in every step", remade, batch, flops),
        "error": check(alone.losses, again.losses, world.device),
        "jobs_per_hour": jobs_per_hour(1, spec.steps, one[0]),
        "baseline_jobs_per_hour": jobs_per_hour(1, spec.steps, remade),
        "peak_bytes": alone.peak_bytes,
        "baseline_peak_bytes": again.peak_bytes,
        **known,
    }
    for count in companies:
        runs = run_shared(world, [make_spec(batch, seed) for seed in range(count)], way)
        free(world.device)
        shared = runs[0].milliseconds()
        case = f"{shape.name}-svdiff-{count}job{'s' if count > 1 else ''}{suffix}"
        yield {
            **_row(case, shared, "one at a time", count * one[0], count * batch, count * flops),
            "error": check(runs[0].losses, alone.losses, world.device),
            "jobs": count,
            "jobs_per_hour": jobs_per_hour(count, spec.steps, shared[0]),
            "baseline_jobs_per_hour": jobs_per_hour(1, spec.steps, one[0]),
            "peak_bytes": runs[0].peak_bytes,
            **known,
        }


def run_factored(world: World, spec: TrainingSpec, way: Way) -> tuple[Run, float]:
    """A job as it is by itself; also return the FLOPs of one of its steps."""
    learnable = make_learnable(spec, world.base, world.factors)
    found = run_alone(world, spec, make_unet(world.base, world.factors, learnable, spec), way)
    free(world.device)
    return found


def rematerialising_unet(world: World, spec: TrainingSpec) -> TrainingUNet:
    """The baseline (rematerialised_unet.py)."""
    unet: TrainingUNet = load_script(BASELINE).RematerialisingUNet(world.base, world.factors, spec)
    return unet


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes held since the last `free`; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def jobs_per_hour(jobs: int, steps: int, ms: float) -> float:
    """Jobs that are done in an hour when `jobs` of them take a step in `ms`."""
    return round(jobs * 3.6e6 / (steps * ms), 1)


def check(losses: Sequence[float], expected: Sequence[float], device: torch.device) -> float:
    """Largest relative difference of two runs' first losses. Raises RuntimeError if they did not do the same.

    Later ones part in bfloat16 whatever is right: Adam makes full steps of gradients that are rounding alone.
    """
    error = max(abs(a - b) / abs(b) for a, b in zip(losses[:COMPARED], expected[:COMPARED], strict=True))
    tolerance = 5e-2 if has_fast_bfloat16(device) else 1e-3
    if not error <= tolerance:
        raise RuntimeError(f"losses differ by {error:.2e}; allowed: {tolerance:.0e}")
    return float(f"{error:.2e}")


def free(device: torch.device) -> None:
    """Give memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _row(
    case: str, ms: tuple[float, float, float], baseline: str, baseline_ms: float, batch: int, flops: float
) -> dict[str, Any]:
    floor = floor_ms(flops, 0.0)
    times = {"ms": ms[0], "p20": ms[1], "p80": ms[2], "baseline_ms": baseline_ms, "floor_ms": floor}
    shares = {"ratio": baseline_ms / ms[0], "floor_share": floor / ms[0], "tflops": flops / ms[0] / 1e9}
    numbers = {name: round(value, 5) for name, value in (times | shares).items()}
    return {"bench": "shared_training", "case": case, "baseline": baseline, **numbers, "flops": flops, "batch": batch}
