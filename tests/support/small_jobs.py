"""A fine-tuning spec of few steps, and an adapter of four numbers to publish."""

from typing import Any

import torch

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.training.defaults import complete_spec
from hueshift.training.spec import Method, SubjectKind, TrainingSpec

SMALL_ADAPTER = Adapter(AdapterKind.SPECTRAL, "b" * 64, "svdiff", spectral={"conv_in": torch.zeros(4)})


def small_spec(**given: Any) -> TrainingSpec:
    """A svdiff job on one picture, ten steps unless `given` says otherwise."""
    return complete_spec(
        method=Method.SVDIFF,
        subject_kind=SubjectKind.SUBJECT,
        identifier="sks",
        class_noun="animal",
        **{"captions": ["a sks animal"], "steps": 10, **given},
    )
