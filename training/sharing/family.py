"""Which jobs can train in one batch."""

from dataclasses import dataclass

from hueshift.training.spec import LoraInit, Method, Precision, TrainingSpec

# What they learn takes the place of the base's weights, and a batch has one set of weights.
_WHOLE_WEIGHTS = frozenset({Method.CUSTOM_DIFFUSION, Method.DREAMBOOTH})


@dataclass(frozen=True, slots=True)
class Family:
    """What jobs must have in common: the shapes of rows and contexts, and how the UNet is run.

    `rank`, `targets` and `lora_init` are LoRA's; the other methods' rows depend on the base alone.
    """

    method: Method
    precision: Precision
    checkpointing: bool
    per_layer: bool
    rank: int = 0
    targets: tuple[str, ...] = ()
    lora_init: LoraInit = LoraInit.GAUSSIAN


def family_of(spec: TrainingSpec) -> Family | None:
    """Return the family of a job on one base model, None for jobs that train alone."""
    if spec.method in _WHOLE_WEIGHTS:
        return None
    common = (spec.method, spec.precision, spec.gradient_checkpointing, spec.per_layer)
    if spec.method is Method.LORA:
        return Family(*common, spec.rank, spec.targets, spec.lora_init)
    return Family(*common)
