"""Training on the base model of the settings, loaded once for all jobs of a worker."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from PIL import Image

from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.svd_cache import SpectralFactors, load_factors
from hueshift.server.job_run import JobRun
from hueshift.server.settings import Settings
from hueshift.server.worker import Trained
from hueshift.training.run import run_training
from hueshift.training.scores import ClipScorer
from hueshift.training.spec import TrainingSpec


class BaseTrainer:
    """Runs `hueshift.training.run.run_training` on one base model."""

    def __init__(self, base: BaseModel, factors: SpectralFactors, clip: ClipScorer | None) -> None:
        self._base = base
        self._factors = factors
        self._clip = clip

    @classmethod
    def load(cls, settings: Settings, device: str = "cpu") -> Self:
        """Load the base model, its decomposition and its CLIP. Raises InvalidArgument on an unusable folder."""
        base = load_base_model(settings.model.path, device=device)
        clip = None if settings.model.clip_path is None else ClipScorer(settings.model.clip_path)
        return cls(base, load_factors(base, settings.store.cache_path.expanduser()), clip)

    def train(self, spec: TrainingSpec, pictures: Sequence[Image.Image], work: Path, run: JobRun) -> Trained:
        """Train, resuming from `work`."""
        result = run_training(
            spec, pictures, base=self._base, factors=self._factors, clip=self._clip, workdir=work, hooks=run
        )
        return Trained(result.adapter, None if result.scores is None else asdict(result.scores))
