"""The main path of a fine-tuning job: pictures in, adapter and scores out, resumed where it was stopped."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import structlog
import torch
from PIL import Image
from torch import Tensor

from hueshift.adapters.adapter import Adapter, EncoderChange
from hueshift.adapters.errors import Cancelled, InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.pictures import PictureFormat, encode_picture
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.arrivals import MOST_UNDERWAY
from hueshift.training.checkpoint import fingerprint_job, read_checkpoint, write_checkpoint
from hueshift.training.class_pictures import class_latents, class_prompt, prune_cache
from hueshift.training.devices import lacks_memory, release_memory
from hueshift.training.divergence import check_finite
from hueshift.training.editing import InversionErrors, measure_inversion
from hueshift.training.evaluation.measures import diversity_of, paired_cosine
from hueshift.training.held_factors import HeldFactors
from hueshift.training.latents import make_picture_set
from hueshift.training.loop import TrainingTask, train_step
from hueshift.training.methods.encoder_shifts import make_encoder_shifts
from hueshift.training.methods.learnable import Learnable
from hueshift.training.methods.make import make_learnable
from hueshift.training.objectives.make import make_objectives
from hueshift.training.objectives.objective import Objective
from hueshift.training.objectives.prior import ClassPictures
from hueshift.training.plateau import CHECK_INTERVAL, LEAST_GAIN, fixed_loss
from hueshift.training.samples import Sampler
from hueshift.training.scores import ClipScorer, Scores
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.spec import SubjectKind, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import StepAlone, Stepper
from hueshift.training.unet import TrainingUNet, make_unet
from hueshift.training.words import Captions

CHECKPOINT_FILE = "checkpoint.safetensors"
CLASS_FOLDER = "class-pictures"
# Enough for a stable mean of scores on a CPU, where each pair of pictures (base and adapted) costs two seconds.
SCORE_PICTURES = 4
# Also drawn with the adapter and without it, so four seconds more: they show whether other things have changed.
PRIOR_PICTURES = 2
_log = structlog.get_logger()


class TrainingHooks(Protocol):
    """How a run talks to whoever started it. Called from the training thread; must not block for long."""

    def on_step(self, step: int, loss: float, seconds: float) -> None:
        """Step `step` (from 1) took `seconds` and had this loss.

        Every step is told of, in order; on a GPU a few steps later, because its loss is not waited for.
        """
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
    """What a job made; `scores` is None without a CLIP, `kept_energy` where nothing was compressed, `inversion` but for
    edits.

    `steps_taken` in `step_seconds` are those of this call; a resumed job took others before.
    """

    adapter: Adapter
    scores: Scores | None
    losses: tuple[float, ...]
    kept_energy: float | None = None
    steps_taken: int = 0
    step_seconds: float = 0.0
    inversion: InversionErrors | None = None


def run_training(
    spec: TrainingSpec,
    pictures: Sequence[Image.Image],
    *,
    base: BaseModel,
    factors: SpectralFactors,
    clip: ClipScorer | None,
    workdir: Path,
    hooks: TrainingHooks,
    masks: Mapping[int, Image.Image] = MappingProxyType({}),
    class_folder: Path | None = None,
    sharing: SharedTraining | None = None,
    held: HeldFactors | None = None,
) -> TrainingResult:
    """Train one adapter on `pictures`, one for each caption of the spec, with `masks` for some of them by index.

    Class pictures are shared by all jobs that get the same `class_folder`; without one they stay in `workdir`. With
    `sharing`, steps are taken together with the jobs that run in other threads with the same one, where the method
    allows it; then the result is the same within rounding only. `held` keeps the factors on the device for the jobs
    after this one; `sharing` has its own. A job that finds no memory has what is kept and not used given back, and goes
    on from its checkpoint, once.

    Else the result depends on spec, pictures, masks and base alone, bit for bit on one machine with one number of
    threads, however often the run was stopped and called again with the same `workdir`. `base` is never changed. Raises
    Cancelled when the hooks ask to stop, HueshiftError (TRAINING_DIVERGED) with the step when the loss is not finite,
    InvalidArgument when spec, pictures and base do not fit each other.
    """
    if len(pictures) != len(spec.captions):
        raise InvalidArgument.for_field("pictures", f"{len(pictures)} given for {len(spec.captions)} captions")
    if sorted(masks) != sorted(spec.masked_pictures):
        raise InvalidArgument.for_field("pictures", f"masks of {sorted(masks)} given for {spec.masked_pictures}")
    device = next(base.unet.parameters()).device
    # A job before this one may have ended with an exception, which held its memory.
    release_memory(device)
    release = sharing.release if sharing is not None else held.release if held is not None else lambda: False

    def run() -> TrainingResult:
        job = _Job(
            spec, pictures, masks, base, factors, workdir, class_folder or workdir / CLASS_FOLDER, hooks, sharing, held
        )
        try:
            job.train()
        finally:
            job.leave()
        return job.finish(clip)

    return _with_room(run, release, device)


def _with_room(run: Callable[[], TrainingResult], release: Callable[[], bool], device: torch.device) -> TrainingResult:
    """Run a job, once more if it finds no memory and `release` has some; what it held goes back after it."""
    try:
        result = run()
    except Exception as error:
        # While its own UNet lives: factors that it works with are in use.
        if not lacks_memory(error) or not release():
            raise
        _log.warning("training.again_with_more_memory", error=type(error).__name__)
    else:
        release_memory(device)
        return result
    # Here the frames of the first try are gone, and all that they held.
    release_memory(device)
    result = run()
    release_memory(device)
    return result


class _Job:
    """One call of run_training: the task, the state, and where both are kept."""

    def __init__(
        self,
        spec: TrainingSpec,
        pictures: Sequence[Image.Image],
        masks: Mapping[int, Image.Image],
        base: BaseModel,
        factors: SpectralFactors,
        workdir: Path,
        class_folder: Path,
        hooks: TrainingHooks,
        sharing: SharedTraining | None,
        held: HeldFactors | None,
    ) -> None:
        if sharing is not None:
            base = sharing.own_words(base)
        self._spec, self._pictures, self._base, self._hooks = spec, pictures, base, hooks
        shown = (*pictures, *(masks[index] for index in sorted(masks)))
        self._fingerprint = fingerprint_job(spec, shown, base.base_hash)
        self._workdir, self._class_folder = workdir, class_folder
        self._taken = (0, 0.0)
        # Of the steps that were not yet told of.
        self._seconds: deque[float] = deque()
        text, vae = TextStage(base), VaeStage(base)
        self._device = text.empty.device
        self._learnable = make_learnable(spec, base, factors)
        unet: TrainingUNet
        self._stepper: Stepper
        if sharing is None:
            unet, self._stepper = make_unet(base, factors, self._learnable, spec, held), StepAlone()
        else:
            unet, self._stepper = sharing.join(spec, self._learnable)
        self._encoder = make_encoder_shifts(base, factors, spec)
        self._captions = Captions(base, text, spec, self._encoder)
        self._sampler = Sampler(base, unet, vae, self._captions.empty, self._stop_if_asked)
        self._state = self._make_state(self._learnable)
        self._task = TrainingTask(
            spec=spec,
            schedule=base.schedule,
            unet=unet,
            learnable=self._learnable,
            captions=self._captions,
            pictures=make_picture_set(vae, spec, pictures, masks, base.pixels),
            objectives=(),
            device=self._device,
            stepper=self._stepper,
        )

    def train(self) -> None:
        """Take the steps that are left."""
        path = self._workdir / CHECKPOINT_FILE
        checkpoint = read_checkpoint(path, self._fingerprint)
        if checkpoint is not None:
            self._state.restore(checkpoint)
            _log.info("training.resumed", step=checkpoint.step, steps=self._spec.steps)
        if not self._state.ended:
            self._task = replace(self._task, objectives=self._objectives())
        kept = self._state.step
        while not self._state.ended:
            if self._hooks.should_stop():
                if self._state.step > kept:
                    # Whoever takes the job up again loses no step.
                    self._keep(path)
                raise Cancelled(Reason.CANCELLED, "training was asked to stop")
            self._step()
            step = self._state.step
            if step % self._spec.checkpoint_interval == 0 or self._state.ended:
                self._keep(path)
                kept = step
                self._hooks.at("checkpoint-written")
            if self._spec.sample_interval and step % self._spec.sample_interval == 0 and not self._state.ended:
                self._show(self._spec.sample_prompts, self._draw(self._spec.sample_prompts))

    def leave(self) -> None:
        """Let nobody wait for this job's steps."""
        self._stepper.leave()

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
        learned = self._learnable.adapter(values)
        tokens, grids = self._captions.tokens(values)
        adapter = replace(
            learned.adapter,
            tokens=tokens,
            token_grids=grids,
            identifier=self._spec.identifier,
            class_noun=self._spec.class_noun,
            encoder=EncoderChange() if self._encoder is None else self._encoder.change(values),
        )
        inversion = self._invert(values) if self._spec.subject_kind is SubjectKind.EDIT else None
        losses = tuple(self._state.losses)
        return TrainingResult(adapter, scores, losses, learned.kept_energy, *self._taken, inversion)

    @torch.no_grad()
    def _invert(self, values: Mapping[str, Tensor]) -> InversionErrors:
        captions, device = self._spec.captions, self._task.device
        before = (self._captions.contexts(captions, None)[0], self._learnable.base_rows().to(device))
        after = (self._captions.contexts(captions, values)[0], self._learnable.rows(values).to(device))
        return measure_inversion(self._sampler, self._task.pictures.latents.mean[0].to(device), before, after)

    def _step(self) -> None:
        begun = time.perf_counter()
        train_step(self._task, self._state, self._hooks.at)
        step = self._state.step
        if self._spec.early_stop and step % CHECK_INTERVAL == 0:
            self._stepper.leave()
            self._state.judge(fixed_loss(self._task, self._state), LEAST_GAIN)
            if self._state.ended and step < self._spec.steps:
                _log.info("training.plateau", step=step, steps=self._spec.steps)
        seconds = time.perf_counter() - begun
        self._taken = (self._taken[0] + 1, self._taken[1] + seconds)
        self._seconds.append(seconds)
        self._report(MOST_UNDERWAY)

    def _report(self, underway: int = 0) -> None:
        """Tell of the steps whose losses are here; at most the last `underway` ones may still be on their way."""
        told, begun = len(self._state.losses), time.perf_counter()
        arrived = self._state.arrived(underway)
        if self._seconds:
            # Beside a GPU steps are queued in no time and waited for here, so here is most of what they take.
            waited = time.perf_counter() - begun
            self._seconds[-1] += waited
            self._taken = (self._taken[0], self._taken[1] + waited)
        for step, loss in enumerate(arrived, told + 1):
            self._hooks.on_step(step, loss, self._seconds.popleft())

    def _keep(self, path: Path) -> None:
        self._stepper.leave()
        self._report()
        write_checkpoint(path, self._state.capture(), self._fingerprint, self._spec.checkpoint_limit)
        self._hooks.on_checkpoint(self._state.step, path)

    def _make_state(self, learnable: Learnable) -> TrainingState:
        generator = torch.Generator().manual_seed(self._spec.seed)
        values = learnable.initial(generator)
        rates = {name: learnable.learning_rate(name) for name in values}
        if self._encoder is not None:
            values |= self._encoder.initial()
            rates |= self._encoder.rates
        if self._captions.learns:
            words = self._captions.initial()
            values |= words
            rates |= dict.fromkeys(words, self._spec.identifier_learning_rate)
        return TrainingState(values, rates, generator, self._spec, self._device)

    def _objectives(self) -> list[Objective]:
        classes: list[ClassPictures] = []
        if self._spec.prior_weight > 0:
            nouns = dict.fromkeys(subject.class_noun for subject in self._spec.subjects)
            classes = [self._class_pictures(noun) for noun in nouns]
            prune_cache(self._class_folder)
        return make_objectives(
            self._spec,
            self._base.schedule,
            self._task.pictures,
            classes,
            self._captions.places,
            self._base.layout.cross_attentions,
        )

    def _class_pictures(self, noun: str) -> ClassPictures:
        prompt = class_prompt(noun)
        latents = class_latents(
            self._class_folder,
            self._sampler,
            prompt,
            self._captions.contexts([prompt], None)[0],
            self._learnable.base_rows().to(self._task.device),
            count=self._spec.prior_images,
            seed=self._spec.seed,
        )
        return ClassPictures(latents, prompt, noun)

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], *, of_base: bool = False) -> list[Image.Image]:
        """Draw one picture a prompt, seeds counting from 0, as the adapter has them now or as the base has them."""
        self._stepper.leave()
        values = self._state.result
        rows = self._learnable.base_rows() if of_base else self._learnable.rows(values)
        contexts = self._captions.contexts(prompts, None if of_base else values)
        sampler = self._sampler
        if self._encoder is not None and not of_base:
            # Guidance is away from the empty prompt as the same encoder reads it, as it is when the adapter is served.
            empty = self._captions.contexts([""], values)[0]
            sampler = replace(sampler, empty=empty[..., : sampler.empty.shape[-1]])
        return sampler.pictures(contexts, range(len(prompts)), rows.to(self._task.device))

    def _show(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        metadata = {"base": self._base.base_hash[:16], "step": str(self._state.step)}
        for prompt, picture in zip(prompts, pictures, strict=False):
            png, _ = encode_picture(np.asarray(picture), PictureFormat.PNG, metadata)
            self._hooks.on_sample(self._state.step, prompt, png)

    def _score(self, clip: ClipScorer, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Scores:
        # The words mean nothing to CLIP, and would only blur what the rest of the prompt asks for.
        learned = {subject.identifier for subject in self._spec.subjects}
        plain = [" ".join(word for word in prompt.split() if word not in learned) for prompt in prompts]
        others = plain[:PRIOR_PICTURES]
        before, after = self._draw(others, of_base=True), self._draw(others)
        return Scores(
            clip_i=clip.clip_i(pictures, self._pictures),
            clip_t=clip.clip_t(pictures, plain),
            clip_i_base=clip.clip_i(self._draw(prompts, of_base=True), self._pictures),
            prior_kept=paired_cosine(clip.embed_pictures(before), clip.embed_pictures(after)),
            diversity=diversity_of(clip.embed_pictures(pictures), prompts),
        )

    def _stop_if_asked(self) -> None:
        if self._hooks.should_stop():
            raise Cancelled(Reason.CANCELLED, "training was asked to stop")
