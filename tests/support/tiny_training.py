"""A base model with a tiny random UNet, whose training steps take milliseconds, and hooks that remember."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel, read_layout
from hueshift.engines.svd_cache import EncoderFactors, SpectralFactors, decompose
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.defaults import complete_spec
from hueshift.training.latents import make_picture_set
from hueshift.training.loop import TrainingTask
from hueshift.training.methods.encoder_shifts import make_encoder_shifts
from hueshift.training.methods.make import make_learnable
from hueshift.training.objectives.make import make_objectives
from hueshift.training.run import TrainingResult, run_training
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.spec import Method, Subject, SubjectKind, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.unet import TrainingUNet
from hueshift.training.words import Captions

SECOND_WORD = "idk"
CAPTIONS = ("a flat emoji of a sks animal", "a noto emoji of a sks animal", "a sks animal")


def make_tiny_base(base: BaseModel) -> tuple[BaseModel, SpectralFactors]:
    """Replace the UNet of `base` by one of 32 and 64 channels on 8x8 latents, seeded, and decompose it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=base.layout.token_width,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    unet.eval().requires_grad_(False)
    layout = read_layout(unet, "f" * 64, base.layout.token_width, (), (base.text_encoder,))
    tiny = replace(base, unet=unet, layout=layout, base_hash=layout.base_hash, sample_size=8, size_multiple=8)
    return tiny, replace(decompose(tiny), encoder=EncoderFactors(tiny))


def make_pictures(count: int = 3) -> list[Image.Image]:
    """Random blobs of colour, 40x32."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (count, 4, 5, 3), dtype=np.uint8)
    return [Image.fromarray(picture, "RGB").resize((40, 32)) for picture in small]


def make_spec(method: Method = Method.SVDIFF, **given: Any) -> TrainingSpec:
    """A job of three pictures and six steps, unless `given` says otherwise."""
    numbers: dict[str, Any] = {"steps": 6, "batch_size": 2, "checkpoint_interval": 2, "seed": 7, **given}
    return complete_spec(
        method=method,
        subject_kind=SubjectKind.SUBJECT,
        captions=CAPTIONS,
        identifier="sks",
        class_noun="animal",
        **numbers,
    )


def make_pair_spec(method: Method = Method.SVDIFF, **given: Any) -> TrainingSpec:
    """A job of two subjects: pictures 0 and 1 show a sks animal, picture 2 an idk ball."""
    numbers: dict[str, Any] = {"steps": 6, "batch_size": 2, "checkpoint_interval": 2, "seed": 7, **given}
    return complete_spec(
        method=method,
        subject_kind=SubjectKind.SUBJECT,
        captions=("a flat emoji of a sks animal", "", ""),
        identifier="sks",
        class_noun="animal",
        more_subjects=(Subject(identifier=SECOND_WORD, class_noun="ball"),),
        picture_subjects=(0, 0, 1),
        **numbers,
    )


def make_tiny_unet(base: BaseModel, factors: SpectralFactors, spec: TrainingSpec) -> TrainingUNet:
    """The UNet that a job of `spec` trains with."""
    learnable = make_learnable(spec, base, factors)
    adapted = AdaptedUNet(base, factors, learnable.layout, learnable.plan)
    layout = base.layout
    return TrainingUNet(adapted, layout.cross_attentions, layout.token_width, checkpointing=spec.gradient_checkpointing)


def make_task(
    base: BaseModel, factors: SpectralFactors, spec: TrainingSpec, masks: Mapping[int, Image.Image] | None = None
) -> tuple[TrainingTask, TrainingState]:
    """The task and the state of a job before its first step, without class pictures."""
    text, vae = TextStage(base), VaeStage(base)
    encoder = make_encoder_shifts(base, factors, spec)
    captions = Captions(base, text, spec, encoder)
    pictures = make_picture_set(vae, spec, make_pictures(len(spec.captions)), masks or {}, base.pixels)
    learnable = make_learnable(spec, base, factors)
    task = TrainingTask(
        spec=spec,
        schedule=base.schedule,
        unet=make_tiny_unet(base, factors, spec),
        learnable=learnable,
        captions=captions,
        pictures=pictures,
        objectives=make_objectives(spec, base.schedule, pictures, (), captions.places, base.layout.cross_attentions),
        device=text.empty.device,
    )
    values = learnable.initial(torch.Generator().manual_seed(0)) | (captions.initial() if captions.learns else {})
    values |= {} if encoder is None else encoder.initial()
    state = TrainingState(values, dict.fromkeys(values, 0.01), torch.Generator().manual_seed(3), spec, task.device)
    return task, state


@dataclass
class Recorder:
    """Hooks that keep what they hear. `on_point` runs at every failpoint.

    They ask to stop once `stop_at` steps are done, or when they are asked for the `stop_when_asked`th time.
    """

    stop_at: int = 10**6
    stop_when_asked: int = 10**6
    on_point: Callable[[str, int], None] = lambda name, step: None
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    samples: list[tuple[int, str, bytes]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    asked: int = 0

    def on_step(self, step: int, loss: float, seconds: float) -> None:
        """Keep it."""
        self.steps.append(step)
        self.losses.append(loss)

    def on_sample(self, step: int, prompt: str, png: bytes) -> None:
        """Keep it."""
        self.samples.append((step, prompt, png))

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Keep it."""
        assert path.is_file()
        self.checkpoints.append(step)

    def should_stop(self) -> bool:
        """True when the test wants it."""
        self.asked += 1
        return self.asked >= self.stop_when_asked or (bool(self.steps) and self.steps[-1] >= self.stop_at)

    def at(self, name: str) -> None:
        """Keep it, and do what the test wants there."""
        self.points.append(name)
        self.on_point(name, self.steps[-1] if self.steps else 0)


def run_job(
    tiny: tuple[BaseModel, SpectralFactors],
    spec: TrainingSpec,
    folder: Path,
    hooks: Recorder | None = None,
    sharing: SharedTraining | None = None,
) -> TrainingResult:
    """A whole job on a tiny base, in a folder that is made; without scores."""
    base, factors = tiny
    folder.mkdir(parents=True, exist_ok=True)
    return run_training(
        spec,
        make_pictures(len(spec.captions)),
        base=base,
        factors=factors,
        clip=None,
        workdir=folder,
        hooks=hooks or Recorder(),
        sharing=sharing,
    )
