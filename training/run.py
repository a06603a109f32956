"""The main path of a fine-tuning job: pictures in, adapter and scores out, resumed where it was stopped."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
import torch
from PIL import Image
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import Cancelled, InvalidArgument, Reason
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.pictures import PictureFormat, encode_picture
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.checkpoint import fingerprint_job, read_checkpoint, write_checkpoint
from hueshift.training.identifier import Captions
from hueshift.training.latents import encode_pictures
from hueshift.training.loop import ClassPictures, TrainingTask, check_finite, train_step
from hueshift.training.parameters import RESIDUAL_TARGET, Learnable, Residuals, SpectralShifts, residual_rank
from hueshift.training.prior import class_latents, class_prompt
from hueshift.training.samples import Sampler
from hueshift.training.scores import ClipScorer, Scores
from hueshift.training.spec import Method, TrainingSpec
from hueshift.training.state import IDENTIFIER, TrainingState

CHECKPOINT_FILE = "checkpoint.safetensors"
CLASS_FOLDER = "class-pictures"
# Enough for a stable mean of scores on a CPU, where each pair of pictures (base and adapted) costs two seconds.
SCORE_PICTURES = 4
_log = structlog.get_logger()


class TrainingHooks(Protocol):
    """How a run talks to whoever started it. Called from the training thread; must not block for long."""

    def on_step(self, step: int, loss: float, seconds: float) -> None:
        """Step `step` (from 1) took `seconds` and had this loss."""
        ...

    def on_sample(self, step: int, prompt: str, png: bytes) -> None:
        """A sample picture was drawn after `step` steps. After a resumed run's end the last ones come again."""
        ...

    def on_checkpoint(self, step: int, path: Path) -> None:
        """The checkpoint at `path` now holds the state after `step` steps."""
        ...

    def should_stop(self) -> bool:
        """True asks the run to stop at its next step."""
        ...

    def at(self, name: str) -> None:
        """The run passes the point `name`: `mid-step` or `checkpoint-written`. Tests end the process there."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a job made; `scores` is None without a CLIP."""

    adapter: Adapter
    scores: Scores | None
    losses: tuple[float, ...]


def run_training(
    spec: TrainingSpec,
    pictures: Sequence[Image.Image],
    *,
    base: BaseModel,
    factors: SpectralFactors,
    clip: ClipScorer | None,
    workdir: Path,
    hooks: TrainingHooks,
) -> TrainingResult:
    """Train one adapter on `pictures`, one for each caption of the spec.

    The result depends on the arguments alone, bit for bit on one machine with one number of threads, however often
    the run was stopped and called again with the same `workdir`. `base` is never changed. Raises Cancelled when the
    hooks ask to stop, HueshiftError (TRAINING_DIVERGED) with the step when the loss is not finite, InvalidArgument when
    spec, pictures and base do not fit each other.
    """
    if len(pictures) != len(spec.captions):
        raise InvalidArgument.for_field("pictures", f"{len(pictures)} given for {len(spec.captions)} captions")
    job = _Job(spec, pictures, base, factors, workdir, hooks)
    job.train()
    return job.finish(clip)


class _Job:
    """One call of run_training: the task, the state, and where both are kept."""

    def __init__(
        self,
        spec: TrainingSpec,
        pictures: Sequence[Image.Image],
        base: BaseModel,
        factors: SpectralFactors,
        workdir: Path,
        hooks: TrainingHooks,
    ) -> None:
        self._spec, self._pictures, self._base, self._hooks = spec, pictures, base, hooks
        self._fingerprint = fingerprint_job(spec, pictures, base.base_hash)
        self._workdir = workdir
        text, vae = TextStage(base), VaeStage(base)
        learnable = make_learnable(spec, base, factors)
        unet = AdaptedUNet(base, factors, learnable.layout, learnable.plan)
        self._captions = Captions(base, text, spec)
        self._sampler = Sampler(base, unet, vae, text.empty, self._stop_if_asked)
        self._state = self._make_state(learnable)
        self._task = TrainingTask(
            spec=spec,
            schedule=base.schedule,
            unet=unet,
            learnable=learnable,
            captions=self._captions,
            pictures=encode_pictures(vae, pictures, base.pixels, mirror=spec.mirror),
            subjects=spec.captions * (2 if spec.mirror else 1),
            class_pictures=None,
            device=text.empty.device,
        )

    def train(self) -> None:
        """Take the steps that are left."""
        path = self._workdir / CHECKPOINT_FILE
        checkpoint = read_checkpoint(path, self._fingerprint)
        if checkpoint is not None:
            self._state.restore(checkpoint)
            _log.info("training.resumed", step=checkpoint.step, steps=self._spec.steps)
        if self._spec.prior_weight > 0 and self._state.step < self._spec.steps:
            self._task = replace(self._task, class_pictures=self._class_pictures())
        kept = self._state.step
        while self._state.step < self._spec.steps:
            if self._hooks.should_stop():
                if self._state.step > kept:
                    # Whoever takes the job up again loses no step.
                    self._keep(path)
                raise Cancelled(Reason.CANCELLED, "training was asked to stop")
            begun = time.perf_counter()
            loss = train_step(self._task, self._state, self._hooks.at)
            step = self._state.step
            self._hooks.on_step(step, loss, time.perf_counter() - begun)
            if step % self._spec.checkpoint_interval == 0 or step == self._spec.steps:
                self._keep(path)
                kept = step
                self._hooks.at("checkpoint-written")
            if self._spec.sample_interval and step % self._spec.sample_interval == 0 and step < self._spec.steps:
                self._show(self._spec.sample_prompts, self._draw(self._spec.sample_prompts))

    def finish(self, clip: ClipScorer | None) -> TrainingResult:
        """Check the result, show its pictures, score it."""
        values = self._state.result
        for name, value in values.items():
            check_finite(value, self._state.step, f"learned {name}")
        prompts = self._spec.sample_prompts
        drawn = prompts if clip is None else tuple(islice(cycle(prompts), max(SCORE_PICTURES, len(prompts))))
        pictures = self._draw(drawn)
        self._show(prompts, pictures)
        scores = None if clip is None else self._score(clip, drawn, pictures)
        tokens = self._captions.tokens(self._embedding(values))
        adapter = self._task.learnable.adapter(values, tokens, self._spec.identifier)
        return TrainingResult(adapter, scores, tuple(self._state.losses))

    def _keep(self, path: Path) -> None:
        write_checkpoint(path, self._state.capture(), self._fingerprint)
        self._hooks.on_checkpoint(self._state.step, path)

    def _make_state(self, learnable: Learnable) -> TrainingState:
        generator = torch.Generator().manual_seed(self._spec.seed)
        values = learnable.initial(generator)
        rates = {name: learnable.learning_rate(name) for name in values}
        if self._captions.learns:
            values[IDENTIFIER] = self._captions.initial()
            rates[IDENTIFIER] = self._spec.identifier_learning_rate
        return TrainingState(values, rates, generator, self._spec)

    def _embedding(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Embedding of the identifier: learned, only set from other words, or none of its own."""
        if self._captions.learns:
            return values[IDENTIFIER].detach()
        return self._captions.initial() if self._captions.has_embedding else None

    def _class_pictures(self) -> ClassPictures:
        prompt = class_prompt(self._spec.class_noun)
        latents = class_latents(
            self._workdir / CLASS_FOLDER,
            self._fingerprint,
            self._sampler,
            self._captions.contexts([prompt], None)[0],
            self._task.rows_of(self._task.learnable.base_rows()),
            count=self._spec.prior_images,
            seed=self._spec.seed,
        )
        return ClassPictures(latents, prompt)

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], *, of_base: bool = False) -> list[Image.Image]:
        """Draw one picture a prompt, seeds counting from 0, as the adapter has them now or as the base has them."""
        learnable, values = self._task.learnable, self._state.result
        rows = learnable.base_rows() if of_base else learnable.rows(values)
        contexts = self._captions.contexts(prompts, None if of_base else self._embedding(values))
        return self._sampler.pictures(contexts, range(len(prompts)), self._task.rows_of(rows))

    def _show(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        metadata = {"base": self._base.base_hash[:16], "step": str(self._state.step)}
        for prompt, picture in zip(prompts, pictures, strict=False):
            png, _ = encode_picture(np.asarray(picture), PictureFormat.PNG, metadata)
            self._hooks.on_sample(self._state.step, prompt, png)

    def _score(self, clip: ClipScorer, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Scores:
        # The identifier means nothing to CLIP, and would only blur what the rest of the prompt asks for.
        plain = [" ".join(word for word in prompt.split() if word != self._spec.identifier) for prompt in prompts]
        return Scores(
            clip_i=clip.clip_i(pictures, self._pictures),
            clip_t=clip.clip_t(pictures, plain),
            clip_i_base=clip.clip_i(self._draw(prompts, of_base=True), self._pictures),
        )

    def _stop_if_asked(self) -> None:
        if self._hooks.should_stop():
            raise Cancelled(Reason.CANCELLED, "training was asked to stop")


def make_learnable(spec: TrainingSpec, base: BaseModel, factors: SpectralFactors) -> Learnable:
    """Make the trainable set of the spec's method."""
    layout = base.layout
    if spec.method is Method.SVDIFF:
        rows = RowLayout(layout, (), 1)
        return SpectralShifts(
            rows, factors, read_norms(layout, lambda name: base.unet.get_parameter(f"{name}.weight")), spec
        )
    widest = max((m.rows for m in layout.matrices if m.name.endswith(f".{RESIDUAL_TARGET}")), default=1)
    return Residuals(RowLayout(layout, (RESIDUAL_TARGET,), residual_rank(widest, widest)), spec)
