"""What a fine-tuning job is asked to do, as plain validated data that survives in the job table."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self


class Method(StrEnum):
    """What is learned."""

    SVDIFF = "svdiff"
    RESIDUALS = "residuals"


class SubjectKind(StrEnum):
    """What the pictures have in common."""

    SUBJECT = "subject"
    STYLE = "style"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """A complete job: every default is filled in, so that a later change of defaults does not change a queued job.

    `captions` has one entry per picture. `sample_interval` 0 samples only at the end. `caption_dropout` is the share
    of captions replaced by the empty prompt, which classifier-free guidance needs to stay sound. `mirror` also trains
    on the mirrored pictures. Below the timestep `anchor_below` the target is the base's own output (0 turns that off).
    `ema_decay` 0 turns the moving average of the parameters off, `min_snr_gamma` 0 weights all timesteps alike.
    """

    method: Method
    subject_kind: SubjectKind
    captions: tuple[str, ...]
    identifier: str
    class_noun: str
    learn_identifier: bool
    identifier_init: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    norm_learning_rate: float
    identifier_learning_rate: float
    warmup_steps: int
    seed: int
    prior_weight: float
    prior_images: int
    sample_interval: int
    checkpoint_interval: int
    sample_prompts: tuple[str, ...]
    caption_dropout: float = 0.1
    mirror: bool = False
    anchor_below: int = 0
    ema_decay: float = 0.0
    min_snr_gamma: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the job table."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        lists = ("captions", "identifier_init", "sample_prompts")
        fixed: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in data.items()}
        fixed["method"] = Method(fixed["method"])
        fixed["subject_kind"] = SubjectKind(fixed["subject_kind"])
        return cls(**fixed)
