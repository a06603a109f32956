"""What a fine-tuning job is asked to do, as plain validated data that survives in the job table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self


class Method(StrEnum):
    """What is learned."""

    SVDIFF = "svdiff"
    RESIDUALS = "residuals"
    LORA = "lora"
    TEXTUAL_INVERSION = "textual_inversion"
    CUSTOM_DIFFUSION = "custom_diffusion"
    DREAMBOOTH = "dreambooth"


class SubjectKind(StrEnum):
    """What the pictures have in common. EDIT: there is one, and its prompt, to be edited; no word is learned."""

    SUBJECT = "subject"
    STYLE = "style"
    EDIT = "edit"


class LoraInit(StrEnum):
    """How LoRA's factors start: B A = 0 from noise, or the base's principal singular triples."""

    GAUSSIAN = "gaussian"
    PISSA = "pissa"


class RateSchedule(StrEnum):
    """How learning rates move after the warm-up: stay, or fall to zero in a line or half a cosine."""

    LINEAR = "linear"
    CONSTANT = "constant"
    COSINE = "cosine"


class Precision(StrEnum):
    """What products are computed in; parameters, losses and updates are fp32. AUTO: bfloat16 where it is faster."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing to be learned: its word, the noun of what it is, and known words that the word starts from."""

    identifier: str
    class_noun: str
    identifier_init: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """A complete job: every default is filled in, so that a later change of defaults does not change a queued job.

    `captions` has one entry per picture. `sample_interval` 0 samples only at the end. `caption_dropout` is the share
    of captions replaced by the empty prompt, which classifier-free guidance needs to stay sound. `mirror` also trains
    on the mirrored pictures. Below the timestep `anchor_below` the target is the base's own output (0 turns that off).
    `ema_decay` 0 turns the moving average of the parameters off, `min_snr_gamma` 0 weights all timesteps alike.

    Fields with defaults came later; a default is what jobs did before the field was there.

    `identifier` (empty: an edit), `class_noun` and `identifier_init` are the first subject's; `more_subjects` follow,
    and `picture_subjects` tells which subject each picture shows (empty: the first). `picture_repeats` says how often
    each comes in a pass (empty: once); `masked_pictures` are the indices of pictures whose masks are given.
    `rank`, `alpha`, `targets` and `lora_init` are LoRA's; DreamBooth and Custom Diffusion also compress to `rank`, or
    publish their whole change if it is 0.
    `token_vectors` and `per_layer` shape the learned words. `random_crops` 0 takes the centre of each picture, else
    that many random squares. `early_stop` 0 is off, else how many checks in a row must bring nothing.
    `train_text_encoder` is SVDiff's: shifts of the text encoder too, at `text_encoder_learning_rate`.
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
    more_subjects: tuple[Subject, ...] = ()
    picture_subjects: tuple[int, ...] = ()
    picture_repeats: tuple[int, ...] = ()
    masked_pictures: tuple[int, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    lora_init: LoraInit = LoraInit.GAUSSIAN
    token_vectors: int = 1
    per_layer: bool = False
    gradient_accumulation: int = 1
    rate_schedule: RateSchedule = RateSchedule.LINEAR
    random_crops: int = 0
    offset_noise: float = 0.0
    background_weight: float = 0.0
    cut_mix_probability: float = 0.0
    unmix_weight: float = 0.0
    unmix_layers: tuple[str, ...] = ()
    checkpoint_limit: int = 1
    precision: Precision = Precision.AUTO
    gradient_checkpointing: bool = False
    early_stop: int = 0
    train_text_encoder: bool = False
    text_encoder_learning_rate: float = 0.0

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All subjects, the first one first."""
        first = Subject(identifier=self.identifier, class_noun=self.class_noun, identifier_init=self.identifier_init)
        return (first, *self.more_subjects)

    def subject_of(self, picture: int) -> int:
        """Index in `subjects` of what a picture shows."""
        return self.picture_subjects[picture] if self.picture_subjects else 0

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the job table."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` wrote, by this version or an earlier one."""
        fixed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        fixed |= {name: kind(fixed[name]) for name, kind in _ENUMS.items() if name in fixed}
        fixed["more_subjects"] = tuple(
            Subject(**{**subject, "identifier_init": tuple(subject["identifier_init"])})
            for subject in fixed.get("more_subjects", ())
        )
        return cls(**fixed)


_ENUMS: Mapping[str, type[StrEnum]] = MappingProxyType(
    {
        "method": Method,
        "subject_kind": SubjectKind,
        "lora_init": LoraInit,
        "rate_schedule": RateSchedule,
        "precision": Precision,
    }
)
