"""From a job's settings to its objectives, in the order they work in."""

from collections.abc import Sequence

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.training.latents import PictureSet
from hueshift.training.objectives.cut_mix import CutMix, Positions, Unmix
from hueshift.training.objectives.masks import SubjectMasks
from hueshift.training.objectives.min_snr import MinSnr
from hueshift.training.objectives.objective import Objective
from hueshift.training.objectives.offset_noise import OffsetNoise
from hueshift.training.objectives.prior import ClassPictures, PriorPreservation
from hueshift.training.spec import TrainingSpec


def make_objectives(
    spec: TrainingSpec,
    schedule: NoiseSchedule,
    pictures: PictureSet,
    classes: Sequence[ClassPictures],
    positions: Positions,
    attentions: Sequence[str],
) -> list[Objective]:
    """Make those that the spec asks for. `classes` has the class pictures of each distinct noun, if there are any.

    Raises InvalidArgument naming `settings.unmix_layers` if an ending fits none of the cross-attentions.
    """
    made: list[Objective] = []
    if classes:
        made.append(PriorPreservation(classes, spec.prior_weight, schedule.train_steps, spec.anchor_below))
    if pictures.halves is not None:
        by_noun = {of.noun: of.latents for of in classes}
        made.append(CutMix(spec.subjects, pictures.halves, pictures.subjects, by_noun, spec.cut_mix_probability))
        if spec.unmix_weight > 0:
            layers = _chosen(spec.unmix_layers, attentions)
            made.append(Unmix(spec.subjects, positions, spec.unmix_weight, layers))
    if pictures.masks is not None:
        made.append(SubjectMasks(pictures.masks, pictures.half_masks, spec.background_weight))
    if spec.min_snr_gamma > 0:
        made.append(MinSnr(schedule, spec.min_snr_gamma))
    if spec.offset_noise > 0:
        made.append(OffsetNoise(spec.offset_noise))
    return made


def _chosen(wanted: Sequence[str], attentions: Sequence[str]) -> list[str]:
    """Names of the cross-attentions that hold one of `wanted` as a part of theirs; all of them without any."""
    for part in wanted:
        if not any(part in name for name in attentions):
            raise InvalidArgument.for_field(
                "settings.unmix_layers", f"{part[:80]!r} is in no cross-attention; there are {', '.join(attentions)}"
            )
    return [name for name in attentions if not wanted or any(part in name for part in wanted)]
